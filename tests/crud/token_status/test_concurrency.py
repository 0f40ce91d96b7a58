"""Concurrent scheduling, claims and outcomes of refreshes."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

import pytest
from sqlalchemy import ColumnElement

from tests.support import factories
from tests.support.concurrency import at_once, until_waiting
from tiger_db import (
    AuditAction,
    Database,
    TokenStatus,
)
from tiger_db.crud import accounts, token_status
from tiger_db.crud.token_status import scheduling
from tiger_db.crud.token_status.outcomes import update_refresh
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    LeaseLost,
)


@pytest.mark.slow
async def test_eight_workers_claim_each_refresh_once(crowd: Database) -> None:
    async with crowd.session() as session:
        for _ in range(40):
            await factories.refresh(session)
    all_have_claimed = asyncio.Barrier(8)

    async def work(session: AsyncSession, worker: str) -> list[UUID]:
        claims = await token_status.claim_due(session, worker=worker, limit=6)
        await all_have_claimed.wait()  # no worker commits before
        assert {claim.worker for claim in claims} <= {worker}
        return [claim.id for claim in claims]

    claimed = await at_once(crowd, [partial(work, worker=f"worker-{n}") for n in range(8)])
    ids = [refresh_id for claims in claimed for refresh_id in claims]
    assert len(ids) == len(set(ids)) == 40
    async with crowd.session() as session:
        refreshes = await token_status.history(session)
        assert {refresh.fencing_token for refresh in refreshes} == {1}


@pytest.mark.slow
async def test_concurrent_schedulers_open_one_refresh_per_account(crowd: Database) -> None:
    async with crowd.session() as session:
        due = [await factories.account_with_token(session) for _ in range(5)]
    opened = await at_once(crowd, [token_status.schedule_due] * 12)
    assert sorted(r.tiger_account_id for refreshes in opened for r in refreshes) == [
        account.id for account in due
    ]


@pytest.mark.slow
async def test_concurrent_callers_open_one_refresh(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)
    opened = await at_once(crowd, [partial(factories.refresh, of=account)] * 12)
    assert len({refresh.id for refresh in opened}) == 1
    async with crowd.session() as session:
        actions = [event.action for event in await factories.events(session)]
    assert actions.count(AuditAction.TOKEN_REFRESH_SCHEDULE) == 1


@pytest.mark.slow
@pytest.mark.parametrize("planned", [False, True])
async def test_concurrent_callers_of_refresh_now_get_one_refresh(
    crowd: Database, *, planned: bool
) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)
        if planned:
            later = datetime.now(UTC) + timedelta(days=1)
            await factories.refresh(session, account, scheduled_at=later)
        before = len(await factories.events(session))
    calls = [partial(token_status.refresh_now, account_id=account.id)] * 8
    refreshes = await at_once(crowd, calls)
    assert len({refresh.id for refresh in refreshes}) == 1
    assert [refresh.found for refresh in refreshes].count(False) == (not planned)
    async with crowd.session() as session:
        # One caller opened the refresh or brought the refresh forward.
        (event,) = (await factories.events(session))[before:]
        assert event.action == AuditAction.TOKEN_REFRESH_SCHEDULE
        assert len(await token_status.claim_due(session, worker="w")) == 1


async def claim(session: AsyncSession, refresh: TokenStatus) -> None:
    await token_status.claim(session, refresh.id, worker="w")


async def complete(session: AsyncSession, claim: TokenStatus) -> None:
    await token_status.complete(session, claim, access_token="new")


async def cancel(session: AsyncSession, claim: TokenStatus) -> None:
    await token_status.cancel(session, claim.id)


async def give_back(session: AsyncSession, claim: TokenStatus) -> None:
    await token_status.give_back(session, claim, wait=timedelta(days=1))


async def back_off(session: AsyncSession, claim: TokenStatus) -> None:
    await token_status.fail(session, claim, message="busy", retry_after=timedelta(days=1))


@pytest.mark.parametrize(
    ("work", "found", "status"),
    [
        (claim, True, "in_progress"),
        (complete, False, "pending"),
        (cancel, False, "pending"),
        (give_back, True, "pending"),
        (back_off, True, "pending"),
    ],
)
async def test_refresh_now_waits_for_what_a_worker_does_meanwhile(
    clone: Database,
    work: Callable[[AsyncSession, TokenStatus], Awaitable[None]],
    status: str,
    *,
    found: bool,
) -> None:
    async with clone.session() as session:
        refresh = await factories.refresh(session)
        if work is not claim:
            refresh = await token_status.claim(session, refresh.id, worker="w")

    async def ask() -> TokenStatus:
        async with clone.session() as session:
            return await token_status.refresh_now(session, refresh.tiger_account_id)

    async with clone.session() as worker:
        await work(worker, refresh)
        asking = asyncio.create_task(ask())
        async with clone.session() as session:
            await until_waiting(session, 1)
    now = await asyncio.wait_for(asking, 30)
    assert (now.id == refresh.id, now.found, now.status) == (found, found, status)
    async with clone.session() as session:
        claims = await token_status.claim_due(session, worker="other")
    assert [claimed.id for claimed in claims] == ([now.id] if status == "pending" else [])


async def test_a_refresh_does_not_end_while_refresh_now_brings_it_forward(
    clone: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = datetime.now(UTC) + timedelta(days=1)
    async with clone.session() as session:
        refresh = await factories.refresh(session, scheduled_at=later)

    async def cancel_it() -> None:
        async with clone.session() as session:
            await token_status.cancel(session, refresh.id)

    cancelling: list[asyncio.Task[None]] = []

    async def cancel_before_update(
        session: AsyncSession, criterion: ColumnElement[bool], **values: object
    ) -> TokenStatus | None:
        if not cancelling:
            cancelling.append(asyncio.create_task(cancel_it()))
            async with clone.session() as observer:
                await until_waiting(observer, 1, cancelling[0])
        return await update_refresh(session, criterion, **values)

    monkeypatch.setattr(scheduling, "update_refresh", cancel_before_update)
    async with clone.session() as session:
        now = await token_status.refresh_now(session, refresh.tiger_account_id)
        assert now.scheduled_at is not None
        assert now.scheduled_at < later
        assert not cancelling[0].done()
    await asyncio.wait_for(cancelling[0], 30)


@pytest.mark.slow
async def test_a_claim_is_completed_once(crowd: Database) -> None:
    async with crowd.session() as session:
        claim = await factories.claim(session)

    async def complete(session: AsyncSession, token: str) -> str | None:
        try:
            await token_status.complete(session, claim, access_token=token)
        except LeaseLost:
            return None
        return token

    ended = await at_once(crowd, [partial(complete, token=f"token-{n}") for n in range(8)])
    (winner,) = [token for token in ended if token]
    async with crowd.session() as session:
        account = await accounts.get(session, claim.tiger_account_id)
    assert account is not None
    assert account.access_token is not None
    assert account.access_token.get_secret_value() == winner

"""Concurrent scheduling, claims and outcomes of refreshes."""

import asyncio
from functools import partial
from uuid import UUID

import pytest

from tests.support import factories
from tests.support.concurrency import at_once
from tiger_db import (
    AuditAction,
    Database,
)
from tiger_db.crud import accounts, token_status
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


async def test_concurrent_schedulers_open_one_refresh_per_account(crowd: Database) -> None:
    async with crowd.session() as session:
        due = [await factories.account_with_token(session) for _ in range(5)]
    opened = await at_once(crowd, [token_status.schedule_due] * 12)
    assert sorted(r.tiger_account_id for refreshes in opened for r in refreshes) == [
        account.id for account in due
    ]


async def test_concurrent_callers_open_one_refresh(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)
    opened = await at_once(crowd, [partial(factories.refresh, of=account)] * 12)
    assert len({refresh.id for refresh in opened}) == 1
    async with crowd.session() as session:
        actions = [event.action for event in await factories.events(session)]
    assert actions.count(AuditAction.TOKEN_REFRESH_SCHEDULE) == 1


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

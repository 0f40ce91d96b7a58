"""Letting the history of refreshes go, seeing it at a glance, and who is told of new ones."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import text

from tests.support import factories
from tiger_db import Database, RefreshTrigger, TokenRefreshStatus, TokenStatus
from tiger_db.connections import connect
from tiger_db.crud import accounts, token_status
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidValue
from tiger_db.refresh_worker import CHANNEL

S = TokenRefreshStatus
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)

# Letting go


async def opened(
    session: AsyncSession, ago: timedelta, status: TokenRefreshStatus = S.SUCCESS
) -> TokenStatus:
    """A refresh of a new account that was opened so long ago."""
    milliseconds = round((datetime.now(UTC) - ago).timestamp() * 1000)
    account = await factories.account(session)
    row = TokenStatus(
        id=UUID(int=milliseconds << 80 | account.id.int % 2**64),
        tiger_account_id=account.id,
        trigger=RefreshTrigger.MANUAL,
        status=status,
    )
    if status == S.IN_PROGRESS:
        row.worker, row.lease_expires_at = "worker-1", datetime.now(UTC)
    session.add(row)
    await session.flush()
    return row


async def left(session: AsyncSession) -> set[UUID]:
    return {refresh.id for refresh in await token_status.history(session, limit=1000)}


async def test_what_ended_long_ago_goes(session: AsyncSession) -> None:
    old = {status: await opened(session, 31 * DAY, status) for status in S}
    young = await opened(session, 29 * DAY)
    assert await token_status.prune(session, older_than=32 * DAY) == 0
    assert await token_status.prune(session, older_than=30 * DAY) == 4
    assert await left(session) == {old[S.PENDING].id, old[S.IN_PROGRESS].id, young.id}
    assert await token_status.prune(session, older_than=30 * DAY) == 0


@pytest.mark.parametrize("off", [[], ["hashjoin", "hashagg", "mergejoin", "material", "sort"]])
async def test_the_oldest_go_first_and_no_more_than_the_limit(
    session: AsyncSession, off: list[str]
) -> None:
    """Whatever the plan: one that runs the search again for each row would find others."""
    for method in off:
        await session.execute(text(f"SET LOCAL enable_{method} = off"))
    ids = [(await opened(session, days * DAY)).id for days in (5, 4, 3, 2)]
    assert await token_status.prune(session, older_than=DAY, limit=3) == 3
    assert await left(session) == {ids[-1]}
    assert await token_status.prune(session, older_than=DAY, limit=3) == 1


@pytest.mark.parametrize("older_than", [timedelta(0), -DAY])
async def test_not_everything_goes(session: AsyncSession, older_than: timedelta) -> None:
    await opened(session, DAY)
    with pytest.raises(InvalidValue, match="older_than"):
        await token_status.prune(session, older_than=older_than)
    assert len(await left(session)) == 1


async def test_two_who_prune_do_not_wait_for_each_other(clone: Database) -> None:
    async with clone.session() as session:
        for _ in range(4):
            await opened(session, 2 * DAY)
    async with clone.session() as one, clone.session() as other:
        assert await token_status.prune(one, older_than=DAY, limit=3) == 3
        assert await token_status.prune(other, older_than=DAY, limit=3) == 1


# At a glance


async def test_an_overview(session: AsyncSession) -> None:
    now = datetime.now(UTC)
    since = now - MINUTE
    running = [await factories.claim(session) for _ in range(2)]
    dead = await factories.claim(session, max_retries=1)
    await token_status.fail(session, dead, error="no answer")
    dead_too = await factories.claim(session)
    await token_status.fail(session, dead_too, error="refused", credentials_refused=True)
    await opened(session, DAY, S.FAILED)
    await opened(session, DAY)
    again = await factories.claim(session)
    await token_status.fail(session, again, error="busy", retry_after=5 * MINUTE)
    later = await factories.refresh(session, scheduled_at=now + 9 * MINUTE)
    due = [await factories.refresh(session, scheduled_at=now - n * MINUTE) for n in (1, 2)]
    session.expunge_all()
    groups = await token_status.overview(session, since=since)
    assert {name: [row.id for row in rows] for name, rows in groups.items()} == {
        "running": [row.id for row in running],
        "due": [due[1].id, due[0].id],
        "waiting": [again.id, later.id],
        "failed": [dead_too.id, dead.id],
    }
    first = await token_status.overview(session, since=since, limit=1)
    assert [len(rows) for rows in first.values()] == [1, 1, 1, 1]
    assert len((await token_status.overview(session, since=now - 2 * DAY))["failed"]) == 3


async def test_an_overview_of_nothing(session: AsyncSession) -> None:
    groups = await token_status.overview(session, since=datetime.now(UTC))
    assert groups == {"running": [], "due": [], "waiting": [], "failed": []}
    with pytest.raises(InvalidValue, match="since"):
        await token_status.overview(session, since=datetime(2026, 1, 1))  # noqa: DTZ001  # the point
    for limit in (0, 1001):
        with pytest.raises(InvalidValue, match="limit"):
            await token_status.overview(session, since=datetime.now(UTC), limit=limit)


# Who is told


@asynccontextmanager
async def listening(database: Database) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """A function that counts what was heard since it was last called."""
    heard: asyncio.Queue[str] = asyncio.Queue()
    listener, teller = [await connect(database.settings) for _ in range(2)]

    async def count() -> int:
        await teller.execute(f"NOTIFY {CHANNEL}, 'enough'")
        number = 0
        async with asyncio.timeout(20):
            while await heard.get() != "enough":
                number += 1
        return number

    try:
        await listener.add_listener(CHANNEL, lambda *args: heard.put_nowait(args[-1]))
        yield count
    finally:
        await listener.close()
        await teller.close()


async def test_workers_are_told_of_what_becomes_pending(clone: Database) -> None:
    async with listening(clone) as heard:
        async with clone.session() as session:
            account = await factories.account_with_token(session)
            assert await heard() == 0
            (opened,) = await token_status.schedule_due(session)
            assert await heard() == 0  # not before the commit
        assert await heard() == 1
        async with clone.session() as session:
            claim = await token_status.claim(session, opened.id, worker="w")
        async with clone.session() as session:
            await token_status.heartbeat(session, claim)
        assert await heard() == 0
        async with clone.session() as session:
            await token_status.fail(session, claim, error="busy", retry_after=timedelta(0))
        assert await heard() == 1
        async with clone.session() as session:
            (claim,) = await token_status.claim_due(session, worker="w")
        async with clone.session() as session:
            await token_status.give_back(session, claim)
        assert await heard() == 1
        async with clone.session() as session:
            claim = await token_status.claim(session, claim.id, worker="w")
        async with clone.session() as session:
            await token_status.fail(session, claim, error="refused", credentials_refused=True)
        assert await heard() == 0
        async with clone.session() as session:
            await token_status.retry(session, claim.id)
        assert await heard() == 1
        async with clone.session() as session:
            await accounts.update(session, account.id, status="active")
            (claim,) = await token_status.claim_due(session, worker="w")
            await token_status.complete(session, claim, access_token="new")
            other = await factories.refresh(session, account)
        assert await heard() == 1
        async with clone.session() as session:
            await token_status.cancel(session, other.id)
        assert await heard() == 0


async def test_what_is_rolled_back_is_told_to_nobody(clone: Database) -> None:
    async with listening(clone) as heard:
        with pytest.raises(ZeroDivisionError):
            async with clone.session() as session:
                await factories.refresh(session)
                _ = 1 / 0
        assert await heard() == 0

"""Notifications about refreshes that are pending or have ended."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from tests.support import factories
from tiger_db import AccountStatus, Database
from tiger_db.connections import connect
from tiger_db.crud import accounts, token_status
from tiger_db.models.token_status import CHANNEL


@asynccontextmanager
async def listening(database: Database) -> AsyncIterator[Callable[[], Awaitable[list[str]]]]:
    """Yield a function that returns the payloads of the notifications since its last call."""
    heard: asyncio.Queue[str] = asyncio.Queue()
    listener, teller = [await connect(database.settings) for _ in range(2)]

    async def payloads() -> list[str]:
        await teller.execute(f"NOTIFY {CHANNEL}, 'enough'")
        found = []
        async with asyncio.timeout(20):
            while (payload := await heard.get()) != "enough":
                found.append(payload)
        return found

    try:
        await listener.add_listener(CHANNEL, lambda *args: heard.put_nowait(args[-1]))
        yield payloads
    finally:
        await listener.close()
        await teller.close()


PENDING = [""]  # the payloads of one notification about pending refreshes


@pytest.mark.slow
async def test_pending_and_ended_refreshes_are_notified(clone: Database) -> None:
    async with listening(clone) as heard:
        async with clone.session() as session:
            account = await factories.account_with_token(session)
            assert await heard() == []
            (opened,) = await token_status.schedule_due(session)
            assert await heard() == []  # not before the commit
        assert await heard() == PENDING
        async with clone.session() as session:
            claim = await token_status.claim(session, opened.id, worker="w")
        async with clone.session() as session:
            await token_status.heartbeat(session, claim)
        assert await heard() == []
        async with clone.session() as session:
            await token_status.fail(session, claim, message="busy", retry_after=timedelta(days=1))
        assert await heard() == PENDING
        async with clone.session() as session:
            await token_status.refresh_now(session, account.id)
        assert await heard() == PENDING
        async with clone.session() as session:
            await token_status.refresh_now(session, account.id)  # due already
        assert await heard() == []
        async with clone.session() as session:
            (claim,) = await token_status.claim_due(session, worker="w")
        async with clone.session() as session:
            await token_status.give_back(session, claim)
        assert await heard() == PENDING
        async with clone.session() as session:
            claim = await token_status.claim(session, claim.id, worker="w")
        async with clone.session() as session:
            await token_status.fail(session, claim, message="refused", credentials_refused=True)
        assert await heard() == [str(claim.id)]
        async with clone.session() as session:
            await token_status.retry(session, claim.id)
        assert await heard() == PENDING
        async with clone.session() as session:
            await accounts.update(session, account.id, status=AccountStatus.ACTIVE)
            (claim,) = await token_status.claim_due(session, worker="w")
            await token_status.complete(session, claim, access_token="new")
            other = await factories.refresh(session, account)
        assert sorted(await heard()) == [*PENDING, str(claim.id)]
        async with clone.session() as session:
            await token_status.cancel(session, other.id)
        assert await heard() == [str(other.id)]


async def test_a_refresh_that_is_given_up_for_its_lease_is_notified(clone: Database) -> None:
    async with clone.session() as session:
        refresh = await factories.refresh(session, max_retries=1)
        await token_status.claim(session, refresh.id, worker="w", lease=timedelta(microseconds=1))
    async with listening(clone) as heard:
        async with clone.session() as session:
            assert await token_status.fail_expired_leases(session) == 1
        assert await heard() == [str(refresh.id)]


async def test_a_rollback_sends_no_notification(clone: Database) -> None:
    async with listening(clone) as heard:
        with pytest.raises(ZeroDivisionError):
            async with clone.session() as session:
                await factories.refresh(session)
                _ = 1 / 0
        assert await heard() == []

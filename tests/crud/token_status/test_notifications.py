"""Notifications of workers about pending refreshes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from tests.support import factories
from tiger_db import Database, TokenRefreshStatus
from tiger_db.connections import connect
from tiger_db.crud import accounts, token_status
from tiger_db.refresh_worker import CHANNEL

S = TokenRefreshStatus


@asynccontextmanager
async def listening(database: Database) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Yield a function that counts the notifications since its last call."""
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


async def test_workers_are_notified_of_pending_refreshes(clone: Database) -> None:
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
            await token_status.fail(session, claim, message="busy", retry_after=timedelta(0))
        assert await heard() == 1
        async with clone.session() as session:
            (claim,) = await token_status.claim_due(session, worker="w")
        async with clone.session() as session:
            await token_status.give_back(session, claim)
        assert await heard() == 1
        async with clone.session() as session:
            claim = await token_status.claim(session, claim.id, worker="w")
        async with clone.session() as session:
            await token_status.fail(session, claim, message="refused", credentials_refused=True)
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


async def test_a_rollback_sends_no_notification(clone: Database) -> None:
    async with listening(clone) as heard:
        with pytest.raises(ZeroDivisionError):
            async with clone.session() as session:
                await factories.refresh(session)
                _ = 1 / 0
        assert await heard() == 0

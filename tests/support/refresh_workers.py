"""Refresh workers in this process, refreshers for them, and look-ups of the results."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from tests.support import factories
from tests.support.refresh_gateway import make_token
from tests.support.tiger_tokens import tiger_token
from tests.support.waiting import until
from tiger_db import (
    AuditAction,
    AuditLog,
    Database,
    RefreshWorker,
    TigerAccount,
    TokenStatus,
    crud,
)
from tiger_db.models.token_status import NewToken
from tiger_db.refresh_worker import Refresher

SECOND = timedelta(seconds=1)


def fresh() -> NewToken:
    return NewToken(make_token(round(time.time() * 1000)))


async def at_once(_: TigerAccount) -> NewToken:
    return fresh()


class Gate:
    """Refresher that waits for `go` before it answers."""

    def __init__(self, result: NewToken | Exception | None = None) -> None:
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.times = 0
        self.result = result or fresh()

    async def __call__(self, _: TigerAccount) -> NewToken:
        self.times += 1
        self.asked.set()
        await asyncio.wait_for(self.go.wait(), 30)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def failing(*errors: Exception) -> Refresher:
    """Return a refresher that raises these errors in turn, and the last of them again.

    The random backoff can be so short that the next attempt is due in the same run.
    """
    left = list(errors)

    async def fail(_: TigerAccount) -> NewToken:
        raise left.pop(0) if len(left) > 1 else left[0]

    return fail


@asynccontextmanager
async def working(
    database: Database, refresher: Refresher, **options: Any
) -> AsyncIterator[RefreshWorker]:
    """Run a worker during the block."""
    worker = RefreshWorker(database, refresher, per_minute=1000, **options)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        await asyncio.wait_for(task, 30)


async def counted(worker: RefreshWorker, name: str, count: int = 1) -> None:
    async def enough() -> bool:
        return worker.counts[name] >= count

    await until(enough)


async def opened(database: Database, **fields: object) -> TokenStatus:
    """Open a refresh that is due, for an account whose token is not due."""
    token = tiger_token(datetime.now(UTC) - SECOND)
    async with database.session() as session:
        account = await factories.account(session, access_token=token)
        return await factories.refresh(session, account, **fields)


async def row(database: Database, refresh_id: UUID) -> TokenStatus:
    async with database.session() as session:
        found = await crud.token_status.get(session, refresh_id)
    assert found is not None
    return found


async def account_of(database: Database, account_id: UUID) -> TigerAccount:
    async with database.session() as session:
        found = await crud.accounts.get(session, account_id)
    assert found is not None
    return found


async def events(database: Database, action: AuditAction) -> list[AuditLog]:
    async with database.session() as session:
        return [event for event in await factories.events(session) if event.action == action]


async def run_once(
    database: Database, refresher: Refresher, *, concurrency: int = 4, per_minute: int = 10
) -> RefreshWorker:
    worker = RefreshWorker(database, refresher, concurrency=concurrency, per_minute=per_minute)
    await asyncio.wait_for(worker.run(once=True), 30)
    return worker

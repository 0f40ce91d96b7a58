"""Concurrent callers, which meet at a barrier or wait for a lock."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from sqlalchemy import text

from tiger_db import Database
from tiger_db.crud import accounts
from tiger_db.database import AsyncSession

T = TypeVar("T")
_WAITING = text(
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


async def at_once(
    database: Database, calls: Sequence[Callable[[AsyncSession], Awaitable[T]]]
) -> list[T]:
    """Run each call in its own session, after all sessions have read; return the results."""
    gate = asyncio.Barrier(len(calls))

    async def one(call: Callable[[AsyncSession], Awaitable[T]]) -> T:
        async with database.session() as session:
            await accounts.list_accounts(session)
            await gate.wait()
            return await call(session)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(call)) for call in calls]
    return [task.result() for task in tasks]


async def until_waiting(
    session: AsyncSession, connections: int, task: "asyncio.Task[None] | None" = None
) -> None:
    """Wait until this many connections wait for a lock, or until the task is done."""
    async with asyncio.timeout(30):
        while await session.scalar(_WAITING) < connections and not (task and task.done()):
            await session.execute(text("SELECT pg_stat_clear_snapshot()"))
            await asyncio.sleep(0.01)


@asynccontextmanager
async def lock_until_waiting(
    database: Database, table: str, waiting: int
) -> AsyncIterator[AsyncSession]:
    """Lock all rows of a table until this many connections wait for a lock, then commit."""
    async with database.session() as session:
        await session.execute(text(f"SELECT FROM {table} FOR UPDATE"))
        yield session
        await until_waiting(session, waiting)

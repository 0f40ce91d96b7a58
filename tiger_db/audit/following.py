"""Follow the audit trail: return events as they are committed."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, suppress
from typing import Unpack

from sqlalchemy import select
from sqlmodel import col

from tiger_db.audit.storage import settled
from tiger_db.connections.listener import listening
from tiger_db.crud.audit_logs import Criteria, conditions
from tiger_db.crud.common import fetch_all
from tiger_db.database import Database
from tiger_db.errors import DatabaseUnavailable
from tiger_db.models import AuditLog

CHANNEL = "tiger_db_audit_logs"
POLL = 1.0  # seconds without a notification until the next query
_BEFORE = 10_000  # positions that transactions which are open at the start may still write


async def follow(
    database: Database,
    *,
    begun: Callable[[], None] = lambda: None,  # called when every later event will be found
    **wanted: Unpack[Criteria],
) -> AsyncGenerator[AuditLog, None]:
    """Return the events that are committed from now on, each once, in the order of their positions.

    A notification of PostgreSQL starts each query; without notifications there is one per second.
    An event whose transaction commits late comes late.

    Raises:
        InvalidValue: as `crud.audit_logs.search`.
        DatabaseUnavailable: the database was lost.
    """
    found = conditions(**wanted)
    news = asyncio.Event()
    async with AsyncExitStack() as stack:
        with suppress(DatabaseUnavailable):  # then it polls
            hearing = listening(database.settings, CHANNEL, lambda _: news.set())
            await stack.enter_async_context(hearing)
        floor, seen = await _begin(database)
        taken, writers = await _settled(database)
        begun()
        while True:
            news.clear()
            async with database.session() as session:
                events = await fetch_all(
                    session,
                    select(AuditLog)
                    .where(col(AuditLog.position) > floor, *found)
                    .order_by(col(AuditLog.position)),
                )
            for event in events:
                if event.position not in seen:
                    seen.add(event.position)
                    yield event
            if not writers:
                # No transaction can write up to this position any more.
                floor, seen = taken, {p for p in seen if p and p > taken}
                taken, writers = await _settled(database)
            else:
                writers &= (await _settled(database))[1]
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), POLL)


async def _begin(database: Database) -> tuple[int, set[int | None]]:
    """Return the position after which to search, and the positions of the old events there."""
    await database.check()
    taken, _ = await _settled(database)
    floor = max(taken - _BEFORE, 0)
    async with database.session() as session:
        positions = await session.scalars(
            select(col(AuditLog.position)).where(col(AuditLog.position) > floor)
        )
        return floor, set(positions)


async def _settled(database: Database) -> tuple[int, set[str]]:
    async with database.out_of_band.connection() as connection:
        taken, writers = await settled(connection)
    return taken, set(writers)

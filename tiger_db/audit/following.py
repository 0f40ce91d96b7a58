"""Stream of the events that are committed from now on."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, suppress
from typing import Unpack

from sqlalchemy import select
from sqlmodel import col

from tiger_db.audit import storage
from tiger_db.connections.listener import open_listener
from tiger_db.crud.audit_logs import Criteria, conditions
from tiger_db.crud.common import fetch_all
from tiger_db.database import Database
from tiger_db.errors import DatabaseUnavailable
from tiger_db.models import AuditLog

CHANNEL = "tiger_db_audit_logs"
POLL_SECONDS = 1.0  # without a notification
# Transactions that are open at the start may still write at the last positions.
_POSITIONS_OF_OPEN_TRANSACTIONS = 10_000


async def follow(
    database: Database, *, begun: Callable[[], None] = lambda: None, **wanted: Unpack[Criteria]
) -> AsyncGenerator[AuditLog, None]:
    """Yield the events that are committed from now on, once each.

    The events of each query are in the order of their positions. A notification of PostgreSQL
    starts each query; without notifications there is one query per second. An event appears when
    its transaction commits, even after events with higher positions. `begun` is called when all
    later events will be found.

    Raises:
        InvalidValue: See `crud.audit_logs.search`.
        DatabaseUnavailable: The connection was lost.
    """
    filters = conditions(**wanted)
    notified = asyncio.Event()
    async with AsyncExitStack() as stack:
        with suppress(DatabaseUnavailable):  # without LISTEN, it polls
            listener = open_listener(database.settings, CHANNEL, lambda _: notified.set())
            await stack.enter_async_context(listener)
        # All events up to `floor` are old or were yielded; above it, those in `seen`.
        floor, seen = await _fetch_old_events(database)
        last_position, writers = await _fetch_writers(database)
        begun()
        while True:
            notified.clear()
            async with database.session() as session:
                events = await fetch_all(
                    session,
                    select(AuditLog)
                    .where(col(AuditLog.position) > floor, *filters)
                    .order_by(col(AuditLog.position)),
                )
            for event in events:
                if event.position not in seen:
                    seen.add(event.position)
                    yield event
            if not writers:  # no transaction can write up to `last_position` any more
                floor = last_position
                seen = {position for position in seen if position and position > floor}
                last_position, writers = await _fetch_writers(database)
            else:
                writers &= (await _fetch_writers(database))[1]
            with suppress(TimeoutError):
                await asyncio.wait_for(notified.wait(), POLL_SECONDS)


async def _fetch_old_events(database: Database) -> tuple[int, set[int | None]]:
    """Return the position above which to search, and the positions of the old events there."""
    await database.check()
    last_position, _ = await _fetch_writers(database)
    floor = max(last_position - _POSITIONS_OF_OPEN_TRANSACTIONS, 0)
    async with database.session() as session:
        positions = await session.scalars(
            select(col(AuditLog.position)).where(col(AuditLog.position) > floor)
        )
        return floor, set(positions)


async def _fetch_writers(database: Database) -> tuple[int, set[str]]:
    async with database.out_of_band.connection() as connection:
        last_position, writers = await storage.fetch_writers(connection)
    return last_position, set(writers)

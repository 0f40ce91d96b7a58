"""Stream of the audit events that are committed after the stream starts."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, suppress
from typing import Unpack

from sqlalchemy import ARRAY, BigInteger, ColumnElement, all_, literal, select
from sqlmodel import col

from tiger_db.audit import storage
from tiger_db.connections.listener import open_listener
from tiger_db.crud.audit_logs.queries import EventFilters, event_conditions
from tiger_db.crud.common import fetch_all
from tiger_db.database import Database
from tiger_db.errors import DatabaseUnavailable
from tiger_db.models import AuditLog
from tiger_db.public import Progress, no_progress, public

CHANNEL = "tiger_db_audit_logs"
POLL_SECONDS = 1.0  # Maximum pause between two queries for new events, in seconds.
# `follow` assumes that each event of an open transaction is among the 10,000 newest events.
_POSITIONS_OF_OPEN_TRANSACTIONS = 10_000


@public
def follow(
    database: Database, *, progress: Progress = no_progress, **filters: Unpack[EventFilters]
) -> AsyncGenerator[AuditLog, None]:
    """Yield each audit event that matches all filters and is committed after `follow` has begun.

    `follow` has begun when it calls `progress` for the first time. `follow` queries the database
    after each NOTIFY of PostgreSQL, or after one second without a NOTIFY. The events of one query
    are yielded in the order of positions. If a transaction commits late, the events of the
    transaction are yielded after events with higher positions. `follow` calls `progress(0, None)`
    before it waits for the first event. After each event, `follow` calls `progress(done, None)`,
    where `done` is the number of events that it has yielded so far.

    Raises:
        InvalidValue: A filter is not valid. See `crud.audit_logs.search`.
        DatabaseUnavailable: The connection to the database was lost.
    """
    return _follow(database, progress, event_conditions(**filters))


async def _follow(
    database: Database, progress: Progress, conditions: list[ColumnElement[bool]]
) -> AsyncGenerator[AuditLog, None]:
    notified = asyncio.Event()
    async with AsyncExitStack() as stack:
        # If LISTEN is unavailable, `follow` queries for new events every second.
        with suppress(DatabaseUnavailable):
            listener = open_listener(database.settings, CHANNEL, lambda _: notified.set())
            await stack.enter_async_context(listener)
        # `follow` yields no event whose position is at most `floor` or is in `seen`.
        floor, seen = await _fetch_old_events(database)
        last_position, writers = await _fetch_writers(database)
        count = 0
        progress(count, None)
        while True:
            notified.clear()
            async with database.session() as session:
                events = await fetch_all(
                    session,
                    select(AuditLog)
                    .where(
                        col(AuditLog.position) > floor,
                        col(AuditLog.position) != all_(literal([*seen], ARRAY(BigInteger))),
                        *conditions,
                    )
                    .order_by(col(AuditLog.position)),
                )
            for event in events:
                seen.add(event.position)
                yield event
                count += 1
                progress(count, None)
            # If `writers` is empty, no transaction can still add an event up to `last_position`.
            if not writers:
                floor = last_position
                seen = {position for position in seen if position and position > floor}
                last_position, writers = await _fetch_writers(database)
            else:
                writers &= (await _fetch_writers(database))[1]
            with suppress(TimeoutError):
                await asyncio.wait_for(notified.wait(), POLL_SECONDS)


async def _fetch_old_events(database: Database) -> tuple[int, set[int | None]]:
    """Return a position `floor`, and the positions of all existing events above `floor`."""
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

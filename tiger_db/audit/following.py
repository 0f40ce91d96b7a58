"""Tells of events as they are committed."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Unpack

from sqlalchemy import select
from sqlmodel import col

from tiger_db.audit.stored import settled
from tiger_db.crud.audit_logs.reading import Criteria, criteria
from tiger_db.crud.common import many
from tiger_db.database import Database, connect_directly
from tiger_db.errors import DatabaseUnavailable
from tiger_db.models import AuditLog
from tiger_db.sqlstates import raw_errors

CHANNEL = "tiger_db_audit_logs"
POLL = 1.0  # seconds after which it looks, though nothing was heard
_BEFORE = 10_000  # places in which a transaction that is open at the start may still write


async def follow(
    database: Database,
    *,
    begun: Callable[[], None] = lambda: None,  # told when nothing more is missed
    **wanted: Unpack[Criteria],
) -> AsyncGenerator[AuditLog, None]:
    """The events that are committed from now on, each once, in the order of their places.

    PostgreSQL tells when there are some; without that, every second is one look. An event whose
    transaction commits late comes late. It ends when the database is lost.

    Raises:
        InvalidValue: as `crud.audit_logs.search`.
        DatabaseUnavailable: the database was lost.
    """
    found = criteria(**wanted)
    async with _told(database) as news:
        floor, seen = await _begin(database)
        taken, writers = await _settled(database)
        begun()
        while True:
            news.clear()
            async with database.session() as session:
                events = await many(
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
                # Nothing can come any more up to there.
                floor, seen = taken, {place for place in seen if place and place > taken}
                taken, writers = await _settled(database)
            else:
                writers &= (await _settled(database))[1]
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), POLL)


async def _begin(database: Database) -> tuple[int, set[int | None]]:
    """A place from which on to look, and the events there that are history."""
    await database.check()
    taken, _ = await _settled(database)
    floor = max(taken - _BEFORE, 0)
    async with database.session() as session:
        places = await session.scalars(
            select(col(AuditLog.position)).where(col(AuditLog.position) > floor)
        )
        return floor, set(places)


async def _settled(database: Database) -> tuple[int, set[str]]:
    async with database.write_behind.connection() as connection:
        taken, writers = await settled(connection)
    return taken, set(writers)


@asynccontextmanager
async def _told(database: Database) -> AsyncIterator[asyncio.Event]:
    """An event that is set when there is news; if the connection for that is lost, it is not."""
    news = asyncio.Event()
    try:
        connection = await connect_directly(database.settings)
    except DatabaseUnavailable:
        yield news
        return
    try:
        channel = database.settings.channel(CHANNEL)
        with raw_errors():
            await connection.add_listener(channel, lambda *_: news.set())
        yield news
    finally:
        connection.terminate()

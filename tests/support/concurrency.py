"""Callers that wait for each other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text

from tiger_db import (
    Database,
)
from tiger_db.database import AsyncSession

WAITING = text(
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


@asynccontextmanager
async def nobody_passes(
    database: Database, table: str, waiting: int
) -> AsyncIterator[AsyncSession]:
    """A lock on all rows of a table, let go at the end, when so many connections wait for it.

    What the session does meanwhile is committed.
    """
    async with database.session() as session:
        await session.execute(text(f"SELECT FROM {table} FOR UPDATE"))
        yield session
        async with asyncio.timeout(30):
            while await session.scalar(WAITING) < waiting:
                await session.execute(text("SELECT pg_stat_clear_snapshot()"))
                await asyncio.sleep(0.01)

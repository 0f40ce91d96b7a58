"""Benchmarks of sessions, compared with SQLAlchemy's sessions."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.work import Work
from tiger_db import Database
from tiger_db.connections import connect_args


@asynccontextmanager
async def works(database: Database) -> AsyncIterator[list[Work]]:
    settings = database.settings
    engine = create_async_engine(
        "postgresql+asyncpg://",
        connect_args=dict(await connect_args(settings)),
        pool_size=settings.db_pool_size,
        max_overflow=settings.db_max_overflow,
        pool_timeout=settings.db_pool_timeout,
        pool_recycle=settings.db_pool_recycle,
        hide_parameters=True,
    )
    bare = async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)
    statement = text("SELECT 1")

    async def ours() -> None:
        async with database.session() as session:
            await session.execute(statement)

    async def theirs() -> None:
        async with bare() as session:
            await session.execute(statement)
            await session.commit()

    yield [
        Work("a session of one statement, compared with SQLAlchemy's session", ours, theirs, 300)
    ]
    await engine.dispose()

"""What a session of ours costs beside a bare one of SQLAlchemy, and how fast a process starts."""

import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.work import Work
from tiger_db import Database
from tiger_db.connections import connect_args

STARTS = 31  # of each program
_EMPTY = """
import typer
app = typer.Typer()
@app.command()
def nothing() -> None:
    pass
app()
"""


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

    yield [Work("a session of one statement, beside a bare one of SQLAlchemy", ours, theirs, 300)]
    await engine.dispose()


def facts() -> Iterator[str]:
    ours, bare, names = _starts(
        ["-c", "import tiger_db"],
        ["-c", "import sqlmodel, sqlalchemy.ext.asyncio"],
        ["-c", "from tiger_db import *"],
    )
    yield (
        f"`import tiger_db`, a process from start to end: {ours * 1000:.0f} ms, as names are loaded"
        f" when first asked for; all of them: {names * 1000:.0f} ms, where sqlmodel and"
        f" sqlalchemy.ext.asyncio take {bare * 1000:.0f} ms."
    )
    ours, empty = _starts(["-m", "tiger_db", "--help"], ["-c", _EMPTY, "--help"])
    yield (
        f"`tiger-db --help`: {ours * 1000:.0f} ms, {ours / empty:.2f} times an empty typer"
        f" application's {empty * 1000:.0f} ms."
    )


def _starts(*programs: list[str]) -> list[float]:
    """Seconds that each takes from start to end: the median of processes that take turns."""
    taken: list[list[float]] = [[] for _ in programs]
    for _ in range(STARTS):
        for program, seconds in zip(programs, taken, strict=True):
            start = time.perf_counter()
            subprocess.run([sys.executable, *program], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]

"""Benchmarks of sessions, compared with SQLAlchemy's sessions, and of the start of processes."""

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

STARTS = 31  # processes of each program
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

    yield [
        Work("a session of one statement, compared with SQLAlchemy's session", ours, theirs, 300)
    ]
    await engine.dispose()


def facts() -> Iterator[str]:
    ours, bare, names = _starts(
        ["-c", "import tiger_db"],
        ["-c", "import sqlmodel, sqlalchemy.ext.asyncio"],
        ["-c", "from tiger_db import *"],
    )
    yield (
        f"A process with `import tiger_db`: {ours * 1000:.0f} ms, because names are loaded at first"
        f" use. With all names: {names * 1000:.0f} ms. A process that imports only sqlmodel and"
        f" sqlalchemy.ext.asyncio: {bare * 1000:.0f} ms."
    )
    ours, empty = _starts(["-m", "tiger_db", "--help"], ["-c", _EMPTY, "--help"])
    yield (
        f"`tiger-db --help`: {ours * 1000:.0f} ms, {ours / empty:.2f} times as long as an empty"
        f" typer application ({empty * 1000:.0f} ms)."
    )


def _starts(*programs: list[str]) -> list[float]:
    """Return the median seconds of a process of each program; the programs take turns."""
    taken: list[list[float]] = [[] for _ in programs]
    for _ in range(STARTS):
        for program, seconds in zip(programs, taken, strict=True):
            start = time.perf_counter()
            subprocess.run([sys.executable, *program], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]

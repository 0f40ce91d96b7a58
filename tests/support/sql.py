"""SQL sent past tiger_db."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, TypeVar

import asyncpg

from tiger_db import (
    Database,
    Settings,
)
from tiger_db.connections import connect
from tiger_db.database import AsyncSession


async def sql(settings: Settings, *statements: str) -> object:
    """The first value that the last one gives."""
    connection = await connect(settings)
    try:
        for statement in statements[:-1]:
            await connection.execute(statement)
        return await connection.fetchval(statements[-1])
    finally:
        await connection.close()


async def sql_without_search_path(settings: Settings, *statements: str) -> object:
    """Do the same as `sql` in a session with the default search path of the role."""
    arguments = settings.connect_args()
    del arguments["server_settings"]["search_path"]
    connection = await asyncpg.connect(**arguments)
    try:
        for statement in statements[:-1]:
            await connection.execute(statement)
        return await connection.fetchval(statements[-1])
    finally:
        await connection.close()


# The catalog of Citus, as its documentation and its installation script describe it.
CITUS_CATALOG = (
    "CREATE SCHEMA citus",
    """CREATE TABLE citus.pg_dist_partition (logicalrelid regclass NOT NULL,
        partmethod "char" NOT NULL, partkey text, colocationid integer DEFAULT 0 NOT NULL,
        repmodel "char" DEFAULT 'c' NOT NULL, autoconverted boolean DEFAULT false NOT NULL)""",
    "ALTER TABLE citus.pg_dist_partition SET SCHEMA pg_catalog",
)


def months(first: int, last: int) -> list[str]:
    """The partitions of these months from now."""
    now = datetime.now(UTC)
    return [
        f"audit_logs_{now.year + (now.month - 1 + n) // 12}_{(now.month - 1 + n) % 12 + 1:02}"
        for n in range(first, last + 1)
    ]


def run_sql(settings: Settings, *statements: str) -> None:
    async def run() -> None:
        connection = await connect(settings)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run())


T = TypeVar("T")


def write(settings: Settings, work: Callable[[AsyncSession], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        async with Database(settings) as database, database.session() as session:
            return await work(session)

    return asyncio.run(run())

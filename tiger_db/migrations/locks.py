"""Migrations take turns, and give way to those who queue behind them."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import TypeVar

from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tiger_db.errors import Conflict, DatabaseUnavailable, MigrationError

T = TypeVar("T")
Progress = Callable[[str], None]
MIGRATION_LOCK_ID = 0x7469676572  # "tiger": one migration at a time in each schema, whoever runs it


def lock_key(number: int) -> str:
    """The SQL expression of an advisory lock's key in the session's schema.

    In `public` it is the number itself, as in releases without `DB_SCHEMA`.
    """
    return (
        f"CASE coalesce(current_schema(), 'public') WHEN 'public' THEN {number}"
        f" ELSE pg_catalog.hashtextextended(current_schema(), {number}) END"
    )


# Whoever needs what a migration waits for waits behind it. More than the server's deadlock_timeout:
# only then does autovacuum give way to a migration.
LOCK_TIMEOUT = "SET LOCAL lock_timeout = '2s'"
_LOCK_RETRY_SECONDS = 300.0  # seconds for one migration to get its locks
_MAX_PAUSE_SECONDS = 15.0  # seconds at most between two attempts, in which those who queued get on
_MIGRATION_LOCK_SECONDS = 3600.0  # seconds to wait for another's migrations
_POLL_SECONDS = 0.5  # seconds between two looks
_REPORT_SECONDS = 30.0  # seconds between two lines about the same wait
_SESSION = """
CASE pid WHEN 0 THEN 'a prepared transaction' ELSE concat('process ', pid, ' (', concat_ws(', ',
    nullif(application_name, ''), usename, host(client_addr), state, 'in a transaction for '
    || round(extract(epoch FROM clock_timestamp() - xact_start)) || ' s'), ')') END
"""
_BLOCKERS = text(
    f"SELECT {_SESSION} FROM unnest(pg_blocking_pids(:pid)) AS blocker (pid)"  # noqa: S608  # constants
    " LEFT JOIN pg_stat_activity USING (pid) ORDER BY xact_start"
)
_MIGRATING = text(
    f"SELECT {_SESSION} FROM pg_locks LEFT JOIN pg_stat_activity USING (pid)"  # noqa: S608  # constants
    " WHERE locktype = 'advisory' AND granted AND objsubid = 1"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    f" AND (CAST(classid AS bigint) << 32) + CAST(objid AS bigint) = {lock_key(MIGRATION_LOCK_ID)}"
)


@asynccontextmanager
async def migration_lock(engine: AsyncEngine, progress: Progress) -> AsyncIterator[AsyncConnection]:
    """A connection that alone may migrate, and waits for no lock longer than `LOCK_TIMEOUT` says.

    Raises:
        MigrationError: others migrated for an hour.
    """
    async with engine.connect() as connection:
        await _wait(connection, progress)
        # Each transaction says it anew: a SET before Alembic's first one would begin that. In an
        # autocommit_block there is none, and CONCURRENTLY waits without holding anybody up.
        assert connection.sync_connection is not None
        event.listen(connection.sync_connection, "begin", _hurry)
        try:
            yield connection
        finally:
            await connection.rollback()
            await connection.execute(
                text(f"SELECT pg_advisory_unlock({lock_key(MIGRATION_LOCK_ID)})")
            )
            await connection.commit()


def _hurry(connection: Connection) -> None:
    connection.exec_driver_sql(LOCK_TIMEOUT)


async def _wait(connection: AsyncConnection, progress: Progress) -> None:
    """Take the lock. No transaction is open meanwhile: CREATE INDEX CONCURRENTLY waits for all."""
    start, told = time.monotonic(), -_REPORT_SECONDS
    take = text(f"SELECT pg_try_advisory_lock({lock_key(MIGRATION_LOCK_ID)})")
    while not await connection.scalar(take):
        who = ", ".join((await connection.scalars(_MIGRATING)).all()) or "somebody"
        await connection.rollback()
        waited = time.monotonic() - start
        if waited > _MIGRATION_LOCK_SECONDS:
            raise MigrationError(
                f"{who} has been migrating for {waited / 60:.0f} min: nothing was done here;"
                " run `tiger-db migrate` again when that is through"
            )
        if waited - told >= _REPORT_SECONDS:
            progress(f"waiting for {who} to migrate: {waited:.0f} s")
            told = waited
        await asyncio.sleep(_POLL_SECONDS)
    await connection.commit()  # the lock stays; Alembic begins its transactions itself


async def with_lock_retries(
    engine: AsyncEngine,
    connection: AsyncConnection,
    what: str,
    work: Callable[[], Awaitable[T]],
    progress: Progress,
) -> tuple[T, float, int]:
    """Do the work until it gets its locks: what it returned, in how many seconds, which attempt.

    Raises:
        MigrationError: it did not get them; who has them.
    """
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    end = time.monotonic() + _LOCK_RETRY_SECONDS
    for attempt in count(1):
        done = asyncio.Event()
        watcher = asyncio.create_task(_blockers(engine, driver.get_server_pid(), done))
        start = time.monotonic()
        try:
            return await work(), time.monotonic() - start, attempt
        except Conflict:
            pass
        except DBAPIError:
            progress(f"{what}: failed, and is rolled back")
            raise
        finally:
            done.set()
            who = ", ".join(await watcher) or "somebody"
        await connection.rollback()
        pause = min(2.0 ** (attempt - 1), _MAX_PAUSE_SECONDS)
        if time.monotonic() + pause > end:
            break
        progress(f"{what}: attempt {attempt} gave way to {who}; again in {pause:.0f} s")
        await asyncio.sleep(pause)
    raise MigrationError(
        f"{what}: gave up after attempt {attempt}, which gave way to {who}: it is rolled back, what"
        " came before it stays; run `tiger-db migrate` again when that is through"
    )


async def _blockers(engine: AsyncEngine, pid: int, done: asyncio.Event) -> Sequence[str]:
    """Whom the session waited for when it was last seen to wait."""
    seen: Sequence[str] = ()

    async def finished() -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), _POLL_SECONDS)
        return done.is_set()

    if await finished():  # as nearly always: no second connection
        return seen
    with suppress(DatabaseUnavailable, DBAPIError):  # it only explains
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            while True:
                seen = (await connection.scalars(_BLOCKERS, {"pid": pid})).all() or seen
                if await finished():
                    break
    return seen

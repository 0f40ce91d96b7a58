"""The migration lock, and retries of migrations that wait too long for table locks."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import TypeVar

import asyncpg
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tiger_db.errors import Conflict, DatabaseUnavailable, MigrationError

T = TypeVar("T")
Report = Callable[[str], None]
MIGRATION_LOCK_ID = 0x7469676572  # the ASCII codes of the text "tiger"


def lock_key(number: int) -> str:
    """Return an SQL expression for the key of an advisory lock in the current schema.

    In the schema `public`, the key of the lock is `number`, as in releases without `DB_SCHEMA`.
    """
    return (
        f"CASE coalesce(current_schema(), 'public') WHEN 'public' THEN {number}"
        f" ELSE pg_catalog.hashtextextended(current_schema(), {number}) END"
    )


# While a migration waits for a table lock, other sessions wait for the migration. The lock timeout
# must exceed deadlock_timeout (1 s), after which PostgreSQL cancels a blocking autovacuum.
LOCK_TIMEOUT = "SET LOCAL lock_timeout = '2s'"
_LOCK_RETRY_SECONDS = 300.0  # Maximum time for all attempts of one migration.
_MAX_PAUSE_SECONDS = 15.0  # Maximum pause between two attempts of a migration.
_MIGRATION_LOCK_SECONDS = 3600.0  # Maximum wait for the migration lock.
_POLL_SECONDS = 0.5
# PostgreSQL's errors if an object with the same name exists: a table or index, a type, a function.
_EXISTS = (
    asyncpg.DuplicateTableError,
    asyncpg.DuplicateObjectError,
    asyncpg.DuplicateFunctionError,
)
_REPORT_SECONDS = 30.0  # time between two progress messages while `upgrade` waits
_KEY = lock_key(MIGRATION_LOCK_ID)
DESCRIBE_SESSION = """
CASE pid WHEN 0 THEN 'a prepared transaction' ELSE concat('process ', pid, ' (', concat_ws(', ',
    nullif(application_name, ''), usename, host(client_addr), state, 'in a transaction for '
    || round(extract(epoch FROM clock_timestamp() - xact_start)) || ' s'), ')') END
"""
_BLOCKERS = text(
    f"SELECT {DESCRIBE_SESSION} FROM unnest(pg_blocking_pids(:pid)) AS blocker (pid)"  # noqa: S608  # constants
    " LEFT JOIN pg_stat_activity USING (pid) ORDER BY xact_start"
)
_LOCK_HOLDERS = text(
    f"SELECT {DESCRIBE_SESSION} FROM pg_locks LEFT JOIN pg_stat_activity USING (pid)"  # noqa: S608  # constants
    " WHERE locktype = 'advisory' AND granted AND objsubid = 1"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    f" AND (CAST(classid AS bigint) << 32) + CAST(objid AS bigint) = {_KEY}"
)


@asynccontextmanager
async def migration_lock(engine: AsyncEngine, report: Report) -> AsyncIterator[AsyncConnection]:
    """Open a connection that holds the migration lock, and whose transactions have a lock timeout.

    Only one process at a time can hold the migration lock of a schema.

    Raises:
        MigrationError: other processes held the migration lock for an hour.
    """
    async with engine.connect() as connection:
        await _take_lock(connection, report)
        # Each transaction begins with a SET of the lock timeout. Alembic's autocommit_block sets no
        # lock timeout, because CREATE INDEX CONCURRENTLY does not block other sessions.
        assert connection.sync_connection is not None
        event.listen(connection.sync_connection, "begin", lambda c: c.exec_driver_sql(LOCK_TIMEOUT))
        try:
            yield connection
        finally:
            await connection.rollback()
            await connection.execute(text(f"SELECT pg_advisory_unlock({_KEY})"))
            await connection.commit()


async def _take_lock(connection: AsyncConnection, report: Report) -> None:
    """Take the migration lock. If another process holds the migration lock, report that process.

    Between two attempts to take the migration lock, no transaction is open. An open transaction
    would block CREATE INDEX CONCURRENTLY in the process that holds the migration lock.
    """
    start, reported = time.monotonic(), -_REPORT_SECONDS
    while not await connection.scalar(text(f"SELECT pg_try_advisory_lock({_KEY})")):
        holders = ", ".join((await connection.scalars(_LOCK_HOLDERS)).all()) or "another session"
        await connection.rollback()
        waited = time.monotonic() - start
        if waited > _MIGRATION_LOCK_SECONDS:
            raise MigrationError(
                f"{holders} has been migrating for {waited / 60:.0f} min, so this command ran no"
                " migration: run `tiger-db migrate` again later"
            )
        if waited - reported >= _REPORT_SECONDS:
            report(f"waiting for {holders} to finish its migrations: {waited:.0f} s")
            reported = waited
        await asyncio.sleep(_POLL_SECONDS)
    await connection.commit()  # the session keeps the migration lock after the commit


async def with_lock_retries(
    engine: AsyncEngine,
    connection: AsyncConnection,
    title: str,
    work: Callable[[], Awaitable[T]],
    report: Report,
) -> tuple[T, float, int]:
    """Run a migration with the function `work`.

    If PostgreSQL grants no table lock in time, run `work` again.

    The return value is the result of `work`, the duration of the last attempt in seconds, and the
    number of attempts.

    Raises:
        MigrationError: all attempts of the migration were blocked. The error message names the
            blocking sessions.
    """
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    end = time.monotonic() + _LOCK_RETRY_SECONDS
    for attempt in count(1):
        done = asyncio.Event()
        watcher = asyncio.create_task(_watch_blockers(engine, driver.get_server_pid(), done))
        start = time.monotonic()
        try:
            return await work(), time.monotonic() - start, attempt
        except Conflict:
            pass
        except DBAPIError as error:
            report(f"{title}: the migration failed and was rolled back")
            if (reason := _conflict_with_others(error)) is not None:
                raise MigrationError(f"{title}: {reason}") from None
            raise
        finally:
            done.set()
            blockers = ", ".join(await watcher) or "another session"
        await connection.rollback()
        pause = min(2.0 ** (attempt - 1), _MAX_PAUSE_SECONDS)
        if time.monotonic() + pause > end:
            break
        report(
            f"{title}: attempt {attempt} was blocked by {blockers}; next attempt in {pause:.0f} s"
        )
        await asyncio.sleep(pause)
    raise MigrationError(
        f"{title}: gave up after attempt {attempt}, which was blocked by {blockers}: completed"
        " steps are kept; run `tiger-db migrate` again later"
    )


def _conflict_with_others(error: DBAPIError) -> str | None:
    """Explain an error that objects of another application cause, or return None."""
    cause = getattr(error.orig, "__cause__", None)
    if isinstance(cause, _EXISTS):
        return (
            f"{str(cause).splitlines()[0]}, and is not tiger_db's: rename it, or install"
            " tiger_db in a schema of its own with DB_SCHEMA"
        )
    if isinstance(cause, asyncpg.DependentObjectsStillExistError):
        dependent = "; ".join((cause.detail or str(cause)).splitlines())
        return f"objects of another application must be dropped first: {dependent}"
    return None


async def _watch_blockers(engine: AsyncEngine, pid: int, done: asyncio.Event) -> Sequence[str]:
    """Query repeatedly which sessions block the backend `pid`, until `done` is set.

    Return the sessions that the last query with a result has found.
    """
    blockers: Sequence[str] = ()

    async def is_done() -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), _POLL_SECONDS)
        return done.is_set()

    if await is_done():  # a short migration needs no query that finds blocking sessions
        return blockers
    # Errors of the query `_BLOCKERS` are ignored, because its result is used only in messages.
    with suppress(DatabaseUnavailable, DBAPIError):
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            while True:
                blockers = (await connection.scalars(_BLOCKERS, {"pid": pid})).all() or blockers
                if await is_done():
                    break
    return blockers

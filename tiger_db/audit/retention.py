"""Monthly partitions of the audit trail: creation of new partitions, retirement of old months."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import asyncpg

from tiger_db.actor import attribute
from tiger_db.audit import storage
from tiger_db.audit.archiving import ArchivedMonth, archive_lock, archive_month, open_configured
from tiger_db.audit.months import (
    NOT_SEALED,
    ArchiveBusyError,
    CannotRetireError,
    fetch_retirements,
    find_sealed_month,
    partition_of,
    sealed_events,
)
from tiger_db.audit.seal_format import MerkleTree
from tiger_db.audit.sealer import Sealer, check_clocks, required_key
from tiger_db.audit.storage import Connection
from tiger_db.connections import maintenance_engine
from tiger_db.database import Database
from tiger_db.errors import DatabaseUnavailable, SchemaMismatch
from tiger_db.migrations import MONTHS_AHEAD
from tiger_db.migrations.grants import apply_grants
from tiger_db.models import AuditAction, AuditLog
from tiger_db.models.audit_logs import insert_events
from tiger_db.public import Progress, no_progress, public

T = TypeVar("T")
_LOCK_ATTEMPTS = 5
_EVENTS_PER_REPORT = 10_000  # events between two calls of `progress`
_RETRY_PAUSE_SECONDS = 1.0
# Other transactions queue behind a DDL statement that waits for a table lock. The lock timeout is
# shorter than deadlock_timeout (1 s), so that PostgreSQL aborts no writer because of a deadlock.
_LOCK_TIMEOUT = "800ms"
# The sealing lock blocks no writer, and is taken after all events of a month were read.
_SEALING_LOCK_TIMEOUT = "10s"
_PARTITION_NAME = re.compile(r"audit_logs_((?!0000)\d{4})_(0[1-9]|1[0-2])", re.ASCII)
_SELECT_PARTITIONS = """
SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
WHERE inhparent = 'audit_logs'::regclass::oid ORDER BY relname
"""


@dataclass(slots=True)
class Maintenance:
    """The result of `maintain`. Months are texts such as `2025-01`."""

    made: int = 0  # Number of partitions that `maintain` created.
    retired: list[str] = field(default_factory=list)  # Months whose events `maintain` removed.
    # `kept` maps each old month that `maintain` could not retire to the reason.
    kept: dict[str, str] = field(default_factory=dict)


@public
async def maintain(database: Database, *, progress: Progress = no_progress) -> Maintenance:
    """Create the partitions of the next months, and retire old months.

    Events in the default partition are moved to the partitions of the events' months. A month is
    due for retirement if the month ended at least `AUDIT_RETENTION_MONTHS` full months ago. A due
    month is retired if all events of the month are sealed and unchanged, and no event of their
    seals is missing. A new seal records the retirement; the seals of the removed events are kept.
    The oldest month is retired first, but a month that cannot be retired does not keep later
    months: the seal of a retirement lists the removed positions, and a verification does not depend
    on the order of retirements.

    If `AUDIT_ARCHIVE` is set, a month is first written to the archive. The files are read back, and
    must have exactly the events of the month. The seal of the retirement signs their names, numbers
    of rows and SHA-256 digests. `maintain` calls `progress` with the number of events of the month
    that were written to the archive, read back, and compared with the seals before the removal, and
    with the total of all three.

    If an earlier month was archived, and `AUDIT_ARCHIVE` is not set, no month is retired.

    Several calls of `maintain` can run at the same time, on any number of machines.

    Raises:
        ConfigurationError: A month is due for retirement, and `AUDIT_SIGNING_KEY` is not set, or
            `AUDIT_ARCHIVE` is set and pyarrow is not installed.
        FileError: A file of the archive cannot be written or read back. The month stays.
        InvalidState: `AUDIT_RETENTION_MONTHS` is set, and the clocks of the database and of this
            machine differ by more than a minute, or the chain of seals is broken.
        SchemaMismatch: A partition does not have the name of its month.
        DatabaseUnavailable: Another transaction locked `audit_logs` for too long. After the end of
            the other transaction, a new call of `maintain` can succeed.
    """
    done = Maintenance()
    retention = database.settings.audit_retention_months
    async with storage.open_connection(database) as connection:
        await connection.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT}'")
        try:
            done.made = await _with_lock_retries(connection, partial(_make_months, connection))
            await _grant_again(database)
            if retention is None:
                return done
            kept_from = first_kept_month(
                await connection.fetchval("SELECT clock_timestamp()"), datetime.now(UTC), retention
            )
            if months := await _due_months(connection, kept_from):
                with suppress(ArchiveBusyError):  # the other session retires the months
                    await _retire_months(
                        database, connection, months, kept_from, done=done, progress=progress
                    )
        finally:
            if not connection.is_closed():
                await connection.execute("RESET lock_timeout")
    return done


async def _retire_months(
    database: Database,
    connection: Connection,
    months: list[str],
    kept_from: datetime,
    *,
    done: Maintenance,
    progress: Progress,
) -> None:
    """Retire the months, the oldest first, and add the results to `done`.

    Raises:
        ArchiveBusyError: Another session archives and retires months.
    """
    settings = database.settings
    key = await required_key(database)
    sealer = await Sealer.open(connection, key, settings.audit_checkpoints)
    async with archive_lock(connection):
        files = None
        if settings.audit_archive is not None:
            files = await open_configured(database)
        elif any(seal.payload().archive for seal in await fetch_retirements(connection)):
            # A machine on which the setting is missing must not remove what others archive.
            problem = "earlier months are in an archive: set AUDIT_ARCHIVE"
            done.kept.update(dict.fromkeys(months, problem))
            return
        for month in months:
            try:
                archived = None
                if files is not None:
                    # `archive_month` writes the events and reads them back. `_retire` reads them
                    # a third time.
                    write = partial(
                        archive_month,
                        sealer,
                        files,
                        month,
                        written_before=kept_from,
                        progress=lambda events, total: progress(events, total and total // 2 * 3),
                    )
                    archived = await _with_lock_retries(connection, write)
                retire = partial(
                    _retire,
                    sealer,
                    month,
                    kept_from,
                    archives=files is not None,
                    archived=archived,
                    progress=progress,
                )
                if await _with_lock_retries(connection, retire):
                    done.retired.append(month)
            except CannotRetireError as reason:
                done.kept[month] = str(reason)
        await sealer.finish()


async def _with_lock_retries(connection: Connection, work: Callable[[], Awaitable[T]]) -> T:
    for _ in range(_LOCK_ATTEMPTS):
        try:
            return await work()
        except asyncpg.LockNotAvailableError:
            holders = await storage.describe_lock_holders(connection)
            # While this function sleeps, transactions that wait for `audit_logs` can run.
            await asyncio.sleep(_RETRY_PAUSE_SECONDS)
    raise DatabaseUnavailable(f"audit_logs is in use by {holders}: try again later")


async def _make_months(connection: Connection) -> int:
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(storage.TAKE_SEALING_LOCK)
        try:
            made: int = await connection.fetchval("SELECT make_audit_months($1)", MONTHS_AHEAD)
        except asyncpg.InvalidObjectDefinitionError as error:
            raise SchemaMismatch(
                f"a partition of audit_logs does not have the name of its month: {error}: rename it"
            ) from None
        return made


async def _grant_again(database: Database) -> None:
    """Grant the privileges of roles on the default partition, which can be a new one."""
    async with maintenance_engine(database.settings) as engine, engine.begin() as connection:
        await apply_grants(connection)


def first_kept_month(database_time: datetime, machine_time: datetime, retention: int) -> datetime:
    """Return the start, in UTC, of the oldest month that must not be retired.

    The current month and the `retention` full months before the current month must not be retired.

    Raises:
        InvalidState: The clocks of the database and of this machine differ by more than a minute.
    """
    check_clocks(database_time, machine_time, "no month can be retired")
    now = min(database_time, machine_time).astimezone(UTC)
    months = now.year * 12 + now.month - 1 - max(retention, 0)
    return datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC)


async def _due_months(connection: Connection, kept_from: datetime) -> list[str]:
    """Return the months before `kept_from` that have a partition, oldest first."""
    return [
        f"{name[1]}-{name[2]}"
        for (partition,) in await connection.fetch(_SELECT_PARTITIONS)
        if (name := _PARTITION_NAME.fullmatch(partition))
        and (int(name[1]), int(name[2])) < (kept_from.year, kept_from.month)
    ]


async def _retire(
    sealer: Sealer,
    month: str,
    kept_from: datetime,
    *,
    archives: bool,
    archived: ArchivedMonth | None,
    progress: Progress,
) -> bool:
    """In one transaction, drop a month's partition and append a seal that records the removal.

    If `archives` is true, the events must be in the archive, as `archived` says. Return False if
    another session has dropped the partition.

    Raises:
        CannotRetireError: The month has an event that is unsealed, was changed, or was written
            after the month, or the archive does not have exactly the events of the month.
    """
    partition, connection = partition_of(month), sealer.connection
    async with connection.transaction(isolation="read_committed"):
        if await connection.fetchval("SELECT pg_catalog.to_regclass($1)", partition) is None:
            return False
        await sealer.catch_up()
        found = await find_sealed_month(
            connection, month, sealer.chain.upto, written_before=kept_from
        )
        tree, past = MerkleTree(), dict[int, str]()
        if found is not None:
            before = 2 * found.count if archives else 0  # written and read back
            async with aclosing(sealed_events(connection, found, past)) as events:
                async for (position, _), digest in events:
                    tree.add(position, digest)
                    if tree.count % _EVENTS_PER_REPORT == 0 or tree.count == found.count:
                        progress(before + tree.count, before + found.count)
            # Another seal could be in place of an old seal since the chain was verified.
            await sealer.check_past(past)
            if archives and (archived is None or archived.root != tree.root):
                raise CannotRetireError(
                    "events were added to the month while it was archived: try again"
                )
        # Sealing went on while the events were read.
        await connection.execute(f"SET LOCAL lock_timeout = '{_SEALING_LOCK_TIMEOUT}'")
        await connection.execute(storage.TAKE_SEALING_LOCK)
        await connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")
        if found is not None:
            await sealer.catch_up()
            event = AuditLog(
                action=AuditAction.SYSTEM_AUDIT_RETIRE,
                resource_type="audit_month",
                resource_id=month,
                details={"events": tree.count, "seal": sealer.chain.number + 1},
            )
            await insert_events(connection, [attribute(event)])
            files = None if archived is None else archived.files
            await sealer.append(tree, retired=month, archive=files)
        await _with_lock_retries(connection, partial(_lock_partition, connection, partition))
        # While the lock was awaited, a writer can have committed an unsealed event to the month.
        last = await connection.fetchval(f"SELECT max(position) FROM {partition}")  # noqa: S608  # from _SELECT_PARTITIONS
        if last != (None if found is None else found.last):
            raise CannotRetireError(NOT_SEALED)
        await connection.execute(f"DROP TABLE {partition}")
    return True


async def _lock_partition(connection: Connection, partition: str) -> None:
    """Take the locks that DROP TABLE takes, in the same order, or none of them."""
    async with connection.transaction():
        await connection.execute(
            f"LOCK TABLE ONLY audit_logs, ONLY {partition} IN ACCESS EXCLUSIVE MODE"
        )

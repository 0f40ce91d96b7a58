"""Monthly partitions of the audit trail: creation of new partitions, retirement of old months."""

import asyncio
import re
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import asyncpg

from tiger_db.actor import attribute
from tiger_db.audit import storage
from tiger_db.audit.seal_format import Seal, digest_of, merkle_root
from tiger_db.audit.sealer import Sealer, check_clocks, required_key
from tiger_db.audit.storage import Connection
from tiger_db.database import Database
from tiger_db.errors import DatabaseUnavailable
from tiger_db.migrations import MONTHS_AHEAD
from tiger_db.models import AuditAction, AuditLog
from tiger_db.models.audit_logs import insert_events
from tiger_db.public import public

T = TypeVar("T")
_LOCK_ATTEMPTS = 5
_RETRY_PAUSE_SECONDS = 1.0
# Other transactions queue behind a DDL statement that waits for a table lock. The lock timeout is
# shorter than deadlock_timeout (1 s), so that PostgreSQL aborts no writer because of a deadlock.
_LOCK_TIMEOUT = "800ms"
_NOT_SEALED = "the month holds events that are not sealed: run `tiger-db seal-audit`"
_PARTITION_NAME = re.compile(r"audit_logs_(\d{4})_(\d{2})")
_SELECT_PARTITIONS = """
SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
WHERE inhparent = 'audit_logs'::regclass::oid ORDER BY relname
"""
# The seals that cover positions between $1 and $2, and the neighbors of these seals.
_SELECT_COVERING_SEALS = """
WITH seals AS (
    SELECT *, (statement::jsonb ->> text 'after')::bigint AS after,
        (statement::jsonb ->> text 'upto')::bigint AS upto
    FROM audit_seals WHERE NOT statement::jsonb ? text 'retired'
)
SELECT statement, signature, digests, number FROM seals,
    (SELECT min(after) AS low, max(upto) AS high FROM seals WHERE upto >= $1 AND after < $2) AS r
WHERE upto >= low AND after <= high ORDER BY number
"""
_SELECT_RETIREMENTS = """
SELECT statement, signature, digests, number FROM audit_seals
WHERE number > 0 AND statement::jsonb ? text 'retired' ORDER BY number
"""
_SELECT_POSITIONS = "SELECT position FROM audit_logs WHERE position BETWEEN $1 AND $2"


@dataclass(slots=True)
class Maintenance:
    """The result of `maintain`. Months are texts such as `2025-01`."""

    made: int = 0  # Number of partitions that `maintain` created.
    retired: list[str] = field(default_factory=list)  # Months whose events `maintain` removed.
    # If `maintain` could not retire an old month, `kept` maps the oldest such month to the reason.
    kept: dict[str, str] = field(default_factory=dict)


class _CannotRetireError(Exception):
    """An error whose message is the reason why a month cannot be retired."""


@public
async def maintain(database: Database) -> Maintenance:
    """Create the partitions of the next months, and retire old months.

    Events in the default partition are moved to the partitions of the events' months. A month is
    due for retirement if the month ended at least `AUDIT_RETENTION_MONTHS` full months ago. A due
    month is retired if all events of the month are sealed and unchanged. The oldest month is
    retired first. A new seal records the retirement; the seals of the removed events are kept.

    Several calls of `maintain` can run at the same time, on any number of machines.

    Raises:
        ConfigurationError: A month is due for retirement, and `AUDIT_SIGNING_KEY` is not set.
        InvalidState: `AUDIT_RETENTION_MONTHS` is set, and the clocks of the database and of this
            machine differ by more than a minute, or the chain of seals is broken.
        DatabaseUnavailable: Another transaction locked `audit_logs` for too long. After the end of
            the other transaction, a new call of `maintain` can succeed.
    """
    done = Maintenance()
    retention = database.settings.audit_retention_months
    async with storage.open_connection(database) as connection:
        await connection.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT}'")
        try:
            done.made = await _with_lock_retries(connection, partial(_make_months, connection))
            if retention is None:
                return done
            kept_from = first_kept_month(
                await connection.fetchval("SELECT clock_timestamp()"), datetime.now(UTC), retention
            )
            sealer = None
            for month in await _due_months(connection, kept_from):
                if sealer is None:
                    key = await required_key(database)
                    folder = database.settings.audit_checkpoints
                    sealer = await Sealer.open(connection, key, folder)
                try:
                    await _with_lock_retries(connection, partial(_retire, sealer, month, kept_from))
                except _CannotRetireError as reason:
                    done.kept[month] = str(reason)
                    break  # `maintain` retires a month only after all earlier months
                done.retired.append(month)
            if sealer is not None:
                await sealer.finish()
        finally:
            if not connection.is_closed():
                await connection.execute("RESET lock_timeout")
    return done


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
        made: int = await connection.fetchval("SELECT make_audit_months($1)", MONTHS_AHEAD)
        return made


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


async def _retire(sealer: Sealer, month: str, kept_from: datetime) -> None:
    """In one transaction, drop a month's partition and append a seal that records the removal.

    Raises:
        _CannotRetireError: The month has an event that is unsealed, was changed, or was written
            after the month.
    """
    partition, connection = f"audit_logs_{month.replace('-', '_')}", sealer.connection
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(storage.TAKE_SEALING_LOCK)
        if await connection.fetchval("SELECT pg_catalog.to_regclass($1)", partition) is None:
            return  # a concurrent call of `maintain` dropped the partition
        first, last, is_old, count = await connection.fetchrow(
            f"SELECT min(position), max(position), max(created_at) < $1, count(*) FROM {partition}",  # noqa: S608  # from _SELECT_PARTITIONS
            kept_from,
        )
        if first is not None:
            await sealer.catch_up()
            if not is_old:
                raise _CannotRetireError(
                    "the month holds events that were written in a later month"
                    " by a machine whose clock was wrong"
                )
            if last > sealer.chain.upto:
                raise _CannotRetireError(_NOT_SEALED)
            positions, digests = await _sealed_events(sealer, partition, first, last, count)
            event = AuditLog(
                action=AuditAction.SYSTEM_AUDIT_RETIRE,
                resource_type="audit_month",
                resource_id=month,
                details={"events": len(positions), "seal": sealer.chain.number + 1},
            )
            await insert_events(connection, [attribute(event)])
            await sealer.append(positions, digests, retired=month)
        # LOCK TABLE takes the same locks as DROP TABLE, in the same order. While LOCK TABLE waits,
        # a writer can still commit an unsealed event to the month.
        await connection.execute(
            f"LOCK TABLE ONLY audit_logs, ONLY {partition} IN ACCESS EXCLUSIVE MODE"
        )
        if last != await connection.fetchval(f"SELECT max(position) FROM {partition}"):  # noqa: S608  # from _SELECT_PARTITIONS
            raise _CannotRetireError(_NOT_SEALED)
        await connection.execute(f"DROP TABLE {partition}")


async def _sealed_events(
    sealer: Sealer, partition: str, first: int, last: int, count: int
) -> tuple["array[int]", bytearray]:
    """Return the positions and the digests of a month's events.

    Raises:
        _CannotRetireError: The month has an event that was changed, or that no seal covers, or an
            event of the seals of the month is missing.
        InvalidState: A seal of the month is not part of the chain that the sealer has verified.
    """
    connection, past = sealer.connection, dict[int, str]()
    positions, digests = array("q"), bytearray()
    retirements = [Seal(*row).payload() for row in await connection.fetch(_SELECT_RETIREMENTS)]
    retired = [run for payload in retirements for run in payload.positions]
    for row in await connection.fetch(_SELECT_COVERING_SEALS, first, last):
        seal = Seal(*row)
        payload = seal.payload()
        past[payload.number] = seal.payload_digest
        expected = dict(seal.event_digests(payload))
        if merkle_root(expected.items()).hex() != payload.root:
            raise _CannotRetireError(
                f"the digests of seal {payload.number} do not match its Merkle root:"
                " run `tiger-db verify-audit`"
            )
        query = storage.select_events(payload.after + 1, payload.upto, table=partition)
        async for position, content in storage.read_events(connection, query):
            digest = digest_of(content)
            if expected.get(position) != digest:
                raise _CannotRetireError(
                    f"the event at position {position} differs from the sealed event:"
                    " run `tiger-db verify-audit`"
                )
            positions.append(position)
            digests += digest
        present = await connection.fetch(_SELECT_POSITIONS, payload.after + 1, payload.upto)
        missing = expected.keys() - {position for (position,) in present}
        for start, end in retired:
            missing -= {*range(max(start, payload.after + 1), min(end, payload.upto) + 1)}
        if missing:
            raise _CannotRetireError(
                f"the event at position {min(missing)} is missing: run `tiger-db verify-audit`"
            )
    if len(positions) != count:
        raise _CannotRetireError(
            "the month holds events that no seal covers: run `tiger-db verify-audit`"
        )
    # Another seal could have been put in place of an old seal since the chain was verified.
    await sealer.check_past(past)
    return positions, digests

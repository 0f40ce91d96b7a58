"""Makes months ahead, and lets whole months of sealed events go."""

import asyncio
import re
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TypeVar

import asyncpg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tiger_db.audit.seal_format import DIGEST, Seal, Statement, digest_of, merkle_root, runs_of
from tiger_db.audit.sealing import required_key, store
from tiger_db.audit.storage import (
    EVENTS,
    TAKE_TURN,
    Connection,
    clock,
    connected,
    last_seal,
    next_number,
)
from tiger_db.database import Database
from tiger_db.errors import DatabaseUnavailable, InvalidState
from tiger_db.migrations import MONTHS_AHEAD
from tiger_db.models import AuditAction, AuditLog
from tiger_db.models.audit_inserts import insert_events
from tiger_db.signing import public_text

_MONTH = re.compile(r"audit_logs_(\d{4})_(\d{2})")
T = TypeVar("T")
_TRIES = 5
_PAUSE = 1.0  # seconds
# For a lock; nobody queues behind us for longer. Less than the server's deadlock_timeout: whoever
# waits for what we have, and has what we wait for, is no victim of a deadlock.
_PATIENCE = "800ms"
_CLOCKS_APART = timedelta(minutes=1)
_PARTITIONS = """
SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
WHERE inhparent = 'audit_logs'::regclass::oid ORDER BY relname
"""
_BOUNDS = """
SELECT min(position), max(position), max(created_at) < $1 FROM {partition}
"""
_EVENTS = EVENTS.replace("{", "{{").replace("}", "}}").replace("audit_logs", "{partition}")
_COVERING = """
SELECT statement, signature, digests FROM audit_seals
WHERE (statement::jsonb ->> text 'upto')::bigint >= $1
    AND (statement::jsonb ->> text 'after')::bigint < $2
    AND NOT statement::jsonb ? text 'retired' ORDER BY number
"""


@dataclass(slots=True)
class Maintenance:
    """What was done. `kept` are the months that are old enough to leave, and why they stay."""

    made: int = 0
    retired: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


async def maintain(database: Database) -> Maintenance:
    """Make the months ahead, move strays into their months, retire what may leave.

    A month leaves `AUDIT_RETENTION_MONTHS` full months after its end, oldest first, when all of its
    events are sealed and still what they were; a seal says so, and the seals of its events stay.
    Any number may run at a time.

    Raises:
        ConfigurationError: a month may leave, and there is no `AUDIT_SIGNING_KEY` to seal that.
        InvalidState: months may leave, but the clocks of the database and of this machine are more
            than a minute apart; the months ahead are made.
        DatabaseUnavailable: the tables were in use for too long; run it again.
    """
    done = Maintenance()
    months = database.settings.audit_retention_months
    async with connected(database) as connection:
        await connection.execute(f"SET lock_timeout = '{_PATIENCE}'")
        try:
            done.made = await _patiently(partial(_make_months, connection))
            if months is None:
                return done
            kept_from = first_kept_month(
                await connection.fetchval("SELECT clock_timestamp()"), datetime.now(UTC), months
            )
            for partition in await _old_months(connection, kept_from):
                key = await required_key(database)
                why = await _patiently(partial(_retire, connection, key, partition, kept_from))
                month = partition.removeprefix("audit_logs_").replace("_", "-")
                if why is not None:
                    done.kept[month] = why
                    break  # the oldest goes first
                done.retired.append(month)
        finally:
            if not connection.is_closed():
                await connection.execute("RESET lock_timeout")
    return done


async def _patiently(work: Callable[[], Awaitable[T]]) -> T:
    for _ in range(_TRIES):
        try:
            return await work()
        except asyncpg.LockNotAvailableError:
            await asyncio.sleep(_PAUSE)  # so that those who queued behind us get on
    raise DatabaseUnavailable("audit_logs is in use by a long transaction: try again later")


async def _make_months(connection: Connection) -> int:
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(TAKE_TURN)
        made: int = await connection.fetchval("SELECT make_audit_months($1)", MONTHS_AHEAD)
        return made


def first_kept_month(database_time: datetime, machine_time: datetime, retention: int) -> datetime:
    """Return the start, in UTC, of the first month that must stay.

    `retention` full months stay before the current one, and the current month stays whatever it is.

    Raises:
        InvalidState: the two clocks are more than a minute apart, so neither is to be trusted.
    """
    apart = database_time - machine_time
    if abs(apart) > _CLOCKS_APART:
        raise InvalidState(
            f"the database's clock is {abs(apart).total_seconds():.0f} s"
            f" {'ahead of' if apart > timedelta() else 'behind'} this machine's:"
            " no month leaves the audit trail until they agree"
        )
    now = min(database_time, machine_time).astimezone(UTC)
    months = now.year * 12 + now.month - 1 - max(retention, 0)
    return datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC)


async def _old_months(connection: Connection, kept_from: datetime) -> list[str]:
    """The partitions that may leave, oldest first."""
    return [
        name
        for (name,) in await connection.fetch(_PARTITIONS)
        if (month := _MONTH.fullmatch(name))
        and (int(month[1]), int(month[2])) < (kept_from.year, kept_from.month)
    ]


async def _retire(
    connection: Connection, key: Ed25519PrivateKey, partition: str, kept_from: datetime
) -> str | None:
    """Drop a month, in one transaction with the seal that says so; or why it has to stay."""
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(TAKE_TURN)
        if await connection.fetchval("SELECT pg_catalog.to_regclass($1)", partition) is None:
            return None  # another machine was faster
        first, last, old = await connection.fetchrow(_BOUNDS.format(partition=partition), kept_from)
        if first is not None:
            why = await _seal_retirement(connection, key, partition, (first, last), old=old)
            if why is not None:
                return why
        await connection.execute(f"DROP TABLE {partition}")
    return None


async def _seal_retirement(
    connection: Connection,
    key: Ed25519PrivateKey,
    partition: str,
    bounds: tuple[int, int],
    *,
    old: bool,
) -> str | None:
    head = await last_seal(connection)
    number, previous, upto = next_number(head)
    if not old:
        return "it holds events that were written later: the clock of their writer was wrong"
    if bounds[1] > upto:
        return "it holds events that are not sealed: run `tiger-db seal-audit`"
    places, digests = array("q"), bytearray()
    for row in await connection.fetch(_COVERING, *bounds):
        seal = Seal(*row)
        statement = seal.statement()
        expected = dict(seal.expected(statement))
        for place, content in await connection.fetch(
            _EVENTS.format(partition=partition), statement.after + 1, statement.upto
        ):
            digest = digest_of(content)
            if expected.get(place) != digest:
                return f"the event in place {place} is not what was sealed: run verify-audit"
            places.append(place)
            digests += digest
    if len(places) != await connection.fetchval(f"SELECT count(*) FROM {partition}"):  # noqa: S608  # from _PARTITIONS
        return "it holds events that no seal covers: run verify-audit"
    month = partition.removeprefix("audit_logs_").replace("_", "-")
    event = AuditLog(
        action=AuditAction.SYSTEM_AUDIT_RETIRE,
        resource_type="audit_month",
        resource_id=month,
        details={"events": len(places), "seal": number},
    )
    await insert_events(connection, [event])
    leaves = (
        (place, bytes(digests[at * DIGEST : (at + 1) * DIGEST])) for at, place in enumerate(places)
    )
    statement = Statement(
        number=number,
        previous=previous,
        after=upto,
        upto=upto,
        positions=runs_of(places),
        root=merkle_root(leaves).hex(),
        sealed_at=await clock(connection),
        key=public_text(key.public_key()),
        retired=month,
    )
    await store(connection, key, statement, [])
    return None

"""Months of the audit trail whose events are sealed, as partitions of `audit_logs`."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import MAXYEAR, UTC, datetime, timedelta
from uuid import UUID

import asyncpg

from tiger_db.audit import storage
from tiger_db.audit.event_content import Event
from tiger_db.audit.seal_format import MerkleTree, PositionRanges, Seal, digest_of
from tiger_db.audit.storage import Connection
from tiger_db.errors import InvalidState, InvalidValue

NOT_SEALED = "the month holds events that are not sealed: run `tiger-db seal-audit`"
# The seals that cover positions between $1 and $2, and the neighbors of these seals.
_COVERING_SEALS = """
WITH seals AS (
    SELECT *, (statement::jsonb ->> text 'after')::bigint AS after,
        (statement::jsonb ->> text 'upto')::bigint AS upto
    FROM audit_seals WHERE NOT statement::jsonb ? text 'retired'
), covering AS (
    SELECT statement, signature, digests, number FROM seals,
        (SELECT min(after) AS low, max(upto) AS high FROM seals WHERE upto >= $1 AND after < $2) r
    WHERE upto >= low AND after <= high
)
"""
_SELECT_COVERING_SEALS = f"{_COVERING_SEALS} SELECT * FROM covering ORDER BY number"  # noqa: S608  # a constant
# The seals between these seals, too, which record retired months or introduce a signing key.
_SELECT_CHAIN = f"""{_COVERING_SEALS}
SELECT statement, signature, digests, number FROM audit_seals
WHERE number BETWEEN (SELECT min(number) FROM covering) AND (SELECT max(number) FROM covering)
ORDER BY number
"""  # noqa: S608  # a constant
_SELECT_RETIREMENTS = """
SELECT statement, signature, digests, number FROM audit_seals
WHERE number > 0 AND statement::jsonb ? text 'retired' ORDER BY number
"""
_SELECT_POSITIONS = "SELECT position FROM audit_logs WHERE position BETWEEN $1 AND $2"
# Consecutive positions have the same difference from their row numbers.
_SELECT_RANGES = """
SELECT min(position), max(position)
FROM (SELECT position, position - row_number() OVER (ORDER BY position) AS run FROM {}) AS runs
GROUP BY run ORDER BY 1
"""
# The last column is the number of events of other months.
_SELECT_MONTH = """
SELECT min(position), max(position), max(created_at), count(*),
    count(*) FILTER (WHERE id < $1 OR id >= $2)
FROM {}
"""
_HAS_EVENTS = "SELECT EXISTS (SELECT FROM audit_logs WHERE id >= $1 AND id < $2)"
_PREFETCHED_SEALS = 20


class CannotRetireError(Exception):
    """An error whose message is the reason why a month cannot be retired."""


class ArchiveBusyError(CannotRetireError):
    """Another session is archiving or removing months."""


def partition_of(month: str) -> str:
    """Return the name of the partition of a month such as `2026-01`."""
    return f"audit_logs_{month.replace('-', '_')}"


def bounds_of(month: str) -> tuple[datetime, datetime]:
    """Return the start of a month, and of the next month. Raise ValueError for another text."""
    start = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    if start.year == MAXYEAR:
        raise ValueError(month)
    return start, (start + timedelta(days=31)).replace(day=1)


def first_id(at: datetime) -> UUID:
    """Return the smallest UUIDv7 with a time."""
    return UUID(int=max(0, int(at.timestamp() * 1000)) << 80)


@dataclass(frozen=True, slots=True)
class SealedMonth:
    """The events of a month, which are sealed: first and last position, and number of events."""

    partition: str
    first: int
    last: int
    count: int


async def find_sealed_month(
    connection: Connection, month: str, upto: int, *, written_before: datetime | None = None
) -> SealedMonth | None:
    """Return the sealed events of a month, or None if the month has no events.

    `upto` is the last sealed position. All events must have been written before `written_before`.

    Raises:
        CannotRetireError: The month has an event that is not sealed, or was written too late, or
            its events are in the default partition, or the partition has events of another month.
    """
    partition, ids = partition_of(month), [first_id(at) for at in bounds_of(month)]
    if await connection.fetchval("SELECT pg_catalog.to_regclass($1)", partition) is None:
        if await connection.fetchval(_HAS_EVENTS, *ids):
            raise CannotRetireError(
                "the month has no partition: run `tiger-db maintain-audit`, which makes it"
            )
        return None
    first, last, written, count, others = await connection.fetchrow(
        _SELECT_MONTH.format(partition), *ids
    )
    if first is None:
        return None
    if others:
        raise CannotRetireError(
            f"the partition {partition} holds events of another month, because somebody has renamed"
            " it or attached it: move its events as docs/audit-trail.md says under `Partitions with"
            " events of another month`"
        )
    if written_before is not None and written >= written_before:
        raise CannotRetireError(
            f"the month holds events that a machine whose clock was wrong wrote in {written:%Y-%m}:"
            " set the clock of that machine; the month is retired when the events of"
            f" {written:%Y-%m} are"
        )
    if last > upto:
        raise CannotRetireError(NOT_SEALED)
    return SealedMonth(partition, first, last, count)


async def fetch_ranges(connection: Connection, month: str) -> list[tuple[int, int]]:
    """Return the positions of the events in the partition of a month, as ranges."""
    partition = partition_of(month)
    if await connection.fetchval("SELECT pg_catalog.to_regclass($1)", partition) is None:
        return []
    return [(low, high) for low, high in await connection.fetch(_SELECT_RANGES.format(partition))]


async def fetch_retirements(connection: Connection) -> list[Seal]:
    """Return the seals that record retired months.

    Raises:
        InvalidState: A seal cannot be read, so that the retired months are unknown.
    """
    try:
        seals = [Seal(*row) for row in await connection.fetch(_SELECT_RETIREMENTS)]
        for seal in seals:
            seal.payload()
    except (asyncpg.DataError, InvalidValue):
        raise InvalidState(
            "a seal cannot be read: run `tiger-db verify-audit`, or with an archive"
            " `tiger-db verify-audit --archive`"
        ) from None
    return seals


async def sealed_events(
    connection: Connection, month: SealedMonth, past: dict[int, str]
) -> AsyncGenerator[tuple[Event, bytes], None]:
    """Yield the events of a month in order of position, with their digests, in a transaction.

    The digests of the payloads of the seals are added to `past`, by the numbers of the seals, and
    those of the retirements that excuse missing events. The memory use does not depend on the
    number of events.

    Raises:
        CannotRetireError: The month has an event that was changed, or that no seal covers, or an
            event of the seals of the month is missing.
    """
    retirements = await fetch_retirements(connection)
    found = 0
    seals = connection.cursor(
        _SELECT_COVERING_SEALS, month.first, month.last, prefetch=_PREFETCHED_SEALS
    )
    async for row in seals:
        seal = Seal(*row)
        payload = seal.payload()
        past[payload.number] = seal.payload_digest
        expected = dict(seal.event_digests(payload))
        if MerkleTree(expected.items()).root != payload.root:
            raise CannotRetireError(
                f"the digests of seal {payload.number} do not match its Merkle root:"
                " run `tiger-db verify-audit`"
            )
        query = storage.select_events(payload.after + 1, payload.upto, table=month.partition)
        async with aclosing(storage.read_events(connection, query)) as batches:
            async for batch in batches:
                for position, content in batch:
                    digest = digest_of(content)
                    if expected.get(position) != digest:
                        raise CannotRetireError(
                            f"the event at position {position} differs from the sealed event:"
                            " run `tiger-db verify-audit`"
                        )
                    found += 1
                    yield (position, content), digest
        present = await connection.fetch(_SELECT_POSITIONS, payload.after + 1, payload.upto)
        missing = expected.keys() - {position for (position,) in present}
        for retirement in retirements if missing else ():
            gone = {
                position
                for start, end in retirement.payload().positions
                for position in range(max(start, payload.after + 1), min(end, payload.upto) + 1)
            }
            if missing & gone:
                missing -= gone
                past[retirement.payload().number] = retirement.payload_digest
        if missing:
            raise CannotRetireError(
                f"the event at position {min(missing)} is missing: run `tiger-db verify-audit`"
            )
    if found != month.count:
        raise CannotRetireError(
            "the month holds events that no seal covers: run `tiger-db verify-audit`"
        )


async def seals_between(
    connection: Connection, first: int, last: int, *, whole_chain: bool = False
) -> AsyncGenerator[Seal, None]:
    """Yield the seals that cover the events between two positions, in a transaction.

    With `whole_chain`, also yield the seals between these seals, which cover no events.
    """
    query = _SELECT_CHAIN if whole_chain else _SELECT_COVERING_SEALS
    async for row in connection.cursor(query, first, last, prefetch=_PREFETCHED_SEALS):
        yield Seal(*row)


async def sealed_root(connection: Connection, positions: PositionRanges) -> str:
    """Return the root of the Merkle tree of the events at the positions, according to the seals."""
    tree, at = MerkleTree(), 0
    async for seal in seals_between(connection, positions[0][0], positions[-1][1]):
        for position, digest in seal.event_digests(seal.payload()):
            while at < len(positions) and positions[at][1] < position:
                at += 1
            if at < len(positions) and positions[at][0] <= position:
                tree.add(position, digest)
    return tree.root

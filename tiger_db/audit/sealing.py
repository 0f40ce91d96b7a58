"""Seals what was written to the audit trail and can no longer change."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tiger_db.audit.seal_format import Statement, digest_of, make_seal, merkle_root, runs_of
from tiger_db.audit.storage import (
    EVENTS,
    TAKE_TURN,
    Connection,
    clock,
    connected,
    last_seal,
    next_number,
    settled,
)
from tiger_db.database import Database
from tiger_db.errors import ConfigurationError
from tiger_db.signing import public_text

SEALED_AT_ONCE = 10_000  # events in a seal at most
_PAUSE = 0.02  # seconds between looks at who still writes


@dataclass(frozen=True, slots=True)
class Sealing:
    """What came of it. `waits_for` are the processes of the server that kept it from finishing."""

    rows: int
    seals: int
    waits_for: tuple[int | None, ...] = ()


async def seal(
    database: Database,
    *,
    patience: float = 10,
    advance: Callable[[int], None] = lambda rows: None,  # noqa: ARG005  # told of each seal's rows
) -> Sealing:
    """Seal the events that were written before now, in seals of 10,000 at most.

    Writers never wait for it. It waits, up to `patience` seconds, for the transactions that have
    written events and are still open; nothing is sealed while one of them is. Any number may run at
    a time: an event is sealed once.

    Raises:
        ConfigurationError: `AUDIT_SIGNING_KEY` is not set.
        DatabaseUnavailable: what was sealed until then stays.
    """
    key = await required_key(database)
    rows = seals = 0
    async with connected(database) as connection:
        closed_at = await clock(connection)
        upto, writers = await settled(connection)
        deadline = time.monotonic() + patience
        while writers:
            if time.monotonic() > deadline:
                return Sealing(0, 0, tuple(writers.values()))
            await asyncio.sleep(_PAUSE)
            _, now = await settled(connection)
            writers = {name: pid for name, pid in writers.items() if name in now}
        while (sealed := await seal_next(connection, key, upto, closed_at)) is not None:
            rows += sealed
            seals += 1
            advance(sealed)
    return Sealing(rows, seals)


async def seal_next(
    connection: Connection, key: Ed25519PrivateKey, upto: int, closed_at: str | None
) -> int | None:
    """Make one seal, of the events up to a place that is settled; None: they are sealed."""
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(TAKE_TURN)
        number, previous, after = next_number(await last_seal(connection))
        found = await connection.fetch(f"{EVENTS} LIMIT {SEALED_AT_ONCE}", after + 1, upto)
        if not found:
            return None
        if len(found) == SEALED_AT_ONCE:
            upto, closed_at = found[-1]["position"], None
        # Of two events in one place, which no sequence gives, one was put there.
        contents = {row["position"]: row["content"] for row in reversed(found)}
        leaves = [(place, digest_of(contents[place])) for place in sorted(contents)]
        await store(
            connection,
            key,
            Statement(
                number=number,
                previous=previous,
                after=after,
                upto=upto,
                positions=runs_of(place for place, _ in leaves),
                root=merkle_root(leaves).hex(),
                sealed_at=await clock(connection),
                key=public_text(key.public_key()),
                closed_at=closed_at,
            ),
            [digest for _, digest in leaves],
        )
        return len(leaves)


async def store(
    connection: Connection, key: Ed25519PrivateKey, statement: Statement, digests: list[bytes]
) -> None:
    made = make_seal(key, statement, digests)
    await connection.execute(
        "INSERT INTO audit_seals (number, statement, signature, digests) VALUES ($1, $2, $3, $4)",
        statement.number,
        made.text,
        made.signature,
        made.digests,
    )


async def required_key(database: Database) -> Ed25519PrivateKey:
    """The key that signs.

    Raises:
        ConfigurationError: `AUDIT_SIGNING_KEY` is not set.
    """
    key = await database.signing_key()
    if key is None:
        raise ConfigurationError(
            "AUDIT_SIGNING_KEY is not set: make one with `tiger-db generate-audit-signing-key`"
        )
    return key

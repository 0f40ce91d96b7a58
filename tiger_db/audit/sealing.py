"""Creation of seals for audit events."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tiger_db.audit import storage
from tiger_db.audit.seal_format import (
    SEAL_VERSION,
    SealPayload,
    digest_of,
    make_seal,
    merkle_root,
    ranges_of,
    split_digests,
)
from tiger_db.audit.storage import ChainEnd, Connection
from tiger_db.database import Database
from tiger_db.errors import ConfigurationError
from tiger_db.public import Progress, no_progress, public
from tiger_db.signing import public_text

EVENTS_PER_SEAL = 10_000  # maximum number of events that one seal covers
_WRITERS_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Sealing:
    """The result of `seal`.

    If open transactions prevent sealing, no event is sealed, and `waits_for` has the process ids of
    these transactions. None in `waits_for` stands for a prepared transaction.
    """

    rows: int  # Number of sealed events.
    seals: int  # Number of new seals.
    waits_for: tuple[int | None, ...] = ()


@public
async def seal(
    database: Database,
    *,
    patience: timedelta = timedelta(seconds=10),
    progress: Progress = no_progress,
) -> Sealing:
    """Seal the audit events that were written before the call of `seal`.

    Writers of events never wait for `seal`. `seal` waits for open transactions that have written
    events, at most for the duration `patience`. If a transaction that has written events is still
    open after `patience`, no event is sealed. Concurrent calls of `seal` seal each event only once.
    After each new seal, `seal` calls `progress` with the number of events sealed so far, and with
    None instead of a total number.

    Raises:
        ConfigurationError: `AUDIT_SIGNING_KEY` is not set.
        DatabaseUnavailable: The connection to the database was lost. Seals that were committed
            before the connection was lost stay in the database.
    """
    key = await required_key(database)
    rows = seals = 0
    async with storage.open_connection(database) as connection:
        closed_at = await storage.database_time(connection)
        upto, writers = await storage.fetch_writers(connection)
        deadline = time.monotonic() + patience.total_seconds()
        while writers:
            if time.monotonic() > deadline:
                return Sealing(0, 0, tuple(writers.values()))
            await asyncio.sleep(_WRITERS_POLL_SECONDS)
            _, now = await storage.fetch_writers(connection)
            writers = {name: pid for name, pid in writers.items() if name in now}
        while (sealed := await seal_next(connection, key, upto, closed_at)) is not None:
            rows += sealed
            seals += 1
            progress(rows, None)
    return Sealing(rows, seals)


async def seal_next(
    connection: Connection, key: Ed25519PrivateKey, upto: int, closed_at: str | None
) -> int | None:
    """Create one seal, which covers unsealed events up to the position `upto`.

    Return the number of events that the new seal covers, or None if all events up to `upto`
    are already sealed.
    """
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(storage.TAKE_SEALING_LOCK)
        chain_end = await storage.fetch_chain_end(connection)
        found = await connection.fetch(
            f"{storage.SELECT_EVENTS} LIMIT {EVENTS_PER_SEAL}", chain_end.upto + 1, upto
        )
        if not found:
            return None
        if len(found) == EVENTS_PER_SEAL:
            upto, closed_at = found[-1]["position"], None
        # PostgreSQL assigns each position once, so a second event at the same position is forged.
        contents = {row["position"]: row["content"] for row in reversed(found)}
        positions = sorted(contents)
        digests = b"".join(digest_of(contents[position]) for position in positions)
        await append_seal(
            connection, key, chain_end, positions, digests, upto=upto, closed_at=closed_at
        )
        return len(positions)


async def append_seal(
    connection: Connection,
    key: Ed25519PrivateKey,
    chain_end: ChainEnd,
    positions: Sequence[int],
    digests: bytes | bytearray,
    *,
    upto: int,
    closed_at: str | None = None,
    retired: str | None = None,
) -> None:
    """Sign and insert the next seal. The caller must hold the sealing lock (`TAKE_SEALING_LOCK`).

    A seal that records a retired month stores no digests of events.
    """
    payload = SealPayload(
        version=SEAL_VERSION,
        number=chain_end.number + 1,
        previous=chain_end.payload_digest,
        after=chain_end.upto,
        upto=upto,
        positions=ranges_of(positions),
        root=merkle_root(zip(positions, split_digests(digests), strict=True)).hex(),
        sealed_at=await storage.database_time(connection),
        key=public_text(key.public_key()),
        closed_at=closed_at,
        retired=retired,
        origin=chain_end.origin or secrets.token_hex(16),
    )
    made = make_seal(key, payload, b"" if retired else bytes(digests))
    await connection.execute(
        "INSERT INTO audit_seals (number, statement, signature, digests) VALUES ($1, $2, $3, $4)",
        payload.number,
        made.payload_json,
        made.signature,
        made.digests,
    )


@public
async def required_key(database: Database) -> Ed25519PrivateKey:
    """Return the private key that signs seals.

    Raises:
        ConfigurationError: `AUDIT_SIGNING_KEY` is not set.
    """
    key = await database.signing_key()
    if key is None:
        raise ConfigurationError(
            "AUDIT_SIGNING_KEY is not set: make a key with `tiger-db generate-audit-signing-key`"
        )
    return key

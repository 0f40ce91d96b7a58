"""Creation of seals for audit events, and changes of the sequence and of the signing key."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tiger_db.actor import attribute
from tiger_db.audit import storage
from tiger_db.audit.seal_format import MerkleTree, digest_of
from tiger_db.audit.sealer import Sealer, check_clocks, required_key
from tiger_db.audit.storage import DEFAULT_PATIENCE
from tiger_db.database import Database
from tiger_db.errors import InvalidState, InvalidValue
from tiger_db.models import AuditAction, AuditLog
from tiger_db.models.audit_logs import insert_events
from tiger_db.public import Progress, no_progress, public
from tiger_db.signing import public_text

EVENTS_PER_SEAL = 10_000  # maximum number of events that one seal covers
_WRITERS_POLL_SECONDS = 0.02
# `repair_sequence` ignores higher positions, which a statement of an attacker has set.
_MAX_UNSEALED_POSITIONS = 10**9
_SELECT_LAST_USED_POSITION = f"""
SELECT coalesce(max(position), 0) FROM audit_logs WHERE position <= $1 + {_MAX_UNSEALED_POSITIONS}
"""  # noqa: S608  # a constant


@dataclass(frozen=True, slots=True)
class Sealing:
    """The result of `seal`.

    If open transactions prevent sealing, no event is sealed, and `waits_for` has the process ids of
    these transactions. None in `waits_for` stands for a prepared transaction.
    """

    rows: int  # Number of sealed events.
    seals: int  # Number of new seals.
    waits_for: tuple[int | None, ...] = ()
    # Number of older seals that were verified, because the folder AUDIT_CHECKPOINTS was empty.
    verified: int = 0


@public
async def seal(
    database: Database,
    *,
    patience: timedelta = DEFAULT_PATIENCE,
    progress: Progress = no_progress,
) -> Sealing:
    """Seal the audit events that were written before the call of `seal`.

    Before it seals an event, `seal` verifies the seals that were added since the newest checkpoint
    in the folder `AUDIT_CHECKPOINTS`. If the folder is empty, `seal` verifies all seals. Without a
    folder, it verifies the last two seals. At the end, `seal` saves a checkpoint in the folder.

    Writers of events never wait for `seal`. `seal` waits for open transactions that have written
    events, and for locks, each at most for the duration `patience`. If a transaction that has
    written events is still open after `patience`, no event is sealed. Concurrent calls of `seal`
    seal each event only once. After each new seal, `seal` calls `progress` with the number of
    events sealed so far, and with None instead of a total number.

    Raises:
        ConfigurationError: `AUDIT_SIGNING_KEY` is not set, or is not the key in force.
        DatabaseUnavailable: The connection to the database was lost, or another session held a lock
            for longer than `patience`. Seals that were committed before stay in the database.
        FileError: The folder `AUDIT_CHECKPOINTS` cannot be read or written.
        InvalidState: Nothing was sealed, because the chain of seals is broken or does not continue
            the newest checkpoint, because the sequence of positions was changed or is behind the
            newest seal, or because the clocks of the database and of this machine differ by more
            than a minute.
    """
    rows = seals = 0
    async with open_sealer(database, patience) as sealer:
        connection, deadline = sealer.connection, time.monotonic() + patience.total_seconds()
        closed_at = await storage.database_time(connection)
        changed = await storage.find_changed_sequence(connection)
        if changed is not None:
            raise InvalidState(f"the sequence of positions was changed: {changed}")
        upto, writers = await storage.fetch_writers(connection)
        if upto < sealer.chain.upto:
            raise InvalidState(
                f"the sequence of positions is at {upto}, behind the newest seal, which covers"
                f" positions up to {sealer.chain.upto}: nothing was sealed; run"
                " `tiger-db seal-audit --repair-sequence`"
            )
        while writers:
            if time.monotonic() > deadline:
                return Sealing(0, 0, tuple(writers.values()), sealer.verified_first)
            await asyncio.sleep(_WRITERS_POLL_SECONDS)
            _, now = await storage.fetch_writers(connection)
            writers = {name: pid for name, pid in writers.items() if name in now}
        while (sealed := await seal_next(sealer, upto, closed_at)) is not None:
            rows += sealed
            seals += 1
            progress(rows, None)
        await sealer.finish()
    return Sealing(rows, seals, (), sealer.verified_first)


@contextlib.asynccontextmanager
async def open_sealer(
    database: Database, patience: timedelta, *, after_restore: bool = False
) -> AsyncIterator[Sealer]:
    """Open a sealer whose connection waits for each lock at most for the duration `patience`."""
    key = await required_key(database)
    async with storage.open_connection(database, patience=patience) as connection:
        database_time = await storage.fetch_clock(connection)
        check_clocks(database_time, datetime.now(UTC), "nothing is sealed")
        folder = database.settings.audit_checkpoints
        yield await Sealer.open(connection, key, folder, after_restore=after_restore)


async def seal_next(sealer: Sealer, upto: int, closed_at: str | None) -> int | None:
    """Create one seal, which covers unsealed events up to the position `upto`.

    Return the number of events that the new seal covers, or None if all events up to `upto`
    are already sealed.
    """
    connection = sealer.connection
    async with connection.transaction(isolation="read_committed"):
        await connection.execute(storage.TAKE_SEALING_LOCK)
        await sealer.catch_up()
        first, digests, found = sealer.chain.upto + 1, dict[int, bytes](), 0
        # The index of positions is not ordered: a query for all remaining positions would sort all
        # their events for each seal. This query is only needed if no event is in the next range.
        for last in (min(upto, first + EVENTS_PER_SEAL - 1), upto):
            query = storage.select_events(first, last, limit=EVENTS_PER_SEAL)
            async for events in storage.read_events(connection, query):
                for position, content in events:
                    # PostgreSQL assigns each position once: a second event at a position is forged.
                    digests.setdefault(position, digest_of(content))
                found += len(events)
            if found:
                break
        else:
            return None
        if found == EVENTS_PER_SEAL:
            last = max(digests)
        if last < upto or found == EVENTS_PER_SEAL:
            closed_at = None
        tree = MerkleTree(digests.items())
        await sealer.append(tree, b"".join(digests.values()), upto=last, closed_at=closed_at)
        return tree.count


@public
async def repair_sequence(
    database: Database, *, patience: timedelta = DEFAULT_PATIENCE
) -> tuple[int, int] | None:
    """Move the sequence of positions behind the sealed positions, and record this as an event.

    A logical copy of a database does not copy the state of sequences. Without a repair, new events
    get positions that are sealed already. Return the last position before and after the repair, or
    None if the sequence is not behind the newest seal.

    Raises:
        ConfigurationError, DatabaseUnavailable, FileError, InvalidState: See `seal`.
    """
    async with open_sealer(database, patience) as sealer:
        connection = sealer.connection
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(storage.TAKE_SEALING_LOCK)
            # A writer takes a position only after the lock that this lock conflicts with.
            await connection.execute("LOCK TABLE audit_logs IN SHARE ROW EXCLUSIVE MODE")
            await sealer.catch_up()
            sealed = sealer.chain.upto
            before, _ = await storage.fetch_writers(connection)
            if before >= sealed:
                return None
            used = await connection.fetchval(_SELECT_LAST_USED_POSITION, sealed)
            after = max(sealed, used)
            await connection.execute("SELECT setval('audit_logs_position_seq', $1)", after)
            event = AuditLog(
                action=AuditAction.SYSTEM_AUDIT_REPAIR_SEQUENCE,
                resource_type="audit_sequence",
                details={"before": before, "after": after},
            )
            await insert_events(connection, [attribute(event)])
            return before, after


@public
async def change_signing_key(
    database: Database,
    new_key: Ed25519PrivateKey,
    *,
    patience: timedelta = DEFAULT_PATIENCE,
) -> int:
    """Introduce a new signing key by a seal that `AUDIT_SIGNING_KEY` signs, and record this.

    The next seal, which covers no events, is signed with the new key, so that the public key of
    either signing key verifies the whole chain. Afterwards, set `AUDIT_SIGNING_KEY` to the new key
    wherever events are sealed. Return the number of the seal that introduces the new key.

    Raises:
        InvalidValue: The new key is the key in force.
        ConfigurationError, DatabaseUnavailable, FileError, InvalidState: See `seal`.
    """
    async with open_sealer(database, patience) as sealer:
        old, new = (public_text(key.public_key()) for key in (sealer.key, new_key))
        if old == new:
            raise InvalidValue("the new signing key is the key in force")
        connection = sealer.connection
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(storage.TAKE_SEALING_LOCK)
            await sealer.catch_up()
            number = sealer.chain.number + 1
            event = AuditLog(
                action=AuditAction.SYSTEM_AUDIT_CHANGE_KEY,
                resource_type="audit_signing_key",
                details={"old": old, "new": new, "seal": number},
            )
            await insert_events(connection, [attribute(event)])
            await sealer.append(next_key=new)
            sealer.key = new_key
            await sealer.catch_up()
            await sealer.append()
        await sealer.finish()
    return number

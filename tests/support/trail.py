"""A sealed audit trail, and the findings that verification must return."""

import json
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import SecretStr
from sqlalchemy import text

from tests.support import factories
from tiger_db import (
    AuditAction,
    AuditLog,
    AuditResult,
    AuditSeverity,
    Database,
    Settings,
    audit,
    crud,
)
from tiger_db.audit import AuditFinding, FindingKind, Verification
from tiger_db.audit.event_content import Event
from tiger_db.audit.seal_format import (
    Seal,
    SealPayload,
    make_seal,
)
from tiger_db.audit.storage import (
    Connection,
    database_time,
    read_events,
    read_trail,
    select_events,
)
from tiger_db.audit.verifying import TrailVerifier
from tiger_db.connections import connect
from tiger_db.signing import generate_signing_key

TAMPERINGS = 500 if os.environ.get("TIGER_DB_SOAK") else 40  # of each kind
SEALS, HALF = 5, 6  # a seal covers two halves of a batch, with gaps after each
NEXT = "SELECT nextval('audit_logs_position_seq') FROM generate_series(1, :gaps)"
DROP_CHECKS = """
DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT conname FROM pg_constraint
        WHERE contype = 'c' AND conrelid = 'audit_logs'::regclass AND conislocal
    LOOP EXECUTE format('ALTER TABLE audit_logs DROP CONSTRAINT %I', name); END LOOP;
END $$;
"""
FIELDS: dict[str, Callable[[random.Random], Any]] = {
    "resource_type": lambda _: "order",
    "resource_id": lambda r: f"ORD-{r.randrange(10**9)}",
    "user_id": lambda r: r.choice(["alice", "Bob", "Zoë", "王伟"]),
    "user_type": lambda _: "trader",
    "session_id": lambda r: f"{r.getrandbits(64):x}",
    "ip_address": lambda r: r.choice(["192.0.2.7", "2001:db8::7"]),
    "user_agent": lambda _: 'Mozilla/5.0 ("X11"; Linux)',
    "request_method": lambda _: "POST",
    "request_path": lambda r: f"/orders/{r.randrange(10**6)}",
    "request_id": lambda r: f"{r.getrandbits(64):x}",
    "tiger_account_id": lambda _: uuid4(),
    "api_key_id": lambda _: uuid4(),
    "details": lambda r: {"symbol": "AAPL", "price": r.randrange(10**6) / 100 + 0.01, "n": 2**70},
    "old_values": lambda r: {"limit": 0.1, "quantity": r.randrange(100)},
    "new_values": lambda r: {"limit": 0.2, "legs": [{"quantity": r.randrange(100)}, None, True]},
    "error_code": lambda _: "E42",
    "error_message": lambda _: "not enough\nbuying power",
    "duration_ms": lambda r: r.randrange(10_000),
    "tags": lambda _: {"desk": "eu-1"},
}


def typical(chance: random.Random) -> AuditLog:
    """An event with a random half of the optional fields."""
    told = {name: make(chance) for name, make in FIELDS.items() if chance.random() < 0.5}
    return factories.new_event(
        action=chance.choice([*AuditAction]),
        result=chance.choice([*AuditResult]),
        severity=chance.choice([*AuditSeverity]),
        **told,
    )


@dataclass
class Trail:
    """A sealed trail, and a superuser who can tamper with it."""

    database: Database
    superuser: Connection
    payloads: list[SealPayload]
    checkpoint: Seal
    ids: dict[int, UUID]  # of the sealed events, by their positions
    gaps: list[int]  # sealed positions without an event
    chance: random.Random

    @property
    def end(self) -> int:
        return self.payloads[-1].upto

    def seal_of(self, position: int) -> int:
        """Return the number of the seal that covers a position."""
        return next(payload.number for payload in self.payloads if position <= payload.upto)

    async def check(self, checkpoint: Seal | None) -> Verification:
        """Verify the trail within the superuser's transaction."""
        key = await self.database.signing_key()
        assert key is not None
        verifier = TrailVerifier([key.public_key()], [checkpoint] if checkpoint else [])
        verifier.database_time = await database_time(self.superuser)
        async with self.superuser.transaction():
            async for items in read_trail(self.superuser):
                for item in items:
                    verifier.add(item)
        return verifier.finish()


def with_signing_key(settings: Settings, **changes: object) -> Settings:
    """Return the settings with a new signing key, and with other changes."""
    key = SecretStr(generate_signing_key())
    return settings.model_copy(update={"audit_signing_key": key, **changes})


@asynccontextmanager
async def without_triggers(settings: Settings) -> AsyncIterator[Connection]:
    """A connection of the database's owner, for which triggers are disabled."""
    connection = await connect(settings)
    await connection.execute("SET session_replication_role = replica")
    yield connection
    await connection.close()


async def log(database: Database, count: int = 1) -> None:
    async with database.session() as session:
        await crud.audit_logs.log_events(session, [factories.new_event() for _ in range(count)])


async def log_seals(database: Database, *counts: int) -> None:
    """Seal each number of new events."""
    for count in counts:
        await log(database, count)
        await audit.seal(database)


async def fill(database: Database, chance: random.Random) -> None:
    """Write a batch of typical events, with unused positions."""
    async with database.session() as session:
        for gaps in (2, 1):
            await crud.audit_logs.log_events(session, [typical(chance) for _ in range(HALF)])
            await session.execute(text(NEXT), {"gaps": gaps})


def event_found(
    trail: Trail, kind: FindingKind, position: int, event_id: UUID | None = None
) -> AuditFinding:
    seal = trail.seal_of(position) if position <= trail.end else SEALS + 1
    return AuditFinding(kind, "", seal, position, str(event_id) if event_id else None)


def assert_found(verification: Verification, expected: AuditFinding, what: str) -> None:
    assert not verification.sound, what
    first = verification.findings[0]
    assert replace(first, message="") == expected, (what, verification.findings[:5])
    assert verification.count >= len(verification.findings)
    assert str(first.position if first.position is not None else first.seal) in first.message


async def stored_events(
    connection: Connection, first: int = -(2**63), last: int = 2**63 - 1
) -> list[Event]:
    """Return the events at positions from `first` to `last`, in order of position."""
    query = select_events(first, last)
    return [event async for events in read_events(connection, query) for event in events]


async def fetch_seals(connection: Connection, after: int, limit: int) -> list[tuple[int, Seal]]:
    """Return the seals whose number in the table is above `after`, with this number."""
    rows = await connection.fetch(
        "SELECT number, statement, signature, digests FROM audit_seals WHERE number > $1"
        " ORDER BY number LIMIT $2",
        after,
        limit,
    )
    return [(row[0], Seal(*row[1:])) for row in rows]


async def insert_seal(
    connection: Connection, key: Ed25519PrivateKey, payload: SealPayload, digests: bytes
) -> None:
    made = make_seal(key, payload, digests)
    await connection.execute(
        "INSERT INTO audit_seals (number, statement, signature, digests) VALUES ($1, $2, $3, $4)",
        payload.number,
        made.payload_json,
        made.signature,
        made.digests,
    )


async def restore(superuser: Connection, seal: int, position: int) -> None:
    """Remove all later seals and events, as a restore of an earlier backup does."""
    await superuser.execute("DELETE FROM audit_seals WHERE number > $1", seal)
    await superuser.execute("DELETE FROM audit_logs WHERE position > $1", position)
    await superuser.execute("SELECT setval('audit_logs_position_seq', $1)", max(position, 1))


async def exported(database: Database, **options: Any) -> list[str]:
    return [line async for line in audit.export(database, **options)]


def events_of(lines: list[str]) -> dict[int, int]:
    """Return the line number of each position."""
    return {
        json.loads(line)["position"]: number
        for number, line in enumerate(lines)
        if not line.startswith('{"seal"')
    }


def seals_of(lines: list[str]) -> list[int]:
    """Return the line numbers of the seals."""
    return [number for number, line in enumerate(lines) if line.startswith('{"seal"')]

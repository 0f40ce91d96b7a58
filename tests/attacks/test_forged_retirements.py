"""A forged retirement excuses no deleted event: attack A2 of the red team.

The attacker owns the database, and has retirement seals that the true key has signed, for example
on a clone of the database.
"""

from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.trail import insert_seal, log_seals, with_signing_key, without_triggers
from tiger_db import Database, Settings, audit
from tiger_db.audit import FindingKind
from tiger_db.audit.seal_format import Seal, SealPayload, make_seal
from tiger_db.audit.storage import Connection
from tiger_db.signing import public_text

DELETED = (3, 8, 13)


@pytest.fixture
async def database(clone_settings: Settings) -> AsyncIterator[Database]:
    """15 sealed events."""
    async with Database(with_signing_key(clone_settings)) as database:
        await log_seals(database, 15)
        yield database


@pytest.fixture
async def owner(clone_settings: Settings) -> AsyncIterator[Connection]:
    async with without_triggers(clone_settings) as connection:
        await connection.execute("ALTER TABLE audit_logs DISABLE TRIGGER USER")
        await connection.execute("ALTER TABLE audit_logs_default DISABLE TRIGGER USER")
        yield connection


@pytest.fixture
async def key(database: Database) -> Ed25519PrivateKey:
    return await audit.required_key(database)


async def newest(owner: Connection) -> Seal:
    row = await owner.fetchrow(
        "SELECT statement, signature, digests FROM audit_seals ORDER BY number DESC LIMIT 1"
    )
    assert row is not None
    return Seal(*row)


async def retirement(owner: Connection, number: int) -> SealPayload:
    seal = await newest(owner)
    last = seal.payload()
    return replace(
        last,
        number=number,
        previous=seal.payload_digest,
        after=last.upto,
        positions=tuple((position, position) for position in DELETED),
        retired="2025-01",
        closed_at=None,
    )


async def delete(owner: Connection) -> None:
    await owner.execute("DELETE FROM audit_logs WHERE position = ANY($1)", [*DELETED])


async def deletions(database: Database) -> list[int | None]:
    found = await audit.verify(database)
    assert found.retired == 0
    return [one.position for one in found.findings if one.kind == FindingKind.DELETED]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, -1, -7, -(2**62)])
async def test_a_retirement_before_the_chain_excuses_nothing(
    database: Database, owner: Connection, key: Ed25519PrivateKey, number: int
) -> None:
    await delete(owner)
    payload = await retirement(owner, number)
    with pytest.raises(asyncpg.CheckViolationError, match="ck_audit_seals_number"):
        await insert_seal(owner, key, payload, b"")
    await owner.execute("ALTER TABLE audit_seals DROP CONSTRAINT ck_audit_seals_number")
    await insert_seal(owner, key, payload, b"")
    assert await deletions(database) == [*DELETED]
    findings = (await audit.verify(database)).findings
    assert FindingKind.FORGED in {one.kind for one in findings}


@pytest.mark.slow
@pytest.mark.parametrize(("row", "number"), [(2, 7), (7, 7), (7, 2), (-1, 2)])
async def test_a_retirement_elsewhere_than_in_its_place_excuses_nothing(
    database: Database, owner: Connection, key: Ed25519PrivateKey, row: int, number: int
) -> None:
    """The signed number and the number of the row must be those of the place in the chain."""
    await delete(owner)
    await owner.execute("ALTER TABLE audit_seals DROP CONSTRAINT ck_audit_seals_number")
    made = make_seal(key, await retirement(owner, number), b"")
    await owner.execute(
        "INSERT INTO audit_seals (number, statement, signature, digests) VALUES ($1, $2, $3, '')",
        row,
        made.payload_json,
        made.signature,
    )
    assert await deletions(database) == [*DELETED]


@pytest.mark.slow
async def test_a_retirement_of_another_chain_excuses_nothing(
    database: Database, owner: Connection, key: Ed25519PrivateKey
) -> None:
    """As a clone of the database would sign it after a seal of its own."""
    await delete(owner)
    payload = await retirement(owner, 2)
    await insert_seal(owner, key, replace(payload, previous="f" * 64), b"")
    assert await deletions(database) == [*DELETED]


async def test_a_retirement_signed_with_another_key_excuses_nothing(
    database: Database, owner: Connection
) -> None:
    await delete(owner)
    forger = Ed25519PrivateKey.generate()
    payload = replace(await retirement(owner, 2), key=public_text(forger.public_key()))
    await insert_seal(owner, forger, payload, b"")
    assert await deletions(database) == [*DELETED]


@pytest.mark.slow
async def test_the_true_retirement_excuses_its_events(
    database: Database, owner: Connection, key: Ed25519PrivateKey
) -> None:
    """So that the attacks above fail for their own reason."""
    await delete(owner)
    await insert_seal(owner, key, await retirement(owner, 2), b"")
    await owner.execute("ALTER TABLE audit_logs ENABLE TRIGGER USER")
    await owner.execute("ALTER TABLE audit_logs_default ENABLE TRIGGER USER")
    found = await audit.verify(database)
    assert (found.findings, found.retired, found.rows) == ([], 3, 12)

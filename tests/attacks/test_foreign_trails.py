"""Another trail of the same signing key does not pass for the true trail."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tests.support.trail import fetch_seals, insert_seal, log_seals, with_signing_key
from tiger_db import Database, Settings, audit
from tiger_db.audit import FindingKind, Seal
from tiger_db.audit.seal_format import NO_PREVIOUS_DIGEST, SEAL_VERSION
from tiger_db.audit.storage import Connection


@pytest.fixture
async def database(clone_settings: Settings) -> AsyncIterator[Database]:
    async with Database(with_signing_key(clone_settings)) as database:
        yield database


async def head(database: Database) -> Seal:
    return audit.read_checkpoint(await audit.export_checkpoint(database))


async def wipe(owner: Connection) -> None:
    await owner.execute(
        "TRUNCATE audit_logs, audit_seals; ALTER SEQUENCE audit_logs_position_seq RESTART"
    )


@pytest.mark.slow
async def test_each_trail_has_an_origin_of_its_own(database: Database, owner: Connection) -> None:
    origins = set()
    for _ in range(3):
        for _ in range(2):
            await log_seals(database, 1)
        payloads = [one.payload() for _, one in await fetch_seals(owner, 0, 9)]
        (origin,) = {payload.origin for payload in payloads}
        assert {payload.version for payload in payloads} == {SEAL_VERSION}
        origins.add(origin)
        await wipe(owner)
    assert len(origins) == 3
    assert None not in origins


@pytest.mark.slow
@pytest.mark.parametrize("longer", [False, True])
async def test_a_foreign_trail_in_place_of_the_true_one_is_found(
    database: Database, owner: Connection, longer: bool
) -> None:
    for _ in range(3):
        await log_seals(database, 1)
    checkpoint = await head(database)
    await wipe(owner)
    for _ in range(5 if longer else 2):
        await log_seals(database, 1)
    assert (await audit.verify(database)).sound  # it is sound on its own
    (found,) = (await audit.verify(database, checkpoint=checkpoint)).findings
    assert (found.kind, found.seal) == (FindingKind.CHECKPOINT, 1)
    assert found.message == "seal 1 belongs to another audit trail than the checkpoint"


@pytest.mark.slow
async def test_a_seal_of_another_trail_is_found_in_the_chain(
    database: Database, owner: Connection
) -> None:
    """Neither another origin nor the old form, which has none, continues the chain."""
    await log_seals(database, 1)
    key = await audit.required_key(database)
    last = await head(database)
    following = replace(
        last.payload(), number=2, previous=last.payload_digest, after=1, positions=(), root=EMPTY
    )
    for payload in (
        replace(following, origin="0" * 32),
        replace(following, origin=None, version=1),
    ):
        await owner.execute("DELETE FROM audit_seals WHERE number = 2")
        await insert_seal(owner, key, payload, b"")
        (found,) = (await audit.verify(database)).findings
        assert (found.kind, found.seal) == (FindingKind.FORGED, 2)
        assert "another origin" in found.message
    await owner.execute("DELETE FROM audit_seals WHERE number = 2")
    await insert_seal(owner, key, following, b"")
    assert (await audit.verify(database)).sound


@pytest.mark.slow
async def test_seals_of_the_old_form_stay_verifiable(database: Database, owner: Connection) -> None:
    """The first seal of the new form continues the chain, and begins with the origin."""
    await log_seals(database, 3)
    ((_, made),) = await fetch_seals(owner, 0, 1)
    old = replace(made.payload(), version=1, origin=None, previous=NO_PREVIOUS_DIGEST)
    await owner.execute("DELETE FROM audit_seals")
    await insert_seal(owner, await audit.required_key(database), old, made.digests)
    checkpoint = await head(database)
    for _ in range(2):
        await log_seals(database, 1)
    found = await audit.verify(database, checkpoint=checkpoint)
    assert (found.findings, found.rows, found.seals) == ([], 5, 3)
    payloads = [one.payload() for _, one in await fetch_seals(owner, 0, 9)]
    assert [payload.version for payload in payloads] == [1, 2, 2]
    assert payloads[0].origin is None
    assert payloads[1].origin == payloads[2].origin


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

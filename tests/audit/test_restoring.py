"""Sealing goes on after a restore has lost the newest seals, and verification names the loss."""

import json
import runpy
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support import factories
from tests.support.trail import exported, fetch_seals, insert_seal, restore
from tiger_db import AuditAction, Database, Settings, audit, crud
from tiger_db.audit import FindingKind, RecordedRestore, Seal
from tiger_db.audit.checkpoints import checkpoint_numbers, load_checkpoint
from tiger_db.audit.storage import Connection
from tiger_db.errors import ConfigurationError, InvalidState
from tiger_db.signing import public_text

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[2] / "examples" / "verify_export.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


@pytest.fixture
async def database(key_settings: Settings, folder: Path) -> AsyncIterator[Database]:
    """Twenty events in four seals with checkpoints."""
    settings = key_settings.model_copy(update={"audit_checkpoints": folder})
    async with Database(settings) as database:
        for _ in range(4):
            await log(database, 5)
            await audit.seal(database)
        yield database


async def log(database: Database, count: int = 1) -> None:
    async with database.session() as session:
        await crud.audit_logs.log_events(session, [factories.new_event() for _ in range(count)])


async def test_sealing_goes_on_after_a_recorded_restore(
    database: Database, superuser: Connection, folder: Path
) -> None:
    await restore(superuser, 2, 13)
    found = await audit.verify(database)
    (finding,) = found.findings
    assert finding.kind is FindingKind.TRUNCATED
    assert finding.message == (
        "the seals from 3 to 4 are missing, according to the checkpoint: positions from 11 to"
        " 20 were sealed there; the newest event is at position 13"
    )
    await log(database)  # an honest event at a position that a lost seal has covered
    with pytest.raises(InvalidState, match="the newest seals are missing, from seal 3 on"):
        await audit.seal(database)

    assert await audit.record_restore(database) == RecordedRestore(5, 3, 10, 20, 4)
    assert await audit.record_restore(database) is None
    await log(database)
    assert (await audit.seal(database)).rows == 6  # 3 restored, 2 new, and that of the restore
    found = await audit.verify(database)
    assert (found.findings, found.rows, found.unsealed) == ([], 16, 0)
    lost = (
        "the seals from 3 to 4 are lost by a restore, which seal 5 records: positions from 11 to 20"
        " were sealed there"
    )
    assert [(one.kind, one.seal, one.message) for one in found.warnings] == [
        (FindingKind.RESTORED, 3, lost)
    ]
    assert sorted(checkpoint_numbers(folder)) == [1, 2, 3, 4, 5, 6]
    async with database.session() as session:
        (event,) = await crud.audit_logs.search(session, action=AuditAction.SYSTEM_AUDIT_RESTORE)
    assert event.position == 21
    assert event.details == {
        "seal": 5,
        "lost_seals": [3, 4],
        "lost_positions": [11, 20],
        "kept_events": 4,
    }


async def test_checkpoints_of_lost_seals_accuse_nobody_later(
    database: Database, superuser: Connection, folder: Path, tmp_path: Path
) -> None:
    await restore(superuser, 2, 13)
    await audit.record_restore(database)
    await audit.seal(database)
    export = tmp_path / "trail.jsonl"
    export.write_text("".join(await exported(database)), encoding="utf-8")
    verify = runpy.run_path(str(PROGRAM))["verify"]
    public = (await audit.required_key(database)).public_key()
    for number in range(1, 7):
        checkpoint = load_checkpoint(folder, number)
        found = await audit.verify_export(export, keys=[public], checkpoint=checkpoint)
        state = "is in the chain"
        if number in (3, 4):
            state = "was lost by a restore, which seal 5 records"
        assert (found.findings, found.basis[-1]) == (
            [],
            f"checkpoint given: seal {number} {state}",
        )
        file = folder / f"{number:019}.json"
        assert verify(export, public_text(public), file).startswith("sound")


async def test_a_restore_to_a_time_before_the_first_seal(
    database: Database, superuser: Connection, folder: Path
) -> None:
    await restore(superuser, 0, 0)
    assert await audit.record_restore(database) == RecordedRestore(5, 1, 0, 20, 0)
    await audit.seal(database)
    found = await audit.verify(database)
    assert (found.sound, found.rows, len(found.warnings)) == (True, 1, 1)
    origins = {load_checkpoint(folder, number).payload().origin for number in (1, 4, 5, 6)}
    assert len(origins) == 1


async def test_a_second_restore_is_recorded_too(database: Database, superuser: Connection) -> None:
    await restore(superuser, 3, 15)
    await audit.record_restore(database)
    await log(database, 5)
    await audit.seal(database)
    await restore(superuser, 2, 11)
    assert await audit.record_restore(database) == RecordedRestore(7, 3, 10, 26, 1)
    await audit.seal(database)
    found = await audit.verify(database)
    assert (found.sound, [warning.seal for warning in found.warnings]) == (True, [3])


async def test_a_step_that_was_killed_before_its_checkpoint_is_repeated(
    database: Database, superuser: Connection, folder: Path
) -> None:
    await restore(superuser, 2, 13)
    await audit.record_restore(database)
    (folder / f"{5:019}.json").unlink()
    with pytest.raises(InvalidState):
        await audit.seal(database)
    assert await audit.record_restore(database) is None
    await audit.seal(database)
    assert (await audit.verify(database)).sound


async def test_nothing_is_recorded_without_a_loss_or_a_folder(
    database: Database, key_settings: Settings
) -> None:
    assert await audit.record_restore(database) is None
    async with Database(key_settings) as forgetful:
        with pytest.raises(ConfigurationError, match="AUDIT_CHECKPOINTS is not set"):
            await audit.record_restore(forgetful)
    assert (await audit.verify(database)).seals == 4


async def forged(database: Database, superuser: Connection, key: Ed25519PrivateKey) -> None:
    """Insert a record of a restore that has lost the seals 3 and 4."""
    ((_, second),) = await fetch_seals(superuser, 1, 1)
    payload = replace(
        second.payload(),
        version=3,
        number=5,
        previous=second.payload_digest,
        after=10,
        upto=10,
        positions=(),
        root="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        closed_at=None,
        lost="0" * 64,
        lost_upto=20,
    )
    await restore(superuser, 2, 10)
    await insert_seal(superuser, key, payload, b"")


async def test_an_attacker_without_the_signing_key_cannot_record_a_restore(
    database: Database, superuser: Connection, folder: Path
) -> None:
    await forged(database, superuser, Ed25519PrivateKey.generate())
    found = await audit.verify(database)
    assert [finding.kind for finding in found.findings] == [
        FindingKind.FORGED,
        FindingKind.TRUNCATED,
    ]
    assert found.warnings == []
    for step in (audit.seal, audit.record_restore):
        with pytest.raises(InvalidState):
            await step(database)
    assert max(checkpoint_numbers(folder)) == 4


async def test_a_checkpoint_that_a_recorded_restore_does_not_name_is_not_excused(
    database: Database, superuser: Connection
) -> None:
    """The seal 5 is signed, but names another last seal than the checkpoint."""
    await forged(database, superuser, await audit.required_key(database))
    found = await audit.verify(database)
    assert [finding.kind for finding in found.findings] == [FindingKind.TRUNCATED]
    assert found.basis[2].endswith("seal 4 is not in the chain")


async def test_a_record_of_a_restore_does_not_move_to_another_place(
    database: Database, superuser: Connection, folder: Path
) -> None:
    """An attacker who has kept the lost seals cannot excuse the loss of others with it."""
    lost = await fetch_seals(superuser, 2, 2)
    await restore(superuser, 2, 13)
    await audit.record_restore(database)
    for number, seal in lost:
        await superuser.execute(
            "INSERT INTO audit_seals (number, statement, signature, digests)"
            " VALUES ($1, $2, $3, $4)",
            number,
            seal.payload_json,
            seal.signature,
            seal.digests,
        )
    found = await audit.verify(database)
    assert FindingKind.FORGED in {finding.kind for finding in found.findings}


async def test_seals_that_were_added_after_an_unnoticed_restore_are_not_overwritten(
    database: Database, key_settings: Settings, superuser: Connection
) -> None:
    await restore(superuser, 2, 13)
    async with Database(key_settings) as forgetful:  # a sealer without a folder
        for _ in range(2):
            await log(forgetful)
            await audit.seal(forgetful)
    with pytest.raises(InvalidState, match="seal 4 is not the seal that was verified earlier"):
        await audit.record_restore(database)


def test_the_fields_of_a_restore_belong_to_its_version() -> None:
    payload = {
        "version": 2, "number": 2, "previous": "0" * 64, "after": 0, "upto": 0, "positions": [],
        "root": "", "sealed_at": "", "key": "", "origin": "0" * 32, "lost": "0" * 64,
        "lost_upto": 1,
    }  # fmt: skip
    for version, valid in ((1, False), (2, False), (3, True)):
        text = json.dumps(payload | {"version": version}, separators=(",", ":"))
        seal = Seal(text, b"", b"")
        if valid:
            assert seal.payload().lost_upto == 1
        else:
            with pytest.raises(Exception, match="the payload of the seal is invalid"):
                seal.payload()

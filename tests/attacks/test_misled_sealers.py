"""A sealer neither signs away nor builds on what an attacker has made: attacks A1, A8, A9 and A15.

The attacker owns the database, but has no signing key, and cannot write the folder of checkpoints.
"""

import asyncio
import os
import resource
import sys
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import SecretStr

from tests.support.trail import fetch_seals, insert_seal, log, log_seals, with_signing_key
from tests.support.waiting import WAITING_LOCKS, until
from tiger_db import AuditAction, Database, Settings, audit, crud
from tiger_db.audit import FindingKind, Seal, storage
from tiger_db.audit.checkpoints import newest_checkpoint
from tiger_db.audit.storage import TAKE_SEALING_LOCK, Connection
from tiger_db.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    FileError,
    InvalidState,
    TigerDBError,
)
from tiger_db.signing import public_text
from tiger_db.testing import environment_of

Attack = Callable[[Connection], Awaitable[str]]  # returns the reason of the refusal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


@pytest.fixture
def without_folder(clone_settings: Settings) -> Settings:
    return with_signing_key(clone_settings)


@pytest.fixture
def with_folder(without_folder: Settings, folder: Path) -> Settings:
    return without_folder.model_copy(update={"audit_checkpoints": folder})


@pytest.fixture
async def database(with_folder: Settings) -> AsyncIterator[Database]:
    """Nine sealed events in three seals. The sealer has a folder of checkpoints."""
    async with Database(with_folder) as database:
        await log_seals(database, 3, 3, 3)
        yield database


@pytest.fixture
async def forgetful(database: Database, without_folder: Settings) -> AsyncIterator[Database]:
    """The same database, and a sealer without a folder of checkpoints."""
    async with Database(without_folder) as forgetful:
        assert forgetful.settings.database == database.settings.database
        yield forgetful


async def rows(owner: Connection) -> list[tuple[object, ...]]:
    return [tuple(row) for row in await owner.fetch("SELECT * FROM audit_seals ORDER BY number")]


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def clear(folder: Path) -> None:
    for file in files(folder):
        file.unlink()


def saved(folder: Path) -> int:
    newest = newest_checkpoint(folder)
    return 0 if newest is None else newest.payload().number


async def assert_refuses(database: Database, owner: Connection, reason: str) -> None:
    await log(database)
    before, folder = await rows(owner), database.settings.audit_checkpoints
    remembered = saved(folder) if folder else 0
    with pytest.raises(TigerDBError) as refused:
        await audit.seal(database)
    assert reason in str(refused.value)
    assert await rows(owner) == before
    assert folder is None or saved(folder) == remembered


# Heads


async def forge_a_distant_head(owner: Connection) -> str:
    ((_, seal),) = await fetch_seals(owner, 2, 1)
    payload = replace(seal.payload(), number=1_000_000, upto=9 * 10**18, positions=())
    await insert_seal(owner, Ed25519PrivateKey.generate(), payload, b"")
    return "the seals from 4 to 999999 are missing"


async def forge_the_next_head(owner: Connection) -> str:
    ((_, seal),) = await fetch_seals(owner, 2, 1)
    last = seal.payload()
    payload = replace(
        last, number=4, previous=seal.payload_digest, after=last.upto, upto=last.upto + 1
    )
    await insert_seal(owner, Ed25519PrivateKey.generate(), payload, seal.digests)
    return "seal 4: none of the given public keys has signed the seal"


async def forge_with_a_key_of_its_own(owner: Connection) -> str:
    """The seal names the key that has signed it."""
    ((_, seal),) = await fetch_seals(owner, 2, 1)
    last, key = seal.payload(), Ed25519PrivateKey.generate()
    payload = replace(
        last,
        number=4,
        previous=seal.payload_digest,
        after=last.upto,
        upto=last.upto,
        key=public_text(key.public_key()),
    )
    await insert_seal(owner, key, payload, b"")
    return "seal 4: none of the given public keys has signed the seal"


async def damage_the_head(owner: Connection) -> str:
    await owner.execute("UPDATE audit_seals SET signature = signature || '\\x00' WHERE number = 3")
    return "seal 3"


async def spoil_the_head(owner: Connection) -> str:
    await owner.execute("UPDATE audit_seals SET statement = '{}' WHERE number = 3")
    return "seal 3"


async def damage_the_seal_before(owner: Connection) -> str:
    await owner.execute("UPDATE audit_seals SET signature = '' WHERE number = 2")
    return "seal 2: none of the given public keys has signed the seal"


async def remove_the_head(owner: Connection) -> str:
    await owner.execute("DELETE FROM audit_seals WHERE number = 3")
    return "the newest seals are missing, from seal 3 on"


async def remove_all_seals(owner: Connection) -> str:
    await owner.execute("DELETE FROM audit_seals")
    await owner.execute("UPDATE audit_logs SET user_id = 'eve'")
    return "the newest seals are missing, from seal 1 on"


FORGERIES = [
    forge_a_distant_head,
    forge_the_next_head,
    forge_with_a_key_of_its_own,
    damage_the_head,
    spoil_the_head,
]


@pytest.mark.parametrize("attack", [*FORGERIES, damage_the_seal_before])
async def test_a_sealer_without_memory_refuses_forged_heads(
    forgetful: Database, owner: Connection, attack: Attack
) -> None:
    await assert_refuses(forgetful, owner, await attack(owner))


@pytest.mark.parametrize("attack", [*FORGERIES, remove_the_head, remove_all_seals])
async def test_a_sealer_with_memory_refuses_another_past(
    database: Database, owner: Connection, attack: Attack
) -> None:
    await assert_refuses(database, owner, await attack(owner))
    assert not (await audit.verify(database)).sound


@pytest.mark.slow
async def test_a_sealer_with_memory_refuses_seals_made_again(
    database: Database, forgetful: Database, owner: Connection
) -> None:
    """The attack A8: the seals are removed, and another cron job seals all events again."""
    await remove_all_seals(owner)
    for _ in range(4):
        await log(forgetful)
        await audit.seal(forgetful)
    assert (await audit.verify(forgetful)).sound
    await assert_refuses(database, owner, "seal 3 is not the seal that was verified earlier")
    found = (await audit.verify(database)).findings
    assert [one.kind for one in found] == [FindingKind.CHECKPOINT]


@pytest.mark.slow
async def test_maintenance_refuses_forged_heads(
    forgetful: Database, without_folder: Settings, owner: Connection
) -> None:
    await owner.execute(
        "SELECT make_audit_partition(date_trunc('month', now() AT TIME ZONE 'UTC')"
        " - interval '15 months')"
    )
    await owner.execute(
        "INSERT INTO audit_logs (id, created_at, action, result, severity)"
        " SELECT uuid7_floor(t), t, 'data:query', 'success', 'low'"
        " FROM (SELECT date_trunc('month', now(), 'UTC') - interval '15 months') AS at (t)"
    )
    reason = await forge_the_next_head(owner)
    keeping = without_folder.model_copy(update={"audit_retention_months": 12})
    async with Database(keeping) as keeper:
        with pytest.raises(InvalidState, match=reason):
            await audit.maintain(keeper)


# Memory


@pytest.mark.slow
async def test_the_first_use_of_the_folder_verifies_the_whole_chain(
    forgetful: Database, database: Database, folder: Path, owner: Connection
) -> None:
    clear(folder)
    assert (await audit.seal(forgetful)).verified == 0
    assert (await audit.seal(database)).verified == 3
    assert [file.name for file in files(folder)] == [f"{3:019}.json"]
    assert (await audit.seal(database)).verified == 0
    clear(folder)
    await owner.execute("UPDATE audit_seals SET digests = '' WHERE number = 1")
    await assert_refuses(database, owner, "seal 1: the digests of the events do not match")
    assert saved(folder) == 0


@pytest.mark.slow
async def test_a_checkpoint_is_saved_after_the_seals_of_others_were_verified(
    database: Database, forgetful: Database, folder: Path, owner: Connection
) -> None:
    assert saved(folder) == 3
    for _ in range(2):
        await log(forgetful)
        await audit.seal(forgetful)
    assert saved(folder) == 3
    await owner.execute("CREATE TABLE kept AS TABLE audit_seals")
    await owner.execute("UPDATE audit_seals SET digests = '' WHERE number = 4")
    await assert_refuses(database, owner, "seal 4: the digests of the events do not match")
    await owner.execute("TRUNCATE audit_seals; INSERT INTO audit_seals TABLE kept")
    await audit.seal(database)
    assert saved(folder) == 6
    assert (await audit.verify(database)).sound


@pytest.mark.slow
async def test_a_checkpoint_is_written_once_and_never_replaced(
    database: Database, folder: Path
) -> None:
    before = {file: file.read_bytes() for file in files(folder)}
    assert len(before) == 3
    assert {file.stat().st_mode & 0o777 for file in before} == {0o600}
    for content in before.values():
        assert audit.read_checkpoint(content.decode()).payload().origin
    await log(database)
    await audit.seal(database)
    await audit.seal(database)
    assert len(files(folder)) == 4
    assert {file: file.read_bytes() for file in before} == before


async def test_a_checkpoint_that_cannot_be_written_leaves_no_file(
    database: Database, folder: Path
) -> None:
    await log(database)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # as on a full disk
    try:
        with pytest.raises(FileError, match="File too large"):
            await audit.seal(database)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved(folder) == 3
    await audit.seal(database)  # without new events, but with the checkpoint of the last seal
    assert saved(folder) == 4


async def test_a_damaged_checkpoint_is_named(
    database: Database, folder: Path, owner: Connection
) -> None:
    path = folder / f"{3:019}.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidState, match=f"{path} is not a checkpoint"):
        await audit.seal(database)
    assert len(await rows(owner)) == 3
    path.unlink()
    await log(database)
    await audit.seal(database)
    assert saved(folder) == 4


async def test_a_missing_folder_is_named(database: Database, folder: Path) -> None:
    clear(folder)
    await asyncio.to_thread(folder.rmdir)
    for use in (audit.seal, audit.verify):
        with pytest.raises(
            TigerDBError, match=f"AUDIT_CHECKPOINTS: {folder}: No such file or directory"
        ):
            await use(database)


@pytest.mark.slow
async def test_verification_uses_the_folder(
    database: Database, forgetful: Database, owner: Connection, folder: Path, tmp_path: Path
) -> None:
    assert (
        f"checkpoint folder: {folder}: seal 3 is in the chain"
        in (await audit.verify(database)).basis
    )
    await owner.execute("DELETE FROM audit_seals WHERE number = 3")
    assert (await audit.verify(forgetful)).sound
    found = await audit.verify(database)
    assert [one.kind for one in found.findings] == [FindingKind.TRUNCATED]
    assert f"checkpoint folder: {folder}: seal 3 is not in the chain" in found.basis
    file = tmp_path / "trail.jsonl"
    file.write_text("".join([line async for line in audit.export(database)]), encoding="utf-8")
    keys = [(await audit.required_key(database)).public_key()]
    assert (await audit.verify_export(file, keys=keys)).sound
    assert not (await audit.verify_export(file, keys=keys, folder=folder)).sound


# Clocks and sequences


@pytest.mark.parametrize("seconds", [90, -90])
async def test_a_clock_that_is_apart_seals_nothing(
    database: Database, owner: Connection, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=seconds)

    # The clock of this machine and of the server are one clock.
    monkeypatch.setattr("tiger_db.audit.sealing.datetime", Wrong)
    await assert_refuses(database, owner, "nothing is sealed until both clocks are correct")


@pytest.mark.slow
async def test_a_sequence_behind_the_seals_is_noticed_and_repaired(
    database: Database, owner: Connection
) -> None:
    """The attack A9: a logical copy, or a setval, starts the positions again."""
    await log(database, 4)  # not sealed
    await owner.execute("SELECT setval('audit_logs_position_seq', 2)")
    await assert_refuses(
        database,
        owner,
        "the sequence of positions is at 3, behind the newest seal, which covers positions up to 9",
    )
    assert await audit.repair_sequence(database) == (3, 13)
    assert await audit.repair_sequence(database) is None
    await log(database)
    assert (await audit.seal(database)).rows == 6
    found = await audit.verify(database)
    # The event that was written meanwhile has the position of another event. None is accused.
    assert [(one.kind, one.position, one.event_id) for one in found.findings] == [
        (FindingKind.DUPLICATE, 3, None)
    ]
    async with database.session() as session:
        page = await crud.audit_logs.search(
            session, action=AuditAction.SYSTEM_AUDIT_REPAIR_SEQUENCE
        )
    assert [event.details for event in page] == [{"before": 3, "after": 13}]
    assert [event.position for event in page] == [14]


async def test_the_repair_ignores_positions_that_somebody_has_set(
    database: Database, owner: Connection
) -> None:
    await owner.execute(
        "INSERT INTO audit_logs (id, position, action, result, severity) VALUES"
        " (gen_random_uuid(), 9223372036854775806, 'data:query', 'success', 'low')"
    )
    await owner.execute("SELECT setval('audit_logs_position_seq', 1)")
    assert await audit.repair_sequence(database) == (1, 9)


# Locks


async def lock_the_sealer(owner: Connection) -> None:
    await owner.execute(TAKE_SEALING_LOCK)


async def lock_events(owner: Connection) -> None:
    await owner.execute("LOCK TABLE audit_logs IN ACCESS EXCLUSIVE MODE")


async def lock_seals(owner: Connection) -> None:
    await owner.execute("LOCK TABLE audit_seals IN ACCESS EXCLUSIVE MODE")


@pytest.mark.slow
@pytest.mark.parametrize("lock", [lock_the_sealer, lock_events, lock_seals])
async def test_locks_are_waited_for_no_longer_than_patience(
    database: Database, owner: Connection, lock: Callable[[Connection], Awaitable[None]]
) -> None:
    """The attack A15: any role takes the advisory lock, and each minute one more sealer waits."""
    await log(database)
    await owner.execute("SET application_name = 'the attacker'")
    transaction = owner.transaction()
    await transaction.start()
    await lock(owner)
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable) as gave_up:
        await audit.seal(database, patience=timedelta(seconds=0.3))
    assert 0.2 < time.monotonic() - started < 3
    assert f"process {owner.get_server_pid()} (the attacker, " in str(gave_up.value)
    await transaction.rollback()
    waiting = f"SELECT count(*) FROM {WAITING_LOCKS}"
    assert await owner.fetchval(waiting) == 0
    assert (await audit.seal(database)).rows == 1


async def export(database: Database) -> None:
    assert [line async for line in audit.export(database)]


@pytest.mark.slow
@pytest.mark.parametrize("use", [audit.verify, export])
async def test_readers_do_not_wait_for_ever(
    database: Database,
    owner: Connection,
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[[Database], Awaitable[object]],
) -> None:
    # The usual patience is 10 s.
    impatient = partial(storage.open_connection, patience=timedelta(seconds=0.3))
    monkeypatch.setattr("tiger_db.audit.storage.open_connection", impatient)
    await log(database)
    transaction = owner.transaction()
    await transaction.start()
    await lock_events(owner)
    holder = f"waited for 0.3 s for a lock that process {owner.get_server_pid()} "
    with pytest.raises(DatabaseUnavailable, match=holder):
        await use(database)
    await transaction.rollback()
    await use(database)


@pytest.mark.slow
async def test_a_killed_sealer_leaves_no_waiting_backend(
    database: Database, owner: Connection
) -> None:
    await log(database)
    transaction = owner.transaction()
    await transaction.start()
    await lock_the_sealer(owner)
    key = database.settings.audit_signing_key
    assert key is not None
    secret = {"AUDIT_SIGNING_KEY": key.get_secret_value()}
    sealer = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tiger_db", "seal-audit", "--patience", "600",
        env=os.environ | environment_of(database.settings) | secret,
    )  # fmt: skip
    waiting = f"SELECT count(*) FROM {WAITING_LOCKS} AND locktype = 'advisory'"

    async def waits() -> bool:
        return bool(await owner.fetchval(waiting))

    async def is_gone() -> bool:
        return not await waits()

    await until(waits)
    sealer.kill()
    await sealer.wait()
    started = time.monotonic()
    await until(is_gone)
    assert time.monotonic() - started < 10
    await transaction.rollback()


@pytest.mark.slow
async def test_maintenance_names_who_holds_the_lock(
    database: Database, owner: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise, the test would wait for several attempts.
    monkeypatch.setattr("tiger_db.audit.retention._LOCK_ATTEMPTS", 1)
    monkeypatch.setattr("tiger_db.audit.retention._RETRY_PAUSE_SECONDS", 0)
    transaction = owner.transaction()
    await transaction.start()
    await lock_the_sealer(owner)
    with pytest.raises(DatabaseUnavailable, match=f"process {owner.get_server_pid()} "):
        await audit.maintain(database)
    await transaction.rollback()


# Signing keys


@pytest.fixture
def new_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def with_key(settings: Settings, key: Ed25519PrivateKey) -> Settings:
    text = b64encode(key.private_bytes_raw()).decode()
    return settings.model_copy(update={"audit_signing_key": SecretStr(text)})


async def head(database: Database) -> Seal:
    return audit.read_checkpoint(await audit.export_checkpoint(database))


@pytest.mark.slow
async def test_a_changed_signing_key_verifies_from_one_public_key(
    database: Database, with_folder: Settings, new_key: Ed25519PrivateKey, owner: Connection
) -> None:
    old = await audit.required_key(database)
    before = await head(database)
    assert await audit.change_signing_key(database, new_key) == 4
    with pytest.raises(ConfigurationError, match="set AUDIT_SIGNING_KEY to the new key"):
        await audit.seal(database)
    async with Database(with_key(with_folder, new_key)) as changed:
        await log(changed)
        assert (await audit.seal(changed)).rows == 2  # with the event of the change
        for keys in ([old.public_key()], [new_key.public_key()], []):
            for checkpoint in (before, await head(changed)):
                found = await audit.verify(changed, keys=keys, checkpoint=checkpoint)
                assert (found.findings, found.rows, found.seals) == ([], 11, 6)
        assert not (
            await audit.verify(changed, keys=[Ed25519PrivateKey.generate().public_key()])
        ).sound
        async with changed.session() as session:
            (event,) = await crud.audit_logs.search(
                session, action=AuditAction.SYSTEM_AUDIT_CHANGE_KEY
            )
    assert event.details == {
        "old": public_text(old.public_key()), "new": public_text(new_key.public_key()), "seal": 4,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["old", "new", "both"])
async def test_a_seal_by_a_key_that_is_not_in_force_is_forged(
    database: Database,
    with_folder: Settings,
    new_key: Ed25519PrivateKey,
    owner: Connection,
    keeps: str,
) -> None:
    """The old key has leaked after the change."""
    old = await audit.required_key(database)
    await audit.change_signing_key(database, new_key)
    ((_, last),) = await fetch_seals(owner, 4, 1)
    payload = replace(
        last.payload(), number=6, previous=last.payload_digest, key=public_text(old.public_key())
    )
    await insert_seal(owner, old, payload, b"")
    known = {"old": [old], "new": [new_key], "both": [old, new_key]}[keeps]
    found = await audit.verify(database, keys=[key.public_key() for key in known])
    assert [(one.kind, one.seal, one.message) for one in found.findings] == [
        (FindingKind.FORGED, 6, "seal 6: the seal is signed with a key that was not in force")
    ]
    async with Database(with_key(with_folder, new_key)) as changed:
        await assert_refuses(changed, owner, "seal 6: none of the given public keys has signed")


@pytest.mark.slow
async def test_a_key_is_not_introduced_by_a_seal_of_another_key(
    database: Database, forgetful: Database, owner: Connection, new_key: Ed25519PrivateKey
) -> None:
    ((_, last),) = await fetch_seals(owner, 2, 1)
    end, text = last.payload(), public_text(new_key.public_key())
    introduced = replace(
        end, number=4, previous=last.payload_digest, after=end.upto, positions=(), next_key=text,
        root="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    )  # fmt: skip
    await insert_seal(owner, new_key, introduced, b"")
    assert [one.seal for one in (await audit.verify(database)).findings] == [4]
    for one in (database, forgetful):
        await assert_refuses(one, owner, "seal 4: none of the given public keys has signed")


@pytest.mark.slow
async def test_concurrent_sealers_share_a_folder(database: Database, with_folder: Settings) -> None:
    async with Database(with_folder) as other:
        await log(database, 20)
        done = await asyncio.gather(*(audit.seal(one) for one in (database, other) * 3))
    assert sum(each.rows for each in done) == 20
    assert (await audit.verify(database)).sound

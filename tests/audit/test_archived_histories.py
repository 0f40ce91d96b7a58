"""Archives of trails whose signing key was changed, or whose retirements a restore has lost."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.support.archives import archive_settings, files_in, folder, put_old_months
from tests.support.independent_verifier import run
from tests.support.months import month
from tests.support.trail import exported, fetch_seals, log_seals, restore, without_triggers
from tiger_db import Database, Settings, audit
from tiger_db.audit import FindingKind, Seal
from tiger_db.audit.archive_files import is_leftover
from tiger_db.audit.storage import Connection
from tiger_db.errors import InvalidState
from tiger_db.signing import generate_signing_key, parse_signing_key, public_text

__all__ = ["folder"]  # fixtures
pytestmark = pytest.mark.slow


@pytest.fixture
async def database(
    clone_settings: Settings, folder: Path, tmp_path: Path
) -> AsyncIterator[Database]:
    (tmp_path / "checkpoints").mkdir()
    settings = archive_settings(clone_settings, str(folder))
    changed = {"audit_checkpoints": tmp_path / "checkpoints"}
    async with Database(settings.model_copy(update=changed)) as database:
        yield database


@pytest.fixture
async def owner(database: Database) -> AsyncIterator[Connection]:
    async with without_triggers(database.settings) as connection:
        yield connection


def with_key(database: Database, key: str, **changes: object) -> Database:
    changes["audit_signing_key"] = SecretStr(key)
    return Database(database.settings.model_copy(update=changes))


def own_key(database: Database) -> str:
    key = database.settings.audit_signing_key
    assert key is not None
    return key.get_secret_value()


async def assert_sound(database: Database, tmp_path: Path, *keys: str) -> None:
    """Verify the trail, and its export, from each of the signing keys."""
    lines = await exported(database, archive=True)
    first = parse_signing_key(keys[0]).public_key()
    assert run(lines, public_text(first), tmp_path).startswith("sound")
    for key in keys:
        public = parse_signing_key(key).public_key()
        found = await audit.verify(database, keys=[public], archive=True)
        assert (found.findings, found.archived) == ([], 6)
        found = await audit.verify_export(tmp_path / "trail.jsonl", keys=[public])
        assert found.findings == []


async def test_months_that_leave_before_and_after_a_change_of_the_key(
    database: Database, owner: Connection, tmp_path: Path
) -> None:
    await put_old_months(database, owner)
    old, new = own_key(database), generate_signing_key()
    async with with_key(database, old, audit_retention_months=13) as early:
        assert (await audit.maintain(early)).retired == [month(14)]
    await audit.change_signing_key(database, parse_signing_key(new))
    async with with_key(database, new) as later:
        assert (await audit.maintain(later)).retired == [month(13)]
        await audit.seal(later)
        await assert_sound(later, tmp_path, old, new)


async def lose_retirements(
    database: Database, owner: Connection, new_key: str | None
) -> list[Seal]:
    """Restore the state before two months were retired, and record the restore.

    Return the lost seals.
    """
    await put_old_months(database, owner)
    rows = [dict(row) for row in await owner.fetch("SELECT * FROM audit_logs")]
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    await log_seals(database, 1)
    if new_key is not None:
        await audit.change_signing_key(database, parse_signing_key(new_key))
    lost = [seal for _, seal in await fetch_seals(owner, 1, 9)]
    await restore(owner, 1, 6)
    await owner.copy_records_to_table(
        "audit_logs", records=[[*row.values()] for row in rows], columns=[*rows[0]]
    )
    await owner.execute("SELECT make_audit_months(0)")
    found = await audit.verify(database, archive=True)
    assert [one.kind for one in found.findings] == [FindingKind.TRUNCATED]
    assert await audit.record_restore(database) is not None
    await audit.seal(database)
    assert (await audit.verify(database, archive=True)).findings == []
    return lost


@pytest.mark.parametrize("changes_key", [False, True], ids=["one key", "a lost key"])
async def test_months_whose_retirements_were_lost_leave_again(
    database: Database, owner: Connection, folder: Path, tmp_path: Path, *, changes_key: bool
) -> None:
    await lose_retirements(database, owner, generate_signing_key() if changes_key else None)
    before = files_in(folder)
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    await audit.seal(database)
    await assert_sound(database, tmp_path, own_key(database))
    names = [name for name in files_in(folder) if not is_leftover(name)]
    assert len(names) == len(before) == 4


async def test_a_lost_retirement_that_is_inserted_again_excuses_nothing(
    database: Database, owner: Connection
) -> None:
    """The attacker kept the signed seals, and deletes an event of the restored month."""
    lost = await lose_retirements(database, owner, None)
    number = lost[0].payload().number
    await owner.execute(
        "INSERT INTO audit_seals (number, statement, signature, digests) VALUES ($1, $2, $3, $4)",
        number,
        lost[0].payload_json,
        lost[0].signature,
        lost[0].digests,
    )
    await owner.execute("DELETE FROM audit_logs WHERE position = 2")
    with pytest.raises(InvalidState, match="was replaced: nothing was sealed or removed"):
        await audit.maintain(database)
    found = await audit.verify(database, archive=True)
    assert (FindingKind.FORGED, lost[-1].payload().number + 1) in [
        (one.kind, one.seal) for one in found.findings
    ]

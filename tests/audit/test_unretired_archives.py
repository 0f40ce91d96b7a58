"""Months in the archive that are not retired, and whose files are honest, accuse nobody."""

import asyncio
from contextlib import nullcontext
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.support.archives import (
    archive_settings,
    database,
    events,
    folder,
    other,
    put_old_months,
    rewrite,
)
from tests.support.months import month, put
from tests.support.trail import restore
from tiger_db import Database, Settings, audit
from tiger_db.audit import FindingKind, archiving
from tiger_db.audit.archive_files import Archive
from tiger_db.audit.archive_verifying import _ArchiveVerifier
from tiger_db.audit.storage import Connection
from tiger_db.connections import connect
from tiger_db.errors import FileError
from tiger_db.signing import generate_signing_key, parse_signing_key

__all__ = ["database", "folder", "other"]  # fixtures
pytestmark = pytest.mark.slow


@pytest.fixture
async def archived(database: Database, other: Connection) -> Database:
    await put_old_months(database, other)
    await audit.archive(database, month(14))
    return database


async def assert_not_accused(database: Database, *warnings: str) -> None:
    found = await audit.verify(database, archive=True)
    assert found.findings == []
    messages = [one.message for one in found.warnings if one.kind is FindingKind.ARCHIVE]
    assert len(messages) == len(warnings), messages
    for message, warning in zip(messages, warnings, strict=True):
        assert warning in message


async def test_later_seals_do_not_accuse_an_archived_month(
    archived: Database, other: Connection
) -> None:
    new = generate_signing_key()
    await audit.change_signing_key(archived, parse_signing_key(new))
    key = {"audit_signing_key": SecretStr(new)}
    async with Database(archived.settings.model_copy(update=key)) as database:
        await put(other, 0, 1)
        await audit.seal(database)
        await assert_not_accused(database)
        for ago in (13, 14):
            await audit.archive(database, month(ago))
        await assert_not_accused(database)


async def test_months_whose_positions_are_mixed_are_not_accused(
    archived: Database, other: Connection
) -> None:
    """One of two months is retired, and has an event among those of the other month."""
    for ago in (14, 13):
        await put(other, ago, 1, minute=1)
    await audit.seal(archived)
    settings = archived.settings.model_copy(update={"audit_retention_months": 13})
    async with Database(settings) as database:
        assert (await audit.maintain(database)).retired == [month(14)]
        await audit.archive(database, month(13))
        await assert_not_accused(database)


async def test_a_write_that_was_interrupted_is_a_warning(
    archived: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`archive` writes other bytes than before, and is killed before each rename."""
    moves, move = 0, Archive.move

    def move_or_fail(archive: Archive, name: str, target: str) -> None:
        nonlocal moves
        moves += 1
        if moves > limit:
            raise FileError("killed")
        move(archive, name, target)

    # The kills of test_killed_archivers.py hit few of the lines between two renames.
    monkeypatch.setattr(Archive, "move", move_or_fail)
    for run, limit in enumerate((0, 1, 1, 1, 9)):
        moves = 0
        monkeypatch.setattr(archiving, "ROWS_PER_GROUP", 1 + run % 2)
        with pytest.raises(FileError, match="killed") if limit < 9 else nullcontext():
            await audit.archive(archived, month(14))
        # Before the first rename and after the last, the month is whole. After two renames, it has
        # no files.
        is_whole = run in (0, 2, 4)
        await assert_not_accused(archived, *([] if is_whole else ["was not written to its end"]))


async def test_a_month_that_is_archived_during_its_verification_is_not_accused(
    archived: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive has events that the first snapshot of the verification does not have."""
    loop, list_files = asyncio.get_running_loop(), _ArchiveVerifier.list_files
    minutes = iter((1, 2))

    async def archive_again() -> None:
        await put(other, 14, 1, minute=next(minutes))
        await audit.seal(archived)
        await audit.archive(archived, month(14))

    def archive_before(verifier: _ArchiveVerifier) -> None:
        asyncio.run_coroutine_threadsafe(archive_again(), loop).result()
        list_files(verifier)

    def archive_after(verifier: _ArchiveVerifier) -> None:
        list_files(verifier)
        asyncio.run_coroutine_threadsafe(archive_again(), loop).result()

    # The archive is written exactly between two steps of the verification.
    monkeypatch.setattr(_ArchiveVerifier, "list_files", archive_before)
    await assert_not_accused(archived)
    monkeypatch.setattr(_ArchiveVerifier, "list_files", archive_after)
    await assert_not_accused(archived, "was not written to its end")


async def test_a_month_that_was_retired_without_its_archive_is_not_accused(
    archived: Database, other: Connection, folder: Path
) -> None:
    """It was archived by hand, and then retired by a machine without AUDIT_ARCHIVE."""
    without = archived.settings.model_copy(update={"audit_archive": None})
    async with Database(without) as database:
        assert (await audit.maintain(database)).retired == [month(14), month(13)]
    await assert_not_accused(archived)
    await put(other, 14, 1, minute=1)
    await other.fetchval("SELECT make_audit_months(0)")
    await audit.seal(archived)
    await assert_not_accused(archived, "were written after it was archived")
    path = events(folder, 14)
    rewrite(path, lambda table: table.slice(0, 2))
    path.rename(path.with_name(f"events-{1:019}-{2:019}.parquet"))
    (finding,) = (await audit.verify(archived, archive=True)).findings
    assert finding.message.endswith(": the event at position 3 is missing")


async def test_a_recorded_restore_does_not_accuse_the_archive(
    clone_settings: Settings, folder: Path, tmp_path: Path
) -> None:
    """The archive has events and seals that a restore of the database has lost."""
    (tmp_path / "checkpoints").mkdir()
    settings = archive_settings(clone_settings, str(folder))
    settings = settings.model_copy(update={"audit_checkpoints": tmp_path / "checkpoints"})
    superuser = await connect(settings)
    await superuser.execute("SET session_replication_role = replica")
    async with Database(settings) as database:
        await put(superuser, 15)
        await superuser.fetchval("SELECT make_audit_months(0)")
        await audit.seal(database)
        await put_old_months(database, superuser)
        for ago in (15, 14):
            await audit.archive(database, month(ago))
        await restore(superuser, 1, 4)
        await audit.record_restore(database)
        await audit.seal(database)
        await assert_not_accused(
            database, "the seals differ", "the events differ", "the seals differ"
        )
        # Months from before the restore can be archived and retired.
        assert (await audit.maintain(database)).retired == [month(15), month(14), month(13)]
        found = await audit.verify(database, archive=True)
        assert (found.findings, found.archived) == ([], 4)
    await superuser.close()

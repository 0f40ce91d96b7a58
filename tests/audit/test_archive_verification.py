"""Verification of archive and database as one trail, and exports with the archived events."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.archives import (
    before,
    database,
    events,
    files_in,
    folder,
    full_disk,
    other,
    replace_column,
    rewrite,
)
from tests.support.independent_verifier import run
from tests.support.months import month, put
from tests.support.trail import events_of, exported
from tiger_db import Database, audit
from tiger_db.audit import FindingKind, archive_reading, archive_unretired
from tiger_db.audit.storage import Connection
from tiger_db.errors import FileError, InvalidState
from tiger_db.signing import public_text

__all__ = ["before", "database", "folder", "other"]  # fixtures


def change_content(folder: Path) -> list[str]:
    """One event is another one, and the file is a valid one of this trail."""

    def change(table: Any) -> Any:
        contents = table["content"].to_pylist()
        contents[1] = contents[1].replace("data:query", "data:qu3ry")
        return replace_column(table, "content", contents)

    rewrite(events(folder, 14), change)
    return [f"{events(folder, 14).relative_to(folder)}: the file was changed"]


def change_typed_column(folder: Path) -> list[str]:
    def change(table: Any) -> Any:
        return replace_column(table, "result", ["error"] * 3)

    rewrite(events(folder, 13), change)
    return [f"{events(folder, 13).relative_to(folder)}: the file was changed"]


def truncate(folder: Path) -> list[str]:
    path = events(folder, 14)
    path.write_bytes(path.read_bytes()[:-10])
    return [f"{path.relative_to(folder)}: the file was changed"]


def remove_events(folder: Path) -> list[str]:
    path = events(folder, 14)
    path.unlink()
    return [f"{path.relative_to(folder)}: the file is missing"]


def remove_seals(folder: Path) -> list[str]:
    (path,) = folder.glob(f"month={month(13)}/_seals-*")
    path.unlink()
    return [f"{path.relative_to(folder)}: the file is missing"]


def remove_all(folder: Path) -> list[str]:
    names = files_in(folder)
    for name in names:
        (folder / name).unlink()
    events_first = sorted(names, key=lambda name: (name.partition("/")[0], "_seals" in name))
    return [f"{name}: the file is missing" for name in events_first]


def swap(folder: Path) -> list[str]:
    one, two = events(folder, 14), events(folder, 13)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    names = [path.relative_to(folder) for path in (one, two)]
    return [f"{a}: the file has the content of {b}" for a, b in (names, names[::-1])]


def add_copy(folder: Path) -> list[str]:
    """Engines would read each event of the copy twice."""
    path = events(folder, 14)
    copy = path.with_name(f"events-{2:019}-{3:019}.parquet")
    shutil.copy(path, copy)
    return [f"{copy.relative_to(folder)}: no retirement has signed the file"]


def add_forged(folder: Path) -> list[str]:
    """Events that never were, at positions that the database still has."""
    path = events(folder, 14)
    forged = path.with_name(f"events-{7:019}-{9:019}.parquet")
    shutil.copy(path, forged)

    def change(table: Any) -> Any:
        return replace_column(table, "position", [7, 8, 9])

    rewrite(forged, change)
    name = forged.relative_to(folder)
    return [f"{name}: the events differ from the seals"]


def add_foreign(folder: Path) -> list[str]:
    path = events(folder, 14)

    def change(table: Any) -> Any:
        return table.replace_schema_metadata({"tiger_db.origin": "0" * 32})

    shutil.copy(path, folder / "kept")
    rewrite(path, change)
    foreign = path.with_name(f"events-{8:019}-{9:019}.parquet")
    path.rename(foreign)
    (folder / "kept").rename(path)
    return [f"{foreign.relative_to(folder)}: the file belongs to another audit trail"]


def replace_by_foreign(folder: Path) -> list[str]:
    add_foreign(folder)
    (foreign,) = folder.glob(f"month={month(14)}/events-*8-*")
    foreign.rename(events_path := folder / files_in(folder)[1])
    return [f"{events_path.relative_to(folder)}: the file belongs to another audit trail"]


def add_other_files(folder: Path) -> list[str]:
    (folder / "notes.txt").write_text("not a finding")
    shutil.copy(events(folder, 14), folder / "copy.parquet")
    (folder / "month=2020-01").mkdir()
    (folder / "month=2020-01" / "events-1.parquet").write_text("no Parquet")
    return [
        "copy.parquet: the file does not belong to the archive",
        "month=2020-01/events-1.parquet: the name is not that of an archived file",
    ]


CHANGES = [
    change_content, change_typed_column, truncate, remove_events, remove_seals, remove_all, swap,
    add_copy, add_forged, add_foreign, replace_by_foreign, add_other_files,
]  # fmt: skip


@pytest.mark.slow
async def test_each_change_of_the_archive_is_found_and_named(
    database: Database, before: list[str], folder: Path, tmp_path: Path
) -> None:
    assert (await audit.verify(database, archive=True)).findings == []
    intact = tmp_path / "intact"
    shutil.copytree(folder, intact)
    for change in CHANGES:
        expected = change(folder)
        found = await audit.verify(database, archive=True)
        messages = [one.message for one in found.findings]
        assert sorted(messages) == sorted(expected), change.__name__
        assert {one.kind for one in found.findings} == {FindingKind.ARCHIVE}
        assert (await audit.verify(database)).findings == []  # the database alone is intact
        shutil.rmtree(folder)
        shutil.copytree(intact, folder)
    assert (await audit.verify(database, archive=True)).archived == 6


@pytest.mark.slow
async def test_the_progress_counts_each_event_of_the_archive(
    database: Database, before: list[str], other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(other, 2)
    await other.fetchval("SELECT make_audit_months(0)")
    await audit.seal(database)
    await audit.archive(database, month(2))
    # Otherwise, only 10,000 events would have an intermediate report.
    monkeypatch.setattr(archive_unretired, "_EVENTS_PER_REPORT", 1)
    told: list[tuple[int, int | None]] = []
    await audit.verify(database, archive=True, progress=lambda *each: told.append(each))
    assert told[-10:] == [*((done, 9) for done in range(1, 10)), (9, 9)]


@pytest.mark.slow
async def test_a_full_folder_of_temporary_files_accuses_nobody(
    database: Database, before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_disk(), pytest.raises(FileError, match=r"^a temporary file .* too large: make"):
        await audit.verify(database, archive=True)
    # `tempfile` reads TMPDIR only once in a process.
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    with pytest.raises(FileError, match=r"^a temporary file .*: No such file .* set TMPDIR"):
        await exported(database, archive=True)


@pytest.mark.slow
async def test_a_retired_event_that_reappears_is_found_beside_the_archive(
    database: Database, before: list[str], other: Connection
) -> None:
    await other.execute(
        "INSERT INTO audit_logs (id, action, result, severity, position)"
        " VALUES (uuid7_floor(now()), 'data:query', 'success', 'low', 2)"
    )
    found = await audit.verify(database, archive=True)
    assert [(one.kind, one.position) for one in found.findings] == [(FindingKind.INSERTED, 2)]
    assert found.archived == 6


async def test_an_export_with_the_archive_is_the_whole_trail(
    database: Database, before: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise, so few events would be one batch.
    monkeypatch.setattr(archive_reading, "_BATCH_EVENTS", 4)
    lines = await exported(database, archive=True)
    assert lines[: len(before)] == before
    assert list(events_of(lines)) == [*range(1, len(events_of(lines)) + 1)]
    path = tmp_path / "trail.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    key = (await audit.required_key(database)).public_key()
    found = await audit.verify_export(path, keys=[key])
    assert (found.findings, found.retired, found.unsealed) == ([], 6, 0)
    assert found.rows == len(events_of(lines))
    said = run(lines, public_text(key), tmp_path)
    assert said.startswith("sound: 4 seals, "), said
    changed = [line.replace("data:query", "data:qu3ry") for line in lines]
    path.write_text("".join(changed), encoding="utf-8")
    found = await audit.verify_export(path, keys=[key])
    first, *_ = found.findings
    assert (first.kind, first.position) == (FindingKind.CHANGED, 1)
    assert run(changed, public_text(key), tmp_path).startswith("refused: ")


@pytest.mark.slow
async def test_filters_apply_to_archived_events_too(
    database: Database, before: list[str], other: Connection
) -> None:
    for filters, positions in (
        ({"action": "data:query"}, [1, 2, 3, 4, 5, 6]),
        ({"action": ["data", "system"]}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"action": "system"}, [7, 8]),
        ({"user_id": "nobody"}, []),
        ({"details": {"seal": 2}}, [7]),
    ):
        lines = await exported(database, archive=True, **filters)
        assert [*events_of(lines)] == positions, filters
    lines = await exported(database, archive=True, form="csv", action="data")
    assert [line.partition(",")[0] for line in lines] == ["position", *"123456"]


@pytest.mark.slow
async def test_an_export_never_has_events_of_a_changed_file(
    database: Database, before: list[str], folder: Path
) -> None:
    change_content(folder)
    with pytest.raises(InvalidState, match=r"events-0.* differs from the file that seal 2 signed"):
        await exported(database, archive=True)
    remove_events(folder)
    with pytest.raises(
        FileError, match=r"the archive: month=.*/events-0.*\.parquet does not exist"
    ):
        await exported(database, archive=True)


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["x", '{"retired": "2020-01"}'], ids=["no JSON", "no seal"])
async def test_an_export_with_an_unreadable_seal_says_what_to_run(
    database: Database, before: list[str], other: Connection, statement: str
) -> None:
    await other.execute(
        "INSERT INTO audit_seals (number, statement, signature, digests) VALUES (99, $1, '', '')",
        statement,
    )
    message = r"a seal cannot be read: .* verify-audit --archive"
    for filters in ({}, {"action": "data"}):
        with pytest.raises(InvalidState, match=message):
            await exported(database, archive=True, **filters)

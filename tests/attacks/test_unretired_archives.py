"""Files of months that `archive-audit` wrote and no retirement has signed, changed by an attacker.

The attacker has the archive, but neither the database nor the signing key.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.archives import (
    database,
    events,
    folder,
    other,
    put_old_months,
    replace_column,
    rewrite,
    seals,
)
from tests.support.months import month, put
from tiger_db import Database, audit
from tiger_db.audit import FindingKind, storage
from tiger_db.audit.storage import Connection
from tiger_db.errors import FileError

__all__ = ["database", "folder", "other"]  # fixtures
pytestmark = pytest.mark.slow
ONE, TWO = 14, 13  # Months ago. They have the events at the positions 1 to 3 and 4 to 6.


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def renamed(path: Path, first: int, last: int) -> Path:
    kind = path.name.partition("-")[0]
    return path.rename(path.with_name(f"{kind}-{first:019}-{last:019}.parquet"))


def keep_rows(path: Path, *numbers: int) -> None:
    import pyarrow as pa  # noqa: PLC0415  # an extra

    rewrite(path, lambda table: table.take(pa.array(numbers, pa.int64())))


def change_typed_column(folder: Path) -> dict[Path, str]:
    """A query finds no error, and the sealed content is unchanged."""
    rewrite(events(folder, ONE), lambda t: replace_column(t, "result", ["success", "error", None]))
    return {events(folder, ONE): "the columns of the event at position 2 differ from `content`"}


def change_time(folder: Path) -> dict[Path, str]:
    def change(table: Any) -> Any:
        at = table.schema.get_field_index("created_at")
        return table.set_column(at, table.schema.field(at), table["created_at"].take([1, 1, 2]))

    rewrite(events(folder, TWO), change)
    return {events(folder, TWO): "the columns of the event at position 4 differ from `content`"}


def set_time_of_no_year(folder: Path) -> dict[Path, str]:
    """Python has no such time."""
    import pyarrow as pa  # noqa: PLC0415  # an extra

    def change(table: Any) -> Any:
        at = table.schema.get_field_index("created_at")
        field = table.schema.field(at)
        return table.set_column(at, field, pa.array([2**62] * 3, pa.int64()).cast(field.type))

    rewrite(events(folder, ONE), change)
    return {events(folder, ONE): "the file is not a valid Parquet file"}


def change_event(folder: Path) -> dict[Path, str]:
    def change(table: Any) -> Any:
        rows = [row["content"].replace("data:query", "data:qu3ry") for row in table.to_pylist()]
        table = replace_column(table, "action", ["data:qu3ry"] * 3)
        return replace_column(table, "content", rows)

    rewrite(events(folder, ONE), change)
    return {events(folder, ONE): "the events differ from the seals"}


def drop_row(folder: Path) -> dict[Path, str]:
    keep_rows(events(folder, ONE), 0, 2)
    return {events(folder, ONE): "the event at position 2 is missing"}


def drop_first_row(folder: Path) -> dict[Path, str]:
    keep_rows(events(folder, ONE), 1, 2)
    renamed(events(folder, ONE), 2, 3)
    renamed(seals(folder, ONE), 2, 3)
    return {seals(folder, ONE): "the event at position 1 is missing"}


def drop_last_rows(folder: Path) -> dict[Path, str]:
    keep_rows(events(folder, TWO), 0)
    renamed(events(folder, TWO), 4, 4)
    renamed(seals(folder, TWO), 4, 4)
    return {seals(folder, TWO): "2 events are missing, the first at position 5"}


def repeat_row(folder: Path) -> dict[Path, str]:
    keep_rows(events(folder, ONE), 0, 1, 1, 2)
    return {events(folder, ONE): "the events differ from the seals"}


def reorder_rows(folder: Path) -> dict[Path, str]:
    keep_rows(events(folder, ONE), 1, 0, 2)
    return {events(folder, ONE): "the name does not match the positions of the events"}


def rename(folder: Path) -> dict[Path, str]:
    return {
        renamed(events(folder, ONE), 1, 9): "the name does not match the positions of the events"
    }


def copy_in_the_month(folder: Path) -> dict[Path, str]:
    path = events(folder, ONE)
    copy = path.with_name(f"events-{0:019}-{9:019}.parquet")
    shutil.copy(path, copy)
    return {copy: "the name does not match the positions of the events"}


def copy_part(folder: Path) -> dict[Path, str]:
    path = events(folder, ONE)
    copy = path.with_name(f"events-{2:019}-{3:019}.parquet")
    shutil.copy(path, copy)
    keep_rows(copy, 1, 2)
    return {copy: "another file has the same events"}


def copy_to_another_month(folder: Path) -> dict[Path, str]:
    copy = Path(shutil.copy(events(folder, ONE), events(folder, TWO).parent))
    return {copy: "the event at position 1 is not one of the month"}


def copy_to_a_new_month(folder: Path) -> dict[Path, str]:
    """No event of this month was ever written."""
    target = folder / "month=2001-01"
    shutil.copytree(events(folder, ONE).parent, target)
    return {
        target / events(folder, ONE).name: "the event at position 1 is not one of the month",
    }


def copy_to_no_month(folder: Path) -> dict[Path, str]:
    target = folder / "month=2001-13"
    target.mkdir()
    return {Path(shutil.copy(events(folder, ONE), target)): "the folder is not that of a month"}


def swap(folder: Path) -> dict[Path, str]:
    one, two = events(folder, ONE), events(folder, TWO)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    return {
        one: "the event at position 4 is not one of the month",
        two: "the event at position 1 is not one of the month",
    }


def remove_events(folder: Path) -> dict[Path, str]:
    events(folder, ONE).unlink()
    return {seals(folder, ONE): "3 events are missing, the first at position 1"}


def add_column(folder: Path) -> dict[Path, str]:
    rewrite(events(folder, ONE), lambda table: table.append_column("Result", table["result"]))
    return {events(folder, ONE): "the file does not have the columns of an archived file"}


def remove_column(folder: Path) -> dict[Path, str]:
    rewrite(events(folder, ONE), lambda table: table.drop_columns(["error_code"]))
    return {events(folder, ONE): "the file does not have the columns of an archived file"}


def remove_all_rows(folder: Path) -> dict[Path, str]:
    keep_rows(events(folder, ONE))
    return {events(folder, ONE): "the file has no events"}


def cut(folder: Path) -> dict[Path, str]:
    path = events(folder, TWO)
    path.write_bytes(path.read_bytes()[:-9])
    return {path: "the file is not a valid Parquet file"}


def change_seals(folder: Path) -> dict[Path, str]:
    rewrite(seals(folder, ONE), lambda t: replace_column(t, "signature", [b"0" * 64]))
    return {seals(folder, ONE): "the seals differ from those in the database"}


def remove_digests(folder: Path) -> dict[Path, str]:
    rewrite(seals(folder, TWO), lambda t: replace_column(t, "digests", [b""]))
    return {seals(folder, TWO): "the seals differ from those in the database"}


def repeat_seals(folder: Path) -> dict[Path, str]:
    keep_rows(seals(folder, TWO), 0, 0)
    return {seals(folder, TWO): "the seals differ from those in the database"}


def remove_all_seals(folder: Path) -> dict[Path, str]:
    keep_rows(seals(folder, TWO))
    return {seals(folder, TWO): "the seals differ from those in the database"}


def add_foreign_seals(folder: Path) -> dict[Path, str]:
    path = seals(folder, ONE)
    rewrite(path, lambda t: t.replace_schema_metadata({"tiger_db.origin": "0" * 32}))
    return {path: "the file belongs to another audit trail"}


def copy_seals(folder: Path) -> dict[Path, str]:
    path = seals(folder, ONE)
    copy = path.with_name(f"_seals-{2:019}-{3:019}.parquet")
    shutil.copy(path, copy)
    return {copy: "the archive does not have the events of the seals"}


def add_other_files(folder: Path) -> dict[Path, str]:
    """Pandas and Spark read a file of any name. Names with a dot are of file systems."""
    path = events(folder, ONE).with_name("events.json")
    path.write_text("{}")
    path.with_name(".nfs0001").write_text("")
    (folder / "lost+found").mkdir()
    (folder / "lost+found" / "notes.txt").write_text("")
    other = path.with_name("more.parquet")
    shutil.copy(events(folder, ONE), other)
    return {
        path: "the file does not belong to the archive",
        other: "the name is not that of an archived file",
    }


CHANGES: list[Callable[[Path], dict[Path, str]]] = [
    change_typed_column, change_time, set_time_of_no_year, change_event, drop_row,
    drop_first_row, drop_last_rows, repeat_row, reorder_rows, rename, copy_in_the_month,
    copy_part, copy_to_another_month, copy_to_a_new_month, copy_to_no_month, swap,
    remove_events, add_column, remove_column, remove_all_rows, cut, change_seals,
    remove_digests, repeat_seals, remove_all_seals, add_foreign_seals, copy_seals,
    add_other_files,
]  # fmt: skip


@pytest.fixture
async def archived(database: Database, other: Connection) -> Database:
    await put_old_months(database, other)
    for ago in (ONE, TWO):
        await audit.archive(database, month(ago))
    return database


async def test_each_change_of_an_unretired_month_is_found_and_named(
    archived: Database, folder: Path, tmp_path: Path
) -> None:
    found = await audit.verify(archived, archive=True)
    assert (found.findings, found.warnings) == ([], [])
    assert found.basis[-1].endswith("6 events that are not retired yet")
    shutil.copytree(folder, tmp_path / "intact")
    for change in CHANGES:
        expected = {name_of(path): text for path, text in change(folder).items()}
        found = await audit.verify(archived, archive=True)
        messages = {f.message.partition(": ")[0]: f.message for f in found.findings}
        assert len(messages) == len(found.findings), (change.__name__, found.findings)
        for name, text in expected.items():
            assert messages.pop(name, None) == f"{name}: {text}", (change.__name__, found.findings)
        # The seals of a month without valid events can be named, too.
        assert all("/_seals-" in name for name in messages), (change.__name__, messages)
        assert {one.kind for one in found.findings} == {FindingKind.ARCHIVE}
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "intact", folder)
    assert (await audit.verify(archived, archive=True)).sound


async def test_a_file_whose_name_is_no_text_is_named(archived: Database, folder: Path) -> None:
    (events(folder, ONE).parent / os.fsdecode(b"x\xff.parquet")).touch()
    with pytest.raises(FileError, match=r"the archive: .*: a file has the name .*x\\xff\.parquet"):
        await audit.verify(archived, archive=True)


async def test_an_archive_from_before_the_last_seals_of_the_month_is_found(
    database: Database, other: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its files match, but the events that are missing were sealed before the month ended."""
    times = [f"{month(ONE)}-02T00:00:00.000000Z", f"{month(ONE)}-03T00:00:00.000000Z"]

    async def database_time(_: Connection) -> str:
        return times[0]

    await put(other, ONE)
    await other.fetchval("SELECT make_audit_months(0)")
    with monkeypatch.context() as patch:
        # A seal of a past month cannot be made otherwise.
        patch.setattr(storage, "database_time", database_time)
        await audit.seal(database)
        await audit.archive(database, month(ONE))
        times.pop(0)
        await put(other, ONE, 2, minute=1)
        await audit.seal(database)
    found = await audit.verify(database, archive=True)
    assert [one.message for one in found.findings] == [
        f"{name_of(seals(folder, ONE))}: 2 events are missing, the first at position 4"
    ]
    await audit.archive(database, month(ONE))
    assert (await audit.verify(database, archive=True)).sound


async def test_a_seal_that_is_no_json_does_not_end_the_verification(
    archived: Database, other: Connection
) -> None:
    """The attacker has the database, too."""
    await other.execute(
        "INSERT INTO audit_seals (number, statement, signature, digests) VALUES (2, 'x', '', '')"
    )
    found = await audit.verify(archived, archive=True)
    assert [(one.kind, one.seal) for one in found.findings] == [(FindingKind.FORGED, 2)]
    assert found.basis[-1] == "archive: not verified, because a seal cannot be read"

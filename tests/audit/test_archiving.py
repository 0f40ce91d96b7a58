"""Months that leave PostgreSQL as Parquet files in a folder."""

import gc
import json
import os
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from random import Random
from uuid import UUID

import duckdb
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support import factories
from tests.support.archives import (
    database,
    files_in,
    folder,
    full_disk,
    other,
    put_old_months,
    retire_two_months,
)
from tests.support.months import month, partition, put
from tests.support.trail import FIELDS, exported, fetch_seals, insert_seal, stored_events
from tiger_db import Database, audit, crud, errors
from tiger_db.audit import archive_files, archiving
from tiger_db.audit.event_content import CONTENT_COLUMNS
from tiger_db.audit.seal_format import MerkleTree, digest_of
from tiger_db.audit.storage import Connection

__all__ = ["database", "folder", "other"]  # fixtures


def names(month: str, first: int, last: int) -> list[str]:
    span = f"{first:019}-{last:019}.parquet"
    return [f"month={month}/_seals-{span}", f"month={month}/events-{span}"]


async def partitions(connection: Connection) -> set[str]:
    rows = await connection.fetch(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'audit_logs'::regclass"
    )
    return {name for (name,) in rows}


async def test_a_month_is_archived_before_it_is_retired(
    database: Database, other: Connection, folder: Path
) -> None:
    told: list[tuple[int, int | None]] = []
    await put_old_months(database, other)
    done = await audit.maintain(database, progress=lambda *each: told.append(each))
    assert done.retired == [month(14), month(13)]
    # Each event is written, read back, and compared with the seals again before it leaves.
    assert told == [(at, 9) for at in (3, 6, 9)] * 2
    assert files_in(folder) == names(month(14), 1, 3) + names(month(13), 4, 6)
    assert not {partition(14), partition(13)} & await partitions(other)
    ((_, seal),) = await fetch_seals(other, 1, 1)
    payload = seal.payload()
    assert (payload.version, payload.retired) == (4, month(14))
    assert sorted((name, rows) for name, rows, _ in payload.archive or ()) == [
        *zip(names(month(14), 1, 3), (1, 3), strict=True)
    ]
    await audit.seal(database)
    found = await audit.verify(database, archive=True)
    assert (found.findings, found.retired, found.archived) == ([], 6, 6)
    assert found.basis[-1] == f"archive: {folder}: 4 signed files, 6 retired events"


async def test_the_files_have_each_event_byte_for_byte_and_in_typed_columns(
    database: Database, other: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet  # noqa: PLC0415  # an extra

    # Otherwise, only a million events would fill several files and row groups.
    monkeypatch.setattr(archiving, "ROWS_PER_GROUP", 4)
    monkeypatch.setattr(archiving, "ROWS_PER_FILE", 8)
    # With trailing zeros, the texts of this time in Python and in PostgreSQL would differ.
    when = (datetime.now(UTC) - timedelta(days=430)).replace(microsecond=123_456)
    chance = Random(7)
    events = []
    for number in range(20):
        value = {name: make(chance) for name, make in FIELDS.items()} if number % 5 else {}
        identity = UUID(int=(int(when.timestamp() * 1000) << 80) + (7 << 76) + (2 << 62) + number)
        events.append(factories.new_event(id=identity, **value))
    async with database.session() as session:
        await crud.audit_logs.log_events(session, events)
    await other.execute("SET session_replication_role = replica")
    await other.execute(
        "UPDATE audit_logs SET created_at = $1,"
        ' details = CASE position WHEN 2 THEN \'{"n": 1.10, "x": "\\u001f"}\' ELSE details END',
        when,
    )
    await other.fetchval("SELECT make_audit_months(0)")
    await audit.seal(database)
    await other.execute("SET TimeZone = 'UTC'")
    stored = await stored_events(other)
    assert len((await audit.maintain(database)).retired) == 1
    tables = [parquet.ParquetFile(folder / name) for name in files_in(folder) if "/events-" in name]
    assert [table.metadata.num_rows for table in tables] == [8, 8, 4]
    assert [table.num_row_groups for table in tables] == [2, 2, 1]
    rows = [row for table in tables for row in table.read().to_pylist()]
    assert [(row["position"], row["content"]) for row in rows] == stored
    assert '"details":{"n": 1.10, "x": "\\u001f"}' in rows[1]["content"]
    for row in rows:
        content = json.loads(row["content"])
        for name in CONTENT_COLUMNS:
            value = row[name]
            if name == "created_at":
                value = value.isoformat().removesuffix("+00:00") + "Z"
            elif name in ("details", "old_values", "new_values", "tags") and value is not None:
                value = json.loads(value)
            assert value == content.get(name), name
    group = tables[0].metadata.row_group(0)
    columns = {group.column(at).path_in_schema: group.column(at) for at in range(26)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert columns["position"].statistics.max == 4
    assert columns["created_at"].statistics.min == when
    filtered = duckdb.execute(
        "SELECT DISTINCT path_in_schema FROM parquet_metadata(?)"
        " WHERE bloom_filter_offset IS NOT NULL ORDER BY 1",
        [str(folder / next(name for name in files_in(folder) if "/events-" in name))],
    )
    assert filtered.fetchall() == [("api_key_id",), ("tiger_account_id",)]
    assert [column.column_index for column in group.sorting_columns] == [0]


@pytest.mark.slow
async def test_a_month_can_be_archived_by_hand_and_grow_afterwards(
    database: Database, other: Connection, folder: Path
) -> None:
    await put_old_months(database, other)
    first = await audit.archive(database, month(14))
    assert first is not None
    assert (first.month, first.events) == (month(14), 3)
    assert await audit.archive(database, month(14)) == first
    assert await audit.archive(database, month(20)) is None
    found = await audit.verify(database, archive=True)
    assert (found.findings, found.rows, found.archived) == ([], 6, 0)
    assert found.basis[-1].endswith("3 events that are not retired yet")
    await put(other, 14, 1, minute=1)
    with pytest.raises(errors.InvalidState, match="events that are not sealed"):
        await audit.archive(database, month(14))
    await audit.seal(database)
    found = await audit.verify(database, archive=True)
    assert found.findings == []
    (warning,) = [one for one in found.warnings if one.kind is audit.FindingKind.ARCHIVE]
    assert warning.message == (
        f"month={month(14)}: events of the month were written after it was archived: run"
        f" `tiger-db archive-audit --month {month(14)}`"
    )
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    replaced = [name for name in files_in(folder) if "/.replaced-" in name]
    assert len(replaced) == 2
    assert [name for name in files_in(folder) if "/.replaced-" not in name] == (
        names(month(14), 1, 7) + names(month(13), 4, 6)
    )
    found = await audit.verify(database, archive=True)
    assert (found.findings, found.archived) == ([], 7)
    assert replaced[0] in found.basis[-1]


@pytest.mark.slow
async def test_only_seals_of_the_verified_chain_are_archived(
    database: Database, other: Connection, folder: Path
) -> None:
    await put_old_months(database, other)
    for minute in range(2):  # the last two seals are always verified, and the first one is not
        await put(other, 0, 1, minute=minute)
        await audit.seal(database)
    ((_, seal),) = await fetch_seals(other, 0, 1)
    await other.execute("UPDATE audit_logs SET user_id = 'mallory' WHERE position = 2")
    leaves = [(at, digest_of(content)) for at, content in await stored_events(other, 1, 6)]
    await other.execute("DELETE FROM audit_seals WHERE number = 1")
    payload = replace(seal.payload(), root=MerkleTree(leaves).root)
    digests = b"".join(digest for _, digest in leaves)
    await insert_seal(other, Ed25519PrivateKey.generate(), payload, digests)
    with pytest.raises(errors.InvalidState, match="seal 1 or seal 2 was replaced"):
        await audit.archive(database, month(14))
    assert files_in(folder) == []

    await other.execute("UPDATE audit_logs SET user_id = NULL WHERE position = 2")
    await other.execute("DELETE FROM audit_seals WHERE number = 1")
    await insert_seal(other, Ed25519PrivateKey.generate(), seal.payload(), seal.digests)
    with pytest.raises(errors.InvalidState, match="the signature of seal 1 is not valid"):
        await audit.archive(database, month(14))
    assert files_in(folder) == []

    await other.execute("UPDATE audit_seals SET signature = $1 WHERE number = 1", seal.signature)
    assert await audit.archive(database, month(14)) is not None
    unsigned = database.settings.model_copy(update={"audit_signing_key": None})
    async with Database(unsigned) as without:
        with pytest.raises(errors.ConfigurationError, match="AUDIT_SIGNING_KEY is not set"):
            await audit.archive(without, month(14))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("2026-13", "form YYYY-MM"),
        ("26-1", "form YYYY-MM"),
        ("0000-01", "form YYYY-MM"),
        (month(0), "has not ended"),
        (month(-1), "has not ended"),
    ],
)
async def test_only_a_month_that_has_ended_is_archived(
    database: Database, given: str, message: str
) -> None:
    with pytest.raises(errors.InvalidValue, match=message):
        await audit.archive(database, given)


async def test_events_in_the_default_partition_are_not_left_out(
    database: Database, other: Connection
) -> None:
    await put(other, 14)
    await audit.seal(database)
    assert await audit.archive(database, month(15)) is None
    assert await audit.archive(database, month(13)) is None
    with pytest.raises(errors.InvalidState, match=r"no partition: run `tiger-db maintain-audit`"):
        await audit.archive(database, month(14))
    await other.fetchval("SELECT make_audit_months(0)")
    archived = await audit.archive(database, month(14))
    assert archived is not None
    assert archived.events == 3


@pytest.mark.slow
async def test_retirements_without_an_archive_stay_valid(
    database: Database, other: Connection
) -> None:
    await put(other, 15)
    await put_old_months(database, other)
    months = database.settings.model_copy(
        update={"audit_archive": None, "audit_retention_months": 14}
    )
    async with Database(months) as without:
        assert (await audit.maintain(without)).retired == [month(15)]
        with pytest.raises(errors.ConfigurationError, match="AUDIT_ARCHIVE is not set"):
            await audit.verify(without, archive=True)
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    found = await audit.verify(database, archive=True)
    assert (found.findings, found.retired, found.archived) == ([], 9, 6)
    seals = [seal.payload() for _, seal in await fetch_seals(other, 0, 9)]
    assert [payload.version for payload in seals] == [2, 2, 4, 4]


@pytest.mark.slow
async def test_an_event_of_a_month_that_left_leaves_again(
    database: Database, other: Connection, folder: Path
) -> None:
    """A machine with a wrong clock writes an event, whose month is made and retired again."""
    await retire_two_months(database, other)
    await put(other, 14, 1, minute=1)
    await audit.seal(database)
    assert (await audit.maintain(database)).retired == [month(14)]
    assert len([name for name in files_in(folder) if f"month={month(14)}/events" in name]) == 2
    found = await audit.verify(database, archive=True)
    assert (found.findings, found.archived) == ([], 7)


# Failures


@pytest.mark.slow
async def test_a_writer_whose_file_has_ended_takes_no_memory(
    database: Database, other: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer keeps the metadata of all row groups, which is more than a megabyte in a file."""
    from pyarrow import parquet  # noqa: PLC0415  # an extra

    await put_old_months(database, other)
    monkeypatch.setattr(archiving, "ROWS_PER_GROUP", 1)
    monkeypatch.setattr(archiving, "ROWS_PER_FILE", 1)
    finish = archiving._MonthWriter.finish
    writers: list[int] = []

    def count_writers(writer: archiving._MonthWriter) -> object:
        writers.append(sum(isinstance(one, parquet.ParquetWriter) for one in gc.get_objects()))
        return finish(writer)

    monkeypatch.setattr(archiving._MonthWriter, "finish", count_writers)
    await audit.archive(database, month(14))
    assert len(files_in(folder)) == 4
    assert writers == [1]  # of the file of seals


@pytest.mark.slow
async def test_on_a_full_disk_no_month_leaves(
    database: Database, other: Connection, folder: Path
) -> None:
    await put_old_months(database, other)
    with full_disk(), pytest.raises(errors.FileError, match="File too large"):
        await audit.maintain(database)
    assert files_in(folder) == []
    assert {partition(14), partition(13)} <= await partitions(other)
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    assert (await audit.verify(database, archive=True)).archived == 6


@pytest.mark.slow
async def test_a_file_that_was_not_stored_as_written_is_not_accepted(
    database: Database, other: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is changed before it is read back, and after it was renamed."""
    await put_old_months(database, other)
    check, move = archiving._Part.check, archive_files.Archive.move

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def changed_check(part: archiving._Part, *arguments: object) -> None:
        change(folder / part.file.unfinished)
        check(part, *arguments)  # type: ignore[arg-type]

    def changed_move(archive: archive_files.Archive, name: str, target: str) -> None:
        move(archive, name, target)
        change(folder / target)

    for owner, name, replacement in (
        (archiving._Part, "check", changed_check),
        (archive_files.Archive, "move", changed_move),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replacement)
            with pytest.raises(errors.FileError, match="is not the one that was written"):
                await audit.maintain(database)
    assert {partition(14), partition(13)} <= await partitions(other)
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    assert (await audit.verify(database, archive=True)).findings == []


@pytest.mark.slow
async def test_an_event_written_after_the_archive_keeps_its_month(
    database: Database, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_old_months(database, other)
    finish = archiving._MonthWriter.finish
    late: list[object] = []

    def finish_late(writer: archiving._MonthWriter) -> object:
        late.append(writer)
        return finish(writer)

    # The event is committed exactly between the archive and the retirement of its month.
    monkeypatch.setattr(archiving._MonthWriter, "finish", finish_late)
    retire = sys.modules["tiger_db.audit.retention"]._retire

    async def retire_late(*arguments: object, **keywords: object) -> object:
        if len(late) == 1:
            await put(other, 14, 1, minute=1)
            await audit.seal(database)
            late.append(None)
        return await retire(*arguments, **keywords)

    monkeypatch.setattr("tiger_db.audit.retention._retire", retire_late)
    done = await audit.maintain(database)
    assert done.kept == {
        month(14): "events were added to the month while it was archived: try again"
    }
    assert partition(14) in await partitions(other)
    assert done.retired == [month(13)]
    assert (await audit.verify(database, archive=True)).archived == 3
    assert (await audit.maintain(database)).retired == [month(14)]
    assert (await audit.verify(database, archive=True)).archived == 7


@pytest.mark.slow
async def test_one_session_at_a_time_archives(database: Database, other: Connection) -> None:
    await put_old_months(database, other)
    async with archiving.archive_lock(other):
        with pytest.raises(errors.DatabaseUnavailable, match="another session is archiving"):
            await audit.archive(database, month(14))
        assert await audit.maintain(database) == audit.Maintenance(made=0)
    assert (await audit.maintain(database)).retired == [month(14), month(13)]


@pytest.mark.slow
async def test_no_session_replaces_files_before_their_retirement(
    database: Database, other: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retirement signs the files, which a second session would write with other seals."""
    await put_old_months(database, other)
    retire = sys.modules["tiger_db.audit.retention"]._retire
    refused, minutes = list[str](), count()

    async def retire_late(*arguments: object, **keywords: object) -> object:
        await put(other, 0, 1, minute=next(minutes))
        await audit.seal(database)
        try:
            await audit.archive(database, month(14))
        except errors.DatabaseUnavailable as error:
            refused.append(str(error))
        return await retire(*arguments, **keywords)

    monkeypatch.setattr("tiger_db.audit.retention._retire", retire_late)
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    assert (await audit.verify(database, archive=True)).findings == []
    assert refused == ["another session is archiving or removing months: try again later"] * 2
    assert len(files_in(folder)) == 4


@pytest.mark.slow
async def test_a_machine_without_the_setting_removes_no_month(
    database: Database, other: Connection, tmp_path: Path
) -> None:
    await retire_two_months(database, other)
    await put(other, 15)
    await other.fetchval("SELECT make_audit_months(0)")
    await audit.seal(database)
    forgotten = database.settings.model_copy(update={"audit_archive": None})
    async with Database(forgotten) as without:
        assert (await audit.maintain(without)).kept == {
            month(15): "earlier months are in an archive: set AUDIT_ARCHIVE"
        }
        found = await audit.verify(without)
        assert (found.findings, found.retired) == ([], 6)
        assert found.basis[-1] == "archive: 6 events not verified, see --archive"
    key = await database.signing_key()
    assert key is not None
    for archive, basis in (
        (False, "archive: 6 events are not in the export, see export-events --archive"),
        (True, "checkpoint given: none"),
    ):
        lines = await exported(database, archive=archive)
        (tmp_path / "trail.jsonl").write_text("".join(lines))
        found = await audit.verify_export(tmp_path / "trail.jsonl", keys=[key.public_key()])
        assert (found.findings, found.basis[-1]) == ([], basis)
    assert (await audit.maintain(database)).retired == [month(15)]
    assert (await audit.verify(database, archive=True)).archived == 9


@pytest.mark.slow
async def test_files_of_somebody_else_are_left_alone(
    database: Database, other: Connection, folder: Path
) -> None:
    import pyarrow as pa  # noqa: PLC0415  # an extra
    from pyarrow import parquet  # noqa: PLC0415

    await put_old_months(database, other)
    part = folder / f"month={month(14)}" / "part-0.parquet"
    part.parent.mkdir()
    parquet.write_table(pa.table({"a": [1]}), part)
    same = folder / names(month(14), 1, 3)[1]
    parquet.write_table(pa.table({"a": [1]}), same)
    before = files_in(folder)
    with pytest.raises(errors.InvalidState, match=r"000003\.parquet is no file of tiger_db: move"):
        await audit.maintain(database)
    assert files_in(folder) == before
    same.unlink()
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    (finding,) = (await audit.verify(database, archive=True)).findings
    name = part.relative_to(folder)
    assert finding.message == f"{name}: the name is not that of an archived file"


@pytest.mark.slow
async def test_an_archive_of_another_trail_is_refused(
    database: Database, other: Connection, folder: Path
) -> None:
    await put_old_months(database, other)
    await audit.archive(database, month(14))
    before = files_in(folder)
    # All seals are replaced by those of a new trail, as in a new database.
    await other.execute("SET session_replication_role = replica")
    await other.execute("DELETE FROM audit_seals")
    await audit.seal(database)
    with pytest.raises(errors.InvalidState, match="belongs to another audit trail: use one"):
        await audit.maintain(database)
    assert files_in(folder) == before
    found = await audit.verify(database, archive=True)
    assert [one.message.partition(": ")[2] for one in found.findings] == (
        ["the file belongs to another audit trail"] * 2
    )


async def test_a_missing_folder_or_library_is_named(
    database: Database,
    other: Connection,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await put_old_months(database, other)
    os.rename(folder, folder.with_name("elsewhere"))  # noqa: PTH104  # not asynchronous
    with pytest.raises(errors.FileError, match="does not exist: create the folder"):
        await audit.maintain(database)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(errors.ConfigurationError, match="with the extra `archive`"):
        await audit.maintain(database)
    assert partition(14) in await partitions(other)

"""Files that an attacker with the archive, but without the signing key, adds to it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.archives import before, database, events, folder, other, rewrite
from tiger_db import Database, audit
from tiger_db.audit import FindingKind

__all__ = ["before", "database", "folder", "other"]  # fixtures
pytestmark = pytest.mark.slow


async def test_a_copy_that_engines_read(
    database: Database, before: list[str], folder: Path
) -> None:
    """Engines read all files of a folder, whatever their names end with."""
    source = events(folder, 14)
    for copy in (source.parent / "extra", source.parent / "x.PARQUET", folder / "extra.parq"):
        shutil.copy(source, copy)
        report = await audit.verify(database, archive=True)
        assert [(f.kind, f.message) for f in report.findings] == [
            (
                FindingKind.ARCHIVE,
                f"{copy.relative_to(folder)}: the file does not belong to the archive",
            )
        ]
        copy.unlink()
    assert (await audit.verify(database, archive=True)).sound


async def test_a_folder_in_a_month_and_a_link_to_the_archive_are_named_once(
    database: Database, before: list[str], folder: Path
) -> None:
    """Engines read the files of deeper folders, too, and follow links."""
    loop, copies = events(folder, 14).parent / "loop", events(folder, 13).parent / "copies"
    loop.symlink_to(folder)
    (folder / "again").symlink_to(loop.parent)
    (folder / ".hidden").symlink_to(folder)
    shutil.copytree(loop.parent, copies, symlinks=True)
    shutil.copytree(copies, folder / "deep" / "deeper", symlinks=True)
    found = await audit.verify(database, archive=True)
    message = "the {} does not belong to the archive".format
    deeper = folder / "deep" / "deeper"
    folders = [folder / "again", copies, loop, deeper / "loop"]
    assert sorted(one.message for one in found.findings) == sorted(
        [
            *(f"{path.relative_to(folder)}: {message('folder')}" for path in folders),
            *(
                f"{path.relative_to(folder)}: {message('file')}"
                for path in deeper.glob("*.parquet")
            ),
        ]
    )
    assert len(found.findings) == 6


async def test_the_folder_of_a_month_can_be_a_link(
    database: Database, before: list[str], folder: Path, tmp_path: Path
) -> None:
    """The oldest months are on another disk."""
    path = events(folder, 14).parent
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    found = await audit.verify(database, archive=True)
    assert (found.findings, found.archived) == ([], 6)


async def test_a_file_with_other_types_does_not_end_the_verification(
    database: Database, before: list[str], folder: Path
) -> None:
    import pyarrow as pa  # noqa: PLC0415  # an extra

    path = events(folder, 14)
    added = path.with_name(f"events-{7:019}-{7:019}.parquet")
    for position, content in (("1", "x"), (None, "x"), (7, 5), ({"a": 1}, "x")):

        def change(table: Any, position: object = position, content: object = content) -> Any:
            table = table.slice(0, 1)
            for name, value in (("position", position), ("content", content)):
                at = table.schema.get_field_index(name)
                table = table.set_column(at, name, pa.array([value]))
            return table

        shutil.copy(path, added)
        rewrite(added, change)
        (finding,) = (await audit.verify(database, archive=True)).findings
        assert "of the file has another type" in finding.message


async def test_links_that_lead_nowhere_are_named(
    database: Database, before: list[str], folder: Path
) -> None:
    """Engines that follow links fail at a link to itself."""
    path = events(folder, 14)
    path.unlink()
    links = [folder / "loop", folder / "month=2020-01", path.parent / "gone.parquet", path]
    for link in links:
        link.symlink_to(link)
    links[2].unlink()
    links[2].symlink_to("missing")
    found = await audit.verify(database, archive=True)
    assert sorted(one.message for one in found.findings) == sorted(
        [
            f"{path.relative_to(folder)}: the file is missing",
            *(f"{link.relative_to(folder)}: the link leads to no file" for link in links),
        ]
    )
    assert found.archived == 3

"""Partitions whose names an owner of the database has exchanged, so that months leave as others."""

from pathlib import Path

import pytest

from tests.support.archives import database, files_in, folder, other, put_old_months
from tests.support.months import month, partition
from tiger_db import Database, audit
from tiger_db.audit.storage import Connection
from tiger_db.errors import InvalidState, SchemaMismatch

DOCS = Path(__file__).parents[2] / "docs" / "audit-trail.md"
__all__ = ["database", "folder", "other"]  # fixtures
pytestmark = pytest.mark.slow


async def test_the_events_of_another_month_are_neither_archived_nor_retired(
    database: Database, other: Connection, folder: Path
) -> None:
    await put_old_months(database, other)
    one, two = partition(14), partition(13)
    await other.execute(
        f"ALTER TABLE {one} RENAME TO kept; ALTER TABLE {two} RENAME TO {one};"
        f"ALTER TABLE kept RENAME TO {two}"
    )
    reason = "the partition {} holds events of another month, because"
    with pytest.raises(InvalidState, match=reason.format(one)):
        await audit.archive(database, month(14))
    done = await audit.maintain(database)
    assert done.retired == []
    assert [*done.kept] == [month(14), month(13)]
    for name, why in zip((one, two), done.kept.values(), strict=True):
        assert why.startswith(reason.format(name))
    assert files_in(folder) == []
    assert (await audit.verify(database)).rows == 6


async def test_a_partition_with_the_name_of_no_month_stays(
    database: Database, other: Connection
) -> None:
    await put_old_months(database, other)
    for name in ("audit_logs_2020_13", "audit_logs_0000_01", "audit_logs_2020_00"):
        await other.execute(f"ALTER TABLE {partition(14)} RENAME TO {name}")
        assert (await audit.maintain(database)).retired in ([month(13)], [])
        await other.execute(f"ALTER TABLE {name} RENAME TO {partition(14)}")
    assert (await audit.maintain(database)).retired == [month(14)]


async def test_a_recent_partition_with_an_old_name_is_named(
    database: Database, other: Connection
) -> None:
    await other.execute(f"ALTER TABLE {partition(0)} RENAME TO audit_logs_2001_01")
    problem = f'"{partition(0)}" would overlap partition "audit_logs_2001_01": rename it$'
    with pytest.raises(SchemaMismatch, match=problem):
        await audit.maintain(database)


def remedy() -> str:
    """Return the SQL of docs/audit-trail.md."""
    _, _, section = DOCS.read_text("utf-8").partition("### Partitions with events of another month")
    return "BEGIN" + section.partition("BEGIN")[2].partition("COMMIT")[0] + "COMMIT"


@pytest.mark.parametrize("how", ["exchanged", "attached"])
async def test_the_documented_steps_give_the_events_their_months(
    database: Database, other: Connection, how: str
) -> None:
    await put_old_months(database, other)
    one, two = partition(14), partition(13)
    if how == "exchanged":
        await other.execute(
            f"ALTER TABLE {one} RENAME TO kept; ALTER TABLE {two} RENAME TO {one};"
            f"ALTER TABLE kept RENAME TO {two}"
        )
    else:  # a partition of two months
        await other.execute(
            f"CREATE TABLE kept (LIKE audit_logs INCLUDING ALL);"
            f"INSERT INTO kept SELECT * FROM audit_logs; DROP TABLE {one}, {two};"
            f"ALTER TABLE kept RENAME TO {one};"
            f"ALTER TABLE audit_logs ATTACH PARTITION {one} FOR VALUES FROM"
            f" (uuid7_floor('{month(14)}-01Z')) TO (uuid7_floor('{month(12)}-01Z'))"
        )
    named = [*(await audit.maintain(database)).kept]
    assert named == [month(14), month(13)][: 2 if how == "exchanged" else 1]
    await other.execute("SET session_replication_role = origin")
    for name in named:
        statements = remedy().replace("2025_01", name.replace("-", "_"))
        assert statements.count(name.replace("-", "_")) == 3
        await other.execute(statements)
    assert (await audit.verify(database)).findings == []
    done = await audit.maintain(database)
    assert (done.made, done.retired, done.kept) == (2, [month(14), month(13)], {})
    found = await audit.verify(database, archive=True)
    assert (found.findings, found.archived) == ([], 6)

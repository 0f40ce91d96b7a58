"""Partitions whose names an owner of the database has exchanged, so that months leave as others."""

from pathlib import Path

import pytest

from tests.support.archives import database, files_in, folder, other, put_old_months
from tests.support.months import month, partition
from tiger_db import Database, audit
from tiger_db.audit.storage import Connection
from tiger_db.errors import InvalidState, SchemaMismatch

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
    reason = f"the partition {one} holds events of another month"
    with pytest.raises(InvalidState, match=reason):
        await audit.archive(database, month(14))
    assert (await audit.maintain(database)).kept == {month(14): reason}
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

"""Archives of old months in a folder, as fixtures, and changes of their files."""

import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tests.support.months import month, put
from tests.support.trail import exported
from tiger_db import Database, Settings, audit
from tiger_db.audit.storage import Connection
from tiger_db.connections import connect
from tiger_db.signing import generate_signing_key

KEPT = 12  # months


def archive_settings(settings: Settings, location: str) -> Settings:
    """Return settings with a signing key and an archive, in which months leave after a year."""
    return settings.model_copy(
        update={
            "audit_signing_key": SecretStr(generate_signing_key()),
            "audit_retention_months": KEPT,
            "audit_archive": location,
        }
    )


async def put_old_months(database: Database, connection: Connection) -> None:
    """Write and seal three events each in two months that are old enough to leave."""
    for ago in (14, 13):
        await put(connection, ago)
    await connection.fetchval("SELECT make_audit_months(0)")
    await audit.seal(database)


def files_in(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


async def retire_two_months(database: Database, connection: Connection) -> None:
    await put_old_months(database, connection)
    await audit.maintain(database)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "archive").mkdir()
    return tmp_path / "archive"


@pytest.fixture
async def database(clone_settings: Settings, folder: Path) -> AsyncIterator[Database]:
    async with Database(archive_settings(clone_settings, str(folder))) as database:
        yield database


@pytest.fixture
async def other(database: Database) -> AsyncIterator[Connection]:
    """A connection of a superuser, for which triggers are disabled."""
    connection = await connect(database.settings)
    await connection.execute("SET session_replication_role = replica")
    yield connection
    await connection.close()


@pytest.fixture
async def before(database: Database, other: Connection) -> list[str]:
    """The export before the months of the positions 1 to 3 and 4 to 6 leave."""
    await put_old_months(database, other)
    lines = await exported(database)
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    await audit.seal(database)
    return lines


@contextmanager
def full_disk() -> Iterator[None]:
    """Refuse to write more than 10 bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def events(folder: Path, ago: int) -> Path:
    (path,) = folder.glob(f"month={month(ago)}/events-*")
    return path


def seals(folder: Path, ago: int) -> Path:
    (path,) = folder.glob(f"month={month(ago)}/_seals-*")
    return path


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Replace the table in a file."""
    from pyarrow import parquet  # noqa: PLC0415  # an extra

    parquet.write_table(change(parquet.ParquetFile(path).read()), path)


def replace_column(table: Any, name: str, values: list[Any]) -> Any:
    import pyarrow as pa  # noqa: PLC0415

    at = table.schema.get_field_index(name)
    return table.set_column(
        at, table.schema.field(at), pa.array(values, table.schema.field(at).type)
    )

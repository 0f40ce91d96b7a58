"""Archives of old months, and the object store that they are written to."""

from pathlib import Path

from pydantic import SecretStr

from tests.support.months import put
from tiger_db import Database, Settings, audit
from tiger_db.audit.storage import Connection
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

"""What several attackers have."""

from collections.abc import AsyncIterator

import pytest

from tiger_db import Settings
from tiger_db.audit.storage import Connection
from tiger_db.connections import connect


@pytest.fixture
async def owner(clone_settings: Settings) -> AsyncIterator[Connection]:
    """A connection of the database's owner, for which triggers are disabled."""
    connection = await connect(clone_settings)
    await connection.execute("SET session_replication_role = replica")
    yield connection
    await connection.close()

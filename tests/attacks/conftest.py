"""What several attackers have."""

from collections.abc import AsyncIterator

import pytest

from tests.support.trail import without_triggers
from tiger_db import Settings
from tiger_db.audit.storage import Connection


@pytest.fixture
async def owner(clone_settings: Settings) -> AsyncIterator[Connection]:
    """A connection of the database's owner, for which triggers are disabled."""
    async with without_triggers(clone_settings) as connection:
        yield connection

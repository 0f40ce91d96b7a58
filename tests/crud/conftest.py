from collections.abc import AsyncIterator

import pytest

from tiger_db import Database, Settings


@pytest.fixture
async def crowd(clone_settings: Settings) -> AsyncIterator[Database]:
    """A database of one test, with 21 connections and a long pool timeout."""
    pool = {"db_pool_size": 21, "db_max_overflow": 0, "db_pool_timeout": 60}
    async with Database(clone_settings.model_copy(update=pool)) as database:
        await database.check()
        yield database

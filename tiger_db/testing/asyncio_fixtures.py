"""Fixtures of the plugin in the event loops of pytest-asyncio: one of each kind for each scope."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import pytest_asyncio

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession, Database
    from tiger_db.settings import Settings
    from tiger_db.testing.databases import PooledDatabase

_Scope = Literal["function", "class", "module", "package", "session"]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _tiger_kept() -> AsyncIterator[list["PooledDatabase"]]:
    """Databases with open connections for all tests in the event loop of the session."""
    kept: list[PooledDatabase] = []
    yield kept
    for pooled in kept:
        if pooled.kept is not None:
            await pooled.kept[0].close()


@pytest_asyncio.fixture(loop_scope="session")
async def _tiger_database_session(
    tiger_settings: "Settings",
    _tiger_pooled: "PooledDatabase",
    _tiger_kept: list["PooledDatabase"],
) -> AsyncIterator["Database"]:
    from tiger_db.database import Database  # noqa: PLC0415

    if tiger_settings is not _tiger_pooled.settings:  # a fixture of the user has changed them
        async with Database(tiger_settings) as database:
            yield database
        return
    if _tiger_pooled.kept is None:
        _tiger_pooled.keep(Database(tiger_settings))
        _tiger_kept.append(_tiger_pooled)
    assert _tiger_pooled.kept is not None
    yield _tiger_pooled.kept[0]


def _database_fixture(scope: _Scope) -> Any:  # noqa: ANN401  # pytest's type is private
    @pytest_asyncio.fixture(loop_scope=scope, name=f"_tiger_database_{scope}")
    async def database(tiger_settings: "Settings") -> AsyncIterator["Database"]:
        from tiger_db.database import Database  # noqa: PLC0415

        async with Database(tiger_settings) as database:
            yield database

    return database


def _session_fixture(scope: _Scope) -> Any:  # noqa: ANN401  # pytest's type is private
    @pytest_asyncio.fixture(loop_scope=scope, name=f"_tiger_session_{scope}")
    async def session(tiger_database: "Database") -> AsyncIterator["AsyncSession"]:
        from tiger_db.testing.databases import rolled_back_session  # noqa: PLC0415

        async with rolled_back_session(tiger_database) as session:
            yield session

    return session


for _scope in get_args(_Scope):
    if _scope != "session":  # its databases are kept
        globals()[f"_tiger_database_{_scope}"] = _database_fixture(_scope)
    globals()[f"_tiger_session_{_scope}"] = _session_fixture(_scope)

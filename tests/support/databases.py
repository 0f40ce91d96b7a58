"""Databases for tests: copied from a migrated template, emptied after each test and used again."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import uuid4

from sqlalchemy import QueuePool
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.support import servers
from tiger_db import Database, Settings
from tiger_db.connections import connect, maintenance_engine
from tiger_db.migrations import upgrade

# Triggers and foreign keys are off. Tables and partitions without a page are left out, because
# PostgreSQL would plan a delete for each of them.
_EMPTY = """
DO $$
DECLARE
    filled regclass;
BEGIN
    SET LOCAL session_replication_role = replica;
    FOR filled IN SELECT oid FROM pg_class WHERE relnamespace = current_schema()::regnamespace
        AND relkind = 'r' AND relname <> 'tiger_db_alembic_version' AND pg_relation_size(oid) > 0
    LOOP
        EXECUTE format('DELETE FROM %s', filled);
    END LOOP;
    PERFORM setval(seqrelid, seqstart, false) FROM pg_sequence;
END $$
"""
_MAY_EMPTY = "SELECT has_parameter_privilege('session_replication_role', 'SET')"
# A row of a catalog that was written since has another xmin. Rows of pg_class are written by
# TRUNCATE, too: of those, what a change of the schema changes is compared. PostgreSQL's own
# columns, functions and types, which have numbers below 16384, are left out, because they are many.
_CATALOGS = (
    "pg_attrdef", "pg_attribute WHERE attrelid >= 16384", "pg_constraint", "pg_default_acl",
    "pg_enum", "pg_event_trigger", "pg_extension", "pg_index", "pg_namespace", "pg_policy",
    "pg_proc WHERE oid >= 16384", "pg_rewrite", "pg_sequence", "pg_trigger",
    "pg_type WHERE oid >= 16384",
)  # fmt: skip
_WRITTEN = "(SELECT concat(count(*), '/', sum(xmin::text::bigint)) FROM {})"
_FINGERPRINT = f"""
SELECT concat_ws(' ', {", ".join(map(_WRITTEN.format, _CATALOGS))},
    (SELECT sum(hashtextextended(concat_ws(' ', oid, relname, relnamespace, relkind, relowner,
        relacl, reloptions, relrowsecurity, relforcerowsecurity, relhasrules, relreplident), 0))
        FROM pg_class WHERE oid >= 16384 AND relpersistence = 'p'),
    (SELECT string_agg(concat_ws(' ', setrole, setconfig), ';') FROM pg_db_role_setting
        WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())),
    (SELECT string_agg(version_num, ',') FROM tiger_db_alembic_version))
"""
_OTHERS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend'
"""


async def create(server_url: str, name: str, template: str | None = None) -> Settings:
    """Create a database; copied as files, which is the fastest where no disk is waited for."""
    copied = f' TEMPLATE "{template}" STRATEGY FILE_COPY' if template else ""
    await _on_server(server_url, f'CREATE DATABASE "{name}"{copied}')
    return servers.settings_for(server_url, name)


async def drop(server_url: str, name: str) -> None:
    """Drop a database, whoever is connected to it."""
    await _on_server(server_url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


async def _on_server(server_url: str, statement: str) -> None:
    connection = await connect(servers.settings_for(server_url, "postgres"))
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@asynccontextmanager
async def migrated(server_url: str) -> AsyncIterator[str]:
    """The name of a migrated database that nobody is connected to."""
    name = f"tiger_db_template_{uuid4().hex[:12]}"
    settings = await create(server_url, name)
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)
    yield name
    await drop(server_url, name)


class DatabasePool:
    """Migrated databases that are empty and idle, with the `Database` of each."""

    def __init__(self, server_url: str, template: str) -> None:
        self._server_url, self._template = server_url, template
        self._idle: dict[bool, list[Database]] = {True: [], False: []}  # by `connected`
        self._fingerprint, self._may_empty = "", False

    @asynccontextmanager
    async def database(self, *, connected: bool, schema_changes: bool) -> AsyncIterator[Database]:
        """An empty database for one test.

        `connected`: its `Database` may have connections already. `schema_changes`: the database is
        dropped afterwards.
        """
        idle = self._idle[connected]
        database = idle.pop() if idle and not schema_changes else await self._make()
        if not connected:
            await database.close()
        reusable = False
        try:
            yield database
            if not schema_changes:
                reusable = await self._empty(database)
        finally:
            if reusable:
                idle.append(database)
            else:
                await self._drop(database)

    async def close(self) -> None:
        for database in self._idle[True] + self._idle[False]:
            await self._drop(database)

    async def _make(self) -> Database:
        name = f"tiger_db_test_{uuid4().hex[:12]}"
        database = Database(await create(self._server_url, name, self._template))
        if not self._fingerprint:
            async with database.engine.connect() as connection:
                self._fingerprint = await _scalar(connection, _FINGERPRINT)
                self._may_empty = await _scalar(connection, _MAY_EMPTY)
        return database

    async def _drop(self, database: Database) -> None:
        await database.close()
        await drop(self._server_url, database.settings.database)

    async def _empty(self, database: Database) -> bool:
        """Empty a database for the next test.

        Return False if a session of the test is left, or if the role may not turn triggers off.

        Raises:
            AssertionError: the test changed the schema.
        """
        await database.usage_counter.close()
        await database.out_of_band.close()
        pool = database.engine.pool
        assert isinstance(pool, QueuePool)
        if pool.checkedout():
            return False
        async with AsyncExitStack() as stack:
            connections = [
                await stack.enter_async_context(database.engine.connect())
                for _ in range(max(1, pool.checkedin()))
            ]
            for connection in connections:
                raw = await connection.get_raw_connection()
                assert raw.driver_connection is not None
                await raw.driver_connection.reset()
            connection = connections[0]
            if await _scalar(connection, _OTHERS) != len(connections):
                return False
            assert await _scalar(connection, _FINGERPRINT) == self._fingerprint, (
                "this test changes the schema: mark it with @pytest.mark.schema_changes"
            )
            if self._may_empty:
                await connection.exec_driver_sql(_EMPTY)
                await connection.commit()
        return self._may_empty


async def _scalar(connection: AsyncConnection, query: str) -> Any:
    return (await connection.exec_driver_sql(query)).scalar_one()

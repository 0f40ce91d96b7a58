"""Databases for tests: copies of a migrated template, which are emptied after each test."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias, cast
from uuid import uuid4

import asyncpg
from anyio.from_thread import BlockingPortal
from sqlalchemy import QueuePool

from tiger_db.connections import connect, maintenance_engine
from tiger_db.crud.common import context_of
from tiger_db.database import AsyncSession, Database
from tiger_db.errors import DatabaseUnavailable
from tiger_db.migrations import upgrade
from tiger_db.models.secrets import CONTEXT
from tiger_db.settings import Settings, quote_identifier
from tiger_db.testing.servers import settings_for

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
_END_SECONDS = 5  # maximum wait until the connections that a test has left are ended
# Tables of users and of tiger_db, in all schemas, but no temporary tables.
_TABLES = """
pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace AND c.relkind = 'r'
    AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
"""
# Triggers and foreign keys are off. Tables and partitions without a page are left out, because
# PostgreSQL would plan a delete for each of them. So are the tables that have rows in the template.
_EMPTY = f"""
DO $$
DECLARE
    filled regclass;
BEGIN
    SET LOCAL session_replication_role = replica;
    FOR filled IN SELECT c.oid FROM {_TABLES}
        WHERE pg_relation_size(c.oid) > 0 AND c.oid <> ALL ('%(seeded)s'::oid[])
    LOOP
        EXECUTE format('DELETE FROM %%s', filled);
    END LOOP;
    PERFORM setval(seqrelid, coalesce(last, seqstart), last IS NOT NULL)
        FROM pg_sequence LEFT JOIN (VALUES %(sequences)s) AS s (id, last) ON id = seqrelid;
END $$
"""  # noqa: S608  # the names of tables are those of PostgreSQL
_MAY_EMPTY = "SELECT has_parameter_privilege('session_replication_role', 'SET')"
# A row that was written since has another xmin. Rows of pg_class are written by TRUNCATE, too: of
# those, what a change of the schema changes is compared. PostgreSQL's own columns, functions and
# types, which have numbers below 16384, are left out, because they are many.
_CATALOGS = (
    "pg_attrdef", "pg_attribute WHERE attrelid >= 16384", "pg_constraint", "pg_default_acl",
    "pg_enum", "pg_event_trigger", "pg_extension", "pg_index", "pg_namespace", "pg_policy",
    "pg_proc WHERE oid >= 16384", "pg_rewrite", "pg_sequence", "pg_trigger",
    "pg_type WHERE oid >= 16384",
)  # fmt: skip
_WRITTEN = "(SELECT concat(count(*), '/', sum(xmin::text::bigint)) FROM {})"
_SCHEMA = """
    (SELECT sum(hashtextextended(concat_ws(' ', oid, relname, relnamespace, relkind, relowner,
        relacl, reloptions, relrowsecurity, relforcerowsecurity, relhasrules, relreplident), 0))
        FROM pg_class WHERE oid >= 16384 AND relpersistence = 'p')::text,
    (SELECT string_agg(concat_ws(' ', setrole, setconfig), ';') FROM pg_db_role_setting
        WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database()))
"""
_END_OTHERS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> ALL ($1::int[])
"""


async def create(server_url: str, name: str, template: str | None = None) -> None:
    """Create a database; copied as files, which is the fastest where no disk is waited for."""
    copied = (
        f" TEMPLATE {quote_identifier(template)} STRATEGY FILE_COPY" if template is not None else ""
    )
    await on_server(server_url, f"CREATE DATABASE {quote_identifier(name)}{copied}")


async def drop(server_url: str, name: str) -> None:
    """Drop a database, and end all connections to it."""
    await on_server(server_url, f"DROP DATABASE IF EXISTS {quote_identifier(name)} WITH (FORCE)")


async def on_server(server_url: str, statement: str, *arguments: object) -> None:
    """Execute a statement in the database that the URL names."""
    connection = await connect(settings_for(server_url))
    try:
        await connection.execute(statement, *arguments)
    finally:
        await connection.close()


async def create_migrated(server_url: str, values: Mapping[str, object]) -> Settings:
    """Create a database with the schema of tiger_db, and return its settings."""
    name = f"tiger_db_template_{uuid4().hex[:12]}"
    settings = settings_for(server_url, name, **values)
    await create(server_url, name)
    try:
        async with maintenance_engine(settings) as engine:
            await upgrade(engine)
    except BaseException:
        await drop(server_url, name)
        raise
    return settings


@asynccontextmanager
async def rolled_back_session(database: Database) -> AsyncIterator[AsyncSession]:
    """Open a session whose changes are undone at the end of the block, also after commits.

    Events and usage counts that tiger_db writes outside of the session's transaction are written in
    the transaction, because other transactions do not see its rows.
    """
    async with database.engine.connect() as connection:
        transaction = await connection.begin()
        context = context_of(database.info)._replace(out_of_band=None, count_use=None)
        async with database.sessions(
            bind=connection, join_transaction_mode="create_savepoint", info={CONTEXT: context}
        ) as session:
            yield session
        await transaction.rollback()


@dataclass(eq=False, slots=True)
class PooledDatabase:
    """A database of the pool, with the connections that stay open between tests.

    `kept` is the open `Database` of an event loop that outlives the test. `connection` belongs to
    the background event loop. A new connection would cost more than the work that it does.
    """

    settings: Settings
    kept: tuple[Database, asyncio.AbstractEventLoop] | None = None
    connection: "asyncpg.Connection[asyncpg.Record] | None" = None

    @property
    def is_connected(self) -> bool:
        return self.kept is not None or self.connection is not None

    def keep(self, database: Database) -> None:
        """Leave a `Database` open for the next tests in the running event loop."""
        self.kept = database, asyncio.get_running_loop()


class DatabasePool:
    """Empty databases, which are copies of a template.

    The methods are synchronous, so that they also serve tests without an event loop. They run their
    statements in the background event loop of `portal`, or in that of the kept `Database`.
    """

    def __init__(
        self, portal: BlockingPortal, server_url: str, template: str, values: Mapping[str, object]
    ) -> None:
        self._portal, self._server_url = portal, server_url
        self._template, self._values = template, values
        self._idle: list[PooledDatabase] = []
        self._empty, self._fingerprint, self._unchanged = "", "", ""

    def take(self, *, connected: bool) -> PooledDatabase:
        """Return an empty database. If `connected` is false, the database has no connections."""
        # Databases with open connections come first.
        for database in sorted(self._idle, key=lambda found: not found.is_connected):
            if connected or not database.is_connected:
                self._idle.remove(database)
                return database
        return self._portal.call(self._create)

    def give_back(self, database: PooledDatabase, *, connected: bool = False) -> None:
        """End the connections that a test has left, and empty the database.

        If `connected` is true, a connection stays open, which makes the next call faster.

        A database whose schema was changed is dropped. So is a database that the role may not
        empty, because it may not turn off triggers.
        """
        reusable = False
        try:
            if database.kept is not None:
                kept, loop = database.kept
                reusable = loop.run_until_complete(self._reset_kept(kept))
                if not reusable:
                    loop.run_until_complete(kept.close())
                    database.kept = None
            elif self._empty:
                reusable = self._portal.call(self._reset, database, connected)
        finally:
            if reusable:
                self._idle.append(database)
            else:
                self._portal.call(self._drop, database)

    def close(self) -> None:
        """Drop all databases of the pool. Each kept `Database` must be closed."""
        for database in self._idle:
            self._portal.call(self._drop, database)

    async def _drop(self, database: PooledDatabase) -> None:
        if database.connection is not None:
            await database.connection.close()
        await drop(self._server_url, database.settings.database)

    async def _create(self) -> PooledDatabase:
        name = f"tiger_db_test_{uuid4().hex[:12]}"
        if not self._unchanged:
            # A fixture of the user can have left connections to the template.
            await on_server(
                self._server_url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1",
                self._template,
            )
        settings = settings_for(self._server_url, name, **self._values)
        await create(self._server_url, name, self._template)
        if not self._unchanged:
            connection = await connect(settings)
            try:
                await self._inspect(connection)
            finally:
                await connection.close()
        return PooledDatabase(settings)

    async def _inspect(self, connection: Connection) -> None:
        """Remember the content of the template, which all copies have in common."""
        tables = await connection.fetch(
            f"SELECT c.oid, c.oid::regclass::text AS name FROM {_TABLES}"  # noqa: S608  # constant
            " WHERE pg_relation_size(c.oid) > 0"
        )
        seeded = [
            table
            for table in tables
            if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {table['name']})")  # noqa: S608  # regclass quotes
        ]
        used = await connection.fetch(
            "SELECT seqrelid, pg_sequence_last_value(seqrelid) AS last FROM pg_sequence"
            " WHERE pg_sequence_last_value(seqrelid) IS NOT NULL"
        )
        values = ", ".join(f"({row['seqrelid']}::oid, {row['last']}::bigint)" for row in used)
        if await connection.fetchval(_MAY_EMPTY):
            self._empty = _EMPTY % {
                "seeded": "{" + ",".join(str(table["oid"]) for table in seeded) + "}",
                "sequences": values or "(NULL::oid, NULL::bigint)",
            }
        written = [_WRITTEN.format(rows) for rows in (*_CATALOGS, *(t["name"] for t in seeded))]
        self._fingerprint = f"SELECT concat_ws(' ', {', '.join(written)}, {_SCHEMA})"
        self._unchanged = await connection.fetchval(self._fingerprint)

    async def _reset_kept(self, database: Database) -> bool:
        await database.usage_counter.close()
        await database.out_of_band.close()
        pool = cast("QueuePool", database.engine.pool)
        if pool.checkedout() or not self._empty:
            return False
        opened = [await database.engine.connect() for _ in range(max(1, pool.checkedin()))]
        try:
            raw = [await connection.get_raw_connection() for connection in opened]
            connections = [cast("Connection", found.driver_connection) for found in raw]
            for connection in connections:
                await connection.reset()
            return await self._reset_database(connections)
        finally:
            for connection in opened:
                await connection.close()

    async def _reset(self, database: PooledDatabase, connected: bool) -> bool:  # noqa: FBT001  # passed by position only
        if database.connection is None or database.connection.is_closed():
            try:
                database.connection = await connect(database.settings)
            except DatabaseUnavailable:  # the test has dropped it
                return False
        reusable = await self._reset_database([database.connection])
        if not connected:
            await database.connection.close()
            database.connection = None
        return reusable

    async def _reset_database(self, connections: list[Connection]) -> bool:
        """Empty a database by its first connection, and return whether it can be used again."""
        connection, pids = connections[0], [found.get_server_pid() for found in connections]
        try:
            async with asyncio.timeout(_END_SECONDS):
                # PostgreSQL does not tell when a connection has ended.
                while await connection.fetchval(_END_OTHERS, pids):  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            if await connection.fetchval(self._fingerprint) != self._unchanged:
                return False
            await connection.execute(self._empty)
        except (TimeoutError, asyncpg.PostgresError):  # for example, a table is missing
            return False
        return True

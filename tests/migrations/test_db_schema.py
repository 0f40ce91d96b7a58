"""DB_SCHEMA: all objects are in one schema, with any search path of the role."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from tests.support import factories
from tests.support.sql import sql, sql_without_search_path
from tests.support.waiting import until
from tiger_db import AuditLog, Database, KeyVerifier, Settings, audit, crud, migrations
from tiger_db.audit.storage import TAKE_SEALING_LOCK
from tiger_db.connections import connect, connect_directly, maintenance_engine
from tiger_db.errors import APIKeyRevoked, MigrationError, SchemaMismatch
from tiger_db.migrations import MONTHS_AHEAD, SchemaState, downgrade, drift, schema_state, upgrade
from tiger_db.migrations.locks import MIGRATION_LOCK_ID, migration_lock
from tiger_db.signing import generate_signing_key

ROOT = Path(__file__).parents[2]
CHANNELS = ("tiger_db_api_keys", "tiger_db_audit_logs", "tiger_db_refreshes")
ODD = ['Tiger-DB a "b".c, été $$ 100%', "select", "x" * 63]
TABLES = """
SELECT count(*) FILTER (WHERE nspname = $1), count(*) FILTER (WHERE nspname <> $1) FROM pg_class
JOIN pg_namespace AS n ON n.oid = relnamespace WHERE nspname !~ '^(pg_|information_schema$)'
"""


def in_schema(settings: Settings, schema: str) -> Settings:
    key = SecretStr(generate_signing_key())
    return settings.model_copy(update={"db_schema": schema, "audit_signing_key": key})


def environment(settings: Settings) -> dict[str, str]:
    assert settings.database_url
    url = settings.database_url.get_secret_value()
    return os.environ | {"DATABASE_URL": url, "DB_SCHEMA": settings.db_schema}


async def migrate(settings: Settings) -> None:
    async with maintenance_engine(settings) as engine:
        assert (await upgrade(engine)).problem is None


async def tables(settings: Settings) -> tuple[int, int]:
    """Return the numbers of relations in the schema and in other schemas."""
    connection = await connect(settings)
    try:
        row = await connection.fetchrow(TABLES, settings.db_schema)
    finally:
        await connection.close()
    assert row is not None
    return row[0], row[1]


@pytest.fixture
async def two(empty_database: Settings) -> AsyncIterator[tuple[Database, Database]]:
    """Two installations in one database."""
    first, second = (in_schema(empty_database, schema) for schema in ("one", "Two"))
    for settings in (first, second):
        await migrate(settings)
    async with Database(first) as one, Database(second) as another:
        yield one, another


# The schema of all objects


@pytest.mark.slow
@pytest.mark.parametrize("schema", ODD)
async def test_every_name_of_a_schema_works(empty_database: Settings, schema: str) -> None:
    settings = in_schema(empty_database, schema)
    await migrate(settings)
    inside, outside = await tables(settings)
    assert (inside > 50, outside) == (True, 0)
    async with maintenance_engine(settings) as engine:
        assert await drift(engine) == []
    async with Database(settings) as database, KeyVerifier(database, memory=True) as verifier:
        async with database.session() as session:
            account = await factories.account(session)
            await crud.accounts.set_default_trading_account(session, account.id)
            key, raw_key = await factories.api_key(session)
        await verifier.authorize(raw_key)
        assert len(verifier._cache) == 1
        async with database.session() as session:
            await crud.api_keys.revoke(session, key.id)
        await until(lambda: not verifier._cache)
        with pytest.raises(APIKeyRevoked):
            await verifier.authorize(raw_key)
        assert (await audit.seal(database)).rows > 0
        assert (await audit.verify(database)).sound
        assert (await audit.maintain(database)).made == 0
    async with maintenance_engine(settings) as engine:
        assert (await downgrade(engine, "0005")).current == "0005"
        assert (await downgrade(engine, "base")).current is None
        assert (await upgrade(engine)).problem is None
        assert await drift(engine) == []


@pytest.mark.slow
async def test_every_function_has_its_schema_as_search_path(two: tuple[Database, ...]) -> None:
    for database in two:
        connection = await connect(database.settings)
        rows = await connection.fetch(
            "SELECT proname, proconfig, prosqlbody IS NOT NULL AS standard FROM pg_proc"
            " WHERE pronamespace = quote_ident(current_schema())::regnamespace"
        )
        path = await connection.fetchval("SELECT quote_ident(current_schema()) || ', pg_temp'")
        await connection.close()
        assert len(rows) == 10
        for row in rows:
            expected = None if row["standard"] else [f"search_path={path}"]
            assert row["proconfig"] == expected, row["proname"]
        assert {row["proname"] for row in rows if row["standard"]} == {"uuid7_floor", "uuid7_time"}


@pytest.mark.slow
async def test_a_downgrade_to_0005_restores_its_functions(empty_database: Settings) -> None:
    functions = (
        "SELECT string_agg(pg_get_functiondef(oid), '' ORDER BY proname) FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace"
    )
    async with maintenance_engine(empty_database) as engine:
        await upgrade(engine, "0005")
        before = await sql(empty_database, functions)
        await upgrade(engine)
        assert await sql(empty_database, functions) != before
        await downgrade(engine, "0005")
        assert await sql(empty_database, functions) == before


@pytest.mark.slow
async def test_the_plain_alembic_command_uses_the_schema(empty_database: Settings) -> None:
    settings = in_schema(empty_database, "Tiger")
    for command in ("upgrade head", "check"):
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "alembic", *command.split()],
            cwd=ROOT, env=environment(settings), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (await tables(settings))[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("plain", [True, False])
async def test_printed_sql_creates_the_schema_with_any_search_path(
    empty_database: Settings, *, plain: bool
) -> None:
    settings = in_schema(empty_database, "Tiger")
    if plain:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "alembic", "upgrade", "head", "--sql"],
            cwd=ROOT, env=environment(settings), capture_output=True, text=True, check=True,
        )  # fmt: skip
        script = done.stdout
    else:
        async with maintenance_engine(settings) as engine:
            script = await migrations.pending_sql(engine)
    arguments = settings.connect_args()
    del arguments["server_settings"]["search_path"]
    connection = await asyncpg.connect(**arguments)
    await connection.execute(script)
    await connection.close()
    assert (await tables(settings))[1] == 0
    async with maintenance_engine(settings) as engine:
        assert await drift(engine) == []


async def test_ten_machines_create_the_schema_concurrently(empty_database: Settings) -> None:
    settings = in_schema(empty_database, "tiger")

    async def create() -> None:
        async with maintenance_engine(settings) as engine, engine.connect() as connection:
            await connection.run_sync(migrations.create_schema)
            assert await connection.scalar(text("SELECT current_schema()")) == "tiger"
            assert connection.dialect.default_schema_name == "tiger"

    await asyncio.gather(*(create() for _ in range(10)))


@asynccontextmanager
async def as_role(settings: Settings, *grants: str) -> AsyncIterator[Settings]:
    """Create a role, and yield settings with which it connects."""
    role = f"somebody_{os.getpid()}"
    await sql(settings, f"CREATE ROLE {role} LOGIN PASSWORD 'p'", "SELECT 1")
    for grant in grants:
        await sql(settings, grant.format(role=role))
    url = settings.url
    assert url is not None
    other = replace(url, user=role, password="p").to_text()
    try:
        yield settings.model_copy(update={"database_url": SecretStr(other)})
    finally:
        await sql(settings, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.slow
async def test_without_the_right_to_create_the_schema_the_reason_is_one_line(
    empty_database: Settings,
) -> None:
    settings = in_schema(empty_database, "Tiger")
    async with as_role(settings) as poor:
        async with maintenance_engine(poor) as engine:
            with pytest.raises(MigrationError, match='CREATE SCHEMA "Tiger", and GRANT'):
                await upgrade(engine)
        assert await tables(settings) == (0, 0)
    async with (
        as_role(settings, 'CREATE SCHEMA "Tiger"') as poor,
        maintenance_engine(poor) as engine,
    ):
        with pytest.raises(MigrationError, match='GRANT USAGE, CREATE ON SCHEMA "Tiger"'):
            await upgrade(engine)
    await sql(settings, 'DROP SCHEMA "Tiger"', "SELECT 1")
    create = 'CREATE SCHEMA "Tiger" AUTHORIZATION {role}'
    async with as_role(settings, create) as owner:
        await migrate(owner)


async def test_a_missing_schema_is_reported(empty_database: Settings) -> None:
    async with maintenance_engine(in_schema(empty_database, "tiger")) as engine:
        async with engine.connect() as connection:
            state = await schema_state(connection)
        assert state.problem == "the database has no tiger_db schema: run `tiger-db init`"
        assert (await downgrade(engine, "base")).current is None
    assert await sql(empty_database, "SELECT to_regnamespace('tiger')") is None


# Wrong search paths


@pytest.mark.slow
async def test_no_connection_follows_the_search_path_of_its_role(clone_settings: Settings) -> None:
    evil = f'IN DATABASE "{clone_settings.database}" SET search_path = evil, pg_catalog, public'
    await sql(
        clone_settings,
        "CREATE SCHEMA evil",
        "CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE sql AS"
        " $$ SELECT pg_catalog.now() + '10 years' $$",
        f"ALTER ROLE CURRENT_USER {evil}",
        f'ALTER DATABASE "{clone_settings.database}" SET search_path = evil, public',
    )
    right = "SELECT abs(extract(epoch FROM now() - clock_timestamp())) < 60"
    assert await sql_without_search_path(clone_settings, right) is False
    past = clone_settings.model_copy(
        update={"db_pooler": "pgbouncer", "db_direct_host": clone_settings.addresses[0].host,
                "db_direct_port": clone_settings.addresses[0].port}
    )  # fmt: skip
    for connection in (await connect(clone_settings), await connect_directly(past)):
        assert await connection.fetchval(right)
        await connection.reset()  # pools do this
        assert await connection.fetchval(right)
        await connection.close()
    async with Database(clone_settings) as database, maintenance_engine(clone_settings) as engine:
        for an_engine in (database.engine, database.out_of_band.engine, engine):
            async with an_engine.connect() as made:
                assert await made.scalar(text(right))
        async with database.session() as session:
            account = await factories.account(session)
            await crud.accounts.update(session, account.id, description="changed")
            assert await session.scalar(
                text("SELECT abs(extract(epoch FROM updated_at - clock_timestamp())) < 60"
                     " FROM tiger_accounts")
            )  # fmt: skip
    # Triggers do not follow the search path of a session either.
    changed = await sql_without_search_path(
        clone_settings,
        "UPDATE tiger_accounts SET description = 'again'",
        "SELECT max(updated_at) < pg_catalog.now() + interval '1 day' FROM tiger_accounts",
    )
    assert changed is True


async def test_replicas_and_the_embedded_server_get_the_search_path() -> None:
    settings = Settings(db_host="h", db_replica_hosts="r", db_schema="Tiger")
    wanted = '"Tiger", pg_temp'
    assert settings.connect_args(settings.replicas[0])["server_settings"]["search_path"] == wanted
    # test_configuration in tests/embedded checks that the embedded server gets these settings.
    assert Settings(db_schema="Tiger").server_settings()["search_path"] == wanted


async def test_options_do_not_override_the_search_path(clone_settings: Settings) -> None:
    arguments = clone_settings.connect_args()
    arguments["server_settings"]["options"] = "-csearch_path=evil"  # Settings refuses this option
    connection = await asyncpg.connect(**arguments)
    assert await connection.fetchval("SHOW search_path") == '"public", pg_temp'
    await connection.close()


# Two installations in one database


@pytest.mark.slow
async def test_an_installation_in_another_schema_is_named(two: tuple[Database, Database]) -> None:
    settings = two[0].settings.model_copy(update={"db_schema": "neither"})
    async with maintenance_engine(settings) as engine, engine.connect() as connection:
        state = await schema_state(connection)
    assert state.problem == 'tiger_db is in the schema "Two": set DB_SCHEMA=Two'


async def test_the_name_of_another_schema_cannot_add_commands_to_the_advice() -> None:
    state = SchemaState(None, "0020", known=True, other_schema='x";reboot')
    assert state.problem == (
        """tiger_db is in the schema "x"";reboot": set 'DB_SCHEMA=x";reboot'"""
    )


@pytest.mark.slow
async def test_two_installations_do_not_see_each_other(two: tuple[Database, Database]) -> None:
    one, another = two
    for database in two:
        async with maintenance_engine(database.settings) as engine:
            assert await drift(engine) == []
    async with one.session() as session:
        await factories.account(session)
    async with another.session() as session:
        assert not (await crud.accounts.list_accounts(session)).items
    async with maintenance_engine(one.settings) as engine:
        await downgrade(engine, "base")
    async with maintenance_engine(another.settings) as engine:
        assert await drift(engine) == []


async def listened(settings: Settings, heard: list[str]) -> "asyncpg.Connection[asyncpg.Record]":
    connection = await connect(settings)
    for name in CHANNELS:
        await connection.add_listener(
            settings.channel(name), lambda *_, name=name: heard.append(name)
        )
    return connection


async def write_all(database: Database) -> None:
    """Make a change for each channel."""
    async with database.session() as session:
        key, _ = await factories.api_key(session)
        await crud.api_keys.revoke(session, key.id)
        await factories.account_with_token(session)
        await crud.token_status.schedule_due(session)


@pytest.mark.slow
async def test_an_installation_gets_no_notifications_of_the_other(
    two: tuple[Database, Database],
) -> None:
    one, another = two
    heard = list[str](), list[str]()
    listeners = [await listened(two[n].settings, heard[n]) for n in (0, 1)]
    await write_all(one)
    await until(lambda: set(heard[0]) == {*CHANNELS})
    # Notifications arrive in the order of commits: this one arrives after those of `one`.
    await sql(another.settings, f'NOTIFY "{another.settings.channel(CHANNELS[0])}"', "SELECT 1")
    await until(lambda: heard[1])
    assert heard[1] == [CHANNELS[0]]
    heard[0].clear()
    heard[1].clear()
    await write_all(another)
    await until(lambda: set(heard[1]) == {*CHANNELS})
    await sql(one.settings, f'NOTIFY "{one.settings.channel(CHANNELS[0])}"', "SELECT 1")
    await until(lambda: heard[0])
    assert heard[0] == [CHANNELS[0]]
    for listener in listeners:
        await listener.close()


@pytest.mark.slow
async def test_removing_keys_of_one_installation_keeps_those_of_the_other_in_memory(
    two: tuple[Database, Database],
) -> None:
    raw_keys, keys = [], []
    for database in two:
        async with database.session() as session:
            key, raw_key = await factories.api_key(session)
            keys.append(key)
            raw_keys.append(raw_key)
    async with KeyVerifier(two[0], memory=True) as one, KeyVerifier(two[1], memory=True) as another:
        await one.authorize(raw_keys[0])
        await another.authorize(raw_keys[1])
        changes = another._notifications
        await sql(two[0].settings, "TRUNCATE api_keys CASCADE", "SELECT 1")  # notifies `all`
        await until(lambda: not one._cache)
        channel = two[1].settings.channel("tiger_db_api_keys")
        await sql(two[1].settings, f"NOTIFY \"{channel}\", 'key {keys[0].id}'", "SELECT 1")
        await until(lambda: another._notifications > changes)
        assert another._notifications == changes + 1
        assert len(another._cache) == 1


async def finishes(work: Any) -> Any:
    async with asyncio.timeout(20):
        return await work


@pytest.mark.slow
async def test_installations_do_not_wait_for_each_others_locks(
    two: tuple[Database, Database],
) -> None:
    one, another = two
    for database in two:
        async with database.session() as session:
            await crud.audit_logs.log_events(session, [factories.new_event() for _ in range(3)])
            await factories.account(session)
    async with one.session() as session, maintenance_engine(one.settings) as engine:
        # `one` holds the locks of a seal, a default account, audit partitions and migrations.
        await session.execute(text(TAKE_SEALING_LOCK))
        await session.execute(text(f"SELECT make_audit_months({MONTHS_AHEAD})"))
        (account,) = (await crud.accounts.list_accounts(session)).items
        await crud.accounts.set_default_trading_account(session, account.id)
        async with migration_lock(engine, lambda _: None):
            sealed = await finishes(audit.seal(another))
            assert (sealed.rows > 0, sealed.waits_for) == (True, ())
            assert (await finishes(audit.maintain(another))).made == 0
            async with maintenance_engine(another.settings) as other_engine:
                await finishes(upgrade(other_engine))
            async with another.session() as its:
                (account,) = (await crud.accounts.list_accounts(its)).items
                await finishes(crud.accounts.set_default_trading_account(its, account.id))
            # It waits for its own lock.
            own = asyncio.create_task(audit.seal(one, patience=timedelta(seconds=60)))
            await asyncio.wait([own], timeout=0.5)
            assert not own.done()
            own.cancel()


# Older releases without DB_SCHEMA on the same database


@pytest.mark.slow
async def test_channels_and_locks_in_public_are_those_of_older_releases(clone: Database) -> None:
    assert [clone.settings.channel(name) for name in CHANNELS] == [*CHANNELS]
    heard: list[str] = []
    listener = await connect(clone.settings)
    for name in CHANNELS:
        await listener.add_listener(name, lambda *told: heard.append(told[2]))
    await write_all(clone)
    await until(lambda: set(heard) == {*CHANNELS})
    await listener.close()
    old = await connect(clone.settings)
    free = "SELECT pg_try_advisory_xact_lock({})"
    async with clone.session() as session:
        await session.execute(text(TAKE_SEALING_LOCK))
        await session.execute(text("SELECT make_audit_months(1)"))
        (account,) = (await crud.accounts.list_accounts(session)).items
        await crud.accounts.set_default_trading_account(session, account.id)
        async with clone.session() as events:
            events.add(AuditLog(action=factories.new_event().action))
            await events.flush()
            for key in (
                str(0x7469676572_01),
                "hashtext('make_audit_months')",
                "hashtext('set_default')",
                "hashtext('tiger_db_audit_logs')",
            ):
                assert await old.fetchval(free.format(key)) is False, key
    async with maintenance_engine(clone.settings) as engine, migration_lock(engine, lambda _: None):
        assert await old.fetchval(free.format(MIGRATION_LOCK_ID)) is False
    await old.close()


# Poolers


@pytest.mark.slow
async def test_sessions_that_lost_their_search_path_are_refused(
    two: tuple[Database, Database],
) -> None:
    """Some poolers drop the settings with which a session starts."""
    one = two[0]
    path = 'SET search_path = "Two", pg_temp'
    async with maintenance_engine(one.settings) as engine, engine.connect() as connection:
        await connection.exec_driver_sql(path)
        with pytest.raises(SchemaMismatch) as refused:
            await schema_state(connection)
    expected = (
        'a pooler dropped the search path to the schema "one" (DB_SCHEMA), and sessions use the'
        ' search path "Two", pg_temp: run ALTER ROLE "'
    )
    assert str(refused.value).startswith(expected)
    assert str(refused.value).endswith('" SET search_path = "one", pg_temp')


@pytest.mark.parametrize("watched", [0, 1000])
async def test_a_search_path_that_a_session_sets_ends_with_its_transaction(
    settings: Settings, watched: float
) -> None:
    """Also after a commit, and with each isolation level."""
    one = {"db_pool_size": 1, "db_max_overflow": 0, "db_slow_query_seconds": watched}
    read = text("SELECT current_setting('search_path'), pg_backend_pid()")
    seen = []
    async with Database(settings.model_copy(update=one)) as database:
        for isolation in (None, "SERIALIZABLE", None):
            async with database.session(isolation=isolation) as session:
                seen.append(tuple((await session.execute(read)).one()))
                await session.execute(text("SET search_path = pg_catalog"))
        async with database.session(readonly=True) as session:
            seen.append(tuple((await session.execute(read)).one()))
        async with database.out_of_band.connection() as connection, connection.transaction():
            await connection.execute("SET search_path = pg_catalog")
        async with database.out_of_band.connection() as connection, connection.transaction():
            assert await connection.fetchval("SHOW search_path") == settings.search_path
    assert set(seen) == {(settings.search_path, seen[0][1])}

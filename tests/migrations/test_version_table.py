"""The version table of tiger_db beside those of others, and the takeover from earlier releases."""

import asyncio

import pytest

from tests.support.sql import sql
from tests.support.waiting import WAITING_LOCKS, until
from tiger_db import Database, Settings, doctor
from tiger_db.connections import connect, maintenance_engine
from tiger_db.errors import MigrationError, SchemaMismatch
from tiger_db.health import check_readiness
from tiger_db.migrations import (
    SchemaState,
    downgrade,
    drift,
    pending_sql,
    schema_state,
    scripts,
    upgrade,
)

HEAD = scripts().get_current_head()
THEIRS = (
    "CREATE TABLE alembic_version (version_num varchar(32) NOT NULL,"
    " CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
)
OURS = "SELECT string_agg(version_num, ',') FROM tiger_db_alembic_version"
BOTH = f"SELECT ({OURS}) || ' ' || (SELECT version_num FROM alembic_version)"


async def make_former(settings: Settings) -> None:
    """Name the version table as earlier releases did."""
    await sql(
        settings,
        "ALTER TABLE tiger_db_alembic_version RENAME TO alembic_version",
        "ALTER INDEX tiger_db_alembic_version_pkc RENAME TO alembic_version_pkc",
        "SELECT 1",
    )


async def state_of(settings: Settings) -> SchemaState:
    async with maintenance_engine(settings) as engine, engine.connect() as connection:
        return await schema_state(connection)


async def migrate(settings: Settings, revision: str = "head") -> list[str]:
    """Return the progress messages."""
    said: list[str] = []
    async with maintenance_engine(settings) as engine:
        await upgrade(engine, revision, report=said.append)
    return said


@pytest.mark.slow
async def test_the_table_of_an_earlier_release_is_renamed_once(clone_settings: Settings) -> None:
    role = f"reader_{clone_settings.database}"
    await make_former(clone_settings)
    await sql(clone_settings, f"CREATE ROLE {role}", f"GRANT SELECT ON alembic_version TO {role}")
    state = await state_of(clone_settings)
    assert (state.current, state.known) == (HEAD, True)
    problem = (
        "the revision of tiger_db is in the table alembic_version of earlier releases:"
        " run `tiger-db migrate`, which renames the table to tiger_db_alembic_version"
    )
    async with Database(clone_settings) as database:
        with pytest.raises(SchemaMismatch) as refused:
            await database.check()
    assert str(refused.value) == problem
    assert problem in (await check_readiness(clone_settings)).problems
    renamed = "renamed the table alembic_version of tiger_db to tiger_db_alembic_version"
    assert await migrate(clone_settings) == [renamed]
    assert (await state_of(clone_settings)).problem is None
    granted = f"SELECT has_table_privilege('{role}', 'tiger_db_alembic_version', 'SELECT')"
    assert await sql(clone_settings, granted) is True

    theirs = [THEIRS, "INSERT INTO alembic_version VALUES ('0005')"]
    await sql(clone_settings, *theirs, f"DROP OWNED BY {role}", f"DROP ROLE {role}")
    assert await migrate(clone_settings) == []
    async with maintenance_engine(clone_settings) as engine:
        assert await drift(engine) == []
    assert await sql(clone_settings, BOTH) == f"{HEAD} 0005"


@pytest.mark.slow
async def test_pending_migrations_follow_the_renaming(empty_database: Settings) -> None:
    await migrate(empty_database, "0001")
    await make_former(empty_database)
    state = await state_of(empty_database)
    assert state.problem == (
        f"the schema (revision 0001) is older than this tiger_db (revision {HEAD}):"
        " run `tiger-db migrate`"
    )
    said = await migrate(empty_database)
    assert "renamed the table alembic_version of tiger_db to tiger_db_alembic_version" in said[0]
    async with maintenance_engine(empty_database) as engine:
        assert await drift(engine) == []
    assert await sql(empty_database, "SELECT to_regclass('alembic_version')") is None


@pytest.mark.slow
async def test_the_printed_sql_renames_the_table(clone_settings: Settings) -> None:
    await make_former(clone_settings)
    async with maintenance_engine(clone_settings) as engine:
        script = await pending_sql(engine)
    await sql(clone_settings, script, "SELECT 1")
    assert (await state_of(clone_settings)).problem is None
    await sql(clone_settings, THEIRS, "SELECT 1")  # the name of the index is free


@pytest.mark.slow
async def test_the_table_of_another_application_is_not_touched(empty_database: Settings) -> None:
    """Its revision is also the name of a revision of tiger_db."""
    theirs = (THEIRS, "INSERT INTO alembic_version VALUES ('0005')")
    await sql(empty_database, *theirs, "SELECT 1")
    assert (await state_of(empty_database)).problem == (
        "the database has no tiger_db schema: run `tiger-db init`"
    )
    await migrate(empty_database)
    assert await sql(empty_database, BOTH) == f"{HEAD} 0005"
    async with maintenance_engine(empty_database) as engine:
        assert await drift(engine) == []


TABLES_OF_OTHERS = (
    "CREATE TABLE tiger_accounts (tiger_id int); CREATE TABLE api_keys (tiger_account_id int);"
    "CREATE TABLE audit_logs (tiger_account_id int);"
    "CREATE TABLE token_statuses (tiger_account_id int)"
)


async def test_tables_with_our_names_but_without_our_comments_are_not_ours(
    empty_database: Settings,
) -> None:
    theirs = (THEIRS, "INSERT INTO alembic_version VALUES ('0001')")
    await sql(empty_database, TABLES_OF_OTHERS, *theirs, "SELECT 1")
    state = await state_of(empty_database)
    assert (state.current, state.lost, state.other_schema) == (None, None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("revision", "reason"),
    [
        ("2f5a", "the table alembic_version is not tiger_db's, because it has the revision 2f5a"),
        ("", "the table alembic_version is not tiger_db's, because it has no revision"),
        (None, "the table alembic_version is missing too"),
    ],
)
async def test_tables_without_a_revision_are_a_problem_and_stay_as_they_are(
    clone_settings: Settings, revision: str | None, reason: str
) -> None:
    await sql(clone_settings, "DROP TABLE tiger_db_alembic_version", "SELECT 1")
    if revision is not None:
        await sql(clone_settings, THEIRS, "SELECT 1")
    if revision:
        await sql(clone_settings, f"INSERT INTO alembic_version VALUES ('{revision}')", "SELECT 1")
    problem = (
        'the schema "public" has the tables of tiger_db but no table tiger_db_alembic_version, and'
        f" {reason}: restore the table tiger_db_alembic_version from a backup"
    )
    assert (await state_of(clone_settings)).problem == problem
    with pytest.raises(MigrationError) as refused:
        await migrate(clone_settings)
    assert str(refused.value) == problem
    async with maintenance_engine(clone_settings) as engine:
        with pytest.raises(SchemaMismatch, match="restore the table"):
            await pending_sql(engine)
    assert await sql(clone_settings, "SELECT to_regclass('tiger_db_alembic_version')") is None
    assert problem in (await check_readiness(clone_settings)).problems
    (schema,) = [r for r in await doctor.run(clone_settings) if r.check == "schema"]
    assert (schema.status, schema.advice) == (
        "problem",
        "restore the table tiger_db_alembic_version from a backup",
    )


@pytest.mark.slow
async def test_concurrent_migrations_rename_the_table_once(clone_settings: Settings) -> None:
    await make_former(clone_settings)
    said = await asyncio.gather(*(migrate(clone_settings) for _ in range(5)))
    assert len([line for lines in said for line in lines if line.startswith("renamed")]) == 1
    assert await sql(clone_settings, OURS) == HEAD


async def test_a_reader_during_the_renaming_finds_the_revision(clone_settings: Settings) -> None:
    """The reader has found the old table, and waits while another process renames it."""
    await make_former(clone_settings)
    other = await connect(clone_settings)
    transaction = other.transaction()
    await transaction.start()
    await other.execute("ALTER TABLE alembic_version RENAME TO tiger_db_alembic_version")
    reading = asyncio.create_task(state_of(clone_settings))
    waiting = f"SELECT count(*) FROM {WAITING_LOCKS} AND relation IS NOT NULL"
    await until(lambda: other.fetchval(waiting))
    await transaction.commit()
    await other.close()
    assert (await reading).problem is None


@pytest.mark.slow
async def test_a_long_reader_delays_the_renaming_and_is_named(clone_settings: Settings) -> None:
    await make_former(clone_settings)
    reader = await connect(clone_settings)
    transaction = reader.transaction()
    await transaction.start()
    await reader.execute("SELECT * FROM alembic_version")
    said: list[str] = []
    async with maintenance_engine(clone_settings) as engine:
        work = asyncio.create_task(upgrade(engine, report=said.append))
        await until(lambda: said)
        await transaction.rollback()
        assert (await work).problem is None
    assert said[0].startswith("renaming the version table: attempt 1 was blocked by process ")
    await reader.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "reason"),
    [
        ("TABLE alembic_version (version_num int)", "is not a version table of Alembic"),
        ("TABLE alembic_version (version varchar(32))", "is not a version table of Alembic"),
        (
            f"VIEW alembic_version AS SELECT '{HEAD}'::varchar(32) AS version_num",
            "is not a version table of Alembic",
        ),
        (
            "TABLE alembic_version AS SELECT '0005'::varchar(32) AS version_num",
            "has the revision 0005, which has other tables than the schema",
        ),
        (
            "TABLE alembic_version AS SELECT NULL::varchar(32) AS version_num",
            "has the revision NULL",
        ),
        (
            (
                "TABLE alembic_version AS SELECT n::varchar(32) AS version_num"
                " FROM generate_series(1, 1000) AS n"
            ),
            "has the revision 1, 10, 100, …",
        ),
    ],
)
async def test_a_table_of_another_form_or_revision_is_not_taken_over(
    clone_settings: Settings, theirs: str, reason: str
) -> None:
    await sql(clone_settings, "DROP TABLE tiger_db_alembic_version", f"CREATE {theirs}", "SELECT 1")
    with pytest.raises(MigrationError, match=f"not tiger_db's, because it {reason}: restore"):
        await migrate(clone_settings)
    assert await sql(clone_settings, "SELECT to_regclass('tiger_db_alembic_version')") is None


async def test_a_version_table_of_another_form_is_a_problem(clone_settings: Settings) -> None:
    column = "ALTER TABLE tiger_db_alembic_version RENAME version_num TO version"
    await sql(clone_settings, column, "SELECT 1")
    assert (await state_of(clone_settings)).problem == (
        "the table tiger_db_alembic_version is not a version table of Alembic:"
        " restore it from a backup"
    )


@pytest.mark.parametrize(
    ("theirs", "what"),
    [
        ("TABLE api_keys (id int)", 'relation "api_keys"'),
        ("TYPE account_status AS ENUM ('x')", 'type "account_status"'),
        (
            "FUNCTION set_updated_at() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            'function "set_updated_at"',
        ),
    ],
)
async def test_an_object_of_another_application_with_our_name_is_named(
    empty_database: Settings, theirs: str, what: str
) -> None:
    await sql(empty_database, f"CREATE {theirs}", "SELECT 1")
    with pytest.raises(MigrationError, match=f"{what} already exists.* with DB_SCHEMA$"):
        await migrate(empty_database, "0001")


@pytest.mark.slow
async def test_a_downgrade_names_the_objects_that_depend_on_ours(empty_database: Settings) -> None:
    await migrate(empty_database, "0001")
    await sql(empty_database, "CREATE TABLE notes (a uuid REFERENCES tiger_accounts)", "SELECT 1")
    async with maintenance_engine(empty_database) as engine:
        with pytest.raises(MigrationError, match=r"must be dropped first: .* on table notes"):
            await downgrade(engine, "base")

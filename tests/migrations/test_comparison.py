"""Each change of a trigger, function or table is found, and its repair SQL reverses it."""

from collections.abc import AsyncIterator
from typing import TypeAlias

import asyncpg
import pytest

from tiger_db import Settings, doctor
from tiger_db.connections import connect, maintenance_engine
from tiger_db.health import check_readiness
from tiger_db.migrations import declared, drift, upgrade
from tiger_db.migrations.comparison import SchemaDifference, find_differences
from tiger_db.models import metadata

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
PARTITION = "audit_logs_default"
BODY = "RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
PINNED = BODY.replace(" AS ", " SET search_path = public, pg_temp AS ")
EMPTY = f"CREATE OR REPLACE FUNCTION notify_api_key_change() {PINNED}"
SQL_BODY = "SELECT '00000000-0000-0000-0000-000000000000'::uuid"
FLOOR = "uuid7_floor(at timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE STRICT"
JSON = "RETURNS json LANGUAGE sql RETURN 'null'::json"
SET = (
    "DO $$BEGIN EXECUTE format('ALTER {} SET session_replication_role = replica',"
    " current_database(), current_user); END$$"
)
# The change, the tables concerned, and a part of the description.
KEYS, ACCOUNTS, TRAIL = ("api_keys",), ("tiger_accounts",), ("audit_logs",)
ALL = tuple(sorted(metadata.tables))
KEY_TABLES = ("api_keys", "tiger_accounts")
STAMPED = ("api_keys", "tiger_accounts", "token_statuses")
CHANGES: dict[str, tuple[tuple[str, ...], str]] = {
    "DROP TRIGGER notify_update ON api_keys": (KEYS, "notify_update on api_keys is missing"),
    "DROP TRIGGER refuse_change ON audit_logs": (TRAIL, "refuse_change on audit_logs is missing"),
    f"DROP TRIGGER refuse_truncate ON {PARTITION}": (TRAIL, f"on {PARTITION} is missing"),
    "ALTER TABLE api_keys DISABLE TRIGGER notify_update": (KEYS, "on api_keys is disabled"),
    "ALTER TABLE audit_logs DISABLE TRIGGER refuse_change": (TRAIL, "on audit_logs is disabled"),
    f"ALTER TABLE {PARTITION} DISABLE TRIGGER refuse_change": (TRAIL, f"{PARTITION} is disabled"),
    "ALTER TABLE tiger_accounts ENABLE REPLICA TRIGGER notify_api_keys_update": (
        ACCOUNTS,
        "notify_api_keys_update on tiger_accounts fires only for replicated changes",
    ),
    "ALTER TABLE api_keys ENABLE TRIGGER notify_update": (
        KEYS,
        "notify_update on api_keys does not fire for replicated changes",
    ),
    "ALTER TABLE audit_seals ENABLE ALWAYS TRIGGER refuse_change": (
        ("audit_seals",),
        "refuse_change on audit_seals also fires for replicated changes",
    ),
    "CREATE OR REPLACE TRIGGER notify_update AFTER UPDATE ON api_keys FOR EACH ROW"
    " WHEN (false) EXECUTE FUNCTION notify_api_key_change();"
    "ALTER TABLE api_keys ENABLE ALWAYS TRIGGER notify_update": (KEYS, "WHEN (false)"),
    f"CREATE SCHEMA evil; CREATE FUNCTION evil.notify_api_key_change() {BODY};"
    "CREATE OR REPLACE TRIGGER notify_delete AFTER DELETE ON api_keys FOR EACH ROW"
    " EXECUTE FUNCTION evil.notify_api_key_change();"
    "ALTER TABLE api_keys ENABLE ALWAYS TRIGGER notify_delete": (
        KEYS,
        "EXECUTE FUNCTION evil.notify_api_key_change()",
    ),
    "ALTER TABLE api_keys DISABLE TRIGGER ALL;"
    "ALTER TABLE api_keys ENABLE TRIGGER set_updated_at;"
    "ALTER TABLE api_keys ENABLE ALWAYS TRIGGER notify_update;"
    "ALTER TABLE api_keys ENABLE ALWAYS TRIGGER notify_delete;"
    "ALTER TABLE api_keys ENABLE ALWAYS TRIGGER notify_truncate": (KEYS, '"RI_ConstraintTrigger_'),
    EMPTY: (KEY_TABLES, "has `BEGIN RETURN NULL; END` and lacks `DECLARE`"),
    "ALTER FUNCTION set_updated_at() RESET search_path": (
        STAMPED,
        "lacks `SET search_path TO 'public', 'pg_temp'`",
    ),
    f"CREATE OR REPLACE FUNCTION {FLOOR} AS $$ {SQL_BODY} $$": (TRAIL, "lacks `BEGIN ATOMIC`"),
    f"CREATE OR REPLACE FUNCTION {FLOOR} RETURN (SELECT gen_random_uuid())": (
        TRAIL,
        "has `RETURN (SELECT gen_random_uuid() AS gen_random_uuid)`",
    ),
    "ALTER FUNCTION set_updated_at() SET search_path = evil": (
        STAMPED,
        "has `SET search_path TO 'evil'`",
    ),
    "ALTER FUNCTION refuse_audit_change() SECURITY DEFINER": (
        ("audit_logs", "audit_seals"),
        "has `SECURITY DEFINER`",
    ),
    "ALTER FUNCTION uuid7_time(uuid) VOLATILE": (TRAIL, "lacks `IMMUTABLE PARALLEL SAFE STRICT`"),
    "DROP FUNCTION make_audit_months(integer)": (
        TRAIL,
        "make_audit_months (used by audit_logs) is mis",
    ),
    f"CREATE FUNCTION uuid7_floor(timestamp) RETURNS uuid LANGUAGE sql AS $$ {SQL_BODY} $$": (
        TRAIL,
        "uuid7_floor(timestamp without time zone) has the name of a tiger_db function",
    ),
    "ALTER TABLE api_keys ALTER key_prefix TYPE text COLLATE pg_catalog.default": (
        KEYS,
        'column key_prefix of api_keys does not have the collation "C"',
    ),
    "ALTER TABLE api_keys ENABLE ROW LEVEL SECURITY": (KEYS, "security of api_keys is enabled"),
    "ALTER TABLE audit_logs FORCE ROW LEVEL SECURITY": (TRAIL, "of audit_logs is forced"),
    f"ALTER TABLE {PARTITION} ENABLE ROW LEVEL SECURITY": (TRAIL, f"of {PARTITION} is enabled"),
    'CREATE POLICY "a b" ON audit_logs USING (false)': (
        TRAIL,
        'audit_logs has the row security policy "a b"',
    ),
    "CREATE RULE quiet AS ON UPDATE TO api_keys DO INSTEAD NOTHING": (
        KEYS,
        "api_keys has the rule quiet",
    ),
    "CREATE SCHEMA evil; CREATE TABLE evil.k () INHERITS (api_keys)": (
        KEYS,
        "table evil.k inherits from api_keys",
    ),
    "CREATE FUNCTION concat(text, text) RETURNS text LANGUAGE sql RETURN $1": (
        ALL,
        "function public.concat(text,text) has the name of a PostgreSQL function",
    ),
    "CREATE AGGREGATE max(api_key_status) (SFUNC = enum_larger, STYPE = api_key_status)": (
        ALL,
        "function public.max(public.api_key_status) has the name of a PostgreSQL function",
    ),
    "CREATE FUNCTION glue(text, uuid) RETURNS text LANGUAGE sql RETURN $1;"
    "CREATE OPERATOR || (LEFTARG = text, RIGHTARG = uuid, FUNCTION = glue)": (
        ALL,
        "operator public.||(text,uuid) has the name of a PostgreSQL operator",
    ),
    f"CREATE FUNCTION js(api_key_status) {JSON}; CREATE CAST (api_key_status AS json)"
    " WITH FUNCTION js(api_key_status)": (
        ALL,
        "cast from public.api_key_status to json",
    ),
    f"CREATE FUNCTION js(audit_logs) {JSON}; CREATE CAST (audit_logs AS json)"
    " WITH FUNCTION js(audit_logs)": (ALL, "cast from public.audit_logs to json"),
    f"CREATE FUNCTION js(api_key_status[]) {JSON}; CREATE CAST (api_key_status[] AS json)"
    " WITH FUNCTION js(api_key_status[])": (ALL, "cast from public.api_key_status[] to json"),
    SET.format("DATABASE %1$I"): (ALL, "session_replication_role is replica"),
    SET.format("ROLE %2$I IN DATABASE %1$I"): (ALL, "session_replication_role is replica"),
}
NOT_REPAIRED = {
    "ALTER TABLE api_key_usage RENAME TO u": "table api_key_usage is missing",
    "ALTER TABLE api_key_usage RENAME TO u; CREATE VIEW api_key_usage AS TABLE u": (
        "api_key_usage is a view, not a table"
    ),
}
ADDED = (
    f"CREATE FUNCTION mine() {BODY};"
    "CREATE TRIGGER mine BEFORE UPDATE ON api_keys FOR EACH ROW EXECUTE FUNCTION mine();"
    "CREATE TRIGGER mine BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION mine()"
)


@pytest.fixture
async def other(clone_settings: Settings) -> AsyncIterator[Connection]:
    """A connection that tiger_db did not make."""
    connection = await connect(clone_settings)
    yield connection
    await connection.close()


async def differences(settings: Settings) -> list[SchemaDifference]:
    async with maintenance_engine(settings) as engine, engine.connect() as connection:
        return await find_differences(connection)


async def found_by_doctor(settings: Settings) -> doctor.CheckResult:
    (finding,) = [f for f in await doctor.run(settings) if f.check == "triggers and functions"]
    return finding


@pytest.mark.slow
async def test_migrations_create_the_declared_objects(clone_settings: Settings) -> None:
    assert await differences(clone_settings) == []
    async with maintenance_engine(clone_settings) as engine, engine.connect() as connection:
        await connection.exec_driver_sql("SELECT make_audit_months(30)")
        assert await find_differences(connection) == []


async def test_every_trigger_and_function_is_declared(
    other: Connection, clone_settings: Settings
) -> None:
    """If all triggers are dropped, all of them are reported as missing."""
    names = await other.fetch(
        "SELECT proname FROM pg_proc WHERE pronamespace = current_schema()::regnamespace"
    )
    assert {name for (name,) in names} == {s.partition("(")[0] for s in declared.FUNCTIONS}
    triggers = await other.fetch(
        "SELECT tgname, tgrelid::regclass::text FROM pg_trigger"
        " WHERE NOT tgisinternal AND tgparentid = 0 ORDER BY 2, 1"
    )
    for name, table in triggers:
        await other.execute(f"DROP TRIGGER {name} ON {table}")
    seen = {difference.description for difference in await differences(clone_settings)}
    assert seen == {f"trigger {name} on {table} is missing" for name, table in triggers}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
async def test_each_command_reports_a_change_and_the_repair_reverses_it(
    clone_settings: Settings, other: Connection, change: str
) -> None:
    tables, seen = CHANGES[change]
    await other.execute(change)
    found = await differences(clone_settings)
    assert found
    assert [d.description for d in found if seen not in d.description] == []
    assert {difference.tables for difference in found} == {tables}
    assert not any(difference.undeclared or "\n" in str(difference) for difference in found)

    async with maintenance_engine(clone_settings) as engine:
        assert await drift(engine) == [str(difference) for difference in found]
    finding = await found_by_doctor(clone_settings)
    assert finding.status == "problem"
    assert seen in finding.seen
    assert "tiger-db check" in str(finding.advice)
    report = await check_readiness(clone_settings)
    (problem,) = report.problems
    assert seen in problem
    assert "tiger-db check" in problem
    assert report.ready

    for difference in found:
        await other.execute(difference.repair)
    assert await differences(clone_settings) == []


@pytest.mark.slow
@pytest.mark.parametrize("change", NOT_REPAIRED)
async def test_a_missing_table_or_a_view_in_its_place_is_reported(
    clone_settings: Settings, other: Connection, change: str
) -> None:
    await other.execute(change)
    (found,) = await differences(clone_settings)
    assert found.tables == ("api_key_usage",)
    assert NOT_REPAIRED[change] in found.description
    async with maintenance_engine(clone_settings) as engine:
        assert str(found) in await drift(engine)
    assert (await found_by_doctor(clone_settings)).status == "problem"


@pytest.mark.slow
async def test_health_and_doctor_shorten_many_differences_and_check_lists_all(
    clone_settings: Settings, other: Connection
) -> None:
    for table in ("audit_logs", "audit_seals", "api_keys", "tiger_accounts"):
        await other.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    async with maintenance_engine(clone_settings) as engine:
        lines = await drift(engine)
    finding = await found_by_doctor(clone_settings)
    assert finding.seen.endswith(f"; and {len(lines) - 3} more")
    (problem,) = (await check_readiness(clone_settings)).problems
    assert f"; and {len(lines) - 3} more: run" in problem
    for line in lines:
        await other.execute(line.partition(": ")[2])
    assert await differences(clone_settings) == []


@pytest.mark.slow
async def test_only_doctor_warns_of_an_undeclared_trigger(
    clone_settings: Settings, other: Connection
) -> None:
    await other.execute(ADDED)
    finding = await found_by_doctor(clone_settings)
    assert finding.status == "warning"
    assert "trigger mine on api_keys is not declared by tiger_db" in finding.seen
    assert "trigger mine on audit_logs is not declared by tiger_db" in finding.seen
    assert "audit_logs_default" not in finding.seen  # partitions have copies of the trigger
    assert "unless you need the trigger, DROP TRIGGER mine ON " in str(finding.advice)
    assert (await check_readiness(clone_settings)).problems == []
    async with maintenance_engine(clone_settings) as engine:
        assert await drift(engine) == []


async def test_a_search_path_does_not_hide_a_replaced_function(
    clone_settings: Settings, other: Connection
) -> None:
    """A function with the declared name in another schema is reported."""
    await other.execute(
        f"CREATE SCHEMA evil; CREATE FUNCTION evil.notify_api_key_change() {BODY};"
        "CREATE OR REPLACE TRIGGER notify_delete AFTER DELETE ON api_keys FOR EACH ROW"
        " EXECUTE FUNCTION evil.notify_api_key_change();"
        "ALTER TABLE api_keys ENABLE ALWAYS TRIGGER notify_delete"
    )
    async with maintenance_engine(clone_settings) as engine, engine.connect() as connection:
        await connection.exec_driver_sql("SET search_path = public, evil")
        (found,) = await find_differences(connection)
    assert "EXECUTE FUNCTION evil.notify_api_key_change()" in found.description


async def test_an_operator_of_the_schema_does_not_hide_a_changed_function(
    clone_settings: Settings, other: Connection
) -> None:
    """The operator would redirect the query for functions to a schema with copies."""
    await other.execute("CREATE SCHEMA decoy")
    for (definition,) in await other.fetch(
        "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    ):
        await other.execute(definition.replace("FUNCTION public.", "FUNCTION decoy."))
    await other.execute(
        "CREATE FUNCTION is_in(oid, regnamespace) RETURNS boolean LANGUAGE sql RETURN"
        " $1 = CASE WHEN pg_catalog.current_query() LIKE '%pg_get_functiondef%'"
        " THEN 'decoy'::regnamespace::oid ELSE $2::oid END;"
        "CREATE OPERATOR = (LEFTARG = oid, RIGHTARG = regnamespace, FUNCTION = is_in)"
    )
    await other.execute(EMPTY)
    seen = [difference.description for difference in await differences(clone_settings)]
    assert seen[0] == "operator public.=(oid,regnamespace) has the name of a PostgreSQL operator"
    assert "has `BEGIN RETURN NULL; END`" in seen[1]


@pytest.mark.parametrize("quoted", ["on", "off"])
async def test_quoting_all_identifiers_changes_nothing(
    clone_settings: Settings, other: Connection, quoted: str
) -> None:
    name = clone_settings.database
    await other.execute(f'ALTER DATABASE "{name}" SET quote_all_identifiers = {quoted}')
    assert await differences(clone_settings) == []
    await other.execute("ALTER TABLE audit_logs DISABLE TRIGGER refuse_change")
    (found, *_) = await differences(clone_settings)
    assert found.description == "trigger refuse_change on audit_logs is disabled"


async def test_functions_and_operators_of_extensions_are_not_reported(
    clone_settings: Settings, other: Connection
) -> None:
    if not await other.fetchval("SELECT count(*) FROM pg_available_extensions WHERE name='citext'"):
        pytest.skip("this server has no extensions")
    await other.execute("CREATE EXTENSION citext")
    assert await differences(clone_settings) == []


async def test_casts_of_the_applications_types_are_not_reported(
    clone_settings: Settings, other: Connection
) -> None:
    await other.execute(
        f"CREATE TYPE mood AS ENUM ('good'); CREATE FUNCTION js(mood) {JSON};"
        "CREATE CAST (mood AS json) WITH FUNCTION js(mood)"
    )
    assert await differences(clone_settings) == []


@pytest.mark.slow
@pytest.mark.parametrize("schema", ['My "Own"', "it's", "a\\b, c"])
async def test_a_schema_with_an_odd_name_has_no_differences(
    empty_database: Settings, schema: str
) -> None:
    settings = empty_database.model_copy(update={"db_schema": schema})
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)
    assert await differences(settings) == []

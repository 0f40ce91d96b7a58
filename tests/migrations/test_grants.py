"""The privileges of each kind of role: their declaration, grants and comparison."""

import re
import shlex

import asyncpg
import pytest
from sqlalchemy import LargeBinary, text

from tests.support.roles import connected_as, granted, new_role
from tests.support.sql import months, sql
from tiger_db import Database, Settings, audit
from tiger_db.connections import connect, maintenance_engine
from tiger_db.encryption import EncryptedType
from tiger_db.errors import InvalidValue, NotFound, PrivilegeMissing
from tiger_db.migrations import pending_sql, roles, upgrade
from tiger_db.migrations.declared import GRANTS, SEQUENCE, Privileges, grants_on
from tiger_db.migrations.grants import find_grant_differences
from tiger_db.migrations.version_table import VERSION_TABLE
from tiger_db.models import SECRET_COLUMNS, TABLES, RoleKind, metadata
from tiger_db.settings import quote_identifier

OBJECTS = """
SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' WHEN 'r' THEN 'TABLE' WHEN 'p' THEN 'TABLE'
    ELSE 'another relation' END AS type, relname AS name
FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind NOT IN ('i', 'I')
UNION ALL
SELECT 'FUNCTION', format('%I(%s)', proname, pg_get_function_arguments(oid))
FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL
SELECT 'TYPE', typname FROM pg_type -- values of enum types and domains need no privilege
WHERE typnamespace = 'public'::regnamespace AND typrelid = 0 AND typelem = 0 AND typtype !~ '[de]'
"""


async def test_each_object_of_the_schema_is_classified(clone_settings: Settings) -> None:
    connection = await connect(clone_settings)
    try:
        found = await connection.fetch(OBJECTS)
    finally:
        await connection.close()
    partitions = {("TABLE", name) for name in months(0, 12)}
    present = {(row["type"], row["name"]) for row in found}
    assert partitions <= present
    classified = {key for key in GRANTS if key[1] not in ("", "audit_logs_YYYY_MM")}
    assert present - partitions == classified


def test_each_column_that_looks_secret_is_secret() -> None:
    looks = re.compile(
        r"hash|mac$|fingerprint|secret|private_key$|(access|refresh)_token$|tiger_id$"
    )
    for name in TABLES:
        columns = metadata.tables[name].c
        binary = {c.name for c in columns if isinstance(c.type, LargeBinary | EncryptedType)}
        expected = {c.name for c in columns if looks.search(c.name)} | binary
        if name != "audit_seals":
            assert SECRET_COLUMNS.get(name, frozenset()) == expected, name


# Statements that need one privilege and change no row, by type of object and privilege.
TRIALS = {
    "TABLE": {
        "SELECT": "SELECT {column} FROM {name} LIMIT 0",
        "INSERT": "INSERT INTO {name} ({column}) SELECT NULL WHERE false",
        "UPDATE": "UPDATE {name} SET {column} = NULL WHERE false",
        "DELETE": "DELETE FROM {name} WHERE false",
        "TRUNCATE": "TRUNCATE {name} CASCADE",
        "TRIGGER": "CREATE TRIGGER t AFTER INSERT ON {name} EXECUTE FUNCTION x()",
    },
    "SEQUENCE": {
        "USAGE": "SELECT nextval('{name}')",
        "SELECT": "SELECT last_value FROM {name}",
        "UPDATE": "SELECT setval('{name}', 1)",
    },
}


def columns_of(name: str) -> list[str]:
    known = metadata.tables.get("audit_logs" if name.startswith("audit_logs_") else name)
    return ["version_num"] if known is None else [*known.c.keys()]


def is_declared(declared: Privileges, privilege: str, column: str) -> bool:
    return privilege in declared and (not declared[privilege] or column in declared[privilege])


@pytest.mark.parametrize("kind", RoleKind)
@pytest.mark.slow
async def test_a_role_may_do_what_is_declared_and_nothing_else(
    clone_settings: Settings, kind: RoleKind
) -> None:
    tables = [*TABLES, VERSION_TABLE, "audit_logs_default", *months(0, 0)]
    objects = [*(("TABLE", name) for name in tables), ("SEQUENCE", SEQUENCE)]
    tried = 0
    async with granted(clone_settings, kind) as role:
        connection = await connect(connected_as(clone_settings, role))
        for type_, name in objects:
            for privilege, trial in TRIALS[type_].items():
                for column in columns_of(name) if "{column}" in trial else [""]:
                    statement = trial.format(name=name, column=column)
                    expected = is_declared(grants_on(kind, type_, name), privilege, column)
                    assert await is_allowed(connection, statement) == expected, statement
                    tried += 1
        await connection.close()
    assert tried > 500


async def is_allowed(connection: "asyncpg.Connection[asyncpg.Record]", statement: str) -> bool:
    """Execute a statement, roll back, and return whether the role had the privileges for it."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(statement)
    except asyncpg.InsufficientPrivilegeError:
        return False
    except asyncpg.PostgresError:  # such as a wrong type
        return True
    finally:
        await transaction.rollback()
    return True


async def differences(settings: Settings) -> list[str]:
    async with maintenance_engine(settings) as engine, engine.connect() as connection:
        return [str(difference) for difference in await find_grant_differences(connection)]


async def grant(settings: Settings, role: str, kind: RoleKind) -> list[str]:
    async with maintenance_engine(settings) as engine:
        return await roles.grant(engine, role, kind)


async def may(settings: Settings, role: str, privilege: str, table: str) -> object:
    call = f"has_table_privilege('{role}', '{table}', '{privilege}')"
    return await sql(settings, f"SELECT {call}")


@pytest.mark.slow
async def test_a_second_grant_replaces_the_first(clone_settings: Settings) -> None:
    async with granted(clone_settings, RoleKind.APP) as role:
        assert await grant(clone_settings, role, RoleKind.APP) == []
        assert await may(clone_settings, role, "INSERT", "api_keys")
        assert await grant(clone_settings, role, RoleKind.SEALER) == []
        assert not await may(clone_settings, role, "INSERT", "api_keys")
        assert await may(clone_settings, role, "INSERT", "audit_seals")
        assert await differences(clone_settings) == []


@pytest.mark.slow
async def test_a_role_with_all_privileges_keeps_only_those_of_its_kind(
    clone_settings: Settings,
) -> None:
    async with new_role(clone_settings) as role:
        await sql(
            clone_settings,
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}",
            f"GRANT CREATE ON SCHEMA public TO {role}",
            "SELECT 1",
        )
        assert await grant(clone_settings, role, RoleKind.APP) == []
        assert await differences(clone_settings) == []


async def test_the_printed_sql_grants_the_same(clone_settings: Settings) -> None:
    async with new_role(clone_settings) as role:
        async with maintenance_engine(clone_settings) as engine:
            script = await roles.grant_sql(engine, role, RoleKind.AUDITOR)
        assert not await may(clone_settings, role, "SELECT", "audit_logs")
        await sql(clone_settings, "SET search_path = pg_catalog", script, "SELECT 1")
        assert await may(clone_settings, role, "SELECT", "audit_logs")
        assert await differences(clone_settings) == []


@pytest.mark.parametrize("as_script", [False, True])
async def test_a_migration_grants_privileges_on_new_tables(
    clone_settings: Settings, as_script: bool
) -> None:
    async with granted(clone_settings, RoleKind.AUDITOR) as role:
        new = "CREATE TABLE trading_pauses (LIKE former INCLUDING ALL)"
        await sql(
            clone_settings, "ALTER TABLE trading_pauses RENAME TO former", new, "DROP TABLE former",
            "SELECT 1",
        )  # fmt: skip
        assert not await may(clone_settings, role, "SELECT", "trading_pauses")
        async with maintenance_engine(clone_settings) as engine:
            if as_script:
                await sql(clone_settings, await pending_sql(engine), "SELECT 1")
            else:
                await upgrade(engine)
        assert await may(clone_settings, role, "SELECT", "trading_pauses")


@pytest.mark.slow
async def test_a_new_default_partition_has_the_grants_of_the_old_one(clone: Database) -> None:
    async with granted(clone.settings, RoleKind.APP) as role:
        (last,) = months(12, 12)
        old = "SELECT 'audit_logs_default'::regclass::oid::text"
        before = await sql(clone.settings, f"DROP TABLE {last}", old)
        event = "SELECT uuid7_floor(now() + '12 months'), 'a:b', 'success', 'low'"
        insert = f"INSERT INTO audit_logs (id, action, result, severity) {event}"
        await sql(clone.settings, insert, "SELECT 1")
        assert (await audit.maintain(clone)).made == 1
        assert await sql(clone.settings, old) != before
        assert await may(clone.settings, role, "SELECT", "audit_logs_default")
        assert await differences(clone.settings) == []


async def test_revoked_grants_leave_nothing(clone_settings: Settings) -> None:
    async with granted(clone_settings, RoleKind.APP) as role:
        async with maintenance_engine(clone_settings) as engine:
            await roles.revoke_grants(engine, role)
            acl = f"SELECT count(*) FROM pg_shdepend WHERE refobjid = '{role}'::regrole"
            assert await sql(clone_settings, acl) == 0
            with pytest.raises(NotFound, match="has not given the role"):
                await roles.revoke_grants(engine, role)
        assert await differences(clone_settings) == []


async def test_a_role_that_uses_other_tables_can_still_connect(clone_settings: Settings) -> None:
    async with granted(clone_settings, RoleKind.APP) as role:
        await sql(
            clone_settings,
            "CREATE TABLE own (id int)",
            f"GRANT SELECT ON own TO {role}",
            "SELECT 1",
        )
        async with maintenance_engine(clone_settings) as engine:
            await roles.revoke_grants(engine, role)
        assert await sql(connected_as(clone_settings, role), "SELECT count(*) FROM own") == 0


@pytest.mark.slow
async def test_a_grant_reaches_only_its_schema(empty_database: Settings) -> None:
    found = {}
    for schema in ("one", "two"):
        found[schema] = empty_database.model_copy(update={"db_schema": schema})
        async with maintenance_engine(found[schema]) as engine:
            await upgrade(engine)
    async with granted(found["one"], RoleKind.APP) as role:
        app = {name: connected_as(settings, role) for name, settings in found.items()}
        async with Database(app["one"]) as database:
            await database.check()
        assert not await sql(found["one"], f"SELECT has_schema_privilege('{role}', 'two', 'USAGE')")
        assert await differences(found["two"]) == []


async def test_no_grant_restricts_an_owner(clone_settings: Settings) -> None:
    owner = await sql(clone_settings, "SELECT current_user::text")
    with pytest.raises(InvalidValue, match="is a superuser, so that no grant restricts it"):
        await grant(clone_settings, str(owner), RoleKind.APP)
    async with new_role(clone_settings) as role:
        await sql(clone_settings, f"ALTER TABLE audit_logs OWNER TO {role}", "SELECT 1")
        with pytest.raises(InvalidValue, match="owns the database, the schema or objects"):
            await grant(clone_settings, role, RoleKind.APP)
        await sql(clone_settings, "ALTER TABLE audit_logs OWNER TO CURRENT_USER", "SELECT 1")
    with pytest.raises(NotFound, match="CREATE ROLE"):
        await grant(clone_settings, "nobody at all", RoleKind.APP)


@pytest.mark.slow
async def test_a_grant_that_postgresql_only_warns_of_is_an_error(empty_database: Settings) -> None:
    """The owner of the tables is not the owner of the database, so it cannot grant CONNECT."""
    async with new_role(empty_database) as owner, new_role(empty_database) as role:
        name = empty_database.database
        await sql(
            empty_database,
            f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC",
            f"GRANT CONNECT ON DATABASE {name} TO {owner}",
            f"CREATE SCHEMA own AUTHORIZATION {owner}",
            "SELECT 1",
        )
        settings = connected_as(empty_database, owner).model_copy(update={"db_schema": "own"})
        async with maintenance_engine(settings) as engine:
            await upgrade(engine)
            with pytest.raises(PrivilegeMissing, match="lacks CONNECT on the database"):
                await roles.grant(engine, role, RoleKind.APP)
            await sql(empty_database, f"GRANT CONNECT ON DATABASE {name} TO {role}", "SELECT 1")
            assert await roles.grant(engine, role, RoleKind.APP) == []


@pytest.mark.slow
@pytest.mark.parametrize("names", [("a", "a b"), ("a", "a lacks SELECT"), ('"', '" \'"')])
async def test_roles_whose_names_begin_alike_are_told_apart(
    clone_settings: Settings, names: tuple[str, str]
) -> None:
    """A grant warns of no other role, and a migration repairs both."""
    short, long = names
    quoted = [quote_identifier(name) for name in names]
    await sql(clone_settings, *(f"CREATE ROLE {role}" for role in quoted), "SELECT 1")
    try:
        for name in names:
            assert await grant(clone_settings, name, RoleKind.APP) == []
        await sql(clone_settings, f"REVOKE SELECT ON audit_seals FROM {quoted[1]}", "SELECT 1")
        assert await grant(clone_settings, short, RoleKind.APP) == []
        (found,) = await differences(clone_settings)
        assert found.endswith(f"run `tiger-db grant {shlex.quote(long)} --as app`")
        async with maintenance_engine(clone_settings) as engine:
            await upgrade(engine)
        assert await differences(clone_settings) == []
    finally:
        for role in quoted:
            await sql(clone_settings, f"DROP OWNED BY {role}", f"DROP ROLE {role}", "SELECT 1")


WEAKENED = {
    "GRANT UPDATE, TRUNCATE ON audit_logs TO {app}": [
        "the app role {app} has TRUNCATE on the table audit_logs: run `tiger-db grant",
        "the app role {app} has UPDATE on the table audit_logs: run `tiger-db grant",
    ],
    "REVOKE SELECT ON audit_seals FROM {app}": [
        "the app role {app} lacks SELECT on the table audit_seals: run `tiger-db grant {app} --as"
    ],
    "REVOKE UPDATE ON api_keys FROM {app}; GRANT UPDATE (name) ON api_keys TO {app}": [
        "the app role {app} lacks UPDATE (allowed_ips, "
    ],
    "GRANT INSERT (position) ON audit_logs TO {app}": [
        "the app role {app} has INSERT (position) on the table audit_logs: run "
    ],
    "GRANT UPDATE ON SEQUENCE audit_logs_position_seq TO {app}": [
        "the app role {app} has UPDATE on the sequence audit_logs_position_seq: run "
    ],
    "GRANT CREATE ON SCHEMA public TO PUBLIC": [
        "the app role {app} has CREATE on the schema: REVOKE CREATE ON SCHEMA public FROM PUBLIC"
    ],
    "GRANT SELECT (id) ON api_keys TO PUBLIC": [
        'PUBLIC has SELECT (id) on the table api_keys: REVOKE SELECT ("id") ON TABLE '
    ],
    "GRANT DELETE ON audit_logs_default TO {other}; GRANT {other} TO {app}": [
        'the app role {app} has DELETE on the table audit_logs_default: REVOKE {other} FROM "',
        "the role {other} has DELETE on the table audit_logs_default: run ",
    ],
    "GRANT UPDATE ON trading_pauses TO {other}; GRANT CREATE ON SCHEMA public TO {other};"
    " ALTER ROLE {app} NOINHERIT; GRANT {other} TO {app}": [
        'the app role {app} has CREATE on the schema: REVOKE {other} FROM "'
    ],
    "GRANT SELECT ON api_keys TO {app} WITH GRANT OPTION": [
        "the app role {app} may grant SELECT on the table api_keys: run `tiger-db grant"
    ],
    "ALTER ROLE {app} NOINHERIT; GRANT pg_execute_server_program TO {other};"
    " GRANT {other} TO {app}": [
        'the app role {app} is a member of pg_execute_server_program: REVOKE {other} FROM "{app}"'
    ],
    "ALTER SCHEMA public OWNER TO {app}": [
        "the app role {app} owns the database, the schema or objects of tiger_db: change the owner"
    ],
    "ALTER TABLE audit_seals OWNER TO {other}; GRANT {other} TO {app}": [
        "the app role {app} is a member of {other}, which owns the database, the schema or objects"
    ],
    "GRANT pg_write_server_files TO {app}": [
        "the app role {app} is a member of pg_write_server_files: REVOKE pg_write_server_files FROM"
    ],
    "GRANT pg_write_all_data TO {app}; REVOKE SELECT ON audit_seals FROM {app}": [
        "the app role {app} is a member of pg_write_all_data: REVOKE pg_write_all_data FROM ",
        "the app role {app} lacks SELECT on the table audit_seals: run `tiger-db grant {app} --as",
    ],
    "ALTER ROLE {app} REPLICATION BYPASSRLS": [
        'the app role {app} has BYPASSRLS: ALTER ROLE "{app}" NOBYPASSRLS',
        'the app role {app} has REPLICATION: ALTER ROLE "{app}" NOREPLICATION',
    ],
    "ALTER ROLE {app} NOINHERIT; ALTER ROLE {other} REPLICATION; CREATE ROLE between_of_test;"
    " GRANT {other} TO between_of_test; GRANT between_of_test TO {app}": [
        "the app role {app} is a member of {other}, which has REPLICATION: REVOKE between_of_test"
    ],
    "CREATE ROLE between_of_test; GRANT {other} TO between_of_test; GRANT between_of_test TO {app};"
    " GRANT CREATE ON SCHEMA public TO {other}": [
        'the app role {app} has CREATE on the schema: REVOKE between_of_test FROM "{app}"'
    ],
    "GRANT SET ON PARAMETER session_replication_role TO {other};"
    " ALTER ROLE {app} NOINHERIT; GRANT {other} TO {app}": [
        "the app role {app} is a member of {other}, which may disable triggers with session_"
    ],
    "GRANT INSERT ON audit_logs TO {other}": [
        "the role {other} has INSERT on the table audit_logs: run "
    ],
    "GRANT SELECT ON audit_logs TO {other}; GRANT INSERT (id, action) ON audit_logs TO {other}": [],
    "GRANT {owner} TO {app}": [
        "the app role {app} is a member of {owner}, which is a superuser: REVOKE {owner} FROM "
    ],
    "ALTER ROLE {app} SUPERUSER": ["the app role {app} is a superuser: "],
    "GRANT SET ON PARAMETER session_replication_role TO {app}": [
        "the app role {app} may disable triggers with session_replication_role: REVOKE ALL ON PAR"
    ],
    "GRANT SET ON PARAMETER session_replication_role TO PUBLIC": [
        "the app role {app} may disable triggers with session_replication_role: REVOKE ALL ON PAR"
    ],
    "ALTER TABLE audit_seals OWNER TO {app}": [
        "the app role {app} owns the database, the schema or objects of tiger_db: change the owner"
    ],
    "INSERT INTO granted_roles VALUES ('a b', 'auditor')": [
        "the auditor role a b does not exist: create the role, or run `tiger-db revoke-grants 'a b'"
    ],
    'CREATE ROLE "$x PUBLIC"; GRANT UPDATE ON audit_seals TO "$x PUBLIC"': [
        "the role $x PUBLIC has UPDATE on the table audit_seals: run `tiger-db grant '$x PUBLIC'"
    ],
}


@pytest.mark.parametrize("statements", WEAKENED)
async def test_a_privilege_that_differs_is_named(database: Database, statements: str) -> None:
    async with database.engine.connect() as connection:  # rolls back
        owner = await connection.scalar(text("SELECT quote_ident(current_user)"))
        names = {"owner": owner, "app": "app_of_test", "other": "other_of_test"}
        for name in ("app", "other"):
            await connection.exec_driver_sql(f"CREATE ROLE {names[name]}")
        for statement in await roles.statements_for(connection, names["app"], RoleKind.APP):
            await connection.exec_driver_sql(statement)
        assert await find_grant_differences(connection) == []
        for statement in statements.split("; "):
            await connection.exec_driver_sql(statement.format(**names))
        found = [str(difference) for difference in await find_grant_differences(connection)]
    expected = [line.format(**names) for line in WEAKENED[statements]]
    assert len(found) == len(expected), found
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)

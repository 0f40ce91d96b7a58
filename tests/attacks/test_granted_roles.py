"""An attacker with SQL as one of the roles that `tiger-db grant` has given its privileges."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from tests.support.roles import connected_as, granted
from tests.support.sql import months, sql
from tests.support.trail import log, with_signing_key
from tiger_db import AuditAction, AuditLog, Database, audit, doctor
from tiger_db.connections import connect
from tiger_db.errors import InvalidState, PrivilegeMissing
from tiger_db.models import RoleKind

VALUES = (
    "(id, action, result, severity, {}) VALUES (gen_random_uuid(), 'a:b', 'success', 'low', {})"
)
INSERT_TRIGGER = "CREATE TRIGGER t BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION {}"
TRIGGER_FUNCTION = """
CREATE FUNCTION pg_temp.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'
"""
LOW_IDS = """
overlay(gen_random_uuid()::text PLACING '00000000-0000' FROM 1)::uuid, 'a:b', 'success', 'low'
FROM generate_series(1, 20)
"""
ATTACKS = [
    # Squatted positions make honest events look as if they were inserted later.
    "INSERT INTO audit_logs " + VALUES.format("position", "1"),
    "INSERT INTO audit_logs " + VALUES.format("position", "-7"),
    "INSERT INTO audit_logs " + VALUES.format("position", "DEFAULT"),
    "INSERT INTO audit_logs " + VALUES.format("created_at", "'2020-01-01'"),
    "INSERT INTO audit_logs_default " + VALUES.format("user_id", "'x'"),
    f"INSERT INTO {months(0, 0)[0]} " + VALUES.format("user_id", "'x'"),
    "UPDATE audit_logs SET user_id = 'someone else'",
    "DELETE FROM audit_logs",
    "TRUNCATE audit_logs",
    f"TRUNCATE {months(0, 0)[0]}",
    "SELECT setval('audit_logs_position_seq', 1)",
    "ALTER SEQUENCE audit_logs_position_seq CACHE 1000",
    "UPDATE audit_seals SET statement = ''",
    "DELETE FROM audit_seals",
    "TRUNCATE audit_seals",
    "ALTER TABLE audit_logs DISABLE TRIGGER ALL",
    "ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY",
    "CREATE RULE hide AS ON INSERT TO audit_logs DO INSTEAD NOTHING",
    INSERT_TRIGGER.format("set_updated_at()"),
    "ALTER TABLE audit_logs DETACH PARTITION audit_logs_default",
    "DROP TABLE audit_logs_default",
    "LOCK TABLE audit_logs IN SHARE ROW EXCLUSIVE MODE",
    "SET session_replication_role = replica",
    "CREATE TABLE mine (id int)",
    "CREATE FUNCTION now() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "ALTER FUNCTION refuse_audit_change() RENAME TO changed",
    "INSERT INTO granted_roles VALUES ('x', 'sealer')",
    "UPDATE granted_roles SET kind = 'sealer'",
    "UPDATE tiger_db_alembic_version SET version_num = '0001'",
    "SET ROLE {owner}",
    "SET SESSION AUTHORIZATION {owner}",
    "ALTER ROLE {owner} SET search_path = pg_temp",
    "ALTER DATABASE {database} SET search_path = pg_temp",
    "ALTER DEFAULT PRIVILEGES FOR ROLE {owner} GRANT ALL ON TABLES TO PUBLIC",
    "REASSIGN OWNED BY {owner} TO CURRENT_USER",
    "INSERT INTO audit_logs "
    + VALUES.format("user_id", "'x'")
    + " ON CONFLICT (id) DO UPDATE SET user_id = 'y'",
    "MERGE INTO audit_logs USING (SELECT 1) AS s ON true WHEN MATCHED THEN DELETE",
    "COPY audit_logs (id, position) FROM PROGRAM 'true'",
    "COPY audit_logs TO PROGRAM 'true'",
    "COPY audit_logs TO '/nonexistent/file'",
    "SELECT FROM audit_logs FOR UPDATE",
    "SELECT FROM audit_seals FOR KEY SHARE",
    "LOCK TABLE audit_logs IN ROW EXCLUSIVE MODE",
    "LOCK TABLE audit_seals IN ACCESS EXCLUSIVE MODE",
    "SELECT make_audit_months(100)",
    "ALTER SEQUENCE audit_logs_position_seq OWNED BY NONE",
    "ALTER TYPE audit_result ADD VALUE 'x'",
    "CREATE POLICY hide ON audit_logs USING (false)",
    # The role may create temporary tables, which must not refer to tables of tiger_db.
    "CREATE TEMP TABLE child () INHERITS (audit_seals)",
    "CREATE TEMP TABLE mine (); ALTER TABLE mine INHERIT audit_seals",
    "CREATE TEMP TABLE t (LIKE audit_logs); ALTER TABLE audit_logs ATTACH PARTITION t DEFAULT",
    f"{TRIGGER_FUNCTION}; {INSERT_TRIGGER.format('pg_temp.f()')}",
    "CREATE CAST (text AS audit_result) WITH INOUT",
    "CREATE OPERATOR = (leftarg = text, rightarg = text, function = texteq)",
    "CREATE EVENT TRIGGER t ON ddl_command_start EXECUTE FUNCTION refuse_audit_change()",
    "CREATE PUBLICATION p FOR TABLE audit_logs",
    "SELECT pg_create_logical_replication_slot('s', 'pgoutput')",
    "SELECT lo_import('/etc/hostname')",
    "SELECT pg_read_file('PG_VERSION')",
    "LOAD 'auto_explain'",
]


@pytest.fixture
async def app(clone: Database) -> AsyncIterator[Database]:
    """A Database that connects as the role of an application."""
    async with (
        granted(clone.settings, RoleKind.APP) as role,
        Database(connected_as(clone.settings, role)) as database,
    ):
        yield database


@pytest.mark.slow
@pytest.mark.parametrize("kind", RoleKind)
async def test_a_granted_role_cannot_change_the_trail(clone: Database, kind: RoleKind) -> None:
    await log(clone)
    owner = await sql(clone.settings, "SELECT quote_ident(current_user)")
    names = {"owner": owner, "database": clone.settings.database}
    async with granted(clone.settings, kind) as role:
        connection = await connect(connected_as(clone.settings, role))
        for attack in ATTACKS:
            *before, statement = re.split("; (?=[A-Z]{5})", attack.format(**names))
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with connection.transaction():
                    for allowed in before:
                        try:
                            await connection.execute(allowed)
                        except asyncpg.PostgresError as error:
                            pytest.fail(f"{attack}: {error}")
                    await connection.execute(statement)
                pytest.fail(attack)
        assert await connection.fetchval("SELECT count(*) FROM audit_logs") == 1
        await connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["no JSON", '{"upto": "no number"}', '{"upto": 1}'])
async def test_a_seal_that_a_sealer_without_the_key_has_made_up(
    clone: Database, statement: str
) -> None:
    signing = with_signing_key(clone.settings)
    await log(clone)
    async with granted(signing, RoleKind.SEALER) as role:
        settings = connected_as(signing, role)
        async with Database(settings) as sealer:
            await audit.seal(sealer)
            made_up = f"INSERT INTO audit_seals VALUES (2, '{statement}', '', '')"
            await sql(settings, made_up, "SELECT 1")
            with pytest.raises(InvalidState, match="nothing was sealed"):
                await audit.seal(sealer)
            with pytest.raises(InvalidState, match="the number 2: the payload of the seal"):
                await audit.export_checkpoint(sealer)
            report = await audit.verify(sealer)
    assert [(found.seal, found.kind) for found in report.findings] == [(2, "seal forged")]
    (result,) = [r for r in await doctor.run(clone.settings) if r.check == "unsealed events"]
    assert result.status == "problem"
    assert result.seen.endswith("has the number 2: the payload of the seal is invalid")


@pytest.mark.parametrize(
    "field", [{"position": 5}, {"created_at": datetime(2020, 1, 1, tzinfo=UTC)}]
)
async def test_the_application_cannot_choose_when_an_event_was_written(
    app: Database, field: dict[str, Any]
) -> None:
    with pytest.raises(PrivilegeMissing, match="permission denied for table audit_logs"):
        async with app.session() as session:
            session.add(AuditLog(action=AuditAction.DATA_QUERY, **field))


@pytest.mark.slow
async def test_honest_events_are_not_accused(clone: Database, app: Database) -> None:
    """The attacker skips positions, and records events with the lowest ids."""
    signing = with_signing_key(clone.settings)
    async with (
        granted(signing, RoleKind.SEALER) as sealer,
        granted(signing, RoleKind.AUDITOR) as auditor,
    ):
        for _ in range(2):
            await log(app)
            await sql(
                app.settings,
                "SELECT nextval('audit_logs_position_seq') FROM generate_series(1, 20)",
                f"INSERT INTO audit_logs (id, action, result, severity) SELECT {LOW_IDS}",
                "SELECT 1",
            )
            await log(app)
            async with Database(connected_as(signing, sealer)) as database:
                assert (await audit.seal(database)).rows == 22
        async with Database(connected_as(signing, auditor)) as database:
            report = await audit.verify(database)
    assert (report.sound, report.rows, report.warnings) == (True, 44, [])

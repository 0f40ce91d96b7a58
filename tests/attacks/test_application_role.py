"""An attacker with SQL as the role that `tiger-db grant ROLE --as app` has given its privileges."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

from tests.support.roles import connected_as, granted
from tests.support.sql import months, sql
from tiger_db import AuditAction, AuditLog, Database, audit, crud
from tiger_db.connections import connect
from tiger_db.errors import PrivilegeMissing
from tiger_db.models import RoleKind
from tiger_db.signing import generate_signing_key

VALUES = (
    "(id, action, result, severity, {}) VALUES (gen_random_uuid(), 'a:b', 'success', 'low', {})"
)
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
    "INSERT INTO audit_seals VALUES (1, '', '', '')",
    "UPDATE audit_seals SET statement = ''",
    "DELETE FROM audit_seals",
    "TRUNCATE audit_seals",
    "ALTER TABLE audit_logs DISABLE TRIGGER ALL",
    "ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY",
    "CREATE RULE hide AS ON INSERT TO audit_logs DO INSTEAD NOTHING",
    "CREATE TRIGGER t BEFORE INSERT ON audit_logs FOR EACH ROW EXECUTE FUNCTION set_updated_at()",
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
]


@pytest.fixture
async def app(clone: Database) -> AsyncIterator[Database]:
    """A Database that connects as the role of an application."""
    async with (
        granted(clone.settings, RoleKind.APP) as role,
        Database(connected_as(clone.settings, role)) as database,
    ):
        yield database


async def test_the_application_cannot_change_the_trail(clone: Database, app: Database) -> None:
    async with clone.session() as session:
        await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
    connection = await connect(app.settings)
    try:
        owner = await sql(clone.settings, "SELECT quote_ident(current_user)")
        for attack in ATTACKS:
            statement = attack.format(owner=owner)
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with connection.transaction():
                    await connection.execute(statement)
                pytest.fail(attack)
        assert await connection.fetchval("SELECT count(*) FROM audit_logs") == 1
    finally:
        await connection.close()


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
    key = SecretStr(generate_signing_key())
    signing = clone.settings.model_copy(update={"audit_signing_key": key})
    async with (
        granted(signing, RoleKind.SEALER) as sealer,
        granted(signing, RoleKind.AUDITOR) as auditor,
    ):
        for _ in range(2):
            async with app.session() as session:
                await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
            await sql(
                app.settings,
                "SELECT nextval('audit_logs_position_seq') FROM generate_series(1, 20)",
                f"INSERT INTO audit_logs (id, action, result, severity) SELECT {LOW_IDS}",
                "SELECT 1",
            )
            async with app.session() as session:
                await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
            async with Database(connected_as(signing, sealer)) as database:
                assert (await audit.seal(database)).rows == 22
        async with Database(connected_as(signing, auditor)) as database:
            report = await audit.verify(database)
    assert (report.sound, report.rows, report.warnings) == (True, 44, [])

"""Roles that reach more than their grants, as a member of another role or as an owner."""

import asyncpg
import pytest

from tests.support.roles import connected_as, granted, new_role
from tests.support.sql import months, sql
from tiger_db import Database, Settings, audit
from tiger_db.connections import maintenance_engine
from tiger_db.errors import InvalidValue
from tiger_db.migrations import roles, upgrade
from tiger_db.migrations.grants import find_grant_differences
from tiger_db.models import RoleKind

pytestmark = pytest.mark.slow

BACKDATED = """
INSERT INTO audit_logs (id, action, result, severity, position)
VALUES (gen_random_uuid(), 'a:b', 'success', 'low', 1)
"""


async def grant(settings: Settings, role: str) -> list[str]:
    async with maintenance_engine(settings) as engine:
        return await roles.grant(engine, role, RoleKind.APP)


async def differences(settings: Settings) -> list[str]:
    async with maintenance_engine(settings) as engine, engine.connect() as connection:
        return [str(difference) for difference in await find_grant_differences(connection)]


@pytest.mark.parametrize("inherits", ["INHERIT", "NOINHERIT"])
async def test_a_member_of_a_role_with_more_privileges(
    clone_settings: Settings, inherits: str
) -> None:
    """SET ROLE needs no inheritance of privileges."""
    async with new_role(clone_settings) as group, new_role(clone_settings, inherits) as role:
        await sql(
            clone_settings, f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {group}",
            f"GRANT {group} TO {role}", "SELECT 1",
        )  # fmt: skip
        app = connected_as(clone_settings, role)
        excess, name = await grant(clone_settings, role), f"the app role {role}"
        assert excess == [d for d in await differences(clone_settings) if name in d]
        repair = f'REVOKE {group} FROM "{role}"'
        assert f"{name} has INSERT (created_at, position) on the table audit_logs: {repair}" in (
            excess
        )
        assert {line.rpartition(": ")[2] for line in excess} == {repair}
        await sql(app, f"SET ROLE {group}", BACKDATED, "SELECT 1")
        await sql(clone_settings, f"REVOKE {group} FROM {role}", "SELECT 1")
        assert not any(name in line for line in await differences(clone_settings))


@pytest.mark.parametrize(
    "power", ["REPLICATION", "BYPASSRLS", "CREATEROLE", "pg_write_all_data", "pg_read_server_files"]
)
async def test_a_role_with_a_power_that_no_grant_restricts(
    clone_settings: Settings, power: str
) -> None:
    """A grant refuses the role, and a migration of a role that had grants before names it."""
    give = f"ALTER ROLE {{}} {power}" if power.isupper() else f"GRANT {power} TO {{}}"
    async with new_role(clone_settings) as role:
        await sql(clone_settings, give.format(role), "SELECT 1")
        version = await sql(clone_settings, "SELECT current_setting('server_version_num')::int")
        if power == "CREATEROLE" and int(str(version)) >= 160000:
            await grant(clone_settings, role)  # such a role may no longer grant any role to itself
            return
        expected = f"has {power}" if power.isupper() else f"is a member of {power}"
        with pytest.raises(InvalidValue, match=f"{expected}, so that no grant restricts it"):
            await grant(clone_settings, role)
    async with granted(clone_settings, RoleKind.SEALER) as role:
        lost = f"REVOKE SELECT ON audit_logs FROM {role}"
        await sql(clone_settings, give.format(role), lost, "SELECT 1")
        async with maintenance_engine(clone_settings) as engine:
            await upgrade(engine)
        found = "\n".join(await differences(clone_settings))
        assert f"the sealer role {role} {expected}: " in found
        may = f"SELECT has_table_privilege('{role}', 'audit_logs', 'SELECT')"
        assert await sql(clone_settings, may)


async def test_a_member_of_a_superuser(clone_settings: Settings) -> None:
    async with (
        new_role(clone_settings, "SUPERUSER") as superuser,
        granted(clone_settings, RoleKind.APP) as role,
    ):
        await sql(clone_settings, f"GRANT {superuser} TO {role}", "SELECT 1")
        await sql(
            connected_as(clone_settings, role), f"SET ROLE {superuser}",
            "SET session_replication_role = replica", "DELETE FROM audit_logs", "SELECT 1",
        )  # fmt: skip
        (found,) = await differences(clone_settings)
        assert found.endswith(f', which is a superuser: REVOKE {superuser} FROM "{role}"')
        with pytest.raises(InvalidValue, match="which is a superuser, so that no grant"):
            await grant(clone_settings, role)


@pytest.mark.parametrize("owned", ["SCHEMA public", "DATABASE {database}"])
async def test_an_owner_of_the_schema_or_the_database(clone_settings: Settings, owned: str) -> None:
    """The owner of a schema may drop the tables of others, and owns public with the database."""
    async with granted(clone_settings, RoleKind.APP) as role:
        change = f"ALTER {owned.format(database=clone_settings.database)} OWNER TO {{}}"
        await sql(clone_settings, change.format(role), "SELECT 1")
        try:
            (found,) = await differences(clone_settings)
            assert found.startswith(f"the app role {role} owns the database, the schema or obj")
            with pytest.raises(InvalidValue, match="so that no grant restricts it"):
                await grant(clone_settings, role)
            await sql(connected_as(clone_settings, role), "DROP TABLE audit_logs", "SELECT 1")
        finally:
            await sql(clone_settings, change.format("CURRENT_USER"), "SELECT 1")


async def test_a_role_that_has_passed_its_privileges_on(clone_settings: Settings) -> None:
    """A grant ends the option to grant, and what others have received by it."""
    async with new_role(clone_settings) as role, new_role(clone_settings) as other:
        app = connected_as(clone_settings, role)
        for revoke in (False, True):
            await sql(
                clone_settings,
                f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role} WITH GRANT OPTION",
                f"GRANT ALL ON SCHEMA public TO {role} WITH GRANT OPTION",
                "SELECT 1",
            )
            await sql(
                app, f"GRANT UPDATE ON audit_logs TO {other}",
                f"GRANT CREATE ON SCHEMA public TO {other}", "SELECT 1",
            )  # fmt: skip
            if revoke:
                async with maintenance_engine(clone_settings) as engine:
                    await roles.revoke_grants(engine, role)
            else:
                assert await grant(clone_settings, role) == []
            assert await differences(clone_settings) == []
            for privilege in ("CREATE", "USAGE WITH GRANT OPTION"):
                may = f"SELECT has_schema_privilege('{other}', 'public', '{privilege}')"
                assert not await sql(clone_settings, may)


async def test_default_privileges_on_new_partitions_are_revoked(clone_settings: Settings) -> None:
    async with granted(clone_settings, RoleKind.APP) as role:
        await sql(
            clone_settings, f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {role}",
            f"DROP TABLE {months(12, 12)[0]}", "SELECT 1",
        )  # fmt: skip
        async with Database(clone_settings) as database:
            assert (await audit.maintain(database)).made == 1
        assert await differences(clone_settings) == []


@pytest.mark.parametrize("name", ["a%s  b:c\"d'e\n$1 \\", "ü" * 31, "--help", "`id` $(id)"])
async def test_a_role_with_an_odd_name(clone_settings: Settings, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    await sql(clone_settings, f"CREATE ROLE {quoted}", "SELECT 1")
    try:
        assert await grant(clone_settings, name) == []
        assert await sql(clone_settings, "SELECT role FROM granted_roles") == name
        assert await differences(clone_settings) == []
        async with maintenance_engine(clone_settings) as engine:
            await roles.revoke_grants(engine, name)
        assert await sql(clone_settings, "SELECT count(*) FROM granted_roles") == 0
    finally:
        await sql(clone_settings, f"DROP OWNED BY {quoted}", f"DROP ROLE {quoted}", "SELECT 1")


async def test_a_predefined_role_is_refused(clone_settings: Settings) -> None:
    with pytest.raises(InvalidValue, match="predefined by PostgreSQL"):
        await grant(clone_settings, "pg_read_all_data")
    with pytest.raises(asyncpg.ReservedNameError):
        await sql(clone_settings, 'CREATE ROLE "public"', "SELECT 1")

"""Functions, views and rules that lend a role the privileges of the owner of the audit trail."""

import pytest

from tests.support.roles import connected_as, granted, new_role
from tests.support.sql import sql
from tests.support.trail import log_seals, with_signing_key
from tiger_db import Database, Settings, audit, doctor
from tiger_db.connections import maintenance_engine
from tiger_db.migrations import drift
from tiger_db.migrations.grants import find_definers
from tiger_db.models import RoleKind

pytestmark = pytest.mark.slow

COLUMNS = "id, action, result, severity, position"
VALUES = "gen_random_uuid(), 'a:b', 'success', 'low', 1"
FUNCTION = f"""
CREATE FUNCTION {{}}() RETURNS void LANGUAGE sql SECURITY DEFINER
BEGIN ATOMIC INSERT INTO public.audit_logs ({COLUMNS}) VALUES ({VALUES}); END"""
PROCEDURE = FUNCTION.replace("FUNCTION", "PROCEDURE").replace("RETURNS void", "")
VIEW = f"CREATE VIEW v AS SELECT {COLUMNS} FROM audit_logs"
WRITE = f"INSERT INTO v ({COLUMNS}) VALUES ({VALUES})"
RULE = (
    f"CREATE RULE r AS ON INSERT TO t DO ALSO INSERT INTO audit_logs ({COLUMNS}) VALUES ({VALUES})"
)
# What the owner does, by name, and the statement by which the app then chooses a position.
DEFINERS = {
    "function public.f()": ([FUNCTION.format("f")], "SELECT f()"),
    "procedure public.f()": ([PROCEDURE.format("f")], "CALL f()"),
    "function other.f()": (
        ["CREATE SCHEMA other", FUNCTION.format("other.f"), "GRANT USAGE ON SCHEMA other TO {app}"],
        "SELECT other.f()",
    ),
    "function other.g()": (
        ["CREATE SCHEMA other", FUNCTION.format("other.g"), "GRANT {group} TO {app}",
         "REVOKE EXECUTE ON FUNCTION other.g() FROM PUBLIC",
         "GRANT EXECUTE ON FUNCTION other.g() TO {group}",
         "GRANT USAGE ON SCHEMA other TO {group}"],
        "SET ROLE {group}; SELECT other.g()",
    ),
    "view public.v": ([VIEW, "GRANT INSERT ON v TO {app}"], WRITE),
    "view public.w": (
        [VIEW, "CREATE VIEW w AS SELECT * FROM v", f"GRANT INSERT ({COLUMNS}) ON w TO {{app}}"],
        WRITE.replace("v (", "w ("),
    ),
    "the rules of the table public.t": (
        ["CREATE TABLE t (n int)", RULE, "GRANT INSERT ON t TO {app}"], "INSERT INTO t VALUES (1)",
    ),
}  # fmt: skip
# What is no way to change the trail, or belongs to an extension.
HARMLESS = [
    [FUNCTION.format("f"), "REVOKE EXECUTE ON FUNCTION f() FROM PUBLIC"],
    [FUNCTION.format("f"), "ALTER EXTENSION plpgsql ADD FUNCTION f()"],
    [FUNCTION.format("f").replace("DEFINER", "INVOKER")],
    [FUNCTION.format("f"), "GRANT CREATE ON SCHEMA public TO {group}",
     "ALTER FUNCTION f() OWNER TO {group}", "REVOKE CREATE ON SCHEMA public FROM {group}"],
    ["CREATE SCHEMA other", FUNCTION.format("other.f")],
    [VIEW, "GRANT SELECT ON v TO {app}"],
    [VIEW, "GRANT INSERT ON v TO {app}", "ALTER VIEW v SET (security_invoker = true)"],
    ["CREATE VIEW v AS SELECT count(*) FROM audit_logs", "GRANT ALL ON v TO {app}"],
    ["CREATE TABLE t (n int)", "GRANT INSERT ON t TO {app}",
     "CREATE RULE r AS ON INSERT TO t DO ALSO NOTHING"],
]  # fmt: skip


async def definers(settings: Settings) -> list[str]:
    async with maintenance_engine(settings) as engine, engine.connect() as connection:
        return [str(found) for found in await find_definers(connection)]


@pytest.mark.parametrize("name", DEFINERS)
async def test_a_way_around_the_grants_is_named(clone_settings: Settings, name: str) -> None:
    signing = with_signing_key(clone_settings)
    async with (
        Database(signing) as database,
        new_role(signing) as group,
        granted(signing, RoleKind.APP) as app,
        granted(signing, RoleKind.AUDITOR) as auditor,
    ):
        await log_seals(database, 1)
        before = await drift(database.engine)
        statements, attack = DEFINERS[name]
        names = {"app": app, "group": group}
        await sql(signing, *(text.format(**names) for text in statements), "SELECT 1")
        found = await definers(signing)
        assert any(name in text and app in text for text in found), found
        assert all(name in text or text.startswith("the view public.v") for text in found)
        assert {*found} <= {*await drift(database.engine)} - {*before}
        (result,) = [r for r in await doctor.run(signing) if r.check == "database roles"]
        assert result.status == "problem"
        assert found[0].partition(": ")[0] in result.seen
        async with Database(connected_as(signing, auditor)) as verifier:
            report = await audit.verify(verifier)
            assert report.findings == []
            assert {text.partition(": ")[0] for text in found} == {
                warning.message for warning in report.warnings
            }
        await sql(connected_as(signing, app), *attack.format(**names).split("; "), "SELECT 1")
        assert [one.kind for one in (await audit.verify(database)).findings] == [
            "two events in one position"
        ]
        for text in found:
            repair = text.partition(": ")[2].partition(", or give")[0]
            await sql(signing, repair, "SELECT 1")
        if group not in attack.format(**names):
            assert await definers(signing) == []


@pytest.mark.parametrize("statements", HARMLESS)
async def test_what_leads_nowhere_is_not_named(
    clone_settings: Settings, statements: list[str]
) -> None:
    async with new_role(clone_settings) as group, granted(clone_settings, RoleKind.APP) as app:
        names = {"app": app, "group": group}
        await sql(clone_settings, *(text.format(**names) for text in statements), "SELECT 1")
        assert await definers(clone_settings) == []
        await sql(clone_settings, "DROP SCHEMA IF EXISTS other CASCADE", "SELECT 1")

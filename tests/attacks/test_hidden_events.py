"""Events that are hidden, or could be, do not verify: attacks A6 and A7 of the red team."""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit
from uuid import uuid4

import pytest
from pydantic import SecretStr

from tests.support.trail import log, log_seals, with_signing_key
from tiger_db import Database, Settings, audit, doctor
from tiger_db.audit import FindingKind
from tiger_db.audit.storage import Connection
from tiger_db.connections import connect
from tiger_db.errors import SchemaMismatch, StatementRefused

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
ON_LOGS, ON_SEALS = "trigger refuse_change on audit_logs", "trigger refuse_change on audit_seals"
SWITCHES = {
    "ALTER TABLE audit_logs DISABLE TRIGGER USER": f"{ON_LOGS} is disabled",
    "ALTER TABLE audit_logs_default DISABLE TRIGGER refuse_truncate": (
        "trigger refuse_truncate on audit_logs_default is disabled"
    ),
    "ALTER TABLE audit_seals DISABLE TRIGGER USER": f"{ON_SEALS} is disabled",
    "DROP TRIGGER refuse_change ON audit_seals": f"{ON_SEALS} is missing",
    "ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY": "row security of audit_logs is enabled",
    "ALTER TABLE audit_seals FORCE ROW LEVEL SECURITY": "row security of audit_seals is forced",
    "CREATE POLICY hide ON audit_logs USING (user_id <> 'mallory')": (
        "audit_logs has the row security policy hide"
    ),
    "CREATE RULE hide AS ON INSERT TO audit_seals DO ALSO NOTHING": "audit_seals has the rule hide",
    "CREATE OR REPLACE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql"
    " AS 'BEGIN RETURN NEW; END'": "function refuse_audit_change",
    "ALTER TABLE audit_seals SET UNLOGGED": "audit_seals is unlogged, so that a crash empties it",
    "ALTER TABLE audit_logs ALTER user_id SET DEFAULT 'x'": (
        "column user_id of audit_logs has the default 'x'::text"
    ),
    "ALTER TABLE audit_logs ALTER created_at DROP DEFAULT": (
        "column created_at of audit_logs has no default"
    ),
    "ALTER TABLE audit_seals ALTER digests SET DEFAULT ''": (
        "column digests of audit_seals has the default"
    ),
    "CREATE TRIGGER change BEFORE INSERT ON audit_logs FOR EACH ROW"
    " EXECUTE FUNCTION set_updated_at()": "trigger change on audit_logs is not declared",
}


@pytest.fixture
async def database(clone_settings: Settings) -> AsyncIterator[Database]:
    """Five sealed events."""
    async with Database(with_signing_key(clone_settings)) as database:
        await log_seals(database, 5)
        yield database


@pytest.fixture
async def owner(database: Database) -> AsyncIterator[Connection]:
    connection = await connect(database.settings)
    yield connection
    await connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
async def test_weakened_protection_is_a_finding_and_sealing_goes_on(
    database: Database, owner: Connection, switch: str
) -> None:
    if "TRIGGER change" not in switch:
        await log(database, 1)
    assert (await audit.verify(database)).sound
    await owner.execute(switch)
    assert (await audit.seal(database)).rows == (0 if "TRIGGER change" in switch else 1)
    found = await audit.verify(database)
    assert {one.kind for one in found.findings} == {FindingKind.PROTECTION}
    assert any(one.message.startswith(SWITCHES[switch]) for one in found.findings), found.findings
    results = {result.check: result.status for result in await doctor.run(database.settings)}
    assert results["triggers and functions"] != "ok"


@pytest.mark.slow
async def test_events_that_are_never_sealed_are_noticed(
    database: Database, owner: Connection
) -> None:
    """The owner could change them for ever."""

    async def unsealed_events() -> str:
        results = await doctor.run(database.settings)
        (seen,) = [result.seen for result in results if result.check == "unsealed events"]
        return seen

    assert await unsealed_events() == "none"
    await owner.execute(
        "INSERT INTO audit_logs (id, position, action, result, severity)"
        " VALUES (gen_random_uuid(), 1000000, 'a:b', 'success', 'low')"
    )
    assert (await audit.seal(database)).rows == 0
    expected = "events at positions that the sequence has not assigned: 1"
    assert await unsealed_events() == expected
    await log_seals(database, 1)
    assert await unsealed_events() == expected


async def seal(database: Database) -> None:
    await audit.seal(database)


async def verify(database: Database) -> None:
    await audit.verify(database)


async def export(database: Database) -> None:
    assert [line async for line in audit.export(database)]


async def export_some(database: Database) -> None:
    assert [line async for line in audit.export(database, since=LONG_AGO)]


USES: list[Callable[[Database], Awaitable[None]]] = [seal, verify, export, export_some]


@pytest.fixture
async def reader(database: Database, owner: Connection) -> AsyncIterator[Database]:
    """The same database for a role to which row security applies."""
    role = f"reader_{uuid4().hex[:12]}"
    await owner.execute(f"CREATE ROLE {role}; GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
    await owner.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
    assert database.settings.database_url is not None
    url = urlsplit(database.settings.database_url.get_secret_value())
    query = "&".join(filter(None, (url.query, f"options={quote(f'-crole={role}')}")))
    changed = {"database_url": SecretStr(url._replace(query=query).geturl())}
    async with Database(database.settings.model_copy(update=changed)) as reader:
        yield reader
    await owner.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
async def test_row_security_hides_nothing_silently(
    reader: Database, owner: Connection, use: Callable[[Database], Awaitable[None]]
) -> None:
    """The attack A6: the policy shows all events to queries of the verification only."""
    await log(reader, 1)
    await use(reader)
    await owner.execute(
        "ALTER TABLE audit_logs ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY hide ON audit_logs USING"
        " (user_id <> 'mallory' OR current_query() LIKE '%concat(%')"
    )
    await log(reader, 0)
    reason = "would be affected by row-level security .* `tiger-db check` prints the SQL"
    with pytest.raises(StatementRefused, match=reason):
        await use(reader)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "replace",
    [
        "ALTER TABLE audit_logs RENAME TO kept; CREATE VIEW audit_logs AS TABLE kept",
        "ALTER TABLE audit_seals RENAME TO kept; CREATE VIEW audit_seals AS TABLE kept",
        "ALTER TABLE audit_logs RENAME TO kept; CREATE TABLE audit_logs (LIKE kept INCLUDING ALL)",
    ],
)
async def test_another_relation_in_place_of_a_table_is_refused(
    database: Database,
    owner: Connection,
    use: Callable[[Database], Awaitable[None]],
    replace: str,
) -> None:
    await owner.execute(replace)
    with pytest.raises(SchemaMismatch, match="is not a table of tiger_db, but another relation"):
        await use(database)

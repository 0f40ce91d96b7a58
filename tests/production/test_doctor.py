"""The doctor on databases that are well, and with each trouble made for real."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlsplit
from uuid import uuid4

import asyncpg
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from tests.production.cluster import Cluster, needs_postgresql
from tests.support import factories
from tests.support.encryption_keys import OTHER_KEY
from tests.support.sql import months, sql
from tests.support.waiting import until
from tiger_db import AuditAction, Database, Settings, crud
from tiger_db.audit import seal
from tiger_db.connections import connect
from tiger_db.doctor import Finding, doctor, server, tables
from tiger_db.signing import generate_signing_key

NOW = datetime.now(UTC)
# What other tests do to the same server can show in these.
SHARED = {"connections", "replication", "replication slots", "wraparound"}


async def found(settings: Settings, check: str) -> Finding:
    (finding,) = [finding for finding in await doctor(settings) if finding.check == check]
    assert "\n" not in finding.seen + (finding.advice or "")
    return finding


@pytest.fixture
async def other(clone_settings: Settings) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A session of somebody else's."""
    arguments = {"server_settings": {"application_name": "report"}}
    connection = await asyncpg.connect(**{**clone_settings.connect_args(), **arguments})
    yield connection
    await connection.close()


async def test_a_healthy_database_has_no_problem(clone: Database, clone_settings: Settings) -> None:
    async with clone.session() as session:
        await factories.account(session)
        await factories.api_key(session)
    findings = await doctor(clone_settings)
    assert len({finding.check for finding in findings}) == len(findings) == 19
    assert {f.status for f in findings if f.check not in SHARED} == {"ok"}, findings
    assert all(finding.advice is None for finding in findings if finding.status == "ok")
    by_check = {finding.check: finding.seen for finding in findings}
    assert "idle" in by_check["connections"]
    assert by_check["encryption keys"] == "test: 1 rows of tiger_accounts"


@pytest.mark.slow
async def test_active_keys_whose_hashes_have_no_pepper(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        keys = [(await factories.api_key(session))[0] for _ in range(5)]
    check = "API key hashes"
    assert (await found(clone_settings, check)).status == "ok"
    await sql(
        clone_settings,
        "UPDATE api_keys SET pepper_id = NULL",
        f"UPDATE api_keys SET status = 'revoked' WHERE id = '{keys[0].id}'",
        f"UPDATE api_keys SET expires_at = now() WHERE id = '{keys[1].id}'",
        f"UPDATE api_keys SET pepper_id = 'test' WHERE id = '{keys[2].id}'",
    )
    today = datetime.now(UTC).date()
    days = {None: "problem", today - timedelta(days=1): "problem", today: "warning"}
    for day, status in days.items():
        allowing = clone_settings.model_copy(update={"api_keys_allow_unpeppered_until": day})
        finding = await found(allowing, check)
        assert finding.status == status
        assert finding.seen.startswith(
            "2 active keys have hashes without a pepper:"
            f" {keys[3].key_prefix}; {keys[4].key_prefix}; "
        )
        end = f"accepted until the end of {today} (UTC)" if status == "warning" else "refused"
        assert finding.seen.endswith(end)
        assert finding.advice is not None
        assert "revoke those that you did not make, `rotate-api-key` the others" in finding.advice


async def test_a_long_transaction(
    clone_settings: Settings,
    other: "asyncpg.Connection[asyncpg.Record]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with other.transaction():
        await other.execute("SELECT FROM tiger_accounts")
        named = f"pid {other.get_server_pid()} (report, idle in transaction)"
        finding = await found(clone_settings, "longest transaction")
        assert (finding.status, finding.advice) == ("ok", None)
        assert named in finding.seen
        monkeypatch.setattr(server, "OPEN", (0, 0))
        finding = await found(clone_settings, "longest transaction")
    assert finding.status == "problem"
    assert finding.advice is not None
    assert f"pg_terminate_backend({other.get_server_pid()})" in finding.advice


@pytest.mark.slow
async def test_a_blocked_session(
    clone_settings: Settings, other: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    second, third = await connect(clone_settings), await connect(clone_settings)
    async with other.transaction():
        await other.execute("LOCK TABLE api_key_batches")
        waiting = [
            asyncio.create_task(connection.execute("SELECT FROM api_key_batches FOR UPDATE"))
            for connection in (second, third)
        ]
        async with asyncio.timeout(20):
            while True:
                finding = await found(clone_settings, "blocked sessions")
                if finding.status == "warning" and finding.seen.count("waits") > 1:
                    break
    await asyncio.gather(*waiting)
    for connection in (second, third):
        assert f"pid {connection.get_server_pid()} (tiger_db) waits" in finding.seen
        await connection.close()
    first = other.get_server_pid()
    assert f"for pid {first} (report, idle in transaction)" in finding.seen
    assert finding.advice is not None
    assert f"pg_terminate_backend({first})" in finding.advice
    assert (await found(clone_settings, "blocked sessions")).seen == "none"


@pytest.mark.slow
async def test_a_locked_table_keeps_no_other_check_waiting(
    clone_settings: Settings, other: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    async with other.transaction():
        await other.execute("LOCK TABLE api_keys")
        findings = {finding.check: finding for finding in await doctor(clone_settings)}
    assert findings["API keys"].status == "warning"
    assert "lock timeout" in findings["API keys"].seen
    assert findings["encryption keys"].status == "ok"


@pytest.mark.slow
async def test_unsealed_events(
    clone: Database, clone_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with clone.session() as session:
        for _ in range(3):
            await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
    finding = await found(clone_settings, "unsealed events")
    assert finding.status == "ok"
    assert finding.seen.startswith("3 events at most, the oldest of ")
    monkeypatch.setattr(tables, "UNSEALED", (0, 0))
    finding = await found(clone_settings, "unsealed events")
    assert (finding.status, finding.advice) == ("warning", "run `tiger-db seal-audit` every minute")
    key = SecretStr(generate_signing_key())
    async with Database(clone_settings.model_copy(update={"audit_signing_key": key})) as signing:
        await seal(signing)
        assert (await found(clone_settings, "unsealed events")).seen == "none"
        async with clone.session() as session:
            await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
    finding = await found(clone_settings, "unsealed events")
    assert finding.status == "problem", "who has sealed once means to go on"
    assert finding.seen.startswith("1 events")


@pytest.mark.slow
async def test_overdue_refreshes_and_leases_that_ran_out(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        await factories.claim(session)
        await factories.refresh(session)
        await factories.refresh(session)
    assert (await found(clone_settings, "refreshes")).status == "ok"
    await sql(
        clone_settings,
        "UPDATE token_statuses SET scheduled_at = scheduled_at - interval '10 min',"
        " lease_expires_at = lease_expires_at - interval '10 min'",
    )
    finding = await found(clone_settings, "refreshes")
    assert finding.status == "warning"
    assert finding.seen == "2 are due, 1 have lost their worker, for 10 min"
    await sql(clone_settings, "UPDATE token_statuses SET scheduled_at = now() - interval '3 h'")
    finding = await found(clone_settings, "refreshes")
    assert (finding.status, finding.seen[-3:]) == ("problem", "3 h")
    assert finding.advice is not None
    await sql(clone_settings, "UPDATE tiger_accounts SET status = 'suspended'")
    assert (await found(clone_settings, "refreshes")).seen == "none is overdue"


@pytest.mark.slow
async def test_tokens_that_nobody_refreshes(clone: Database, clone_settings: Settings) -> None:
    async with clone.session() as session:
        await factories.account_with_token(session)
    assert (await found(clone_settings, "tokens")).status == "ok"
    stale = "UPDATE tiger_accounts SET token_refresh_at = now() - interval '2 h'"
    await sql(clone_settings, stale)
    finding = await found(clone_settings, "tokens")
    assert (finding.status, finding.seen) == (
        "warning", "1 are due for a refresh, for 2 h; 0 have expired"
    )  # fmt: skip
    await sql(clone_settings, "UPDATE tiger_accounts SET token_expires_at = now()")
    assert (await found(clone_settings, "tokens")).status == "problem"


async def test_a_key_that_expires_soon(clone: Database, clone_settings: Settings) -> None:
    async with clone.session() as session:
        key, _ = await factories.api_key(session, expires_at=NOW + timedelta(days=3, hours=1))
        await factories.api_key(session, expires_at=NOW + timedelta(days=6))
        await factories.api_key(session, expires_at=NOW + timedelta(days=9))
    finding = await found(clone_settings, "API keys")
    assert finding.status == "warning"
    assert finding.seen == f"2 expire within 7 days, {key.key_prefix} in 3 d"


@pytest.mark.schema_changes
@pytest.mark.parametrize(("dropped", "status"), [(1, "problem"), (2, "warning"), (3, "ok")])
async def test_months_that_are_missing(clone_settings: Settings, dropped: int, status: str) -> None:
    await sql(clone_settings, f"DROP TABLE {', '.join(months(dropped, 12))}")
    finding = await found(clone_settings, "audit partitions")
    assert finding.status == status
    assert f"for {dropped - 1} months" in finding.seen


async def test_an_invalid_index(clone: Database, clone_settings: Settings) -> None:
    async with clone.session() as session:
        await factories.account(session)
        await factories.account(session)
    with pytest.raises(asyncpg.UniqueViolationError):
        await sql(
            clone_settings,
            "CREATE UNIQUE INDEX CONCURRENTLY twice ON tiger_accounts (account_name)",
        )
    finding = await found(clone_settings, "invalid indexes")
    assert (finding.status, finding.seen) == ("problem", "twice (unique)")
    assert finding.advice is not None
    assert "REINDEX INDEX CONCURRENTLY twice" in finding.advice
    await sql(clone_settings, "DROP INDEX twice")
    assert (await found(clone_settings, "invalid indexes")).status == "ok"


@pytest.mark.schema_changes
async def test_dead_rows(clone_settings: Settings) -> None:
    await sql(
        clone_settings,
        "CREATE TABLE notes (n int) WITH (autovacuum_enabled = false)",
        "INSERT INTO notes SELECT generate_series(1, 3000)",
        "DELETE FROM notes WHERE n <= 1500",
        "SELECT pg_stat_force_next_flush()",
    )
    finding = await found(clone_settings, "dead rows")
    assert finding.status == "warning"
    assert finding.seen == "notes 50% (1,500), vacuumed never"
    assert finding.advice is not None
    assert "VACUUM notes" in finding.advice
    await sql(clone_settings, "VACUUM notes", "SELECT pg_stat_force_next_flush()")
    assert (await found(clone_settings, "dead rows")).status == "ok"


@pytest.mark.slow
@pytest.mark.schema_changes
async def test_an_index_that_nobody_uses(clone_settings: Settings) -> None:
    await sql(
        clone_settings,
        "CREATE TABLE notes (n int UNIQUE, m int, o int) PARTITION BY RANGE (n)",
        "CREATE INDEX never ON notes (m)",
        "CREATE INDEX used ON notes (o)",
        "CREATE TABLE notes_1 PARTITION OF notes FOR VALUES FROM (0) TO (40000)",
        "CREATE TABLE notes_2 PARTITION OF notes FOR VALUES FROM (40000) TO (90000)",
        "INSERT INTO notes SELECT n, n, n FROM generate_series(1, 80000) n",
        "SET enable_seqscan = off",
        "SELECT FROM notes_2 WHERE o = 1",
        "SELECT pg_stat_force_next_flush()",
    )
    finding = await found(clone_settings, "unused indexes")
    assert finding.status == "warning"
    assert finding.seen.startswith(f"since {NOW:%Y}")
    assert finding.seen.count("MiB") == 1, "neither a unique one, nor one that a partition uses"
    assert "never (" in finding.seen


async def test_encryption_keys(clone: Database, clone_settings: Settings) -> None:
    def keyed(keys: str) -> Settings:
        return clone_settings.model_copy(update={"encryption_keys": SecretStr(keys)})

    async with clone.session() as session:
        await factories.account(session)
    keys = clone_settings.encryption_keys
    assert keys is not None
    finding = await found(keyed(f"{OTHER_KEY},{keys.get_secret_value()}"), "encryption keys")
    assert finding.status == "warning"
    assert finding.advice is not None
    assert "rotate-encryption-key" in finding.advice
    finding = await found(keyed(OTHER_KEY), "encryption keys")
    assert (finding.status, finding.seen) == ("problem", "test: 1 rows of tiger_accounts")
    assert finding.advice is not None
    assert "put test back" in finding.advice


async def test_a_replication_slot_that_nobody_reads(clone_settings: Settings) -> None:
    slot = f"forgotten_{uuid4().hex[:12]}"
    await sql(clone_settings, f"SELECT pg_create_physical_replication_slot('{slot}', true)")
    try:
        finding = await found(clone_settings, "replication slots")
    finally:
        await sql(clone_settings, f"SELECT pg_drop_replication_slot('{slot}')")
    assert finding.status == "warning"
    assert slot in finding.seen


@pytest.fixture
async def guest(clone_settings: Settings) -> AsyncIterator[Settings]:
    """The same database, to a role that may see next to nothing."""
    role = f"guest_{uuid4().hex[:12]}"
    await sql(clone_settings, f"CREATE ROLE {role}", f"GRANT SELECT ON alembic_version TO {role}")
    assert clone_settings.database_url is not None
    url = urlsplit(clone_settings.database_url.get_secret_value())
    query = "&".join(filter(None, (url.query, f"options={quote(f'-crole={role}')}")))
    yield clone_settings.model_copy(
        update={"database_url": SecretStr(url._replace(query=query).geturl())}
    )
    await sql(clone_settings, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.schema_changes
async def test_what_a_role_may_not_see_is_said(clone: Database, guest: Settings) -> None:
    async with clone.session() as session:
        await session.execute(text("SELECT 1"))  # in a transaction of another role
        findings = {finding.check: finding for finding in await doctor(guest)}
    assert len(findings) == 19
    assert {f.status for f in findings.values()} == {"ok", "warning"}, findings
    assert "hidden from this role" in findings["longest transaction"].seen
    assert findings["longest transaction"].advice == "to see them, GRANT pg_monitor TO this role"
    for check in ("unsealed events", "refreshes", "tokens", "API keys", "encryption keys"):
        assert findings[check].status == "warning"
        assert "permission denied" in findings[check].seen
    assert "12 months" in findings["audit partitions"].seen
    assert "hidden" in findings["connections"].seen


async def test_a_schema_that_is_behind(empty_database: Settings) -> None:
    findings = await doctor(empty_database)
    assert findings[-1] == Finding(
        "schema", "problem", "the database has no tiger_db schema", "run `tiger-db init`"
    )
    assert [f.check for f in findings if f.status == "problem"] == ["schema"]


async def test_no_server() -> None:
    settings = Settings(database_url="postgresql://u:hunter2@localhost:1/x")
    (finding,) = await doctor(settings)
    assert (finding.check, finding.status) == ("server", "problem")
    assert "localhost:1/x" in finding.seen
    assert "hunter2" not in str(finding)


@pytest.mark.slow
@needs_postgresql
async def test_a_standby_that_lags(cluster: Cluster) -> None:
    settings = cluster.settings()
    await until(lambda: cluster.primary.sql("SELECT count(*) = 1 FROM pg_stat_replication"))
    finding = await found(settings, "replication")
    assert finding.status == "ok"
    assert "is streaming" in finding.seen
    await cluster.standby.sql("SELECT pg_wal_replay_pause()")
    bound = server.LAG_MIB[0]
    for _ in range(bound // 16 + 1):
        await cluster.primary.sql(
            "SELECT pg_logical_emit_message(false, '', repeat('x', 16777216))"
        )

    async def told() -> bool:
        return (await found(settings, "replication")).status != "ok"

    await until(told)
    finding = await found(settings, "replication")
    assert finding.status == "warning"
    assert finding.advice is not None
    await cluster.standby.sql("SELECT pg_wal_replay_resume()")

    async def caught_up() -> bool:
        return (await found(settings, "replication")).status == "ok"

    await until(caught_up)

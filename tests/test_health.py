"""Health reports on healthy databases, and with each problem."""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from tests.support import factories
from tests.support.encryption_keys import OTHER_KEY
from tests.support.servers import create_database
from tests.support.sql import CITUS_CATALOG, months, sql
from tiger_db import AuditAction, AuditLog, Database, crud, embedded
from tiger_db.connections import maintenance_engine
from tiger_db.health import HealthReport, check_readiness
from tiger_db.migrations import MONTHS_AHEAD, upgrade
from tiger_db.settings import Settings
from tiger_db.testing import databases


def exists(path: Path) -> bool:
    return path.exists()


def uuid7_at(moment: datetime) -> UUID:
    return UUID(int=(int(moment.timestamp() * 1000) << 80) | (7 << 76) | (1 << 63) | 1)


def only_problem(report: HealthReport) -> str:
    assert len(report.problems) == 1, report.problems
    assert "\n" not in report.problems[0]
    return report.problems[0]


@pytest.fixture
def home() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="tiger-")).resolve()
    base.chmod(0o755)
    yield base / "home"
    embedded.stop(Settings(tiger_db_home=base / "home"))
    shutil.rmtree(base)


async def test_a_healthy_database_has_no_problem(clone_settings: Settings) -> None:
    report = await check_readiness(clone_settings)
    assert report.problems == []
    assert report.location == clone_settings.location
    assert report.server_version
    assert report.latency_ms is not None
    assert 0 < report.latency_ms < 1000
    assert report.revision == report.head is not None
    assert report.pool == {
        "size": 5, "max_overflow": 40, "timeout": 30, "recycle": 1800, "connect_timeout": 10,
        "query_timeout": 30,
    }  # fmt: skip
    assert report.audit_months_ahead == MONTHS_AHEAD
    assert report.encryption_keys == ["test"]
    assert report.embedded_folder is None
    assert json.loads(json.dumps(asdict(report))) == asdict(report)


@pytest.fixture
async def unanalyzed(server_url: str, template: str) -> AsyncIterator[Database]:
    """A database without estimates, which an earlier test can have left in those of the pool."""
    settings = await create_database(server_url, f"tiger_db_rows_{uuid4().hex[:12]}", template)
    async with Database(settings) as database:
        yield database
    await databases.drop(server_url, settings.database)


@pytest.mark.slow
async def test_rows_are_estimates_over_all_partitions(unanalyzed: Database) -> None:
    assert set((await check_readiness(unanalyzed.settings)).rows.values()) <= {0, None}
    async with unanalyzed.session() as session:
        for _ in range(3):
            await factories.account(session)
        next_month = datetime.now(UTC).replace(day=1) + timedelta(days=40)
        await crud.audit_logs.log_events(
            session,
            [
                AuditLog(action=AuditAction.DATA_QUERY),
                AuditLog(action=AuditAction.DATA_QUERY, id=uuid7_at(next_month)),
            ],
        )
    await sql(unanalyzed.settings, "ANALYZE tiger_accounts, audit_logs")
    await sql(unanalyzed.settings, "ALTER TABLE tiger_accounts SET (autovacuum_enabled = false)")
    async with unanalyzed.session() as session:
        await session.execute(text("DELETE FROM tiger_accounts"))  # does not change the estimates
    assert (await check_readiness(unanalyzed.settings)).rows == {
        "api_key_limits": 0, "api_key_usage": 0, "api_keys": 0,
        "audit_logs": 5, "audit_seals": 0, "granted_roles": 0, "tiger_accounts": 3,
        "token_statuses": 0, "trading_pauses": 0,
    }  # fmt: skip


async def test_rows_without_analyze_are_estimated_from_the_statistics(unanalyzed: Database) -> None:
    await sql(
        unanalyzed.settings,
        "ALTER TABLE tiger_accounts SET (autovacuum_enabled = false)",
        f"ALTER TABLE {months(0, 0)[0]} SET (autovacuum_enabled = false)",
    )
    async with unanalyzed.session() as session:
        await factories.account(session)
        await session.execute(text("SELECT pg_stat_force_next_flush()"))
    rows = (await check_readiness(unanalyzed.settings)).rows
    assert rows["tiger_accounts"] == 1
    assert rows["audit_logs"] == 1
    assert rows["api_keys"] == 0


@pytest.mark.slow
async def test_missing_partitions_are_reported(clone: Database, clone_settings: Settings) -> None:
    await sql(clone_settings, f"DROP TABLE {months(4, 4)[0]}")
    report = await check_readiness(clone_settings)
    assert (report.audit_months_ahead, report.problems) == (3, [])
    # A detached table with the name of a partition does not count.
    await sql(clone_settings, f"ALTER TABLE audit_logs DETACH PARTITION {months(2, 2)[0]}")
    report = await check_readiness(clone_settings)
    assert report.audit_months_ahead == 1
    assert "run `tiger-db maintain-audit`" in only_problem(report)
    await sql(clone_settings, f"DROP TABLE {', '.join(months(1, 2))}")
    report = await check_readiness(clone_settings)
    assert report.audit_months_ahead == 0
    assert "run `tiger-db migrate`" in only_problem(report)
    async with maintenance_engine(clone_settings) as engine:
        await upgrade(engine)
    report = await check_readiness(clone_settings)
    assert (report.audit_months_ahead, report.problems) == (MONTHS_AHEAD, [])


@pytest.mark.slow
async def test_migrate_moves_events_out_of_the_default_partition(
    clone: Database, clone_settings: Settings
) -> None:
    await sql(clone_settings, f"DROP TABLE {', '.join(months(0, 12))}")
    async with clone.session() as session:
        await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
    report = await check_readiness(clone_settings)
    assert len(report.problems) == 2
    assert all("run `tiger-db migrate`" in problem for problem in report.problems)
    assert "audit_logs_default" in report.problems[1]
    async with maintenance_engine(clone_settings) as engine:
        await upgrade(engine)
    assert (await check_readiness(clone_settings)).problems == []


async def test_a_failed_look_for_strays_is_a_warning(clone_settings: Settings) -> None:
    """Citus refuses this query, which here a missing function does."""
    await sql(clone_settings, "ALTER FUNCTION uuid7_floor RENAME TO renamed")
    report = await check_readiness(clone_settings)
    assert report.ready
    strays, _ = report.problems
    assert strays.startswith(
        "audit_logs_default was not checked: the database refused a statement: "
    )
    assert strays.endswith(" (see `tiger-db doctor`)")


@pytest.mark.slow
async def test_tables_that_citus_distributes_are_reported(clone_settings: Settings) -> None:
    await sql(clone_settings, *CITUS_CATALOG, "CREATE TABLE mine ()")
    await sql(clone_settings, "INSERT INTO pg_dist_partition VALUES ('mine', 'h', 'id')")
    assert (await check_readiness(clone_settings)).problems == []
    await sql(clone_settings, "INSERT INTO pg_dist_partition VALUES ('api_keys', 'n', NULL)")
    report = await check_readiness(clone_settings)
    assert only_problem(report).startswith("Citus distributes tables of tiger_db (api_keys): ")
    assert report.ready
    await sql(clone_settings, "ALTER TABLE pg_dist_partition RENAME logicalrelid TO relation")
    report = await check_readiness(clone_settings)
    assert only_problem(report).startswith("Citus was not checked: ")
    assert report.ready


@pytest.mark.parametrize("days", [-400, 4000])
async def test_events_of_a_wrong_clock_are_reported(
    clone: Database, clone_settings: Settings, days: int
) -> None:
    stray = AuditLog(
        action=AuditAction.DATA_QUERY, id=uuid7_at(datetime.now(UTC) + timedelta(days=days))
    )
    async with clone.session() as session:
        await crud.audit_logs.log_events(session, [stray])
    assert "check the clocks" in only_problem(await check_readiness(clone_settings))


@pytest.mark.slow
async def test_a_missing_or_newer_schema_is_reported(empty_database: Settings) -> None:
    report = await check_readiness(empty_database)
    assert (report.revision, report.rows, report.audit_months_ahead) == (None, {}, None)
    assert report.server_version
    assert "run `tiger-db init`" in only_problem(report)
    async with maintenance_engine(empty_database) as engine:
        await upgrade(engine)
    await sql(empty_database, "UPDATE tiger_db_alembic_version SET version_num = 'from_the_future'")
    report = await check_readiness(empty_database)
    assert report.revision == "from_the_future"
    assert "upgrade tiger_db" in only_problem(report)


async def test_a_missing_table_is_reported(clone_settings: Settings) -> None:
    await sql(clone_settings, "DROP TABLE audit_logs CASCADE")
    report = await check_readiness(clone_settings)
    assert "tiger_accounts" in report.rows
    assert "the database refused" in only_problem(report)


async def test_an_unreachable_server_is_reported(clone_settings: Settings) -> None:
    settings = Settings(
        database_url="postgresql://u:hunter2@localhost:1/x",
        encryption_keys=clone_settings.encryption_keys,
        api_key_peppers=clone_settings.api_key_peppers,
    )
    report = await check_readiness(settings)
    assert (report.server_version, report.latency_ms) == (None, None)
    assert report.encryption_keys == ["test"]
    problem = only_problem(report)
    assert "localhost:1/x" in problem
    assert "is the server running?" in problem
    assert "hunter2" not in str(report)


async def test_a_server_that_never_answers_is_reported(clone_settings: Settings) -> None:
    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hold, "localhost", 0)
    port = server.sockets[0].getsockname()[1]
    report = await check_readiness(
        Settings(
            db_host="localhost",
            db_port=port,
            db_connect_timeout=0.2,
            encryption_keys=clone_settings.encryption_keys,
            api_key_peppers=clone_settings.api_key_peppers,
        )
    )
    assert "is the server running?" in only_problem(report)
    server.close()
    await server.wait_closed()


@pytest.mark.slow
async def test_a_server_that_stops_answering_is_reported_in_time(
    clone_settings: Settings, tmp_path: Path
) -> None:
    assert clone_settings.database_url is not None
    url = urlsplit(clone_settings.database_url.get_secret_value())
    asked = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await (
            asyncio.open_connection(url.hostname, url.port or 5432)
            if url.hostname
            else asyncio.open_unix_connection(f"{dict(parse_qsl(url.query))['host']}/.s.PGSQL.5432")
        )

        async def forth() -> None:
            while data := await reader.read(65536):
                if b"tiger_db_alembic_version" in data:
                    asked.set()
                to_server.write(data)
            to_server.close()
            writer.close()

        async def back() -> None:
            while data := await from_server.read(65536):
                if not asked.is_set():
                    writer.write(data)

        with suppress(ConnectionError):
            await asyncio.gather(forth(), back())

    folder = Path(tempfile.mkdtemp(prefix="tdb-"))
    proxy = await asyncio.start_unix_server(serve, folder / ".s.PGSQL.5432")
    through = url._replace(netloc=url.netloc.rpartition("@")[0] + "@", query=f"host={folder}")
    settings = clone_settings.model_copy(
        update={"database_url": SecretStr(through.geturl()), "db_connect_timeout": 1.0}
    )
    start = time.monotonic()
    report = await check_readiness(settings)
    took = time.monotonic() - start
    assert asked.is_set()
    assert (report.live, report.ready) == (True, False)
    assert report.server_version, "the server answered the first queries"
    assert "did not finish answering within 1 s (DB_CONNECT_TIMEOUT)" in only_problem(report)
    assert took < 1.5
    proxy.close()
    shutil.rmtree(folder)


async def test_a_missing_database_is_reported(clone_settings: Settings) -> None:
    assert clone_settings.database_url is not None
    url = clone_settings.database_url.get_secret_value()
    settings = clone_settings.model_copy(
        update={"database_url": SecretStr(url.replace("_test_", "_nowhere_"))}
    )
    assert "does not exist: run `tiger-db init`" in only_problem(await check_readiness(settings))


@pytest.mark.slow
async def test_missing_or_malformed_peppers_are_reported(clone_settings: Settings) -> None:
    unset = clone_settings.model_copy(update={"api_key_peppers": None})
    problem = only_problem(await check_readiness(unset))
    assert "API_KEY_PEPPERS is not set" in problem
    assert "`tiger-db generate-api-key-pepper`" in problem
    unset = unset.model_copy(update={"environment": "production"})
    problems = (await check_readiness(unset)).problems
    assert any("API_KEY_PEPPERS" in p and "generate-api-key-pepper`" in p for p in problems)
    bad = clone_settings.model_copy(update={"api_key_peppers": SecretStr("p1:hunter2")})
    assert "API_KEY_PEPPERS" in only_problem(await check_readiness(bad))


@pytest.mark.slow
async def test_missing_or_wrong_encryption_keys_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    def keyed(keys: str | None, **more: object) -> Settings:
        secret = SecretStr(keys) if keys else None
        return clone_settings.model_copy(update={"encryption_keys": secret, **more})

    report = await check_readiness(keyed(None))
    assert report.encryption_keys == []
    assert "ENCRYPTION_KEYS is not set" in only_problem(report)
    assert "`tiger-db generate-encryption-key`" in only_problem(report)
    assert report.rows, "the database is checked too"
    production = await check_readiness(keyed(None, environment="production"))
    assert "ENCRYPTION_KEYS" in only_problem(production)
    assert "ENCRYPTION_KEYS" in only_problem(await check_readiness(keyed("k1:hunter2")))

    assert (await check_readiness(keyed(OTHER_KEY))).problems == []
    async with clone.session() as session:
        await factories.account(session)
    assert (await check_readiness(clone_settings)).problems == []
    assert "'test' is not configured" in only_problem(await check_readiness(keyed(OTHER_KEY)))
    same_name = OTHER_KEY.replace("other", "test")
    assert "cannot be decrypted" in only_problem(await check_readiness(keyed(same_name)))
    keys = clone_settings.encryption_keys
    assert keys is not None
    both = await check_readiness(keyed(f"{OTHER_KEY},{keys.get_secret_value()}"))
    assert (both.encryption_keys, both.problems) == (["other", "test"], [])


@pytest.mark.slow
async def test_the_embedded_server_is_reported_and_not_started(home: Path) -> None:
    settings = Settings(tiger_db_home=home)
    report = await check_readiness(settings)
    assert report.embedded_folder == str(home)
    assert report.embedded_pid is None
    assert report.problems == [
        f"the embedded PostgreSQL in {home} is not running: run `tiger-db start-embedded`",
        "the embedded server has no encryption key yet: run `tiger-db init`",
    ]
    assert not exists(home), "a report creates no folder"

    server = await asyncio.to_thread(embedded.start, settings)
    report = await check_readiness(settings)
    assert (report.embedded_folder, report.embedded_pid) == (str(home), server.pid)
    assert report.embedded_socket_folder == str(server.socket_folder)
    assert [problem.rpartition("run ")[2] for problem in report.problems] == ["`tiger-db init`"] * 2
    assert not exists(home / "encryption_keys")

    await sql(settings.model_copy(update={"db_name": "postgres"}), "CREATE DATABASE tiger_db")
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)
    async with Database(settings) as database:
        await database.check()
    report = await check_readiness(settings)
    assert (report.problems, report.encryption_keys) == ([], ["k1"])

    (home / "encryption_keys").write_text("nonsense")
    assert str(home / "encryption_keys") in only_problem(await check_readiness(settings))
    await asyncio.to_thread(embedded.stop, settings)
    assert "start-embedded" in (await check_readiness(settings)).problems[0]
    assert embedded.running(settings) is None, "a report starts no server"


async def test_an_invalid_folder_of_the_embedded_server_is_reported(home: Path) -> None:
    report = await check_readiness(Settings(tiger_db_home=home / "a\nb"))
    assert all("TIGER_DB_HOME" in problem for problem in report.problems)
    assert report.problems

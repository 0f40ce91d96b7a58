"""Transactions behind PgBouncer, and direct connections for work that needs a session."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.pgbouncer import PORT, PROGRAM, SIZE, pgbouncer, pooled
from tiger_db import (
    APIKeyScope,
    AuditAction,
    AuditLog,
    Database,
    KeyVerifier,
    NewToken,
    RefreshWorker,
    Settings,
    TigerAccount,
    crud,
    doctor,
)
from tiger_db.audit import follow, seal
from tiger_db.connections import connect_directly, maintenance_engine
from tiger_db.doctor import CheckResult
from tiger_db.errors import (
    APIKeyRevoked,
    ConfigurationError,
    Conflict,
    DatabaseUnavailable,
    SchemaMismatch,
)
from tiger_db.health import check_readiness
from tiger_db.migrations import upgrade
from tiger_db.out_of_band import asyncpg_connection
from tiger_db.signing import generate_signing_key

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="PgBouncer is not installed here")
TASKS, ROUNDS = 6, 10  # of each of two processes; a round is five transactions
SOON = 5.0  # seconds in which a notification has come for sure, and no poll is due
# Reads back what it wrote, and tells what was not so.
CLIENT = """
import asyncio, json, sys
from datetime import UTC, datetime, timedelta
from tiger_db import APIKeyScope, Database, Settings, TigerAccount, crud
from tiger_db.errors import TigerDBError

name, tasks, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
found = {"transactions": 0, "errors": [], "wrong": []}

def same(what, *pairs):
    if any(a != b for a, b in pairs):
        found["wrong"].append(f"{what}: {pairs}")

async def work(database, task):
    for turn in range(rounds):
        me = f"{name}{task:02}{turn:03}"
        try:
            await once(database, me)
        except Exception as error:
            found["errors"].append(f"{type(error).__name__}: {error}"[:200])
        if (task, turn) == (0, rounds // 3):
            print("going", flush=True)

async def once(database, me):
    number = "U" + str(int.from_bytes(me.encode()))
    soon = datetime.now(UTC) + timedelta(minutes=5)
    async with database.session() as session:
        account = await crud.accounts.create(session, TigerAccount(
            account_name=me, account_number=number, tiger_id=me, private_key="key of " + me,
            access_token="token of " + me, token_expires_at=soon, tags={"of": me}))
        key, raw = await crud.api_keys.create_api_key(
            session, name=me, scopes=[APIKeyScope.TRADE_READ], tiger_account_id=account.id,
            allowed_ips=["10.0.0.0/8"], rate_limit_per_hour=100)
    found["transactions"] += 1
    async with database.session() as session:
        read = await crud.accounts.get_by_account_number(session, number)
        same("account", (read.id, account.id), (read.account_name, me), (read.tags, {"of": me}),
             (read.private_key.get_secret_value(), "key of " + me))
        await crud.accounts.update(session, read.id, description="about " + me)
    found["transactions"] += 1
    async with database.session() as session:
        used = await crud.api_keys.authorize_api_key(
            session, raw, scopes=[APIKeyScope.TRADE_READ], ip_address="10.1.1.1")
        same("key", (used.id, key.id), (used.name, me), (used.tiger_account_id, account.id))
        read = await crud.accounts.get(session, account.id)
        same("change", (read.description, "about " + me))
    found["transactions"] += 1
    async with database.session() as session:
        await crud.token_status.schedule_due(session)
        claims = await crud.token_status.claim_due(session, worker=me, limit=2)
    found["transactions"] += 1
    async with database.session() as session:
        for claim in claims:
            owner = claim.tiger_account
            token = owner.access_token.get_secret_value()
            same("claim", (claim.worker, me), (owner.id, claim.tiger_account_id),
                 (token.removeprefix("token of "), owner.account_number))
            await crud.token_status.complete(
                session, claim, access_token="new " + owner.account_number,
                token_expires_at=datetime.now(UTC) + timedelta(days=9))
    found["transactions"] += 1

async def main():
    async with Database(Settings()) as database:
        await asyncio.gather(*(work(database, task) for task in range(tasks)))
    print(json.dumps(found), flush=True)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def folder(server_url: str) -> Iterator[Path]:
    with pgbouncer(server_url) as folder:
        yield folder


@pytest.fixture
def behind(clone_settings: Settings, folder: Path, server_url: str) -> Settings:
    """Settings of a database for this test alone, through PgBouncer."""
    return pooled(clone_settings, folder, server_url)


@pytest.fixture
async def database(behind: Settings) -> AsyncIterator[Database]:
    async with Database(behind) as database:
        await database.check()
        yield database


def environment(settings: Settings) -> dict[str, str]:
    values = settings.model_dump(exclude_unset=True, exclude_none=True)
    plain = {
        name.upper(): value.get_secret_value() if hasattr(value, "get_secret_value") else value
        for name, value in values.items()
    }
    return os.environ | {name: str(value) for name, value in plain.items()}


def start(settings: Settings, name: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, name, str(TASKS), str(ROUNDS)],
        env=environment(settings),
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


async def sql(settings: Settings, statement: str) -> Any:
    connection = await connect_directly(settings)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def migrate_under_way(settings: Settings) -> None:
    """As a migration does it: who cannot have its lock soon lets the others pass."""
    async with maintenance_engine(settings) as engine:
        for statement in (
            "ALTER TABLE api_keys ALTER COLUMN name TYPE varchar(200)",
            "ALTER TABLE tiger_accounts ADD COLUMN added text NOT NULL DEFAULT 'x'",
            "ALTER TABLE tiger_accounts ALTER COLUMN description TYPE text",
        ):
            for _ in range(100):
                try:
                    async with engine.begin() as connection:
                        await connection.execute(text("SET LOCAL lock_timeout = '100ms'"))
                        await connection.execute(text(statement))
                    break
                except Conflict:
                    await asyncio.sleep(0.02)  # so that the others get on
            else:
                pytest.fail("no lock could be had")


@pytest.mark.slow
async def test_two_processes_and_a_migration_work_behind_the_pooler(
    behind: Settings,
) -> None:
    with start(behind, "A") as a, start(behind, "B") as b:
        try:
            for process in (a, b):
                assert process.stdout is not None
                assert await asyncio.to_thread(process.stdout.readline) == "going\n"
            await migrate_under_way(behind)
            assert None in {a.poll(), b.poll()}, "they were too fast to see it"
            results = [await asyncio.to_thread(finish, process) for process in (a, b)]
        finally:
            a.kill()
            b.kill()
    assert [result["errors"] + result["wrong"] for result in results] == [[], []]
    assert sum(result["transactions"] for result in results) == 2 * TASKS * ROUNDS * 5 == 600
    assert await sql(behind, "SELECT count(*) FROM tiger_accounts") == 2 * TASKS * ROUNDS
    count = "SELECT sum(usage_count) FROM api_keys"
    assert await sql(behind, count) == 2 * TASKS * ROUNDS


@pytest.mark.slow
async def test_a_schema_is_created_on_a_direct_connection(
    empty_database: Settings, folder: Path, server_url: str
) -> None:
    settings = pooled(empty_database, folder, server_url)
    async with maintenance_engine(settings) as engine:
        assert (await upgrade(engine)).problem is None
    async with Database(settings) as database, database.session() as session:
        await factories.account(session)


async def test_a_revocation_is_notified_on_a_direct_connection(database: Database) -> None:
    async with KeyVerifier(database, memory=True) as verifier:
        async with database.session() as session:
            key, raw = await factories.api_key(session)
        await verifier.authorize(raw, scopes=[APIKeyScope.MCP_READ])
        assert verifier._cache
        async with database.session() as session:
            await crud.api_keys.revoke(session, key.id)
        deadline = time.monotonic() + SOON
        while verifier._cache:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
        with pytest.raises(APIKeyRevoked):
            await verifier.authorize(raw, scopes=[APIKeyScope.MCP_READ])


@pytest.mark.slow
async def test_a_worker_is_notified_on_a_direct_connection(database: Database) -> None:
    asked: asyncio.Queue[str] = asyncio.Queue()

    async def refresh(account: TigerAccount) -> NewToken:
        asked.put_nowait(account.account_number)
        return NewToken("new", expires_at=datetime.now(UTC) + timedelta(days=15))

    worker = RefreshWorker(database, refresh)
    running = asyncio.create_task(worker.run())
    try:
        for _ in range(3):
            async with database.session() as session:
                account = await factories.account_with_token(session)
                await crud.token_status.schedule_due(session)
            async with asyncio.timeout(SOON):
                assert await asked.get() == account.account_number
    finally:
        worker.stop()
        await running
    assert worker.counts["broken"] == 0


async def test_events_are_followed_and_sealed(behind: Settings) -> None:
    settings = behind.model_copy(update={"audit_signing_key": generate_signing_key()})
    settings = Settings(**settings.model_dump(exclude_unset=True))
    begun = asyncio.Event()
    async with Database(settings) as database:
        events = follow(database, progress=lambda *_: begun.set())
        first = asyncio.create_task(anext(events))
        await begun.wait()
        async with database.session() as session:
            batch = [AuditLog(action=AuditAction.MCP_TOOL_CALL) for _ in range(3)]
            await crud.audit_logs.log_events(session, batch)
        async with asyncio.timeout(SOON):
            assert (await first).id in {event.id for event in batch}
        await events.aclose()
        assert (await seal(database)).rows == 3


def needs() -> dict[str, Callable[[Database], Awaitable[object]]]:
    async def refresh(account: TigerAccount) -> NewToken:
        raise AssertionError

    async def migrate(database: Database) -> None:
        async with maintenance_engine(database.settings) as engine:
            await upgrade(engine)

    return {
        "a connection": lambda database: connect_directly(database.settings),
        "a verifier with memory": lambda database: KeyVerifier(database, memory=True).__aenter__(),
        "a worker": lambda database: RefreshWorker(database, refresh).run(),
        "a follower": lambda database: anext(follow(database)),
        "a seal": seal,
        "a migration": migrate,
    }


@pytest.mark.parametrize("what", needs())
@pytest.mark.slow
async def test_without_db_direct_host_direct_connections_are_an_error(
    behind: Settings, what: str
) -> None:
    changes = {"db_direct_host": None, "audit_signing_key": generate_signing_key()}
    values = behind.model_copy(update=changes).model_dump(exclude_unset=True)
    async with Database(Settings(**values)) as database:
        async with asyncio.timeout(SOON):
            with pytest.raises(ConfigurationError, match=r"^DB_DIRECT_HOST is not set") as caught:
                await needs()[what](database)
        assert "\n" not in str(caught.value)
        async with database.session() as session:  # which needs none
            _, raw = await factories.api_key(session)
        async with KeyVerifier(database) as verifier:  # nor does this
            assert await verifier.verify(raw)


@pytest.mark.slow
async def test_a_statement_timeout_behind_the_pooler_leaves_no_state(
    behind: Settings,
) -> None:
    limited = behind.model_copy(update={"db_query_timeout": 0.2, "db_pool_size": 1})
    async with Database(limited) as database:
        await database.check()
        for _ in range(SIZE + 1):
            with pytest.raises(DatabaseUnavailable, match=r"did not answer in 0\.2 s"):
                async with database.session() as session:
                    await session.execute(text("SELECT pg_sleep(60)"))
            with pytest.raises(DatabaseUnavailable):
                async with asyncpg_connection(database.engine) as connection:
                    await connection.execute("SELECT pg_sleep(60)")
        async with database.session() as session:
            assert await session.scalar(text("SELECT current_setting('TimeZone')")) == "UTC"
    deadline = time.monotonic() + SOON
    sleeping = "datname = current_database() AND query LIKE 'SELECT pg_sleep%' AND state = 'active'"
    while await sql(behind, f"SELECT count(*) FROM pg_stat_activity WHERE {sleeping}"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


# Health


async def test_health_finds_no_problem_with_a_configured_pooler(behind: Settings) -> None:
    report = await check_readiness(behind)
    assert report.problems == []
    assert report.latency_ms is not None


@pytest.mark.slow
async def test_health_reports_a_pooler_that_is_not_configured(
    clone_settings: Settings, folder: Path, server_url: str
) -> None:
    hidden = {"db_pooler": "none", "db_direct_host": None}
    (problem,) = (
        await check_readiness(pooled(clone_settings, folder, server_url, **hidden))
    ).problems
    assert "unsupported startup parameter" in problem
    assert problem.endswith("behind PgBouncer, set DB_POOLER=pgbouncer and DB_DIRECT_HOST")
    with pgbouncer(
        server_url,
        ignore_startup_parameters=(
            "statement_timeout,idle_in_transaction_session_timeout,search_path"
        ),
    ) as careless:
        named = pooled(clone_settings, careless, server_url)
        (problem,) = (await check_readiness(named.model_copy(update=hidden))).problems
        assert problem.endswith("set DB_POOLER=pgbouncer and DB_DIRECT_HOST")
        wrong = {"db_direct_host": str(careless), "db_direct_port": PORT}
        (problem,) = (await check_readiness(named.model_copy(update=wrong))).problems
        assert problem.startswith("DB_DIRECT_HOST leads to a pooler: set DB_DIRECT_HOST to the")


async def test_health_reports_a_direct_host_with_another_database(
    server_url: str, folder: Path, clone_settings: Settings
) -> None:
    await sql(clone_settings, "CREATE DATABASE elsewhere")
    try:
        url = clone_settings.model_copy(
            update={"database_url": None, "db_host": "x", "db_name": "elsewhere"}
        )
        report = await check_readiness(pooled(url, folder, server_url))
        [problem] = report.problems
        assert problem.startswith("DB_DIRECT_HOST and the pooler lead to different servers")
    finally:
        await sql(clone_settings, "DROP DATABASE elsewhere")


# The search path, which the pooler does not take


async def search_path_of(settings: Settings) -> CheckResult:
    (finding,) = [one for one in await doctor.run(settings) if one.check == "search path"]
    return finding


def advised(settings: Settings) -> str:
    role = settings.url.user if settings.url else ""
    return (
        f'run ALTER ROLE "{role}" IN DATABASE "{settings.database}" SET search_path = "public",'
        " pg_temp"
    )


@pytest.mark.parametrize(
    ("path", "status", "seen"),
    [
        ('"$user", public', "warning", "another schema can hide tables of DB_SCHEMA"),
        ("public, pg_temp", "ok", "public, pg_temp"),
        ("pg_catalog, public, pg_temp", "ok", "pg_catalog, public, pg_temp"),
        (
            "evil, public, pg_temp",
            "problem",
            "the search path evil, public, pg_temp is wrong",
        ),
        ("evil, pg_catalog, public", "problem", "must search pg_catalog first"),
        ("public, pg_catalog", "problem", "must search pg_catalog first"),
    ],
)
@pytest.mark.slow
async def test_the_doctor_compares_the_search_path_behind_the_pooler(
    clone_settings: Settings, server_url: str, path: str, status: str, seen: str
) -> None:
    await sql(clone_settings, "CREATE SCHEMA evil")
    await sql(
        clone_settings,
        f'ALTER ROLE CURRENT_USER IN DATABASE "{clone_settings.database}" SET search_path = {path}',
    )
    with pgbouncer(server_url) as folder:
        behind = pooled(clone_settings, folder, server_url)
        finding = await search_path_of(behind)
        assert (finding.status, seen in finding.seen) == (status, True), finding
        reconnect = "; then run RECONNECT on the pooler's console"
        assert finding.advice == (None if status == "ok" else advised(behind) + reconnect)
        problems = (await check_readiness(behind)).problems
        if status != "problem":
            assert problems == []
            async with Database(behind) as database:
                await database.check()
            return
        (problem,) = problems
        assert problem.startswith("a pooler dropped the search path to the schema ")
        assert problem.endswith(advised(behind))
        async with Database(behind) as database:
            with pytest.raises(SchemaMismatch, match="a pooler dropped the search path"):
                await database.check()
    # Direct connections do not care.
    assert await search_path_of(clone_settings) == CheckResult(
        "search path", "ok", '"public", pg_temp'
    )


async def test_a_pooler_that_drops_the_search_path_is_detected(
    clone_settings: Settings, server_url: str
) -> None:
    await sql(
        clone_settings,
        f'ALTER ROLE CURRENT_USER IN DATABASE "{clone_settings.database}"'
        " SET search_path = evil, public",
    )
    await sql(clone_settings, "CREATE SCHEMA evil")
    ignored = "statement_timeout,idle_in_transaction_session_timeout,search_path"
    with pgbouncer(server_url, ignore_startup_parameters=ignored) as folder:
        behind = pooled(clone_settings, folder, server_url, db_pooler="none", db_direct_host=None)
        finding = await search_path_of(behind)
        assert (finding.status, finding.advice) == ("problem", advised(behind))
        async with Database(behind) as database:
            with pytest.raises(SchemaMismatch, match="a pooler dropped the search path"):
                await database.check()
        async with maintenance_engine(behind) as engine:
            with pytest.raises(SchemaMismatch, match="a pooler dropped the search path"):
                await upgrade(engine)

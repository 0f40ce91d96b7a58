"""Errors of PostgreSQL become errors of this package, through SQLAlchemy and through asyncpg."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from tests.support import factories
from tests.support.contexts import context_without_out_of_band
from tests.support.waiting import until
from tiger_db import AuditAction, AuditLog, Database, KeyVerifier, crud
from tiger_db.audit import export, export_checkpoint, follow, maintain, seal, verify
from tiger_db.connections import connect
from tiger_db.crud import audit_logs
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    Conflict,
    DatabaseUnavailable,
    InvalidState,
    PrivilegeMissing,
    QueryTimeout,
    StatementRefused,
    TigerDBError,
)
from tiger_db.signing import generate_signing_key, parse_signing_key
from tiger_db.sqlstates import classify, is_transient, raw_errors

# log_events goes past SQLAlchemy: one event is inserted, more are copied.

COUNTS = pytest.mark.parametrize("count", [1, 2])


def some_events(count: int) -> list[AuditLog]:
    return [factories.new_event() for _ in range(count)]


async def pid_of(session: AsyncSession) -> int:
    return int(await session.scalar(text("SELECT pg_backend_pid()")) or 0)


async def impatient(_: Database, session: AsyncSession) -> None:
    await session.execute(text("SET LOCAL lock_timeout = '10ms'"))


async def hurried(_: Database, session: AsyncSession) -> None:
    await session.execute(text("SET LOCAL statement_timeout = '10ms'"))


async def cut_off_later(database: Database, session: AsyncSession) -> None:
    """When it waits for the lock."""
    pid = await pid_of(session)

    async def cut() -> None:
        connection = await connect(database.settings)
        try:
            await until(lambda: is_blocked(connection, pid))
            await connection.execute("SELECT pg_terminate_backend($1)", pid)
        finally:
            await connection.close()

    _tasks.add(asyncio.create_task(cut()))


async def is_blocked(connection: "asyncpg.Connection[asyncpg.Record]", pid: int) -> bool:
    return bool(await connection.fetchval("SELECT cardinality(pg_blocking_pids($1::int)) > 0", pid))


_tasks: set[asyncio.Task[None]] = set()


@COUNTS
@pytest.mark.parametrize(
    ("act", "error", "runs"),
    [
        (impatient, Conflict, 3),
        (cut_off_later, DatabaseUnavailable, 3),
        (hurried, QueryTimeout, 1),
    ],
)
async def test_recording_events_raises_the_usual_typed_errors(
    clone: Database,
    monkeypatch: pytest.MonkeyPatch,
    *,
    act: Callable[[Database, AsyncSession], Awaitable[None]],
    error: type[TigerDBError],
    runs: int,
    count: int,
) -> None:
    monkeypatch.setattr("tiger_db.database._UNAVAILABLE_WAIT_SECONDS", 0.01)
    sessions = []

    async def work(session: AsyncSession) -> None:
        sessions.append(session)
        await act(clone, session)
        await audit_logs.log_events(session, some_events(count))

    async with clone.session() as other:
        await other.execute(text("LOCK TABLE audit_logs IN EXCLUSIVE MODE"))
        with pytest.raises(error) as caught:
            await clone.transaction(work, retries=2)
    await asyncio.gather(*_tasks)
    _tasks.clear()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert len(sessions) == runs
    async with clone.session() as session:
        assert await factories.events(session) == []


@COUNTS
async def test_events_are_recorded_again_after_a_serialization_failure(
    clone: Database, count: int
) -> None:
    runs = 0

    async def total(session: AsyncSession) -> int:
        return int(await session.scalar(text("SELECT count(*) FROM audit_logs")) or 0)

    async def other(session: AsyncSession) -> None:
        await audit_logs.log_events(session, some_events(await total(session) + 1))

    async def work(session: AsyncSession) -> int:
        nonlocal runs
        runs += 1
        seen = await total(session)
        if runs == 1:
            await clone.transaction(other, isolation="SERIALIZABLE")
        await audit_logs.log_events(session, some_events(count))
        return seen

    assert await clone.transaction(work, isolation="SERIALIZABLE") == 1
    assert runs == 2


@pytest.mark.slow
@COUNTS
async def test_events_are_recorded_again_after_a_deadlock(clone: Database, count: int) -> None:
    runs = 0
    locked = asyncio.Event()

    async def lock_both(pid: int) -> None:
        connection = await connect(clone.settings)
        async with clone.session() as session:
            await session.execute(text("SET LOCAL deadlock_timeout = '20s'"))
            await session.execute(text("LOCK TABLE audit_logs IN EXCLUSIVE MODE"))
            locked.set()
            await until(lambda: is_blocked(connection, pid))
            await session.execute(text("LOCK TABLE tiger_accounts IN EXCLUSIVE MODE"))
        await connection.close()

    async def work(session: AsyncSession) -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            await session.execute(text("SET LOCAL deadlock_timeout = '1s'"))
            await session.execute(text("LOCK TABLE tiger_accounts IN ROW EXCLUSIVE MODE"))
            _tasks.add(asyncio.create_task(lock_both(await pid_of(session))))
            await locked.wait()
        await audit_logs.log_events(session, some_events(count))

    await clone.transaction(work)
    await asyncio.gather(*_tasks)
    _tasks.clear()
    assert runs == 2
    async with clone.session() as session:
        assert len(await factories.events(session)) == count


@COUNTS
async def test_a_readonly_session_records_no_events(clone: Database, count: int) -> None:
    with pytest.raises(InvalidState, match="readonly"):
        async with clone.session(readonly=True) as session:
            await audit_logs.log_events(session, some_events(count))


@COUNTS
async def test_events_are_refused_if_the_role_has_no_privilege(clone: Database, count: int) -> None:
    with pytest.raises(StatementRefused, match="permission denied for table audit_logs"):
        async with clone.session() as session:
            await session.execute(text("SET LOCAL ROLE pg_monitor"))
            await audit_logs.log_events(session, some_events(count))


# Connections of asyncpg's own


@pytest.fixture
async def nobody(clone: Database) -> AsyncIterator[Database]:
    """The database for a role that may only connect and read the version of the schema."""
    role = f"tiger_db_nobody_{uuid4().hex[:12]}"
    connection = await connect(clone.settings)
    await connection.execute(
        f"CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT SELECT ON tiger_db_alembic_version TO {role}"
    )
    assert clone.settings.database_url is not None
    parts = urlsplit(clone.settings.database_url.get_secret_value())
    host = parts.netloc.rpartition("@")[2]
    url = parts._replace(netloc=f"{role}:x@{host}").geturl()
    settings = clone.settings.model_copy(
        update={
            "database_url": SecretStr(url),
            "audit_signing_key": SecretStr(generate_signing_key()),
            "audit_retention_months": 1,
        }
    )
    async with Database(settings) as database:
        yield database
    await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
    await connection.close()


async def exporting(database: Database) -> None:
    async for _ in export(database):
        pass


async def following(database: Database) -> None:
    async for _ in follow(database):
        pass


async def verifying(database: Database) -> None:
    key = parse_signing_key(generate_signing_key())
    await verify(database, keys=[key.public_key()])


async def recording(database: Database) -> None:
    await database.out_of_band.record(factories.new_event())


async def recording_in_a_session(database: Database) -> None:
    async with database.session() as session:
        await audit_logs.record_event(session, action=AuditAction.DASHBOARD_LOGIN)


USES: list[Callable[[Database], Awaitable[object]]] = [
    seal, maintain, exporting, export_checkpoint, following, verifying, recording,
    recording_in_a_session,
]  # fmt: skip


@pytest.mark.slow
async def test_a_missing_privilege_is_a_message_of_one_line(nobody: Database) -> None:
    for use in USES:
        advice = "connect as another role, or see `tiger-db grant` and docs/roles.md"
        with pytest.raises(PrivilegeMissing, match=rf"^permission denied for \w+ \w+: {advice}$"):
            async with asyncio.timeout(20):
                await use(nobody)


async def test_a_key_verifier_without_privileges_raises_statement_refused(
    clone: Database, nobody: Database
) -> None:
    async with clone.session() as session:
        _, raw_key = await factories.api_key(session)
    async with KeyVerifier(nobody) as verifier:
        with pytest.raises(StatementRefused, match="permission denied for table api_keys"):
            await verifier.authorize(raw_key)


@pytest.mark.parametrize("what", ["authorize", "record"])
async def test_a_statement_timeout_raises_the_same_error_everywhere(
    clone: Database, what: str
) -> None:
    """As in a session: a QueryTimeout, which is no lost database."""
    async with clone.session() as session:
        _, raw_key = await factories.api_key(session)
    hurried = clone.settings.model_copy(update={"db_query_timeout": 0.1})
    async with Database(hurried) as database:
        await database.check()
        async with clone.session() as other:
            table = {"authorize": "api_keys", "record": "audit_logs"}[what]
            await other.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
            with pytest.raises(QueryTimeout, match=r"statement timeout \(DB_QUERY_TIMEOUT\)$"):
                if what == "authorize":
                    await KeyVerifier(database).authorize(raw_key)
                else:
                    await database.out_of_band.record(factories.new_event())
            with pytest.raises(QueryTimeout, match=r"statement timeout \(DB_QUERY_TIMEOUT\)$"):
                async with database.session() as session:
                    await session.execute(text(f"SELECT FROM {table}"))


async def test_a_timeout_in_a_session_without_a_database_raises_the_same_error(
    clone: Database,
) -> None:
    """Its statement is given to the session's own connection."""
    async with clone.session() as session:
        _, raw_key = await factories.api_key(session, rate_limit_per_hour=5)
    async with clone.sessions(info=context_without_out_of_band(clone.info)) as session:
        assert await crud.api_keys.authorize_api_key(session, raw_key)
        await session.commit()
    async with clone.session() as other:
        await other.execute(text("LOCK TABLE api_key_limits IN ACCESS EXCLUSIVE MODE"))
        async with clone.sessions(info=context_without_out_of_band(clone.info)) as session:
            await impatient(clone, session)
            with pytest.raises(Conflict):
                await crud.api_keys.authorize_api_key(session, raw_key)


async def test_the_setting_that_ended_a_statement_is_named(clone: Database) -> None:
    async def execute(database: Database, *statements: str) -> None:
        async with database.session() as session:
            await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
            for statement in statements:
                await session.execute(text(statement))

    hurried = clone.settings.model_copy(update={"db_query_timeout": 0.1})
    unlimited = clone.settings.model_copy(update={"db_query_timeout": 0})
    sleep = "SELECT pg_sleep(20)"
    async with Database(hurried) as database:
        with pytest.raises(QueryTimeout, match=r"statement timeout \(DB_QUERY_TIMEOUT\)$"):
            await execute(database, sleep)
    async with Database(unlimited) as database:
        with pytest.raises(QueryTimeout, match=r"statement timeout \(statement_timeout\)$"):
            await execute(database, "SET LOCAL statement_timeout = '50ms'", sleep)
        with pytest.raises(QueryTimeout, match=r"user request$"):
            await execute(database, "SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(20)")
        async with clone.session() as other:
            account = await factories.account(other)
            await other.commit()
            lock = f"SELECT FROM tiger_accounts WHERE id = '{account.id}' FOR UPDATE"
            await other.execute(text(lock))
            with pytest.raises(Conflict, match=r"lock timeout \(lock_timeout\)$"):
                await execute(database, lock)
            with pytest.raises(Conflict, match=r"could not obtain lock.*[^)]$"):
                await execute(database, f"{lock} NOWAIT")


# The table


@pytest.mark.parametrize(
    ("sqlstate", "error", "transient"),
    [
        ("08006", DatabaseUnavailable, True),
        ("25006", DatabaseUnavailable, True),
        ("28P01", DatabaseUnavailable, True),
        ("40001", Conflict, True),
        ("40P01", Conflict, True),
        ("42501", PrivilegeMissing, False),
        ("42P01", None, False),
        ("53100", DatabaseUnavailable, True),
        ("53300", DatabaseUnavailable, True),
        ("55P03", Conflict, True),
        ("57014", QueryTimeout, True),
        ("57P01", DatabaseUnavailable, True),
    ],
)
def test_each_sqlstate_becomes_one_error(
    sqlstate: str, error: type[TigerDBError] | None, *, transient: bool
) -> None:
    raised = asyncpg.PostgresError.new({"C": sqlstate, "M": "a message\nof two lines"})
    classified = classify(raised)
    assert type(classified) is (error or type(None))
    assert is_transient(classified or raised) == transient
    with pytest.raises(error or StatementRefused) as caught, raw_errors():
        raise raised
    assert "\n" not in str(caught.value)


async def test_a_full_disk_of_the_server_leaves_the_connection_usable(database: Database) -> None:
    async with database.engine.connect() as connection:
        with pytest.raises(DatabaseUnavailable, match=r"^the disk of the database server is full$"):
            await connection.execute(text("DO $$ BEGIN RAISE SQLSTATE '53100'; END $$"))
        await connection.rollback()
        assert not connection.invalidated
        assert await connection.scalar(text("SELECT 1")) == 1

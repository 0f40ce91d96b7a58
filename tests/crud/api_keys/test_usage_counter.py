"""Uses of API keys are counted out of band; none is lost or counted twice."""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.support import factories
from tests.support.waiting import until
from tiger_db import APIKey, Database, KeyVerifier, Settings, crud
from tiger_db.connections import connect
from tiger_db.crud.api_keys import usage_counter
from tiger_db.errors import DatabaseUnavailable, ScopeMissing
from tiger_db.models import APIKeyScope

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
COUNTS = """
SELECT k.usage_count, (SELECT coalesce(sum(u.count), 0)::int FROM api_key_usage AS u
    WHERE u.api_key_id = k.id) AS hours FROM api_keys AS k WHERE k.id = $1
"""
WRITERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


@pytest.fixture
async def other(clone_settings: Settings) -> AsyncIterator[Connection]:
    connection = await connect(clone_settings)
    yield connection
    await connection.close()


async def make_keys(settings: Settings, count: int, **values: Any) -> list[tuple[APIKey, str]]:
    async with Database(settings) as database, database.session() as session:
        return [await factories.api_key(session, **values) for _ in range(count)]


async def counts(connection: Connection, key_id: UUID) -> tuple[int, int] | None:
    row = await connection.fetchrow(COUNTS, key_id)
    return tuple(row) if row is not None else None


@pytest.mark.slow
@pytest.mark.parametrize("committed", [True, False])
async def test_uses_of_an_unconfirmed_commit_are_counted_once(
    clone_settings: Settings,
    other: Connection,
    monkeypatch: pytest.MonkeyPatch,
    committed: bool,
) -> None:
    """The connection is terminated before or after the commit. The client sees the same error."""
    monkeypatch.setattr("tiger_db.crud.api_keys.usage_counter.WRITE_INTERVAL_SECONDS", 0.1)
    (key, _), (locked, _) = await make_keys(clone_settings, 2)
    who_locks = await connect(clone_settings)
    transaction = who_locks.transaction()
    await transaction.start()
    await who_locks.execute("SELECT FROM api_keys WHERE id = $1 FOR UPDATE", locked.id)
    cuts = 0
    commit = AsyncConnection.commit

    async def cut(connection: AsyncConnection) -> None:
        nonlocal cuts
        cuts += 1
        if cuts > 2:
            await commit(connection)
            return
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        if committed:
            await commit(connection)
        pid = raw.get_server_pid()
        assert await other.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
        raise DatabaseUnavailable("cut")

    monkeypatch.setattr(AsyncConnection, "commit", cut)
    async with Database(clone_settings) as database:
        for used in (3, 5, 7):
            for _ in range(used):
                database.usage_counter.count(key.id, time.time())
                database.usage_counter.count(locked.id, time.time())
            await until(lambda c=cuts: true_after(lambda: cuts > c))  # type: ignore[misc]
        await who_locks.close()
    assert cuts >= 3
    for key_id in (key.id, locked.id):
        assert await counts(other, key_id) == (15, 15)


async def test_a_transaction_that_the_server_has_lost_was_rolled_back(clone: Database) -> None:
    """After a crash, the server may assign its id again. Until then, the id is in the future."""
    async with clone.engine.connect() as connection:
        xid = await connection.scalar(text("SELECT pg_current_xact_id()"))
        assert await usage_counter._was_rolled_back(connection, xid + 1_000_000)


@pytest.mark.parametrize("committed", [True, False])
async def test_the_status_of_a_transaction_is_known_when_it_has_ended(
    clone: Database, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    monkeypatch.setattr(usage_counter, "_STATUS_INTERVAL_SECONDS", 0.001)
    async with clone.engine.connect() as writer, clone.engine.connect() as connection:
        xid = await writer.scalar(text("SELECT pg_current_xact_id()"))
        with pytest.raises(DatabaseUnavailable, match="has not ended"):
            await usage_counter._was_rolled_back(connection, xid)
        await (writer.commit() if committed else writer.rollback())
        assert await usage_counter._was_rolled_back(connection, xid) is not committed


@pytest.mark.slow
async def test_limits_of_lines_without_keys_are_deleted_after_30_days(
    clone_settings: Settings, other: Connection
) -> None:
    ((key, _),) = await make_keys(clone_settings, 1)
    await other.execute(
        "INSERT INTO api_key_limits SELECT gen_random_uuid(), day, 1, day, 1"
        " FROM unnest(ARRAY[now() - interval '29 days', now() - interval '31 days']) AS day"
    )
    async with Database(clone_settings) as database:
        database.usage_counter.count(key.id, time.time())
    left = await other.fetch("SELECT now() - day < interval '30 days' FROM api_key_limits")
    assert [row[0] for row in left] == [True]


async def true_after(condition: Callable[[], bool]) -> bool:
    return condition()


@pytest.mark.slow
async def test_counts_are_exact_while_connections_are_terminated(
    clone_settings: Settings, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiger_db.crud.api_keys.usage_counter.WRITE_INTERVAL_SECONDS", 0.004)
    keys = await make_keys(clone_settings, 5)
    sent, cut = dict.fromkeys([key.id for key, _ in keys], 0), 0
    async with Database(clone_settings) as database:
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            for _ in range(random.randrange(20)):
                key_id = random.choice([*sent])
                database.usage_counter.count(key_id, time.time())
                sent[key_id] += 1
            await asyncio.sleep(random.random() / 200)
            cut += len(await other.fetch(WRITERS))
        await asyncio.sleep(0)
    print(f"{sum(sent.values())} uses, {cut} connections cut")  # noqa: T201
    for key_id, count in sent.items():
        assert await counts(other, key_id) == (count, count)


@pytest.mark.slow
async def test_a_locked_key_does_not_delay_the_counts_of_other_keys(
    clone_settings: Settings, other: Connection
) -> None:
    (locked, locked_key), (free, free_key) = await make_keys(clone_settings, 2)
    watcher = await connect(clone_settings)
    async with Database(clone_settings) as database, KeyVerifier(database) as verifier:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("SELECT FROM api_keys WHERE id = $1 FOR UPDATE", locked.id)
        for _ in range(3):
            assert await verifier.verify(locked_key)
            assert await verifier.verify(free_key)

        async def free_is_counted() -> bool:
            return await counts(watcher, free.id) == (3, 3)

        await until(free_is_counted, 3)
        assert await counts(watcher, locked.id) == (0, 0)
        with pytest.raises(ScopeMissing):  # no event waits for the lock either
            async with asyncio.timeout(2):
                await verifier.authorize(free_key, scopes=[APIKeyScope.TRADE_READ])
        await transaction.rollback()

        async def locked_is_counted() -> bool:
            return await counts(watcher, locked.id) == (3, 3)

        await until(locked_is_counted, 4)
    await watcher.close()


@pytest.mark.slow
async def test_close_writes_all_counts(clone_settings: Settings, other: Connection) -> None:
    keys = await make_keys(clone_settings, 20)
    async with Database(clone_settings) as database:
        for _ in range(7):
            for key, _ in keys:
                database.usage_counter.count(key.id, time.time())
        assert [await counts(other, key.id) for key, _ in keys] == [(0, 0)] * 20
    assert [await counts(other, key.id) for key, _ in keys] == [(7, 7)] * 20


@pytest.mark.slow
async def test_parallel_calls_of_close_count_each_use_once(
    clone_settings: Settings, other: Connection
) -> None:
    ((key, _),) = await make_keys(clone_settings, 1)
    async with Database(clone_settings) as database:
        counter = usage_counter.UsageCounter(database.engine)
        for _ in range(7):
            counter.count(key.id, time.time())
        await asyncio.gather(counter.close(), counter.close(), counter.close())
    assert await counts(other, key.id) == (7, 7)


async def test_close_waits_for_a_locked_key(clone_settings: Settings, other: Connection) -> None:
    ((key, _),) = await make_keys(clone_settings, 1)
    database = Database(clone_settings)
    await database.check()
    database.usage_counter.count(key.id, time.time())
    transaction = other.transaction()
    await transaction.start()
    await other.execute("SELECT FROM api_keys FOR UPDATE")
    closing = asyncio.create_task(database.close())
    await asyncio.wait([closing], timeout=0.1)
    assert not closing.done()
    await transaction.rollback()
    await closing
    assert await counts(other, key.id) == (1, 1)


async def test_uses_are_counted_by_the_hour(clone_settings: Settings, other: Connection) -> None:
    ((key, _),) = await make_keys(clone_settings, 1)
    async with Database(clone_settings) as database:
        for at in (7199.9, 7200.0, 3600.0, 10_799.9):
            database.usage_counter.count(key.id, at)
    rows = await other.fetch("SELECT extract(epoch FROM hour)::int, count FROM api_key_usage")
    assert {tuple(row) for row in rows} == {(3600, 2), (7200, 2)}
    last = await other.fetchval("SELECT extract(epoch FROM last_used_at)::float FROM api_keys")
    assert last == 10_799.9


@pytest.mark.slow
async def test_the_counts_of_a_deleted_key_are_dropped(
    clone_settings: Settings, other: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    (deleted, _), (key, _) = await make_keys(clone_settings, 2)
    async with Database(clone_settings) as database:
        for key_id in (deleted.id, key.id):
            database.usage_counter.count(key_id, time.time())
        await other.execute("DELETE FROM api_keys WHERE id = $1", deleted.id)

        async def counted() -> bool:
            return await counts(other, key.id) == (1, 1)

        await until(counted)
        assert database.usage_counter._uses == {}
        database.usage_counter.count(deleted.id, time.time())
    assert await counts(other, deleted.id) is None
    assert await counts(other, key.id) == (1, 1)
    assert not caplog.records


@pytest.mark.slow
async def test_counts_and_denials_survive_a_rollback_of_the_caller(
    clone_settings: Settings, other: Connection
) -> None:
    ((key, raw_key),) = await make_keys(clone_settings, 1)
    async with Database(clone_settings) as database:
        with pytest.raises(ZeroDivisionError):
            async with database.session() as session:
                assert await crud.api_keys.verify_api_key(session, raw_key)
                with pytest.raises(ScopeMissing):
                    await crud.api_keys.authorize_api_key(
                        session, raw_key, scopes=[APIKeyScope.TRADE_READ]
                    )
                raise ZeroDivisionError
    assert await counts(other, key.id) == (1, 1)
    assert await other.fetchval("SELECT error_code FROM audit_logs ORDER BY id DESC LIMIT 1")


SCRIPT = """
import asyncio, sys
from tiger_db import Database, KeyVerifier, crud, get_session

async def with_a_database(raw_key):
    async with Database() as database, KeyVerifier(database) as verifier:
        for _ in range(50):
            assert await verifier.verify(raw_key)

async def with_the_default(raw_key):
    for _ in range(50):
        async with get_session() as session:
            assert await crud.api_keys.verify_api_key(session, raw_key)

async def interrupted(raw_key):
    async with Database() as database, KeyVerifier(database, memory=True) as verifier:
        for _ in range(50):
            assert await verifier.verify(raw_key)
        raise KeyboardInterrupt

try:
    asyncio.run(globals()[sys.argv[1]](sys.argv[2]))
except KeyboardInterrupt:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["with_a_database", "with_the_default", "interrupted"])
async def test_a_program_writes_its_counts_when_it_ends(
    clone_settings: Settings, other: Connection, how: str
) -> None:
    ((key, raw_key),) = await make_keys(clone_settings, 1)
    assert clone_settings.database_url
    assert clone_settings.api_key_peppers
    assert clone_settings.encryption_keys
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-c", SCRIPT, how, raw_key],
        env={
            "DATABASE_URL": clone_settings.database_url.get_secret_value(),
            "API_KEY_PEPPERS": clone_settings.api_key_peppers.get_secret_value(),
            "ENCRYPTION_KEYS": clone_settings.encryption_keys.get_secret_value(),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert await counts(other, key.id) == (50, 50)

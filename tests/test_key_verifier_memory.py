"""A KeyVerifier with memory: no answer from the cache is outdated."""

import asyncio
import itertools
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import pytest

from tests.models.examples import table_of
from tests.support import factories
from tests.support.forks import FORKS
from tests.support.passed_settings import Passed
from tests.support.servers import settings_for
from tests.support.verifiers import OTHER, checkouts, kill
from tests.support.waiting import until
from tiger_db import (
    APIKey,
    APIKeyScope,
    Database,
    KeyVerifier,
    Settings,
    crud,
    embedded,
    key_verifier,
)
from tiger_db.connections import connect, listener, maintenance_engine
from tiger_db.crud.api_keys.key_format import new_key
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    AccessDenied,
    AddressNotAllowed,
    APIKeyExpired,
    APIKeyRevoked,
    DatabaseUnavailable,
    InvalidAPIKey,
    RateLimited,
    SchemaMismatch,
    ScopeMissing,
    UserAgentNotAllowed,
)
from tiger_db.migrations import upgrade
from tiger_db.testing import servers

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
REVOKE = "UPDATE api_keys SET status = 'revoked' WHERE id = $1"
LISTENING = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND query = 'SELECT clock_timestamp()'
"""


@pytest.fixture
async def listening(clone: Database) -> AsyncIterator[KeyVerifier]:
    async with KeyVerifier(clone, memory=True) as listening:
        yield listening


@pytest.fixture
async def other(clone: Database) -> AsyncIterator[Connection]:
    """A plain connection, as of another program."""
    connection = await connect(clone.settings)
    yield connection
    await connection.close()


async def make_key(database: Database, **values: Any) -> tuple[APIKey, str]:
    async with database.session() as session:
        return await factories.api_key(session, **values)


async def test_a_second_call_sends_no_statement(clone: Database, listening: KeyVerifier) -> None:
    key, raw_key = await make_key(clone)
    assert await listening.verify(raw_key)
    with checkouts(clone) as taken:
        for _ in range(200):
            accepted = await listening.authorize(raw_key, scopes=[APIKeyScope.MCP_READ])
            assert accepted.id == key.id
    assert taken == []
    await clone.close()
    async with clone.session() as session:
        stored = await crud.api_keys.get(session, key.id)
        assert stored is not None
        assert stored.usage_count == 201


async def test_a_wrong_secret_of_a_known_key_is_refused(
    clone: Database, listening: KeyVerifier
) -> None:
    key, raw_key = await make_key(clone)
    assert await listening.verify(raw_key)
    while True:
        text = new_key("test")
        if text.prefix != key.key_prefix:
            break
    assert await listening.verify(text.raw_key) is None
    last = "A" if raw_key[-1] != "A" else "B"
    assert await listening.verify(raw_key[:-1] + last) is None
    assert await listening.verify(raw_key)


def test_the_tests_cover_every_column() -> None:
    untold = {"id", "created_at", "updated_at", "usage_count", "last_used_at"}
    assert OTHER.keys() == {column.name for column in table_of(APIKey).columns} - untold


async def test_a_change_of_any_column_evicts_the_key(
    clone: Database, listening: KeyVerifier, other: Connection
) -> None:
    async with clone.session() as session:
        await factories.account(session)
        made = [await factories.api_key(session) for _ in range(len(OTHER) + 2)]
    for _, raw_key in made:
        assert await listening.verify(raw_key)
    *changed, as_replica, same = [key.id for key, _ in made]
    for key_id, (column, value) in zip(changed, OTHER.items(), strict=True):
        await other.execute(f"UPDATE api_keys SET {column} = {value} WHERE id = $1", key_id)
        await until(lambda key_id=key_id: key_id not in listening._digests)  # type: ignore[misc]
    assert [*listening._digests] == [as_replica, same]
    await other.execute("SET session_replication_role = replica")
    await other.execute(REVOKE, as_replica)
    await until(lambda: as_replica not in listening._digests)
    assert [*listening._digests] == [same]
    assert len(listening._cache) == 1


async def test_a_use_evicts_no_key(
    clone: Database, listening: KeyVerifier, other: Connection
) -> None:
    key, raw_key = await make_key(clone)
    assert await listening.verify(raw_key)
    changes = listening._notifications
    await other.execute("UPDATE api_keys SET usage_count = 9, last_used_at = now()")
    last, last_key = await make_key(clone)
    assert await listening.verify(last_key)
    await other.execute(REVOKE, last.id)  # the notification follows those of the use, if any
    await until(lambda: listening._notifications > changes)
    assert listening._notifications == changes + 1
    assert [*listening._digests] == [key.id]


ENDS_OF_KEYS = [
    "UPDATE tiger_accounts SET status = 'suspended'",
    "DELETE FROM api_keys WHERE tiger_account_id IS NOT NULL",
    "DELETE FROM api_keys WHERE tiger_account_id IS NOT NULL; DELETE FROM tiger_accounts",
    "TRUNCATE api_keys CASCADE",
    "TRUNCATE tiger_accounts CASCADE",
]


@pytest.mark.parametrize(
    ("change", "role"),
    [
        *itertools.product(ENDS_OF_KEYS, ["origin", "replica"]),
        ("DELETE FROM tiger_accounts", "replica"),  # a replica does not check foreign keys
    ],
)
async def test_changes_that_end_a_key_evict_it(
    clone: Database, listening: KeyVerifier, other: Connection, change: str, role: str
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
    key, raw_key = await make_key(clone, tiger_account_id=account.id)
    _, unbound = await make_key(clone)
    assert await listening.verify(raw_key)
    assert await listening.verify(unbound)
    await other.execute(f"SET session_replication_role = {role}")
    await other.execute(change)
    await until(lambda: key.id not in listening._digests)
    assert len(listening._cache) == (0 if "TRUNCATE" in change else 1)
    if change != "DELETE FROM tiger_accounts":  # the key has no account, and is still stored
        assert await listening.verify(raw_key) is None
    assert (await listening.verify(unbound) is None) == ("TRUNCATE" in change)


async def test_a_change_that_is_rolled_back_changes_nothing(
    clone: Database, listening: KeyVerifier, other: Connection
) -> None:
    key, raw_key = await make_key(clone)
    assert await listening.verify(raw_key)
    transaction = other.transaction()
    await transaction.start()
    await other.execute(REVOKE, key.id)
    assert await listening.verify(raw_key)
    await transaction.rollback()
    await asyncio.sleep(0.1)
    assert key.id in listening._digests


async def expire_soon(session: AsyncSession, key_id: UUID) -> None:
    soon = datetime.now(UTC) + timedelta(milliseconds=700)
    await crud.api_keys.update(session, key_id, expires_at=soon)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (partial(crud.api_keys.update, scopes=[APIKeyScope.MCP_READ]), ScopeMissing),
        (partial(crud.api_keys.update, allowed_ips=["192.0.2.0/24"]), AddressNotAllowed),
        (partial(crud.api_keys.update, allowed_user_agents=["x"]), UserAgentNotAllowed),
        (partial(crud.api_keys.update, rate_limit_per_day=1), RateLimited),
        pytest.param(expire_soon, APIKeyExpired, marks=pytest.mark.slow),
        (crud.api_keys.deactivate, APIKeyRevoked),
        (crud.api_keys.delete, InvalidAPIKey),
    ],
)
async def test_each_function_that_restricts_a_key_takes_effect_at_once(
    clone: Database,
    listening: KeyVerifier,
    change: Callable[[AsyncSession, UUID], Awaitable[object]],
    reason: type[AccessDenied],
) -> None:
    key, raw_key = await make_key(clone, scopes=[APIKeyScope.MCP_WRITE])

    async def authorize() -> None:
        await listening.authorize(
            raw_key,
            scopes=[APIKeyScope.MCP_WRITE],
            ip_address="10.0.0.1",
            user_agent="claude/1",
        )

    await authorize()
    with checkouts(clone) as taken:
        await authorize()
    assert taken == []
    async with Database(clone.settings) as elsewhere, elsewhere.session() as session:
        await change(session, key.id)
    committed = time.monotonic()
    with pytest.raises(reason):
        while time.monotonic() < committed + 5:
            await authorize()
    assert key.id not in listening._digests or reason is APIKeyExpired


async def test_a_key_is_accepted_at_once_after_its_activation(
    clone: Database, listening: KeyVerifier
) -> None:
    key, raw_key = await make_key(clone)
    for _ in range(2):
        assert await listening.verify(raw_key)
        async with clone.session() as session:
            await crud.api_keys.deactivate(session, key.id)
        await until(lambda: key.id not in listening._digests)
        assert await listening.verify(raw_key) is None
        async with clone.session() as session:
            await crud.api_keys.activate(session, key.id)
    assert await listening.verify(raw_key)


@pytest.mark.slow
async def test_a_revocation_by_another_process_takes_effect_at_once(
    clone: Database, listening: KeyVerifier, other: Connection
) -> None:
    keys = [await make_key(clone) for _ in range(100)]
    for _, raw_key in keys:
        assert await listening.verify(raw_key)
    took = []
    for key, raw_key in keys:
        await other.execute(REVOKE, key.id)
        committed = time.monotonic()
        last = committed
        while await listening.verify(raw_key):
            last = time.monotonic()
            assert last < committed + 5
        took.append((last - committed) * 1000)
    p99 = statistics.quantiles(took, n=100)[98]
    print(f"revoked: p50 {statistics.median(took):.2f} ms, p99 {p99:.2f} ms")  # noqa: T201
    assert p99 < 50


def revoke_in_a_while(settings: Settings, key: APIKey, pipe: Any) -> None:
    """Revoke the key in another process, and return the time of the commit."""

    async def run() -> None:
        connection = await connect(settings)
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        await asyncio.sleep(0.3)  # time for the loop of the other task
        await connection.execute(REVOKE, key.id)
        pipe.send(time.monotonic())
        await connection.close()

    asyncio.run(run())


@pytest.mark.slow
async def test_a_revocation_takes_effect_in_a_loop_without_other_awaits(
    clone: Database, listening: KeyVerifier
) -> None:
    key, raw_key = await make_key(clone)
    here, there = FORKS.Pipe()
    child = FORKS.Process(target=revoke_in_a_while, args=(Passed(clone.settings), key, there))
    child.start()
    assert await asyncio.to_thread(here.recv) == "ready"
    assert await listening.verify(raw_key)
    here.send("go")
    deadline, calls = time.monotonic() + 10, 0
    while await listening.verify(raw_key):
        calls += 1
        assert time.monotonic() < deadline
    refused = time.monotonic()
    committed = await asyncio.to_thread(here.recv)
    await asyncio.to_thread(child.join, 10)
    print(f"{calls} calls; refused {(refused - committed) * 1000:.1f} ms after")  # noqa: T201
    assert calls > 100
    assert refused - committed < 2  # milliseconds on an idle machine


@pytest.mark.slow
async def test_without_the_listening_connection_the_database_is_read(
    clone: Database,
    listening: KeyVerifier,
    other: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = [await make_key(clone) for _ in range(4)]
    for _, raw_key in keys:
        assert await listening.verify(raw_key)

    async def refuse(*_: object) -> Connection:
        raise DatabaseUnavailable("not now")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(listener, "connect_directly", refuse)
            (pid,) = await other.fetch(LISTENING)
            assert await other.fetchval("SELECT pg_terminate_backend($1, 5000)", pid[0])
            key, raw_key = keys.pop()
            await other.execute(REVOKE, key.id)
            with pytest.raises(APIKeyRevoked):
                await listening.authorize(raw_key)
            for number in range(20):
                status = ("suspended", "active")[number % 2]
                key, raw_key = keys[0]
                accepted = "active" if status == "active" else "inactive"
                await other.execute(
                    "UPDATE api_keys SET status = $2 WHERE id = $1", key.id, accepted
                )
                assert (await listening.verify(raw_key) is not None) == (status == "active")
            with checkouts(clone) as taken:
                assert await listening.verify(raw_key)
            assert taken
        await until(lambda: listening._valid_until > time.monotonic())
        assert await listening.verify(raw_key)
        with checkouts(clone) as taken:
            assert await listening.verify(raw_key)
        assert taken == []


# Memory that nobody tells of changes


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ("DROP TRIGGER notify_update ON api_keys", "notify_update on api_keys is missing"),
        ("ALTER TABLE api_keys DISABLE TRIGGER notify_update", "is disabled"),
        ("ALTER TABLE tiger_accounts DISABLE TRIGGER USER", "is disabled"),
        (
            "ALTER TABLE api_keys ENABLE REPLICA TRIGGER notify_update",
            "only for replicated changes",
        ),
        (
            (
                "CREATE OR REPLACE TRIGGER notify_update AFTER UPDATE OF name ON api_keys"
                " FOR EACH ROW EXECUTE FUNCTION notify_api_key_change()"
            ),
            "trigger notify_update on api_keys differs: CREATE",
        ),
        (
            (
                "CREATE OR REPLACE FUNCTION notify_api_key_change() RETURNS trigger"
                " LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
            ),
            "function notify_api_key_change",
        ),
    ],
)
async def test_a_verifier_with_memory_needs_the_triggers_when_it_is_entered(
    clone: Database, other: Connection, change: str, seen: str
) -> None:
    _, raw_key = await make_key(clone)
    await other.execute(change)
    with pytest.raises(SchemaMismatch, match="run `tiger-db check`") as caught:
        await KeyVerifier(clone, memory=True).__aenter__()
    assert seen in str(caught.value)
    assert "\n" not in str(caught.value)
    assert await other.fetch(LISTENING) == []
    async with KeyVerifier(clone) as asking:
        assert await asking.verify(raw_key)


async def test_other_triggers_and_other_tables_do_not_matter(
    clone: Database, other: Connection
) -> None:
    await other.execute("ALTER TABLE audit_logs DISABLE TRIGGER USER")
    await other.execute(
        "CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
        "CREATE TRIGGER mine BEFORE UPDATE ON api_keys FOR EACH ROW EXECUTE FUNCTION mine()"
    )
    async with KeyVerifier(clone, memory=True) as listening:
        assert listening._valid_until > time.monotonic()


def make_older(listening: KeyVerifier, seconds: float) -> None:
    for known in listening._cache.values():
        known.read_at -= seconds


@pytest.mark.parametrize("table", ["api_keys", "tiger_accounts"])
async def test_a_change_without_notification_takes_effect_within_a_minute(
    clone: Database, listening: KeyVerifier, other: Connection, table: str
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
    _, raw_key = await make_key(clone, tiger_account_id=account.id)
    assert await listening.verify(raw_key)
    await other.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    await other.execute(f"UPDATE {table} SET status = 'inactive'")
    assert key_verifier.MAX_AGE_SECONDS == 60
    make_older(listening, 30)
    assert await listening.verify(raw_key)  # accepted until the cached key is a minute old
    make_older(listening, 30)
    assert await listening.verify(raw_key) is None
    assert await listening.verify(raw_key) is None


async def test_a_key_is_read_once_a_minute(clone: Database, listening: KeyVerifier) -> None:
    _, raw_key = await make_key(clone)
    assert await listening.verify(raw_key)
    for _ in range(3):
        make_older(listening, 60)
        with checkouts(clone) as taken:
            for _ in range(10):
                assert await listening.verify(raw_key)
        assert len(taken) == 1


async def test_the_cache_is_not_used_after_the_lease(
    clone: Database, listening: KeyVerifier, other: Connection
) -> None:
    _, raw_key = await make_key(clone)
    assert await listening.verify(raw_key)
    assert listening._listener
    listening._listener.cancel()
    await asyncio.wait([listening._listener])
    await other.execute("ALTER TABLE api_keys DISABLE TRIGGER USER")
    await other.execute("UPDATE api_keys SET status = 'revoked'")
    assert await listening.verify(raw_key) is None


async def test_a_key_with_limits_is_read_at_each_use(
    clone: Database, listening: KeyVerifier
) -> None:
    _, raw_key = await make_key(clone, rate_limit_per_day=3)
    for _ in range(3):
        with checkouts(clone) as taken:
            assert await listening.verify(raw_key)
        assert taken
    with pytest.raises(RateLimited):
        await listening.authorize(raw_key)


@pytest.mark.slow
async def test_a_flood_of_unknown_keys_evicts_no_key(clone: Database) -> None:
    async with KeyVerifier(clone, memory=True, capacity=10) as listening:
        key, raw_key = await make_key(clone)
        assert await listening.verify(raw_key)

        async def guess(times: int) -> None:
            for _ in range(times):
                assert await listening.verify(new_key("test").raw_key) is None

        await asyncio.gather(*(guess(20) for _ in range(50)))
        assert [*listening._digests] == [key.id]
        assert len(listening._cache) == 1
        with checkouts(clone) as taken:
            assert await listening.verify(raw_key)
        assert taken == []


async def test_the_least_recently_used_key_is_evicted_first(clone: Database) -> None:
    async with KeyVerifier(clone, memory=True, capacity=3) as listening:
        keys = [await make_key(clone) for _ in range(4)]
        for number in (0, 1, 2, 0, 3):
            assert await listening.verify(keys[number][1])
        assert {*listening._digests} == {keys[n][0].id for n in (0, 2, 3)}
        for _ in range(50):
            assert await listening.verify(random.choice(keys)[1])
            assert len(listening._cache) == len(listening._digests) == 3


@pytest.mark.slow
async def test_an_expiry_takes_effect_in_the_cache(
    clone: Database, listening: KeyVerifier, other: Connection
) -> None:
    now = await other.fetchval("SELECT clock_timestamp()")
    ends = now + timedelta(seconds=0.7)
    _, raw_key = await make_key(clone, expires_at=ends)
    assert await listening.verify(raw_key)
    with checkouts(clone) as taken:
        while True:
            before = datetime.now(UTC)
            try:
                await listening.authorize(raw_key)
            except APIKeyExpired:
                break
            assert before < ends
            await asyncio.sleep(0.001)
    assert taken == []
    assert abs(datetime.now(UTC) - ends) < timedelta(seconds=0.1)


async def test_an_expiry_follows_the_clock_of_the_database(
    clone: Database, listening: KeyVerifier
) -> None:
    """The clock of the database is an hour ahead of the clock of this machine."""
    _, raw_key = await make_key(clone, expires_at=datetime.now(UTC) + timedelta(minutes=30))
    assert await listening.verify(raw_key)
    listening._clock_offset += 3600  # until the next heartbeat
    with pytest.raises(APIKeyExpired):
        await listening.authorize(raw_key)


async def test_denials_from_the_cache_are_recorded(clone: Database, listening: KeyVerifier) -> None:
    key, raw_key = await make_key(clone, allowed_ips=["10.0.0.0/8"])
    assert await listening.verify(raw_key, ip_address="10.0.0.1")
    with pytest.raises(ScopeMissing):
        await listening.authorize(
            raw_key, ip_address="10.0.0.1", scopes=[APIKeyScope.ACCOUNT_READ], user_agent="curl"
        )
    with pytest.raises(AddressNotAllowed):
        await listening.authorize(raw_key, ip_address="11.0.0.1")
    assert [*listening._digests] == [key.id]
    async with clone.session() as session:
        denied = [e for e in await factories.events(session) if e.error_code]
    assert [(e.error_code, str(e.ip_address), e.api_key_id) for e in denied] == [
        ("ScopeMissing", "10.0.0.1", key.id),
        ("AddressNotAllowed", "11.0.0.1", key.id),
    ]
    assert denied[0].user_agent == "curl"
    assert raw_key.rpartition("_")[2] not in f"{[e.model_dump() for e in denied]}"


async def test_changes_of_the_returned_key_grant_nothing(
    clone: Database, listening: KeyVerifier
) -> None:
    _, raw_key = await make_key(clone, allowed_ips=["10.0.0.0/8"])
    for _ in range(2):
        accepted = await listening.authorize(raw_key, ip_address="10.0.0.1")
        accepted.scopes.append(APIKeyScope.SYSTEM_ADMIN)
        accepted.allowed_ips.clear()
        accepted.rate_limit_per_day = None
    with pytest.raises(ScopeMissing):
        await listening.authorize(raw_key, ip_address="10.0.0.1", scopes=[APIKeyScope.SYSTEM_READ])
    with pytest.raises(AddressNotAllowed):
        await listening.authorize(raw_key, ip_address="11.0.0.1")


@pytest.mark.slow
async def test_a_cancelled_call_leaves_no_connection_behind(
    clone: Database, listening: KeyVerifier
) -> None:
    keys = [await make_key(clone, rate_limit_per_day=1000) for _ in range(8)]
    for delay in range(30):
        tasks = [asyncio.create_task(listening.verify(raw_key)) for _, raw_key in keys]
        await asyncio.sleep(delay / 10_000)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*(listening.verify(raw_key) for _, raw_key in keys))
    assert [key and key.id for key in answers] == [key.id for key, _ in keys]


# A server that goes away and comes back


@pytest.fixture(scope="module")
def private_server() -> Iterator[Settings]:
    home = servers.short_folder()
    settings = Settings(tiger_db_home=home / "home")
    place = embedded.start(settings).folder
    yield settings
    embedded.stop(settings)
    for folder in (home, place):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def private(private_server: Settings) -> Settings:
    """A database on a private server, which no Database starts."""
    server = embedded.start(private_server)
    name = f"private_{random.randrange(10**9)}"
    connection = await connect(private_server, database="postgres")
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    password = server.connect_args(private_server)["password"].get_secret_value()
    url = f"postgresql://tiger_db:{password}@/?host={server.socket_folder}"
    settings = settings_for(url, name).model_copy(update={"db_pool_timeout": 3})
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)
    return settings


def stop(settings: Settings) -> None:
    embedded.stop(settings)


def stop_at_once(settings: Settings) -> None:
    """Stop the server as `pg_ctl stop -m immediate` does."""
    kill(settings, signal.SIGQUIT)


Outcome = Counter[str]


async def ask(
    listening: KeyVerifier, check: Callable[[], Awaitable[str]], told: Outcome, stop: asyncio.Event
) -> None:
    while not stop.is_set():
        try:
            told[await check()] += 1
        except DatabaseUnavailable:
            told["unavailable"] += 1
        await asyncio.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("end", [stop, stop_at_once, kill])
async def test_a_restarted_server(
    private_server: Settings, private: Settings, end: Callable[[Settings], None]
) -> None:
    told = Outcome()
    over = asyncio.Event()
    async with Database(private) as database, KeyVerifier(database, memory=True) as listening:
        good, good_key = await make_key(database)
        limited, limited_key = await make_key(database, rate_limit_per_day=1_000_000)
        revoked, revoked_key = await make_key(database)
        async with database.session() as session:
            await crud.api_keys.revoke(session, revoked.id)

        async def check(name: str, raw_key: str) -> str:
            return f"{name}: {await listening.verify(raw_key) is not None}"

        async with asyncio.TaskGroup() as group:
            for name, raw_key in (
                ("good", good_key),
                ("limited", limited_key),
                ("revoked", revoked_key),
                ("unknown", new_key("test").raw_key),
            ):
                for _ in range(3):

                    async def check_it(name: str = name, raw_key: str = raw_key) -> str:
                        return await check(name, raw_key)

                    group.create_task(ask(listening, check_it, told, over))
            await until(lambda: told["good: True"] > 100)
            await asyncio.to_thread(end, private_server)
            before = told["unavailable"]
            await until(lambda: told["unavailable"] > before + 20)
            accepted = told["good: True"]
            await asyncio.sleep(0.6)  # longer than the lease
            assert told["good: True"] == accepted
            await asyncio.to_thread(embedded.start, private_server)
            started = time.monotonic()
            await until(lambda: told["good: True"] > accepted, 5)
            answered = time.monotonic() - started
            await until(lambda: listening._valid_until > time.monotonic(), 5)
            listens = time.monotonic() - started
            accepted = told["limited: True"]
            await until(lambda: told["limited: True"] > accepted + 20, 5)
            over.set()
    print(f"{dict(told)}; answered {answered:.2f} s after, listens {listens:.2f} s")  # noqa: T201
    assert {name for name in told if "True" in name} == {"good: True", "limited: True"}
    assert not {"good: False", "limited: False"} & {*told}
    async with Database(private) as database, database.session() as session:
        stored = [await crud.api_keys.get(session, key.id) for key in (good, limited)]
    counts = [key and key.usage_count for key in stored]
    assert counts == [told["good: True"], told["limited: True"]]

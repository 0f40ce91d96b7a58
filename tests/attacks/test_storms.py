"""NOTIFY storms, from a role without rights and from honest changes, against a KeyVerifier."""

import asyncio
import gc
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support import factories
from tests.support.clusters import Cluster, first_server, needs_postgresql
from tests.support.waiting import until
from tiger_db import Database, KeyVerifier, Settings
from tiger_db.connections import connect, maintenance_engine
from tiger_db.errors import APIKeyRevoked
from tiger_db.key_verifier import CHANNEL, LEASE_SECONDS
from tiger_db.migrations import upgrade
from tiger_db.testing import servers

NOTIFICATIONS, CACHED = 100_000, 10_000
LONGEST_STALL_SECONDS = 0.1
# PostgreSQL drops equal notifications of one transaction, so each payload is another one.
PAYLOADS = ("'account ' || gen_random_uuid()", "'key ' || gen_random_uuid()", "'all' || i")
STORM = f"""
DO $$ BEGIN
    FOR i IN 1..{NOTIFICATIONS} LOOP PERFORM pg_notify('{CHANNEL}', {{}}); END LOOP;
END $$
"""
COPY_ACCOUNT = """
INSERT INTO tiger_accounts SELECT (jsonb_populate_record(
    a, jsonb_build_object('id', gen_random_uuid(), 'account_number', 61230000 + i))).*
FROM tiger_accounts AS a, generate_series(1, $1) AS i RETURNING id
"""
SUSPEND = "UPDATE tiger_accounts SET status = 'suspended'"


@asynccontextmanager
async def stalls() -> AsyncIterator[list[float]]:
    """Record for how much CPU time (s) the event loop does not run another task.

    CPU time does not depend on the other processes of this machine. Python's garbage collector is
    off, because it stops the event loop for as long as the heap is large, with or without a storm.
    """
    waits = [0.0]

    async def watch() -> None:
        while True:
            start = time.thread_time()
            await asyncio.sleep(0)
            waits.append(time.thread_time() - start)

    gc.disable()
    task = asyncio.create_task(watch())
    try:
        yield waits
    finally:
        gc.enable()
        task.cancel()
        await asyncio.wait([task])
        print(f"longest stall: {max(waits):.3f} s")  # noqa: T201


async def fill(verifier: KeyVerifier, accounts: list[UUID], *, deep_copies: bool = False) -> str:
    """Cache copies of one accepted key, as if many keys were in use. Return the raw key."""
    async with verifier.database.session() as session:
        _, raw_key = await factories.api_key(session)
    await verifier.authorize(raw_key)
    (accepted,) = verifier._cache.values()
    for number in range(CACHED - 1):
        account_id = accounts[number % len(accounts)]
        permissions = accepted.permissions._replace(key_id=uuid4(), account_id=account_id)
        copied = replace(accepted, permissions=permissions)
        if deep_copies:
            copied.key, copied.columns = accepted.key.model_copy(), {**accepted.columns}
        verifier._store(number.to_bytes(16), copied)
    assert len(verifier._cache) == CACHED
    return raw_key


@asynccontextmanager
async def stranger(settings: Settings) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection of a role that has no rights, in a database that lets everyone connect."""
    role = f"tiger_db_stranger_{uuid4().hex[:12]}"
    owner = await connect(settings)
    await owner.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    arguments = settings.connect_args() | {"user": role, "password": "x"}
    try:
        connection = await asyncpg.connect(**arguments)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("SELECT FROM api_keys")
        yield connection
        await connection.close()
    finally:
        await owner.execute(f"DROP ROLE {role}")
        await owner.close()


async def storm(settings: Settings, payloads: tuple[str, ...]) -> None:
    async with Database(settings) as database, stranger(settings) as attacker:
        for payload in payloads:
            async with KeyVerifier(database, memory=True) as verifier:
                raw_key = await fill(verifier, [uuid4() for _ in range(3000)])
                async with stalls() as waits:
                    await attacker.execute(STORM.format(payload))
                    await until(lambda: time.monotonic() < verifier._valid_until, 60)
                    assert await verifier.authorize(raw_key)
            assert max(waits) < LONGEST_STALL_SECONDS, payload


@pytest.mark.slow
@pytest.mark.parametrize("payload", PAYLOADS)
async def test_a_storm_of_a_role_without_rights_does_not_stop_the_event_loop(
    clone_settings: Settings, payload: str
) -> None:
    await storm(clone_settings, (payload,))


@pytest.fixture(scope="module")
def over_tcp() -> Iterator[Settings]:
    """A database on the loopback address: TCP has larger buffers than Unix sockets."""
    home = servers.short_folder()
    server = first_server(home)
    settings = Cluster(server, server).settings(db_ssl_mode="disable", db_password="")
    asyncio.run(migrate(settings))
    yield settings
    server.stop()
    shutil.rmtree(home)


async def migrate(settings: Settings) -> None:
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)


@pytest.mark.slow
@needs_postgresql
@pytest.mark.parametrize("module", ["asyncio", "uvloop"])
def test_a_storm_over_tcp_does_not_stop_the_event_loop(over_tcp: Settings, module: str) -> None:
    new_loop = pytest.importorskip(module).new_event_loop
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(storm(over_tcp, PAYLOADS))


@pytest.mark.parametrize("payload", ["account {}", "key {}"])
async def test_the_time_of_a_notification_does_not_depend_on_the_number_of_keys(
    clone: Database, payload: str
) -> None:
    async with KeyVerifier(clone, memory=True) as verifier:
        await fill(verifier, [uuid4() for _ in range(3000)])
        start = time.thread_time()
        for _ in range(1000):
            verifier._handle_notification(payload.format(uuid4()))
        assert time.thread_time() - start < LONGEST_STALL_SECONDS
        assert len(verifier._cache) == CACHED


@pytest.mark.slow
async def test_a_change_of_thousands_of_accounts_does_not_stop_the_event_loop(
    clone: Database,
) -> None:
    async with clone.session() as session:
        await factories.account(session)
    other = await connect(clone.settings)
    accounts = [row["id"] for row in await other.fetch(COPY_ACCOUNT, 3000)]
    async with KeyVerifier(clone, memory=True) as verifier:
        await fill(verifier, accounts)
        async with stalls() as waits:
            await other.execute(SUSPEND)
            await until(lambda: len(verifier._cache) <= 1)
    await other.close()
    assert max(waits) < LONGEST_STALL_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("payload", ["account {}", "all"])
async def test_the_eviction_of_many_keys_does_not_stop_the_event_loop(
    clone: Database, payload: str
) -> None:
    account_id = uuid4()
    async with KeyVerifier(clone, memory=True) as verifier:
        await fill(verifier, [account_id], deep_copies=True)
        async with stalls() as waits:
            await asyncio.sleep(0)
            verifier._handle_notification(payload.format(account_id))
            assert len(verifier._cache) <= 1  # one key is bound to no account
            await asyncio.sleep(0.2)
    assert max(waits) < LONGEST_STALL_SECONDS


@pytest.mark.slow
async def test_no_notification_is_lost_in_a_storm(clone: Database) -> None:
    """Each notification takes effect in the call that handles it, before any other task runs."""
    accounts = [uuid4() for _ in range(100)]
    async with KeyVerifier(clone, memory=True) as verifier:
        await fill(verifier, accounts)
        key_id = next(iter(verifier._digests))
        for number, account_id in enumerate(accounts):
            for _ in range(50):
                verifier._handle_notification(f"account {uuid4()}")
            if number == 50:
                verifier._handle_notification(f"key {key_id}")
                assert key_id not in verifier._digests
            verifier._handle_notification(f"account {account_id}")
            assert account_id not in verifier._account_digests
        assert not verifier._cache
        assert not verifier._digests
        assert not verifier._account_digests


@pytest.mark.slow
async def test_a_key_that_is_revoked_in_a_storm_is_refused(clone: Database) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
    accepted_at = 0.0

    async def use(verifier: KeyVerifier) -> None:
        nonlocal accepted_at
        while True:
            start = time.monotonic()
            await verifier.authorize(raw_key)
            accepted_at = start

    async with stranger(clone.settings) as attacker, KeyVerifier(clone, memory=True) as verifier:
        await verifier.authorize(raw_key)
        users: list[Awaitable[None]] = [use(verifier) for _ in range(5)]
        uses = asyncio.gather(*users, return_exceptions=True)
        storming = asyncio.create_task(attacker.execute(STORM.format(PAYLOADS[0])))
        await asyncio.sleep(0.2)
        revoker = await connect(clone.settings)
        await revoker.execute("UPDATE api_keys SET status = 'revoked' WHERE id = $1", key.id)
        revoked_at = time.monotonic()
        async with asyncio.timeout(30):
            assert {type(error) for error in await uses} == {APIKeyRevoked}
        await storming
        await revoker.close()
    assert accepted_at < revoked_at + LEASE_SECONDS

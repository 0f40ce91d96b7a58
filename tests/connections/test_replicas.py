"""Readonly sessions on replicas."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.clusters import (
    Cluster,
    Server,
    has_caught_up,
    needs_postgresql,
    port_of,
)
from tests.support.waiting import until
from tiger_db import Database, KeyVerifier, crud
from tiger_db.errors import (
    AccessDenied,
    APIKeyRevoked,
    DatabaseUnavailable,
    InvalidState,
)

pytestmark = [needs_postgresql, pytest.mark.slow]
LONG = timedelta(hours=1)
SHORT = timedelta(seconds=0.3)


async def answers(database: Database, server: Server, **options: Any) -> bool:
    async with database.session(readonly=True, **options) as session:
        return await port_of(session) == server.port


@pytest.fixture
async def reading(cluster: Cluster) -> AsyncIterator[Database]:
    """A database whose readonly sessions use the standby."""
    async with Database(cluster.settings(replicas=(cluster.standby,))) as database:
        await until(partial(answers, database, cluster.standby))
        yield database


async def test_a_readonly_session_can_neither_write_nor_authorize(reading: Database) -> None:
    async with reading.session() as session:
        account = await factories.account_with_token(session)
        _, raw_key = await factories.api_key(session)
        claim = await factories.claim(session)
    for max_lag in (LONG, timedelta(0)):  # the standby, the primary
        for attempt in (
            factories.account,
            lambda session: crud.accounts.update(session, account.id, description="x"),
            crud.accounts.find_for_operation,
            lambda session: crud.api_keys.verify_api_key(session, raw_key),
            lambda session: crud.api_keys.authorize_api_key(session, raw_key),
            lambda session: crud.api_keys.authorize_api_key(session, "no key at all"),
            crud.token_status.schedule_due,
            lambda session: crud.token_status.claim_due(session, worker="w"),
            lambda session: crud.token_status.claim(session, claim.id, worker="w"),
            lambda session: crud.token_status.heartbeat(session, claim),
            lambda session: crud.token_status.complete(session, claim, access_token="t"),
            lambda session: crud.token_status.fail(session, claim, message="e"),
            lambda session: crud.token_status.cancel(session, claim.id),
        ):
            with pytest.raises(InvalidState, match="a readonly session cannot"):
                async with reading.session(readonly=True, max_lag=max_lag) as session:
                    await attempt(session)
    async with reading.session() as session:
        assert await factories.account(session)  # the pool's connections are none the worse


async def test_a_revoked_key_is_never_accepted_through_a_lagging_standby(
    cluster: Cluster, reading: Database
) -> None:
    async with reading.session() as session:
        key, raw_key = await factories.api_key(session)
        assert await crud.api_keys.verify_api_key(session, raw_key)
    await has_caught_up(cluster)
    await cluster.standby.sql("SELECT pg_wal_replay_pause()")
    async with KeyVerifier(reading, memory=True) as verifier:
        assert await verifier.verify(raw_key)
        async with reading.session() as session:
            await crud.api_keys.revoke(session, key.id)
        async with reading.session(readonly=True, max_lag=LONG) as session:
            stale = await crud.api_keys.get(session, key.id)
            assert stale
            assert stale.is_active  # as far as the standby knows
            with pytest.raises(InvalidState):
                await crud.api_keys.verify_api_key(session, raw_key)
        async with reading.session() as session:
            with pytest.raises(APIKeyRevoked):
                await crud.api_keys.authorize_api_key(session, raw_key)

        async def is_refused() -> bool:
            return await verifier.verify(raw_key) is None

        await until(is_refused, 1)
    # Not even who has the standby for the primary gets a yes.
    async with Database(cluster.settings(cluster.standby)) as mistaken:
        with pytest.raises(DatabaseUnavailable, match="accepts no writes"):
            async with mistaken.session() as session:
                await crud.api_keys.verify_api_key(session, raw_key)
        with pytest.raises((DatabaseUnavailable, AccessDenied)):
            await KeyVerifier(mistaken).authorize(raw_key)


async def pause(standby: Server) -> None:
    await standby.sql("SELECT pg_wal_replay_pause()")


async def cut_off(standby: Server) -> None:
    """It believes that it has replayed all there is."""
    await standby.sql("ALTER SYSTEM SET primary_conninfo = ''")
    await standby.sql("SELECT pg_reload_conf()")
    receives = "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)"
    await until(partial(standby.sql, receives))


@pytest.mark.parametrize("hold_up", [pause, cut_off])
async def test_a_replica_is_used_within_max_lag_and_otherwise_the_primary(
    cluster: Cluster, reading: Database, hold_up: Any
) -> None:
    await cluster.primary.sql("CREATE TABLE ticks AS SELECT 0 AS n")
    await has_caught_up(cluster)
    committed: list[tuple[float, int]] = [(time.monotonic(), 0)]
    asked_of: set[int] = set()
    done = asyncio.Event()

    async def write() -> None:
        while not done.is_set():
            async with reading.session() as session:
                n = await session.scalar(text("UPDATE ticks SET n = n + 1 RETURNING n"))
            committed.append((time.monotonic(), n))
            await asyncio.sleep(0.01)

    async def read() -> None:
        began = time.monotonic()
        async with reading.session(readonly=True, max_lag=SHORT) as session:
            n = await session.scalar(text("SELECT n FROM ticks"))
            asked_of.add(await port_of(session))
        bound = began - SHORT.total_seconds()
        assert n >= max((n for at, n in committed if at <= bound), default=0)

    async def standby_answers() -> bool:
        await read()
        return cluster.standby.port in asked_of

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        await until(standby_answers)
        await hold_up(cluster.standby)
        stopped = time.monotonic()
        while time.monotonic() < stopped + 3 * SHORT.total_seconds():
            await read()
        asked_of.clear()
        for _ in range(20):
            await read()
        assert asked_of == {cluster.primary.port}
        assert await answers(reading, cluster.standby, max_lag=LONG)  # who does not mind
        done.set()


async def test_without_a_reachable_replica_the_primary_is_used(
    cluster: Cluster, reading: Database
) -> None:
    cluster.standby.stop()
    for _ in range(3):
        assert await answers(reading, cluster.primary)
    cluster.standby.start()
    for replica in reading.replicas._replicas:
        replica.failed_until = 1.0  # long ago: the pause is over
    await until(partial(answers, reading, cluster.standby))
    await asyncio.to_thread(cluster.standby.promote)  # what is promoted is no standby any more
    assert await answers(reading, cluster.primary)


async def test_replicas_are_used_without_the_primary_while_their_lag_is_known(
    cluster: Cluster, reading: Database
) -> None:
    cluster.primary.kill()
    assert await answers(reading, cluster.standby, max_lag=LONG)
    with pytest.raises(DatabaseUnavailable):
        await until(partial(answers, reading, cluster.primary, max_lag=SHORT))


async def test_without_replicas_a_readonly_session_uses_the_primary(database: Database) -> None:
    async with database.session(readonly=True) as session:
        assert await session.scalar(text("SHOW transaction_read_only")) == "on"
        with pytest.raises(InvalidState, match="cannot write"):
            await factories.account(session)
    async with database.session() as session:
        assert await session.scalar(text("SHOW transaction_read_only")) == "off"

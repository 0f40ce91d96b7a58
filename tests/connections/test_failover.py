"""Failover to the standby when the primary is killed or replaced."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.clusters import (
    LOOPBACK,
    Cluster,
    Server,
    has_caught_up,
    needs_postgresql,
    port_of,
)
from tests.support.waiting import until
from tiger_db import Database, KeyVerifier, Settings, crud
from tiger_db import settings as settings_module
from tiger_db.connections import connect
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    DatabaseUnavailable,
    OutcomeUnknown,
)

pytestmark = [needs_postgresql, pytest.mark.slow]


async def test_writes_resume_after_a_failover_and_no_acknowledged_one_is_lost(
    cluster: Cluster,
) -> None:
    cluster.primary.stop()
    cluster.primary.start(synchronous_standby_names="*", synchronous_commit="remote_apply")
    acknowledged: dict[str, int] = {}  # and by which server
    done = asyncio.Event()

    async def write(writer: int, database: Database) -> None:
        number = 0
        while not done.is_set():
            number += 1
            name = f"U{writer}{number:09}"
            try:
                async with database.session() as session:
                    await factories.account(session, account_number=name)
                    port = await port_of(session)
            except DatabaseUnavailable:
                await asyncio.sleep(0.01)
            else:
                acknowledged[name] = port

    async def written(server: Server, number: int) -> bool:
        return list(acknowledged.values()).count(server.port) >= number

    async with Database(cluster.settings(cluster.primary, cluster.standby)) as database:
        async with asyncio.TaskGroup() as tasks:
            for writer in range(4):
                tasks.create_task(write(writer, database))
            await until(partial(written, cluster.primary, 40))
            cluster.primary.kill()
            killed = time.monotonic()
            await asyncio.to_thread(cluster.standby.promote)
            await until(partial(written, cluster.standby, 1))
            assert time.monotonic() - killed < 10  # 0.1 to 0.3 s, where nothing else runs
            await until(partial(written, cluster.standby, 40))
            done.set()
        async with database.session() as session:
            kept = set(await session.scalars(text("SELECT account_number FROM tiger_accounts")))
            assert await port_of(session) == cluster.standby.port
    assert acknowledged.keys() <= kept


async def test_a_transaction_is_run_again_on_the_new_primary(cluster: Cluster) -> None:
    runs: list[int] = []

    async def work(session: AsyncSession) -> None:
        runs.append(await port_of(session))
        await factories.account(session)
        if len(runs) == 1:
            await has_caught_up(cluster)
            cluster.primary.kill()
            await asyncio.to_thread(cluster.standby.promote)
            await factories.account(session)

    async with Database(cluster.settings(cluster.primary, cluster.standby)) as database:
        await database.transaction(work)
        async with database.session() as session:
            assert len(await crud.accounts.list_accounts(session)) == 1
    assert runs == [cluster.primary.port, cluster.standby.port]


async def test_a_former_primary_is_replaced_by_the_new_one(
    cluster: Cluster,
) -> None:
    """As an administrator may fence it; its connections live on."""
    async with Database(cluster.settings(cluster.primary, cluster.standby)) as database:
        async with database.session() as idle, database.session() as idle_too:
            assert await port_of(idle) == await port_of(idle_too) == cluster.primary.port
        await has_caught_up(cluster)
        await cluster.primary.sql("ALTER SYSTEM SET default_transaction_read_only = on")
        await cluster.primary.sql("SELECT pg_reload_conf()")
        await asyncio.to_thread(cluster.standby.promote)
        with pytest.raises(DatabaseUnavailable, match=cluster.primary.location) as caught:
            await until(partial(writes, database))
        assert "\n" not in str(caught.value)
        async with database.session() as one, database.session() as other:
            assert await port_of(one) == await port_of(other) == cluster.standby.port
            await factories.account(one)
        verifier = KeyVerifier(database)  # whose connections are others
        async with database.session() as session:
            _, raw_key = await factories.api_key(session)
        assert await verifier.verify(raw_key)


async def writes(database: Database) -> bool:
    """Never true: for asking until it fails."""
    async with database.session() as session:
        await factories.account(session)
    return False


@pytest.fixture
def silent(cluster: Cluster) -> Iterator[Server]:
    """Return the address of a server that accepts connections and never answers."""
    with socket.create_server((LOOPBACK, 0)) as listening:
        yield Server(cluster.primary.data, listening.getsockname()[1])


def patient(settings: Settings) -> Settings:
    return settings.model_copy(update={"db_connect_timeout": 60})


async def test_a_silent_host_does_not_block_the_next_one(cluster: Cluster, silent: Server) -> None:
    settings = patient(cluster.settings(silent, cluster.standby, cluster.primary))
    async with asyncio.timeout(10), Database(settings) as database, database.session() as session:
        assert await port_of(session) == cluster.primary.port


async def test_a_standby_is_promoted_while_a_silent_host_is_waited_for(
    cluster: Cluster, silent: Server
) -> None:
    standby = f"postgresql://tiger_db@{cluster.standby.location}/tiger_db?target_session_attrs=any"
    watching = await connect(Settings(database_url=standby))
    sessions = "SELECT sessions FROM pg_stat_database WHERE datname = current_database()"
    before = await watching.fetchval(sessions)

    async def was_tried() -> bool:
        return bool(await watching.fetchval(sessions) > before)

    connecting = asyncio.create_task(connect(patient(cluster.settings(silent, cluster.standby))))
    await until(was_tried)
    await asyncio.to_thread(cluster.standby.promote)
    async with asyncio.timeout(10):
        connection = await connecting
    assert await connection.fetchval("SELECT inet_server_port()") == cluster.standby.port
    await connection.close()
    await watching.close()


async def test_a_host_that_closes_each_connection_does_not_block_the_next_one(
    cluster: Cluster,
) -> None:
    """Such as a proxy whose server is down."""
    async with await asyncio.start_server(lambda _, writer: writer.close(), LOOPBACK, 0) as proxy:
        closing = Server(cluster.primary.data, proxy.sockets[0].getsockname()[1])
        connection = await connect(cluster.settings(closing, cluster.primary))
        assert await connection.fetchval("SELECT inet_server_port()") == cluster.primary.port
        await connection.close()
        reason = (
            f"{closing.location}: the server closed the connection; {cluster.standby.location}: "
        )
        with pytest.raises(DatabaseUnavailable, match=reason):
            await connect(cluster.settings(closing, cluster.standby))


async def test_all_hosts_that_refuse_are_named(cluster: Cluster, silent: Server) -> None:
    settings = cluster.settings(cluster.standby, silent)
    with pytest.raises(DatabaseUnavailable) as caught:
        await connect(settings.model_copy(update={"db_connect_timeout": 1}))
    assert len(asyncio.all_tasks()) == 1  # no attempt goes on
    standby, other = str(caught.value).split("; ")
    assert f"{cluster.standby.location}: " in standby
    assert other == f"{silent.location}: the server did not answer in 1 s (DB_CONNECT_TIMEOUT)"


async def test_a_server_that_stops_answering_is_lost(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No statement_timeout ends a statement then: the server is not there to do it."""
    monkeypatch.setattr(settings_module, "_LOST_SERVER_SECONDS", 0.3)
    async with Database(cluster.settings(db_query_timeout=0.2)) as database:
        with pytest.raises(DatabaseUnavailable, match=cluster.primary.location):
            async with asyncio.timeout(10), database.session() as session:
                pid = await session.scalar(text("SELECT pg_backend_pid()"))
                os.kill(pid, signal.SIGSTOP)
                await session.execute(text("SELECT 1"))
        os.kill(pid, signal.SIGCONT)
        async with database.session() as session:
            assert await session.scalar(text("SELECT 1")) == 1


async def test_an_unconfirmed_synchronous_commit_raises_outcome_unknown(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No statement_timeout ends that wait; and the function is not run again."""
    monkeypatch.setattr(settings_module, "_LOST_SERVER_SECONDS", 0.3)
    cluster.standby.stop()
    cluster.primary.stop()
    cluster.primary.start(synchronous_standby_names="*")
    runs = 0

    async def work(session: AsyncSession) -> None:
        nonlocal runs
        runs += 1
        await factories.account(session)

    async with Database(cluster.settings(db_query_timeout=0.2)) as database:
        with pytest.raises(OutcomeUnknown, match="during the commit: it is unknown whether"):
            await database.transaction(work)
        async with database.session(readonly=True) as session:
            assert len(await crud.accounts.list_accounts(session)) == 1
    assert runs == 1

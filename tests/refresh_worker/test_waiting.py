"""Waiting until a refresh has ended: `RefreshWorker.run_one` and `wait_for_refresh`."""

import asyncio
import logging
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from tests.support.refresh_workers import (
    SECOND,
    at_once,
    failing,
    opened,
    row,
)
from tests.support.waiting import until
from tests.support.worker_processes import environment
from tiger_db import (
    Database,
    RefreshWorker,
    Settings,
    TokenRefreshStatus,
    TokenStatus,
    crud,
    refresh_waiting,
    wait_for_refresh,
)
from tiger_db.connections import connect
from tiger_db.errors import (
    CredentialsRefused,
    DatabaseUnavailable,
    InvalidState,
    NotFound,
    RefreshFailed,
    TigerDBError,
    WaitTimeout,
)

S = TokenRefreshStatus
MINUTE = timedelta(minutes=1)
LISTENING = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND query LIKE 'LISTEN%' AND state = 'idle'
"""


@pytest.fixture
def no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only notifications end a wait."""
    monkeypatch.setattr(refresh_waiting, "_POLL_SECONDS", 1000.0)


async def listeners(database: Database) -> int:
    async with database.session() as session:
        return int(await session.scalar(text(LISTENING)) or 0)


@asynccontextmanager
async def waiting(database: Database, refresh_id: UUID) -> AsyncIterator[asyncio.Task[TokenStatus]]:
    """Run `wait_for_refresh` in a task, which listens when the block begins."""
    before = await listeners(database)
    task = asyncio.create_task(wait_for_refresh(database, refresh_id, timeout=MINUTE))

    async def listens() -> bool:
        return await listeners(database) > before

    try:
        await until(listens)
        yield task
    finally:
        task.cancel()


# run_one


async def test_run_one_returns_the_refresh_after_its_attempt(clone: Database) -> None:
    refresh = await opened(clone)
    worker = RefreshWorker(clone, failing(RefreshFailed("busy"), CredentialsRefused("no")))
    first = await worker.run_one(refresh.id)
    assert (first.id, first.status, first.retry_count) == (refresh.id, S.PENDING, 1)
    assert first.error_message == "busy"
    second = await worker.run_one(refresh.id)
    assert (second.status, second.retry_count) == (S.FAILED, 2)
    with pytest.raises(InvalidState):
        await worker.run_one(refresh.id)
    with pytest.raises(NotFound):
        await worker.run_one(uuid4())
    other = await opened(clone)
    done = await RefreshWorker(clone, at_once).run_one(other.id)
    assert (done.id, done.status) == (other.id, S.SUCCESS)
    assert done.new_token_hash is not None


# wait_for_refresh


async def test_a_wait_for_an_ended_refresh_returns_it(clone: Database) -> None:
    refresh = await opened(clone)
    ended = await RefreshWorker(clone, at_once).run_one(refresh.id)
    found = await wait_for_refresh(clone, refresh.id, timeout=timedelta(0))
    assert found.model_dump() == ended.model_dump()


async def test_a_wait_for_an_unknown_refresh_raises_not_found(clone: Database) -> None:
    with pytest.raises(NotFound):
        await wait_for_refresh(clone, uuid4(), timeout=MINUTE)


async def test_a_wait_that_is_too_long_raises_wait_timeout(clone: Database) -> None:
    refresh = await opened(clone)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"did not end within 0:00:00\.2") as caught:
        await wait_for_refresh(clone, refresh.id, timeout=0.2 * SECOND)
    assert 0.2 <= time.monotonic() - start < 2
    assert isinstance(caught.value, TigerDBError)
    assert isinstance(caught.value, WaitTimeout)
    assert caught.value.code == "wait_timeout"
    assert (await row(clone, refresh.id)).is_open


async def end_with_success(database: Database, refresh_id: UUID) -> None:
    await RefreshWorker(database, at_once).run_one(refresh_id)


async def give_up(database: Database, refresh_id: UUID) -> None:
    await RefreshWorker(database, failing(CredentialsRefused("no"))).run_one(refresh_id)


async def cancel(database: Database, refresh_id: UUID) -> None:
    async with database.session() as session:
        await crud.token_status.cancel(session, refresh_id)


@pytest.mark.usefixtures("no_poll")
@pytest.mark.parametrize(
    ("end", "status"),
    [
        (end_with_success, S.SUCCESS),
        pytest.param(give_up, S.FAILED, marks=pytest.mark.slow),
        pytest.param(cancel, S.CANCELLED, marks=pytest.mark.slow),
    ],
)
async def test_a_notification_ends_a_wait(
    clone: Database, end: Callable[[Database, UUID], Awaitable[None]], status: TokenRefreshStatus
) -> None:
    refresh, other = await opened(clone), await opened(clone)
    async with waiting(clone, refresh.id) as wait:
        await end_with_success(clone, other.id)
        # An attempt that is repeated later does not end the refresh.
        await RefreshWorker(clone, failing(RefreshFailed("busy"))).run_one(refresh.id)
        await asyncio.sleep(0.05)
        assert not wait.done()
        await end(clone, refresh.id)
        ended = await asyncio.wait_for(wait, 10)
    assert (ended.id, ended.status) == (refresh.id, status)


@pytest.mark.usefixtures("no_poll")
async def test_many_tasks_wait_for_one_refresh(clone: Database) -> None:
    refresh = await opened(clone)
    async with waiting(clone, refresh.id) as one, waiting(clone, refresh.id) as two:
        await end_with_success(clone, refresh.id)
        for wait in (one, two):
            assert (await asyncio.wait_for(wait, 10)).status == S.SUCCESS


async def test_without_notifications_the_status_is_queried(
    clone: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hear_nothing(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(refresh_waiting, "listen", hear_nothing)
    monkeypatch.setattr(refresh_waiting, "_POLL_SECONDS", 0.05)
    refresh = await opened(clone)
    wait = asyncio.create_task(wait_for_refresh(clone, refresh.id, timeout=MINUTE))
    await asyncio.sleep(0.1)
    assert not wait.done()
    await end_with_success(clone, refresh.id)
    assert (await asyncio.wait_for(wait, 10)).status == S.SUCCESS


async def test_behind_a_pooler_without_a_direct_host_the_status_is_queried(
    clone: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(refresh_waiting, "_POLL_SECONDS", 0.05)
    refresh = await opened(clone)
    settings = clone.settings.model_copy(update={"db_pooler": "pgbouncer"})
    async with Database(settings) as database:
        wait = asyncio.create_task(wait_for_refresh(database, refresh.id, timeout=MINUTE))
        await asyncio.sleep(0.1)
        assert await listeners(clone) == 0
        await end_with_success(clone, refresh.id)
        assert (await asyncio.wait_for(wait, 10)).status == S.SUCCESS
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.usefixtures("no_poll")
async def test_a_wait_listens_again_after_its_connection_is_lost(clone: Database) -> None:
    refresh = await opened(clone)
    async with waiting(clone, refresh.id) as wait:
        async with clone.session() as session:
            await session.execute(text(LISTENING.replace("count(*)", "pg_terminate_backend(pid)")))

        async def listens() -> bool:
            return await listeners(clone) == 1

        await until(listens)
        await end_with_success(clone, refresh.id)
        assert (await asyncio.wait_for(wait, 10)).status == S.SUCCESS


@pytest.mark.slow
async def test_a_wait_holds_no_connection_of_the_pool(clone: Database) -> None:
    refresh = await opened(clone)
    update = {"db_pool_size": 1, "db_max_overflow": 0, "db_pool_timeout": 1}
    async with (
        Database(clone.settings.model_copy(update=update)) as database,
        waiting(database, refresh.id) as wait,
        waiting(database, refresh.id),
    ):
        await end_with_success(database, refresh.id)
        assert (await asyncio.wait_for(wait, 10)).status == S.SUCCESS


async def test_a_cancelled_wait_leaves_neither_task_nor_connection(clone: Database) -> None:
    refresh = await opened(clone)
    before = asyncio.all_tasks()
    async with waiting(clone, refresh.id) as wait:
        wait.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wait
    assert asyncio.all_tasks() == before

    async def nobody_listens() -> bool:
        return await listeners(clone) == 0

    await until(nobody_listens)
    await end_with_success(clone, refresh.id)


async def test_a_wait_without_a_database_raises_database_unavailable(clone: Database) -> None:
    nowhere = SecretStr("postgresql://nobody@127.0.0.1:1/nothing")
    async with Database(clone.settings.model_copy(update={"database_url": nowhere})) as database:
        with pytest.raises(DatabaseUnavailable):
            await wait_for_refresh(database, uuid4(), timeout=timedelta(seconds=0.1))


@pytest.mark.slow
async def test_lost_connections_do_not_end_a_wait(clone: Database) -> None:
    refresh = await opened(clone)
    terminate = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    # This pool has one connection, which is the only one that remains.
    async with Database(clone.settings) as database, Database(clone.settings) as other:

        async def all_listen() -> bool:
            return await listeners(other) == 6

        waits = [
            asyncio.create_task(wait_for_refresh(database, refresh.id, timeout=MINUTE))
            for _ in range(6)
        ]
        for _ in range(5):
            await until(all_listen)
            async with other.session() as session:
                await session.execute(terminate)
        await cancel(other, refresh.id)
        ended = await asyncio.gather(*waits)
    assert {row.status for row in ended} == {S.CANCELLED}


# Worker processes

WORKER = """
import asyncio, signal, sys
from datetime import UTC, datetime, timedelta
from tiger_db import Database, NewToken, RefreshWorker, errors

async def ask(account):
    if account.account_name == "refused":
        raise errors.CredentialsRefused("no")
    return NewToken("new", expires_at=datetime.now(UTC) + timedelta(days=60))

async def main():
    async with Database() as database:
        worker = RefreshWorker(database, ask)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()

asyncio.run(main())
"""


@contextmanager
def worker_process(settings: Settings) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", WORKER], env=environment(settings)) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_poll")
async def test_refreshes_of_worker_processes_are_waited_for(clone: Database) -> None:
    with worker_process(clone.settings), worker_process(clone.settings):
        teller = await connect(clone.settings)
        try:

            async def both_listen() -> bool:
                return int(await teller.fetchval(LISTENING)) == 2

            await until(both_listen)
        finally:
            await teller.close()
        for name, status in (("main", S.SUCCESS), ("refused", S.FAILED), ("main", S.SUCCESS)):
            planned = await opened(clone, scheduled_at=datetime.now(UTC) + 60 * MINUTE)
            account_id = planned.tiger_account_id
            async with clone.session() as session:
                await crud.accounts.update(session, account_id, account_name=name)
            async with waiting(clone, planned.id) as wait:
                async with clone.session() as session:
                    now = await crud.token_status.refresh_now(session, account_id)
                assert (now.id, now.found) == (planned.id, True)
                ended = await asyncio.wait_for(wait, 10)
            assert (ended.id, ended.status) == (planned.id, status)
            assert ended.worker is not None

"""Unreachable servers and lost connections."""

import asyncio
import shutil
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from uuid import uuid4

import psutil
import pytest
from sqlalchemy import NullPool, text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.support import factories
from tests.support.servers import settings_for
from tiger_db import Database, Settings, connections, crud, embedded
from tiger_db.connections import connect, maintenance_engine
from tiger_db.database import AsyncSession
from tiger_db.encryption import generate_key
from tiger_db.errors import (
    DatabaseUnavailable,
)
from tiger_db.migrations import upgrade
from tiger_db.settings import CHECK_INTERVAL
from tiger_db.testing import servers


def assert_one_line_without_credentials(error: BaseException, *credentials: str) -> None:
    assert "\n" not in str(error)
    for credential in credentials:
        assert credential not in str(error)


async def use(settings: Settings) -> None:
    async with Database(settings) as database, database.session() as session:
        await session.execute(text("SELECT 1"))


@pytest.mark.parametrize(
    "changes",
    [
        {"db_host": "127.0.0.1", "db_port": 1},
        {"db_host": "/nowhere"},
        {"db_host": "no-such-host.invalid"},
    ],
)
async def test_an_unreachable_server(changes: dict[str, object]) -> None:
    settings = Settings(**changes, db_password="p@ss%word", db_name="some_db")
    with pytest.raises(DatabaseUnavailable, match=f"{changes['db_host']}.*some_db") as caught:
        await use(settings)
    assert_one_line_without_credentials(caught.value, "p@ss%word")


@pytest.mark.slow
async def test_a_silent_server_raises_an_error_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        settings = Settings(db_host="127.0.0.1", db_port=port, db_connect_timeout=0.2)
        async with asyncio.timeout(5):
            with pytest.raises(
                DatabaseUnavailable, match=r"cannot .* in 0\.2 s \(DB_CONNECT_TIMEOUT\)$"
            ) as caught:
                await use(settings)
            url = f"postgresql://u@127.0.0.1:{port},localhost:{port}/d?connect_timeout=0.1"
            with pytest.raises(DatabaseUnavailable, match=r"0\.1 s \(connect_timeout in DATABASE_"):
                await use(Settings(database_url=url))
    assert_one_line_without_credentials(caught.value)


async def test_a_missing_database(server_url: str) -> None:
    with pytest.raises(DatabaseUnavailable, match="does not exist: run `tiger-db init`") as caught:
        await use(settings_for(server_url, f"missing-{uuid4().hex}"))
    assert_one_line_without_credentials(caught.value)


async def test_an_exhausted_pool(settings: Settings) -> None:
    pool = {"db_pool_size": 1, "db_max_overflow": 1, "db_pool_timeout": 0.1}
    async with Database(settings.model_copy(update=pool)) as database:
        async with database.session() as first, database.session() as second:
            await first.execute(text("SELECT 1"))
            await second.execute(text("SELECT 1"))
            with pytest.raises(DatabaseUnavailable, match=r"in use for 0.1 s \(DB_POOL_SIZE"):
                async with database.session() as third:
                    await third.execute(text("SELECT 1"))
        async with database.session() as session:
            assert await session.scalar(text("SELECT 1")) == 1


@pytest.fixture(scope="module")
def private_server() -> Iterator[Settings]:
    """A private server that tests stop and kill."""
    home = servers.short_folder()
    settings = Settings(tiger_db_home=home / "home", db_query_timeout=20)
    place = embedded.start(settings).folder
    yield settings
    embedded.stop(settings)
    for folder in (home, place):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def private(private_server: Settings) -> AsyncIterator[Database]:
    """A database on the private server, which it does not start by itself."""
    server = embedded.start(private_server)
    name = f"private_{uuid4().hex[:8]}"
    connection = await connect(private_server, database="postgres")
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    settings = Settings(
        db_host=str(server.socket_folder),
        db_name=name,
        db_password=server.connect_args(private_server)["password"].get_secret_value(),
        encryption_keys=generate_key(),
    )
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)
    async with Database(settings) as database:
        yield database


@pytest.mark.slow
async def test_a_wrong_password(private_server: Settings) -> None:
    server = embedded.start(private_server)
    right = server.connect_args(private_server)["password"].get_secret_value()
    assert right
    settings = Settings(db_host=str(server.socket_folder), db_password="my guess")
    with pytest.raises(DatabaseUnavailable, match="password authentication failed") as caught:
        await use(settings)
    assert_one_line_without_credentials(caught.value, "my guess", right)


def stop(settings: Settings) -> None:
    embedded.stop(settings)


def kill(settings: Settings) -> None:
    server = embedded.running(settings)
    assert server
    postmaster = psutil.Process(server.pid)
    everyone = [postmaster, *postmaster.children()]
    postmaster.kill()
    # Until the last of them has seen it, a transaction that is open may still be committed.
    deadline = time.monotonic() + 20
    while any(is_alive(process) for process in everyone):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not; some containers leave them for long."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


Act = Callable[[AsyncSession], Awaitable[object]]


@pytest.mark.slow
@pytest.mark.parametrize("end", [stop, kill])
@pytest.mark.parametrize(
    "act", [crud.accounts.list_accounts, factories.account, AsyncSession.commit]
)
async def test_a_restarted_server(
    private_server: Settings, private: Database, end: Callable[[Settings], None], act: Act
) -> None:
    """The open session says so, nothing of it is kept, and the next session works."""
    assert private.settings.db_password
    password = private.settings.db_password.get_secret_value()
    async with private.session() as idle, private.session() as idle_too:
        await idle.execute(text("SELECT 1"))  # both stay in the pool, for later
        await idle_too.execute(text("SELECT 1"))

    async def lose_the_server() -> None:
        async with private.session() as session:
            await factories.account(session)
            await asyncio.to_thread(end, private_server)
            await act(session)

    for use_it in (lose_the_server, lambda: use(private.settings)):
        with pytest.raises(DatabaseUnavailable, match=private.settings.location) as caught:
            await use_it()
        assert_one_line_without_credentials(caught.value, password)
    await asyncio.to_thread(embedded.start, private_server)
    for _ in range(3):
        async with private.session() as session:
            assert (await crud.accounts.list_accounts(session)).items == []


@pytest.mark.slow
async def test_a_restart_between_two_sessions_causes_no_error(
    private_server: Settings, private: Database
) -> None:
    async with private.session() as idle, private.session() as idle_too:
        await idle.execute(text("SELECT 1"))  # both stay in the pool
        await idle_too.execute(text("SELECT 1"))
    await asyncio.to_thread(stop, private_server)
    await asyncio.to_thread(embedded.start, private_server)
    async with private.session() as first, private.session() as second:
        assert await first.scalar(text("SELECT 1")) == await second.scalar(text("SELECT 1"))


async def test_a_terminated_connection_raises_an_error_and_is_replaced(database: Database) -> None:
    with pytest.raises(DatabaseUnavailable, match="lost") as caught:
        async with database.session() as session:
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    assert_one_line_without_credentials(caught.value)
    async with database.session() as session:
        assert await session.scalar(text("SELECT 1")) == 1


async def test_a_connection_that_is_lost_before_its_first_statement(clone: Database) -> None:
    async def lose(**_: object) -> object:
        connection = await connect(clone.settings)
        connection.terminate()
        return connection

    engine = create_async_engine(
        "postgresql+asyncpg://", connect_args={"async_creator_fn": lose}, poolclass=NullPool
    )
    with pytest.raises(DatabaseUnavailable):
        async with engine.connect():
            pass


async def test_the_server_checks_the_connection_of_a_running_statement(settings: Settings) -> None:
    connection = await connect(settings)
    try:
        assert await connection.fetchval(f"SHOW {CHECK_INTERVAL}") == "1s"
    finally:
        await connection.close()


async def test_a_server_that_cannot_check_connections_is_not_asked_to(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server on Windows refuses any value but 0, as every server refuses a negative one."""
    refused = {**settings.server_settings(), CHECK_INTERVAL: "-1"}
    monkeypatch.setattr(Settings, "server_settings", lambda _: {**refused})
    monkeypatch.setattr(connections, "_without_check_interval", set())
    for _ in range(2):
        connection = await connect(settings)
        try:
            assert await connection.fetchval(f"SHOW {CHECK_INTERVAL}") == "0"
            assert await connection.fetchval("SHOW timezone") == "UTC"
        finally:
            await connection.close()
    monkeypatch.setattr(Settings, "server_settings", lambda _: {**refused, "work_mem": "-1"})
    with pytest.raises(DatabaseUnavailable, match="work_mem"):
        await connect(settings)

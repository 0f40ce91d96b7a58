import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests import factories
from tests.servers import settings_for
from tiger_db import Database, Settings, crud, embedded
from tiger_db.database import AsyncSession, connect, migration_engine
from tiger_db.encryption import MASK, generate_key
from tiger_db.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    EncryptionError,
    SchemaMismatch,
)
from tiger_db.migrations import upgrade


def assert_one_line_without_credentials(error: BaseException, *credentials: str) -> None:
    assert "\n" not in str(error)
    for credential in credentials:
        assert credential not in str(error)


# Transactions


async def test_a_session_commits_on_success(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
    async with clone.session() as session:
        assert await crud.accounts.get(session, account.id)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, asyncio.CancelledError])
async def test_a_session_rolls_back_on_an_exception(
    clone: Database, error: type[BaseException]
) -> None:
    async def fail() -> None:
        async with clone.session() as session:
            await factories.account(session)
            raise error

    with pytest.raises(error):
        await fail()
    async with clone.session() as session:
        assert (await crud.accounts.list_accounts(session)).items == []


@pytest.mark.parametrize("how", [asyncio.CancelledError, TimeoutError])
async def test_cancelling_a_query_cancels_its_task_and_costs_no_connection(
    database: Database, how: type[BaseException]
) -> None:
    limit = asyncio.timeout(None)

    async def query() -> None:
        async with limit, database.session() as session:
            await session.execute(text("SELECT pg_sleep(20)"))

    task = asyncio.create_task(query())
    await somebody_sleeps(database)
    if how is TimeoutError:
        limit.reschedule(0)
    else:
        task.cancel()
    with pytest.raises(how):
        await task
    async with database.session() as session:
        assert await session.scalar(text("SELECT 1")) == 1
    assert "Current Checked out connections: 0" in database.engine.pool.status()


async def somebody_sleeps(database: Database) -> None:
    async with asyncio.timeout(10), database.engine.connect() as connection:
        while not await connection.scalar(
            text(
                "SELECT true FROM pg_stat_activity WHERE datname = current_database()"
                " AND wait_event = 'PgSleep'"
            )
        ):
            await connection.rollback()  # the next look is a new one


async def test_a_query_that_takes_too_long_is_stopped(settings: Settings) -> None:
    hurried = settings.model_copy(update={"db_query_timeout": 0.05})
    async with Database(hurried) as database:
        with pytest.raises(DBAPIError, match="statement timeout"):
            async with database.session() as session:
                await session.execute(text("SELECT pg_sleep(20)"))
        async with database.session() as session:
            assert await session.scalar(text("SELECT 1")) == 1


async def test_errors_and_logs_hide_parameters(
    settings: Settings, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with Database(settings.model_copy(update={"db_debug": True})) as database:
        with pytest.raises(DBAPIError) as caught:
            async with database.session() as session:
                await session.execute(text("SELECT 1 / 0 WHERE :x <> ''"), {"x": "my secret"})
    assert "my secret" not in f"{caught.value!r} {caught.value}"
    logged = f"{capfd.readouterr()} {caplog.text}"
    assert "SELECT 1 / 0" in logged
    assert "my secret" not in logged


async def test_sessions_speak_utc(database: Database) -> None:
    async with database.session() as session:
        assert await session.scalar(text("SHOW timezone")) == "UTC"


# Keys


async def test_two_databases_in_one_process_keep_their_keys_apart(clone: Database) -> None:
    other_keys = clone.settings.model_copy(
        update={"encryption_keys": SecretStr(generate_key("other"))}
    )
    async with Database(other_keys) as other:
        async with clone.session() as session, other.session() as other_session:
            mine = await factories.account(session)
            theirs = await factories.account(other_session)
        async with clone.session() as session, other.session() as other_session:
            my_view = await crud.accounts.list_accounts(session)
            their_view = await crud.accounts.list_accounts(other_session)
    for view, readable, sealed in ((my_view, mine, theirs), (their_view, theirs, mine)):
        accounts = {account.id: account for account in view}
        assert accounts[readable.id].private_key.get_secret_value() == "test_key"
        assert str(accounts[sealed.id].private_key) == MASK
        with pytest.raises(EncryptionError, match="not configured"):
            accounts[sealed.id].private_key.get_secret_value()


async def test_after_a_change_of_keys_the_old_one_still_reads_and_finds(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session, tiger_id="20159999")
    assert clone.settings.encryption_keys
    both = f"{generate_key('new')},{clone.settings.encryption_keys.get_secret_value()}"
    changed = clone.settings.model_copy(update={"encryption_keys": SecretStr(both)})
    async with Database(changed) as database, database.session() as session:
        (found,) = await crud.accounts.get_by_tiger_id(session, "20159999")
        assert found.id == account.id
        assert found.private_key.get_secret_value() == "test_key"


@pytest.mark.parametrize("keys", ["k1:short", "no colon", "k1:" + "A" * 43 + "=,k1:" + "A" * 44])
async def test_malformed_keys_are_refused_without_showing_them(
    settings: Settings, keys: str
) -> None:
    with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS") as caught:
        Database(settings.model_copy(update={"encryption_keys": SecretStr(keys)}))
    assert_one_line_without_credentials(caught.value, "short", "A" * 43)


# The default database

DEFAULT = """
import asyncio, gc, sys, weakref
from tiger_db import get_session, crud
from tests import factories

loops = []

async def main():
    loops.append(weakref.ref(asyncio.get_running_loop()))
    async with get_session() as session:
        await factories.account(session, account_number=str(len(loops)))

    async def read():
        async with get_session() as session:
            return len(await crud.accounts.list_accounts(session))

    assert await asyncio.gather(read(), read(), read()) == [len(loops)] * 3

for _ in range(3):
    asyncio.run(main())
gc.collect()
print(sum(loop() is None for loop in loops))
"""


def run_python(script: str, settings: Settings, *options: str) -> subprocess.CompletedProcess[str]:
    assert settings.database_url
    assert settings.encryption_keys
    given = {
        "DATABASE_URL": settings.database_url.get_secret_value(),
        "ENCRYPTION_KEYS": settings.encryption_keys.get_secret_value(),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    return subprocess.run(
        [sys.executable, *options, "-c", script],
        env=os.environ | given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_the_default_database_serves_one_event_loop_after_another(
    clone_settings: Settings,
) -> None:
    """It is the environment's, it leaves no warning at exit, and no closed loop in memory."""
    done = await asyncio.to_thread(run_python, DEFAULT, clone_settings, "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")
    async with Database(clone_settings) as database, database.session() as session:
        assert len(await crud.accounts.list_accounts(session)) == 3


async def test_rows_are_usable_when_everything_is_closed(clone_settings: Settings) -> None:
    async with Database(clone_settings) as database, database.session() as session:
        account = await factories.account(session, tags={"a": [1]})
    assert account.private_key.get_secret_value() == "test_key"
    assert account.model_dump(mode="json")["tags"] == {"a": [1]}


# Schemas


async def use(settings: Settings) -> None:
    async with Database(settings) as database, database.session() as session:
        await session.execute(text("SELECT 1"))


async def test_a_missing_schema_is_told_and_then_found(empty_database: Settings) -> None:
    async with Database(empty_database) as database:
        for _ in range(2):
            with pytest.raises(SchemaMismatch, match="no tiger_db schema: run `tiger-db init`"):
                async with database.session():
                    pass
        async with migration_engine(empty_database) as engine:
            await upgrade(engine)
        async with database.session() as session:
            assert (await crud.accounts.list_accounts(session)).items == []


async def test_a_schema_of_a_newer_version_is_told(clone_settings: Settings) -> None:
    connection = await connect(clone_settings)
    await connection.execute("UPDATE alembic_version SET version_num = 'from the future'")
    await connection.close()
    with pytest.raises(SchemaMismatch, match=r"from the future.*newer.*upgrade tiger_db"):
        await use(clone_settings)


# Servers that cannot be reached


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


async def test_a_silent_server_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        settings = Settings(db_host="127.0.0.1", db_port=port, db_connect_timeout=0.2)
        async with asyncio.timeout(5):
            with pytest.raises(DatabaseUnavailable, match="cannot connect") as caught:
                await use(settings)
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
    """A server of our own, to stop and to kill."""
    home = Path(tempfile.mkdtemp(prefix="tdb-"))
    home.chmod(0o755)
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
        db_password=server.connect_args(private_server)["password"],
        encryption_keys=generate_key(),
    )
    async with migration_engine(settings) as engine:
        await upgrade(engine)
    async with Database(settings) as database:
        yield database


async def test_a_wrong_password(private_server: Settings) -> None:
    server = embedded.start(private_server)
    right = server.connect_args(private_server)["password"]
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
        with pytest.raises(DatabaseUnavailable, match=private.settings.place) as caught:
            await use_it()
        assert_one_line_without_credentials(caught.value, password)
    await asyncio.to_thread(embedded.start, private_server)
    for _ in range(3):
        async with private.session() as session:
            assert (await crud.accounts.list_accounts(session)).items == []


async def test_a_restart_between_two_sessions_goes_unnoticed(
    private_server: Settings, private: Database
) -> None:
    async with private.session() as idle, private.session() as idle_too:
        await idle.execute(text("SELECT 1"))  # both stay in the pool
        await idle_too.execute(text("SELECT 1"))
    await asyncio.to_thread(stop, private_server)
    await asyncio.to_thread(embedded.start, private_server)
    async with private.session() as first, private.session() as second:
        assert await first.scalar(text("SELECT 1")) == await second.scalar(text("SELECT 1"))


async def test_a_terminated_connection_is_told_and_replaced(database: Database) -> None:
    with pytest.raises(DatabaseUnavailable, match="lost") as caught:
        async with database.session() as session:
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    assert_one_line_without_credentials(caught.value)
    async with database.session() as session:
        assert await session.scalar(text("SELECT 1")) == 1

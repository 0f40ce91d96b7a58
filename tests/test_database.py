import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.support import factories
from tests.support.factories import plain
from tiger_db import Database, Settings, TigerAccount, crud
from tiger_db.connections import connect, maintenance_engine
from tiger_db.crud.common import get_or_raise
from tiger_db.encryption import generate_key
from tiger_db.errors import (
    AlreadyExists,
    ConfigurationError,
    Conflict,
    DatabaseUnavailable,
    EncryptionError,
    MissingReference,
    QueryTimeout,
    SchemaMismatch,
)
from tiger_db.migrations import upgrade
from tiger_db.redaction import MASK

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
async def test_cancelling_a_query_cancels_its_task_and_loses_no_connection(
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


async def test_a_query_is_cancelled_after_its_timeout(settings: Settings) -> None:
    hurried = settings.model_copy(update={"db_query_timeout": 0.05})
    async with Database(hurried) as database:
        with pytest.raises(QueryTimeout, match=r"statement timeout \(DB_QUERY_TIMEOUT\)$"):
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


async def test_sessions_use_utc(database: Database) -> None:
    async with database.session() as session:
        assert await session.scalar(text("SHOW timezone")) == "UTC"


async def test_a_violated_constraint_at_the_end_of_a_session_is_an_error_of_tiger_db(
    clone: Database,
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        await factories.api_key(session, tiger_account_id=account.id)
    with pytest.raises(MissingReference):
        async with clone.session() as session:
            await session.delete(await get_or_raise(session, TigerAccount, account.id))
    with pytest.raises(AlreadyExists, match="this account number") as caught:
        async with clone.session() as session:
            session.add(factories.new_account(account_number=account.account_number))
    assert caught.value.__cause__ is None
    async with clone.session() as session:
        assert len(await crud.accounts.list_accounts(session)) == 1


async def test_a_row_that_another_session_has_deleted_is_a_conflict(clone: Database) -> None:
    async with clone.session() as session:
        account_id = (await factories.account(session)).id
    with pytest.raises(Conflict, match="another transaction has deleted a row"):
        async with clone.session() as session:
            account = await get_or_raise(session, TigerAccount, account_id)
            async with clone.session() as other:
                await crud.accounts.delete(other, account_id)
            account.description = "changed"


@pytest.mark.parametrize("by", ["a function", "the commit"])
async def test_a_session_without_a_free_connection_is_unavailable(
    clone_settings: Settings, by: str
) -> None:
    one = {"db_pool_size": 1, "db_max_overflow": 0, "db_pool_timeout": 0.1}
    async with (
        Database(clone_settings.model_copy(update=one)) as database,
        database.session() as session,
    ):
        await session.execute(text("SELECT"))
        with pytest.raises(DatabaseUnavailable, match="in use"):
            async with database.session() as waiting:
                if by == "a function":
                    await crud.accounts.list_accounts(waiting)
                waiting.add(factories.new_account())


# Keys


async def test_two_databases_in_one_process_have_separate_keys(clone: Database) -> None:
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
        assert plain(accounts[readable.id].private_key) == "test_key"
        assert str(accounts[sealed.id].private_key) == MASK
        with pytest.raises(EncryptionError, match="not configured"):
            plain(accounts[sealed.id].private_key)


async def test_after_a_change_of_keys_the_old_key_still_decrypts_and_finds(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session, tiger_id="20159999")
    assert clone.settings.encryption_keys
    both = f"{generate_key('new')},{clone.settings.encryption_keys.get_secret_value()}"
    changed = clone.settings.model_copy(update={"encryption_keys": SecretStr(both)})
    async with Database(changed) as database, database.session() as session:
        (found,) = await crud.accounts.list_by_tiger_id(session, "20159999")
        assert found.id == account.id
        assert plain(found.private_key) == "test_key"


@pytest.mark.parametrize("keys", ["k1:short", "no colon", "k1:" + "A" * 43 + "=,k1:" + "A" * 44])
async def test_malformed_keys_are_refused_without_showing_them(
    settings: Settings, keys: str
) -> None:
    with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS") as caught:
        Database(settings.model_copy(update={"encryption_keys": SecretStr(keys)}))
    assert "short" not in str(caught.value)
    assert "A" * 43 not in str(caught.value)


# The default database

DEFAULT = """
import asyncio, gc, sys, weakref
from tiger_db import get_session, crud
from tests.support import factories

loops = []

async def main():
    loops.append(weakref.ref(asyncio.get_running_loop()))
    async with get_session() as session:
        await factories.account(session, account_number=f"U{len(loops)}")

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


@pytest.mark.slow
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
    assert plain(account.private_key) == "test_key"
    assert account.model_dump(mode="json")["tags"] == {"a": [1]}


# Schemas


@pytest.mark.slow
async def test_a_missing_schema_is_an_error_until_it_exists(empty_database: Settings) -> None:
    async with Database(empty_database) as database:
        for _ in range(2):
            with pytest.raises(SchemaMismatch, match="no tiger_db schema: run `tiger-db init`"):
                async with database.session():
                    pass
        async with maintenance_engine(empty_database) as engine:
            await upgrade(engine)
        async with database.session() as session:
            assert (await crud.accounts.list_accounts(session)).items == []


async def test_a_schema_of_a_newer_version_is_an_error(clone_settings: Settings) -> None:
    connection = await connect(clone_settings)
    await connection.execute("UPDATE tiger_db_alembic_version SET version_num = 'from the future'")
    await connection.close()
    with pytest.raises(SchemaMismatch, match=r"from the future.*newer.*upgrade tiger_db"):
        async with Database(clone_settings) as database, database.session():
            pass

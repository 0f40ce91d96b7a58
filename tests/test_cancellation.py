"""Cancellation of statements, by anyio (as MCP's SDK and Starlette do) and by asyncio.

`make test` runs a short version of the random cancellations; TIGER_DB_SOAK=1 the full one.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from uuid import uuid4

import anyio
import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.waiting import until
from tiger_db import AuditAction, AuditLog, Database, KeyVerifier, crud
from tiger_db.connections import connect
from tiger_db.connections.listener import Connection
from tiger_db.connections.pool import run_to_completion
from tiger_db.settings import Settings

SOAK = bool(os.environ.get("TIGER_DB_SOAK"))
CANCELLATIONS = 1000 if SOAK else 60
ACTIONS = (AuditAction.MCP_TOOL_CALL, AuditAction.DATA_QUERY)
Cancel = Callable[[Awaitable[object], Coroutine[Any, Any, None]], Awaitable[bool]]
# Sessions in the server, except those that wait for their client outside of a transaction.
_BUSY = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
    AND state <> 'idle'
"""
_SESSIONS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
_SLEEPING = f"{_BUSY} AND wait_event = 'PgSleep'"
_NO_SESSIONS = f"SELECT 0 = ({_SESSIONS})"
_LOCKS = """
SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
_HALF_TRANSACTIONS = """
SELECT count(*) FROM (
    SELECT user_id FROM audit_logs
    WHERE action IN ('mcp:tool_call', 'data:query')
    GROUP BY user_id HAVING count(*) <> 2
) AS half
"""


async def by_anyio(moment: Awaitable[object], work: Coroutine[Any, Any, None]) -> bool:
    """Await `work`, and cancel it after `moment`; return whether it was cancelled."""
    with anyio.CancelScope() as scope:
        waiting = asyncio.ensure_future(moment)
        waiting.add_done_callback(lambda _: scope.cancel())
        await work
    waiting.cancel()
    return scope.cancelled_caught


async def by_asyncio(moment: Awaitable[object], work: Coroutine[Any, Any, None]) -> bool:
    task = asyncio.create_task(work)
    waiting = asyncio.ensure_future(moment)
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return task.cancelled()


both = pytest.mark.parametrize("cancel", [by_anyio, by_asyncio])


@both
async def test_a_cancelled_statement_ends_in_the_server_and_holds_no_locks(
    clone: Database, cancel: Cancel
) -> None:
    async with clone.session() as session:
        account = await factories.account(session)

    async def work() -> None:
        async with clone.session() as session:
            await crud.accounts.update(session, account.id, description="cancelled")
            await session.execute(text("SELECT pg_sleep(30)"))

    observer = await connect(clone.settings)
    try:
        moment = until(lambda: observer.fetchval(f"SELECT 0 < ({_SLEEPING})"))
        assert await cancel(moment, work())
        assert await observer.fetchval(_BUSY) == 0
        assert await observer.fetchval(_LOCKS) == 0
    finally:
        await observer.close()
    async with asyncio.timeout(5), clone.session() as session:
        changed = await crud.accounts.update(session, account.id, tags={"a": "b"})
        assert changed.description is None


@both
@pytest.mark.slow
async def test_cancelled_statements_do_not_exceed_the_bound_of_the_pool(
    clone_settings: Settings, cancel: Cancel
) -> None:
    small = {"db_pool_size": 1, "db_max_overflow": 1}

    async def work() -> None:
        async with database.session() as session:
            await session.execute(text("SELECT pg_sleep(30)"))

    async with Database(clone_settings.model_copy(update=small)) as database:
        await database.check()
        observer = await connect(clone_settings)
        try:
            for _ in range(5):
                await asyncio.gather(*(cancel(asyncio.sleep(0.05), work()) for _ in range(4)))
                assert await observer.fetchval(_SESSIONS) <= 2
        finally:
            await observer.close()


@both
async def test_a_cancelled_transaction_of_a_raw_connection_is_rolled_back(
    clone: Database, cancel: Cancel
) -> None:
    locked = asyncio.Event()

    async def work() -> None:
        async with clone.out_of_band.connection() as connection, connection.transaction():
            await connection.execute("LOCK TABLE api_keys IN SHARE MODE")
            locked.set()
            await asyncio.sleep(30)

    assert await cancel(locked.wait(), work())
    async with clone.out_of_band.connection() as connection:
        assert not connection.is_in_transaction()
        assert await connection.fetchval(_LOCKS) == 0


@both
async def test_a_cancelled_block_closes_its_database(
    clone_settings: Settings, cancel: Cancel
) -> None:
    authorized = asyncio.Event()

    async def work() -> None:
        async with Database(clone_settings) as database:
            async with database.session() as session:
                _, raw_key = await factories.api_key(session)
            async with KeyVerifier(database, memory=True) as verifier:
                await verifier.authorize(raw_key)
                authorized.set()
                await asyncio.sleep(30)

    assert await cancel(authorized.wait(), work())
    observer = await connect(clone_settings)
    try:
        assert await observer.fetchval("SELECT usage_count FROM api_keys") == 1
        await until(lambda: observer.fetchval(_NO_SESSIONS))  # the listener's ends by itself
    finally:
        await observer.close()


async def test_a_shielded_coroutine_ends_before_the_cancellation_is_raised() -> None:
    ended = []

    async def work() -> str:
        await asyncio.sleep(0.01)
        ended.append(True)
        return "done"

    def to_completion() -> Coroutine[Any, Any, str]:
        return run_to_completion(asyncio.create_task(work()))

    assert await to_completion() == "done"
    with anyio.move_on_after(0) as scope:
        assert await to_completion() == "done"
        await asyncio.sleep(30)
    assert scope.cancelled_caught
    task = asyncio.create_task(to_completion())
    await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(ended) == 3


@pytest.mark.slow
async def test_random_cancellations_leave_nothing_behind(clone_settings: Settings) -> None:
    """No session, lock, connection or half of a transaction is left behind."""
    small = {"db_pool_size": 3, "db_max_overflow": 2, "db_pool_timeout": 60}
    database = Database(clone_settings.model_copy(update=small))
    observer = await connect(clone_settings)
    try:
        async with database:
            await cancel_at_random_moments(database, observer)
            await database.usage_counter.close()  # it writes in the background
            for engine in (database.engine, database.out_of_band.engine):
                assert "Current Checked out connections: 0" in engine.pool.status()
            assert await observer.fetchval(_BUSY) == 0
            assert await observer.fetchval(_LOCKS) == 0
            assert await observer.fetchval(_SESSIONS) <= 5 + 4
            assert await observer.fetchval(_HALF_TRANSACTIONS) == 0
        assert await observer.fetchval(_NO_SESSIONS)
    finally:
        await observer.close()


async def cancel_at_random_moments(database: Database, observer: Connection) -> None:
    """Cancel `CANCELLATIONS` calls of public functions, ten at a time."""
    async with database.session() as session:
        account = await factories.account(session)
        _, raw_key = await factories.api_key(session, rate_limit_per_hour=1_000_000)
    verifier = KeyVerifier(database)

    async def change(then: str = "SELECT 1") -> None:
        name = uuid4().hex
        async with database.session() as session:
            await crud.audit_logs.log_event(session, action=ACTIONS[0], user_id=name)
            await session.execute(text(then))
            await crud.accounts.update(session, account.id, description=name)
            await crud.audit_logs.log_event(session, action=ACTIONS[1], user_id=name)

    async def hang() -> None:
        await change(then="SELECT pg_sleep(60)")

    async def insert() -> None:
        name = uuid4().hex
        async with database.session() as session:
            events = [AuditLog(action=action, user_id=name) for action in ACTIONS]
            await crud.audit_logs.log_events(session, events)

    async def read() -> None:
        async with database.session(readonly=True) as session:
            await crud.accounts.list_accounts(session, count=True)

    async def authorize() -> None:
        await verifier.authorize(raw_key)

    async def deny() -> None:
        await verifier.verify("tk_test_nothing")

    async def one() -> bool:
        cancel = random.choice([by_anyio, by_asyncio])
        work = random.choice([change, hang, insert, read, authorize, deny])
        return await cancel(asyncio.sleep(random.uniform(0, 0.2)), work())

    cancelled = 0
    while cancelled < CANCELLATIONS:
        cancelled += sum(await asyncio.gather(*(one() for _ in range(10))))
        assert await observer.fetchval(_SLEEPING) == 0

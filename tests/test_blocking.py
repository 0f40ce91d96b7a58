"""Calls of async functions from synchronous code: one event loop and one pool for each process."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from tests.support.sql import sql
from tests.support.worker_processes import environment
from tiger_db import (
    Actor,
    APIKeyScope,
    AuditAction,
    Database,
    Settings,
    acting_as,
    blocking,
    crud,
    get_database,
    get_session,
    run_blocking,
)
from tiger_db.errors import InvalidState, InvalidValue


@pytest.fixture(autouse=True)
def _default(clone_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in environment(clone_settings).items():
        monkeypatch.setenv(name, value)
    yield
    blocking._stop()
    blocking._forget()


async def user_of_new_event() -> str | None:
    async with get_session() as session:
        event = await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
        return event.user_id


async def database_of_loop() -> Database:
    return get_database()


def test_all_threads_share_one_database(clone_settings: Settings) -> None:
    found: list[Database] = []
    threads = [
        threading.Thread(target=lambda: found.append(run_blocking(database_of_loop)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5
    assert len(set(found)) == 1


def test_the_actor_of_the_caller_acts() -> None:
    with acting_as(Actor(user_id="alice")):
        assert run_blocking(user_of_new_event) == "alice"


def test_an_error_is_raised_in_the_caller() -> None:
    async def fail() -> None:
        raise KeyError("reason")

    with pytest.raises(KeyError, match="reason"):
        run_blocking(fail)


def test_a_call_that_would_block_its_own_loop_is_refused() -> None:
    async def call_again() -> None:
        run_blocking(user_of_new_event)

    with pytest.raises(InvalidState, match="write `await`"):
        run_blocking(call_again)


def test_a_coroutine_is_no_function() -> None:
    call = user_of_new_event()
    with pytest.raises(InvalidValue, match="not its call"):
        run_blocking(call)  # type: ignore[arg-type]  # the mistake
    call.close()


def test_an_interrupted_call_is_cancelled() -> None:
    """As Ctrl-C and a time limit of Celery interrupt a call."""
    started, cancelled = threading.Event(), threading.Event()

    async def work() -> None:
        try:
            async with get_session() as session:
                started.set()
                await session.execute(text("SELECT pg_sleep(60)"))
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupt() -> None:
        started.wait(10)
        os.kill(os.getpid(), 2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_blocking(work)
    thread.join()
    assert cancelled.wait(10)


PREFORK = """
import asyncio, os, sys, threading
from tiger_db import AuditAction, KeyVerifier, crud, get_database, get_session, run_blocking

async def backend():
    async with get_session() as session:
        await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
        return str(await session.connection()), os.getpid(), id(asyncio.get_running_loop())

async def use():
    await KeyVerifier(get_database()).authorize(sys.argv[1])

run_blocking(backend)  # the parent has a loop and connections before it forks
for _ in range(3):
    if os.fork() == 0:
        threads = [threading.Thread(target=run_blocking, args=[backend]) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        run_blocking(use)
        sys.exit(0)
for _ in range(3):
    assert os.wait()[1] == 0
run_blocking(backend)
run_blocking(use)
print(len(threading.enumerate()))
"""


@pytest.mark.slow
def test_forked_processes_have_their_own_loops_and_close_their_databases(
    clone_settings: Settings,
) -> None:
    async def raw_key() -> str:
        async with get_session() as session:
            _, raw = await crud.api_keys.create_api_key(
                session, name="a", scopes=[APIKeyScope.MCP_READ]
            )
            return raw

    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", PREFORK, run_blocking(raw_key)],
        env=environment(clone_settings), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    events = "SELECT count(*) FROM audit_logs WHERE action = 'data:query'"
    assert asyncio.run(sql(clone_settings, events)) == 14
    assert asyncio.run(sql(clone_settings, "SELECT usage_count FROM api_keys")) == 4

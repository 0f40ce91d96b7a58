"""A Database belongs to one process and one event loop."""

import asyncio
import gc
import os
import re
import traceback
import warnings
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from tests.support import factories
from tiger_db import (
    AuditAction,
    AuditLog,
    Database,
    KeyVerifier,
    NewToken,
    RefreshWorker,
    Settings,
    TigerAccount,
    get_database,
    get_session,
    wait_for_refresh,
)
from tiger_db.audit import export
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidState

Call = Callable[[Database], Coroutine[Any, Any, object]]
_COUNT = text("SELECT count(*) FROM tiger_accounts")


def in_child(work: Callable[[], object]) -> str:
    """Fork, call `work` in the child process, and return the text of its result or error."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has several threads
        child = os.fork()
    if child == 0:
        try:
            try:
                answer = str(work())
            except InvalidState as error:
                answer = str(error)
            except BaseException:  # noqa: BLE001  # the parent shows it
                answer = traceback.format_exc()
            gc.collect()
            os.write(writing, answer.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer_of_child:
        answer = answer_of_child.read()
    os.waitpid(child, 0)
    return answer


def in_other_loop(work: Callable[[], Coroutine[Any, Any, object]]) -> Coroutine[Any, Any, object]:
    return asyncio.to_thread(lambda: asyncio.run(work()))


async def read(database: Database) -> int:
    async with database.session() as session:
        return int(await session.scalar(_COUNT) or 0)


async def transact(database: Database) -> object:
    async def work(session: AsyncSession) -> object:
        return await session.scalar(_COUNT)

    return await database.transaction(work)


async def connect(database: Database) -> object:
    async with database.engine.connect() as connection:
        return await connection.scalar(_COUNT)


async def record(database: Database) -> None:
    await database.out_of_band.record(AuditLog(action=AuditAction.DATA_QUERY))


async def verify(database: Database) -> object:
    return await KeyVerifier(database).verify("tk_test_nothing")


async def refresh(database: Database) -> None:
    async def refresher(_account: TigerAccount) -> NewToken:
        raise NotImplementedError

    await RefreshWorker(database, refresher).run(once=True)


async def wait(database: Database) -> object:
    return await wait_for_refresh(database, uuid4(), timeout=timedelta(seconds=1))


async def export_all(database: Database) -> object:
    return [line async for line in export(database)]


CALLS: list[Call] = [read, transact, connect, record, verify, refresh, wait, export_all]


@pytest.mark.parametrize("call", CALLS)
async def test_another_event_loop_is_refused(clone: Database, call: Call) -> None:
    await read(clone)
    await record(clone)
    with pytest.raises(InvalidState) as caught:
        await in_other_loop(lambda: call(clone))
    loops = re.findall(r"event loop \w+ (0x\w+)", str(caught.value))
    assert loops[0] == f"{id(asyncio.get_running_loop()):#x}" != loops[1]
    assert str(caught.value).endswith("use get_database(), or a Database of its own")
    assert await read(clone) == 0


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
async def test_a_forked_process_is_refused(clone: Database, call: Call) -> None:
    await read(clone)
    await record(clone)
    answer = in_child(lambda: asyncio.run(call(clone)))
    found = re.search(
        r"belongs to the process (\d+), but this is the process (\d+): in each process, use", answer
    )
    assert found, answer
    assert int(found[1]) == os.getpid() != int(found[2])
    assert await read(clone) == 0


@pytest.mark.slow
async def test_a_forked_process_does_not_disturb_its_parent(clone: Database) -> None:
    """Neither by closing the Database, nor by losing it, nor by ending an open session."""
    async with clone.session() as session:
        await factories.account(session)
        backend = await session.scalar(text("SELECT pg_backend_pid()"))

        async def end_session() -> str:
            try:
                await session.rollback()
                await session.close()
            except Exception as error:  # noqa: BLE001
                return type(error).__name__
            return "closed"

        def lose() -> None:
            for pool in clone.engine.pool, clone.out_of_band.engine.pool:
                pool.__dict__.clear()
            clone.__dict__.clear()

        assert in_child(lambda: asyncio.run(clone.close())) == "None"
        assert in_child(lambda: asyncio.run(end_session())) in ("DatabaseUnavailable", "closed")
        assert in_child(lose) == "None"
        assert await session.scalar(text("SELECT pg_backend_pid()")) == backend
    assert await read(clone) == 1


@pytest.mark.slow
async def test_a_closed_database_belongs_to_nobody(clone_settings: Settings) -> None:
    database = Database(clone_settings)

    async def use() -> int:
        async with database:
            return await read(database)

    assert await in_other_loop(use) == 0
    assert await use() == 0
    assert in_child(lambda: asyncio.run(use())) == "0"


@pytest.mark.slow
async def test_an_unused_database_belongs_to_nobody(clone_settings: Settings) -> None:
    database = Database(clone_settings)
    assert in_child(lambda: asyncio.run(read(database))) == "0"
    assert await read(database) == 0
    await database.close()


async def test_another_event_loop_cannot_close_a_database(clone: Database) -> None:
    await read(clone)
    with pytest.raises(InvalidState, match="belongs to the event loop"):
        await in_other_loop(clone.close)
    assert await read(clone) == 0


@pytest.mark.slow
async def test_each_process_and_loop_has_its_default_database(
    clone: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with clone.session() as session:
        await factories.account(session)
    url = clone.settings.database_url
    assert url is not None
    monkeypatch.setenv("DATABASE_URL", url.get_secret_value())

    async def use() -> int:
        async with get_session() as session:
            found = await session.scalar(_COUNT)
            assert get_database() is get_database()
            assert session.bind is get_database().engine
        return int(found or 0)

    async def compare() -> bool:
        other: Database = get_database()
        await use()
        return other is get_database()

    assert await in_other_loop(compare)
    assert await in_other_loop(use) == 1
    assert await use() == 1
    assert in_child(lambda: asyncio.run(use())) == "1"
    assert await use() == 1
    await get_database().close()


def test_the_default_database_needs_an_event_loop() -> None:
    with pytest.raises(InvalidState, match="no event loop of asyncio runs in this thread"):
        get_database()

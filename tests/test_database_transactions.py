"""Retries of transactions."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from uuid import UUID

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.waiting import until
from tiger_db import Database, crud
from tiger_db.connections import connect
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    Conflict,
    DatabaseUnavailable,
    NotFound,
    OutcomeUnknown,
    QueryTimeout,
    TigerDBError,
)


@pytest.fixture
async def accounts(clone: Database) -> list[UUID]:
    async with clone.session() as session:
        return [(await factories.account(session)).id for _ in range(2)]


async def end(clone: Database, pid: object) -> None:
    connection = await connect(clone.settings)
    try:
        await connection.execute("SELECT pg_terminate_backend($1)", pid)
    finally:
        await connection.close()


async def pid_of(session: AsyncSession) -> int:
    return int(await session.scalar(text("SELECT pg_backend_pid()")) or 0)


class Meeting:
    """Both are there, the first time: what follows is at the same time."""

    def __init__(self) -> None:
        self.barrier = asyncio.Barrier(2)
        self.runs: list[str] = []

    async def first_run_of(self, who: str) -> None:
        self.runs.append(who)
        if self.runs.count(who) == 1:
            await self.barrier.wait()


@pytest.mark.slow
async def test_after_a_deadlock_one_transaction_is_repeated_and_both_succeed(
    clone: Database, accounts: list[UUID]
) -> None:
    meeting = Meeting()

    async def change(who: str, first: UUID, second: UUID) -> str:
        async def work(session: AsyncSession) -> str:
            await crud.accounts.record_error(session, first, message=who)
            await meeting.first_run_of(who)
            await crud.accounts.record_error(session, second, message=who)
            return who

        return await clone.transaction(work)

    one, other = accounts
    results = await asyncio.gather(change("a", one, other), change("b", other, one))
    assert list(results) == ["a", "b"]
    assert len(meeting.runs) == 3
    async with clone.session() as session:  # nothing of the first run is left
        for account_id in accounts:
            account = await crud.accounts.get(session, account_id)
            assert account
            assert account.error_count == 2


async def test_conflicting_serializable_transactions_succeed_one_after_the_other(
    clone: Database, accounts: list[UUID]
) -> None:
    """Each writes what it has read of the other: at most one may have read the beginning."""
    meeting = Meeting()

    async def copy(who: str, read: UUID, written: UUID) -> None:
        async def work(session: AsyncSession) -> None:
            account = await crud.accounts.get(session, read)
            assert account
            await meeting.first_run_of(who)
            await crud.accounts.update(
                session, written, description=f"{account.description or ''}{who}"
            )

        await clone.transaction(work, isolation="SERIALIZABLE")

    one, other = accounts
    await asyncio.gather(copy("a", one, other), copy("b", other, one))
    assert len(meeting.runs) == 3
    async with clone.session() as session:
        found = [await crud.accounts.get(session, account_id) for account_id in accounts]
        assert {account.description for account in found if account} in ({"a", "ab"}, {"b", "ba"})
        assert await session.scalar(text("SHOW transaction_isolation")) == "read committed"


async def conflict(session: AsyncSession, locked: UUID) -> None:
    await session.execute(text("SET LOCAL lock_timeout = '10ms'"))
    await crud.accounts.update(session, locked, description="x")


async def timeout(session: AsyncSession, locked: UUID) -> None:
    await session.execute(text("SET LOCAL statement_timeout = '10ms'"))
    await crud.accounts.update(session, locked, description="x")


async def bad_input(session: AsyncSession, locked: UUID) -> None:
    raise NotFound("none of the database's business")


async def cut(session: AsyncSession, locked: UUID) -> None:
    await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


@pytest.mark.parametrize(
    ("act", "error", "runs"),
    [
        (conflict, Conflict, 3),
        (cut, DatabaseUnavailable, 3),
        (timeout, QueryTimeout, 1),
        (bad_input, NotFound, 1),
    ],
)
async def test_the_last_failure_is_a_typed_error_of_one_line(
    clone: Database,
    accounts: list[UUID],
    monkeypatch: pytest.MonkeyPatch,
    *,
    act: Callable[[AsyncSession, UUID], Awaitable[None]],
    error: type[TigerDBError],
    runs: int,
) -> None:
    monkeypatch.setattr("tiger_db.database._UNAVAILABLE_WAIT_SECONDS", 0.01)
    sessions = []

    async def work(session: AsyncSession) -> None:
        sessions.append(session)
        await factories.account(session, account_number="U1")
        await act(session, accounts[0])

    async with clone.session() as other:
        await crud.accounts.update(other, accounts[0], description="locked")
        with pytest.raises(error) as caught:
            await clone.transaction(work, retries=2)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert "U1" not in str(caught.value)
    assert len(sessions) == len(set(sessions)) == runs
    async with clone.session() as session:
        assert await crud.accounts.get_by_account_number(session, "U1") is None


@pytest.mark.slow
async def test_a_transaction_is_repeated_after_a_loss_before_the_commit(
    clone: Database,
) -> None:
    runs = 0

    async def work(session: AsyncSession) -> UUID:
        nonlocal runs
        runs += 1
        account = await factories.account(session)
        if runs == 1:
            await end(clone, await pid_of(session))
        session.add(factories.new_account())  # what is pending is not the commit yet
        return account.id

    account_id = await clone.transaction(work)
    assert runs == 2
    async with clone.session() as session:
        accounts = await crud.accounts.list_accounts(session)
        assert len(accounts) == 2
        assert account_id in {account.id for account in accounts}


@pytest.mark.parametrize("inside", [False, True])
async def test_a_transaction_is_not_repeated_after_a_loss_during_the_commit(
    clone: Database, inside: bool
) -> None:
    """Also where the function commits itself."""
    connection = await connect(clone.settings)
    await connection.execute("""
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN PERFORM pg_sleep(20); RETURN NULL; END$$;
        CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON tiger_accounts
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()
    """)
    pids: list[int] = []

    async def work(session: AsyncSession) -> None:
        pids.append(await pid_of(session))
        await factories.account(session)
        if inside:
            await session.commit()

    async def commits() -> bool:
        return bool(pids) and bool(
            await connection.fetchval(
                "SELECT wait_event = 'PgSleep' AND query = 'COMMIT;'"
                " FROM pg_stat_activity WHERE pid = $1",
                pids[0],
            )
        )

    task = asyncio.create_task(clone.transaction(work))
    try:
        await until(commits)
        await connection.execute("SELECT pg_terminate_backend($1)", pids[0])
        with pytest.raises(OutcomeUnknown, match="during the commit") as caught:
            await task
    finally:
        await connection.close()
    assert "\n" not in str(caught.value)
    assert len(pids) == 1


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [False, True])
async def test_an_idle_transaction_is_ended_with_a_typed_error(
    clone: Database, *, blocked: bool
) -> None:
    hurried = clone.settings.model_copy(update={"db_idle_transaction_timeout": 0.1})
    async with Database(hurried) as database:
        with pytest.raises(DatabaseUnavailable) as caught:
            async with database.session() as session:
                await factories.account(session)
                raw = await (await session.connection()).get_raw_connection()
                driver = raw.driver_connection
                assert driver is not None
                if blocked:  # asyncpg reads the server's message only after the next statement
                    time.sleep(0.3)  # noqa: ASYNC251
                else:  # the next statement comes as soon as asyncpg has read the end
                    while not driver.is_closed():  # noqa: ASYNC110
                        await asyncio.sleep(0)
                await factories.account(session)
        assert not isinstance(caught.value, OutcomeUnknown)
        assert "\n" not in str(caught.value)
        assert "may be idle for 0.1 s (DB_IDLE_TRANSACTION_TIMEOUT)" in str(caught.value)
        async with database.session() as session:
            assert (await crud.accounts.list_accounts(session)).items == []
        async with database.session():  # idle, but in no transaction
            await asyncio.sleep(0.3)

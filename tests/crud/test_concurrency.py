"""All callers stand at a gate until every one of them has read, or waits for the same lock."""

import asyncio
import multiprocessing
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar
from uuid import UUID

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.concurrency import WAITING, nobody_passes
from tests.support.factories import plain
from tests.support.tiger_tokens import MONTH, NOW, tiger_token
from tiger_db import (
    AccountStatus,
    APIKey,
    AuditAction,
    Database,
    KeyVerifier,
    Settings,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
    crud,
)
from tiger_db.crud import accounts, api_keys, token_status
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    AccessDenied,
    APIKeyExpired,
    APIKeyRevoked,
    InvalidAPIKey,
    InvalidState,
    LeaseLost,
    RateLimited,
    StaleToken,
)

T = TypeVar("T")
PROCESSES, CONNECTIONS = 4, 5
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tiger_db", "pytest", "asyncpg", "tests.crud.test_concurrency"])


@pytest.fixture
async def crowd(clone_settings: Settings) -> AsyncIterator[Database]:
    """A database of this test's own, with 20 connections and no hurry."""
    pool = {"db_pool_size": 21, "db_max_overflow": 0, "db_pool_timeout": 60}
    async with Database(clone_settings.model_copy(update=pool)) as database:
        await database.check()
        yield database


async def at_once(
    database: Database, calls: Sequence[Callable[[AsyncSession], Awaitable[T]]]
) -> list[T]:
    """What they return, each called in a session of its own, once all of those have read."""
    gate = asyncio.Barrier(len(calls))

    async def one(call: Callable[[AsyncSession], Awaitable[T]]) -> T:
        async with database.session() as session:
            await accounts.list_accounts(session)
            await gate.wait()
            return await call(session)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(call)) for call in calls]
    return [task.result() for task in tasks]


# Accounts


@pytest.mark.slow
@pytest.mark.parametrize("which", ["trading", "data"])
async def test_twenty_callers_leave_one_default(crowd: Database, which: str) -> None:
    async with crowd.session() as session:
        everyone = [await factories.account(session) for _ in range(20)]
    set_default = getattr(accounts, f"set_default_{which}_account")
    await at_once(crowd, [partial(set_default, account_id=a.id) for a in everyone])
    async with crowd.session() as session:
        column = f"is_default_{which}"
        stored = await accounts.list_accounts(session)
        (default,) = [account for account in stored if getattr(account, column)]
        changes = (await factories.events(session))[20:]
        assert {event.action for event in changes} == {AuditAction.ACCOUNT_SET_DEFAULT}
    # One after the other: each replaced the one before, and the last one stayed.
    replaced = {
        e.resource_id: e.old_values[column]
        for e in changes
        if e.old_values and e.new_values and e.new_values[column] == e.resource_id
    }
    chain: list[Any] = [str(default.id)]
    while (before := replaced[chain[-1]]) is not None:
        chain.append(before)
    assert len(chain) == 20


async def test_two_accounts_may_swap_their_defaults(crowd: Database) -> None:
    async with crowd.session() as session:
        first = await factories.account(session, is_default_trading=True)
        second = await factories.account(session, is_default_data=True)

    async def swap(set_default: Any, account: TigerAccount) -> None:
        async with crowd.session() as session:
            await set_default(session, account.id)

    gate = nobody_passes(crowd, "tiger_accounts", waiting=2)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group, gate:
        group.create_task(swap(accounts.set_default_trading_account, second))
        group.create_task(swap(accounts.set_default_data_account, first))
    async with crowd.session() as session:
        trading = await accounts.get_default_trading_account(session)
        data = await accounts.get_default_data_account(session)
        assert (trading and trading.id, data and data.id) == (second.id, first.id)


@pytest.mark.slow
async def test_fifty_errors_count_fifty_and_suspend_once(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account(session)

    async def record() -> None:
        async with crowd.session() as session:
            await accounts.get(session, account.id)
            await accounts.record_error(session, account.id, message="no answer")

    gate = nobody_passes(crowd, "tiger_accounts", waiting=20)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group, gate:
        for _ in range(50):
            group.create_task(record())
    async with crowd.session() as session:
        stored = await accounts.get(session, account.id)
        assert stored is not None
        assert (stored.error_count, stored.status) == (50, AccountStatus.SUSPENDED)
        events = (await factories.events(session))[1:]
    told = [event.new_values for event in events]
    assert [told.count({"error_count": count}) for count in range(1, 51)] == [1] * 50
    (suspension,) = [e for e in events if e.action == AuditAction.ACCOUNT_STATUS_CHANGE]
    assert suspension.details == {"reason": "10 consecutive errors"}
    assert len(events) == 51


@pytest.mark.slow
async def test_successes_and_errors_side_by_side_lose_no_event(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account(session)
    error: dict[str, Any] = {"message": "no answer", "suspend_after": 99}
    fail = partial(accounts.record_error, account_id=account.id, **error)
    succeed = partial(accounts.reset_errors, account_id=account.id)
    calls: list[Callable[[AsyncSession], Awaitable[TigerAccount]]] = [fail, fail, fail, succeed]
    await at_once(crowd, calls * 5)
    async with crowd.session() as session:
        stored = await accounts.get(session, account.id)
        events = (await factories.events(session))[1:]
    count: object = 0
    for event in events:  # in the order in which they had the row
        assert event.old_values is not None
        assert event.new_values is not None
        assert event.old_values["error_count"] == count
        count = event.new_values["error_count"]
    assert stored is not None
    assert stored.error_count == count
    assert sum(event.action == AuditAction.ACCOUNT_ERROR for event in events) == 15


@pytest.mark.parametrize("seed", range(3))
async def test_the_newest_of_twenty_tokens_stays(crowd: Database, seed: int) -> None:
    made = [NOW + timedelta(milliseconds=n) for n in range(1, 21)]
    tokens = [tiger_token(at) for at in made]
    oldest, newest = tokens[0], tokens[-1]
    random.Random(seed).shuffle(tokens)
    async with crowd.session() as session:
        account = await factories.account(session)

    async def update(session: AsyncSession, token: str) -> str | None:
        try:
            await accounts.update_tokens(session, account.id, access_token=token)
        except StaleToken:
            return None
        return token

    told = await at_once(crowd, [partial(update, token=token) for token in tokens])
    async with crowd.session() as session:
        stored = await accounts.get(session, account.id)
        assert stored is not None
        assert plain(stored.access_token) == newest
        assert stored.token_expires_at == made[-1] + MONTH
        written = (await factories.events(session))[1:]
        assert await update(session, oldest) is None
    assert newest in told
    expiries = [event.new_values and event.new_values["token_expires_at"] for event in written]
    assert len(expiries) == len([token for token in told if token])
    assert expiries == sorted(expiries, key=str)


async def test_updates_know_what_they_replace(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account(session, description="0")
    numbers = [str(n) for n in range(1, 11)]
    await at_once(
        crowd, [partial(accounts.update, account_id=account.id, description=n) for n in numbers]
    )
    async with crowd.session() as session:
        changes = (await factories.events(session))[1:]
        stored = await accounts.get(session, account.id)
    replaced = {e.new_values["description"]: e.old_values for e in changes if e.new_values}
    assert stored is not None
    chain: list[Any] = [stored.description]
    while old := replaced.get(chain[-1]):
        chain.append(old["description"])
    assert sorted(chain, key=int) == ["0", *numbers]


# Keys


async def test_two_hundred_verifications_count_two_hundred(crowd: Database) -> None:
    async with crowd.session() as session:
        key, raw_key = await factories.api_key(session)
    async with Database(crowd.settings) as database:
        verifier = KeyVerifier(database)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            tasks = [group.create_task(verifier.verify(raw_key)) for _ in range(200)]
        assert all(task.result() for task in tasks)
    assert await uses(crowd, key) == (200, 200)


async def uses(database: Database, key: APIKey) -> tuple[int, int]:
    """By the key's own count, and by the hours'."""
    async with database.session() as session:
        stored = await api_keys.get(session, key.id)
        assert stored is not None
        hours = await api_keys.usage(session, key.id, since=stored.created_at or datetime.min)  # noqa: DTZ901
        return stored.usage_count, sum(hour.count for hour in hours)


Check = Callable[[str], Awaitable[APIKey]]


async def tell(check: Check, raw_key: str, times: int) -> Counter[str]:
    """How often the key was accepted, or refused why."""
    told = Counter[str]()
    for _ in range(times):
        try:
            await check(raw_key)
        except AccessDenied as reason:
            told[type(reason).__name__] += 1
        else:
            told["accepted"] += 1
    return told


def authorize_often(settings: Settings, how: str, raw_key: str, times: int) -> Counter[str]:
    """In a process of its own, in 16 tasks, `times` in each."""

    async def run() -> Counter[str]:
        memory = how == "memory"
        async with Database(settings) as database, KeyVerifier(database, memory=memory) as verifier:

            async def in_session(raw_key: str) -> APIKey:
                async with database.session() as session:
                    return await api_keys.authorize_api_key(session, raw_key)

            check = in_session if how == "session" else verifier.authorize
            everyone = (tell(check, raw_key, times) for _ in range(16))
            return sum(await asyncio.gather(*everyone), Counter())

    return asyncio.run(run())


async def authorize_everywhere(
    database: Database, how: str, raw_key: str, times: int
) -> Counter[str]:
    """What four processes tell, together."""
    pool = {"db_pool_size": CONNECTIONS, "db_max_overflow": 0, "db_pool_timeout": 60}
    settings = database.settings.model_copy(update=pool)
    told = (in_process(authorize_often, settings, how, raw_key, times) for _ in range(PROCESSES))
    async with asyncio.timeout(60):
        return sum(await asyncio.gather(*told), Counter())


async def in_process(function: Callable[..., T], *arguments: object) -> T:
    """Return the result of a function that is called in a process of its own.

    Over a pipe, because the queues of a pool need /dev/shm.
    """
    here, there = processes.Pipe()
    child = processes.Process(target=_answer, args=(there, function, *arguments))
    child.start()
    there.close()
    result: T = await asyncio.to_thread(here.recv)
    await asyncio.to_thread(child.join)
    return result


def _answer(line: Connection, function: Callable[..., object], *arguments: object) -> None:
    line.send(function(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["session", "verifier", "memory"])
async def test_four_processes_lose_no_use(crowd: Database, how: str) -> None:
    async with crowd.session() as session:
        key, raw_key = await factories.api_key(session)
    assert await authorize_everywhere(crowd, how, raw_key, 25) == {"accepted": 1600}
    assert await uses(crowd, key) == (1600, 1600)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["session", "verifier", "memory"])
async def test_four_processes_pass_exactly_the_limit(crowd: Database, how: str) -> None:
    for _ in range(2):
        async with crowd.session() as session:
            key, raw_key = await factories.api_key(session, rate_limit_per_hour=100)
        before = datetime.now(UTC).hour
        told = await authorize_everywhere(crowd, how, raw_key, 4)
        if datetime.now(UTC).hour == before:
            break  # else the hour turned meanwhile: once more
    assert told == {"accepted": 100, RateLimited.__name__: 156}
    assert await uses(crowd, key) == (100, 100)
    async with crowd.session() as session:
        denied = [e.error_code for e in await factories.events(session)]
    assert denied.count(RateLimited.__name__) % 156 == 0


async def revoke(session: AsyncSession, key: APIKey) -> None:
    await api_keys.revoke(session, key.id)


async def rotate(session: AsyncSession, key: APIKey) -> None:
    await api_keys.rotate(session, key.id, grace=timedelta(0))


async def close_account(session: AsyncSession, key: APIKey) -> None:
    assert key.tiger_account_id
    await accounts.close(session, key.tiger_account_id)


async def delete_account(session: AsyncSession, key: APIKey) -> None:
    await session.execute(text("DELETE FROM tiger_accounts"))


@pytest.mark.parametrize("how", ["session", "verifier"])
@pytest.mark.parametrize(
    ("end", "reason", "limit"),
    [
        (revoke, APIKeyRevoked, None),
        (revoke, APIKeyRevoked, 1000),
        (rotate, APIKeyExpired, None),
        (rotate, APIKeyExpired, 1000),
        (close_account, APIKeyRevoked, None),
        (close_account, APIKeyRevoked, 1000),
        (delete_account, InvalidAPIKey, None),
        (delete_account, InvalidAPIKey, 1000),
    ],
)
async def test_a_key_works_until_its_end_is_committed_and_no_longer(
    crowd: Database,
    end: Callable[[AsyncSession, APIKey], Awaitable[None]],
    reason: type[AccessDenied],
    limit: int | None,
    how: str,
) -> None:
    async with crowd.session() as session:
        account = await factories.account(session)
        key, raw_key = await factories.api_key(
            session, tiger_account_id=account.id, rate_limit_per_hour=limit
        )

    async def authorize() -> None:
        if how == "verifier":
            await KeyVerifier(crowd).authorize(raw_key)
        else:
            async with crowd.session() as session:
                await api_keys.authorize_api_key(session, raw_key)

    await authorize()
    async with crowd.session() as session:
        await end(session, key)
        async with asyncio.timeout(5):
            await authorize()  # waits for nobody
    with pytest.raises(AccessDenied) as refused:
        await authorize()
    assert type(refused.value) is reason


# Refreshes


@pytest.mark.slow
async def test_eight_workers_claim_each_refresh_once(crowd: Database) -> None:
    async with crowd.session() as session:
        for _ in range(40):
            await factories.refresh(session)
    all_have_claimed = asyncio.Barrier(8)

    async def work(session: AsyncSession, worker: str) -> list[UUID]:
        claims = await token_status.claim_due(session, worker=worker, limit=6)
        await all_have_claimed.wait()  # nobody commits before
        assert {claim.worker for claim in claims} <= {worker}
        return [claim.id for claim in claims]

    claimed = await at_once(crowd, [partial(work, worker=f"worker-{n}") for n in range(8)])
    ids = [refresh_id for claims in claimed for refresh_id in claims]
    assert len(ids) == len(set(ids)) == 40
    async with crowd.session() as session:
        refreshes = await token_status.history(session)
        assert {refresh.fencing_token for refresh in refreshes} == {1}


async def test_many_schedulers_open_one_refresh_each(crowd: Database) -> None:
    async with crowd.session() as session:
        due = [await factories.account_with_token(session) for _ in range(5)]
    opened = await at_once(crowd, [token_status.schedule_due] * 12)
    assert sorted(r.tiger_account_id for refreshes in opened for r in refreshes) == [
        account.id for account in due
    ]


async def test_many_callers_open_one_refresh(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)
    opened = await at_once(crowd, [partial(factories.refresh, of=account)] * 12)
    assert len({refresh.id for refresh in opened}) == 1
    async with crowd.session() as session:
        actions = [event.action for event in await factories.events(session)]
    assert actions.count(AuditAction.TOKEN_REFRESH_SCHEDULE) == 1


async def test_a_claim_completes_once(crowd: Database) -> None:
    async with crowd.session() as session:
        claim = await factories.claim(session)

    async def complete(session: AsyncSession, token: str) -> str | None:
        try:
            await token_status.complete(session, claim, access_token=token)
        except LeaseLost:
            return None
        return token

    ended = await at_once(crowd, [partial(complete, token=f"token-{n}") for n in range(8)])
    (winner,) = [token for token in ended if token]
    async with crowd.session() as session:
        account = await accounts.get(session, claim.tiger_account_id)
    assert account is not None
    assert account.access_token is not None
    assert account.access_token.get_secret_value() == winner


async def test_no_refresh_is_opened_while_its_account_closes(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)

    async def open_one() -> TokenStatus:
        async with crowd.session() as session:
            return await factories.refresh(session, account)

    async with nobody_passes(crowd, "tiger_accounts", waiting=1) as session:
        opening = asyncio.create_task(open_one())
        await accounts.close(session, account.id)
    with pytest.raises(InvalidState, match="closed"):
        await opening
    async with crowd.session() as session:
        assert (await token_status.history(session)).items == []


@pytest.mark.parametrize("closers", [1, 3])
async def test_closing_leaves_no_refresh_open(crowd: Database, closers: int) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)

    async def open_one(session: AsyncSession) -> UUID | None:
        try:
            return (await factories.refresh(session, account)).id
        except InvalidState:
            return None

    async def close(session: AsyncSession) -> None:
        await accounts.close(session, account.id)

    calls: list[Callable[[AsyncSession], Awaitable[UUID | None]]] = [*[open_one] * 4]
    calls[2:2] = [close] * closers
    opened = {*await at_once(crowd, calls)} - {None}
    async with crowd.session() as session:
        refreshes = (await token_status.history(session)).items
        actions = [event.action for event in await factories.events(session)]
    assert {refresh.id for refresh in refreshes} == opened
    assert [r.status for r in refreshes] == [TokenRefreshStatus.CANCELLED] * len(refreshes)
    assert actions.count(AuditAction.ACCOUNT_CLOSE) == 1
    assert actions.count(AuditAction.TOKEN_REFRESH_CANCEL) == len(refreshes)


async def test_completing_and_closing_wait_for_each_other(crowd: Database) -> None:
    async with crowd.session() as session:
        claim = await factories.claim(session)

    async def complete(session: AsyncSession) -> str:
        try:
            await token_status.complete(session, claim, access_token="new")
        except LeaseLost:
            return "lost"
        return "completed"

    async def close(session: AsyncSession) -> str:
        await accounts.close(session, claim.tiger_account_id)
        return "closed"

    ended = await at_once(crowd, [complete, close])
    async with crowd.session() as session:
        refresh = await token_status.get(session, claim.id)
        account = await crud.accounts.get(session, claim.tiger_account_id)
    assert refresh is not None
    assert account is not None
    expected = {"lost": TokenRefreshStatus.CANCELLED, "completed": TokenRefreshStatus.SUCCESS}
    assert refresh.status == expected[ended[0]]
    assert account.access_token is None


async def new_key(session: AsyncSession, key: APIKey) -> None:
    await factories.api_key(session, tiger_account_id=key.tiger_account_id)


async def rotated(session: AsyncSession, key: APIKey) -> None:
    await api_keys.rotate(session, key.id)


async def test_closing_revokes_a_key_that_is_being_made(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account(session)
        key, _ = await factories.api_key(session, tiger_account_id=account.id)

    async def close() -> None:
        async with crowd.session() as session:
            await accounts.close(session, account.id)

    for make in (new_key, rotated):
        async with crowd.session() as session:
            await make(session, key)
            task = asyncio.create_task(close())
            async with asyncio.timeout(30):
                while await session.scalar(WAITING) < 1 and not task.done():
                    await session.execute(text("SELECT pg_stat_clear_snapshot()"))
                    await asyncio.sleep(0.01)
        await task
        async with crowd.session() as session:
            keys = await api_keys.get_keys_for_account(session, account.id)
            assert {k.status.value for k in keys} == {"revoked"}
            await accounts.reopen(session, account.id, private_key="new")
            key, _ = await factories.api_key(session, tiger_account_id=account.id)


async def test_closing_cancels_what_a_scheduler_opens(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)

    async def close() -> None:
        async with crowd.session() as session:
            await accounts.close(session, account.id)

    async with crowd.session() as session:
        assert len(await token_status.schedule_due(session)) == 1
        task = asyncio.create_task(close())
        async with asyncio.timeout(30):
            while await session.scalar(WAITING) < 1 and not task.done():
                await session.execute(text("SELECT pg_stat_clear_snapshot()"))
                await asyncio.sleep(0.01)
    await task
    async with crowd.session() as session:
        (refresh,) = await token_status.history(session)
    assert refresh.status == TokenRefreshStatus.CANCELLED


async def test_no_key_is_made_for_a_closed_account(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account(session)
        await accounts.close(session, account.id)
        with pytest.raises(InvalidState, match="closed"):
            await factories.api_key(session, tiger_account_id=account.id)

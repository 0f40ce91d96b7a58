"""Concurrent uses and changes of API keys, in tasks and in processes."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from typing import TypeVar

import pytest

from tests.support import factories
from tests.support.forks import FORKS
from tests.support.passed_settings import Passed
from tiger_db import (
    APIKey,
    Database,
    KeyVerifier,
    Settings,
)
from tiger_db.crud import accounts, api_keys
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    AccessDenied,
    APIKeyExpired,
    APIKeyRevoked,
    InvalidAPIKey,
    InvalidState,
    RateLimited,
)

T = TypeVar("T")
PROCESSES, CONNECTIONS = 4, 5


@pytest.mark.slow
async def test_two_hundred_concurrent_uses_are_counted(crowd: Database) -> None:
    async with crowd.session() as session:
        key, raw_key = await factories.api_key(session)
    async with Database(crowd.settings) as database:
        verifier = KeyVerifier(database)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            tasks = [group.create_task(verifier.verify(raw_key)) for _ in range(200)]
        assert all(task.result() for task in tasks)
    assert await uses(crowd, key) == (200, 200)


async def uses(database: Database, key: APIKey) -> tuple[int, int]:
    """Return the usage count of a key, and the sum of its hourly counts."""
    async with database.session() as session:
        stored = await api_keys.get(session, key.id)
        assert stored is not None
        hours = await api_keys.usage(session, key.id, since=stored.created_at or datetime.min)  # noqa: DTZ901
        return stored.usage_count, sum(hour.count for hour in hours)


Check = Callable[[str], Awaitable[APIKey]]


async def count_answers(check: Check, raw_key: str, times: int) -> Counter[str]:
    """Use a key repeatedly; return the numbers of accepted uses and of each denial."""
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
    """Use a key in 16 tasks, `times` in each; return the sum of their numbers."""

    async def run() -> Counter[str]:
        memory = how == "memory"
        async with Database(settings) as database, KeyVerifier(database, memory=memory) as verifier:

            async def in_session(raw_key: str) -> APIKey:
                async with database.session() as session:
                    return await api_keys.authorize_api_key(session, raw_key)

            check = in_session if how == "session" else verifier.authorize
            everyone = (count_answers(check, raw_key, times) for _ in range(16))
            return sum(await asyncio.gather(*everyone), Counter())

    return asyncio.run(run())


async def authorize_everywhere(
    database: Database, how: str, raw_key: str, times: int
) -> Counter[str]:
    """Use a key in four processes; return the sum of their numbers."""
    pool = {"db_pool_size": CONNECTIONS, "db_max_overflow": 0, "db_pool_timeout": 60}
    settings = database.settings.model_copy(update=pool)
    told = (
        in_process(authorize_often, Passed(settings), how, raw_key, times) for _ in range(PROCESSES)
    )
    async with asyncio.timeout(60):
        return sum(await asyncio.gather(*told), Counter())


async def in_process(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a new process; return its result.

    The result comes over a pipe, because the queues of a pool need /dev/shm.
    """
    here, there = FORKS.Pipe()
    child = FORKS.Process(target=_answer, args=(there, function, *arguments))
    child.start()
    there.close()
    result: T = await asyncio.to_thread(here.recv)
    await asyncio.to_thread(child.join)
    return result


def _answer(line: Connection, function: Callable[..., object], *arguments: object) -> None:
    line.send(function(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["session", "verifier", "memory"])
async def test_the_uses_of_four_processes_are_all_counted(crowd: Database, how: str) -> None:
    async with crowd.session() as session:
        key, raw_key = await factories.api_key(session)
    assert await authorize_everywhere(crowd, how, raw_key, 25) == {"accepted": 1600}
    assert await uses(crowd, key) == (1600, 1600)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["session", "verifier", "memory"])
async def test_four_processes_are_limited_exactly(crowd: Database, how: str) -> None:
    for _ in range(2):
        async with crowd.session() as session:
            key, raw_key = await factories.api_key(session, rate_limit_per_hour=100)
        before = datetime.now(UTC).hour
        told = await authorize_everywhere(crowd, how, raw_key, 4)
        if datetime.now(UTC).hour == before:
            break  # repeat if a new hour began
    assert told == {"accepted": 100, RateLimited.__name__: 156}
    assert await uses(crowd, key) == (100, 100)
    async with crowd.session() as session:
        denied = [  # an event stands for several refusals of a process that refuses many
            int(str((event.details or {}).get("count", 1)))
            for event in await factories.events(session)
            if event.error_code == RateLimited.__name__
        ]
    assert sum(denied) % 156 == 0


async def revoke(session: AsyncSession, key: APIKey) -> None:
    await api_keys.revoke(session, key.id)


async def rotate(session: AsyncSession, key: APIKey) -> None:
    await api_keys.rotate(session, key.id, grace=timedelta(0))


async def deactivate(session: AsyncSession, key: APIKey) -> None:
    await api_keys.deactivate(session, key.id)


async def delete(session: AsyncSession, key: APIKey) -> None:
    await api_keys.delete(session, key.id)


async def close_account(session: AsyncSession, key: APIKey) -> None:
    assert key.tiger_account_id
    await accounts.close(session, key.tiger_account_id)


async def delete_account(session: AsyncSession, key: APIKey) -> None:
    await close_account(session, key)
    await accounts.delete(session, key.tiger_account_id)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["session", "verifier"])
@pytest.mark.parametrize(
    ("end", "reason", "limit"),
    [
        (revoke, APIKeyRevoked, None),
        (revoke, APIKeyRevoked, 1000),
        (rotate, APIKeyExpired, None),
        (rotate, APIKeyExpired, 1000),
        (deactivate, APIKeyRevoked, None),
        (deactivate, APIKeyRevoked, 1000),
        (delete, InvalidAPIKey, None),
        (delete, InvalidAPIKey, 1000),
        (close_account, APIKeyRevoked, None),
        (close_account, APIKeyRevoked, 1000),
        (delete_account, InvalidAPIKey, None),
        (delete_account, InvalidAPIKey, 1000),
    ],
)
@pytest.mark.slow
async def test_a_key_is_accepted_until_its_end_is_committed(
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
            await authorize()  # does not wait for the transaction
    with pytest.raises(AccessDenied) as refused:
        await authorize()
    assert type(refused.value) is reason


async def test_no_key_is_created_for_a_closed_account(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account(session)
        await accounts.close(session, account.id)
        with pytest.raises(InvalidState, match="closed"):
            await factories.api_key(session, tiger_account_id=account.id)

"""Concurrent changes of accounts."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from tests.support import factories
from tests.support.concurrency import at_once, lock_until_waiting, until_waiting
from tests.support.contexts import changed_context
from tests.support.factories import plain
from tests.support.tiger_tokens import MONTH, NOW, tiger_token
from tiger_db import (
    AccountStatus,
    APIKey,
    AuditAction,
    Database,
    MarketPermission,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
    crud,
)
from tiger_db.crud import accounts, api_keys, token_status
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    InvalidState,
    LeaseLost,
    MissingReference,
    NotFound,
    StaleToken,
)

MarketChange = Callable[[AsyncSession, UUID, MarketPermission], Awaitable[TigerAccount]]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["trading", "data"])
async def test_concurrent_changes_leave_one_default_account(crowd: Database, which: str) -> None:
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
    # The changes are serialized: each replaced the one before.
    replaced = {
        e.resource_id: e.old_values[column]
        for e in changes
        if e.old_values and e.new_values and e.new_values[column] == e.resource_id
    }
    chain: list[Any] = [str(default.id)]
    while (before := replaced[chain[-1]]) is not None:
        chain.append(before)
    assert len(chain) == 20


async def test_two_accounts_can_swap_their_defaults_concurrently(crowd: Database) -> None:
    async with crowd.session() as session:
        first = await factories.account(session, is_default_trading=True)
        second = await factories.account(session, is_default_data=True)

    async def swap(set_default: Any, account: TigerAccount) -> None:
        async with crowd.session() as session:
            await set_default(session, account.id)

    gate = lock_until_waiting(crowd, "tiger_accounts", waiting=2)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group, gate:
        group.create_task(swap(accounts.set_default_trading_account, second))
        group.create_task(swap(accounts.set_default_data_account, first))
    async with crowd.session() as session:
        trading = await accounts.get_default_trading_account(session)
        data = await accounts.get_default_data_account(session)
        assert (trading and trading.id, data and data.id) == (second.id, first.id)


@pytest.mark.slow
async def test_fifty_concurrent_errors_are_all_counted_and_suspend_once(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account(session)

    async def record() -> None:
        async with crowd.session() as session:
            await accounts.get(session, account.id)
            await accounts.record_error(session, account.id, message="no answer")

    gate = lock_until_waiting(crowd, "tiger_accounts", waiting=20)
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
async def test_concurrent_successes_and_errors_record_every_change(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account(session)
    crowd.info.update(changed_context(crowd.info, suspend_after=99))
    fail = partial(accounts.record_error, account_id=account.id, message="no answer")
    succeed = partial(accounts.reset_errors, account_id=account.id)
    calls: list[Callable[[AsyncSession], Awaitable[TigerAccount]]] = [fail, fail, fail, succeed]
    await at_once(crowd, calls * 5)
    async with crowd.session() as session:
        stored = await accounts.get(session, account.id)
        events = (await factories.events(session))[1:]
    count: object = 0
    for event in events:  # in the order of the row lock
        assert event.old_values is not None
        assert event.new_values is not None
        assert event.old_values["error_count"] == count
        count = event.new_values["error_count"]
    assert stored is not None
    assert stored.error_count == count
    assert sum(event.action == AuditAction.ACCOUNT_ERROR for event in events) == 15


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
async def test_the_newest_of_twenty_concurrent_tokens_stays(crowd: Database, seed: int) -> None:
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


@pytest.mark.slow
async def test_events_of_concurrent_updates_have_the_replaced_values(crowd: Database) -> None:
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


async def test_concurrent_changes_of_market_permissions_lose_none(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account(session, market_permissions=["CN"])

    async def change(function: MarketChange, market: MarketPermission) -> None:
        async with crowd.session() as session:
            await accounts.get(session, account.id)
            await function(session, account.id, market)

    gate = lock_until_waiting(crowd, "tiger_accounts", waiting=4)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group, gate:
        for market in (MarketPermission.US, MarketPermission.HK, MarketPermission.HK):
            group.create_task(change(accounts.add_market_permission, market))
        group.create_task(change(accounts.remove_market_permission, MarketPermission.CN))
    async with crowd.session() as session:
        stored = await accounts.get(session, account.id)
        events = (await factories.events(session))[1:]
    assert stored is not None
    assert sorted(stored.market_permissions) == [MarketPermission.HK, MarketPermission.US]
    assert len(events) == 3  # the second call for HK changes nothing
    markets: object = ["CN"]
    for event in events:  # in the order of the row lock
        assert event.old_values == {"market_permissions": markets}
        assert event.new_values is not None
        markets = event.new_values["market_permissions"]


async def test_no_key_is_created_while_its_account_is_deleted(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)

    async def create(make: Callable[[AsyncSession], Awaitable[object]]) -> None:
        async with crowd.session() as session:
            with pytest.raises(MissingReference):
                await make(session)

    gate = lock_until_waiting(crowd, "tiger_accounts", waiting=2)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group, gate as session:
        group.create_task(create(partial(factories.api_key, tiger_account_id=account.id)))
        group.create_task(create(partial(factories.refresh, of=account)))
        await accounts.delete(session, account.id)
    async with crowd.session() as session:
        assert await accounts.get(session, account.id) is None


@pytest.mark.parametrize("child", ["key", "refresh"])
async def test_an_account_is_not_deleted_while_a_key_or_refresh_is_created(
    crowd: Database, child: str
) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)

    async def delete() -> None:
        async with crowd.session() as session:
            await accounts.delete(session, account.id)

    async with crowd.session() as session:
        if child == "key":
            await factories.api_key(session, tiger_account_id=account.id)
        else:
            await factories.refresh(session, account)
        deleting = asyncio.create_task(delete())
        await until_waiting(session, 1)
    with pytest.raises(InvalidState, match="must be closed"):
        await deleting
    async with crowd.session() as session:
        assert await accounts.get(session, account.id) is not None


@pytest.mark.slow
async def test_an_account_is_deleted_once(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account(session)
        await factories.api_key(session, tiger_account_id=account.id)
        await accounts.close(session, account.id)

    async def delete(session: AsyncSession) -> str:
        try:
            await accounts.delete(session, account.id)
        except NotFound:
            return "not found"
        return "deleted"

    assert sorted(await at_once(crowd, [delete] * 4)) == ["deleted", *["not found"] * 3]
    async with crowd.session() as session:
        actions = [event.action for event in await factories.events(session)]
    assert actions.count(AuditAction.ACCOUNT_DELETE) == 1
    assert actions.count(AuditAction.API_KEY_DELETE) == 1


async def test_no_refresh_is_opened_while_its_account_is_closed(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)

    async def open_one() -> TokenStatus:
        async with crowd.session() as session:
            return await factories.refresh(session, account)

    async with lock_until_waiting(crowd, "tiger_accounts", waiting=1) as session:
        opening = asyncio.create_task(open_one())
        await accounts.close(session, account.id)
    with pytest.raises(InvalidState, match="closed"):
        await opening
    async with crowd.session() as session:
        assert (await token_status.history(session)).items == []


@pytest.mark.parametrize("closers", [1, 3])
async def test_closing_cancels_refreshes_that_are_opened_concurrently(
    crowd: Database, closers: int
) -> None:
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


async def test_completing_a_refresh_and_closing_its_account_are_serialized(crowd: Database) -> None:
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


@pytest.mark.slow
async def test_closing_revokes_a_key_that_is_created_concurrently(crowd: Database) -> None:
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
            await until_waiting(session, 1, task)
        await task
        async with crowd.session() as session:
            keys = await api_keys.get_keys_for_account(session, account.id)
            assert {k.status.value for k in keys} == {"revoked"}
            await accounts.reopen(session, account.id, private_key="new")
            key, _ = await factories.api_key(session, tiger_account_id=account.id)


async def test_closing_cancels_a_refresh_that_is_scheduled_concurrently(crowd: Database) -> None:
    async with crowd.session() as session:
        account = await factories.account_with_token(session)

    async def close() -> None:
        async with crowd.session() as session:
            await accounts.close(session, account.id)

    async with crowd.session() as session:
        assert len(await token_status.schedule_due(session)) == 1
        task = asyncio.create_task(close())
        await until_waiting(session, 1, task)
    await task
    async with crowd.session() as session:
        (refresh,) = await token_status.history(session)
    assert refresh.status == TokenRefreshStatus.CANCELLED

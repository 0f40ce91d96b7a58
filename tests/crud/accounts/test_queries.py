"""Lookups and lists of accounts."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError

from tests.support import factories
from tiger_db import (
    AccountStatus,
    AccountType,
    Database,
    TigerAccount,
    TigerEnvironment,
)
from tiger_db.crud import accounts
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    AlreadyExists,
    InvalidValue,
    TigerDBError,
)

NONSENSE: Any = "nonsense"

S = AccountStatus


NOW = datetime.now(UTC)
TBHK: dict[str, Any] = {"license": "TBHK", "access_token": "t"}


# Lookups and lists


@pytest.mark.parametrize(
    "spelling",
    ["U12300123", " u12300123\n", "U123\N{ZERO WIDTH SPACE}\N{FULLWIDTH DIGIT ZERO}0123"],
    ids=ascii,
)
async def test_an_account_is_found_by_each_spelling_of_its_number(
    session: AsyncSession, spelling: str
) -> None:
    account = await factories.account(session, account_number="U12300123")
    await factories.account(session)
    assert await accounts.get_by_account_number(session, spelling) is account
    with pytest.raises(AlreadyExists):
        await factories.account(session, account_number=spelling)


@pytest.mark.parametrize(
    "spelling", ["20150007", " 20150007\n", "2015\N{ZERO WIDTH SPACE}\N{FULLWIDTH DIGIT ZERO}007"]
)
async def test_accounts_are_found_by_each_spelling_of_their_tiger_id(
    session: AsyncSession, spelling: str
) -> None:
    account = await factories.account(session, tiger_id="20150007")
    await factories.account(session)
    assert await accounts.list_by_tiger_id(session, spelling) == [account]


async def test_looking_up_an_unknown_account_returns_none(session: AsyncSession) -> None:
    assert await accounts.get(session, uuid4()) is None
    assert await accounts.get_by_account_number(session, "no 'such\" account 🐅") is None
    assert await accounts.get_default_trading_account(session) is None
    assert await accounts.get_default_data_account(session) is None
    assert await accounts.list_by_tiger_id(session, "none") == []
    assert await accounts.list_by_tiger_id(session, "\ud800") == []


async def test_requested_relationships_are_loaded_and_others_raise(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        key, _ = await factories.api_key(session, tiger_account_id=account.id)
        refresh = await factories.refresh(session, account)
    async with clone.session() as session:
        loaded = await accounts.get(session, account.id, load=["api_keys", "token_statuses"])
        assert loaded is not None
    assert [k.id for k in loaded.api_keys] == [key.id]
    assert [r.id for r in loaded.token_statuses] == [refresh.id]
    async with clone.session() as session:
        bare = await accounts.get_by_account_number(session, account.account_number)
        with pytest.raises(InvalidRequestError, match="lazy='raise'"):
            _ = bare and bare.api_keys


@pytest.mark.parametrize("load", [["nothing"], ["account_name"], "api_keys"])
async def test_an_unknown_relationship_is_refused(
    session: AsyncSession, load: list[str] | str
) -> None:
    with pytest.raises(InvalidValue, match=r"has no relationship|load\n.*not str"):
        await accounts.get(session, uuid4(), load=load)


async def test_list_by_tiger_id_returns_all_accounts_of_the_id(session: AsyncSession) -> None:
    first = await factories.account(session, tiger_id="U1")
    await factories.account(session, tiger_id="U2")
    third = await factories.account(session, tiger_id="U2")
    await accounts.update(session, third.id, tiger_id="U1")
    assert await accounts.list_by_tiger_id(session, "U1") == [first, third]


async def test_listed_accounts_match_all_criteria(session: AsyncSession) -> None:
    first = await factories.account(session)
    second = await factories.account(session, environment="SANDBOX")
    third = await factories.account(session, status="suspended", account_number="U1")

    async def listed(**criteria: Any) -> list[TigerAccount]:
        return (await accounts.list_accounts(session, **criteria)).items

    assert await listed() == [third, second, first]
    assert await listed(status=AccountStatus.ACTIVE) == [second, first]
    assert await listed(environment=TigerEnvironment.SANDBOX) == [second]
    assert await listed(account_type=AccountType.GLOBAL) == [third]
    assert await listed(status=AccountStatus.SUSPENDED, environment=TigerEnvironment.SANDBOX) == []


async def test_accounts_needing_a_refresh_are_sorted_by_the_time_of_the_refresh(
    session: AsyncSession,
) -> None:
    now = datetime.now(UTC)

    async def expiring(minutes: int, **overrides: Any) -> TigerAccount:
        at = now + timedelta(minutes=minutes)
        return await factories.account_with_token(session, token_expires_at=at, **overrides)

    # `account_with_token` plans the refresh an hour before the expiry.
    soon, expired, later = await expiring(110), await expiring(-50), await expiring(130)
    await expiring(5, status="suspended")
    await expiring(5, access_token=None)
    await factories.account(session, access_token="no expiry known")
    await session.execute(text("SET LOCAL enable_indexscan = off"))  # an index scan would sort them
    needing = accounts.get_accounts_needing_token_refresh
    assert await needing(session) == [expired, soon]
    assert await needing(session, within=timedelta(hours=3)) == [expired, soon, later]
    assert await needing(session, within=timedelta(hours=3), limit=1) == [expired]


@pytest.mark.parametrize(
    "lookup",
    [
        lambda s: accounts.get(s, NONSENSE),
        lambda s: accounts.get_by_account_number(s, "a\0b"),
        lambda s: accounts.get_by_account_number(s, "\ud800"),
        lambda s: accounts.list_accounts(s, status=NONSENSE),
        lambda s: accounts.get_accounts_needing_token_refresh(s, within=timedelta.max),
        lambda s: accounts.update(s, NONSENSE, description="new"),
    ],
)
async def test_invalid_input_raises_an_error_without_the_value(
    session: AsyncSession, lookup: Callable[[AsyncSession], Awaitable[object]]
) -> None:
    with pytest.raises(TigerDBError) as caught:
        await lookup(session)
    assert isinstance(caught.value, InvalidValue)
    assert NONSENSE not in str(caught.value)


@pytest.mark.parametrize("within", [timedelta.max, timedelta.min])
async def test_a_time_out_of_range_is_refused_whatever_the_query_plan(
    session: AsyncSession, within: timedelta
) -> None:
    await session.execute(text("SET LOCAL enable_indexscan = off"))
    await session.execute(text("SET LOCAL enable_bitmapscan = off"))
    with pytest.raises(InvalidValue, match="within"):
        await accounts.get_accounts_needing_token_refresh(session, within=within)

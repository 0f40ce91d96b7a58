"""Lookups and lists of accounts, and the accounts that can serve a request."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError

from tests.support import factories
from tests.support.recording import recorded
from tiger_db import (
    AccountStatus,
    AccountType,
    Database,
    MarketPermission,
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


async def fail(session: AsyncSession, account: TigerAccount, times: int = 1) -> None:
    for _ in range(times):
        await accounts.record_error(session, account.id, message="no answer")


async def execute(session: AsyncSession, account: TigerAccount, assignments: str) -> None:
    """Change the account with raw SQL, outside the ORM."""
    statement = text(f"UPDATE tiger_accounts SET {assignments} WHERE id = :id")
    await session.execute(statement, {"id": account.id})


async def numbers(session: AsyncSession, **criteria: Any) -> list[str]:
    found = await accounts.find_for_operation(session, **criteria)
    return [account.account_number for account in found]


@pytest.mark.parametrize(
    ("values", "assignments"),
    [
        ({}, ""),
        ({"license": "TBSG"}, ""),
        ({"license": None, "access_token": "t", "token_expires_at": NOW - timedelta(days=1)}, ""),
        ({"license": "TBNZ", "access_token": "t", "token_expires_at": NOW}, ""),
        (TBHK | {"token_expires_at": NOW + timedelta(hours=1)}, ""),
        (TBHK, ""),  # the expiry is unknown
        ({}, "error_count = 9, last_error_at = now()"),
        ({}, "failing_until = now()"),
        ({}, "failing_until = now() - interval '1 hour'"),
    ],
)
async def test_an_account_can_serve_a_request(
    session: AsyncSession, values: dict[str, Any], assignments: str
) -> None:
    account = await factories.account(session, account_number="U1", **values)
    if assignments:
        await execute(session, account, assignments)
    assert await numbers(session) == ["U1"]


@pytest.mark.parametrize(
    ("values", "assignments"),
    [
        ({"status": "inactive"}, ""),
        ({"status": "suspended"}, ""),
        ({"status": "pending_verification"}, ""),
        ({}, "status = 'closed', private_key = NULL"),
        ({"environment": "SANDBOX"}, ""),
        ({"license": "TBHK"}, ""),
        ({"license": "TBHK", "token_expires_at": NOW + timedelta(hours=1)}, ""),
        (TBHK | {"token_expires_at": NOW - timedelta(seconds=1)}, ""),
        (TBHK, "token_expires_at = now()"),
        ({}, "failing_until = now() + interval '1 second'"),
        ({"is_default_data": True}, "failing_until = now() + interval '1 second'"),
    ],
)
async def test_an_account_cannot_serve_a_request(
    session: AsyncSession, values: dict[str, Any], assignments: str
) -> None:
    account = await factories.account(session, **values)
    if assignments:
        await execute(session, account, assignments)
    assert await numbers(session) == []


async def test_a_failing_account_can_serve_again_after_a_success(session: AsyncSession) -> None:
    account = await factories.account(session, account_number="U1")
    await fail(session, account, 2)
    assert await numbers(session) == ["U1"]
    await fail(session, account)
    assert await numbers(session) == []
    await accounts.reset_errors(session, account.id)
    assert await numbers(session) == ["U1"]


async def test_found_accounts_have_the_market_permission(session: AsyncSession) -> None:
    none, hk, both = "U1", "U2", "U3"
    await factories.account(session, account_number=none)
    await factories.account(session, account_number=hk, market_permissions=["HK"])
    await factories.account(session, account_number=both, market_permissions=["US", "HK"])
    assert await numbers(session, permission=MarketPermission.US) == [both]
    assert await numbers(session, permission=MarketPermission.HK) == [hk, both]
    assert await numbers(session, permission=MarketPermission.SG) == []
    assert await numbers(session) == [none, hk, both]


async def test_found_accounts_are_of_the_requested_environment(session: AsyncSession) -> None:
    await factories.account(session, account_number="U1")
    await factories.account(session, account_number="U2", environment="SANDBOX")
    assert await numbers(session) == ["U1"]
    assert await numbers(session, environment=TigerEnvironment.SANDBOX) == ["U2"]
    assert sorted(await numbers(session, environment=None)) == ["U1", "U2"]


async def test_found_accounts_are_sorted_by_default_errors_and_age(session: AsyncSession) -> None:
    oldest, one_error, data, trading, newest = "U1", "U2", "U3", "U4", "U5"
    for number, errors, defaults in (
        (oldest, 0, {}),
        (one_error, 1, {}),
        (data, 2, {"is_default_data": True}),
        (trading, 2, {"is_default_trading": True}),
        (newest, 0, {}),
    ):
        account = await factories.account(session, account_number=number, **defaults)
        await fail(session, account, errors)
    rest = [oldest, newest, one_error]
    assert await numbers(session) == [data, *rest, trading]
    assert await numbers(session, trading=True) == [trading, *rest, data]
    assert await numbers(session, trading=True, limit=2) == [trading, oldest]


PAPER = "20191106192858300"


@pytest.mark.parametrize(
    ("default", "found"),
    [(None, ["51230001", "U1"]), ("U1", ["U1", "51230001"]), (PAPER, [PAPER])],
)
async def test_trading_never_mixes_paper_and_real_accounts(
    session: AsyncSession, default: str | None, found: list[str]
) -> None:
    for number in ("51230001", PAPER, "U1"):
        await factories.account(
            session, account_number=number, is_default_trading=number == default
        )
    assert await numbers(session, trading=True) == found
    assert await numbers(session) == ["51230001", PAPER, "U1"]
    by_type = {
        type_: await numbers(session, trading=True, account_type=type_) for type_ in AccountType
    }
    assert by_type == {
        AccountType.STANDARD: ["51230001"],
        AccountType.PRIME: [],
        AccountType.GLOBAL: ["U1"],
        AccountType.PAPER: [PAPER],
    }
    assert await numbers(session, account_type=AccountType.PAPER) == [PAPER]


@pytest.mark.parametrize("default", ["51230001", PAPER])
async def test_a_suspended_default_account_is_not_replaced_by_one_of_the_other_kind(
    session: AsyncSession, default: str
) -> None:
    for number in ("51230001", PAPER):
        await factories.account(
            session,
            account_number=number,
            is_default_trading=number == default,
            status="suspended" if number == default else "active",
        )
    assert await numbers(session, trading=True) == []


@pytest.mark.parametrize("limit", [0, 1001, True])
async def test_an_invalid_limit_is_refused(session: AsyncSession, limit: int) -> None:
    with pytest.raises(InvalidValue, match="limit"):
        await accounts.find_for_operation(session, limit=limit)


@pytest.mark.parametrize("trading", [False, True])
async def test_find_for_operation_sends_one_statement(
    database: Database, session: AsyncSession, *, trading: bool
) -> None:
    for _ in range(3):
        await factories.account(session, market_permissions=["US"])
    with recorded(database) as sent:
        found = await accounts.find_for_operation(
            session, permission=MarketPermission.US, trading=trading
        )
    assert (len(found), len(sent)) == (3, 1)


async def test_found_accounts_have_current_values(session: AsyncSession) -> None:
    account = await factories.account(session)
    await execute(session, account, "description = 'raw'")
    (found,) = await accounts.find_for_operation(session)
    assert (found is account, found.description) == (True, "raw")


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


async def test_accounts_needing_a_refresh_are_sorted_by_expiry(session: AsyncSession) -> None:
    now = datetime.now(UTC)

    async def expiring(minutes: int, **overrides: Any) -> TigerAccount:
        at = now + timedelta(minutes=minutes)
        return await factories.account_with_token(session, token_expires_at=at, **overrides)

    soon, expired, later = await expiring(50), await expiring(-50), await expiring(120)
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

"""Routing: the accounts that can serve a request, and the reasons why others cannot."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

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
from tiger_db.crud import accounts, api_keys
from tiger_db.crud.accounts import RoutingReason
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidValue

R = RoutingReason
NOW = datetime.now(UTC)
TBHK: dict[str, Any] = {"license": "TBHK", "access_token": "t"}


async def fail(session: AsyncSession, account: TigerAccount, times: int = 1) -> None:
    for _ in range(times):
        await accounts.record_error(session, account.id, message="no answer")


async def execute(session: AsyncSession, account: TigerAccount, assignments: str) -> None:
    """Change the account with raw SQL, outside the ORM."""
    statement = text(f"UPDATE tiger_accounts SET {assignments} WHERE id = :id")
    await session.execute(statement, {"id": account.id})


async def numbers(session: AsyncSession, *, limit: int = 10, **request: Any) -> list[str]:
    """Return the numbers of the found accounts, which are those without a reason."""
    found = await accounts.find_for_operation(session, **request, limit=limit)
    reasons = await accounts.explain_for_operation(session, **request)
    assert len(reasons) == await session.scalar(text("SELECT count(*) FROM tiger_accounts"))
    eligible = [account_id for account_id in reasons if not reasons[account_id]]
    assert [account.id for account in found] == eligible[:limit]
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
    assert await numbers(session, permission=[MarketPermission.HK, "US"]) == [both]
    assert await numbers(session, permission={"HK"}) == [hk, both]
    assert await numbers(session, permission=[]) == [none, hk, both]
    assert await numbers(session) == [none, hk, both]


async def test_found_accounts_are_of_a_requested_environment(session: AsyncSession) -> None:
    await factories.account(session, account_number="U1")
    await factories.account(session, account_number="U2", environment="SANDBOX")
    assert await numbers(session) == ["U1"]
    assert await numbers(session, environment=TigerEnvironment.SANDBOX) == ["U2"]
    assert await numbers(session, environment=None) == ["U1", "U2"]
    assert await numbers(session, environment=["PROD", "SANDBOX"]) == ["U1", "U2"]
    assert await numbers(session, environment=["SANDBOX"]) == ["U2"]
    assert await numbers(session, environment=[]) == []


async def test_excluded_accounts_are_not_found(session: AsyncSession) -> None:
    first, second, third = [
        await factories.account(session, account_number=f"U{number}") for number in (1, 2, 3)
    ]
    tried: list[UUID] = []
    for account in (first, second, third):  # failover
        (best, *_) = await accounts.find_for_operation(session, exclude=tried)
        assert best is account
        tried.append(best.id)
    assert await numbers(session, exclude=tried) == []
    assert await numbers(session, exclude={second.id, uuid4()}) == ["U1", "U3"]


async def test_found_accounts_can_be_accessed_with_the_key(session: AsyncSession) -> None:
    account = await factories.account(session, account_number="U1")
    await factories.account(session, account_number="U2")
    bound, _ = await factories.api_key(session, tiger_account_id=account.id)
    unbound, _ = await factories.api_key(session)
    assert await numbers(session, allowed_for=bound) == ["U1"]
    assert await numbers(session, allowed_for=unbound) == ["U1", "U2"]
    assert await numbers(session, allowed_for=None) == ["U1", "U2"]
    await accounts.update(session, account.id, status=AccountStatus.INACTIVE)
    assert await numbers(session, allowed_for=bound) == []


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"permission": "XX"},
        {"permission": ["US", "XX"]},
        {"environment": "TEST"},
        {"exclude": "U1"},
        {"exclude": ["U1"]},
        {"allowed_for": "tdb_test_1"},
        {"trading": "yes"},
    ],
)
async def test_an_invalid_request_is_refused(session: AsyncSession, wrong: dict[str, Any]) -> None:
    for function in (accounts.find_for_operation, accounts.explain_for_operation):
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            await function(session, **wrong)


@pytest.mark.parametrize("trading", [False, True])
async def test_finding_and_explaining_send_one_statement_each(
    database: Database, session: AsyncSession, *, trading: bool
) -> None:
    for _ in range(3):
        await factories.account(session, market_permissions=["US"])
    key, _ = await factories.api_key(session)
    request: dict[str, Any] = {
        "permission": "US", "trading": trading, "environment": None, "exclude": [uuid4()],
        "allowed_for": key,
    }  # fmt: skip
    for function in (accounts.find_for_operation, accounts.explain_for_operation):
        with recorded(database) as sent:
            found = await function(session, **request)
        assert (len(found), len(sent)) == (3, 1)


async def test_found_accounts_have_current_values(session: AsyncSession) -> None:
    account = await factories.account(session)
    await execute(session, account, "description = 'raw'")
    (found,) = await accounts.find_for_operation(session)
    assert (found is account, found.description) == (True, "raw")


# Reasons


@pytest.mark.parametrize(
    ("values", "assignments", "request_", "reasons"),
    [
        ({}, "", {}, []),
        ({"status": "suspended"}, "", {}, [R.NOT_ACTIVE]),
        ({}, "status = 'closed', private_key = NULL", {}, [R.NOT_ACTIVE]),
        ({"license": "TBHK"}, "", {}, [R.NO_VALID_TOKEN]),
        (TBHK | {"token_expires_at": NOW - timedelta(seconds=1)}, "", {}, [R.NO_VALID_TOKEN]),
        ({}, "failing_until = now() + interval '1 second'", {}, [R.FAILING]),
        ({"environment": "SANDBOX"}, "", {}, [R.OTHER_ENVIRONMENT]),
        ({"environment": "SANDBOX"}, "", {"environment": None}, []),
        ({"market_permissions": ["US"]}, "", {"permission": ["US", "HK"]}, [R.MISSING_PERMISSION]),
        ({}, "", {"account_type": "paper"}, [R.OTHER_TYPE]),
        ({}, "", {"account_type": "paper", "trading": True}, [R.OTHER_TYPE]),
        ({"account_type": "paper"}, "", {"trading": True}, [R.PAPER_OR_REAL]),
        ({"account_type": "paper"}, "", {}, []),
        (
            {"status": "inactive", "license": "TBHK", "environment": "SANDBOX"},
            "failing_until = now() + interval '1 second'",
            {"permission": "US", "account_type": "paper"},
            [
                R.NOT_ACTIVE,
                R.NO_VALID_TOKEN,
                R.FAILING,
                R.OTHER_ENVIRONMENT,
                R.MISSING_PERMISSION,
                R.OTHER_TYPE,
            ],
        ),
    ],
)
async def test_each_reason_is_told(
    session: AsyncSession,
    values: dict[str, Any],
    assignments: str,
    request_: dict[str, Any],
    reasons: list[RoutingReason],
) -> None:
    account = await factories.account(session, **values)
    if assignments:
        await execute(session, account, assignments)
    assert await accounts.explain_for_operation(session, **request_) == {account.id: reasons}


async def test_excluded_and_forbidden_accounts_have_a_reason(session: AsyncSession) -> None:
    first, second = [await factories.account(session) for _ in range(2)]
    key, _ = await factories.api_key(session, tiger_account_id=first.id)
    explained = await accounts.explain_for_operation(
        session, exclude=[first.id], allowed_for=key, environment=TigerEnvironment.SANDBOX
    )
    assert explained == {
        first.id: [R.OTHER_ENVIRONMENT, R.EXCLUDED],
        second.id: [R.OTHER_ENVIRONMENT, R.NOT_ALLOWED],
    }


async def test_a_readonly_session_can_explain(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
    async with clone.session(readonly=True) as session:
        assert await accounts.explain_for_operation(session) == {account.id: []}


MARKETS = [*MarketPermission]


def various_accounts(default: AccountType | None) -> list[TigerAccount]:
    """Return accounts that differ in all fields that routing depends on, also in NULL values.

    `default` is the type of the default account for trading. None: there is no default account.
    """
    chance = random.Random(18)
    expiries = [None, NOW - timedelta(hours=1), NOW + timedelta(hours=1)]
    made = [
        factories.new_account(
            status=chance.choice([*[AccountStatus.ACTIVE] * 6, "inactive", "suspended"]),
            account_type=chance.choice([*AccountType]),
            license=chance.choice([None, "TBHK", "TBHK", "TBNZ"]),
            access_token=chance.choice([None, "t", "t"]),
            token_expires_at=chance.choice(expiries),
            failing_until=chance.choice([None, None, *expiries]),
            error_count=chance.randrange(3),
            environment=chance.choice(["PROD", "PROD", "SANDBOX"]),
            market_permissions=chance.sample(MARKETS, chance.randrange(5)),
        )
        for _ in range(80)
    ]
    made[9].is_default_data = True
    if default is not None:
        made[7].is_default_trading, made[7].account_type = True, default
    return made


def expected_reasons(
    account: TigerAccount, default: TigerAccount | None, request_: dict[str, Any]
) -> set[RoutingReason]:
    """Return the reasons by the rules in docs/accounts.md, computed in Python."""
    environment, key = request_["environment"], request_["allowed_for"]
    is_paper, account_type = account.account_type == "paper", request_["account_type"]
    trades_on_paper = default is not None and default.account_type == "paper"
    rules = {
        R.NOT_ACTIVE: not account.is_active,
        R.NO_VALID_TOKEN: account.license == "TBHK" and not account.has_valid_token,
        R.FAILING: account.is_failing,
        R.OTHER_ENVIRONMENT: environment is not None and account.environment not in environment,
        R.MISSING_PERMISSION: not {*request_["permission"]} <= {*account.market_permissions},
        R.OTHER_TYPE: account_type is not None and account.account_type != account_type,
        R.PAPER_OR_REAL: (
            request_["trading"] and account_type is None and is_paper != trades_on_paper
        ),
        R.EXCLUDED: account.id in request_["exclude"],
        R.NOT_ALLOWED: key is not None and not key.can_access_account(account.id),
    }
    assert rules.keys() == {*RoutingReason}
    return {reason for reason, applies in rules.items() if applies}


@pytest.mark.slow
@pytest.mark.parametrize("default", [None, AccountType.PAPER, AccountType.PRIME])
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_exactly_the_accounts_without_a_reason_are_found(
    session: AsyncSession, default: AccountType | None, data: st.DataObject
) -> None:
    if not (stored := (await accounts.list_accounts(session, limit=1000)).items):
        stored = [await accounts.create(session, new) for new in various_accounts(default)]
        await factories.api_key(session, tiger_account_id=stored[3].id)
        await factories.api_key(session)
    keys = (await api_keys.list_api_keys(session)).items
    ids = [account.id for account in stored]
    request_: dict[str, Any] = {
        "permission": data.draw(st.lists(st.sampled_from(MARKETS), max_size=2)),
        "trading": data.draw(st.booleans()),
        "account_type": data.draw(st.none() | st.sampled_from(AccountType)),
        "environment": data.draw(st.none() | st.lists(st.sampled_from(TigerEnvironment))),
        "exclude": data.draw(st.sets(st.sampled_from(ids), max_size=20)),
        "allowed_for": data.draw(st.none() | st.sampled_from(keys)),
    }
    trading = next((account for account in stored if account.is_default_trading), None)
    explained = await accounts.explain_for_operation(session, **request_)
    assert {account_id: {*reasons} for account_id, reasons in explained.items()} == {
        account.id: expected_reasons(account, trading, request_) for account in stored
    }
    found = await accounts.find_for_operation(session, **request_, limit=1000)
    assert [account.id for account in found] == [
        account_id for account_id, reasons in explained.items() if not reasons
    ]

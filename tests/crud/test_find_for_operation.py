"""Which accounts may serve a request, and in which order."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
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
from tiger_db.crud import accounts
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidValue

S = AccountStatus


NOW = datetime.now(UTC)
TBHK: dict[str, Any] = {"license": "TBHK", "access_token": "t"}


async def fail(session: AsyncSession, account: TigerAccount, times: int = 1) -> None:
    for _ in range(times):
        await accounts.record_error(session, account.id, message="no answer")


async def execute(session: AsyncSession, account: TigerAccount, assignments: str) -> None:
    """Change the account by SQL, as a person with `psql` would."""
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
        (TBHK, ""),  # until when is unknown
        ({}, "error_count = 2, last_error_at = now()"),
        ({}, "error_count = 3, last_error_at = now() - interval '5 minutes 1 second'"),
        ({}, "error_count = 9, last_error_at = now() - interval '1 hour'"),
        ({}, "error_count = 3"),
        ({}, "last_error_at = now()"),
    ],
)
async def test_an_account_may_serve(
    session: AsyncSession, values: dict[str, Any], assignments: str
) -> None:
    account = await factories.account(session, account_number="1", **values)
    if assignments:
        await execute(session, account, assignments)
    assert await numbers(session) == ["1"]


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
        ({}, "error_count = 3, last_error_at = now()"),
        ({}, "error_count = 3, last_error_at = now() - interval '4 minutes 59 seconds'"),
        ({"is_default_data": True}, "error_count = 9, last_error_at = now()"),
    ],
)
async def test_an_account_may_not_serve(
    session: AsyncSession, values: dict[str, Any], assignments: str
) -> None:
    account = await factories.account(session, **values)
    if assignments:
        await execute(session, account, assignments)
    assert await numbers(session) == []


async def test_an_account_that_fails_serves_again_after_a_success(session: AsyncSession) -> None:
    account = await factories.account(session, account_number="1")
    await fail(session, account, 2)
    assert await numbers(session) == ["1"]
    await fail(session, account)
    assert await numbers(session) == []
    await accounts.reset_errors(session, account.id)
    assert await numbers(session) == ["1"]


async def test_the_permission_is_held(session: AsyncSession) -> None:
    await factories.account(session, account_number="none")
    await factories.account(session, account_number="hk", market_permissions=["HK"])
    await factories.account(session, account_number="us, hk", market_permissions=["US", "HK"])
    assert await numbers(session, permission=MarketPermission.US) == ["us, hk"]
    assert await numbers(session, permission=MarketPermission.HK) == ["hk", "us, hk"]
    assert await numbers(session, permission=MarketPermission.SG) == []
    assert await numbers(session) == ["none", "hk", "us, hk"]


async def test_the_environment_is_the_one_asked_for(session: AsyncSession) -> None:
    await factories.account(session, account_number="1")
    await factories.account(session, account_number="2", environment="SANDBOX")
    assert await numbers(session) == ["1"]
    assert await numbers(session, environment=TigerEnvironment.SANDBOX) == ["2"]


async def test_the_best_come_first(session: AsyncSession) -> None:
    """The default for the purpose, then those with the fewest errors, then the oldest."""
    for number, errors, defaults in (
        ("oldest", 0, {}),
        ("one error", 1, {}),
        ("data", 2, {"is_default_data": True}),
        ("trading", 2, {"is_default_trading": True}),
        ("newest", 0, {}),
    ):
        account = await factories.account(session, account_number=number, **defaults)
        await fail(session, account, errors)
    rest = ["oldest", "newest", "one error"]
    assert await numbers(session) == ["data", *rest, "trading"]
    assert await numbers(session, trading=True) == ["trading", *rest, "data"]
    assert await numbers(session, trading=True, limit=2) == ["trading", "oldest"]


PAPER = "20191106192858300"


@pytest.mark.parametrize(
    ("default", "found"),
    [(None, ["51230001", "U1"]), ("U1", ["U1", "51230001"]), (PAPER, [PAPER])],
)
async def test_paper_and_real_trade_apart(
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
async def test_a_default_that_may_not_serve_is_not_replaced_by_the_other_kind(
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
async def test_a_bad_limit_is_refused(session: AsyncSession, limit: int) -> None:
    with pytest.raises(InvalidValue, match="limit"):
        await accounts.find_for_operation(session, limit=limit)


@pytest.mark.parametrize("trading", [False, True])
async def test_finding_is_one_statement(
    database: Database, session: AsyncSession, *, trading: bool
) -> None:
    for _ in range(3):
        await factories.account(session, market_permissions=["US"])
    with recorded(database) as sent:
        found = await accounts.find_for_operation(
            session, permission=MarketPermission.US, trading=trading
        )
    assert (len(found), len(sent)) == (3, 1)


async def test_what_is_found_is_as_it_is_now(session: AsyncSession) -> None:
    account = await factories.account(session)
    await execute(session, account, "description = 'raw'")
    (found,) = await accounts.find_for_operation(session)
    assert (found is account, found.description) == (True, "raw")

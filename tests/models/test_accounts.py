"""Derived values of an account: type, state, token, permissions."""

from datetime import UTC, datetime, timedelta

import pytest

from tests.support.factories import new_account
from tiger_db import AccountStatus, AccountType, MarketPermission, TigerEnvironment


@pytest.mark.parametrize(
    ("number", "type_"),
    [
        ("U12300123", AccountType.GLOBAL),
        ("U1", AccountType.GLOBAL),
        ("51230321", AccountType.STANDARD),
        ("12345", AccountType.STANDARD),
        ("20191106192858300", AccountType.PAPER),
        ("2019110619285830", AccountType.STANDARD),  # a digit less
        ("201911061928583000", AccountType.STANDARD),  # a digit more
        ("u12300123", AccountType.STANDARD),
        ("U", AccountType.STANDARD),
        ("U12300123\n", AccountType.STANDARD),
        ("U\N{ARABIC-INDIC DIGIT ONE}", AccountType.STANDARD),
        ("\N{ARABIC-INDIC DIGIT TWO}" * 17, AccountType.STANDARD),
    ],
)
def test_the_type_follows_from_the_account_number(number: str, type_: AccountType) -> None:
    assert new_account(account_number=number).account_type == type_


def test_a_given_type_is_kept() -> None:
    account = new_account(account_number="U12300123", account_type="prime")
    assert account.account_type is AccountType.PRIME


def test_a_new_account_is_active_in_production_and_not_a_default() -> None:
    account = new_account()
    assert account.is_active
    assert account.environment is TigerEnvironment.PROD
    assert not account.is_default_trading
    assert not account.is_default_data
    assert account.error_count == 0


@pytest.mark.parametrize("status", AccountStatus)
def test_only_an_active_account_is_active(status: AccountStatus) -> None:
    assert new_account(status=status).is_active == (status == "active")


HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("token", "expires_in", "valid", "due"),
    [
        (None, None, False, False),
        (None, -HOUR, False, False),  # of a token that is gone
        ("token", None, True, False),  # some licences' tokens have no expiry
        ("token", 2 * HOUR, True, False),
        ("token", HOUR + MINUTE, True, False),
        ("token", HOUR - MINUTE, True, True),
        ("token", timedelta(0), False, True),
        ("token", -HOUR, False, True),
    ],
)
def test_a_token_is_valid_until_it_expires_and_due_an_hour_before(
    token: str | None, expires_in: timedelta | None, *, valid: bool, due: bool
) -> None:
    expires_at = None if expires_in is None else datetime.now(UTC) + expires_in
    account = new_account(access_token=token, token_expires_at=expires_at)
    assert (account.has_valid_token, account.needs_token_refresh) == (valid, due)


def test_an_account_has_the_market_permissions_in_its_list() -> None:
    account = new_account(market_permissions=["US", "HK"])
    had = [
        permission for permission in MarketPermission if account.has_market_permission(permission)
    ]
    assert had == [MarketPermission.US, MarketPermission.HK]

"""Derived values of an account: type, state, token, permissions."""

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import SecretStr, ValidationError

from tests.support.factories import new_account, plain
from tests.support.private_keys import FORMS, SHORT_BITS, der, short_pem
from tiger_db import (
    AccountStatus,
    AccountType,
    MarketPermission,
    PrivateKeyFormat,
    TigerEnvironment,
)
from tiger_db.encryption import Secret
from tiger_db.redaction import MASK


@pytest.mark.parametrize(
    ("number", "type_"),
    [
        ("U12300123", AccountType.GLOBAL),
        ("U1", AccountType.GLOBAL),
        ("51230321", AccountType.STANDARD),
        ("12345", AccountType.STANDARD),
        ("5123032151", AccountType.STANDARD),
        ("20191106192858300", AccountType.PAPER),
        ("201911061928583000", AccountType.PAPER),  # 18 digits, as the SDK counts
        ("u12300123", AccountType.GLOBAL),
        ("U12300123\n", AccountType.GLOBAL),
    ],
)
def test_the_type_follows_from_the_account_number(number: str, type_: AccountType) -> None:
    assert new_account(account_number=number).account_type == type_


SPELLINGS = [
    "U12300123",
    " u12300123 ",
    "U12300123\N{NO-BREAK SPACE}",
    "\N{IDEOGRAPHIC SPACE}u12300123\r\n",
    "\N{ZERO WIDTH NO-BREAK SPACE}U12300123",
    "U123\N{ZERO WIDTH SPACE}00\N{SOFT HYPHEN}123",
    "\N{RIGHT-TO-LEFT OVERRIDE}U12300123\N{POP DIRECTIONAL FORMATTING}",
    "\N{FULLWIDTH LATIN SMALL LETTER U}\N{FULLWIDTH DIGIT ONE}2300123\N{VARIATION SELECTOR-16}",
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=ascii)
def test_an_account_number_has_one_stored_form(spelling: str) -> None:
    account = new_account(account_number=spelling)
    assert (account.account_number, account.account_type) == ("U12300123", AccountType.GLOBAL)
    other = new_account()
    other.account_number = spelling
    assert other.account_number == "U12300123"


@pytest.mark.parametrize(
    "number",
    [
        "", " ", "U", "UU1", "1U", "A12300123", "DU12300123", "U1-2", "U1 2", "5123 0321",
        "51230321\n51230321", "5123", "51230321512", "2019110619285830", "9" * 51, "U" + "9" * 50,
        "+51230321", "51230321.0", "5123\x000321", "5123\x080321",
        "\N{CYRILLIC CAPITAL LETTER U}12300123",
        "U\N{ARABIC-INDIC DIGIT ONE}",
        "\N{ARABIC-INDIC DIGIT TWO}" * 17,
        "U\N{COMBINING DIAERESIS}12300123",
    ],
    ids=ascii,
)  # fmt: skip
def test_a_number_that_is_not_one_of_tigers_is_refused(number: str) -> None:
    account = new_account()
    before = account.account_number
    with pytest.raises(
        ValidationError, match=r"account_number\n.*an account number must be U and digits"
    ):
        new_account(account_number=number)
    with pytest.raises(ValidationError, match="account_number"):
        account.account_number = number
    assert account.account_number == before


@pytest.mark.parametrize(
    ("spelling", "tiger_id"),
    [
        ("20150001", "20150001"),
        (" 20150001\n", "20150001"),
        ("\N{FULLWIDTH DIGIT TWO}0150001\N{ZERO WIDTH JOINER}", "20150001"),
        (SecretStr("2015\N{WORD JOINER}0001"), "20150001"),
        ("Case-Stays_Case", "Case-Stays_Case"),
    ],
)
def test_a_tiger_id_has_one_stored_form(spelling: object, tiger_id: str) -> None:
    assert plain(new_account(tiger_id=spelling).tiger_id) == tiger_id


@pytest.mark.parametrize(
    ("tiger_id", "reason"),
    [
        ("2015 0001", "must be printable ASCII"),
        ("2015\N{ARABIC-INDIC DIGIT ONE}", "must be printable ASCII"),
        ("\N{ZERO WIDTH SPACE}", "must be printable ASCII"),
        ("2015\x000001", "must be printable ASCII"),
        ("\ud800", "must be printable ASCII"),
        ("", "should not be empty"),
        (f" {MASK} ", "not its mask"),
        (20150001, "should be a text"),
    ],
    ids=ascii,
)
def test_an_invalid_tiger_id_is_refused_and_not_shown(tiger_id: object, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason) as caught:
        new_account(tiger_id=tiger_id)
    assert "2015" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_an_rsa_key_of_less_than_1024_bits_is_refused(form: PrivateKeyFormat) -> None:
    short = short_pem(form)
    account = new_account(private_key=der(form))  # 1024 bits
    with pytest.raises(
        ValidationError, match=f"an RSA key must have 1024 bits or more, but has {SHORT_BITS}"
    ):
        new_account(private_key=short)
    with pytest.raises(ValidationError, match="private_key"):
        account.private_key = Secret(short)
    assert plain(account.private_key) == der(form)


@pytest.mark.parametrize("text", ["test_key", "MIIB", "-----BEGIN PRIVATE KEY-----", "\ud7ff"])
def test_a_key_that_cannot_be_parsed_is_accepted(text: str) -> None:
    assert plain(new_account(private_key=text).private_key) == text


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
        ("token", 2 * HOUR, True, False),  # refreshed when a fifth of the two hours is left
        ("token", 76 * MINUTE, True, False),
        ("token", 74 * MINUTE, True, True),
        ("token", timedelta(0), False, True),
        ("token", -HOUR, False, True),
    ],
)
def test_a_token_is_valid_until_it_expires_and_needs_a_refresh_an_hour_before_it_is_due(
    token: str | None, expires_in: timedelta | None, *, valid: bool, due: bool
) -> None:
    expires_at = None if expires_in is None else datetime.now(UTC) + expires_in
    account = new_account(access_token=token, token_expires_at=expires_at)
    assert (account.has_valid_token, account.needs_token_refresh) == (valid, due)
    account.status = AccountStatus.SUSPENDED
    assert not account.needs_token_refresh


def test_an_account_has_the_market_permissions_in_its_list() -> None:
    account = new_account(market_permissions=["US", "HK"])
    had = [
        permission for permission in MarketPermission if account.has_market_permission(permission)
    ]
    assert had == [MarketPermission.US, MarketPermission.HK]

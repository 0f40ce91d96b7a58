"""The times in an access token, and the comparison of tokens by age."""

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.factories import new_account
from tests.support.tiger_tokens import MONTH, NOW, SOON, tiger_token
from tiger_db.errors import StaleToken
from tiger_db.models.accounts import TokenTimes, token_times

# Reading

FIRST = datetime(2001, 9, 9, 1, 46, 40, tzinfo=UTC)  # of 13 digits
LAST = datetime(2286, 11, 20, 17, 46, 39, 999000, tzinfo=UTC)


@given(
    stamps=st.lists(st.integers(10**12, 10**13 - 1), min_size=2, max_size=2, unique=True),
    opaque=st.binary(max_size=40) | st.from_regex(rb"[0-9,]{16}"),
)
@example(stamps=[10**12, 10**13 - 1], opaque=bytes(16))
@example(stamps=[10**12, 10**12 + 1], opaque=b"4,17000000000000")
def test_the_times_are_read_from_a_token(stamps: list[int], opaque: bytes) -> None:
    generated, expires = sorted(stamps)
    times = token_times(base64.b64encode(f"{generated},{expires}".encode() + opaque).decode())
    assert times is not None
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert times.generated_at == epoch + timedelta(milliseconds=generated)
    assert times.expires_at == epoch + timedelta(milliseconds=expires)
    assert FIRST <= times.generated_at < times.expires_at <= LAST


@pytest.mark.parametrize(
    "spelled",
    [
        str,
        lambda token: f" \n{token}\r\n",
        lambda token: token.rstrip("="),
        lambda token: token.replace("+", "-").replace("/", "_"),
        lambda token: token[:36],
    ],
)
def test_the_base64_alphabet_and_padding_make_no_difference(spelled: Callable[[str], str]) -> None:
    for _ in range(20):
        assert token_times(spelled(tiger_token())) == TokenTimes(NOW, NOW + MONTH)


def encoded(content: str) -> str:
    return base64.b64encode(content.encode() + bytes(16)).decode()


@pytest.mark.parametrize(
    "token",
    [
        "",
        " ",
        "token-1",
        "токен",
        "\ud800",
        "1764072000000,1766664000000",
        "eyJhbGciOiJIUzI1NiJ9.eyJleHAiOjE3NjQwNzIwMDB9.c2lnbmF0dXJl",
        "2YotnFZFEjr1zCsicMWpAA",
        "b3f1c2d4-0a1b-4c5d-8e9f-001122334455",
        f"Bearer {tiger_token()}",
        f"{tiger_token()[:10]}\n{tiger_token()[10:]}",
        tiger_token()[:35],
        tiger_token()[4:],
        encoded("1766664000000,1764072000000"),  # expires before it is made
        encoded("1764072000000,1764072000000"),
        encoded("1764072000,1766664000"),  # seconds
        encoded("1764072000000000,1766664000000000"),
        encoded("1764072000000;1766664000000"),
        encoded("-764072000000,1766664000000"),
        encoded("+764072000000,1766664000000"),
        encoded("1_64072000000,1766664000000"),
        encoded(" 1764072000000,1766664000000"),
        encoded("\u0661764072000000,1766664000000"),
        base64.b64encode(bytes(43)).decode(),
    ],
)
def test_a_text_in_another_format_has_no_times(token: str) -> None:
    assert token_times(token) is None


@given(st.text() | st.text(st.sampled_from("MNODTjzwxyAEIQ0123=")))
def test_any_text_is_parsed_without_an_error(anything: str) -> None:
    token_times(anything)


# Which of two is newer

T = tiger_token
LATER = NOW + timedelta(days=1)
SAME = tiger_token()


@pytest.mark.parametrize(
    ("held", "until", "new", "given_expiry", "expires_at"),
    [
        (None, None, T(), None, NOW + MONTH),
        (None, None, T(), LATER, LATER),  # the given expiry wins
        (None, None, "opaque", None, None),
        (None, None, "opaque", LATER, LATER),
        (None, LATER, "opaque", NOW, NOW),  # an expiry without a token does not count
        (T(), None, T(SOON), None, SOON + MONTH),
        (T(), None, T(SOON, timedelta(hours=1)), None, SOON + timedelta(hours=1)),
        (T(), None, T(NOW), None, NOW + MONTH),  # of the same millisecond
        (SAME, None, SAME, None, NOW + MONTH),
        (SAME, LATER + MONTH, SAME, None, NOW + MONTH),
        (T(NOW, MONTH), LATER + MONTH, T(SOON), None, SOON + MONTH),  # the times in the token win
        ("opaque", LATER, "newer", LATER, LATER),
        ("opaque", LATER, "opaque", NOW, NOW),
        ("opaque", LATER, "newer", None, None),
        ("opaque", None, "newer", NOW, NOW),
        ("opaque", LATER, T(), None, NOW + MONTH),
        (T(), NOW + MONTH, "opaque", LATER + MONTH, LATER + MONTH),
    ],
)
def test_a_token_that_is_not_older_is_accepted(
    held: str | None,
    until: datetime | None,
    new: str,
    given_expiry: datetime | None,
    expires_at: datetime | None,
) -> None:
    account = new_account(access_token=held, token_expires_at=until)
    assert account.check_not_stale(new, given_expiry) == expires_at


@pytest.mark.parametrize(
    ("held", "until", "new", "given_expiry"),
    [
        (T(SOON), None, T(), None),
        (T(SOON), None, T(), LATER + MONTH),  # however long it lasts
        (T(SOON, timedelta(hours=1)), None, T(NOW, 2 * MONTH), None),
        (T(SOON), NOW, T(), None),
        ("opaque", LATER, "older", NOW),
        ("opaque", LATER + MONTH, T(), None),
        (T(), NOW + MONTH, "opaque", LATER),
    ],
)
def test_an_older_token_is_stale(
    held: str, until: datetime | None, new: str, given_expiry: datetime | None
) -> None:
    account = new_account(access_token=held, token_expires_at=until)
    with pytest.raises(StaleToken, match="newer access token"):
        account.check_not_stale(new, given_expiry)

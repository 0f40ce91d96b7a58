"""Derived values of an event: severity, actions, addresses."""

import itertools
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.models.examples import made
from tiger_db import AuditAction, AuditLog, AuditResult, AuditSeverity
from tiger_db.models.audit_logs import family_of

SEVERITIES: list[str] = list(AuditSeverity)


def severity(action: str, result: str = "success") -> str:
    return made(AuditLog, action=action, result=result).severity


@pytest.mark.parametrize(
    ("action", "success", "otherwise"),
    [
        ("data:query", "low", "medium"),
        ("mcp:tool_call", "low", "medium"),
        ("dashboard:login", "low", "medium"),
        ("account:update", "medium", "high"),
        ("api_key:deny", "medium", "high"),
        ("token:refresh", "medium", "high"),
        ("trade:place_order", "medium", "high"),
        ("system:encryption_key_rotate", "medium", "high"),
        ("security:access_denied", "high", "high"),
        ("security:odd_login", "high", "high"),  # an application's
        ("trade:close_all", "medium", "high"),
        ("backup:run", "low", "medium"),
    ],
)
def test_the_severity_follows_from_action_and_result(
    action: str, success: str, otherwise: str
) -> None:
    assert severity(action) == severity(action, "pending") == success
    for result in ("failure", "partial", "error"):
        assert severity(action, result) == otherwise


def test_a_failure_is_never_less_severe_than_a_success() -> None:
    for action, result in itertools.product(AuditAction, AuditResult):
        rank = SEVERITIES.index(severity(action, result))
        assert rank >= SEVERITIES.index(severity(action))


@pytest.mark.parametrize("given_", AuditSeverity)
def test_a_given_severity_is_kept(given_: AuditSeverity) -> None:
    event = made(AuditLog, action="security:tampering", severity=given_)
    assert event.severity is given_


def test_an_invalid_action_is_the_only_error() -> None:
    # There is no second error for the severity, which is derived from the action.
    with pytest.raises(ValidationError) as caught:
        made(AuditLog, action="give_away")
    assert [problem["loc"] for problem in caught.value.errors()] == [("action",)]


def test_a_known_action_is_a_member_and_another_one_a_text() -> None:
    for action in AuditAction:
        for given_ in (action, action.value):
            assert made(AuditLog, action=given_).action is action
    assert type(made(AuditLog, action="backup:run").action) is str
    assert family_of("backup:run") == "backup"
    assert AuditAction.TRADE_PLACE_ORDER.family == "trade"


@pytest.mark.parametrize(
    "action",
    ["place_order", ":", "a:", ":b", "Trade:buy", "trade:Buy", "trade:buy:now", "trade: buy",
     "trade:buy\n", "1a:b", "_a:b", "tradé:buy", "a:" + "b" * 59, "", 5, None, b"a:b"],
)  # fmt: skip
def test_an_action_has_a_family_and_a_verb(action: object) -> None:
    with pytest.raises(ValidationError, match="action"):
        made(AuditLog, action=action)


# shared/tiger-sdk.md, "What an audit trail must be able to name"
TRADES = {
    "place_order", "modify_order", "cancel_order", "place_forex_order", "transfer_segment_fund",
    "cancel_segment_fund", "transfer_position", "submit_option_exercise", "cancel_option_exercise",
    "create_order", "preview_order", "check_option_exercise",
}  # fmt: skip


def test_every_kind_of_order_has_an_action() -> None:
    assert {f"trade:{name}" for name in TRADES} <= set(AuditAction)
    assert {"data:grab_quote_permission", "token:refresh"} <= set(AuditAction)
    assert {f"token:oauth_{name}" for name in ("login", "refresh", "logout")} <= set(AuditAction)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_one_in_each_spelling(address: IPv4Address) -> None:
    for spelling in (str(address), f"::ffff:{address}", IPv6Address(f"::ffff:{address}"), address):
        assert made(AuditLog, ip_address=spelling).ip_address == address


@given(st.ip_addresses(v=6))
def test_an_ipv6_address_is_one_in_each_spelling(address: IPv6Address) -> None:
    expected = address.ipv4_mapped or address
    for spelling in (address.exploded, address.compressed.upper(), address):
        assert made(AuditLog, ip_address=spelling).ip_address == expected

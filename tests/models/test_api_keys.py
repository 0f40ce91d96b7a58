"""Permissions of a key: scopes, networks, clients, account, expiry."""

import itertools
from datetime import UTC, datetime, timedelta, timezone
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from uuid import UUID, uuid4

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.models.examples import made
from tests.support import factories
from tiger_db import APIKey, APIKeyScope, APIKeyStatus
from tiger_db.database import AsyncSession

LEVELS = ["read", "write", "admin"]


def key(**values: object) -> APIKey:
    return made(APIKey, **values)


@pytest.mark.parametrize("held", APIKeyScope)
def test_a_scope_implies_the_lower_ones_of_its_family_and_no_other(held: APIKeyScope) -> None:
    family, level = held.split(":")
    expected = {f"{family}:{lower}" for lower in LEVELS[: LEVELS.index(level) + 1]}
    holder = key(scopes=[held])
    assert {scope for scope in APIKeyScope if holder.has_scope(scope)} == expected
    assert {scope for scope in APIKeyScope if held.implies(scope)} == expected


def test_every_family_has_every_level() -> None:
    families = ["mcp", "dashboard", "account", "trade", "system"]
    expected = {":".join(pair) for pair in itertools.product(families, LEVELS)}
    assert set(APIKeyScope) == expected


def test_any_and_all_scopes() -> None:
    holder = key(scopes=["trade:write", "mcp:read"])
    read, admin = APIKeyScope.TRADE_READ, APIKeyScope.TRADE_ADMIN
    assert holder.has_all_scopes([read, APIKeyScope.MCP_READ])
    assert not holder.has_all_scopes([read, admin])
    assert holder.has_any_scope([admin, read])
    assert not holder.has_any_scope([admin, APIKeyScope.SYSTEM_READ])
    assert holder.has_all_scopes([])
    assert not holder.has_any_scope([])


def test_a_scope_given_twice_is_held_once() -> None:
    scopes = ["trade:read", "mcp:read", "trade:read"]
    assert key(scopes=scopes).scopes == ["trade:read", "mcp:read"]


networks = st.ip_addresses().flatmap(
    lambda address: st.integers(0, address.max_prefixlen).map(
        lambda prefix: ip_network((address, prefix), strict=False)
    )
)


def spellings(address: IPv4Address | IPv6Address) -> list[str | IPv4Address | IPv6Address]:
    if isinstance(address, IPv4Address):
        mapped = IPv6Address(f"::ffff:{address}")
        return [address, str(address), mapped, str(mapped), mapped.exploded.upper()]
    return [address, address.compressed, address.exploded.upper()]


@given(network=networks, outside=st.ip_addresses(), data=st.data())
def test_an_address_is_allowed_if_it_is_in_a_network(
    network: IPv4Network | IPv6Network,
    outside: IPv4Address | IPv6Address,
    data: st.DataObject,
) -> None:
    offset = data.draw(st.integers(0, network.num_addresses - 1))
    unmapped = getattr(network[offset], "ipv4_mapped", None)
    holder = key(allowed_ips=["192.0.2.0/24", str(network)])
    if unmapped is None:
        assert all(holder.is_ip_allowed(spelling) for spelling in spellings(network[offset]))
    known = any(outside.version == each.version and outside in each for each in holder.allowed_ips)
    if getattr(outside, "ipv4_mapped", None) is None:
        assert {holder.is_ip_allowed(spelling) for spelling in spellings(outside)} == {known}


@given(address=st.ip_addresses(v=4), prefix=st.integers(0, 32))
def test_an_ipv4_mapped_network_is_the_ipv4_one(address: IPv4Address, prefix: int) -> None:
    mapped = ip_network((f"::ffff:{address}", prefix + 96), strict=False)
    holder = key(allowed_ips=[mapped.exploded])
    assert holder.allowed_ips == [ip_network((address, prefix), strict=False)]
    assert all(holder.is_ip_allowed(spelling) for spelling in spellings(address))


@pytest.mark.parametrize("unknown", [None, "", "localhost", "10.0.0.1/32", "10.0.0.01", "::g"])
def test_with_networks_set_an_unknown_address_is_not_allowed(unknown: str | None) -> None:
    assert not key(allowed_ips=["0.0.0.0/0", "::/0"]).is_ip_allowed(unknown)
    assert key().is_ip_allowed(unknown)


@pytest.mark.parametrize("bad", ["10.0.0.1/8", "10.0.0.0/33", "localhost", "::/129", ""])
def test_an_invalid_network_is_refused(bad: str) -> None:
    with pytest.raises(ValidationError, match="allowed_ips"):
        key(allowed_ips=["10.0.0.0/8", bad])


@pytest.mark.parametrize(
    ("bad", "network", "address"),
    [
        ("10.0.0.5/8", "10.0.0.0/8", "10.0.0.5"),
        ("10.0.0.5/255.0.0.0", "10.0.0.0/8", "10.0.0.5"),
        ("2001:db8::1/48", "2001:db8::/48", "2001:db8::1"),
    ],
)
def test_the_message_about_host_bits_shows_what_to_write(
    bad: str, network: str, address: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        key(allowed_ips=["10.0.0.0/8", bad])
    (problem,) = caught.value.errors()
    assert problem["loc"] == ("allowed_ips", 1)
    assert f"has host bits: write {network} for the whole" in problem["msg"]
    assert f"or {address} for this address only" in problem["msg"]
    for written in (network, address):
        assert key(allowed_ips=[written]).is_ip_allowed(address)


async def test_networks_are_stored_and_read_unchanged(session: AsyncSession) -> None:
    given_ = ["10.0.0.0/8", "10.1.2.3", "0.0.0.0/0", "2001:db8::/32", "::1", "::/0"]
    stored, _ = await factories.api_key(session, allowed_ips=given_)
    await session.refresh(stored)
    assert stored.allowed_ips == [ip_network(network) for network in given_]


@pytest.mark.parametrize(
    ("pattern", "allowed", "refused"),
    [
        ("curl/8.5", ["curl/8.5"], ["curl/8.50", "Curl/8.5", " curl/8.5", "curl/8x5", ""]),
        ("curl/*", ["curl/", "curl/8.5"], ["xcurl/8.5", "curl"]),
        ("*", ["", "anything\nat all"], []),
        ("*bot*", ["bot", "a bot b"], ["b-o-t"]),
        ("a*b*c", ["abc", "a-b-c", "abcbc"], ["abcb", "ab", "ac", "bc"]),
        ("a*a", ["aa", "aba"], ["a"]),
        ("a*bc*bc", ["abcbc"], ["abc"]),
        ("[a-z]?.+", ["[a-z]?.+"], ["b", "a.", "aa+"]),
        ("\\*", ["\\", "\\x"], ["*"]),
    ],
)
def test_a_user_agent_is_allowed_if_a_pattern_matches_all_of_it(
    pattern: str, allowed: list[str], refused: list[str]
) -> None:
    holder = key(allowed_user_agents=["other", pattern])
    assert [agent for agent in allowed + refused if holder.is_user_agent_allowed(agent)] == allowed
    assert not holder.is_user_agent_allowed(None)


def test_without_patterns_any_user_agent_is_allowed() -> None:
    assert key().is_user_agent_allowed("anything")
    assert key().is_user_agent_allowed(None)


def matches(pattern: str, text: str) -> bool:
    """Match a pattern with a slow and simple reference."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(matches(pattern[1:], text[skipped:]) for skipped in range(len(text) + 1))
    return text[:1] == pattern[0] and matches(pattern[1:], text[1:])


@given(pattern=st.text("ab*\n", max_size=6), agent=st.text("ab\n", max_size=8))
@example(pattern="*ab*ba*", agent="aba")
def test_a_pattern_matches_like_a_simple_reference(pattern: str, agent: str) -> None:
    assert key(allowed_user_agents=[pattern]).is_user_agent_allowed(agent) == matches(
        pattern, agent
    )


def test_no_user_agent_makes_a_pattern_slow() -> None:
    # With backtracking over each star, this would not end.
    assert not key(allowed_user_agents=["*a" * 30 + "*b"]).is_user_agent_allowed("a" * 5000)


@pytest.mark.parametrize(
    ("status", "expires_in", "active"),
    [
        ("active", None, True),
        ("active", timedelta(minutes=1), True),
        ("active", timedelta(0), False),
        ("active", -timedelta(minutes=1), False),
        *((status, None, False) for status in APIKeyStatus if status != "active"),
    ],
)
def test_a_key_is_active_until_it_expires(
    status: str, expires_in: timedelta | None, *, active: bool
) -> None:
    far_east = timezone(timedelta(hours=14))
    expires_at = None if expires_in is None else datetime.now(far_east) + expires_in
    holder = key(status=status, expires_at=expires_at)
    assert holder.is_active == active
    assert holder.is_expired == (expires_at is not None and not active)


async def test_a_key_from_the_database_expires_too(session: AsyncSession) -> None:
    expires_at = datetime.now(UTC) + timedelta(minutes=1)
    stored, _ = await factories.api_key(session, expires_at=expires_at)
    await session.refresh(stored)
    assert stored.expires_at == expires_at
    assert stored.is_active


@pytest.mark.parametrize("bound_to", [None, UUID(int=1)])
def test_a_bound_key_accesses_its_account_only(bound_to: UUID | None) -> None:
    holder = key(tiger_account_id=bound_to)
    assert holder.can_access_account(UUID(int=1))
    assert holder.can_access_account(uuid4()) == (bound_to is None)


def test_the_hash_is_in_no_output() -> None:
    shown = key(key_hash="never-shown")
    outputs = (repr(shown), str(shown), str(shown.model_dump()), shown.model_dump_json())
    assert not [output for output in outputs if "never-shown" in output]

"""The checks of an API key, from the status to the scopes."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tests.support import factories
from tests.support.raw_keys import sent_statements, unknown_key, wrong_secret
from tiger_db import APIKeyScope, APIKeyStatus, Database
from tiger_db.crud import api_keys
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    AccessDenied,
    AccountNotActive,
    AccountNotAllowed,
    AddressNotAllowed,
    APIKeyExpired,
    APIKeyRevoked,
    InvalidAPIKey,
    RateLimited,
    ScopeMissing,
    TradingPaused,
    UserAgentNotAllowed,
)

HOUR = timedelta(hours=1)


async def test_the_first_failed_check_is_raised_and_no_denial_is_counted(
    session: AsyncSession,
) -> None:
    account = await factories.account(session, status="suspended")
    key, raw_key = await factories.api_key(
        session,
        tiger_account_id=account.id,
        expires_at=datetime(2020, 1, 1, tzinfo=UTC),
        allowed_ips=["10.0.0.0/8"],
        allowed_user_agents=["claude/*"],
        rate_limit_per_day=1,
        scopes=[APIKeyScope.MCP_READ, APIKeyScope.TRADE_READ],
    )
    await api_keys.pause(session, reason="stop")
    key.status = APIKeyStatus.INACTIVE
    await count_limits(session, key.id, 1)
    request: dict[str, Any] = {
        "raw_key": "nonsense",
        "scopes": [APIKeyScope.MCP_READ, APIKeyScope.TRADE_WRITE],
        "account_id": uuid4(),
    }
    wrong = wrong_secret(raw_key)
    steps: list[tuple[type[AccessDenied], Callable[[], object]]] = [
        (InvalidAPIKey, lambda: request.update(raw_key=unknown_key())),
        (InvalidAPIKey, lambda: request.update(raw_key=wrong)),
        (InvalidAPIKey, lambda: request.update(raw_key=raw_key)),
        (APIKeyRevoked, lambda: setattr(key, "status", APIKeyStatus.ACTIVE)),
        (APIKeyExpired, lambda: setattr(key, "expires_at", None)),
        (AccountNotActive, lambda: setattr(account, "status", "active")),
        (AddressNotAllowed, lambda: request.update(ip_address="10.1.2.3")),
        (UserAgentNotAllowed, lambda: request.update(user_agent="claude/1.0")),
        (ScopeMissing, lambda: request.update(scopes=[APIKeyScope.TRADE_READ])),
        (AccountNotAllowed, lambda: request.update(account_id=account.id)),
        (TradingPaused, lambda: request.update(scopes=[APIKeyScope.MCP_READ])),
        (RateLimited, lambda: setattr(key, "rate_limit_per_day", None)),
    ]
    for reason, repair in steps:
        with pytest.raises(AccessDenied) as refused:
            await api_keys.authorize_api_key(session, **request)
        assert type(refused.value) is reason
        repair()
        await session.flush()
    assert (key.usage_count, key.last_used_at) == (0, None)
    assert await api_keys.authorize_api_key(session, **request) is key
    assert key.usage_count == 1
    assert key.last_used_at is not None


@pytest.mark.parametrize("status", ["inactive", "suspended", "pending_verification"])
async def test_only_an_active_account_serves_its_keys(session: AsyncSession, status: str) -> None:
    account = await factories.account(session)
    _, raw_key = await factories.api_key(session, tiger_account_id=account.id)
    assert await api_keys.verify_api_key(session, raw_key)
    account.sqlmodel_update({"status": status})
    await session.flush()
    assert await api_keys.verify_api_key(session, raw_key) is None


@pytest.mark.parametrize(
    ("status", "reason"),
    [("inactive", APIKeyRevoked), ("revoked", APIKeyRevoked), ("expired", APIKeyExpired)],
)
async def test_only_an_active_key_is_accepted(
    session: AsyncSession, status: str, reason: type[AccessDenied]
) -> None:
    key, raw_key = await factories.api_key(session)
    key.sqlmodel_update({"status": status})
    with pytest.raises(reason):
        await api_keys.authorize_api_key(session, raw_key)
    with pytest.raises(InvalidAPIKey):  # the status stays hidden without the secret
        await api_keys.authorize_api_key(session, wrong_secret(raw_key))


async def test_a_key_with_an_expiry_verifies_until_then(session: AsyncSession) -> None:
    now = datetime.now(UTC)
    _, valid = await factories.api_key(session, expires_at=now + HOUR)
    _, expired = await factories.api_key(session, expires_at=now - timedelta(microseconds=1))
    assert await api_keys.verify_api_key(session, valid)
    assert await api_keys.verify_api_key(session, expired) is None


async def test_an_unknown_key_and_a_wrong_secret_look_alike(clone: Database) -> None:
    async with clone.session() as session:
        _, raw_key = await factories.api_key(session)
    answers = []
    for wrong in (wrong_secret(raw_key), unknown_key()):
        with sent_statements(clone) as sent:
            async with clone.session() as session:
                with pytest.raises(InvalidAPIKey) as refused:
                    await api_keys.authorize_api_key(session, wrong)
        answers.append((str(refused.value), vars(refused.value), sent))
    assert answers[0] == answers[1]
    assert len([statement for statement in answers[0][2] if "SELECT" in statement]) == 1


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw_key=st.text()
    | st.from_regex(r"tdb_(live|test)_[0-9A-Za-z]{12}_[0-9A-Za-z]{48,50}\s?")
    | st.binary()
    | st.none()
)
@example(raw_key="tdb_test_0123456789ab_" + "0" * 48 + "٣")  # a digit that is not ASCII
@example(raw_key="tdb_test_0123456789ab_" + "0" * 49 + "\n")
async def test_no_malformed_key_is_accepted(session: AsyncSession, raw_key: Any) -> None:
    assert await api_keys.verify_api_key(session, raw_key) is None


@pytest.mark.parametrize(
    ("allowed", "address", "accepted"),
    [
        ([], None, True),
        ([], "not an address", True),
        (["10.0.0.0/8"], "10.255.0.1", True),
        (["10.0.0.0/8"], "::ffff:10.0.0.1", True),
        (["::ffff:10.0.0.0/104"], "10.0.0.1", True),
        (["::ffff:10.0.0.0/104"], "::ffff:10.0.0.1", True),
        (["10.0.0.0/8"], "11.0.0.1", False),
        (["10.0.0.0/8"], "::ffff:11.0.0.1", False),
        (["10.0.0.0/8"], "::10.0.0.1", False),
        (["0.0.0.0/0"], "2001:db8::1", False),
        (["::/0"], "10.0.0.1", False),
        (["192.0.2.1", "2001:db8::/32"], "2001:db8::1", True),
        (["10.0.0.0/8"], None, False),
        (["10.0.0.0/8"], "", False),
        (["10.0.0.0/8"], "10.0.0.1, 10.0.0.2", False),
        (["10.0.0.0/8"], "10.0.0.01", False),
    ],
)
async def test_addresses(
    session: AsyncSession, allowed: list[str], address: str | None, accepted: bool
) -> None:
    _, raw_key = await factories.api_key(session, allowed_ips=allowed)
    found = await api_keys.verify_api_key(session, raw_key, ip_address=address)
    assert (found is not None) == accepted


V4 = st.builds(
    lambda address, bits: IPv4Network((address, bits), strict=False),
    st.ip_addresses(v=4),
    st.integers(0, 32),
)
V6 = st.builds(
    lambda address, bits: IPv6Network((address, bits), strict=False),
    st.ip_addresses(v=6),
    st.integers(0, 128),
)
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def spellings(address: Address) -> list[str | Address]:
    """Return all spellings of an address. An IPv4 address is also written as IPv4-mapped IPv6."""
    if isinstance(address, IPv6Address):
        written = {address.compressed, address.exploded}
    else:
        mapped = IPv6Address(0xFFFF << 32 | int(address))
        hexadecimal = f"::ffff:{int(address) >> 16:x}:{int(address) & 0xFFFF:x}"
        assert IPv6Address(hexadecimal) == mapped
        written = {str(address), f"::ffff:{address}", f"0:0:0:0:0:ffff:{address}", hexadecimal}
        written |= {mapped.exploded, mapped.compressed}
    return [address, *sorted(written), *sorted({text.upper() for text in written})]


def written_networks(network: Network) -> list[str]:
    if isinstance(network, IPv6Network):
        return [network.compressed, network.exploded]
    mapped = f"::ffff:{network.network_address}/{96 + network.prefixlen}"
    return [str(network), mapped, network.with_netmask]


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(network=V4 | V6, data=st.data())
async def test_an_address_of_a_network_is_accepted_in_any_spelling(
    session: AsyncSession, network: Network, data: st.DataObject
) -> None:
    within = data.draw(st.integers(0, network.num_addresses - 1))
    address = network.network_address + within
    # IPv4-mapped IPv6 addresses are IPv4 addresses.
    assume(not (isinstance(address, IPv6Address) and address.ipv4_mapped))
    allowed = data.draw(st.sampled_from(written_networks(network)))
    key, raw_key = await factories.api_key(session, allowed_ips=["192.0.2.7", allowed])
    for spelled in spellings(address):
        assert await api_keys.authorize_api_key(session, raw_key, ip_address=spelled) is key


@pytest.mark.slow
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(networks=st.lists(V4 | V6, min_size=1, max_size=3), data=st.data())
async def test_an_address_of_no_network_is_refused_in_any_spelling(
    session: AsyncSession, networks: list[Network], data: st.DataObject
) -> None:
    # An address next to the ends of a network, or any address.
    ends = [int(n[at]) + step for n in networks for at, step in ((0, -1), (-1, 1))]
    near = st.sampled_from([end for end in ends if 0 < end < 2**128] or [1]).map(
        lambda number: IPv4Address(number) if number < 2**32 else IPv6Address(number)
    )
    address = data.draw(near | st.ip_addresses())
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    assume(not any(address in network for network in networks))
    # Only a network within ::ffff:0:0/96 contains IPv4 addresses.
    mapped = IPv6Network("::ffff:0:0/96")
    assume(not any(isinstance(n, IPv6Network) and n.subnet_of(mapped) for n in networks))
    allowed = [data.draw(st.sampled_from(written_networks(n))) for n in networks]
    _, raw_key = await factories.api_key(session, allowed_ips=allowed)
    for spelled in spellings(address):
        with pytest.raises(AddressNotAllowed):
            await api_keys.authorize_api_key(session, raw_key, ip_address=spelled)
    for nowhere in (None, "", "unknown", "localhost", f"{networks[0]}"):
        with pytest.raises(AddressNotAllowed):
            await api_keys.authorize_api_key(session, raw_key, ip_address=nowhere)


@pytest.mark.parametrize(
    ("allowed", "user_agent", "accepted"),
    [
        ([], None, True),
        (["claude/*"], "claude/1.0", True),
        (["claude/*"], "Mozilla claude/1.0", False),
        (["claude.*"], "claudeX1", False),
        (["a", "b*d"], "bcd", True),
        (["claude/*"], None, False),
        (["*"], "a\nb", True),
    ],
)
async def test_user_agents(
    session: AsyncSession, allowed: list[str], user_agent: str | None, accepted: bool
) -> None:
    _, raw_key = await factories.api_key(session, allowed_user_agents=allowed)
    found = await api_keys.verify_api_key(session, raw_key, user_agent=user_agent)
    assert (found is not None) == accepted


async def test_scopes_imply_each_other_downwards_in_their_family(session: AsyncSession) -> None:
    _, raw_key = await factories.api_key(session, scopes=[APIKeyScope.TRADE_WRITE])
    authorize = api_keys.authorize_api_key
    await authorize(session, raw_key, scopes=[APIKeyScope.TRADE_READ, APIKeyScope.TRADE_WRITE])
    for scope in (APIKeyScope.TRADE_ADMIN, APIKeyScope.MCP_READ):
        with pytest.raises(ScopeMissing, match=scope):
            await authorize(session, raw_key, scopes=[APIKeyScope.TRADE_READ, scope])


async def test_an_unbound_key_serves_every_account(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session)
    assert await api_keys.authorize_api_key(session, raw_key, account_id=uuid4()) is key


async def count_limits(
    session: AsyncSession, key_id: UUID, count: int, hours_ago: int = 0, days_ago: int = 0
) -> None:
    """As if so many uses had been counted in the hour and the day that many ago."""
    await session.execute(
        text(
            "INSERT INTO api_key_limits (api_key_id, hour, hour_count, day, day_count)"
            " VALUES (:key, date_trunc('hour', clock_timestamp(), 'UTC')"
            " - make_interval(hours => :hours), :count, date_trunc('day', clock_timestamp(), 'UTC')"
            " - make_interval(days => :days), :count)"
        ),
        {"key": key_id, "hours": hours_ago, "days": days_ago, "count": count},
    )

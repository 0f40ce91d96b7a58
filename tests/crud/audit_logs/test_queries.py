"""Searching and counting of audit events."""

from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta, timezone
from ipaddress import ip_address, ip_network
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import factories
from tiger_db import AuditAction, AuditLog, AuditResult, AuditSeverity
from tiger_db.crud import audit_logs
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidValue

LOGIN = AuditAction.DASHBOARD_LOGIN
NONSENSE: Any = "nonsense"
no_deadline = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def ids(events: Iterable[AuditLog]) -> list[UUID]:
    return [event.id for event in events]


def event_at(time: datetime, **values: Any) -> AuditLog:
    """Build an event whose UUIDv7 has the given time."""
    milliseconds = int(time.timestamp() * 1000)
    bits = milliseconds << 80 | 7 << 76 | 0b10 << 62 | uuid4().int & (2**62 - 1)
    return factories.new_event(id=UUID(int=bits), **values)


async def test_security_events_are_recent_and_of_the_family_or_severe(
    session: AsyncSession,
) -> None:
    now = datetime.now(UTC)

    def hours_ago(hours: float, **values: Any) -> AuditLog:
        return event_at(now - timedelta(hours=hours), **values)

    old = hours_ago(25, severity="critical")
    family = hours_ago(3, action="security:key_leak", severity="low")
    critical, high = hours_ago(2, severity="critical"), hours_ago(1, severity="high")
    harmless = [hours_ago(1, severity="medium"), hours_ago(0, severity="low")]
    await audit_logs.log_events(session, [old, family, critical, high, *harmless])

    async def found(**arguments: Any) -> list[UUID]:
        return ids(await audit_logs.get_security_events(session, **arguments))

    assert await found() == ids([high, critical, family])
    assert await found(since=now - timedelta(hours=1.5)) == [high.id]
    assert await found(since=now - timedelta(hours=26)) == ids([high, critical, family, old])
    page = await audit_logs.get_security_events(session, limit=1, count=True)
    assert (ids(page), page.total) == ([high.id], 3)


@pytest.mark.parametrize(
    ("given_as", "value", "criterion", "wanted"),
    [
        ("action", "data:query", "action", [AuditAction.DATA_QUERY, AuditAction.MCP_CONNECT]),
        ("result", "error", "result", [AuditResult.ERROR, AuditResult.FAILURE]),
        ("severity", "high", "severity", [AuditSeverity.HIGH]),
        ("tiger_account_id", UUID(int=1), "account_id", UUID(int=1)),
        ("api_key_id", UUID(int=2), "api_key_id", UUID(int=2)),
        ("user_id", "o'brien 🐅", "user_id", "o'brien 🐅"),
        ("session_id", "s", "session_id", "s"),
        ("request_id", "r", "request_id", "r"),
        ("resource_type", "order", "resource", "order"),
        ("resource_id", "31318", "resource", "31318"),
        ("resource_id", "order/31318", "resource", "order/31318"),
        ("details", {"a": {"b": [1, 2]}, "c": None}, "details", {"a": {"b": [2]}}),
        ("details", {"a": {"b": [1, 2]}, "c": None}, "details", {"c": None}),
        ("ip_address", "192.0.2.7", "ip_address", "192.0.2.7"),
        ("ip_address", "192.0.2.7", "ip_address", "192.0.2.0/24"),
        ("ip_address", "192.0.2.7", "ip_address", ip_address("::ffff:192.0.2.7")),
        ("ip_address", "::ffff:192.0.2.7", "ip_address", ip_network("192.0.2.0/24")),
        ("ip_address", "::ffff:192.0.2.7", "ip_address", "::ffff:192.0.2.0/120"),
        ("ip_address", "2001:db8::1", "ip_address", "2001:db8::/32"),
    ],
)
async def test_each_criterion_finds_its_events(
    session: AsyncSession, given_as: str, value: object, criterion: str, wanted: Any
) -> None:
    other: dict[str, Any] = {
        "action": LOGIN,
        "ip_address": "198.51.100.1",
        "user_id": "someone else",
    }
    matching = AuditLog(**other | {given_as: value})
    await audit_logs.log_events(session, [AuditLog(**other), matching, AuditLog(action=LOGIN)])
    assert ids(await audit_logs.search(session, **{criterion: wanted})) == [matching.id]
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert (await audit_logs.search(session, **{criterion: wanted}, since=tomorrow)).items == []


async def test_a_resource_is_found_by_type_and_id(session: AsyncSession) -> None:
    wanted = AuditLog(action=LOGIN, resource_type="order", resource_id="1")
    others = [
        AuditLog(action=LOGIN, resource_type="order", resource_id="2"),
        AuditLog(action=LOGIN, resource_type="position", resource_id="1"),
        AuditLog(action=LOGIN),
    ]
    await audit_logs.log_events(session, [*others, wanted])

    async def found(resource: str) -> set[UUID]:
        return {event.id for event in await audit_logs.search(session, resource=resource)}

    assert await found("order/1") == {wanted.id}
    assert await found("order") == {wanted.id, others[0].id}
    assert await found("1") == {wanted.id, others[1].id}
    assert await found("order/") == await found("%") == set()


async def test_details_match_at_the_top_level_only(session: AsyncSession) -> None:
    event = AuditLog(action=LOGIN, details={"a": {"symbol": "AAPL"}, "n": 1})
    await audit_logs.log_events(session, [event, AuditLog(action=LOGIN)])
    for details, count in (({"n": 1}, 1), ({"n": "1"}, 0), ({"symbol": "AAPL"}, 0), ({}, 1)):
        assert len(await audit_logs.search(session, details=details)) == count, details


async def test_statistics_count_by_action_result_and_hour(session: AsyncSession) -> None:
    noon = datetime(2026, 3, 29, 12, tzinfo=UTC)
    told = [
        (0, "data:query", "success"), (59, "data:query", "error"), (60, "data:query", "success"),
        (61, "mcp:connect", "success"), (-1, "mcp:connect", "failure"),
    ]  # fmt: skip
    await audit_logs.log_events(
        session,
        [
            event_at(noon + timedelta(minutes=minutes), action=action, result=result)
            for minutes, action, result in told
        ],
    )
    tokyo = timezone(timedelta(hours=9))
    counts = await audit_logs.statistics(
        session, since=noon.astimezone(tokyo), until=noon + timedelta(minutes=61)
    )
    assert counts.actions == {AuditAction.DATA_QUERY: 3}
    assert counts.results == {AuditResult.SUCCESS: 2, AuditResult.ERROR: 1}
    assert counts.hours == {noon: 2, noon + timedelta(hours=1): 1}
    everything = await audit_logs.statistics(session, since=noon - timedelta(days=1))
    assert sum(everything.actions.values()) == sum(everything.hours.values()) == 5
    assert [*everything.actions] == [AuditAction.DATA_QUERY, AuditAction.MCP_CONNECT]
    nothing = await audit_logs.statistics(session, since=noon + timedelta(days=1))
    assert (nothing.actions, nothing.results, nothing.hours) == ({}, {}, {})
    with pytest.raises(InvalidValue, match="since"):
        await audit_logs.statistics(session, since=noon.replace(tzinfo=None))


async def test_a_search_without_criteria_returns_all_events_newest_first(
    session: AsyncSession,
) -> None:
    events = [await audit_logs.log_event(session, action=LOGIN) for _ in range(3)]
    assert (await audit_logs.search(session)).items == events[::-1]
    assert (await audit_logs.get_recent_events(session)).items == events[::-1]


async def test_since_is_inclusive_and_until_exclusive(session: AsyncSession) -> None:
    noon = datetime(2026, 3, 29, 12, tzinfo=UTC)
    events = [event_at(noon + timedelta(milliseconds=n)) for n in (-1, 0, 1)]
    await audit_logs.log_events(session, events)
    at = ids(events)

    async def found(**window: Any) -> list[int]:
        return sorted(at.index(event.id) for event in await audit_logs.search(session, **window))

    singapore = noon.astimezone(timezone(timedelta(hours=8)))
    assert await found(since=noon) == await found(since=singapore) == [1, 2]
    assert await found(until=noon) == await found(until=singapore) == [0]
    assert await found(since=noon, until=noon) == []
    assert await found(since=noon + timedelta(microseconds=999)) == [1, 2]


@no_deadline
@given(moment=st.datetimes(timezones=st.timezones() | st.just(UTC)))
@example(moment=datetime.min.replace(tzinfo=UTC))
@example(moment=datetime.max.replace(tzinfo=UTC))
@example(moment=datetime.min.replace(tzinfo=timezone(timedelta(hours=14))))
async def test_every_aware_time_is_accepted_or_raises_invalid_value(
    session: AsyncSession, moment: datetime
) -> None:
    try:
        moment.astimezone(UTC)
    except OverflowError:
        with pytest.raises(InvalidValue):
            await audit_logs.search(session, since=moment, until=moment)
    else:
        assert (await audit_logs.search(session, since=moment, until=moment)).items == []


@pytest.mark.parametrize(
    "search",
    [
        lambda s: audit_logs.search(s, since=datetime(2026, 1, 1)),  # noqa: DTZ001  # the point
        lambda s: audit_logs.search(s, until=datetime(2026, 1, 1)),  # noqa: DTZ001
        lambda s: audit_logs.search(s, ip_address="10.0.0.1/8"),
        lambda s: audit_logs.search(s, ip_address="nowhere"),
        lambda s: audit_logs.search(s, user_id="a\0b"),
        lambda s: audit_logs.search(s, resource="a\0b"),
        lambda s: audit_logs.search(s, details={"a": float("nan")}),
        lambda s: audit_logs.search(s, details={"a": NONSENSE, "b": "\0"}),
        lambda s: audit_logs.search(s, account_id=NONSENSE),
        lambda s: audit_logs.search(s, action=["Trade:place_order"]),
        lambda s: audit_logs.search(s, action=["trade:"]),
        lambda s: audit_logs.search(s, result=[NONSENSE]),
    ],
)
async def test_an_invalid_criterion_raises_invalid_value(
    session: AsyncSession, search: Callable[[AsyncSession], Awaitable[object]]
) -> None:
    with pytest.raises(InvalidValue):
        await search(session)


async def test_an_unknown_criterion_raises_invalid_value(session: AsyncSession) -> None:
    misspelt: dict[str, Any] = {"user": "alice"}
    with pytest.raises(InvalidValue, match="user"):
        await audit_logs.search(session, **misspelt)

"""Recording, searching and counting of audit events."""

from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta, timezone
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import text

from tests.support import factories
from tiger_db import AuditAction, AuditLog, AuditResult, AuditSeverity, Database, Settings
from tiger_db.crud import audit_logs
from tiger_db.database import AsyncSession
from tiger_db.errors import AlreadyExists, InvalidValue

LOGIN = AuditAction.DASHBOARD_LOGIN
NONSENSE: Any = "nonsense"
no_deadline = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
storable_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False).filter(
        lambda x: abs(x) < 2**53  # larger ones are read as integers
    )
    | storable_text,
    lambda inner: st.lists(inner) | st.dictionaries(storable_text, inner),
    max_leaves=10,
)


async def test_an_event_stores_all_given_fields(clone: Database) -> None:
    told: dict[str, Any] = {
        "action": AuditAction.TRADE_PLACE_ORDER,
        "result": AuditResult.PARTIAL,
        "severity": AuditSeverity.CRITICAL,
        "resource_type": "order",
        "resource_id": "1",
        "user_id": "o'brien\" 🐅 --",
        "user_type": "admin",
        "session_id": "s",
        "ip_address": IPv4Address("192.0.2.7"),
        "user_agent": "claude/1.0",
        "request_method": "POST",
        "request_path": "/orders",
        "request_id": "r",
        "tiger_account_id": uuid4(),
        "api_key_id": uuid4(),
        "details": {"quantity": [1, {"a": None}]},
        "old_values": {},
        "new_values": {"a": 1.5},
        "error_code": "E",
        "error_message": "m",
        "duration_ms": 2**40,
        "tags": {"a": True},
    }
    async with clone.session() as session:
        event = await audit_logs.log_event(session, **told)
    async with clone.session() as session:
        (stored,) = await factories.events(session)
    assert stored.model_dump(include=set(told)) == told
    assert (stored.id, stored.created_at) == (event.id, event.created_at)


@pytest.mark.parametrize(
    ("action", "result", "severity"),
    [
        (AuditAction.SECURITY_KEY_LEAK, AuditResult.SUCCESS, AuditSeverity.HIGH),
        (AuditAction.TRADE_PLACE_ORDER, AuditResult.SUCCESS, AuditSeverity.MEDIUM),
        (AuditAction.TRADE_PLACE_ORDER, AuditResult.ERROR, AuditSeverity.HIGH),
        (AuditAction.DATA_QUERY, AuditResult.SUCCESS, AuditSeverity.LOW),
        (AuditAction.DATA_QUERY, AuditResult.FAILURE, AuditSeverity.MEDIUM),
    ],
)
async def test_severity_follows_from_action_and_result_unless_given(
    session: AsyncSession, action: AuditAction, result: AuditResult, severity: AuditSeverity
) -> None:
    assert (await audit_logs.log_event(session, action=action, result=result)).severity == severity
    low = await audit_logs.log_event(session, action=action, severity=AuditSeverity.LOW)
    assert low.severity == AuditSeverity.LOW


@pytest.mark.parametrize(("field", "value"), [("action", "a guess"), ("result", "lost")])
async def test_an_invalid_value_is_named_and_nothing_recorded(
    session: AsyncSession, field: str, value: object
) -> None:
    with pytest.raises(ValidationError, match=field):
        await audit_logs.log_event(session, **({"action": LOGIN} | {field: value}))  # type: ignore[arg-type]  # the point
    assert await factories.events(session) == []


async def test_an_event_with_unstorable_values_is_recorded(session: AsyncSession) -> None:
    bad: dict[str, Any] = {
        "user_id": "x" * 101,
        "request_method": "a\0b" * 9,
        "error_message": "\ud800",
        "ip_address": IPv6Address("fe80::1%eth0"),
        "duration_ms": 2**63,
        "details": {"a\0": float("inf"), "when": datetime.now(UTC), 1: {2**5000, b"\0"}},
        "new_values": {"a": ["\ud800"], "deep": [[[[{"password": "hunter2"}]]]]},
        "tiger_account_id": "not a UUID",
        "tags": {str(n): "x" * 90_000 for n in range(12)},
    }
    event = await audit_logs.log_event(session, action=LOGIN, **bad)
    before = event.model_dump()
    session.expire(event)
    await session.refresh(event)
    stored = event.model_dump()
    assert {**stored, "created_at": None} == {**before, "created_at": None}
    assert {name.split(".")[0] for name in stored["details"]["_made_safe"]} == set(bad)
    assert "hunter2" not in repr(event)


@pytest.mark.slow
@no_deadline
@given(details=st.dictionaries(storable_text, json_values))
async def test_any_json_is_read_as_it_was_recorded(
    session: AsyncSession, details: dict[str, Any]
) -> None:
    event = await audit_logs.log_event(session, action=LOGIN, details=details)
    session.expire(event)
    await session.refresh(event)
    assert event.details == AuditLog(action=LOGIN, details=details).details  # with masked secrets


async def test_many_events_are_recorded_at_once(session: AsyncSession) -> None:
    batch = [AuditLog(action=LOGIN, user_id=f"user {n}") for n in range(2500)]
    assert await audit_logs.log_events(session, iter(batch)) == 2500
    assert await session.scalar(text("SELECT count(DISTINCT user_id) FROM audit_logs")) == 2500
    assert await audit_logs.log_events(session, []) == 0


async def test_one_invalid_event_refuses_the_whole_batch(session: AsyncSession) -> None:
    batch: list[Any] = [AuditLog(action=LOGIN), {"action": "dashboard:login"}]
    with pytest.raises(InvalidValue, match="AuditLog"):
        await audit_logs.log_events(session, batch)
    assert await factories.events(session) == []


async def test_an_event_is_recorded_only_once(clone: Database) -> None:
    event = AuditLog(action=LOGIN)
    async with clone.session() as session:
        await audit_logs.log_events(session, [event])
    with pytest.raises(AlreadyExists):
        async with clone.session() as session:
            again = [AuditLog(action=LOGIN), AuditLog(action=LOGIN, id=event.id)]
            await audit_logs.log_events(session, again)
    async with clone.session() as session:
        assert ids(await factories.events(session)) == [event.id]


async def test_a_rolled_back_transaction_leaves_no_events(clone: Database) -> None:
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await audit_logs.log_event(session, action=LOGIN)
            await audit_logs.log_events(session, [AuditLog(action=LOGIN)])
            _ = 1 / 0
    async with clone.session() as session:
        assert await factories.events(session) == []


@pytest.mark.parametrize("pool", [1, 5])
async def test_a_recorded_event_stays_when_the_caller_rolls_back(
    clone_settings: Settings, pool: int
) -> None:
    """This includes a pool of one connection, which the caller holds."""
    few = {"db_pool_size": pool, "db_max_overflow": 0, "db_pool_timeout": 3}
    async with Database(clone_settings.model_copy(update=few)) as database:
        with pytest.raises(ZeroDivisionError):
            async with database.session() as session:
                await audit_logs.log_event(session, action=LOGIN, user_id="lost")
                event = await audit_logs.record_event(session, action=LOGIN, user_id="kept")
                _ = 1 / 0
        async with database.session() as session:
            (stored,) = await factories.events(session)
    assert (stored.id, stored.user_id) == (event.id, "kept")


async def test_without_an_out_of_band_writer_events_are_recorded_in_the_transaction(
    session: AsyncSession,
) -> None:
    event = await audit_logs.record_event(session, action=LOGIN)
    assert (await factories.events(session)) == [event]


# Queries


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
    assert await found(hours=1.5) == [high.id]
    assert await found(hours=26) == ids([high, critical, family, old])
    assert await found(hours=24 * 366 * 100) == ids([high, critical, family, old])


@pytest.mark.parametrize("hours", [0, -1, float("nan"), float("inf"), 10**9])
async def test_hours_out_of_range_are_refused(session: AsyncSession, hours: float) -> None:
    with pytest.raises(InvalidValue, match="hours"):
        await audit_logs.get_security_events(session, hours=hours)


@pytest.mark.parametrize(
    ("given_as", "value", "criterion", "wanted"),
    [
        ("action", "data:query", "actions", [AuditAction.DATA_QUERY, AuditAction.MCP_CONNECT]),
        ("result", "error", "results", [AuditResult.ERROR, AuditResult.FAILURE]),
        ("severity", "high", "severities", [AuditSeverity.HIGH]),
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
        ("ip_address", "192.0.2.7", "ip", "192.0.2.7"),
        ("ip_address", "192.0.2.7", "ip", "192.0.2.0/24"),
        ("ip_address", "192.0.2.7", "ip", ip_address("::ffff:192.0.2.7")),
        ("ip_address", "::ffff:192.0.2.7", "ip", ip_network("192.0.2.0/24")),
        ("ip_address", "::ffff:192.0.2.7", "ip", "::ffff:192.0.2.0/120"),
        ("ip_address", "2001:db8::1", "ip", "2001:db8::/32"),
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
        lambda s: audit_logs.search(s, ip="10.0.0.1/8"),
        lambda s: audit_logs.search(s, ip="nowhere"),
        lambda s: audit_logs.search(s, user_id="a\0b"),
        lambda s: audit_logs.search(s, resource="a\0b"),
        lambda s: audit_logs.search(s, details={"a": float("nan")}),
        lambda s: audit_logs.search(s, details={"a": NONSENSE, "b": "\0"}),
        lambda s: audit_logs.search(s, account_id=NONSENSE),
        lambda s: audit_logs.search(s, actions=["Trade:place_order"]),
        lambda s: audit_logs.search(s, actions=["trade:"]),
        lambda s: audit_logs.search(s, results=[NONSENSE]),
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

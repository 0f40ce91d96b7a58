"""Searching and counting of audit events."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone
from ipaddress import ip_address, ip_network
from typing import Any, get_args
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import InvalidRequestError

from tests.support import factories
from tests.support.recording import recorded
from tiger_db import AuditAction, AuditLog, AuditResult, AuditSeverity, Database, Page
from tiger_db.crud import accounts, audit_logs
from tiger_db.crud.audit_logs import EventCount
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidCursor, InvalidFields, InvalidValue

LOGIN = AuditAction.DASHBOARD_LOGIN
LEAK = AuditAction.SECURITY_KEY_LEAK
NONSENSE: Any = "nonsense"
in_database = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


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
        ("user_type", "admin", "user_type", "admin"),
        ("error_code", "E 1", "error_code", "E 1"),
        ("tags", {"desk": "A", "n": None}, "tags", "n"),
        ("tags", {"desk": "A", "n": None}, "tags", {"desk": "A"}),
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


# Filters with several values, and pages in both directions


OF_ACCOUNTS = [UUID(int=1), UUID(int=2), UUID(int=3)]
# The values of a field in three events, the name of a filter, and the filter's values for the first
# event and for the first two events.
SEVERAL: list[tuple[str, list[Any], str, Any, Any]] = [
    ("action", ["trade:place_order", "data:query", LOGIN], "action", "trade", ["trade", "data"]),
    ("result", ["error", "failure", "success"], "result", "error", ["error", "failure"]),
    ("severity", ["high", "low", "medium"], "severity", AuditSeverity.HIGH, ["high", "low"]),
    ("tiger_account_id", OF_ACCOUNTS, "account_id", OF_ACCOUNTS[0], OF_ACCOUNTS[:2]),
    ("api_key_id", OF_ACCOUNTS, "api_key_id", OF_ACCOUNTS[0], {*OF_ACCOUNTS[:2]}),
    ("user_id", ["a", "b", None], "user_id", "a", ["a", "b"]),
    ("user_type", ["cli", "worker", "admin"], "user_type", "cli", ("cli", "worker")),
    ("session_id", ["a", "b", None], "session_id", "a", ["a", "b"]),
    ("request_id", ["a", "b", None], "request_id", "a", ["a", "b"]),
    ("resource_id", ["1", "2", "3"], "resource", "1", ["1", "2"]),
    ("error_code", ["E1", "E2", None], "error_code", "E1", ["E1", "E2"]),
    ("tags", [{"a": 1}, {"b": [2]}, {"c": "a"}], "tags", "a", [{"a": 1}, "b"]),
    (
        "ip_address",
        ["192.0.2.7", "2001:db8::1", "198.51.100.1"],
        "ip_address",
        ip_network("192.0.2.0/24"),
        ["192.0.2.7", "2001:db8::/32"],
    ),
]


@pytest.mark.parametrize("case", SEVERAL, ids=lambda case: str(case[2]))
async def test_a_filter_takes_one_value_or_several_or_none(
    session: AsyncSession, case: tuple[str, list[Any], str, Any, Any]
) -> None:
    field, values, name, one, two = case
    events = [factories.new_event(**{field: value}) for value in values]
    await audit_logs.log_events(session, events)
    cases = [(one, 1), ([one], 1), (two, 2), ([], 0), (None, 3)]
    for value, wanted in cases:
        page = await audit_logs.search(session, **{name: value}, count=True)
        assert sorted(ids(page)) == sorted(ids(events[:wanted])), value
        assert page.total == wanted


async def test_all_filters_of_a_search_must_match(session: AsyncSession) -> None:
    both = factories.new_event(user_id="a", error_code="E1", tags={"desk": "A", "n": 1})
    others = [
        factories.new_event(user_id="a", error_code="E1", tags={"desk": "B", "n": 1}),
        factories.new_event(user_id="b", error_code="E1", tags={"desk": "A", "n": 1}),
        factories.new_event(user_id="a", tags={"desk": "A", "n": 1}),
    ]
    await audit_logs.log_events(session, [both, *others])
    found = await audit_logs.search(
        session, user_id="a", error_code=["E1", "E2"], tags={"desk": "A", "n": 1}
    )
    assert ids(found) == [both.id]


async def test_pages_of_events_are_read_in_both_directions(session: AsyncSession) -> None:
    events = [factories.new_event(user_id="ab"[n % 2]) for n in range(10)]
    await audit_logs.log_events(session, events)
    wanted = ids(events[::2][::-1])

    async def page(**cursor: Any) -> Page[AuditLog]:
        return await audit_logs.search(session, user_id=["a"], limit=2, count=True, **cursor)

    first = await page()
    second = await page(after=first.next_cursor)
    last = await page(after=second.next_cursor)
    assert ids([*first, *second, *last]) == wanted
    assert (first.previous_cursor, last.next_cursor) == (None, None)
    assert await page(before=last.previous_cursor) == second
    assert await page(before=second.previous_cursor) == first
    assert {found.total for found in (first, second, last)} == {5}
    # Events that are recorded after the first page precede the first page.
    newer = factories.new_event(user_id="a")
    await audit_logs.log_events(session, [newer])
    second = await page(after=first.next_cursor)
    assert ids(await page(before=second.previous_cursor)) == ids(first)
    others: list[dict[str, Any]] = [{}, {"user_id": "b"}, {"user_id": "a", "result": "success"}]
    for other in others:
        with pytest.raises(InvalidCursor):
            await audit_logs.search(session, **other, after=first.next_cursor)


# Relationships


@pytest.mark.slow
async def test_accounts_and_api_keys_of_events_are_loaded(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session)
        gone = await factories.account(session)
        key, _ = await factories.api_key(session, tiger_account_id=account.id)
        await audit_logs.log_event(session, action=LOGIN, tiger_account_id=gone.id)
        await accounts.delete(session, gone.id)
        await audit_logs.log_event(session, action=LEAK, tiger_account_id=account.id)
    loads: list[Callable[[AsyncSession], Awaitable[Page[AuditLog]]]] = [
        lambda s: audit_logs.search(s, load=["tiger_account", "api_key"]),
        lambda s: audit_logs.get_recent_events(s, load=["tiger_account", "api_key"]),
    ]
    for load in loads:
        async with clone.session() as session:
            with recorded(clone) as sent:
                page = await load(session)
        assert len(sent) == 3
        for event in page:
            of_account, of_key = event.tiger_account_id == account.id, event.api_key_id == key.id
            assert (event.tiger_account is not None) == of_account
            assert (event.api_key is not None) == of_key
            if event.tiger_account is not None:
                assert event.tiger_account.account_number == account.account_number
            assert event.model_dump().keys() == set(AuditLog.model_fields)
        assert {event.tiger_account_id for event in page} == {account.id, gone.id}
    async with clone.session() as session:
        with recorded(clone) as sent:
            (denied,) = await audit_logs.get_security_events(session, load=["tiger_account"])
    assert len(sent) == 2
    assert denied.tiger_account is not None


async def test_a_relationship_of_an_event_cannot_be_assigned(session: AsyncSession) -> None:
    account = await factories.account(session)
    unsaved: Any = {"tiger_account": account}
    with pytest.raises(InvalidFields, match="view-only: set tiger_account_id"):
        AuditLog(action=LOGIN, **unsaved)
    event = await audit_logs.log_event(session, action=LOGIN)
    with pytest.raises(InvalidFields, match="tiger_account"):
        event.tiger_account = account
    with pytest.raises(InvalidRequestError, match="lazy='raise'"):
        _ = event.tiger_account


# Statistics

NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)


async def test_statistics_count_by_action_result_and_hour(session: AsyncSession) -> None:
    recorded_events = [
        (0, "data:query", "success"), (59, "data:query", "error"), (60, "data:query", "success"),
        (61, "mcp:connect", "success"), (-1, "mcp:connect", "failure"), (-1, "data:grab", "error"),
    ]  # fmt: skip
    await audit_logs.log_events(
        session,
        [
            event_at(NOON + timedelta(minutes=minutes), action=action, result=result)
            for minutes, action, result in recorded_events
        ],
    )

    async def counted(by: Any, **arguments: Any) -> list[tuple[object, ...]]:
        arguments = {"since": NOON.replace(hour=0)} | arguments
        groups = await audit_logs.statistics(session, by=by, **arguments)
        names = [f.name for f in fields(EventCount) if f.name != "count"]
        return [
            (group.count, *(v for n in names if (v := getattr(group, n)) is not None))
            for group in groups
        ]

    window = {
        "since": NOON.astimezone(timezone(timedelta(hours=9))),
        "until": NOON + timedelta(minutes=61),
    }
    data, grab, mcp = AuditAction.DATA_QUERY, "data:grab", AuditAction.MCP_CONNECT
    one, two = NOON - timedelta(hours=1), NOON + timedelta(hours=1)
    assert await counted("action", **window) == [(3, data)]
    assert await counted("action") == [(3, data), (2, mcp), (1, grab)]
    assert await counted(["result"]) == [(3, "success"), (2, "error"), (1, "failure")]
    assert await counted("hour", **window) == [(2, NOON), (1, two)]
    assert await counted({"day"}) == [(6, NOON.replace(hour=0))]
    assert await counted("family") == [(4, "data"), (2, "mcp")]
    assert await counted(("hour", "family")) == [
        (1, one, "data"), (1, one, "mcp"), (2, NOON, "data"), (1, two, "data"), (1, two, "mcp"),
    ]  # fmt: skip
    assert await counted("hour", limit=2) == [(2, one), (2, NOON)]
    assert await counted("action", action="data", result=["error", "failure"]) == [
        (1, grab), (1, data)
    ]  # fmt: skip
    assert (
        await counted("action", result=[])
        == await counted("action", since=NOON + timedelta(days=1))
        == []
    )
    (group, *_) = await audit_logs.statistics(session, by="action", since=NOON)
    assert isinstance(group.action, AuditAction)


async def test_statistics_count_by_each_field(session: AsyncSession) -> None:
    values = {
        "tiger_account_id": uuid4(),
        "api_key_id": uuid4(),
        "user_id": "alice",
        "ip_address": ip_address("2001:db8::1"),
        "severity": AuditSeverity.HIGH,
    }
    await audit_logs.log_events(
        session, [event_at(NOON, **values), event_at(NOON, **values), event_at(NOON)]
    )
    names = {"tiger_account_id": "account_id"}
    for field, value in values.items():
        name: Any = names.get(field, field)
        found = await audit_logs.statistics(session, by=name, since=NOON)
        rest = AuditSeverity.LOW if field == "severity" else None
        assert [(g.count, getattr(g, name)) for g in found] == [(2, value), (1, rest)]
    every: Any = sorted(set(get_args(audit_logs.EventDimension)) - {"day"})
    (most, other) = await audit_logs.statistics(session, by=every, since=NOON)
    assert None not in [getattr(most, field.name) for field in fields(EventCount)]
    assert (most.count, other.count, other.user_id) == (2, 1, None)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"by": "action", "since": NOON.replace(tzinfo=None)}, "since"),
        ({"by": (), "since": NOON}, "`by` must name"),
        ({"by": ("hour", "day"), "since": NOON}, "`by` must name"),
        ({"by": "month", "since": NOON}, "by"),
        ({"by": "day", "since": NOON, "limit": 0}, "limit"),
        ({"by": "day", "since": NOON, "user": "x"}, "unknown filters: user"),
    ],
)
async def test_statistics_refuse_invalid_arguments(
    session: AsyncSession, arguments: Any, name: str
) -> None:
    with pytest.raises(InvalidValue, match=name):
        await audit_logs.statistics(session, **arguments)


# Times


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


@pytest.mark.slow
@in_database
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

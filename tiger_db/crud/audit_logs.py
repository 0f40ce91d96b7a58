"""CRUD of the audit trail: record events, search and count them. No function changes an event."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Required, TypedDict, Unpack
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import ColumnElement, Row, cast, func, or_, select
from sqlalchemy.dialects.postgresql import INET, JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import make_transient_to_detached
from sqlalchemy.orm.attributes import instance_state, set_committed_value
from sqlmodel import col

from tiger_db.crud.common import context_of, execute_driver_sql, refuse_readonly, require_aware
from tiger_db.crud.pagination import DEFAULT_PAGE_SIZE, Page, paginate
from tiger_db.errors import DatabaseUnavailable, InvalidValue
from tiger_db.models import AuditAction, AuditLog, AuditResult, AuditSeverity, TokenStatus
from tiger_db.models.api_keys import parse_network
from tiger_db.models.audit_logs import INSERT, SERVER_COLUMNS, insert_events, insert_values
from tiger_db.models.columns import require_storable_json
from tiger_db.sqlstates import raw_errors

__all__ = [
    "Criteria",
    "EventFields",
    "Statistics",
    "get_recent_events",
    "get_security_events",
    "log_event",
    "log_events",
    "record_event",
    "search",
    "statistics",
]

_INSERT = f"{INSERT} RETURNING {', '.join(SERVER_COLUMNS)}"
_SECURITY_ACTIONS = [action for action in AuditAction if action.family == "security"]


class EventFields(TypedDict, total=False):
    """The fields of an event. Only `action` is required."""

    action: Required[AuditAction]
    result: AuditResult
    severity: AuditSeverity | None
    resource_type: str | None
    resource_id: str | None
    user_id: str | None
    user_type: str | None
    session_id: str | None
    ip_address: str | IPv4Address | IPv6Address | None
    user_agent: str | None
    request_method: str | None
    request_path: str | None
    request_id: str | None
    tiger_account_id: UUID | None
    api_key_id: UUID | None
    details: Mapping[str, object] | None
    old_values: Mapping[str, object] | None
    new_values: Mapping[str, object] | None
    error_code: str | None
    error_message: str | None
    duration_ms: float | timedelta | None
    tags: Mapping[str, object] | None


async def log_event(session: AsyncSession, **fields: Unpack[EventFields]) -> AuditLog:
    """Record one event in the caller's transaction: it is stored when that commits.

    Values that cannot be stored are converted, and secrets are masked: see `AuditLog`.

    Raises:
        ValidationError: a field is unknown or its value is invalid.
    """
    return await insert_event(session, build_event(**fields))


async def record_event(session: AsyncSession, **fields: Unpack[EventFields]) -> AuditLog:
    """Record one event out of band: it is committed before this function returns.

    The event stays if the caller's transaction rolls back. Use it for the intent before an order,
    for the order's outcome, or for a denial. If the session's context has no `out_of_band`, the
    event is recorded in the session's transaction.

    Raises:
        ValidationError: a field is unknown or its value is invalid.
        ConfigurationError: the session was not made for a Database.
        DatabaseUnavailable: the event could not be stored.
    """
    event = build_event(**fields)
    out_of_band = context_of(session.info).out_of_band
    if out_of_band is None:
        return await insert_event(session, event)
    await out_of_band.record(event)
    return event


async def log_events(session: AsyncSession, events: Iterable[AuditLog]) -> int:
    """Record many events in the caller's transaction with COPY; return their number.

    The objects are not added to the session, and their `created_at` and `position` are not set.

    Raises:
        InvalidValue: one of them is not an AuditLog; none is recorded.
        AlreadyExists: one of them is recorded already; the transaction must be rolled back.
        InvalidState: the session is readonly.
        DatabaseUnavailable, Conflict, QueryTimeout: as `Database.session`.
    """
    batch = list(events)
    if not all(isinstance(event, AuditLog) for event in batch):
        raise InvalidValue("events must be AuditLog objects")
    if not batch:
        return 0
    refuse_readonly(session)  # COPY's error would look like that of a lost primary
    await session.flush()
    connection = await session.connection()
    await connection.exec_driver_sql("SELECT")  # begins the transaction, which COPY would not
    raw = (await connection.get_raw_connection()).driver_connection
    assert raw is not None
    try:
        with raw_errors():
            await insert_events(raw, batch)
    except DatabaseUnavailable:
        await connection.invalidate()
        raise
    return len(batch)


async def insert_event(session: AsyncSession, event: AuditLog) -> AuditLog:
    """Insert an event in the caller's transaction without the ORM, and add it to the session."""
    (values,) = await execute_driver_sql(session, _INSERT, *insert_values(event))
    for name, value in zip(SERVER_COLUMNS, values, strict=True):
        set_committed_value(event, name, value)
    make_transient_to_detached(event)
    session.add(event)
    transaction = (
        session.sync_session.get_nested_transaction() or session.sync_session.get_transaction()
    )
    assert transaction is not None
    # As after a flush of the session: a rollback makes the event transient and does not expire it.
    transaction._new[instance_state(event)] = True  # noqa: SLF001
    return event


# Builders of events, one per entity


def build_event(**fields: Unpack[EventFields]) -> AuditLog:
    """Build an event. A field that is None keeps its default."""
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    return AuditLog(**given)


def account_event(account_id: UUID, **fields: Unpack[EventFields]) -> AuditLog:
    """Build an event of an account."""
    fields |= {"resource_type": "tiger_account", "resource_id": str(account_id)}
    fields["tiger_account_id"] = account_id
    return build_event(**fields)


def api_key_event(
    key_id: UUID | None, account_id: UUID | None, **fields: Unpack[EventFields]
) -> AuditLog:
    """Build an event of an API key, and of the account to which the key is bound."""
    fields |= {"resource_type": "api_key", "resource_id": str(key_id) if key_id else None}
    fields |= {"api_key_id": key_id, "tiger_account_id": account_id}
    return build_event(**fields)


def refresh_event(refresh: TokenStatus | Row[Any], **fields: Unpack[EventFields]) -> AuditLog:
    """Build an event of a token refresh, or of a row with its columns."""
    fields |= {"resource_type": "token_status", "resource_id": str(refresh.id)}
    fields["tiger_account_id"] = refresh.tiger_account_id
    fields.setdefault("details", {"status": str(refresh.status), "trigger": str(refresh.trigger)})
    return build_event(**fields)


# Queries


class Criteria(TypedDict, total=False):
    """The criteria of `search`. A criterion that is None matches every event."""

    since: datetime | None  # inclusive; aware; compared with the time in the event's id
    until: datetime | None  # exclusive
    actions: Sequence[AuditAction]  # the event has one of these; an empty list matches all
    results: Sequence[AuditResult]
    severities: Sequence[AuditSeverity]
    account_id: UUID | None
    api_key_id: UUID | None
    user_id: str | None
    ip: str | IPv4Address | IPv6Address | IPv4Network | IPv6Network | None  # network or address
    session_id: str | None
    request_id: str | None
    resource: str | None  # the type, the id, or `type/id`
    details: Mapping[str, JsonValue] | None  # contained in the event's details


async def search(
    session: AsyncSession,
    *,
    after: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    **criteria: Unpack[Criteria],
) -> Page[AuditLog]:
    """Return the events that match all criteria, newest first: see `Criteria`.

    Raises:
        InvalidValue: a datetime is naive, `ip` is neither an address nor a network, `details` is no
            JSON object, or `limit` is not from 1 to 1000.
        InvalidCursor: `after` is not the `next_cursor` of a page.
    """
    found = select(AuditLog).where(*conditions(**criteria))
    return await paginate(session, found, AuditLog, after=after, limit=limit)


async def get_recent_events(
    session: AsyncSession, *, after: str | None = None, limit: int = DEFAULT_PAGE_SIZE
) -> Page[AuditLog]:
    """Return the events, newest first."""
    return await search(session, after=after, limit=limit)


async def get_security_events(
    session: AsyncSession,
    *,
    hours: float = 24,
    after: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
) -> Page[AuditLog]:
    """Return the events of the last hours that concern security, newest first.

    These are the events of the family `security`, and those of severity high or critical.

    Raises:
        InvalidValue: `hours` is not positive.
    """
    if not 0 < hours <= 24 * 366 * 100:
        raise InvalidValue("hours must be positive, and a century at most")
    statement = select(AuditLog).where(
        col(AuditLog.id) >= func.uuid7_floor(func.now() - timedelta(hours=hours)),
        or_(
            col(AuditLog.severity).in_([AuditSeverity.HIGH, AuditSeverity.CRITICAL]),
            col(AuditLog.action).in_(_SECURITY_ACTIONS),
        ),
    )
    return await paginate(session, statement, AuditLog, after=after, limit=limit)


def conditions(**criteria: Unpack[Criteria]) -> list[ColumnElement[bool]]:
    """Return the SQL conditions for the given criteria.

    Raises:
        InvalidValue: as `search`.
        TypeError: there is no such criterion.
    """
    given: dict[str, Any] = {**criteria}
    if unknown := given.keys() - _CONDITIONS.keys():
        raise TypeError(f"unknown criteria: {', '.join(sorted(unknown))}")
    return [
        condition(given[name])
        for name, condition in _CONDITIONS.items()
        if given.get(name) is not None and (given[name] or name not in _LISTS)
    ]


def _in_network(
    ip: str | IPv4Address | IPv6Address | IPv4Network | IPv6Network,
) -> ColumnElement[bool]:
    try:
        network = str(parse_network(ip))
    except ValueError:
        raise InvalidValue("ip is neither an address nor a network") from None
    return col(AuditLog.ip_address).op("<<=")(cast(network, INET))


def _of_resource(resource: str) -> ColumnElement[bool]:
    kind, thing = col(AuditLog.resource_type), col(AuditLog.resource_id)
    return or_(thing == resource, kind == resource, kind + "/" + thing == resource)


def _with_details(details: Mapping[str, JsonValue]) -> ColumnElement[bool]:
    try:
        contained = require_storable_json(dict(details))
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"details: {error}") from None
    return cast(col(AuditLog.details), JSONB).contains(contained)


_LISTS = {"actions", "results", "severities"}
_CONDITIONS: dict[str, Callable[[Any], ColumnElement[bool]]] = {
    "since": lambda at: col(AuditLog.id) >= func.uuid7_floor(require_aware("since", at)),
    "until": lambda at: col(AuditLog.id) < func.uuid7_floor(require_aware("until", at)),
    "actions": col(AuditLog.action).in_,
    "results": col(AuditLog.result).in_,
    "severities": col(AuditLog.severity).in_,
    "ip": _in_network,
    "resource": _of_resource,
    "details": _with_details,
    "account_id": lambda account_id: col(AuditLog.tiger_account_id) == account_id,
    "api_key_id": lambda key_id: col(AuditLog.api_key_id) == key_id,
    "user_id": lambda user_id: col(AuditLog.user_id) == user_id,
    "session_id": lambda session_id: col(AuditLog.session_id) == session_id,
    "request_id": lambda request_id: col(AuditLog.request_id) == request_id,
}


@dataclass(frozen=True, slots=True)
class Statistics:
    """Numbers of events by action, by result, and by the hour (UTC) of the event."""

    actions: dict[AuditAction, int]
    results: dict[AuditResult, int]
    hours: dict[datetime, int]


async def statistics(
    session: AsyncSession, *, since: datetime, until: datetime | None = None
) -> Statistics:
    """Count the events from `since` (inclusive) to `until` (exclusive), both aware datetimes.

    The times are those in the events' ids. Hours without an event are left out.

    Raises:
        InvalidValue: a datetime is naive.
    """
    hour = func.date_trunc("hour", func.uuid7_time(AuditLog.id), "UTC")
    rows = await session.execute(
        select(col(AuditLog.action), col(AuditLog.result), hour, func.count())
        .where(*conditions(since=since, until=until))
        .group_by(col(AuditLog.action), col(AuditLog.result), hour)
        .order_by(hour)
    )
    actions, results, hours = Counter[AuditAction](), Counter[AuditResult](), Counter[datetime]()
    for action, result, at, count in rows:
        actions[action] += count
        results[result] += count
        hours[at] += count
    return Statistics(dict(actions.most_common()), dict(results.most_common()), dict(hours))

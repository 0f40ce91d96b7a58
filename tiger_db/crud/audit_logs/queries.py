"""Get, search and count audit events."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Literal, TypeAlias, TypedDict, Unpack
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import (
    ColumnElement,
    SQLColumnExpression,
    Text,
    any_,
    cast,
    func,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, INET
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.common import fetch_one
from tiger_db.crud.filters import Filters, OneOrMore, Tag, as_list, contains, has_tag, one_of
from tiger_db.crud.grouping import count_groups
from tiger_db.crud.pagination import DEFAULT_PAGE_SIZE, EntityList, Page, paginate
from tiger_db.errors import InvalidValue
from tiger_db.models import AuditAction, AuditLog, AuditResult, AuditSeverity
from tiger_db.models.api_keys import parse_network
from tiger_db.public import public

AddressOrNetwork: TypeAlias = str | IPv4Address | IPv6Address | IPv4Network | IPv6Network
EventDimension: TypeAlias = Literal[
    "hour",
    "day",
    "action",
    "family",
    "result",
    "severity",
    "account_id",
    "api_key_id",
    "user_id",
    "ip_address",
]
ACTION_OR_FAMILY = "[a-z][a-z0-9_]*(:[a-z][a-z0-9_]*)?"


@public
async def get(session: AsyncSession, event_id: UUID) -> AuditLog | None:
    """Return the audit event with the given id, or None."""
    return await fetch_one(session, select(AuditLog).where(col(AuditLog.id) == event_id))


class EventFieldFilters(TypedDict, total=False):
    """The filters of audit events, except for the filters of the time.

    A filter with several values selects the events that have one or more of the values. A filter
    with the value None selects all events. A filter with an empty collection selects no event.

    A value of `action` is an action or a family of actions. A value of `ip_address` is an IP
    address, or a network that contains the IP address of an event. A value of `resource` is a
    resource type, a resource id, or `type/id`. A value of `tags` is the name of a tag, or a mapping
    of tags to their values. `details` is a JSON object that the details of an event contain.
    """

    action: OneOrMore[AuditAction | str] | None
    result: OneOrMore[AuditResult] | None
    severity: OneOrMore[AuditSeverity] | None
    account_id: OneOrMore[UUID] | None
    api_key_id: OneOrMore[UUID] | None
    user_id: OneOrMore[str] | None
    user_type: OneOrMore[str] | None
    ip_address: OneOrMore[AddressOrNetwork] | None
    session_id: OneOrMore[str] | None
    request_id: OneOrMore[str] | None
    resource: OneOrMore[str] | None
    error_code: OneOrMore[str] | None
    tags: OneOrMore[Tag] | None
    details: Mapping[str, JsonValue] | None


class EventFilters(EventFieldFilters, total=False):
    """The filters of audit events.

    `since` and `until` are aware datetimes, and select the events from `since` (inclusive) to
    `until` (exclusive). The time of an event is the time in the id of the event. The other filters
    are those of `EventFieldFilters`.
    """

    since: datetime | None
    until: datetime | None


@public
async def search(
    session: AsyncSession,
    *,
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
    **filters: Unpack[EventFilters],
) -> Page[AuditLog]:
    """Return a page of the audit events that match all filters, newest first.

    The parameters `after`, `before`, `limit`, `count` and `load` are explained in `paginate`.

    Raises:
        InvalidCursor: `after` or `before` is not a cursor of a search with the same filters.
        InvalidValue: a filter is invalid, such as a datetime without a time zone, or `limit` or
            `load` is invalid.
    """
    return await paginate(
        session,
        EVENTS,
        filters=filters,
        after=after,
        before=before,
        limit=limit,
        count=count,
        load=load,
    )


@public
async def get_recent_events(
    session: AsyncSession,
    *,
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
) -> Page[AuditLog]:
    """Return a page of all audit events, newest first. See `search` for the other parameters."""
    return await search(session, after=after, before=before, limit=limit, count=count, load=load)


@public
async def get_security_events(
    session: AsyncSession,
    *,
    since: datetime | None = None,
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
) -> Page[AuditLog]:
    """Return a page of the security events since the aware datetime `since`, newest first.

    A security event has the severity high or above, or an action of the family `security`. If
    `since` is None, the security events of the last 24 hours are returned. See `search` for the
    parameters of the page.
    """
    earliest = func.now() - timedelta(hours=24) if since is None else since
    return await paginate(
        session,
        SECURITY_EVENTS,
        col(AuditLog.id) >= func.uuid7_floor(earliest),
        or_(col(AuditLog.severity) >= AuditSeverity.HIGH, _has_action("security")),
        filters={"since": since},
        after=after,
        before=before,
        limit=limit,
        count=count,
        load=load,
    )


def _in_network(value: OneOrMore[AddressOrNetwork]) -> ColumnElement[bool]:
    try:
        networks = [str(parse_network(network)) for network in as_list(value)]
    except ValueError as error:
        raise InvalidValue(f"ip_address: {error}") from None
    is_in = col(AuditLog.ip_address).bool_op("<<=")
    return is_in(any_(cast(networks, ARRAY(INET))))


_FAMILY = func.split_part(col(AuditLog.action), ":", 1, type_=Text)


def _has_action(value: OneOrMore[AuditAction | str]) -> ColumnElement[bool]:
    names = as_list(value)
    for name in names:
        if not re.fullmatch(ACTION_OR_FAMILY, name):
            raise InvalidValue(f"{name!r} is neither an action nor a family of actions")
    action = col(AuditLog.action)
    families = [name for name in names if ":" not in name]
    has_action = action.in_(names)
    if not families:
        return has_action
    return or_(has_action, _FAMILY.in_(families))


def _has_resource(value: OneOrMore[str]) -> ColumnElement[bool]:
    resources = as_list(value)
    kind, thing = col(AuditLog.resource_type), col(AuditLog.resource_id)
    return or_(thing.in_(resources), kind.in_(resources), (kind + "/" + thing).in_(resources))


_FILTERS = Filters.of(
    EventFilters,
    {
        "since": lambda at: col(AuditLog.id) >= func.uuid7_floor(at),
        "until": lambda at: col(AuditLog.id) < func.uuid7_floor(at),
        "action": _has_action,
        "result": one_of(col(AuditLog.result)),
        "severity": one_of(col(AuditLog.severity)),
        "account_id": one_of(col(AuditLog.tiger_account_id)),
        "api_key_id": one_of(col(AuditLog.api_key_id)),
        "user_id": one_of(col(AuditLog.user_id)),
        "user_type": one_of(col(AuditLog.user_type)),
        "ip_address": _in_network,
        "session_id": one_of(col(AuditLog.session_id)),
        "request_id": one_of(col(AuditLog.request_id)),
        "resource": _has_resource,
        "error_code": one_of(col(AuditLog.error_code)),
        "tags": has_tag(col(AuditLog.tags)),
        "details": lambda value: contains(col(AuditLog.details), "details", value),
    },
)
EVENTS = EntityList("audit_logs", AuditLog, _FILTERS)
SECURITY_EVENTS = EntityList("security_events", AuditLog, _FILTERS)


def event_conditions(**filters: Unpack[EventFilters]) -> list[ColumnElement[bool]]:
    """Return the SQL conditions of the given filters.

    Raises:
        InvalidValue: the value of a filter is invalid, or the name of a filter is unknown.
    """
    return _FILTERS.where(filters)


@dataclass(frozen=True, slots=True)
class EventCount:
    """The number of audit events in a group, such as the events with one action on one day.

    A field is None if `statistics` did not group by the field, or if the events of the group have
    no value of the field.
    """

    count: int
    start: datetime | None = None  # start of the hour or day (UTC)
    action: AuditAction | str | None = None
    family: str | None = None
    result: AuditResult | str | None = None
    severity: AuditSeverity | str | None = None
    account_id: UUID | None = None
    api_key_id: UUID | None = None
    user_id: str | None = None
    ip_address: IPv4Address | IPv6Address | None = None


@public
async def statistics(
    session: AsyncSession,
    *,
    by: OneOrMore[EventDimension],
    since: datetime,
    until: datetime | None = None,
    limit: int | None = None,
    **filters: Unpack[EventFieldFilters],
) -> list[EventCount]:
    """Count the audit events that match all filters, from `since` up to, but without, `until`.

    The events are grouped by hour or day (UTC), by fields of the events, by family of the action,
    or by a combination such as `("day", "result")`. Groups without events are omitted. Groups with
    a time are sorted by time. Groups with the same time, and groups without a time, are sorted by
    count, highest count first. If `limit` is given, only the first `limit` groups are returned.

    `since` and `until` are aware datetimes. The time of an event is the time in the event's id.
    PostgreSQL reads all events between `since` and `until`.

    Raises:
        InvalidValue: a datetime has no time zone, `by` is empty or combines hours with days, a
            filter is invalid, or `limit` is not from 1 to 1000.
    """
    time = func.uuid7_time(AuditLog.id)
    columns: dict[str, SQLColumnExpression[Any]] = {
        "day": func.date_trunc("day", time, "UTC").label("start"),
        "hour": func.date_trunc("hour", time, "UTC").label("start"),
        "action": col(AuditLog.action),
        "family": _FAMILY.label("family"),
        "result": col(AuditLog.result),
        "severity": col(AuditLog.severity),
        "account_id": col(AuditLog.tiger_account_id).label("account_id"),
        "api_key_id": col(AuditLog.api_key_id),
        "user_id": col(AuditLog.user_id),
        "ip_address": col(AuditLog.ip_address),
    }
    statement = count_groups(func.count().label("count"), columns, by, limit).where(
        *event_conditions(since=since, until=until, **filters)
    )
    return [EventCount(**row) for row in (await session.execute(statement)).mappings()]

"""Get, search and count audit events."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeAlias, TypedDict, Unpack
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import ColumnElement, Text, cast, false, func, or_, select
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.common import (
    fetch_one,
)
from tiger_db.crud.filters import Filters, OneOrMore, Tag, as_list, contains, has_tag, one_of
from tiger_db.crud.pagination import DEFAULT_PAGE_SIZE, EntityList, Page, paginate
from tiger_db.errors import InvalidValue
from tiger_db.models import AuditAction, AuditLog, AuditResult, AuditSeverity
from tiger_db.models.api_keys import parse_network
from tiger_db.public import public

Network: TypeAlias = str | IPv4Address | IPv6Address | IPv4Network | IPv6Network
ACTION_OR_FAMILY = re.compile("[a-z][a-z0-9_]*(:[a-z][a-z0-9_]*)?")


@public
async def get(session: AsyncSession, event_id: UUID) -> AuditLog | None:
    """Return the audit event with the given id, or None."""
    return await fetch_one(session, select(AuditLog).where(col(AuditLog.id) == event_id))


class EventFilters(TypedDict, total=False):
    """The filters of a list of audit events.

    A filter with several values selects the events that have one or more of the values. A filter
    with the value None selects all events. A filter with an empty collection selects no event.

    `since` and `until` are aware datetimes, and select the events from `since` (inclusive) to
    `until` (exclusive). A value of `action` is an action or a family of actions. A value of
    `ip_address` is an IP address, or a network that contains the IP address of an event. A value of
    `resource` is a resource type, a resource id, or `type/id`. A value of `tags` is the name of a
    tag, or a mapping of tags to their values. `details` is a JSON object that the details of an
    event contain.
    """

    since: datetime | None
    until: datetime | None
    action: OneOrMore[AuditAction | str] | None
    result: OneOrMore[AuditResult] | None
    severity: OneOrMore[AuditSeverity] | None
    account_id: OneOrMore[UUID] | None
    api_key_id: OneOrMore[UUID] | None
    user_id: OneOrMore[str] | None
    user_type: OneOrMore[str] | None
    ip_address: OneOrMore[Network] | None
    session_id: OneOrMore[str] | None
    request_id: OneOrMore[str] | None
    resource: OneOrMore[str] | None
    error_code: OneOrMore[str] | None
    tags: OneOrMore[Tag] | None
    details: Mapping[str, JsonValue] | None


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
) -> Page[AuditLog]:
    """Return a page of all audit events, newest first."""
    return await search(session, after=after, before=before, limit=limit)


@public
async def get_security_events(
    session: AsyncSession,
    *,
    since: datetime | None = None,
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
) -> Page[AuditLog]:
    """Return a page of the security events since the aware datetime `since`, newest first.

    A security event has the severity high or above, or an action of the family `security`. If
    `since` is None, the security events of the last 24 hours are returned.
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
    )


def _in_network(value: OneOrMore[Network]) -> ColumnElement[bool]:
    try:
        networks = [str(parse_network(network)) for network in as_list(value)]
    except ValueError:
        raise InvalidValue("ip_address is neither an IP address nor an IP network") from None
    return or_(
        false(), *(col(AuditLog.ip_address).op("<<=")(cast(network, INET)) for network in networks)
    )


def _has_action(value: OneOrMore[AuditAction | str]) -> ColumnElement[bool]:
    names = as_list(value)
    for name in names:
        if not ACTION_OR_FAMILY.fullmatch(name):
            raise InvalidValue(f"{name!r} is neither an action nor a family of actions")
    action = col(AuditLog.action)
    families = [name for name in names if ":" not in name]
    has_action = action.in_(names)
    if not families:
        return has_action
    return or_(has_action, func.split_part(action, ":", 1, type_=Text).in_(families))


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
class Statistics:
    """Numbers of audit events by action, by result and by hour (UTC)."""

    actions: dict[AuditAction | str, int]
    results: dict[AuditResult | str, int]
    hours: dict[datetime, int]


@public
async def statistics(
    session: AsyncSession, *, since: datetime, until: datetime | None = None
) -> Statistics:
    """Count the audit events from `since` (inclusive) to `until` (exclusive).

    `since` and `until` are aware datetimes. The time of an event is taken from the event's id. The
    result omits hours without an event.

    Raises:
        InvalidValue: `since` or `until` has no time zone.
    """
    hour = func.date_trunc("hour", func.uuid7_time(AuditLog.id), "UTC")
    rows = await session.execute(
        select(col(AuditLog.action), col(AuditLog.result), hour, func.count())
        .where(*event_conditions(since=since, until=until))
        .group_by(col(AuditLog.action), col(AuditLog.result), hour)
        .order_by(hour)
    )
    actions, results, hours = Counter[str](), Counter[str](), Counter[datetime]()
    for action, result, at, count in rows:
        actions[action] += count
        results[result] += count
        hours[at] += count
    return Statistics(dict(actions.most_common()), dict(results.most_common()), dict(hours))

"""Get, search and count audit events."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, TypedDict, Unpack, get_type_hints
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import ColumnElement, Text, cast, func, or_, select
from sqlalchemy.dialects.postgresql import INET, JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.common import (
    fetch_one,
    require_aware,
)
from tiger_db.crud.pagination import DEFAULT_PAGE_SIZE, Page, paginate
from tiger_db.errors import InvalidValue
from tiger_db.models import AuditAction, AuditLog, AuditResult, AuditSeverity
from tiger_db.models.api_keys import parse_network
from tiger_db.models.columns import require_storable_json
from tiger_db.public import Types, public

ACTION_OR_FAMILY = re.compile("[a-z][a-z0-9_]*(:[a-z][a-z0-9_]*)?")


@public
async def get(session: AsyncSession, event_id: UUID) -> AuditLog | None:
    """Return the audit event with the given id, or None."""
    return await fetch_one(session, select(AuditLog).where(col(AuditLog.id) == event_id))


class Criteria(TypedDict, total=False):
    """The criteria by which `search` selects audit events.

    `since` and `until` are aware datetimes. An event matches if its time is at or after `since`,
    and before `until`. Each item of `actions` is an action or a family of actions. `resource` is a
    resource type, a resource id, or `type/id`. An event matches `details` if the details of the
    event contain the JSON object `details`. A criterion with the value None or an empty list
    matches every event.
    """

    since: datetime | None
    until: datetime | None
    actions: Sequence[AuditAction | str]
    results: Sequence[AuditResult]
    severities: Sequence[AuditSeverity]
    account_id: UUID | None
    api_key_id: UUID | None
    user_id: str | None
    ip: str | IPv4Address | IPv6Address | IPv4Network | IPv6Network | None
    session_id: str | None
    request_id: str | None
    resource: str | None
    details: Mapping[str, JsonValue] | None


@public
async def search(
    session: AsyncSession,
    *,
    after: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    **criteria: Unpack[Criteria],
) -> Page[AuditLog]:
    """Return a page of the audit events that match all `Criteria`, newest first.

    Raises:
        InvalidValue: a criterion is invalid, such as a datetime without a time zone, or `limit` is
            not from 1 to 1000.
        InvalidCursor: `after` is not the `next_cursor` of an earlier page of audit events.
    """
    found = select(AuditLog).where(*conditions(**criteria))
    return await paginate(session, found, AuditLog, after=after, limit=limit)


@public
async def get_recent_events(
    session: AsyncSession, *, after: str | None = None, limit: int = DEFAULT_PAGE_SIZE
) -> Page[AuditLog]:
    """Return a page of all audit events, newest first."""
    return await search(session, after=after, limit=limit)


@public
async def get_security_events(
    session: AsyncSession,
    *,
    hours: float = 24,
    after: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
) -> Page[AuditLog]:
    """Return a page of the security events of the last `hours`, newest first.

    A security event has the severity high or above, or an action of the family `security`.

    Raises:
        InvalidValue: `hours` is zero, negative or more than 100 years.
    """
    if not 0 < hours <= 24 * 366 * 100:
        raise InvalidValue("hours must be positive and at most 100 years")
    statement = select(AuditLog).where(
        col(AuditLog.id) >= func.uuid7_floor(func.now() - timedelta(hours=hours)),
        or_(col(AuditLog.severity) >= AuditSeverity.HIGH, _of_actions(["security"])),
    )
    return await paginate(session, statement, AuditLog, after=after, limit=limit)


def conditions(**criteria: Unpack[Criteria]) -> list[ColumnElement[bool]]:
    """Return the SQL conditions for the given criteria.

    Raises:
        InvalidValue: the value of a criterion is invalid, or the name of a criterion is unknown.
    """
    given: dict[str, Any] = {name: value for name, value in criteria.items() if value is not None}
    if unknown := criteria.keys() - _CONDITIONS.keys():
        raise InvalidValue(f"unknown criteria: {', '.join(sorted(unknown))}")
    _CRITERIA.check(given)
    return [
        condition(given[name])
        for name, condition in _CONDITIONS.items()
        if name in given and (given[name] or name not in _LISTS)
    ]


def _in_network(
    ip: str | IPv4Address | IPv6Address | IPv4Network | IPv6Network,
) -> ColumnElement[bool]:
    try:
        network = str(parse_network(ip))
    except ValueError:
        raise InvalidValue("ip is neither an IP address nor an IP network") from None
    return col(AuditLog.ip_address).op("<<=")(cast(network, INET))


def _of_actions(names: Sequence[str]) -> ColumnElement[bool]:
    for name in names:
        if not ACTION_OR_FAMILY.fullmatch(name):
            raise InvalidValue(f"{name!r} is neither an action nor a family of actions")
    action = col(AuditLog.action)
    families = [name for name in names if ":" not in name]
    has_action = action.in_(names)
    if not families:
        return has_action
    return or_(has_action, func.split_part(action, ":", 1, type_=Text).in_(families))


def _of_resource(resource: str) -> ColumnElement[bool]:
    kind, thing = col(AuditLog.resource_type), col(AuditLog.resource_id)
    return or_(thing == resource, kind == resource, kind + "/" + thing == resource)


def _with_details(details: Mapping[str, JsonValue]) -> ColumnElement[bool]:
    try:
        contained = require_storable_json(dict(details))
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"details: {error}") from None
    return cast(col(AuditLog.details), JSONB).contains(contained)


_CRITERIA = Types("search", get_type_hints(Criteria))
_LISTS = {"actions", "results", "severities"}
_CONDITIONS: dict[str, Callable[[Any], ColumnElement[bool]]] = {
    "since": lambda at: col(AuditLog.id) >= func.uuid7_floor(require_aware("since", at)),
    "until": lambda at: col(AuditLog.id) < func.uuid7_floor(require_aware("until", at)),
    "actions": _of_actions,
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
        .where(*conditions(since=since, until=until))
        .group_by(col(AuditLog.action), col(AuditLog.result), hour)
        .order_by(hour)
    )
    actions, results, hours = Counter[str](), Counter[str](), Counter[datetime]()
    for action, result, at, count in rows:
        actions[action] += count
        results[result] += count
        hours[at] += count
    return Statistics(dict(actions.most_common()), dict(results.most_common()), dict(hours))

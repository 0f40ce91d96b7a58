"""Finds events, and counts them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypedDict, Unpack
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import ColumnElement, cast, func, or_, select
from sqlalchemy.dialects.postgresql import INET, JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.common import require_aware
from tiger_db.crud.pagination import DEFAULT_PAGE_SIZE, Page, paginate
from tiger_db.errors import InvalidValue
from tiger_db.models import AuditAction, AuditLog, AuditResult, AuditSeverity
from tiger_db.models.api_keys import parse_network
from tiger_db.models.base import storable_json

_SECURITY = [action for action in AuditAction if action.family == "security"]


async def get_recent_events(
    session: AsyncSession, *, after: str | None = None, limit: int = DEFAULT_PAGE_SIZE
) -> Page[AuditLog]:
    """The events, newest first."""
    return await paginate(session, select(AuditLog), AuditLog, after=after, limit=limit)


async def get_security_events(
    session: AsyncSession,
    *,
    hours: float = 24,
    after: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
) -> Page[AuditLog]:
    """The events of the last hours that concern security: that family, or severity high or above.

    Raises:
        InvalidValue: `hours` is not positive.
    """
    if not 0 < hours <= 24 * 366 * 100:
        raise InvalidValue("hours must be positive, and a century at most")
    statement = select(AuditLog).where(
        col(AuditLog.id) >= func.uuid7_floor(func.now() - timedelta(hours=hours)),
        or_(
            col(AuditLog.severity).in_([AuditSeverity.HIGH, AuditSeverity.CRITICAL]),
            col(AuditLog.action).in_(_SECURITY),
        ),
    )
    return await paginate(session, statement, AuditLog, after=after, limit=limit)


async def search(
    session: AsyncSession,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    actions: Sequence[AuditAction] = (),
    results: Sequence[AuditResult] = (),
    severities: Sequence[AuditSeverity] = (),
    account_id: UUID | None = None,
    api_key_id: UUID | None = None,
    user_id: str | None = None,
    ip: str | IPv4Address | IPv6Address | IPv4Network | IPv6Network | None = None,
    session_id: str | None = None,
    request_id: str | None = None,
    resource: str | None = None,
    details: Mapping[str, JsonValue] | None = None,
    after: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
) -> Page[AuditLog]:
    """The events that match every criterion given, newest first.

    `since` (inclusive) and `until` (exclusive) are aware datetimes and compare with the time in the
    event's id. `ip` is an address or a network. `resource` is the id of a thing, or its kind, or
    both as `kind/id`. `details` is what an event's details contain, at any depth from their top.

    Raises:
        InvalidValue: a naive datetime, or something that is neither address nor network.
    """
    found = criteria(
        since=since,
        until=until,
        actions=actions,
        results=results,
        severities=severities,
        account_id=account_id,
        api_key_id=api_key_id,
        user_id=user_id,
        ip=ip,
        session_id=session_id,
        request_id=request_id,
        resource=resource,
        details=details,
    )
    return await paginate(
        session, select(AuditLog).where(*found), AuditLog, after=after, limit=limit
    )


class Criteria(TypedDict, total=False):
    """What `search` looks for."""

    since: datetime | None
    until: datetime | None
    actions: Sequence[AuditAction]
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


def criteria(**wanted: Unpack[Criteria]) -> list[ColumnElement[bool]]:
    """What an event must be, for each criterion that is given.

    Raises:
        InvalidValue: as `search`.
    """
    found: list[ColumnElement[bool]] = []
    if (since := require_aware("since", wanted.get("since"))) is not None:
        found.append(col(AuditLog.id) >= func.uuid7_floor(since))
    if (until := require_aware("until", wanted.get("until"))) is not None:
        found.append(col(AuditLog.id) < func.uuid7_floor(until))
    for column, values in (
        (col(AuditLog.action), wanted.get("actions")),
        (col(AuditLog.result), wanted.get("results")),
        (col(AuditLog.severity), wanted.get("severities")),
    ):
        if values:
            found.append(column.in_(values))
    if (ip := wanted.get("ip")) is not None:
        found.append(col(AuditLog.ip_address).op("<<=")(cast(str(_network(ip)), INET)))
    if (resource := wanted.get("resource")) is not None:
        kind, thing = col(AuditLog.resource_type), col(AuditLog.resource_id)
        found.append(or_(thing == resource, kind == resource, kind + "/" + thing == resource))
    if (details := wanted.get("details")) is not None:
        found.append(cast(col(AuditLog.details), JSONB).contains(_json(details)))
    found += [
        column == value
        for column, value in (
            (col(AuditLog.tiger_account_id), wanted.get("account_id")),
            (col(AuditLog.api_key_id), wanted.get("api_key_id")),
            (col(AuditLog.user_id), wanted.get("user_id")),
            (col(AuditLog.session_id), wanted.get("session_id")),
            (col(AuditLog.request_id), wanted.get("request_id")),
        )
        if value is not None
    ]
    return found


@dataclass(frozen=True, slots=True)
class Statistics:
    """Events by action, by result, and by the hour in which they began (UTC)."""

    actions: dict[AuditAction, int]
    results: dict[AuditResult, int]
    hours: dict[datetime, int]


async def statistics(
    session: AsyncSession, *, since: datetime, until: datetime | None = None
) -> Statistics:
    """How many events there were, from `since` (inclusive) to `until` (exclusive), aware datetimes.

    Hours without an event are left out. The times are those in the events' ids.

    Raises:
        InvalidValue: a naive datetime.
    """
    hour = func.date_trunc("hour", func.uuid7_time(AuditLog.id), "UTC")
    rows = (
        await session.execute(
            select(col(AuditLog.action), col(AuditLog.result), hour, func.count())
            .where(*criteria(since=since, until=until))
            .group_by(col(AuditLog.action), col(AuditLog.result), hour)
            .order_by(hour)
        )
    ).all()
    actions, results, hours = Counter[AuditAction](), Counter[AuditResult](), Counter[datetime]()
    for action, result, at, count in rows:
        actions[action] += count
        results[result] += count
        hours[at] += count
    return Statistics(dict(actions.most_common()), dict(results.most_common()), dict(hours))


def _json(details: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        return storable_json(dict(details))
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"details: {error}") from None


def _network(
    address: str | IPv4Address | IPv6Address | IPv4Network | IPv6Network,
) -> IPv4Network | IPv6Network:
    try:
        return parse_network(address)
    except ValueError:
        raise InvalidValue("ip is neither an address nor a network") from None

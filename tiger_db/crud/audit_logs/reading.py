"""The audit trail: events go in and are read; nothing here changes one."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import ColumnElement, cast, func, or_, select
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.common import Page, aware, paginate, typed_errors
from tiger_db.errors import InvalidValue
from tiger_db.models import AuditAction, AuditLog, AuditResult, AuditSeverity
from tiger_db.models.api_keys import parse_network

_SECURITY = [action for action in AuditAction if action.family == "security"]


async def log_event(
    session: AsyncSession,
    *,
    action: AuditAction,
    result: AuditResult = AuditResult.SUCCESS,
    severity: AuditSeverity | None = None,
    resource_type: str | None = None,
    resource_id: str | None = None,
    user_id: str | None = None,
    user_type: str | None = None,
    session_id: str | None = None,
    ip_address: str | IPv4Address | IPv6Address | None = None,
    user_agent: str | None = None,
    request_method: str | None = None,
    request_path: str | None = None,
    request_id: str | None = None,
    tiger_account_id: UUID | None = None,
    api_key_id: UUID | None = None,
    details: Mapping[str, JsonValue] | None = None,
    old_values: Mapping[str, JsonValue] | None = None,
    new_values: Mapping[str, JsonValue] | None = None,
    error_code: str | None = None,
    error_message: str | None = None,
    duration_ms: int | None = None,
    tags: Mapping[str, JsonValue] | None = None,
) -> AuditLog:
    """Record one event in the caller's transaction: it is stored if and when that commits.

    Raises:
        ValidationError: a value is refused; it names the field.
    """
    given = {k: v for k, v in locals().items() if k != "session" and v is not None}
    event = AuditLog(**given)
    session.add(event)
    await session.flush()
    return event


async def log_events(session: AsyncSession, events: Iterable[AuditLog]) -> int:
    """Record many events in the caller's transaction; returns how many.

    Raises:
        InvalidValue: one of them is not an AuditLog; none is recorded.
        AlreadyExists: one of them is recorded already; the transaction must be rolled back.
    """
    batch = list(events)
    if not all(isinstance(event, AuditLog) for event in batch):
        raise InvalidValue("events must be AuditLog objects")
    session.add_all(batch)
    with typed_errors():
        await session.flush()
    return len(batch)


async def get_recent_events(
    session: AsyncSession, *, after: str | None = None, limit: int = 50
) -> Page[AuditLog]:
    """The events, newest first."""
    return await paginate(session, select(AuditLog), AuditLog, after=after, limit=limit)


async def get_security_events(
    session: AsyncSession, *, hours: float = 24, after: str | None = None, limit: int = 50
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
    after: str | None = None,
    limit: int = 50,
) -> Page[AuditLog]:
    """The events that match every criterion given, newest first.

    `since` (inclusive) and `until` (exclusive) are aware datetimes and compare with the time in the
    event's id. `ip` is an address or a network.

    Raises:
        InvalidValue: a naive datetime, or something that is neither address nor network.
    """
    criteria: list[ColumnElement[bool]] = []
    if since is not None:
        criteria.append(col(AuditLog.id) >= func.uuid7_floor(aware("since", since)))
    if until is not None:
        criteria.append(col(AuditLog.id) < func.uuid7_floor(aware("until", until)))
    if actions:
        criteria.append(col(AuditLog.action).in_(actions))
    if results:
        criteria.append(col(AuditLog.result).in_(results))
    if severities:
        criteria.append(col(AuditLog.severity).in_(severities))
    if ip is not None:
        criteria.append(col(AuditLog.ip_address).op("<<=")(cast(str(_network(ip)), INET)))
    criteria += [
        column == value
        for column, value in (
            (col(AuditLog.tiger_account_id), account_id),
            (col(AuditLog.api_key_id), api_key_id),
            (col(AuditLog.user_id), user_id),
            (col(AuditLog.session_id), session_id),
            (col(AuditLog.request_id), request_id),
        )
        if value is not None
    ]
    return await paginate(
        session, select(AuditLog).where(*criteria), AuditLog, after=after, limit=limit
    )


def _network(
    address: str | IPv4Address | IPv6Address | IPv4Network | IPv6Network,
) -> IPv4Network | IPv6Network:
    try:
        return parse_network(address)
    except ValueError:
        raise InvalidValue("ip is neither an address nor a network") from None

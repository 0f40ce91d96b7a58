"""What writes events: in the caller's transaction, apart from it, and in bulk."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Required, TypedDict, Unpack
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, make_transient_to_detached
from sqlalchemy.orm.attributes import instance_state, set_committed_value

from tiger_db.crud.common import execute, handed_over
from tiger_db.errors import DatabaseUnavailable, InvalidState, InvalidValue
from tiger_db.models import AuditAction, AuditLog, AuditResult, AuditSeverity
from tiger_db.models.audit_rows import INSERT, PROVIDED, copy_events, row_of
from tiger_db.sqlstates import raw_errors
from tiger_db.write_behind import WriteBehind

_INSERT = f"{INSERT} RETURNING {', '.join(PROVIDED)}"


class EventFields(TypedDict, total=False):
    """What an event can tell. Of these, only `action` must be given."""

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
    """Record one event in the caller's transaction: it is stored if and when that commits.

    Details that cannot be stored are made safe, secrets are masked: see `AuditLog`.

    Raises:
        ValidationError: there is no such action or result, or no such field.
    """
    event = _event(fields)
    (provided,) = await execute(session, _INSERT, *row_of(event))
    for name, value in zip(PROVIDED, provided, strict=True):
        set_committed_value(event, name, value)
    _take_in(session.sync_session, event)
    return event


def _take_in(session: Session, event: AuditLog) -> None:
    """Have the session know the event as one that it has stored itself."""
    make_transient_to_detached(event)
    session.add(event)
    transaction = session.get_nested_transaction() or session.get_transaction()
    assert transaction is not None
    transaction._new[instance_state(event)] = True  # noqa: SLF001  # else a rollback would expire it


async def record_event(session: AsyncSession, **fields: Unpack[EventFields]) -> AuditLog:
    """Record one event apart from the caller's transaction: it is stored when this returns.

    It stays, whatever becomes of the transaction: the intent before an order, its outcome after, a
    denial. If the session's `info` has None as `write_behind`, it is in the session's transaction.

    Raises:
        ValidationError: as `log_event`.
        ConfigurationError: the session has no Database.
        DatabaseUnavailable: it could not be stored.
    """
    write_behind = handed_over(session.info, "write_behind")
    if not isinstance(write_behind, WriteBehind):
        return await log_event(session, **fields)
    event = _event(fields)
    await write_behind.record(event)
    return event


def _event(fields: EventFields) -> AuditLog:
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    return AuditLog(**given)


async def log_events(session: AsyncSession, events: Iterable[AuditLog]) -> int:
    """Record many events in the caller's transaction, through COPY; returns how many.

    The objects stay out of the session, and do not learn of `created_at` and `position`.

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
    if session.info.get("readonly"):  # else it would be taken for a primary that takes no writes
        raise InvalidState("a readonly session cannot write")
    await session.flush()
    connection = await session.connection()
    await connection.exec_driver_sql("SELECT")  # begins the transaction, which COPY would not
    raw = (await connection.get_raw_connection()).driver_connection
    assert raw is not None
    try:
        with raw_errors():
            await copy_events(raw, batch)
    except DatabaseUnavailable:
        await connection.invalidate()
        raise
    return len(batch)

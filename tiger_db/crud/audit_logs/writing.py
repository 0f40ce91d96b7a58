"""Record audit events: in the caller's transaction, out of band, or in bulk with COPY."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Required, TypedDict, Unpack
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, make_transient_to_detached
from sqlalchemy.orm.attributes import instance_state, set_committed_value

from tiger_db.crud.common import context_of, execute_driver_sql, refuse_readonly
from tiger_db.errors import DatabaseUnavailable, InvalidValue
from tiger_db.models import AuditAction, AuditLog, AuditResult, AuditSeverity
from tiger_db.models.audit_inserts import INSERT, SERVER_COLUMNS, insert_events, insert_values
from tiger_db.sqlstates import raw_errors

_INSERT = f"{INSERT} RETURNING {', '.join(SERVER_COLUMNS)}"


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
    (provided,) = await execute_driver_sql(session, _INSERT, *insert_values(event))
    for name, value in zip(SERVER_COLUMNS, provided, strict=True):
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
    """Record one event out of band: it is stored when this returns.

    The event stays if the caller's transaction rolls back: for the intent before an order, its
    outcome, a denial. If the session's context has no `write_behind`, the event is in the session's
    transaction.

    Raises:
        ValidationError: as `log_event`.
        ConfigurationError: the session was not made for a Database.
        DatabaseUnavailable: the event could not be stored.
    """
    write_behind = context_of(session.info).write_behind
    if write_behind is None:
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
    refuse_readonly(session, "write")  # COPY's error would look like that of a lost primary
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

"""Record audit events: in the caller's transaction, out of band, or in bulk."""

import logging
import time
from asyncio import CancelledError
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, Protocol, Required, TypedDict, Unpack, runtime_checkable
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.event import listens_for
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper, make_transient_to_detached, object_session
from sqlalchemy.orm.attributes import instance_state
from uuid_utils.compat import uuid7

from tiger_db.actor import attribute
from tiger_db.crud.common import (
    actor_of,
    context_of,
    error_text,
    fetch_rows,
    refuse_readonly,
)
from tiger_db.errors import DatabaseUnavailable, InvalidValue, OutcomeUnknown, TigerDBError
from tiger_db.models import AuditAction, AuditLog, AuditResult, AuditSeverity, TokenStatus
from tiger_db.models.audit_logs import (
    INSERT,
    SERVER_COLUMNS,
    insert_events,
    insert_values,
    severity_of,
)
from tiger_db.public import public
from tiger_db.sqlstates import raw_errors

_INSERT = f"{INSERT} RETURNING {', '.join(SERVER_COLUMNS)}"


INTENT = "_intent"  # an outcome event has the intent's id in `details`, under the key INTENT
_logger = logging.getLogger("tiger_db")


class IntentFields(TypedDict, total=False):
    """The fields of an audit event that are known before the action. Only `action` is required."""

    action: Required[AuditAction | str]
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
    tags: Mapping[str, object] | None


class EventFields(IntentFields, total=False):
    """The fields of an audit event. Only `action` is required."""

    result: AuditResult
    error_code: str | None
    error_message: str | None
    duration_ms: float | timedelta | None


@runtime_checkable
class SessionSource(Protocol):
    """An object that opens sessions, such as a Database."""

    def session(self) -> AbstractAsyncContextManager[AsyncSession]: ...


@public
async def log_event(session: AsyncSession, **fields: Unpack[EventFields]) -> AuditLog:
    """Record one audit event in the caller's transaction.

    If the transaction is rolled back, the event is removed. Values that PostgreSQL cannot store are
    converted to storable values, and secrets are masked.

    Raises:
        InvalidFields: the name of a given field is unknown, or a given value is invalid.
    """
    return await insert_event(session, build_event(**fields))


@public
async def record_event(session: AsyncSession, **fields: Unpack[EventFields]) -> AuditLog:
    """Record one audit event out of band, and commit the event before the function returns.

    The event stays if the caller's transaction is rolled back. To record the intent and the outcome
    of an action, use `recorded`. If `SessionContext.out_of_band` is None, the event is recorded in
    the session's transaction.

    Raises:
        InvalidFields: the name of a given field is unknown, or a given value is invalid.
        ConfigurationError: the session does not belong to a Database.
        DatabaseUnavailable: the audit event could not be stored.
    """
    return await _record(session, build_event(**fields))


async def _record(session: AsyncSession, event: AuditLog) -> AuditLog:
    out_of_band = context_of(session.info).out_of_band
    if out_of_band is None:
        return await insert_event(session, event)
    await out_of_band.record(event, actor_of(session.info))
    return event


@public
@asynccontextmanager
async def recorded(
    source: SessionSource | Callable[[], AbstractAsyncContextManager[AsyncSession]],
    **fields: Unpack[IntentFields],
) -> AsyncIterator[AuditLog]:
    """Record, out of band, an intent before a code block and an outcome event after the code block.

    `source` is a Database, another object with a method `session`, or a function such as
    `get_session`. No session is open while the code block runs.

    The intent is an audit event with the result `pending`. If the intent cannot be recorded, the
    code block does not run. The code block gets the outcome event, and can set fields of the
    outcome event, such as `details`. The intent and the outcome event have the same `request_id`:
    the given id, the actor's id, or a new id. The `details` of the outcome event contain the id of
    the intent under `_intent`. The default `result` of the outcome event is `success`, or `error`
    if the code block raises an exception or is cancelled. The default `duration_ms` is the duration
    of the code block. If the process is killed while the code block of `recorded` runs, the intent
    has no outcome event.

    If the code block raises an exception, `recorded` raises the same exception. Do not repeat the
    action after the error OutcomeUnknown.

    Raises:
        InvalidFields: the value of a given field is invalid.
        InvalidValue: the name of a given field is unknown.
        DatabaseUnavailable: the intent could not be stored.
        OutcomeUnknown: the code block has ended, but the outcome event could not be stored.
    """
    if unknown := fields.keys() - IntentFields.__annotations__.keys():
        raise InvalidValue(f"unknown fields of an intent: {', '.join(sorted(unknown))}")
    open_session = source if callable(source) else source.session
    intent = build_event(**fields, result=AuditResult.PENDING)
    async with open_session() as session:
        attribute(intent, actor_of(session.info))
        if intent.request_id is None:
            intent.request_id = str(uuid7())
        outcome = intent.model_copy(update={"id": uuid7(), "result": AuditResult.SUCCESS})
        try:
            await _record(session, intent)
        except CancelledError as error:  # the intent is stored, although this task was cancelled
            _fail(outcome, error, "cancelled before the action began")
            with _logged(intent):
                await _record(session, _complete(outcome, intent, 0))
            raise
    start = time.monotonic()

    async def record_outcome() -> None:
        milliseconds = round((time.monotonic() - start) * 1000)
        async with open_session() as session:
            await _record(session, _complete(outcome, intent, milliseconds))

    try:
        yield outcome
    except GeneratorExit:  # a closed generator cannot await anything
        raise
    except BaseException as error:
        _fail(outcome, error, "cancelled: the action may have been done")
        with _logged(intent):
            await record_outcome()
        raise
    try:
        await record_outcome()
    except TigerDBError as error:
        raise OutcomeUnknown(
            f"{error}: the action has ended, but the outcome is not recorded (intent {intent.id})"
        ) from None


@contextmanager
def _logged(intent: AuditLog) -> Iterator[None]:
    """Log errors of recording an outcome event.

    These errors are not raised, so that they do not replace the exception that the code block of
    `recorded` raised.
    """
    try:
        yield
    except TigerDBError as error:
        _logger.error(  # noqa: TRY400  # a traceback may contain secrets
            "the outcome of the intent %s is not recorded: %s", intent.id, error
        )


def _fail(outcome: AuditLog, error: BaseException, cancelled: str) -> None:
    """Set the empty fields of an outcome event from the exception of the code block."""
    if outcome.result == AuditResult.SUCCESS:
        outcome.result = AuditResult.ERROR
    if outcome.error_code is None:
        outcome.error_code = type(error).__name__
    if outcome.error_message is None:
        is_cancelled = isinstance(error, CancelledError)
        outcome.error_message = cancelled if is_cancelled else error_text(error)


def _complete(outcome: AuditLog, intent: AuditLog, milliseconds: int) -> AuditLog:
    """Set the duration, the severity and the link to the intent in an outcome event. Return it."""
    outcome.request_id = intent.request_id
    if outcome.duration_ms is None:
        outcome.duration_ms = milliseconds
    if "severity" not in outcome.model_fields_set:
        outcome.severity = severity_of(outcome.action, outcome.result)
    details = {**(outcome.details or {})}
    details.pop(INTENT, None)
    outcome.details = {INTENT: str(intent.id), **details}
    return outcome


@public
async def log_events(session: AsyncSession, events: Iterable[AuditLog]) -> int:
    """Record many audit events in the caller's transaction with COPY. Return the number of events.

    The AuditLog objects are not added to the session. The attributes `created_at` and `position` of
    the AuditLog objects are not set. After the error AlreadyExists, the caller must roll back the
    transaction. After the error Conflict, the caller must repeat the transaction.

    Raises:
        InvalidValue: an item of `events` is not an AuditLog, so no event is recorded.
        AlreadyExists: one of the events is recorded already.
        InvalidState: the session is readonly.
        DatabaseUnavailable: the connection to the database was lost.
        Conflict: the transaction is in conflict with another transaction.
        QueryTimeout: COPY took longer than DB_QUERY_TIMEOUT.
    """
    batch = list(events)
    if not all(isinstance(event, AuditLog) for event in batch):
        raise InvalidValue("events must be AuditLog objects")
    if not batch:
        return 0
    actor = actor_of(session.info)
    # Without the call of `refuse_readonly`, COPY in a readonly session would raise the same error
    # as COPY after a failover.
    refuse_readonly(session)
    await session.flush()
    connection = await session.connection()
    await connection.exec_driver_sql("SELECT")  # SELECT begins the transaction in which COPY runs
    raw = (await connection.get_raw_connection()).driver_connection
    assert raw is not None
    try:
        with raw_errors():
            await insert_events(raw, [attribute(event, actor) for event in batch])
    except DatabaseUnavailable:
        await connection.invalidate()
        raise
    return len(batch)


async def insert_event(session: AsyncSession, event: AuditLog) -> AuditLog:
    """Set the actor of an audit event, insert its row, and attach the object to the session."""
    attribute(event, actor_of(session.info))
    (values,) = await fetch_rows(session, _INSERT, *insert_values(event))
    event.__dict__.update(zip(SERVER_COLUMNS, values, strict=True))
    state = instance_state(event)
    if state.modified:
        make_transient_to_detached(event)
    else:  # the same for an object without changes and expired columns, in a tenth of the time
        state.key = (AuditLog, (event.id,), None)
    sync_session = session.sync_session
    sync_session.add(event)
    transaction = sync_session.get_nested_transaction() or sync_session.get_transaction()
    assert transaction is not None
    # The event is marked as flushed, so that a rollback makes the event transient, not expired.
    transaction._new[state] = True  # noqa: SLF001
    return event


@listens_for(AuditLog, "before_insert")
def _attribute_flushed(_mapper: Mapper[AuditLog], _connection: Connection, event: AuditLog) -> None:
    """Set the actor of an audit event that a caller has added to a session."""
    session = object_session(event)
    assert session is not None
    attribute(event, actor_of(session.info))


# Functions that build audit events


def build_event(**fields: Unpack[EventFields]) -> AuditLog:
    """Build an audit event. A field whose given value is None gets the field's default value."""
    return AuditLog.untracked({name: value for name, value in fields.items() if value is not None})


def account_event(account_id: UUID, **fields: Unpack[EventFields]) -> AuditLog:
    """Build an audit event about an account."""
    fields |= {"resource_type": "tiger_account", "resource_id": str(account_id)}
    fields["tiger_account_id"] = account_id
    return build_event(**fields)


def account_error_event(
    account_id: UUID, message: str, *, error_count: int, failing_until: datetime | None
) -> AuditLog:
    """Build an audit event about a counted error of an account."""
    return account_event(
        account_id,
        action=AuditAction.ACCOUNT_ERROR,
        old_values={"error_count": error_count - 1},
        new_values={"error_count": error_count},
        error_message=message,
        details={"failing_until": failing_until.isoformat()} if failing_until else None,
    )


def api_key_event(
    key_id: UUID | None, account_id: UUID | None, **fields: Unpack[EventFields]
) -> AuditLog:
    """Build an audit event about an API key and the account that the key is bound to."""
    fields |= {"resource_type": "api_key", "resource_id": str(key_id) if key_id else None}
    fields |= {"api_key_id": key_id, "tiger_account_id": account_id}
    return build_event(**fields)


class RefreshRow(NamedTuple):
    """The columns of a refresh that its audit events have."""

    id: UUID
    tiger_account_id: UUID
    status: str
    trigger: str


def refresh_event(refresh: TokenStatus | RefreshRow, **fields: Unpack[EventFields]) -> AuditLog:
    """Build an audit event about a token refresh, given as an entity or as a row."""
    fields |= {"resource_type": "token_status", "resource_id": str(refresh.id)}
    fields["tiger_account_id"] = refresh.tiger_account_id
    fields.setdefault("details", {"status": str(refresh.status), "trigger": str(refresh.trigger)})
    return build_event(**fields)

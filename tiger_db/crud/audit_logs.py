"""CRUD functions that record, search and count audit events. Recorded events never change."""

import logging
import re
import time
from asyncio import CancelledError
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Protocol, Required, TypedDict, Unpack, get_type_hints, runtime_checkable
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import ColumnElement, Connection, Row, Text, cast, func, or_, select
from sqlalchemy.dialects.postgresql import INET, JSONB
from sqlalchemy.event import listens_for
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper, make_transient_to_detached, object_session
from sqlalchemy.orm.attributes import instance_state, set_committed_value
from sqlmodel import col
from uuid_utils.compat import uuid7

from tiger_db.actor import attribute
from tiger_db.crud.common import (
    actor_of,
    context_of,
    error_text,
    execute_driver_sql,
    fetch_one,
    refuse_readonly,
    require_aware,
)
from tiger_db.crud.pagination import DEFAULT_PAGE_SIZE, Page, paginate
from tiger_db.errors import DatabaseUnavailable, InvalidValue, OutcomeUnknown, TigerDBError
from tiger_db.models import AuditAction, AuditLog, AuditResult, AuditSeverity, TokenStatus
from tiger_db.models.api_keys import parse_network
from tiger_db.models.audit_logs import (
    INSERT,
    SERVER_COLUMNS,
    insert_events,
    insert_values,
    severity_of,
)
from tiger_db.models.columns import require_storable_json
from tiger_db.public import Types, public
from tiger_db.sqlstates import raw_errors

__all__ = [
    "Criteria",
    "EventFields",
    "IntentFields",
    "SessionSource",
    "Statistics",
    "get",
    "get_recent_events",
    "get_security_events",
    "log_event",
    "log_events",
    "record_event",
    "recorded",
    "search",
    "statistics",
]

ACTION_OR_FAMILY = re.compile("[a-z][a-z0-9_]*(:[a-z][a-z0-9_]*)?")
_INSERT = f"{INSERT} RETURNING {', '.join(SERVER_COLUMNS)}"


INTENT = "_intent"  # key of the intent's id in the `details` of an outcome event
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
    """Record one audit event in the caller's transaction. A rollback also removes the event.

    Values that PostgreSQL cannot store are converted, and secrets are masked.

    Raises:
        InvalidFields: an audit event has no field with a given name, or a given value is invalid.
    """
    return await insert_event(session, build_event(**fields))


@public
async def record_event(session: AsyncSession, **fields: Unpack[EventFields]) -> AuditLog:
    """Record one audit event out of band, and commit the event before the function returns.

    The event stays if the caller's transaction rolls back. For the intent and the outcome of an
    order, use `recorded`. If `SessionContext.out_of_band` is None, the event is recorded in the
    session's transaction.

    Raises:
        InvalidFields: an audit event has no field with a given name, or a given value is invalid.
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
    """Record, out of band, an intent before a code block and an outcome event after the block.

    `source` is a Database, another object with a method `session`, or a function such as
    `get_session`. No session is open while the block runs.

    The intent is an audit event with the result `pending`. The code block gets the outcome event,
    and can set fields of that event, such as `details`. Both events have the same `request_id`: the
    given id, the actor's id, or a new id. The `details` of the outcome event contain the id of the
    intent under `_intent`. The default `result` of the outcome event is `success`, or `error` if
    the block raises an exception or is cancelled. The default `duration_ms` is the duration of the
    block. If the process is killed during the block, the intent has no outcome event.

    Raises:
        InvalidFields: a given value of an event field is invalid. The code block does not run.
        InvalidValue: an intent has no field with a given name. The code block does not run.
        DatabaseUnavailable: the intent could not be stored. The code block does not run.
        OutcomeUnknown: the code block has succeeded, but the outcome event could not be stored. Do
            not repeat the action. A failed code block raises its own exception instead.
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
        except CancelledError as error:  # the intent is stored despite the cancellation
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
    """Log an error of recording an outcome event. The error must not hide the block's exception."""
    try:
        yield
    except TigerDBError as error:
        _logger.error(  # noqa: TRY400  # a traceback may contain secrets
            "the outcome of event %s is not recorded: %s", intent.id, error
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
    the AuditLog objects are not set.

    Raises:
        InvalidValue: an item of `events` is not an AuditLog. No event is recorded.
        AlreadyExists: one of the events is recorded already. The caller must roll back the
            transaction.
        InvalidState: the session is readonly.
        DatabaseUnavailable: the connection to the database was lost.
        Conflict: another transaction caused a conflict. The caller must repeat the transaction.
        QueryTimeout: COPY took longer than DB_QUERY_TIMEOUT.
    """
    batch = list(events)
    if not all(isinstance(event, AuditLog) for event in batch):
        raise InvalidValue("events must be AuditLog objects")
    if not batch:
        return 0
    actor = actor_of(session.info)
    refuse_readonly(session)  # without this check, COPY would raise the error of a failover
    await session.flush()
    connection = await session.connection()
    await connection.exec_driver_sql("SELECT")  # SELECT begins a transaction that COPY joins
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
    """Set the actor of an audit event, insert the event, and add the event to the session."""
    attribute(event, actor_of(session.info))
    (values,) = await execute_driver_sql(session, _INSERT, *insert_values(event))
    for name, value in zip(SERVER_COLUMNS, values, strict=True):
        set_committed_value(event, name, value)
    make_transient_to_detached(event)
    session.add(event)
    transaction = (
        session.sync_session.get_nested_transaction() or session.sync_session.get_transaction()
    )
    assert transaction is not None
    # The event is marked as flushed, so that a rollback makes the event transient, not expired.
    transaction._new[instance_state(event)] = True  # noqa: SLF001
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
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    return AuditLog(**given)


def account_event(account_id: UUID, **fields: Unpack[EventFields]) -> AuditLog:
    """Build an audit event about an account."""
    fields |= {"resource_type": "tiger_account", "resource_id": str(account_id)}
    fields["tiger_account_id"] = account_id
    return build_event(**fields)


def api_key_event(
    key_id: UUID | None, account_id: UUID | None, **fields: Unpack[EventFields]
) -> AuditLog:
    """Build an audit event about an API key and the account that the key is bound to."""
    fields |= {"resource_type": "api_key", "resource_id": str(key_id) if key_id else None}
    fields |= {"api_key_id": key_id, "tiger_account_id": account_id}
    return build_event(**fields)


def refresh_event(refresh: TokenStatus | Row[Any], **fields: Unpack[EventFields]) -> AuditLog:
    """Build an audit event about a token refresh, given as an entity or as a row."""
    fields |= {"resource_type": "token_status", "resource_id": str(refresh.id)}
    fields["tiger_account_id"] = refresh.tiger_account_id
    fields.setdefault("details", {"status": str(refresh.status), "trigger": str(refresh.trigger)})
    return build_event(**fields)


# Functions that search and count audit events


@public
async def get(session: AsyncSession, event_id: UUID) -> AuditLog | None:
    """Return the audit event with the given id, or None."""
    return await fetch_one(session, select(AuditLog).where(col(AuditLog.id) == event_id))


class Criteria(TypedDict, total=False):
    """The criteria of `search`. A criterion with the value None matches every audit event."""

    since: datetime | None  # earliest time of events, as an aware datetime
    until: datetime | None  # time after the last event, as an aware datetime
    # Each item of `actions` is an action or a family of actions. An empty list allows all actions.
    actions: Sequence[AuditAction | str]
    results: Sequence[AuditResult]
    severities: Sequence[AuditSeverity]
    account_id: UUID | None
    api_key_id: UUID | None
    user_id: str | None
    ip: str | IPv4Address | IPv6Address | IPv4Network | IPv6Network | None
    session_id: str | None
    request_id: str | None
    resource: str | None  # resource type, resource id, or `type/id`
    details: Mapping[str, JsonValue] | None  # JSON object that an event's details contain


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
    """Count the audit events from `since` (inclusive) to `until` (exclusive), aware datetimes.

    The time of an event is taken from the event's id. The result omits hours without an event.

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

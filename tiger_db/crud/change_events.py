"""Audit events of changed accounts and API keys, recorded when the ORM flushes the changes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Unpack, cast

from pydantic import JsonValue
from sqlalchemy import Connection, Update, inspect, select
from sqlalchemy.event import listens_for
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper, ORMExecuteState, Session, object_session
from sqlalchemy.orm.attributes import instance_state, set_attribute
from sqlalchemy.orm.base import NO_VALUE

from tiger_db.actor import attribute
from tiger_db.crud.api_key_codes import (
    SIGNED_COLUMNS,
    compute_code,
    optional_peppers,
    renewed_code,
    signed_values,
)
from tiger_db.crud.audit_logs.recording import EventFields, account_event, api_key_event
from tiger_db.crud.common import actor_of
from tiger_db.encryption import EncryptedSecret
from tiger_db.errors import EncryptionError, InvalidState
from tiger_db.models import APIKey, APIKeyStatus, AuditAction, TigerAccount
from tiger_db.models.audit_logs import INSERT, insert_values
from tiger_db.redaction import MASK

# An ORM bulk statement on accounts or API keys needs the execution options RECORDED. A function
# that executes a bulk statement with RECORDED must record the audit events of the changed rows.
RECORDED = {"tiger_db_recorded": True}
# Audit events mask the values of the fields in _HIDDEN.
_HIDDEN = {"key_hash", "pepper_id"}
# Audit events omit the columns in _OMITTED.
_OMITTED = {"created_at", "updated_at", "token_refresh_at", "mac", "mac_denied_at"}
# InstanceState.info stores the fields of the audit event under the key _FIELDS. The key _GIVEN of
# InstanceState.info stores the names of the fields that the audit event lists even if they are
# unchanged. The key _OLD of InstanceState.info stores the old values of fields.
_FIELDS, _GIVEN, _OLD = "tiger_db_fields", "tiger_db_given", "tiger_db_old"


async def apply_change(
    session: AsyncSession,
    entity: TigerAccount | APIKey,
    values: Mapping[str, object],
    *,
    given: Iterable[str] = (),
    **fields: Unpack[EventFields],
) -> None:
    """Assign values to an account or API key whose row is locked, and flush the session.

    The flush records one audit event for the entity. The arguments `fields` set fields of the audit
    event, such as `action`. The audit event contains the old and new values of the changed fields,
    and of the fields that `given` names. If no field is changed, no audit event is recorded.

    Raises:
        InvalidFields: an item of `values` is invalid, so the entity is not changed.
    """
    entity.sqlmodel_update({**values})
    with described(entity, given=given, **fields):
        await session.flush()


@contextmanager
def described(
    entity: TigerAccount | APIKey, *, given: Iterable[str] = (), **fields: Unpack[EventFields]
) -> Iterator[None]:
    """Set fields of the audit event that a flush in the code block of `with` records for `entity`.

    The caller must have locked the row of the entity, unless the row is new. `old_values` and
    `new_values` replace the values that the flush would record. The audit event of an update
    contains the changed fields, and the unchanged fields that `given` names.
    """
    info = instance_state(entity).info
    info[_FIELDS], info[_GIVEN] = fields, {*given}
    try:
        yield
    finally:
        del info[_FIELDS], info[_GIVEN]


def reason_details(reason: str | None) -> dict[str, object] | None:
    """Return the details of an audit event whose only detail is the reason for the change."""
    return None if reason is None else {"reason": reason}


# Event listeners that run when the ORM flushes accounts and API keys


@listens_for(APIKey, "before_insert")
def _sign_new_row(_mapper: object, _connection: object, key: APIKey) -> None:
    """Compute the authentication code of a new API key. Without peppers, the row has no code."""
    session = object_session(key)
    assert session is not None
    peppers = optional_peppers(session.info)
    set_attribute(key, "mac", peppers and compute_code(peppers, signed_values(key)))


@listens_for(APIKey, "before_update")
def _renew_code(mapper: Mapper[Any], connection: Connection, key: APIKey) -> None:
    """Renew the authentication code of an API key whose signed columns are changed.

    The code covers the stored values with this flush's changes, not the values in the session,
    which another transaction can have changed.

    Raises:
        InvalidState, ConfigurationError: as documented for `renewed_code`.
    """
    state = instance_state(key)
    written = state.committed_state.keys() & {*SIGNED_COLUMNS}
    session = object_session(key)
    assert session is not None
    if not written or not session.is_modified(key):
        return
    old = _stored_values(mapper, connection, key, {*SIGNED_COLUMNS, "mac"})
    changes = {
        name: new
        for name in written
        if old and not is_equal(APIKey, name, old[name], new := getattr(key, name))
    }
    if changes:
        code = renewed_code(optional_peppers(session.info), old, {**old, **changes})
        set_attribute(key, "mac", code)


@listens_for(TigerAccount, "after_insert")
@listens_for(APIKey, "after_insert")
def _record_insert(_mapper: object, connection: Connection, entity: TigerAccount | APIKey) -> None:
    is_account = isinstance(entity, TigerAccount)
    action = AuditAction.ACCOUNT_CREATE if is_account else AuditAction.API_KEY_CREATE
    values = {name: getattr(entity, name) for name in _names(entity)}
    _insert_event(connection, entity, action=action, new_values=_dump(entity, values))


@listens_for(TigerAccount, "before_update")
@listens_for(APIKey, "before_update")
def _keep_old_values(
    mapper: Mapper[Any], connection: Connection, entity: TigerAccount | APIKey
) -> None:
    """Save the old values of changed fields, because UPDATE with RETURNING can replace them."""
    state = instance_state(entity)
    session = object_session(entity)
    assert session is not None
    names = _names(entity) & (state.committed_state.keys() | state.info.get(_GIVEN, set()))
    if not session.is_modified(entity):
        names.clear()
    if "status" in names and isinstance(entity, TigerAccount):
        names.add("auto_suspended")  # a trigger sets auto_suspended if status changes
    state.info[_OLD] = _stored_values(mapper, connection, entity, names)


@listens_for(TigerAccount, "after_update")
@listens_for(APIKey, "after_update")
def _record_update(_mapper: object, connection: Connection, entity: TigerAccount | APIKey) -> None:
    info = instance_state(entity).info
    old: dict[str, object] = info.pop(_OLD)
    new = {name: getattr(entity, name) for name in old}
    changed = {name for name in old if not is_equal(type(entity), name, old[name], new[name])}
    if not changed:
        return
    action = AuditAction.ACCOUNT_UPDATE
    if isinstance(entity, APIKey):
        is_revoked = "status" in changed and entity.status == APIKeyStatus.REVOKED
        action = AuditAction.API_KEY_REVOKE if is_revoked else AuditAction.API_KEY_UPDATE
    elif "status" in changed:
        action = AuditAction.ACCOUNT_STATUS_CHANGE
    hidden: dict[str, JsonValue] = dict.fromkeys(changed & _HIDDEN, MASK)
    listed = changed | info.get(_GIVEN, set())
    old_values, new_values = (
        hidden | _dump(entity, {name: value for name, value in values.items() if name in listed})
        for values in (old, new)
    )
    _insert_event(connection, entity, action=action, old_values=old_values, new_values=new_values)


@listens_for(TigerAccount, "before_delete")
@listens_for(APIKey, "before_delete")
def _record_delete(
    mapper: Mapper[Any], connection: Connection, entity: TigerAccount | APIKey
) -> None:
    is_account = isinstance(entity, TigerAccount)
    action = AuditAction.ACCOUNT_DELETE if is_account else AuditAction.API_KEY_DELETE
    old = _stored_values(mapper, connection, entity, _names(entity))
    if old:  # `old` is empty if another transaction has deleted the row
        _insert_event(connection, entity, action=action, old_values=_dump(entity, old))


def _names(entity: TigerAccount | APIKey) -> set[str]:
    """Return the names of the fields that an audit event can list."""
    return type(entity).model_fields.keys() - _OMITTED


def _stored_values(
    mapper: Mapper[Any], connection: Connection, entity: TigerAccount | APIKey, names: set[str]
) -> dict[str, object]:
    """Return the values of fields before the flush, or an empty dict if the row does not exist.

    In the code block of `with described(...)`, the values in the session are current, because the
    caller has locked the row. Outside the code block of `described`, the values are read from the
    database, and the row is locked. Fields that were not loaded, or whose values were changed in
    place, are always read from the database.
    """
    state = instance_state(entity)
    assert state.key is not None
    (stored_id,) = state.key[1]  # a caller may have assigned a new id to `entity.id`
    values: dict[str, object] = dict.fromkeys(names, NO_VALUE)
    if _FIELDS in state.info:
        values |= {name: state.dict[name] for name in names & state.dict.keys()}
        values |= {
            name: state.committed_state[name] for name in names & state.committed_state.keys()
        }
    unknown = [name for name in names if values[name] is NO_VALUE]
    if unknown:
        columns = mapper.local_table.c
        statement = select(*(columns[name] for name in unknown)).where(columns.id == stored_id)
        row = connection.execute(statement.with_for_update(key_share=True)).one_or_none()
        if row is None:
            return {}
        values |= zip(unknown, row, strict=True)
    return values


def is_equal(entity: type[TigerAccount | APIKey], name: str, old: object, new: object) -> bool:
    """Return whether two values of a field are equal in the database."""
    if isinstance(old, EncryptedSecret) and isinstance(new, EncryptedSecret):
        if old.ciphertext == new.ciphertext:
            return True
        try:
            bound = old.bound if old.aad else new.replaced_bound
            readable = EncryptedSecret(old.ciphertext, new.aad, new.provider, bound=bound)
            return readable.get_secret_value() == new.get_secret_value()
        except EncryptionError:
            return False
    equal: bool = inspect(entity).columns[name].type.compare_values(old, new)
    return equal


def _dump(entity: TigerAccount | APIKey, values: Mapping[str, object]) -> dict[str, JsonValue]:
    """Return values of fields as JSON, with masked secrets, and without the fields in _HIDDEN."""
    draft = object.__new__(type(entity))
    for slot in ("__pydantic_extra__", "__pydantic_private__"):
        object.__setattr__(draft, slot, None)
    object.__setattr__(draft, "__pydantic_fields_set__", set())
    object.__setattr__(draft, "__dict__", values)
    dumped: dict[str, JsonValue] = entity.__pydantic_serializer__.to_python(draft, mode="json")
    return dumped


def _insert_event(
    connection: Connection, entity: TigerAccount | APIKey, **derived: Unpack[EventFields]
) -> None:
    given: EventFields = instance_state(entity).info.get(_FIELDS, {})
    fields: EventFields = {**derived, **given}
    if isinstance(entity, TigerAccount):
        event = account_event(entity.id, **fields)
    else:
        event = api_key_event(entity.id, entity.tiger_account_id, **fields)
    session = object_session(entity)
    assert session is not None
    attribute(event, actor_of(session.info))
    connection.exec_driver_sql(INSERT, insert_values(event))


# Refusal of ORM bulk statements

_FUNCTIONS: Mapping[type[Any], Mapping[str, str]] = {
    TigerAccount: {
        "insert": "crud.accounts.create",
        "update": "crud.accounts.update",
        "delete": "crud.accounts.delete",
    },
    APIKey: {
        "insert": "crud.api_keys.create_api_key",
        "update": "crud.api_keys.update",
        "delete": "crud.api_keys.delete",
    },
}


@listens_for(Session, "do_orm_execute")
def _refuse_bulk_statement(execution: ORMExecuteState) -> None:
    """Refuse an ORM bulk statement on accounts or API keys, which would record no audit events.

    Raises:
        InvalidState: the statement would change accounts or API keys without audit events.
    """
    if execution.is_select:
        return
    if isinstance(execution.statement, Update):
        _refuse_bound_columns(execution.statement, execution.parameters)
    mapper = execution.bind_mapper
    if mapper is None or mapper.class_ not in _FUNCTIONS:
        return
    if RECORDED.items() <= execution.execution_options.items():
        return
    entity = mapper.class_
    kind = "insert" if execution.is_insert else "update" if execution.is_update else "delete"
    raise InvalidState(
        f"an ORM bulk {kind} of {entity.__name__} rows would record no audit events:"
        f" use {_FUNCTIONS[entity][kind]}"
    )


def _refuse_bound_columns(statement: Update, parameters: object) -> None:
    """Refuse an UPDATE of a column to which secrets are bound, which would make them unreadable.

    Raises:
        InvalidState: the statement changes such a column of accounts.
    """
    if statement.table is not inspect(TigerAccount).local_table:
        return
    rows: list[Mapping[str, object]] = (
        parameters
        if isinstance(parameters, list)
        else [cast("dict[str, object]", parameters or {})]
    )
    given = {*chain.from_iterable(rows)} | {
        getattr(column, "key", column)
        for column in statement._values or ()  # noqa: SLF001  # SQLAlchemy has no public attribute
    }
    if bound := sorted(TigerAccount.secrets_bound_to.keys() & given):
        raise InvalidState(
            f"the secrets of accounts are bound to {', '.join(bound)}, so an UPDATE would make the"
            " secrets unreadable: use crud.accounts.update, which encrypts them again"
        )

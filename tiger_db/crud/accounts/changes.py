"""Create accounts, change their fields, and choose the default accounts."""

from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import func, select
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.audit_logs import account_event, insert_event
from tiger_db.crud.common import fetch_one, get_or_raise, savepoint
from tiger_db.errors import InvalidState, InvalidValue
from tiger_db.models import AccountStatus, AuditAction, PrivateKeyFormat, TigerAccount

CLOSED_VALUES: Mapping[str, object] = {
    "auto_suspended": False,
    "private_key": None,
    "private_key_format": PrivateKeyFormat.UNKNOWN,
    "secret_key": None,
    "access_token": None,
    "refresh_token": None,
    "token_expires_at": None,
    "is_default_trading": False,
    "is_default_data": False,
}
_FIXED = {"id", "created_at", "updated_at", "auto_suspended"}


async def create(session: AsyncSession, account: TigerAccount) -> TigerAccount:
    """Store a new account. The expiry of its access token is read from the token, unless given.

    Raises:
        AlreadyExists: the account number is taken (`reopen` a closed account instead), or there is
            a default account already.
        ConfigurationError: there is no encryption key for its secrets.
        InvalidValue: the account is closed or `auto_suspended`.
    """
    if account.status == AccountStatus.CLOSED:
        raise InvalidValue("status: a new account cannot be closed")
    if account.auto_suspended:
        raise InvalidValue("auto_suspended: only `record_error` sets this")
    if account.access_token is not None:
        account.token_expires_at = account.check_not_stale(
            account.access_token.get_secret_value(), account.token_expires_at
        )
    async with savepoint(session):
        session.add(account)
    created = _event_values(account)
    event = account_event(account.id, action=AuditAction.ACCOUNT_CREATE, new_values=created)
    await insert_event(session, event)
    return account


async def update(session: AsyncSession, account_id: UUID, **changes: object) -> TigerAccount:
    """Change all given fields of an account, or none of them.

    The expiry of a new access token is read from the token, unless given. `reset_errors` does not
    lift a suspension that is set here.

    Raises:
        NotFound: there is no such account.
        InvalidValue: a field cannot be changed, or only by another function such as `close`.
        InvalidState: the account is closed, and the change would open it or store credentials: see
            `reopen`.
        StaleToken: the account has a newer access token.
        ValidationError: a field is unknown or its value is invalid.
        AlreadyExists: the account number is taken, or there is a default account already.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if fixed := sorted(_FIXED & changes.keys()):
        raise InvalidValue(f"{', '.join(fixed)} cannot be changed")
    values = account.validate_changes(changes)
    _check_closed(account, values)
    add_token_expiry(account, values)
    action = AuditAction.ACCOUNT_UPDATE
    if "status" in values:
        action = AuditAction.ACCOUNT_STATUS_CHANGE
        values["auto_suspended"] = False
    async with savepoint(session, account):
        await apply_change(session, account, values, action=action, given=changes)
    return account


async def set_default_trading_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Make an account the only default account for trading.

    Raises:
        NotFound: there is no such account.
        InvalidState: the account is closed.
    """
    return await _set_default(session, account_id, "is_default_trading")


async def set_default_data_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Make an account the only default account for data.

    Raises:
        NotFound: there is no such account.
        InvalidState: the account is closed.
    """
    return await _set_default(session, account_id, "is_default_data")


async def apply_change(
    session: AsyncSession,
    account: TigerAccount,
    values: Mapping[str, object],
    *,
    action: AuditAction,
    given: Iterable[str] = (),
    details: Mapping[str, object] | None = None,
) -> None:
    """Assign values to an account, flush, and record the event with the old and new values.

    The event has the fields that changed. It also has those in `given`, because two masked secrets
    look the same.
    """
    old = _event_values(account)
    account.sqlmodel_update({**values})
    await session.flush()
    new = _event_values(account)
    names = [name for name in new if new[name] != old[name] or name in {*given}]
    event = account_event(
        account.id,
        action=action,
        old_values={name: old[name] for name in names},
        new_values={name: new[name] for name in names},
        details=details,
    )
    await insert_event(session, event)


def add_token_expiry(account: TigerAccount, values: dict[str, Any]) -> None:
    """Add the expiry of a new access token to the validated values of a change.

    Raises:
        StaleToken: the account has a newer token.
    """
    if values.get("access_token") is not None:
        values["token_expires_at"] = account.check_not_stale(
            values["access_token"].get_secret_value(), values.get("token_expires_at")
        )


def refuse_closed(account: TigerAccount) -> None:
    """Raise InvalidState if an account is closed."""
    if account.status == AccountStatus.CLOSED:
        raise InvalidState("the account is closed")


def _event_values(account: TigerAccount) -> dict[str, JsonValue]:
    """Return the values of an account for its audit events; secrets are masked."""
    return account.model_dump(mode="json", exclude={"created_at", "updated_at", "token_refresh_at"})


def _check_closed(account: TigerAccount, values: Mapping[str, object]) -> None:
    closes = values.get("status", account.status) == AccountStatus.CLOSED
    if account.status != AccountStatus.CLOSED:
        if closes:
            raise InvalidValue("status: use `close`, which also revokes the API keys")
    elif not closes or any(values.get(name, old) != old for name, old in CLOSED_VALUES.items()):
        raise InvalidState("the account is closed: use `reopen`, which stores new credentials")


async def _set_default(session: AsyncSession, account_id: UUID, column: str) -> TigerAccount:
    # The lock serializes the calls, so that each sees the committed default. Both columns share the
    # lock: two calls that swap their accounts would deadlock.
    lock = func.concat("set_default", func.nullif(func.current_schema(), "public"))
    await session.execute(select(func.pg_advisory_xact_lock(func.hashtext(lock))))
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    refuse_closed(account)
    if getattr(account, column):
        return account
    is_default = col(getattr(TigerAccount, column))
    replaced = await fetch_one(
        session,
        sql_update(TigerAccount)
        .where(is_default, col(TigerAccount.id) != account_id)
        .values({column: False})
        .returning(TigerAccount),
    )
    account.sqlmodel_update({column: True})
    await session.flush()
    for changed in filter(None, (replaced, account)):
        event = account_event(
            changed.id,
            action=AuditAction.ACCOUNT_SET_DEFAULT,
            old_values={column: str(replaced.id) if replaced else None},
            new_values={column: str(account.id)},
        )
        await insert_event(session, event)
    return account

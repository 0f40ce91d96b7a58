"""Create accounts, change their fields, and choose the default accounts."""

from collections.abc import Mapping
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud import audit_logs
from tiger_db.crud.accounts.closing import CLOSED_VALUES, refuse_closed
from tiger_db.crud.accounts.tokens import add_token_expiry
from tiger_db.crud.common import fetch_one, get_or_raise, savepoint
from tiger_db.errors import InvalidState, InvalidValue
from tiger_db.models import AccountStatus, AuditAction, TigerAccount

_FIXED = {"id", "created_at", "updated_at", "auto_suspended"}


async def create(session: AsyncSession, account: TigerAccount) -> TigerAccount:
    """Store a new account. If no expiry of its access token is given, it is read from the token.

    Raises:
        AlreadyExists: the account number is taken (`reopen` a closed account instead), or there is
            a default account already.
        ConfigurationError: there is no encryption key for its secrets.
        InvalidValue: the account is closed or `auto_suspended`.
    """
    if account.status == AccountStatus.CLOSED:
        raise InvalidValue("status: an account is closed by `close`, not created so")
    if account.auto_suspended:
        raise InvalidValue("auto_suspended: an account is suspended so by `record_error` alone")
    if account.access_token is not None:
        account.token_expires_at = account.check_not_stale(
            account.access_token.get_secret_value(), account.token_expires_at
        )
    async with savepoint(session):
        session.add(account)
    event = audit_logs.account_event(
        account.id, action=AuditAction.ACCOUNT_CREATE, new_values=audit_logs.account_values(account)
    )
    await audit_logs.insert_event(session, event)
    return account


async def update(session: AsyncSession, account_id: UUID, **changes: object) -> TigerAccount:
    """Change all given fields of an account, or none of them.

    If no expiry of a new access token is given, it is read from the token. `reset_errors` does not
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
    before = audit_logs.account_values(account)
    values = account.validate_changes(changes)
    _check_closed(account, values)
    add_token_expiry(account, values)
    if "status" in values:
        values["auto_suspended"] = False
    async with savepoint(session, account):
        account.sqlmodel_update(values)
    action = (
        AuditAction.ACCOUNT_STATUS_CHANGE if "status" in changes else AuditAction.ACCOUNT_UPDATE
    )
    await audit_logs.insert_event(
        session, audit_logs.account_change_event(account, before, changes, action=action)
    )
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


def _check_closed(account: TigerAccount, values: Mapping[str, object]) -> None:
    closes = values.get("status", account.status) == AccountStatus.CLOSED
    if account.status != AccountStatus.CLOSED:
        if closes:
            raise InvalidValue("status: an account is closed by `close`, which ends its keys too")
    elif not closes or any(values.get(name, old) != old for name, old in CLOSED_VALUES.items()):
        raise InvalidState("the account is closed: `reopen` gives it credentials again")


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
        event = audit_logs.account_event(
            changed.id,
            action=AuditAction.ACCOUNT_SET_DEFAULT,
            old_values={column: str(replaced.id) if replaced else None},
            new_values={column: str(account.id)},
        )
        await audit_logs.insert_event(session, event)
    return account

"""Storing accounts, changing their fields, and choosing the defaults."""

from collections.abc import Mapping
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.accounts.events import ENDED, log, log_change, refuse_closed, shown
from tiger_db.crud.common import fetch_one, get_or_raise, savepoint
from tiger_db.errors import InvalidState, InvalidValue
from tiger_db.models import AccountStatus, AuditAction, TigerAccount

_FIXED = {"id", "created_at", "updated_at", "auto_suspended"}


async def create(session: AsyncSession, account: TigerAccount) -> TigerAccount:
    """Store a new account. A token's expiry is read out of it where none is given.

    Raises:
        AlreadyExists: the account number is taken (if by a closed account, `reopen` that), or
            another account is the default already.
        ConfigurationError: there is no encryption key to seal its secrets with.
        InvalidValue: it is closed, or `auto_suspended`, which only `record_error` makes it.
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
    await log(session, AuditAction.ACCOUNT_CREATE, account, new=shown(account))
    return account


async def update(session: AsyncSession, account_id: UUID, **changes: object) -> TigerAccount:
    """Change fields of an account: all of those given, or none.

    A new access token's expiry is read out of it where none is given. A status that is set here is
    a person's: `reset_errors` does not lift a suspension.

    Raises:
        NotFound: there is no such account.
        InvalidValue: a field cannot be changed, or only by another function: `close`.
        InvalidState: the account is closed and would be open, or have credentials: see `reopen`.
        StaleToken: the account has a newer access token.
        ValidationError: a field is unknown or its value refused.
        AlreadyExists: the account number is taken, or another account is the default already.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if fixed := sorted(_FIXED & changes.keys()):
        raise InvalidValue(f"{', '.join(fixed)} cannot be changed")
    before = shown(account)
    values = account.validate_changes(changes)
    _check_closed(account, values)
    if values.get("access_token") is not None:
        values["token_expires_at"] = account.check_not_stale(
            values["access_token"].get_secret_value(), values.get("token_expires_at")
        )
    if "status" in values:
        values["auto_suspended"] = False
    async with savepoint(session, account):
        account.sqlmodel_update(values)
    action = (
        AuditAction.ACCOUNT_STATUS_CHANGE if "status" in changes else AuditAction.ACCOUNT_UPDATE
    )
    await log_change(session, action, account, before=before, named=changes)
    return account


async def set_default_trading_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Make an account the default for trading, in place of the one that was, if it is not yet.

    Raises:
        NotFound: there is no such account.
        InvalidState: it is closed.
    """
    return await _set_default(session, account_id, "is_default_trading")


async def set_default_data_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Make an account the default for data, in place of the one that was, if it is not yet.

    Raises:
        NotFound: there is no such account.
        InvalidState: it is closed.
    """
    return await _set_default(session, account_id, "is_default_data")


def _check_closed(account: TigerAccount, values: Mapping[str, object]) -> None:
    closes = values.get("status", account.status) == AccountStatus.CLOSED
    if account.status != AccountStatus.CLOSED:
        if closes:
            raise InvalidValue("status: an account is closed by `close`, which ends its keys too")
    elif not closes or any(values.get(name, ended) != ended for name, ended in ENDED.items()):
        raise InvalidState("the account is closed: `reopen` gives it credentials again")


async def _set_default(session: AsyncSession, account_id: UUID, column: str) -> TigerAccount:
    # One at a time, so that each sees the default that the one before it has committed; for both
    # kinds, because two accounts that swap theirs would wait for each other.
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
    old = {column: str(replaced.id) if replaced else None}
    new = {column: str(account.id)}
    for concerned in filter(None, (replaced, account)):
        await log(session, AuditAction.ACCOUNT_SET_DEFAULT, concerned, old=old, new=new)
    return account

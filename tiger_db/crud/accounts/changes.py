"""Functions that create accounts, change accounts, and set the default accounts."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, TypedDict, Unpack
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.audit_logs.recording import EventFields
from tiger_db.crud.change_events import apply_change, reason_details
from tiger_db.crud.common import fetch_one, get_or_raise, savepoint
from tiger_db.encryption import Secret
from tiger_db.errors import InvalidState, InvalidValue
from tiger_db.models import (
    AccountStatus,
    AccountType,
    AuditAction,
    MarketPermission,
    PrivateKeyFormat,
    QuotePermission,
    TigerAccount,
    TigerEnvironment,
    TigerLicense,
)
from tiger_db.public import public

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
FIXED_FIELDS = {"id", "created_at", "updated_at", "auto_suspended"}


class AccountChanges(TypedDict, total=False):
    """The fields of an account that `update` can change."""

    account_name: str
    account_number: str
    account_type: AccountType
    status: AccountStatus
    tiger_id: str | Secret
    private_key: str | Secret
    private_key_format: PrivateKeyFormat
    secret_key: str | Secret | None
    license: TigerLicense | None
    environment: TigerEnvironment
    server_url: str | None
    access_token: str | Secret | None
    refresh_token: str | Secret | None
    token_expires_at: datetime | None
    token_refresh_at: datetime | None
    is_default_trading: bool
    is_default_data: bool
    market_permissions: Iterable[MarketPermission]
    quote_permissions: Iterable[QuotePermission]
    client_options: Mapping[str, JsonValue]
    error_count: int
    last_error: str | None
    last_error_at: datetime | None
    failing_until: datetime | None
    description: str | None
    tags: Mapping[str, JsonValue]


@public
async def create(session: AsyncSession, account: TigerAccount) -> TigerAccount:
    """Store a new account. If `token_expires_at` is None, read the expiry from the access token.

    Raises:
        AlreadyExists: another account has the same account number, or the same default flag
            (`is_default_trading` or `is_default_data`). To use the number of a closed account, call
            `reopen`.
        ConfigurationError: ENCRYPTION_KEYS is not set, so secrets cannot be encrypted.
        InvalidValue: the status of the new account is closed, or `auto_suspended` is true.
    """
    if account.status == AccountStatus.CLOSED:
        raise InvalidValue("status: a new account cannot have the status closed")
    if account.auto_suspended:
        raise InvalidValue("auto_suspended: only `record_error` can set auto_suspended")
    if account.access_token is not None:
        account.token_expires_at = account.check_not_stale(
            account.access_token.get_secret_value(), account.token_expires_at
        )
    async with savepoint(session):
        session.add(account)
    return account


@public
async def update(
    session: AsyncSession,
    account_id: UUID,
    *,
    reason: str | None = None,
    **changes: Unpack[AccountChanges],
) -> TigerAccount:
    """Change fields of an account. If one change is invalid, no field is changed.

    An audit event is recorded only if a field gets a new value. The details of the audit
    event contain `reason`. If `access_token` is given without `token_expires_at`, the expiry is
    read from the token. `reset_errors` does not activate an account that `update` has suspended.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidValue: a given field is read-only, or the new status is closed. To close an account,
            call `close`.
        InvalidState: the account is closed, and a change concerns the status, the credentials or
            a default flag. To change the status of a closed account, call `reopen`.
        StaleToken: the stored access token is newer than the given access token.
        InvalidFields: the name of a given field is unknown, or a given value is invalid.
        AlreadyExists: another account has the same account number, or the same default flag
            (`is_default_trading` or `is_default_data`).
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if fixed := sorted(FIXED_FIELDS & changes.keys()):
        raise InvalidValue(f"{', '.join(fixed)} cannot be changed")
    values = account.validate_changes(changes)
    _check_closed(account, values)
    add_token_expiry(account, values)
    action = AuditAction.ACCOUNT_UPDATE
    if "status" in values:
        action = AuditAction.ACCOUNT_STATUS_CHANGE
        values["auto_suspended"] = False
    async with savepoint(session, account):
        await apply_change(
            session,
            account,
            values,
            action=action,
            given=[*changes],
            details=reason_details(reason),
        )
    return account


@public
async def add_market_permission(
    session: AsyncSession, account_id: UUID, permission: MarketPermission
) -> TigerAccount:
    """Allow an account to trade in a market.

    If the account already has the permission, nothing is changed.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidFields: `permission` is not a MarketPermission.
    """
    return await _set_market_permission(session, account_id, permission, allowed=True)


@public
async def remove_market_permission(
    session: AsyncSession, account_id: UUID, permission: MarketPermission
) -> TigerAccount:
    """Forbid an account to trade in a market.

    If the account does not have the permission, nothing is changed.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidFields: `permission` is not a MarketPermission.
    """
    return await _set_market_permission(session, account_id, permission, allowed=False)


@public
async def set_default_trading_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Make an account the only default account for trading.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidState: the account is closed.
    """
    return await _set_default(session, account_id, "is_default_trading")


@public
async def set_default_data_account(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Make an account the only default account for market data.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidState: the account is closed.
    """
    return await _set_default(session, account_id, "is_default_data")


def add_token_expiry(account: TigerAccount, values: dict[str, Any]) -> None:
    """If `values` contain an access token, add the expiry of the token to `values`.

    Raises:
        StaleToken: the stored access token is newer than the token in `values`.
    """
    if values.get("access_token") is not None:
        values["token_expires_at"] = account.check_not_stale(
            values["access_token"].get_secret_value(), values.get("token_expires_at")
        )


def refuse_closed(account: TigerAccount) -> None:
    """Raise InvalidState if an account is closed."""
    if account.status == AccountStatus.CLOSED:
        raise InvalidState("the account is closed")


def _check_closed(account: TigerAccount, values: Mapping[str, object]) -> None:
    closes = values.get("status", account.status) == AccountStatus.CLOSED
    if account.status != AccountStatus.CLOSED:
        if closes:
            raise InvalidValue(
                "status cannot be set to closed: use `close`, which also revokes the API keys"
            )
    elif not closes or any(values.get(name, old) != old for name, old in CLOSED_VALUES.items()):
        raise InvalidState("the account is closed: use `reopen`, which stores new credentials")


async def _set_market_permission(
    session: AsyncSession, account_id: UUID, permission: MarketPermission, *, allowed: bool
) -> TigerAccount:
    # The row lock serializes changes of an account's permissions, so that no change is lost.
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    held = account.market_permissions
    if (permission in held) != allowed:
        others = [market for market in held if market != permission]
        values = {"market_permissions": [*others, permission] if allowed else others}
        await apply_change(session, account, values, action=AuditAction.ACCOUNT_UPDATE)
    return account


async def _set_default(session: AsyncSession, account_id: UUID, column: str) -> TigerAccount:
    # An advisory lock serializes changes of default accounts, so that each change reads the
    # committed default account. The columns is_default_trading and is_default_data share one lock,
    # because two changes could deadlock if each column had its own lock.
    lock = func.concat("set_default", func.nullif(func.current_schema(), "public"))
    await session.execute(select(func.pg_advisory_xact_lock(func.hashtext(lock))))
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    refuse_closed(account)
    if getattr(account, column):
        return account
    default = select(TigerAccount).where(col(getattr(TigerAccount, column)))
    replaced = await fetch_one(session, default.with_for_update(key_share=True))
    event = EventFields(
        action=AuditAction.ACCOUNT_SET_DEFAULT,
        old_values={column: str(replaced.id) if replaced else None},
        new_values={column: str(account.id)},
    )
    if replaced is not None:
        await apply_change(session, replaced, {column: False}, **event)
    await apply_change(session, account, {column: True}, **event)
    return account

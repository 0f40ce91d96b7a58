"""What happens to an account while it is used: new tokens, errors, and successes after them."""

from datetime import datetime, timedelta
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import func, select
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.accounts.events import log, log_change, refuse_closed, shown
from tiger_db.crud.common import fetch_one, get_or_raise, replace_unstorable
from tiger_db.errors import InvalidValue, NotFound
from tiger_db.models import AccountStatus, AuditAction, AuditLog, AuditSeverity, TigerAccount
from tiger_db.models.base import readable_secrets
from tiger_db.redaction import redact_aggressively


async def update_tokens(
    session: AsyncSession,
    account_id: UUID,
    *,
    access_token: str,
    refresh_token: str | None = None,
    token_expires_at: datetime | None = None,
    refresh_id: UUID | None = None,
) -> TigerAccount:
    """Replace an account's access token; the refresh token stays where none is given.

    `token_expires_at` is an aware datetime. None: it is read out of a token in Tiger's format; that
    of any other is unknown, and then the token is never due for a refresh. `refresh_id` is that of
    the refresh that brought it, though the claim was lost: if the account was suspended meanwhile
    because that refresh was refused, it is active again.

    Raises:
        NotFound: there is no such account.
        InvalidState: it is closed.
        StaleToken: it has a newer token (see `TigerAccount.check_not_stale`); nothing has changed.
        ValidationError: a value is refused; nothing has changed.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    refuse_closed(account)
    changes: dict[str, object] = {
        "access_token": access_token,
        "token_expires_at": token_expires_at,
    }
    if refresh_token is not None:
        changes["refresh_token"] = refresh_token
    account.validate_changes(changes)
    changes["token_expires_at"] = account.check_not_stale(access_token, token_expires_at)
    before = shown(account)
    account.sqlmodel_update(changes)
    await session.flush()
    await log_change(session, AuditAction.TOKEN_UPDATE, account, before=before, named=changes)
    if refresh_id is not None and await _is_suspended_by(session, account, refresh_id):
        account.status = AccountStatus.ACTIVE
        await session.flush()
        await log(
            session,
            AuditAction.ACCOUNT_STATUS_CHANGE,
            account,
            old={"status": AccountStatus.SUSPENDED.value},
            new={"status": AccountStatus.ACTIVE.value},
            details={"reason": "the answer that was missed has come", "refresh": str(refresh_id)},
        )
    return account


async def _is_suspended_by(session: AsyncSession, account: TigerAccount, refresh_id: UUID) -> bool:
    """Whether the last that was done to its status is a suspension by a refresh, lately."""
    if account.status != AccountStatus.SUSPENDED:
        return False
    last = await fetch_one(
        session,
        select(AuditLog)
        .where(
            col(AuditLog.tiger_account_id) == account.id,
            col(AuditLog.action) == AuditAction.ACCOUNT_STATUS_CHANGE,
            col(AuditLog.created_at) > func.now() - timedelta(days=1),
        )
        .order_by(col(AuditLog.position).desc())
        .limit(1),
    )
    return last is not None and (last.details or {}).get("refresh") == str(refresh_id)


async def record_error(
    session: AsyncSession, account_id: UUID, *, message: str, suspend_after: int = 10
) -> TigerAccount:
    """Count one more error of an account, in the database: parallel ones are all counted.

    Of the message, tokens, keys and the account's own secrets are masked before it is stored. With
    `suspend_after` consecutive errors an active account is suspended, until `reset_errors`.

    Raises:
        NotFound: there is no such account.
        InvalidValue: `suspend_after` is not positive.
    """
    if suspend_after < 1:
        raise InvalidValue("suspend_after must be positive")
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    old: dict[str, JsonValue] = {"error_count": account.error_count}
    text = replace_unstorable(redact_aggressively(message, *readable_secrets(account)))
    suspended = account.status == AccountStatus.ACTIVE and account.error_count + 1 >= suspend_after
    values: dict[str, object] = {
        "error_count": col(TigerAccount.error_count) + 1,
        "last_error": text,
        "last_error_at": func.now(),
    }
    if suspended:
        values |= {"status": AccountStatus.SUSPENDED, "auto_suspended": True}
    changed = await fetch_one(
        session,
        sql_update(TigerAccount)
        .where(col(TigerAccount.id) == account_id)
        .values(**values)
        .returning(TigerAccount),
    )
    if changed is None:
        raise NotFound(f"there is no TigerAccount {account_id}")
    new: dict[str, JsonValue] = {"error_count": changed.error_count}
    await log(session, AuditAction.ACCOUNT_ERROR, changed, old=old, new=new, error_message=text)
    if suspended:
        await log(
            session,
            AuditAction.ACCOUNT_STATUS_CHANGE,
            changed,
            old={"status": AccountStatus.ACTIVE.value, "auto_suspended": False},
            new={"status": AccountStatus.SUSPENDED.value, "auto_suspended": True},
            details={"reason": f"{changed.error_count} consecutive errors"},
            severity=AuditSeverity.HIGH,
        )
    return changed


async def reset_errors(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Set the error count back to zero after a success, and lift a suspension by `record_error`.

    A suspension that a person has made stays.

    Raises:
        NotFound: there is no such account.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    changes: dict[str, object] = {"error_count": 0, "last_error": None, "last_error_at": None}
    if account.auto_suspended:
        changes |= {"status": AccountStatus.ACTIVE, "auto_suspended": False}
    elif account.error_count == 0 and account.last_error is None:
        return account
    before = shown(account)
    account.sqlmodel_update(changes)
    await session.flush()
    await log_change(session, AuditAction.ACCOUNT_RESET_ERRORS, account, before=before)
    return account

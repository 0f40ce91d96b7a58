"""Store the access tokens of accounts."""

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.accounts.changes import add_token_expiry, apply_change, refuse_closed
from tiger_db.crud.common import fetch_one, get_or_raise
from tiger_db.models import AccountStatus, AuditAction, AuditLog, TigerAccount


async def update_tokens(
    session: AsyncSession,
    account_id: UUID,
    *,
    access_token: str,
    refresh_token: str | None = None,
    token_expires_at: datetime | None = None,
    refresh_id: UUID | None = None,
) -> TigerAccount:
    """Replace the access token of an account, and its refresh token if one is given.

    `token_expires_at` is an aware datetime. If it is None, the expiry is read from a token in
    Tiger's format; for other tokens it is unknown, and they are never due for a refresh.

    `refresh_id` is the refresh that returned the token after its claim was lost. If that refresh
    has suspended the account within the last day, the account is activated again.

    Raises:
        NotFound: there is no such account.
        InvalidState: the account is closed.
        StaleToken: the account has a newer token; nothing has changed.
        ValidationError: a value is invalid; nothing has changed.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    refuse_closed(account)
    given = {"access_token": access_token, "token_expires_at": token_expires_at}
    if refresh_token is not None:
        given["refresh_token"] = refresh_token
    values = account.validate_changes(given)
    add_token_expiry(account, values)
    await apply_change(session, account, values, action=AuditAction.TOKEN_UPDATE, given=given)
    if refresh_id is not None and await _is_suspended_by(session, account, refresh_id):
        await apply_change(
            session,
            account,
            {"status": AccountStatus.ACTIVE},
            action=AuditAction.ACCOUNT_STATUS_CHANGE,
            details={"reason": "its refresh returned a token late", "refresh": str(refresh_id)},
        )
    return account


async def _is_suspended_by(session: AsyncSession, account: TigerAccount, refresh_id: UUID) -> bool:
    """Return whether the last change of the account's status is a suspension by this refresh."""
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

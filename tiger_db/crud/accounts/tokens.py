"""A function that stores new access tokens of accounts."""

from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.accounts.changes import add_token_expiry, refuse_closed
from tiger_db.crud.change_events import apply_change
from tiger_db.crud.common import fetch_one, get_or_raise
from tiger_db.models import AccountStatus, AuditAction, AuditLog, TigerAccount
from tiger_db.public import public


@public
async def update_tokens(
    session: AsyncSession,
    account_id: UUID,
    *,
    access_token: str,
    refresh_token: str | None = None,
    token_expires_at: datetime | None = None,
    refresh_id: UUID | None = None,
) -> TigerAccount:
    """Replace the access token of an account, and the refresh token if `refresh_token` is given.

    `token_expires_at` is an aware datetime. If `token_expires_at` is None, the expiry is read from
    `access_token`, provided that `access_token` is in Tiger's format. A token with an unknown
    expiry is never due for a refresh.

    `refresh_id` is the id of a refresh whose claim was lost before the broker returned the token.
    If the refresh with the id `refresh_id` suspended the account within the last day, the account
    is activated again. If `update_tokens` raises an error, the account is not changed.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidState: the account is closed.
        StaleToken: the stored access token is newer than `access_token`.
        InvalidFields: a given token or expiry is invalid.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    refuse_closed(account)
    given = {"access_token": access_token, "token_expires_at": token_expires_at}
    if refresh_token is not None:
        given["refresh_token"] = refresh_token
    values = account.validate_changes(given)
    add_token_expiry(account, values)
    await apply_change(session, account, values, action=AuditAction.TOKEN_UPDATE, given=[*given])
    if refresh_id is not None and await _is_suspended_by(session, account, refresh_id):
        await apply_change(
            session,
            account,
            {"status": AccountStatus.ACTIVE},
            action=AuditAction.ACCOUNT_STATUS_CHANGE,
            details={"reason": "the refresh returned a token late", "refresh": str(refresh_id)},
        )
    return account


async def _is_suspended_by(session: AsyncSession, account: TigerAccount, refresh_id: UUID) -> bool:
    """Return whether the account is suspended because of the given refresh."""
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

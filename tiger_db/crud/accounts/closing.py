"""Closing accounts, and opening them again."""

from typing import TypeVar
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import ColumnElement, func, select
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud import audit_logs
from tiger_db.crud.accounts.events import ENDED, log_change, shown
from tiger_db.crud.common import fetch_all, get_or_raise
from tiger_db.errors import InvalidState
from tiger_db.models import (
    AccountStatus,
    APIKey,
    APIKeyStatus,
    AuditAction,
    AuditLog,
    PrivateKeyFormat,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
)
from tiger_db.models.token_status import OPEN_STATUSES

_REASON = "the account was closed"
E_ = TypeVar("E_", APIKey, TokenStatus)


async def close(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Close an account: credentials destroyed, keys revoked, open refreshes cancelled, no default.

    Its row stays, with its number and tiger_id, and so does its audit trail. The ciphertexts are
    gone from the row at once, from the table's files with the next VACUUM, and from backups when
    those are. Closing a closed account changes nothing.

    Raises:
        NotFound: there is no such account.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if account.status == AccountStatus.CLOSED:
        return account
    before = shown(account)
    account.sqlmodel_update({"status": AccountStatus.CLOSED, **ENDED})
    await session.flush()
    revoked = await _revoke_keys(session, account)
    cancelled = await _cancel_refreshes(session, account)
    details: dict[str, JsonValue] = {
        "revoked_api_keys": [key.key_prefix for key in revoked],
        "cancelled_refreshes": [str(refresh.id) for refresh in cancelled],
    }
    await log_change(session, AuditAction.ACCOUNT_CLOSE, account, before=before, details=details)
    return account


async def reopen(
    session: AsyncSession,
    account_id: UUID,
    *,
    private_key: str,
    private_key_format: PrivateKeyFormat = PrivateKeyFormat.UNKNOWN,
    secret_key: str | None = None,
) -> TigerAccount:
    """Open a closed account again, with new credentials. Its revoked API keys stay revoked.

    Raises:
        NotFound: there is no such account.
        InvalidState: it is not closed.
        ValidationError: a value is refused; nothing has changed.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if account.status != AccountStatus.CLOSED:
        raise InvalidState("only a closed account can be reopened")
    before = shown(account)
    account.sqlmodel_update(
        {
            "status": AccountStatus.ACTIVE,
            "private_key": private_key,
            "private_key_format": private_key_format,
            "secret_key": secret_key,
            "error_count": 0,
            "last_error": None,
            "last_error_at": None,
        }
    )
    await session.flush()
    await log_change(session, AuditAction.ACCOUNT_REOPEN, account, before=before)
    return account


async def _revoke_keys(session: AsyncSession, account: TigerAccount) -> list[APIKey]:
    ended = await _end(
        session,
        APIKey,
        col(APIKey.tiger_account_id) == account.id,
        col(APIKey.status) != APIKeyStatus.REVOKED,
        status=APIKeyStatus.REVOKED,
        revoked_at=func.now(),
        revocation_reason=_REASON,
    )
    await audit_logs.log_events(
        session,
        [
            AuditLog(
                action=AuditAction.API_KEY_REVOKE,
                resource_type="api_key",
                resource_id=str(key.id),
                api_key_id=key.id,
                tiger_account_id=account.id,
                old_values={"status": old},
                new_values={"status": key.status.value, "revocation_reason": _REASON},
            )
            for key, old in ended
        ],
    )
    return [key for key, _ in ended]


async def _cancel_refreshes(session: AsyncSession, account: TigerAccount) -> list[TokenStatus]:
    ended = await _end(
        session,
        TokenStatus,
        col(TokenStatus.tiger_account_id) == account.id,
        col(TokenStatus.status).in_(OPEN_STATUSES),
        status=TokenRefreshStatus.CANCELLED,
        completed_at=func.now(),
        lease_expires_at=None,
    )
    await audit_logs.log_events(
        session,
        [
            AuditLog(
                action=AuditAction.TOKEN_REFRESH_CANCEL,
                resource_type="token_status",
                resource_id=str(refresh.id),
                tiger_account_id=account.id,
                old_values={"status": old},
                new_values={"status": refresh.status.value},
                details={"reason": _REASON},
            )
            for refresh, old in ended
        ],
    )
    return [refresh for refresh, _ in ended]


async def _end(
    session: AsyncSession, entity: type[E_], *criteria: ColumnElement[bool], **values: object
) -> list[tuple[E_, str]]:
    """Change the rows that meet the criteria; with each, the status that it had."""
    rows = await fetch_all(session, select(entity).where(*criteria).with_for_update(key_share=True))
    old = {row.id: row.status.value for row in rows}
    changed = await fetch_all(
        session,
        sql_update(entity).where(col(entity.id).in_(old)).values(**values).returning(entity),
    )
    return [(row, old[row.id]) for row in changed]

"""Functions that close, reopen and delete accounts."""

from collections.abc import Iterable
from typing import TypeVar
from uuid import UUID

from sqlalchemy import ColumnElement, case, exists, func, select
from sqlalchemy import delete as sql_delete
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.accounts.changes import CLOSED_VALUES
from tiger_db.crud.api_key_codes import optional_peppers, renewed_code, signed_values
from tiger_db.crud.audit_logs.recording import api_key_event, log_events, refresh_event
from tiger_db.crud.change_events import RECORDED, apply_change, described, reason_details
from tiger_db.crud.common import fetch_all, get_or_raise, savepoint
from tiger_db.errors import InvalidState
from tiger_db.models import (
    AccountStatus,
    APIKey,
    APIKeyStatus,
    AuditAction,
    PrivateKeyFormat,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
)
from tiger_db.models.token_status import OPEN_STATUSES
from tiger_db.public import public

_REASON = "the account was closed"
_DELETED = "the account was deleted"
E_ = TypeVar("E_", APIKey, TokenStatus)


@public
async def close(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Close an account: delete its credentials, revoke its API keys and cancel its open refreshes.

    A closed account cannot be a default account. The account number, the tiger_id and the audit
    trail of the account are kept. Encrypted secrets are removed from the account's row at once. The
    next VACUUM removes the secrets from the table's files. Older backups of the database still
    contain the secrets. If the account is already closed, `close` changes nothing.

    Raises:
        NotFound: no account has the id `account_id`.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if account.status == AccountStatus.CLOSED:
        return account
    unrevoked = await _lock(
        session,
        APIKey,
        col(APIKey.tiger_account_id) == account.id,
        col(APIKey.status) != APIKeyStatus.REVOKED,
    )
    keys = await _end(
        session,
        APIKey,
        unrevoked,
        status=APIKeyStatus.REVOKED,
        revoked_at=func.now(),
        revocation_reason=_REASON,
        mac=_codes_of_revoked(session, unrevoked),
    )
    unfinished = await _lock(
        session,
        TokenStatus,
        col(TokenStatus.tiger_account_id) == account.id,
        col(TokenStatus.status).in_(OPEN_STATUSES),
    )
    refreshes = await _end(
        session,
        TokenStatus,
        unfinished,
        status=TokenRefreshStatus.CANCELLED,
        completed_at=func.now(),
        lease_expires_at=None,
    )
    events = [
        api_key_event(
            key.id,
            account.id,
            action=AuditAction.API_KEY_REVOKE,
            old_values={"status": old_status},
            new_values={"status": key.status, "revocation_reason": _REASON},
        )
        for key, old_status in keys
    ] + [
        refresh_event(
            refresh,
            action=AuditAction.TOKEN_REFRESH_CANCEL,
            old_values={"status": old_status},
            new_values={"status": refresh.status},
            details={"reason": _REASON},
        )
        for refresh, old_status in refreshes
    ]
    await log_events(session, events)
    await apply_change(
        session,
        account,
        {"status": AccountStatus.CLOSED, **CLOSED_VALUES},
        action=AuditAction.ACCOUNT_CLOSE,
        details={
            "revoked_api_keys": [key.key_prefix for key, _ in keys],
            "cancelled_refreshes": [str(refresh.id) for refresh, _ in refreshes],
        },
    )
    return account


@public
async def reopen(
    session: AsyncSession,
    account_id: UUID,
    *,
    private_key: str,
    private_key_format: PrivateKeyFormat = PrivateKeyFormat.UNKNOWN,
    secret_key: str | None = None,
) -> TigerAccount:
    """Activate a closed account with new credentials. The account's revoked API keys stay revoked.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidState: the account is not closed.
        InvalidFields: a given credential is invalid, so the account stays closed.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    if account.status != AccountStatus.CLOSED:
        raise InvalidState("only a closed account can be reopened")
    values: dict[str, object] = {
        "status": AccountStatus.ACTIVE,
        "private_key": private_key,
        "private_key_format": private_key_format,
        "secret_key": secret_key,
        "error_count": 0,
        "last_error": None,
        "last_error_at": None,
        "failing_until": None,
    }
    await apply_change(session, account, values, action=AuditAction.ACCOUNT_REOPEN)
    return account


@public
async def delete(session: AsyncSession, account_id: UUID, *, reason: str | None = None) -> None:
    """Delete an account permanently, with its API keys and refreshes.

    An account with API keys or an open refresh must be closed before it is deleted. For the account
    and each deleted API key, an audit event records the last values of the row. The details of the
    account's audit event contain `reason`. Earlier audit events of the account stay unchanged.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidState: the account is not closed, and has API keys or an open refresh.
        MissingReference: rows of another table refer to the account.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    keys = await fetch_all(
        session,
        select(APIKey)
        .where(col(APIKey.tiger_account_id) == account_id)
        .order_by(col(APIKey.id))
        .with_for_update(),
    )
    of_account = col(TokenStatus.tiger_account_id) == account_id
    if account.status != AccountStatus.CLOSED:
        is_open = col(TokenStatus.status).in_(OPEN_STATUSES)
        if keys or await session.scalar(select(exists().where(of_account, is_open))):
            raise InvalidState(
                "an account with API keys or an open refresh must be closed before the deletion"
            )
    async with savepoint(session):
        for key in keys:
            with described(
                key, action=AuditAction.API_KEY_DELETE, details=reason_details(_DELETED)
            ):
                await session.delete(key)
                await session.flush()
        deleted = await session.execute(
            sql_delete(TokenStatus).where(of_account).returning(col(TokenStatus.id))
        )
        details = {
            **(reason_details(reason) or {}),
            "deleted_api_keys": [key.key_prefix for key in keys],
            "deleted_refreshes": len(deleted.all()),
        }
        with described(account, action=AuditAction.ACCOUNT_DELETE, details=details):
            await session.delete(account)
            await session.flush()


async def _lock(
    session: AsyncSession, entity: type[E_], *criteria: ColumnElement[bool]
) -> list[E_]:
    """Lock the rows that match all criteria, and return them."""
    return await fetch_all(session, select(entity).where(*criteria).with_for_update(key_share=True))


async def _end(
    session: AsyncSession, entity: type[E_], rows: list[E_], **values: object
) -> list[tuple[E_, str]]:
    """Update locked rows. Return each updated row with its old status."""
    old = {row.id: str(row.status) for row in rows}
    statement = sql_update(entity).where(col(entity.id).in_(old)).values(**values)
    changed = await fetch_all(session, statement.execution_options(**RECORDED).returning(entity))
    return [(row, old[row.id]) for row in changed]


def _codes_of_revoked(
    session: AsyncSession, keys: Iterable[APIKey]
) -> ColumnElement[str | None] | None:
    """Return the SQL expression of the authentication codes of API keys after their revocation."""
    peppers = optional_peppers(session.info)
    codes: dict[UUID, str | None] = {}
    for key in keys:
        old = {**signed_values(key), "mac": key.mac}
        codes[key.id] = renewed_code(peppers, old, {**old, "status": APIKeyStatus.REVOKED})
    return case(codes, value=col(APIKey.id), else_=col(APIKey.mac)) if codes else None

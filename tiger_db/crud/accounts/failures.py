"""Functions that count the errors of accounts, and suspend and reactivate accounts."""

from uuid import UUID

from sqlalchemy import func
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.audit_logs.recording import account_event, insert_event
from tiger_db.crud.change_events import RECORDED, apply_change
from tiger_db.crud.common import fetch_one, get_or_raise, replace_unstorable
from tiger_db.errors import InvalidValue
from tiger_db.models import AccountStatus, AuditAction, AuditSeverity, TigerAccount
from tiger_db.models.secrets import readable_secrets
from tiger_db.public import public
from tiger_db.redaction import redact_aggressively


@public
async def record_error(
    session: AsyncSession, account_id: UUID, *, message: str, suspend_after: int = 10
) -> TigerAccount:
    """Add 1 to the error count of an account, and store the error message with masked secrets.

    An active account with `suspend_after` or more consecutive errors is suspended. The function
    `reset_errors` activates the suspended account again.

    Raises:
        NotFound: no account has the id `account_id`.
        InvalidValue: `suspend_after` is not positive.
    """
    if suspend_after < 1:
        raise InvalidValue("suspend_after must be positive")
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    count = account.error_count + 1
    text = replace_unstorable(redact_aggressively(message, *readable_secrets(account)))
    values: dict[str, object] = {
        "error_count": count,
        "last_error": text,
        "last_error_at": func.now(),
    }
    suspended = account.status == AccountStatus.ACTIVE and count >= suspend_after
    if suspended:
        values |= {"status": AccountStatus.SUSPENDED, "auto_suspended": True}
    statement = sql_update(TigerAccount).where(col(TigerAccount.id) == account_id).values(**values)
    await fetch_one(session, statement.execution_options(**RECORDED).returning(TigerAccount))
    event = account_event(
        account_id,
        action=AuditAction.ACCOUNT_ERROR,
        old_values={"error_count": count - 1},
        new_values={"error_count": count},
        error_message=text,
    )
    await insert_event(session, event)
    if suspended:
        event = account_event(
            account_id,
            action=AuditAction.ACCOUNT_STATUS_CHANGE,
            severity=AuditSeverity.HIGH,
            old_values={"status": AccountStatus.ACTIVE, "auto_suspended": False},
            new_values={"status": AccountStatus.SUSPENDED, "auto_suspended": True},
            details={"reason": f"{count} consecutive errors"},
        )
        await insert_event(session, event)
    return account


@public
async def reset_errors(session: AsyncSession, account_id: UUID) -> TigerAccount:
    """Set an account's error count to zero, and activate an account that `record_error` suspended.

    An account that was suspended by a function other than `record_error` stays suspended.

    Raises:
        NotFound: no account has the id `account_id`.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    changes: dict[str, object] = {"error_count": 0, "last_error": None, "last_error_at": None}
    if account.auto_suspended:
        changes |= {"status": AccountStatus.ACTIVE, "auto_suspended": False}
    elif account.error_count == 0 and account.last_error is None:
        return account
    await apply_change(session, account, changes, action=AuditAction.ACCOUNT_RESET_ERRORS)
    return account

"""Functions that count the errors of accounts, and suspend and reactivate accounts."""

from uuid import UUID

from sqlalchemy import func
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.audit_logs.recording import account_error_event, account_event, insert_event
from tiger_db.crud.change_events import RECORDED, apply_change
from tiger_db.crud.common import context_of, fetch_one, get_or_raise, replace_unstorable
from tiger_db.models import AccountStatus, AuditAction, AuditSeverity, TigerAccount
from tiger_db.models.secrets import readable_secrets
from tiger_db.public import public
from tiger_db.redaction import redact_aggressively


@public
async def record_error(
    session: AsyncSession, account_id: UUID, *, message: str, counts: bool = True
) -> TigerAccount:
    """Store an error of an account with masked secrets, and add 1 to the error count.

    An account with `ACCOUNT_FAILING_AFTER` or more consecutive errors is failing for the time
    `ACCOUNT_FAILING_FOR` after each error: `find_for_operation` omits the account until
    `failing_until`. An active account with `ACCOUNT_SUSPEND_AFTER` or more consecutive errors is
    suspended. The function `reset_errors` makes a failing or suspended account available again.

    If `counts` is false, the error is stored and recorded, but changes neither the error count nor
    the availability of the account. Pass `counts=False` for a refusal of one request, such as "no
    buying power", which does not mean that later requests fail.

    Raises:
        NotFound: no account has the id `account_id`.
        ConfigurationError: the session does not belong to a Database.
    """
    context = context_of(session.info)
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    text = replace_unstorable(redact_aggressively(message, *readable_secrets(account)))
    values: dict[str, object] = {"last_error": text, "last_error_at": func.now()}
    count = account.error_count + 1
    suspends = counts and account.status == AccountStatus.ACTIVE and count >= context.suspend_after
    if counts:
        values["error_count"] = count
        if count >= context.failing_after:
            values["failing_until"] = func.now() + context.failing_for
    if suspends:
        values |= {"status": AccountStatus.SUSPENDED, "auto_suspended": True}
    statement = sql_update(TigerAccount).where(col(TigerAccount.id) == account_id).values(**values)
    await fetch_one(session, statement.execution_options(**RECORDED).returning(TigerAccount))
    if counts:
        event = account_error_event(
            account_id, text, error_count=count, failing_until=account.failing_until
        )
    else:
        event = account_event(account_id, action=AuditAction.ACCOUNT_ERROR, error_message=text)
    await insert_event(session, event)
    if suspends:
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

    After `reset_errors`, the account is no longer failing. An account that was suspended by a
    function other than `record_error` stays suspended.

    Raises:
        NotFound: no account has the id `account_id`.
    """
    account = await get_or_raise(session, TigerAccount, account_id, lock=True)
    changes: dict[str, object] = {
        "error_count": 0,
        "last_error": None,
        "last_error_at": None,
        "failing_until": None,
    }
    if account.auto_suspended:
        changes |= {"status": AccountStatus.ACTIVE, "auto_suspended": False}
    await apply_change(session, account, changes, action=AuditAction.ACCOUNT_RESET_ERRORS)
    return account

"""What scheduling and claims share: changing a refresh and writing its audit event."""

from datetime import timedelta

from sqlalchemy import ColumnElement, text
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession

from tiger_db.crud import audit_logs
from tiger_db.crud.common import one
from tiger_db.models import AuditAction, AuditResult, TokenStatus

IS_OPEN = text("token_statuses.status IN ('pending', 'in_progress')")  # as the indexes have it
LONGEST_BACKOFF = timedelta(minutes=30)


async def set_values(
    session: AsyncSession, criterion: ColumnElement[bool], **values: object
) -> TokenStatus | None:
    """Change the refresh that meets the criterion, if there is one; it is then as it is now."""
    return await one(
        session, sql_update(TokenStatus).where(criterion).values(**values).returning(TokenStatus)
    )


async def log(
    session: AsyncSession,
    action: AuditAction,
    refresh: TokenStatus,
    *,
    result: AuditResult = AuditResult.SUCCESS,
    error_code: str | None = None,
    error_message: str | None = None,
) -> None:
    """Write the audit event of a change, in the same transaction."""
    await audit_logs.log_event(
        session,
        action=action,
        result=result,
        resource_type="token_status",
        resource_id=str(refresh.id),
        tiger_account_id=refresh.tiger_account_id,
        details={"status": refresh.status.value, "trigger": refresh.trigger.value},
        error_code=error_code,
        error_message=error_message,
        duration_ms=refresh.duration_ms,
    )

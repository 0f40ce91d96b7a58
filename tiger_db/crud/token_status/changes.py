"""What scheduling, claims and endings share: changing a refresh and writing its audit event."""

from datetime import timedelta

from sqlalchemy import ColumnElement, and_, text
from sqlalchemy import update as sql_update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud import audit_logs
from tiger_db.crud.common import fetch_one
from tiger_db.errors import LeaseLost
from tiger_db.models import AuditAction, AuditResult, TokenRefreshStatus, TokenStatus

IS_OPEN = text("token_statuses.status IN ('pending', 'in_progress')")  # as the indexes have it
LONGEST_BACKOFF = timedelta(minutes=30)
ANSWER_LOST = "answer_lost"  # in a refresh's details: the broker may have replaced the token


async def set_values(
    session: AsyncSession, criterion: ColumnElement[bool], **values: object
) -> TokenStatus | None:
    """Change the refresh that meets the criterion, if there is one; it is then as it is now."""
    return await fetch_one(
        session, sql_update(TokenStatus).where(criterion).values(**values).returning(TokenStatus)
    )


async def change_held(session: AsyncSession, claim: TokenStatus, **values: object) -> TokenStatus:
    """Change a refresh if the claim is still good.

    Raises:
        LeaseLost: it is not.
        ValidationError: a value is refused.
    """
    given = {name: v for name, v in values.items() if not isinstance(v, ColumnElement)}
    claim.validate_changes(given)  # as if assigned
    refresh = await set_values(session, is_held(claim), **values)
    if refresh is None:
        raise LeaseLost
    return refresh


def is_held(claim: TokenStatus) -> ColumnElement[bool]:
    """Whether the claim is still good."""
    return and_(
        col(TokenStatus.id) == claim.id,
        col(TokenStatus.fencing_token) == claim.fencing_token,
        col(TokenStatus.status) == TokenRefreshStatus.IN_PROGRESS,
    )


async def log(
    session: AsyncSession,
    action: AuditAction,
    *refreshes: TokenStatus,
    result: AuditResult = AuditResult.SUCCESS,
    error_code: str | None = None,
    error_message: str | None = None,
) -> None:
    """Write the audit events of a change, in the same transaction."""
    events = [
        audit_logs.refresh_event(
            refresh.id,
            refresh.tiger_account_id,
            action=action,
            result=result,
            details={"status": refresh.status.value, "trigger": refresh.trigger.value},
            error_code=error_code,
            error_message=error_message,
            duration_ms=refresh.duration_ms,
        )
        for refresh in refreshes
    ]
    await audit_logs.log_events(session, events)

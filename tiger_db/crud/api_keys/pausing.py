"""Functions that pause and resume trading, for all API keys."""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy.ext.asyncio import AsyncSession

from tiger_db.actor import actor_in_force
from tiger_db.crud.audit_logs.recording import log_event
from tiger_db.crud.common import actor_of, fetch_rows, refuse_readonly, replace_unstorable
from tiger_db.errors import InvalidValue
from tiger_db.models import AuditAction, AuditSeverity
from tiger_db.public import public
from tiger_db.redaction import redact_aggressively

_MAX_REASON_LENGTH = 500
# If trading is paused already, the UPDATE only locks the row, so that a concurrent `resume` waits
# for the end of this transaction. The system column `xmax` is 0 in an inserted row.
_PAUSE = """
INSERT INTO trading_pauses AS p (reason, paused_by) VALUES ($1, $2)
ON CONFLICT (singleton) DO UPDATE SET reason = p.reason
RETURNING reason, paused_at, paused_by, xmax = 0 AS is_new
"""
_RESUME = "DELETE FROM trading_pauses RETURNING reason, paused_at, paused_by"
_CURRENT = "SELECT reason, paused_at, paused_by FROM trading_pauses"


@dataclass(frozen=True, slots=True)
class TradingPause:
    """A pause of trading: the reason, the start, and the user or service that paused trading."""

    reason: str
    paused_at: datetime
    paused_by: str | None

    def __str__(self) -> str:
        by = f" by {self.paused_by}" if self.paused_by else ""
        return f"since {self.paused_at.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}{by}: {self.reason}"

    def as_json(self) -> dict[str, str | None]:
        """Return the fields of the pause as a JSON object."""
        paused_at = self.paused_at.astimezone(UTC).isoformat()
        return {"reason": self.reason, "paused_at": paused_at, "paused_by": self.paused_by}


@public
async def pause(session: AsyncSession, *, reason: str) -> TradingPause:
    """Pause trading for all API keys until `resume` is called. Return the current pause.

    After the session's transaction is committed, every process raises `TradingPaused` for requests
    that require a scope of the family `trade`. Requests that require only other scopes are not
    affected. If trading is paused already, `pause` changes nothing, and returns the earlier pause.
    Secrets in `reason` are masked, because denied callers see the reason.

    Raises:
        InvalidValue: `reason` is blank, or longer than 500 characters.
        InvalidState: the session is readonly.
    """
    refuse_readonly(session)
    _check_reason(reason)
    shown = redact_aggressively(replace_unstorable(reason))[:_MAX_REASON_LENGTH]
    actor = actor_in_force(actor_of(session.info))
    paused_by = actor.user_id or actor.user_type
    ((*columns, is_new),) = await fetch_rows(session, _PAUSE, shown, paused_by)
    current = TradingPause(*columns)
    if is_new:
        await log_event(
            session,
            action=AuditAction.TRADING_PAUSE,
            severity=AuditSeverity.CRITICAL,
            new_values=current.as_json(),
        )
    return current


@public
async def resume(session: AsyncSession, *, reason: str | None = None) -> TradingPause | None:
    """End the pause of trading. Return the ended pause, or None if trading was not paused.

    The details of the audit event contain `reason`.

    Raises:
        InvalidValue: `reason` is blank, or longer than 500 characters.
        InvalidState: the session is readonly.
    """
    refuse_readonly(session)
    if reason is not None:
        _check_reason(reason)
    rows = await fetch_rows(session, _RESUME)
    if not rows:
        return None
    ended = TradingPause(*rows[0])
    await log_event(
        session,
        action=AuditAction.TRADING_RESUME,
        severity=AuditSeverity.CRITICAL,
        old_values=ended.as_json(),
        details={"reason": reason} if reason is not None else None,
    )
    return ended


@public
async def current_pause(session: AsyncSession) -> TradingPause | None:
    """Return the current pause of trading, or None. A replica can return stale data."""
    rows = await fetch_rows(session, _CURRENT)
    return TradingPause(*rows[0]) if rows else None


@public
async def is_paused(session: AsyncSession) -> bool:
    """Return whether trading is paused. A replica can return stale data."""
    return await current_pause(session) is not None


def _check_reason(reason: str) -> None:
    if not reason.strip() or len(reason) > _MAX_REASON_LENGTH:
        raise InvalidValue(f"reason must be a text of 1 to {_MAX_REASON_LENGTH} characters")

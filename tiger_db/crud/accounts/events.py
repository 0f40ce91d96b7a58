"""What the changes of accounts share: their audit events, and that closed ones refuse them."""

from collections.abc import Iterable, Mapping

from pydantic import JsonValue
from sqlalchemy.ext.asyncio import AsyncSession

from tiger_db.crud import audit_logs
from tiger_db.errors import InvalidState
from tiger_db.models import (
    AccountStatus,
    AuditAction,
    AuditSeverity,
    PrivateKeyFormat,
    TigerAccount,
)

# What closing ends, as it is in every closed account.
ENDED: Mapping[str, object] = {
    "auto_suspended": False,
    "private_key": None,
    "private_key_format": PrivateKeyFormat.UNKNOWN,
    "secret_key": None,
    "access_token": None,
    "refresh_token": None,
    "token_expires_at": None,
    "is_default_trading": False,
    "is_default_data": False,
}


def refuse_closed(account: TigerAccount) -> None:
    if account.status == AccountStatus.CLOSED:
        raise InvalidState("the account is closed")


def shown(account: TigerAccount) -> dict[str, JsonValue]:
    """What an audit event may say of an account: everything, its secrets masked."""
    return account.model_dump(mode="json", exclude={"created_at", "updated_at", "token_refresh_at"})


async def log(
    session: AsyncSession,
    action: AuditAction,
    account: TigerAccount,
    *,
    old: Mapping[str, JsonValue] | None = None,
    new: Mapping[str, JsonValue] | None = None,
    details: Mapping[str, JsonValue] | None = None,
    severity: AuditSeverity | None = None,
    error_message: str | None = None,
) -> None:
    """Write the audit event of a change, in the same transaction."""
    await audit_logs.log_event(
        session,
        action=action,
        severity=severity,
        resource_type="tiger_account",
        resource_id=str(account.id),
        tiger_account_id=account.id,
        old_values=old,
        new_values=new,
        details=details,
        error_message=error_message,
    )


async def log_change(
    session: AsyncSession,
    action: AuditAction,
    account: TigerAccount,
    *,
    before: Mapping[str, JsonValue],
    named: Iterable[str] = (),
    details: Mapping[str, JsonValue] | None = None,
) -> None:
    """`log` with the old and new values of what has changed since `before` was `shown`.

    The fields in `named` are told of anyway: two secrets look alike.
    """
    after = shown(account)
    names = {name for name in after if after[name] != before[name] or name in {*named}}
    await log(
        session,
        action,
        account,
        old={name: before[name] for name in names},
        new={name: after[name] for name in names},
        details=details,
    )

"""The audit events of keys."""

from collections.abc import Mapping

from pydantic import JsonValue
from sqlalchemy.ext.asyncio import AsyncSession

from tiger_db.crud import audit_logs
from tiger_db.models import APIKey, AuditAction


def shown(key: APIKey) -> dict[str, JsonValue]:
    """What an event says of a new key."""
    return key.model_dump(mode="json", exclude={"created_at", "updated_at"})


async def log(
    session: AsyncSession,
    action: AuditAction,
    key: APIKey,
    *,
    old: Mapping[str, JsonValue] | None = None,
    new: Mapping[str, JsonValue] | None = None,
) -> None:
    await audit_logs.log_event(
        session,
        action=action,
        resource_type="api_key",
        resource_id=str(key.id),
        api_key_id=key.id,
        tiger_account_id=key.tiger_account_id,
        old_values=old,
        new_values=new,
    )

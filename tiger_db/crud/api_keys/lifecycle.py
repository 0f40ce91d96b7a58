"""Functions that create, rotate, extend and revoke API keys, and record audit events."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import JsonValue
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.api_keys.hashing import hash_secret, peppers_of
from tiger_db.crud.api_keys.key_format import new_key
from tiger_db.crud.change_events import apply_change
from tiger_db.crud.common import context_of, fetch_one, get_or_raise, require_aware, savepoint
from tiger_db.errors import InvalidState, InvalidValue
from tiger_db.models import (
    AccountStatus,
    APIKey,
    APIKeyScope,
    APIKeyStatus,
    AuditAction,
    TigerAccount,
)
from tiger_db.public import public

_COPIED_FIELDS = {
    "name", "scopes", "tiger_account_id", "expires_at", "rate_limit_per_hour", "rate_limit_per_day",
    "allowed_ips", "allowed_user_agents", "created_by", "description", "tags",
}  # fmt: skip


@public
async def create_api_key(
    session: AsyncSession,
    *,
    name: str,
    scopes: Iterable[APIKeyScope],
    tiger_account_id: UUID | None = None,
    expires_at: datetime | None = None,
    rate_limit_per_hour: int | None = None,
    rate_limit_per_day: int | None = None,
    allowed_ips: Iterable[str] = (),
    allowed_user_agents: Iterable[str] = (),
    created_by: str | None = None,
    description: str | None = None,
    tags: Mapping[str, JsonValue] | None = None,
) -> tuple[APIKey, str]:
    """Create an API key. Return the APIKey entity and the raw key. The raw key is not stored.

    Raises:
        InvalidFields: a value is invalid. The error names the field.
        MissingReference: no account has the given `tiger_account_id`.
        InvalidState: the account is closed.
        ConfigurationError: API_KEY_PEPPERS is not set, or the session does not belong to a
            Database.
    """
    if tiger_account_id is not None:
        await _refuse_closed(session, tiger_account_id)
    values: dict[str, Any] = {
        "name": name,
        "scopes": list(scopes),
        "tiger_account_id": tiger_account_id,
        "expires_at": expires_at,
        "rate_limit_per_hour": rate_limit_per_hour,
        "rate_limit_per_day": rate_limit_per_day,
        "allowed_ips": list(allowed_ips),
        "allowed_user_agents": list(allowed_user_agents),
        "created_by": created_by,
        "description": description,
        "tags": tags or {},
    }
    return await _store(session, values)


@public
async def rotate(
    session: AsyncSession, key_id: UUID, *, grace: timedelta = timedelta(hours=24)
) -> tuple[APIKey, str]:
    """Replace an API key by a key with the same permissions. Return the new APIKey and raw key.

    The old key expires at the end of the grace period, unless the old key already expires earlier.
    The rate limits count the uses of the old and the new key together. A key can be rotated only
    once. If the new raw key is lost, rotate the new key. A failed rotation leaves the old key
    unchanged.

    Raises:
        NotFound: no API key has this id.
        InvalidState: the key was already rotated, is not active or has expired, or the account of
            the key is closed.
        InvalidValue: the grace period is negative, or ends after the year 9999.
        ConfigurationError: API_KEY_PEPPERS is not set, or the session does not belong to a
            Database.
    """
    if grace < timedelta(0):
        raise InvalidValue("the grace period must not be negative")
    key, now = await _lock_active(session, key_id, "rotated")
    if key.successor_id is not None:
        raise InvalidState(f"this API key was replaced by {key.successor_id}: rotate that key")
    try:
        ends = now + grace
    except OverflowError:
        raise InvalidValue("the grace period must end before the year 10000") from None
    copied = key.model_dump(include=_COPIED_FIELDS)
    async with savepoint(session, key):
        successor, raw_key = await _store(session, {**copied, "root_id": key.root_id or key.id})
        expires_at = min(ends, key.expires_at) if key.expires_at is not None else ends
        await apply_change(
            session,
            key,
            {"successor_id": successor.id, "expires_at": expires_at},
            action=AuditAction.API_KEY_ROTATE,
            old_values=None,
            new_values={"successor": str(successor.id), "expires_at": expires_at.isoformat()},
        )
    return successor, raw_key


@public
async def extend(session: AsyncSession, key_id: UUID, *, expires_at: datetime | None) -> APIKey:
    """Set a later expiry for an API key. If `expires_at` is None, the key never expires.

    Raises:
        NotFound: no API key has this id.
        InvalidState: the key is not active or has expired, or the account of the key is closed.
        InvalidValue: `expires_at` is naive, or is not later than the current expiry of the key.
    """
    require_aware("expires_at", expires_at)
    key, _ = await _lock_active(session, key_id, "extended")
    before = key.expires_at
    if before is None or (expires_at is not None and expires_at <= before):
        raise InvalidValue("expires_at must be later than the current expiry of the API key")
    validated = key.validate_changes({"expires_at": expires_at})["expires_at"]
    await apply_change(
        session,
        key,
        {"expires_at": validated},
        action=AuditAction.API_KEY_UPDATE,
        old_values={"expires_at": before.isoformat()},
        new_values={"expires_at": validated.isoformat() if validated else None},
    )
    return key


@public
async def revoke(session: AsyncSession, key_id: UUID, *, reason: str | None = None) -> APIKey:
    """Revoke an API key permanently. A second call for the same key changes nothing.

    Raises:
        NotFound: no API key has this id.
        InvalidFields: the reason is too long.
    """
    key = await get_or_raise(session, APIKey, key_id, lock=True)
    if key.status == APIKeyStatus.REVOKED:
        return key
    now = await session.scalar(select(func.clock_timestamp()))
    await apply_change(
        session,
        key,
        {"status": APIKeyStatus.REVOKED, "revoked_at": now, "revocation_reason": reason},
        action=AuditAction.API_KEY_REVOKE,
        old_values={"status": key.status},
        new_values={"status": APIKeyStatus.REVOKED, "revocation_reason": reason},
    )
    return key


async def _lock_active(
    session: AsyncSession, key_id: UUID, participle: str
) -> tuple[APIKey, datetime]:
    """Lock the row of an active API key. Return the APIKey entity and the database's time.

    Raises:
        NotFound: no API key has this id.
        InvalidState: the key is not active or has expired, or the account of the key is closed.
    """
    key = await get_or_raise(session, APIKey, key_id)
    if key.tiger_account_id is not None:  # the account is locked first to prevent deadlocks
        await _refuse_closed(session, key.tiger_account_id)
    key = await get_or_raise(session, APIKey, key_id, lock=True)
    now: datetime = await session.scalar(select(func.clock_timestamp())) or datetime.now(UTC)
    if key.status != APIKeyStatus.ACTIVE or (key.expires_at is not None and key.expires_at <= now):
        raise InvalidState(f"only an active API key can be {participle}")
    return key, now


async def _refuse_closed(session: AsyncSession, account_id: UUID) -> None:
    """Lock an account's row, so that the account stays open until the transaction ends.

    Raises:
        InvalidState: the account is closed.
    """
    statement = select(TigerAccount).where(col(TigerAccount.id) == account_id)
    account = await fetch_one(session, statement.with_for_update(key_share=True))
    if account is not None and account.status == AccountStatus.CLOSED:
        raise InvalidState("the account is closed")


async def _store(session: AsyncSession, values: dict[str, Any]) -> tuple[APIKey, str]:
    parsed = new_key(context_of(session.info).key_environment)
    key_hash, pepper_id = hash_secret(peppers_of(session.info), parsed.secret)
    key = APIKey(**values, key_prefix=parsed.prefix, key_hash=key_hash, pepper_id=pepper_id)
    async with savepoint(session):
        session.add(key)
    return key, parsed.raw_key

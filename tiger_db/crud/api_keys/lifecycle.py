"""Functions that create, change, rotate, revoke and delete API keys, and record audit events."""

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from ipaddress import IPv4Network, IPv6Network
from typing import Any, TypedDict, Unpack, get_type_hints
from uuid import UUID

from pydantic import JsonValue
from pydantic_core import PydanticCustomError
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.api_key_codes import require_valid_code
from tiger_db.crud.api_keys.hashing import hash_secret, peppers_of
from tiger_db.crud.api_keys.key_format import new_key
from tiger_db.crud.change_events import apply_change, described, is_equal, reason_details
from tiger_db.crud.common import context_of, fetch_one, get_or_raise, savepoint
from tiger_db.errors import InvalidFields, InvalidState, InvalidValue
from tiger_db.models import (
    AccountStatus,
    APIKey,
    APIKeyScope,
    APIKeyStatus,
    AuditAction,
    TigerAccount,
)
from tiger_db.public import Types, public

_COPIED_FIELDS = {
    "name", "scopes", "tiger_account_id", "expires_at", "rate_limit_per_hour", "rate_limit_per_day",
    "allowed_ips", "allowed_user_agents", "created_by", "description", "tags",
}  # fmt: skip
# _OTHER_FUNCTIONS maps fields that `update` cannot change to hints that name another function.
_OTHER_FUNCTIONS = {
    "status": "use `activate`, `deactivate` or `revoke`",
    "revoked_at": "use `revoke`",
    "revocation_reason": "use `revoke`",
    "key_prefix": "use `rotate`, which creates a new key",
    "key_hash": "use `rotate`, which creates a new key",
    "successor_id": "use `rotate`",
    "mac": "tiger_db computes it",
    "tiger_account_id": "use `create_api_key`, which creates a new key",
}


class KeyChanges(TypedDict, total=False):
    """The fields of an API key that `update` can change."""

    name: str
    description: str | None
    scopes: Iterable[APIKeyScope]
    allowed_ips: Iterable[str | IPv4Network | IPv6Network]
    allowed_user_agents: Iterable[str]
    rate_limit_per_hour: int | None
    rate_limit_per_day: int | None
    expires_at: datetime | None
    tags: Mapping[str, JsonValue]


_CHANGES = Types("update", get_type_hints(KeyChanges))


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
    allowed_ips: Iterable[str | IPv4Network | IPv6Network] = (),
    allowed_user_agents: Iterable[str] = (),
    created_by: str | None = None,
    description: str | None = None,
    tags: Mapping[str, JsonValue] | None = None,
) -> tuple[APIKey, str]:
    """Create an API key. Return the APIKey entity and the raw key. The raw key is not stored.

    Raises:
        InvalidFields: an argument is invalid. The error message names the invalid argument.
        InvalidValue: `expires_at` is in the past by the database's clock.
        MissingReference: no account has the given `tiger_account_id`.
        InvalidState: the account is closed.
        ConfigurationError: API_KEY_PEPPERS is not set, or the session does not belong to a
            Database.
    """
    if expires_at is not None and expires_at <= await _database_time(session):
        raise InvalidValue("expires_at must be in the future by the database's clock")
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
    """Replace an API key by a new key with the same permissions.

    Return the new APIKey entity and the new raw key. The old key expires at the end of the grace
    period, or at its `expires_at` if that time is earlier. The rate limits count the uses of the
    old and the new key together. Each API key can be rotated only once: if the new raw key is lost,
    rotate the new key. A failed rotation does not change the old key.

    Raises:
        NotFound: no API key has the id `key_id`.
        InvalidState: the API key is not active, has expired or was already rotated, the account of
            the API key is closed, or the row has no valid authentication code.
        InvalidValue: the grace period is negative.
        ConfigurationError: API_KEY_PEPPERS is not set or lacks the pepper of the API key, or the
            session does not belong to a Database.
    """
    if grace < timedelta(0):
        raise InvalidValue("the grace period must not be negative")
    key, now = await _lock_unrevoked(session, key_id)
    if key.status != APIKeyStatus.ACTIVE or (key.expires_at is not None and key.expires_at <= now):
        raise InvalidState("only an active API key can be rotated")
    if key.successor_id is not None:
        raise InvalidState(f"this API key was replaced by {key.successor_id}: rotate that key")
    require_valid_code(session.info, key)
    ends = now + grace
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
async def update(session: AsyncSession, key_id: UUID, **changes: Unpack[KeyChanges]) -> APIKey:
    """Change fields of an API key. If one change is invalid, no field is changed.

    One audit event contains the old and new values of the changed fields. An update without new
    values writes nothing. A later `expires_at` makes an expired key valid again. A key whose
    `expires_at` is None never expires. The expiry of a rotated key can only be made earlier, so
    that the grace period is never prolonged.

    Raises:
        NotFound: no API key has the id `key_id`.
        InvalidFields: a given field does not exist or cannot be changed by `update`, or a given
            value is invalid. The error message names the invalid field.
        InvalidValue: the new `expires_at` is in the past by the database's clock. To end an API key
            now, call `deactivate` or `revoke`.
        InvalidState: the API key is revoked, its account is closed, its row has a wrong
            authentication code, or the new `expires_at` would prolong the grace period of a rotated
            key.
        ConfigurationError: API_KEY_PEPPERS lacks the pepper of the API key.
    """
    given = {**changes}
    _refuse_other_fields(given)
    _CHANGES.check(given)
    key, now = await _lock_unrevoked(session, key_id)
    values = key.validate_changes(given)
    values = {
        name: value
        for name, value in values.items()
        if not is_equal(APIKey, name, getattr(key, name), value)
    }
    if "expires_at" in values:
        _check_expiry(key, values["expires_at"], now)
        if key.status == APIKeyStatus.EXPIRED:
            values["status"] = APIKeyStatus.ACTIVE
    if values:
        async with savepoint(session, key):
            await apply_change(session, key, values, action=AuditAction.API_KEY_UPDATE)
    return key


@public
async def activate(session: AsyncSession, key_id: UUID) -> APIKey:
    """Activate an API key that was deactivated. An active API key is not changed.

    Raises:
        NotFound: no API key has the id `key_id`.
        InvalidState: the API key is revoked or has expired, the account of the key is closed, or
            the row of the key has a wrong authentication code.
        ConfigurationError: API_KEY_PEPPERS lacks the pepper of the API key.
    """
    key, now = await _lock_unrevoked(session, key_id)
    if key.expires_at is not None and key.expires_at <= now:
        raise InvalidState("the API key has expired: set a later expires_at with `update`")
    await apply_change(
        session, key, {"status": APIKeyStatus.ACTIVE}, action=AuditAction.API_KEY_ACTIVATE
    )
    return key


@public
async def deactivate(session: AsyncSession, key_id: UUID, *, reason: str | None = None) -> APIKey:
    """Deactivate an API key until `activate` is called. An inactive API key is not changed.

    Raises:
        NotFound: no API key has the id `key_id`.
        InvalidState: the API key is revoked.
        ConfigurationError: API_KEY_PEPPERS lacks the pepper of the API key. `revoke` needs none.
    """
    key = await get_or_raise(session, APIKey, key_id, lock=True)
    _refuse_revoked(key)
    await apply_change(
        session,
        key,
        {"status": APIKeyStatus.INACTIVE},
        action=AuditAction.API_KEY_DEACTIVATE,
        details=reason_details(reason),
    )
    return key


@public
async def revoke(session: AsyncSession, key_id: UUID, *, reason: str | None = None) -> APIKey:
    """Revoke an API key permanently. A revoked API key is not changed.

    Raises:
        NotFound: no API key has the id `key_id`.
        InvalidFields: `reason` is longer than 500 characters.
    """
    key = await get_or_raise(session, APIKey, key_id, lock=True)
    if key.status == APIKeyStatus.REVOKED:
        return key
    now = await _database_time(session)
    await apply_change(
        session,
        key,
        {"status": APIKeyStatus.REVOKED, "revoked_at": now, "revocation_reason": reason},
        action=AuditAction.API_KEY_REVOKE,
        old_values={"status": key.status},
        new_values={"status": APIKeyStatus.REVOKED, "revocation_reason": reason},
    )
    return key


@public
async def delete(session: AsyncSession, key_id: UUID, *, reason: str | None = None) -> None:
    """Delete an API key and its usage counts.

    The audit events of a deleted API key are kept. The successors of a deleted API key are kept,
    with the usage counts for their rate limits. To refuse an API key but keep its row, call
    `revoke`.

    Raises:
        NotFound: no API key has the id `key_id`.
    """
    key = await get_or_raise(session, APIKey, key_id, lock=True)
    await session.delete(key)
    with described(key, action=AuditAction.API_KEY_DELETE, details=reason_details(reason)):
        await session.flush()


async def _lock_unrevoked(session: AsyncSession, key_id: UUID) -> tuple[APIKey, datetime]:
    """Lock the row of an API key. Return the APIKey entity and the database's time.

    Raises:
        NotFound: no API key has the id `key_id`.
        InvalidState: the API key is revoked, or the account of the API key is closed.
    """
    key = await get_or_raise(session, APIKey, key_id)
    # To prevent deadlocks, lock the account before the API key.
    if key.tiger_account_id is not None:
        await _refuse_closed(session, key.tiger_account_id)
    key = await get_or_raise(session, APIKey, key_id, lock=True)
    _refuse_revoked(key)
    return key, await _database_time(session)


async def _database_time(session: AsyncSession) -> datetime:
    now: datetime = (await session.execute(select(func.clock_timestamp()))).scalar_one()
    return now


def _refuse_revoked(key: APIKey) -> None:
    if key.status == APIKeyStatus.REVOKED:
        raise InvalidState("the API key is revoked: a revocation is final")


def _refuse_other_fields(changes: Mapping[str, object]) -> None:
    """Raise InvalidFields if `changes` contain fields that `update` cannot change."""
    problems = []
    for name in sorted(changes.keys() - KeyChanges.__annotations__.keys()):
        reason = "an API key has no field with this name"
        if name in APIKey.model_fields:
            reason = "`update` cannot change this field"
            reason += f": {_OTHER_FUNCTIONS[name]}" if name in _OTHER_FUNCTIONS else ""
        problems.append(((name,), PydanticCustomError("other_field", "{why}", {"why": reason})))
    if problems:
        raise InvalidFields.of(APIKey.__name__, problems)


def _check_expiry(key: APIKey, expires_at: datetime | None, now: datetime) -> None:
    """Check the new expiry of an API key against the database's time.

    Raises:
        InvalidValue: `expires_at` is in the past.
        InvalidState: the API key was rotated, and the new expiry is not earlier than the current
            expiry.
    """
    if expires_at is not None and expires_at <= now:
        raise InvalidValue(
            "expires_at must be in the future: to end the API key now, use `deactivate` or `revoke`"
        )
    is_earlier = expires_at is not None and (key.expires_at is None or expires_at < key.expires_at)
    if key.successor_id is not None and not is_earlier:
        raise InvalidState(
            f"this API key was replaced by {key.successor_id}: the grace period cannot be prolonged"
        )


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

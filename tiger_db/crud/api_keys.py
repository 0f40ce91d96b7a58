"""API keys: creating, checking, rotating and revoking them."""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import UUID

from passlib.context import CryptContext
from pydantic import JsonValue
from sqlalchemy import and_, func, select
from sqlalchemy import update as sql_update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud import audit_logs
from tiger_db.crud.common import FRESH, Page, aware, constraints, get_or_raise, one, paginate
from tiger_db.errors import (
    AccessDenied,
    AccountNotActive,
    AccountNotAllowed,
    AddressNotAllowed,
    APIKeyExpired,
    APIKeyRevoked,
    InvalidAPIKey,
    InvalidState,
    InvalidValue,
    RateLimited,
    ScopeMissing,
    UserAgentNotAllowed,
)
from tiger_db.models import (
    AccountStatus,
    APIKey,
    APIKeyScope,
    APIKeyStatus,
    AuditAction,
    TigerAccount,
)
from tiger_db.models.api_keys import api_key_usage

# `tdb_<public id>_<256 random bits>`. One salted SHA-256 is enough for what no dictionary holds:
# NIST SP 800-63B, 5.1.2.2, asks for stretching only below 112 bits.
_FORM = re.compile(r"(tdb_[0-9a-f]{16})_([0-9a-f]{64})", re.ASCII)
_hashes = CryptContext(schemes=["ldap_salted_sha256"])


@dataclass(frozen=True, slots=True)
class HourlyUsage:
    """How often a key was accepted in the hour (UTC) that starts at `hour`."""

    hour: datetime
    count: int


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
    """Create a key; returns its row and the key itself, which is kept nowhere and shown only now.

    Raises:
        ValidationError: a value is refused; it names the field.
        MissingReference: there is no such account.
        InvalidState: it is closed.
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
    key, raw_key = await _store(session, values)
    await _log(session, AuditAction.API_KEY_CREATE, key, new=_shown(key))
    return key, raw_key


async def get(session: AsyncSession, key_id: UUID) -> APIKey | None:
    """A key by its id."""
    statement = select(APIKey).where(col(APIKey.id) == key_id)
    return await one(session, statement)


async def get_by_prefix(session: AsyncSession, key_prefix: str) -> APIKey | None:
    """A key by its public part."""
    statement = select(APIKey).where(col(APIKey.key_prefix) == key_prefix)
    return await one(session, statement)


async def get_keys_for_account(
    session: AsyncSession, account_id: UUID, *, after: str | None = None, limit: int = 50
) -> Page[APIKey]:
    """The keys that are bound to an account, newest first."""
    statement = select(APIKey).where(col(APIKey.tiger_account_id) == account_id)
    return await paginate(session, statement, APIKey, after=after, limit=limit)


async def list_api_keys(
    session: AsyncSession,
    *,
    status: APIKeyStatus | None = None,
    after: str | None = None,
    limit: int = 50,
) -> Page[APIKey]:
    """The keys, newest first."""
    statement = select(APIKey)
    if status is not None:
        statement = statement.where(col(APIKey.status) == status)
    return await paginate(session, statement, APIKey, after=after, limit=limit)


async def verify_api_key(
    session: AsyncSession,
    raw_key: str,
    *,
    ip_address: str | IPv4Address | IPv6Address | None = None,
    user_agent: str | None = None,
) -> APIKey | None:
    """The key's row if it is accepted, and counted as used; else None."""
    try:
        return await authorize_api_key(
            session, raw_key, ip_address=ip_address, user_agent=user_agent
        )
    except AccessDenied:
        return None


async def authorize_api_key(
    session: AsyncSession,
    raw_key: str,
    *,
    scopes: Iterable[APIKeyScope] = (),
    account_id: UUID | None = None,
    ip_address: str | IPv4Address | IPv6Address | None = None,
    user_agent: str | None = None,
) -> APIKey:
    """The key's row if it may do this, from here, now; then it is counted as used.

    The first reason not to, in this order: form, existence and hash (all `InvalidAPIKey`), status,
    expiry, the bound account's status, address, user agent, scopes, account, limits. Limits are
    exact: uses of a limited key wait for each other's transaction. They count by the clock hour and
    the calendar day (UTC), so that twice the limit may pass around the turn of one.

    Raises:
        AccessDenied: one of its subclasses, by the reason. None of them counts as a use.
    """
    form = _FORM.fullmatch(raw_key) if isinstance(raw_key, str) else None
    if form is None:
        raise InvalidAPIKey
    prefix, secret = form.groups()
    while True:
        key, account_status, now = await _find(session, prefix, secret)
        _decide(key, account_status, now, list(scopes), account_id, ip_address, user_agent)
        if await _count_use(session, key, now):
            return key
        # It was revoked, rotated or deleted since it was read.


async def _find(
    session: AsyncSession, prefix: str, secret: str
) -> tuple[APIKey, AccountStatus | None, datetime]:
    found = (
        await session.execute(
            select(APIKey, col(TigerAccount.status), func.clock_timestamp())
            .outerjoin(TigerAccount, col(APIKey.tiger_account_id) == col(TigerAccount.id))
            .where(col(APIKey.key_prefix) == prefix),
            execution_options=FRESH,
        )
    ).one_or_none()
    if found is None:
        _hashes.verify(secret, _no_hash())  # so that an unknown key takes as long as a wrong one
        raise InvalidAPIKey
    key, account_status, now = found
    if not _hashes.verify(secret, key.key_hash):
        raise InvalidAPIKey
    return key, account_status, now


def _decide(  # noqa: PLR0917  # the order of the decision
    key: APIKey,
    account_status: AccountStatus | None,
    now: datetime,
    scopes: Sequence[APIKeyScope],
    account_id: UUID | None,
    ip_address: str | IPv4Address | IPv6Address | None,
    user_agent: str | None,
) -> None:
    if key.status == APIKeyStatus.EXPIRED:
        raise APIKeyExpired
    if key.status != APIKeyStatus.ACTIVE:
        raise APIKeyRevoked
    if key.expires_at is not None and key.expires_at <= now:
        raise APIKeyExpired
    if key.tiger_account_id is not None and account_status != AccountStatus.ACTIVE:
        raise AccountNotActive
    if not key.is_ip_allowed(ip_address):
        raise AddressNotAllowed
    if not key.is_user_agent_allowed(user_agent):
        raise UserAgentNotAllowed
    if missing := [scope for scope in scopes if not key.has_scope(scope)]:
        raise ScopeMissing(f"the API key lacks the scope {', '.join(missing)}")
    if account_id is not None and not key.can_access_account(account_id):
        raise AccountNotAllowed


async def _count_use(session: AsyncSession, key: APIKey, now: datetime) -> bool:
    """Count one use, unless the key has stopped to be good meanwhile."""
    hour = now.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    still_good = and_(
        col(APIKey.id) == key.id,
        col(APIKey.status) == APIKeyStatus.ACTIVE,
        func.coalesce(col(APIKey.expires_at) > func.clock_timestamp(), True),
    )
    if key.rate_limit_per_hour is not None or key.rate_limit_per_day is not None:
        # Locked, so that no other use is counted between this reading and that writing.
        locked = select(APIKey).where(still_good).with_for_update(key_share=True)
        if await one(session, locked) is None:
            return False
        await _check_limits(session, key, hour, now)
    used = await one(
        session,
        sql_update(APIKey)
        .where(still_good)
        .values(usage_count=col(APIKey.usage_count) + 1, last_used_at=now)
        .returning(APIKey),
    )
    if used is None:
        return False
    await session.execute(
        insert(api_key_usage)
        .values(api_key_id=key.id, hour=hour, count=1)
        .on_conflict_do_update(
            index_elements=["api_key_id", "hour"], set_={"count": api_key_usage.c.count + 1}
        )
    )
    return True


async def _check_limits(session: AsyncSession, key: APIKey, hour: datetime, now: datetime) -> None:
    day = hour.replace(hour=0)
    count = func.sum(api_key_usage.c.count)
    in_hour, in_day = (
        await session.execute(
            select(
                func.coalesce(count.filter(api_key_usage.c.hour == hour), 0),
                func.coalesce(count, 0),
            ).where(
                api_key_usage.c.api_key_id == key.id,
                api_key_usage.c.hour >= day,
                api_key_usage.c.hour < day + timedelta(days=1),
            )
        )
    ).one()
    if key.rate_limit_per_day is not None and in_day >= key.rate_limit_per_day:
        raise RateLimited(retry_after=day + timedelta(days=1) - now)
    if key.rate_limit_per_hour is not None and in_hour >= key.rate_limit_per_hour:
        raise RateLimited(retry_after=hour + timedelta(hours=1) - now)


async def rotate(
    session: AsyncSession, key_id: UUID, *, grace: timedelta = timedelta(hours=24)
) -> tuple[APIKey, str]:
    """Create a successor with the same powers; the old key works until the grace ends.

    Raises:
        NotFound: there is no such key.
        InvalidState: it is not active, or has expired, or its account is closed.
        InvalidValue: the grace is negative, or ends after the year 9999.
    """
    if grace < timedelta(0):
        raise InvalidValue("grace must not be negative")
    key = await get_or_raise(session, APIKey, key_id)
    if key.tiger_account_id is not None:  # the account first, as everyone who locks both does
        await _refuse_closed(session, key.tiger_account_id)
    key = await get_or_raise(session, APIKey, key_id, lock=True)
    now: datetime = await session.scalar(select(func.clock_timestamp())) or datetime.now(UTC)
    if key.status != APIKeyStatus.ACTIVE or (key.expires_at is not None and key.expires_at <= now):
        raise InvalidState("only an active key can be rotated")
    try:
        ends = now + grace
    except OverflowError:
        raise InvalidValue("grace is too long") from None
    powers = key.model_dump(
        include={
            "name", "scopes", "tiger_account_id", "expires_at", "rate_limit_per_hour",
            "rate_limit_per_day", "allowed_ips", "allowed_user_agents", "created_by",
            "description", "tags",
        }
    )  # fmt: skip
    successor, raw_key = await _store(session, powers)
    key.expires_at = min(ends, key.expires_at) if key.expires_at is not None else ends
    await session.flush()
    await _log(
        session,
        AuditAction.API_KEY_ROTATE,
        key,
        new={"successor": str(successor.id), "expires_at": key.expires_at.isoformat()},
    )
    return successor, raw_key


async def revoke(session: AsyncSession, key_id: UUID, *, reason: str | None = None) -> APIKey:
    """Refuse a key from now on, for good. Revoking a revoked key changes nothing.

    Raises:
        NotFound: there is no such key.
        ValidationError: the reason is too long.
    """
    key = await get_or_raise(session, APIKey, key_id, lock=True)
    if key.status == APIKeyStatus.REVOKED:
        return key
    old: dict[str, JsonValue] = {"status": key.status.value}
    now = await session.scalar(select(func.clock_timestamp()))
    key.sqlmodel_update(
        {"status": APIKeyStatus.REVOKED, "revoked_at": now, "revocation_reason": reason}
    )
    await session.flush()
    new: dict[str, JsonValue] = {"status": key.status.value, "revocation_reason": reason}
    await _log(session, AuditAction.API_KEY_REVOKE, key, old=old, new=new)
    return key


async def usage(session: AsyncSession, key_id: UUID, *, since: datetime) -> list[HourlyUsage]:
    """How often a key was accepted, by the hour, oldest first; hours without use are left out.

    Raises:
        InvalidValue: `since` is naive.
    """
    rows = await session.execute(
        select(api_key_usage.c.hour, api_key_usage.c.count)
        .where(
            api_key_usage.c.api_key_id == key_id,
            api_key_usage.c.hour >= func.date_trunc("hour", aware("since", since), "UTC"),
        )
        .order_by(api_key_usage.c.hour)
    )
    return [HourlyUsage(hour, count) for hour, count in rows]


async def _refuse_closed(session: AsyncSession, account_id: UUID) -> None:
    """Make sure that the account is not closed, and is not before this transaction ends."""
    statement = select(TigerAccount).where(col(TigerAccount.id) == account_id)
    account = await one(session, statement.with_for_update(key_share=True))
    if account is not None and account.status == AccountStatus.CLOSED:
        raise InvalidState("the account is closed")


async def _store(session: AsyncSession, values: dict[str, Any]) -> tuple[APIKey, str]:
    prefix = f"tdb_{secrets.token_hex(8)}"
    secret = secrets.token_hex(32)
    key = APIKey(**values, key_prefix=prefix, key_hash=_hashes.hash(secret))
    async with constraints(session):
        session.add(key)
    return key, f"{prefix}_{secret}"


@cache
def _no_hash() -> str:
    hashed: str = _hashes.hash(secrets.token_hex(32))
    return hashed


def _shown(key: APIKey) -> dict[str, JsonValue]:
    return key.model_dump(mode="json", exclude={"created_at", "updated_at"})


async def _log(
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

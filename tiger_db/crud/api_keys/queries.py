"""Functions that look up and list API keys and usage counts."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import and_, func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.api_keys.hashing import peppers_of, verify_secret
from tiger_db.crud.api_keys.key_format import parse_key
from tiger_db.crud.common import fetch_all, fetch_one, require_aware
from tiger_db.crud.pagination import (
    DEFAULT_PAGE_SIZE,
    Page,
    check_limit,
    decode_cursor,
    encode_cursor,
    paginate,
)
from tiger_db.errors import InvalidValue
from tiger_db.models import APIKey, APIKeyStatus
from tiger_db.models.api_keys import api_key_usage
from tiger_db.public import public

_EXPIRING = "expiring_api_keys"  # the name of the list in the cursors of `list_expiring`


@dataclass(frozen=True, slots=True)
class HourlyUsage:
    """The number of accepted uses of an API key in the hour that starts at `hour` (UTC)."""

    hour: datetime
    count: int


@public
async def get(session: AsyncSession, key_id: UUID) -> APIKey | None:
    """Return the API key with the given id, or None."""
    statement = select(APIKey).where(col(APIKey.id) == key_id)
    return await fetch_one(session, statement)


@public
async def get_by_prefix(session: AsyncSession, key_prefix: str) -> APIKey | None:
    """Return the API key with the given public prefix, or None."""
    statement = select(APIKey).where(col(APIKey.key_prefix) == key_prefix)
    return await fetch_one(session, statement)


@public
async def find_by_raw_key(session: AsyncSession, raw_key: str) -> APIKey | None:
    """Return the API key that belongs to a raw key, or None.

    The status of the API key is not checked. The look-up is not counted as a use of the API key.

    Raises:
        ConfigurationError: API_KEY_PEPPERS is not set.
    """
    parsed = parse_key(raw_key)
    key = await get_by_prefix(session, parsed.prefix) if parsed is not None else None
    if parsed is None or key is None:
        return None
    peppers = peppers_of(session.info)
    verified = await verify_secret(peppers, parsed.secret, key.key_hash, key.pepper_id)
    return key if verified else None


@public
async def get_keys_for_account(
    session: AsyncSession,
    account_id: UUID,
    *,
    after: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
) -> Page[APIKey]:
    """Return a page of the API keys that are bound to an account, newest first."""
    statement = select(APIKey).where(col(APIKey.tiger_account_id) == account_id)
    return await paginate(session, statement, APIKey, after=after, limit=limit)


@public
async def list_api_keys(
    session: AsyncSession,
    *,
    status: APIKeyStatus | None = None,
    after: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
) -> Page[APIKey]:
    """Return a page of API keys, newest first.

    The status `active` matches active API keys that have not expired by the database's clock. The
    status `expired` matches API keys whose `expires_at` has passed. When an API key expires, its
    stored status stays `active`.
    """
    statement = select(APIKey)
    if status is not None:
        is_expired = func.coalesce(col(APIKey.expires_at) <= func.now(), False)
        is_active = col(APIKey.status) == APIKeyStatus.ACTIVE
        has_status = col(APIKey.status) == status
        if status == APIKeyStatus.ACTIVE:
            has_status = and_(is_active, ~is_expired)
        elif status == APIKeyStatus.EXPIRED:
            has_status = or_(has_status, and_(is_active, is_expired))
        statement = statement.where(has_status)
    return await paginate(session, statement, APIKey, after=after, limit=limit)


@public
async def list_expiring(
    session: AsyncSession,
    *,
    within: timedelta = timedelta(days=7),
    after: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
) -> Page[APIKey]:
    """Return a page of active API keys that expire between now and now + `within`, soonest first.

    Raises:
        InvalidCursor: `after` is not the `next_cursor` of an earlier page of `list_expiring`.
        InvalidValue: `within` is zero, negative or more than 100 years, or `limit` is not from 1 to
            1000.
    """
    check_limit(limit)
    if not timedelta(0) < within <= timedelta(days=36525):
        raise InvalidValue("within must be positive and at most 100 years")
    expires_at, key_id = col(APIKey.expires_at), col(APIKey.id)
    statement = select(APIKey).where(
        col(APIKey.status) == APIKeyStatus.ACTIVE,
        expires_at > func.now(),
        expires_at <= func.now() + within,
    )
    if after is not None:
        last = decode_cursor(_EXPIRING, after)
        expiry = select(expires_at).where(key_id == last).scalar_subquery()
        statement = statement.where(tuple_(expires_at, key_id) > tuple_(expiry, last))
    keys = await fetch_all(session, statement.order_by(expires_at, key_id).limit(limit + 1))
    more = len(keys) > limit
    return Page(keys[:limit], encode_cursor(_EXPIRING, keys[limit - 1].id) if more else None)


@public
async def usage(session: AsyncSession, key_id: UUID, *, since: datetime) -> list[HourlyUsage]:
    """Return the number of accepted uses of an API key per hour, oldest hour first.

    An hour without uses is omitted. Uses of the last second can be missing, because tiger_db writes
    usage counts once per second.

    Raises:
        InvalidValue: the datetime `since` has no time zone.
    """
    rows = await session.execute(
        select(api_key_usage.c.hour, api_key_usage.c.count)
        .where(
            api_key_usage.c.api_key_id == key_id,
            api_key_usage.c.hour >= func.date_trunc("hour", require_aware("since", since), "UTC"),
        )
        .order_by(api_key_usage.c.hour)
    )
    return [HourlyUsage(hour, count) for hour, count in rows]

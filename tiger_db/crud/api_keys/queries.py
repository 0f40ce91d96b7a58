"""Functions that look up and list API keys and usage counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeAlias, TypedDict, Unpack
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    and_,
    false,
    func,
    inspect,
    or_,
    select,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.api_keys.hashing import peppers_of, verify_secret
from tiger_db.crud.api_keys.key_format import parse_key
from tiger_db.crud.common import fetch_one
from tiger_db.crud.filters import Filters, OneOrMore, as_list, has_text, one_of, overlaps
from tiger_db.crud.grouping import count_groups
from tiger_db.crud.pagination import (
    DEFAULT_PAGE_SIZE,
    EntityList,
    Page,
    paginate,
)
from tiger_db.errors import InvalidValue
from tiger_db.models import APIKey, APIKeyScope, APIKeyStatus
from tiger_db.models.api_keys import api_key_usage
from tiger_db.public import public

UsageDimension: TypeAlias = Literal["hour", "day", "api_key_id", "account_id"]


@dataclass(frozen=True, slots=True)
class UsageCount:
    """The number of accepted uses of API keys in a group, such as one API key on one day.

    A field is None if the query did not group by the field. For API keys that are bound to no
    account, `account_id` is None.
    """

    count: int
    start: datetime | None = None  # start of the hour or day (UTC)
    api_key_id: UUID | None = None
    api_key_name: str | None = None  # name of the API key with the id `api_key_id`
    account_id: UUID | None = None


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


class APIKeyFilters(TypedDict, total=False):
    """The filters of a list of API keys.

    A filter with several values selects the API keys that have one or more of the values. A filter
    with the value None selects all API keys. A filter with an empty collection selects no API key.

    The status `active` matches active API keys that have not expired by the database's clock. The
    status `expired` matches API keys whose `expires_at` has passed. When an API key expires, its
    stored status stays `active`.

    `scope` selects the API keys that have the given scope, or a scope that implies the given scope.
    If `expired` is true, API keys whose `expires_at` has passed are selected. If `expired` is
    false, API keys that have not expired are selected. `unused_since` selects the API keys that
    were created before an aware datetime and not used since. `search` is a text in the name, the
    prefix or the description of an API key, regardless of case.
    """

    status: OneOrMore[APIKeyStatus] | None
    account_id: OneOrMore[UUID] | None
    scope: OneOrMore[APIKeyScope] | None
    created_by: OneOrMore[str] | None
    expired: bool | None
    unused_since: datetime | None
    search: str | None


_IS_EXPIRED = func.coalesce(col(APIKey.expires_at) <= func.now(), False)
_IS_ACTIVE = col(APIKey.status) == APIKeyStatus.ACTIVE


def _has_status(value: OneOrMore[APIKeyStatus]) -> ColumnElement[bool]:
    statuses = {APIKeyStatus(status) for status in as_list(value)}
    stored = col(APIKey.status).in_(statuses - {APIKeyStatus.ACTIVE})
    active, expired = (status in statuses for status in (APIKeyStatus.ACTIVE, APIKeyStatus.EXPIRED))
    return or_(
        stored,
        and_(_IS_ACTIVE, ~_IS_EXPIRED) if active else false(),
        and_(_IS_ACTIVE, _IS_EXPIRED) if expired else false(),
    )


def _grants_scope(value: OneOrMore[APIKeyScope]) -> ColumnElement[bool]:
    wanted = {APIKeyScope(scope) for scope in as_list(value)}
    granting = [held for held in APIKeyScope if any(held.implies(scope) for scope in wanted)]
    return overlaps(col(APIKey.scopes))(granting)


_FILTERS = Filters.of(
    APIKeyFilters,
    {
        "status": _has_status,
        "account_id": one_of(col(APIKey.tiger_account_id)),
        "scope": _grants_scope,
        "created_by": one_of(col(APIKey.created_by)),
        "expired": lambda expired: expired == _IS_EXPIRED,
        "unused_since": lambda at: (
            func.coalesce(col(APIKey.last_used_at), col(APIKey.created_at)) < at
        ),
        "search": has_text(col(APIKey.name), col(APIKey.key_prefix), col(APIKey.description)),
    },
)
API_KEYS = EntityList("api_keys", APIKey, _FILTERS, orders={"name": "name"})
EXPIRING_API_KEYS = EntityList(
    "expiring_api_keys", APIKey, _FILTERS, orders={"expiry": "expires_at"}
)


@public
async def list_api_keys(
    session: AsyncSession,
    *,
    order_by: Literal["newest", "name"] = "newest",
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
    **filters: Unpack[APIKeyFilters],
) -> Page[APIKey]:
    """Return a page of the API keys that match all filters, by default newest key first.

    The order `name` sorts by name and id, and compares names by code point. PostgreSQL uses an
    index only for the filter `account_id`. Without the filter `account_id`, PostgreSQL possibly
    reads all API keys. The parameters `after`, `before`, `limit`, `count` and `load` are explained
    in `paginate`.

    Raises:
        InvalidCursor: `after` or `before` is malformed, or belongs to another list, order or set of
            filters.
        InvalidValue: a filter, `limit` or `load` is invalid.
    """
    return await paginate(
        session,
        API_KEYS,
        filters=filters,
        order_by=order_by,
        after=after,
        before=before,
        limit=limit,
        count=count,
        load=load,
    )


@public
async def get_keys_for_account(
    session: AsyncSession,
    account_id: UUID,
    *,
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
) -> Page[APIKey]:
    """Return a page of the API keys that are bound to an account, newest first.

    Raises:
        InvalidCursor: `after` or `before` is not a cursor of the API keys of the same account.
        InvalidValue: `limit` is not from 1 to 1000, or `load` is invalid.
    """
    return await list_api_keys(
        session,
        account_id=account_id,
        after=after,
        before=before,
        limit=limit,
        count=count,
        load=load,
    )


@public
async def list_expiring(
    session: AsyncSession,
    *,
    within: timedelta = timedelta(days=7),
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
) -> Page[APIKey]:
    """Return a page of active API keys that expire between now and now + `within`, soonest first.

    Raises:
        InvalidCursor: `after` or `before` is not a cursor of `list_expiring`.
        InvalidValue: `within` is zero, negative or more than 100 years, or `limit` or `load` is
            invalid.
    """
    if not timedelta(0) < within <= timedelta(days=36525):
        raise InvalidValue("`within` must be positive and at most 100 years")
    return await paginate(
        session,
        EXPIRING_API_KEYS,
        _IS_ACTIVE,
        col(APIKey.expires_at) > func.now(),
        col(APIKey.expires_at) <= func.now() + within,
        filters={},
        order_by="expiry",
        after=after,
        before=before,
        limit=limit,
        count=count,
        load=load,
    )


@public
async def usage(
    session: AsyncSession,
    key_id: UUID | None = None,
    *,
    by: OneOrMore[UsageDimension] = "hour",
    since: datetime,
    limit: int | None = None,
) -> list[UsageCount]:
    """Count the accepted uses of one API key, or of all API keys, since the aware datetime `since`.

    The uses are grouped by hour or day (UTC), by API key, by account, or by a combination such as
    `("day", "api_key_id")`. Groups without uses are omitted. Groups with a time are sorted by time.
    Groups with the same time, and groups without a time, are sorted by count, highest count first.
    If `limit` is given, only the first `limit` groups are returned.

    tiger_db stores one count per API key and hour, so the hour that contains `since` is counted as
    a whole. Uses of the last second can be missing, because tiger_db writes usage counts once per
    second. When an API key is deleted, its usage counts are deleted too.

    Raises:
        InvalidValue: `since` has no time zone, `by` is empty or combines hours with days, or
            `limit` is not from 1 to 1000.
    """
    counts = api_key_usage.c
    columns = {
        "day": func.date_trunc("day", counts.hour, "UTC").label("start"),
        "hour": counts.hour.label("start"),
        "api_key_id": counts.api_key_id,
        "account_id": inspect(APIKey).columns.tiger_account_id.label("account_id"),
    }
    total = func.sum(counts.count).cast(BigInteger).label("count")
    statement = (
        count_groups(total, columns, by, limit)
        .join(APIKey, col(APIKey.id) == counts.api_key_id)
        .where(counts.hour >= func.date_trunc("hour", since, "UTC"))
    )
    if "api_key_id" in as_list(by):
        name = col(APIKey.name)
        statement = statement.add_columns(name.label("api_key_name")).group_by(name)
    if key_id is not None:
        statement = statement.where(counts.api_key_id == key_id)
    return [UsageCount(**row) for row in (await session.execute(statement)).mappings()]

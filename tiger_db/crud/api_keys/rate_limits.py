"""Functions that check and return the rate limits of API keys.

The check of rate limits is exact, even if several processes authorize the same API key.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from tiger_db.crud.api_keys.policy import KeyPermissions
from tiger_db.crud.common import fetch_rows
from tiger_db.errors import NotFound, RateLimited
from tiger_db.public import public

if TYPE_CHECKING:
    import asyncpg

# CONSUME checks the rate limits of an API key, and counts one use. All keys of a rotation chain
# share one row of api_key_limits. Concurrent uses wait for the row lock, and then check the
# committed counts. If the database's clock steps back, the row of api_key_limits keeps the
# later hour and day.
CONSUME = """
INSERT INTO api_key_limits AS l (api_key_id, hour, hour_count, day, day_count)
SELECT coalesce(k.root_id, k.id), date_trunc('hour', now, 'UTC'), 1,
    date_trunc('day', now, 'UTC'), 1
FROM clock_timestamp() AS now, api_keys AS k
LEFT JOIN tiger_accounts AS a ON a.id = k.tiger_account_id
WHERE k.id = $1 AND k.status = 'active' AND coalesce(k.expires_at > now, true)
    AND coalesce(a.status = 'active', true)
ON CONFLICT (api_key_id) DO UPDATE SET
    hour = greatest(l.hour, excluded.hour),
    hour_count = CASE WHEN l.hour < excluded.hour THEN 0 ELSE l.hour_count END + 1,
    day = greatest(l.day, excluded.day),
    day_count = CASE WHEN l.day < excluded.day THEN 0 ELSE l.day_count END + 1
WHERE (l.hour < excluded.hour OR coalesce(l.hour_count < $2, true))
    AND (l.day < excluded.day OR coalesce(l.day_count < $3, true))
RETURNING true
"""
_COUNTS = """
SELECT hour, hour_count, day, day_count, clock_timestamp() AS now
FROM api_key_limits WHERE api_key_id = $1
"""


async def consume(
    connection: "asyncpg.Connection[asyncpg.Record]", permissions: KeyPermissions
) -> bool:
    """Count one use of an API key, if no rate limit is reached.

    If the API key has changed since `permissions` were read, return False. If `consume` returns
    False, `permissions` are possibly outdated, and the caller must read the permissions again.

    Raises:
        RateLimited: a rate limit of the API key is reached.
    """
    if await connection.fetchval(
        CONSUME, permissions.key_id, permissions.per_hour, permissions.per_day
    ):
        return True
    counts = await connection.fetchrow(_COUNTS, permissions.limits_key_id)
    if counts is None:
        return False
    now: datetime = counts["now"]
    ends = []
    if permissions.per_hour is not None and counts["hour_count"] >= permissions.per_hour:
        ends.append(counts["hour"].astimezone(UTC) + timedelta(hours=1))
    if permissions.per_day is not None and counts["day_count"] >= permissions.per_day:
        ends.append(counts["day"].astimezone(UTC) + timedelta(days=1))
    if ends and max(ends) > now:
        raise RateLimited(retry_after=max(ends) - now)
    return False


@dataclass(frozen=True, slots=True)
class Limit:
    """A rate limit of an API key, and the uses that were counted in the current hour or day.

    `used` is never more than `limit`, unless `limit` was lowered.
    """

    limit: int
    used: int
    resets_at: datetime  # end of the hour or day (UTC)

    @property
    def remaining(self) -> int:
        return max(self.limit - self.used, 0)


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """The rate limits of an API key per hour and per day.

    `hour` or `day` is None if the API key has no limit per hour or per day.
    """

    hour: Limit | None
    day: Limit | None


# If the database's clock steps back, the row of api_key_limits keeps the later hour and day.
_LIMITS = """
SELECT k.rate_limit_per_hour, CASE WHEN l.hour >= this.hour THEN l.hour_count ELSE 0 END,
    greatest(l.hour, this.hour), k.rate_limit_per_day,
    CASE WHEN l.day >= this.day THEN l.day_count ELSE 0 END, greatest(l.day, this.day)
FROM (
    SELECT date_trunc('hour', now, 'UTC') AS hour, date_trunc('day', now, 'UTC') AS day
    FROM clock_timestamp() AS now
) AS this, api_keys AS k
LEFT JOIN api_key_limits AS l ON l.api_key_id = coalesce(k.root_id, k.id)
WHERE k.id = $1
"""


@public
async def limits(session: AsyncSession, key_id: UUID) -> KeyLimits:
    """Return the rate limits of an API key, with the uses of the current hour and day (UTC).

    All API keys of a rotation chain share their uses, so a new API key continues the counts of its
    predecessor.

    Raises:
        NotFound: no API key has the id `key_id`.
    """
    rows = await fetch_rows(session, _LIMITS, key_id)
    if not rows:
        raise NotFound(f"there is no APIKey {key_id}")
    per_hour, hour_count, hour, per_day, day_count, day = rows[0]
    return KeyLimits(
        hour=_limit(per_hour, hour_count, hour, timedelta(hours=1)),
        day=_limit(per_day, day_count, day, timedelta(days=1)),
    )


def _limit(limit: int | None, used: int, start: datetime, period: timedelta) -> Limit | None:
    if limit is None:
        return None
    return Limit(limit, used, resets_at=start.astimezone(UTC) + period)

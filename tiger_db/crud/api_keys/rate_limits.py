"""The check of the rate limits of API keys, which is exact over all processes."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from tiger_db.crud.api_keys.policy import KeyPermissions
from tiger_db.errors import RateLimited

if TYPE_CHECKING:
    import asyncpg

# CONSUME checks the rate limits of an API key, and counts one use. All keys of a rotation chain
# share one row of api_key_limits. Concurrent uses wait for the row lock, and then check the
# committed counts. If the database's clock steps back, the row keeps its later hour and day.
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

    If the API key has changed since `permissions` were read, return False. The caller must read the
    permissions again if `consume` returns False.

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

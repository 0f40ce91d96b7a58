"""Events of old months."""

from datetime import UTC, datetime

from tiger_db.audit.storage import Connection

# Events of a month as many months ago as asked, written then or, if asked, now.
PUT = """
INSERT INTO audit_logs (id, created_at, action, result, severity)
SELECT uuid7_floor(t), CASE WHEN $3 THEN clock_timestamp() ELSE t END, 'data:query', 'success',
    'low' FROM generate_series(1, $2) AS n, LATERAL (SELECT date_trunc('month', now(), 'UTC')
    - make_interval(months => $1) + n * interval '1 second' + $4 * interval '1 minute') AS at (t)
"""


async def put(
    connection: Connection, ago: int, count: int = 3, *, now: bool = False, minute: int = 0
) -> None:
    await connection.execute(PUT, ago, count, now, minute)


def month(ago: int) -> str:
    today = datetime.now(UTC)
    months = today.year * 12 + today.month - 1 - ago
    return f"{months // 12}-{months % 12 + 1:02}"


def partition(ago: int) -> str:
    return f"audit_logs_{month(ago).replace('-', '_')}"

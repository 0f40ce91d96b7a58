"""Benchmarks of the audit trail: writing, paging, sealing and verifying."""

import resource
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
from pydantic import SecretStr
from uuid_utils.compat import uuid7

from benchmarks.work import Work
from tiger_db import AuditAction, AuditLog, Database, audit, crud
from tiger_db.connections import connect
from tiger_db.crud.audit_logs.queries import EVENTS
from tiger_db.crud.pagination import encode_cursor
from tiger_db.signing import generate_signing_key

ROWS = 1_000_000
MONTHS = 12
PAGE = 50
DEPTH = "depth"
EVENT: dict[str, Any] = {
    "action": AuditAction.TRADE_PLACE_ORDER,
    "resource_type": "order",
    "resource_id": "31318009878020096",
    "user_id": "alice",
    "request_id": "9f8b1c2d",
    "details": {"symbol": "AAPL", "side": "BUY", "quantity": 100, "limit_price": "187.5"},
    "duration_ms": 42,
}
COLUMNS = ["id", "result", "severity", *EVENT]
INSERT = (
    f"INSERT INTO audit_logs ({', '.join(COLUMNS)})"
    f" VALUES ({', '.join(f'${n + 1}' for n in range(len(COLUMNS)))})"
)
# Each event has an account, an API key and one of 250 users. Every second event has a session and
# an address.
FILL = """
INSERT INTO audit_logs (id, action, result, severity, resource_type, resource_id, user_id,
    session_id, ip_address, user_agent, request_id, tiger_account_id, api_key_id, details,
    duration_ms)
SELECT (left(uuid7_floor(now() - make_interval(months => $2::int) * (1 - n / $1::float))::text, 14)
        || '7' || substr(md5(n::text), 1, 3) || '-8' || substr(md5(n::text), 4, 3) || '-'
        || lpad(to_hex(n), 12, '0'))::uuid,
    (ARRAY['trade:place_order', 'data:query', 'mcp:tool_call', 'token:refresh'])[1 + n % 4],
    'success', CASE WHEN n % 1000 = 0 THEN 'high' ELSE 'medium' END::audit_severity, 'order',
    (31318009878020096 + n)::text, 'user-' || n % 250,
    CASE WHEN n % 2 = 0 THEN substr(md5((n / 20)::text), 1, 16) END,
    CASE WHEN n % 2 = 0 THEN ('10.0.' || n % 250 || '.7')::inet END,
    CASE WHEN n % 2 = 0 THEN 'claude-desktop/1.2' END,
    substr(md5(n::text), 1, 8), md5((n % 200)::text)::uuid, md5((n % 300)::text)::uuid,
    jsonb_build_object('symbol', 'AAPL', 'side', 'BUY', 'quantity', n % 1000, 'limit_price',
        '187.5'),
    n % 500
FROM generate_series(1, $1::int) AS n
"""
SIZE = """
SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits
WHERE inhparent = 'audit_logs'::regclass
"""


def record() -> tuple[object, ...]:
    """Return the values of an event for plain asyncpg."""
    return (uuid7(), "success", "medium", *EVENT.values())


async def works(database: Database, pool: "asyncpg.Pool[asyncpg.Record]") -> list[Work]:
    async def log_one() -> None:
        async with database.session() as session:
            await crud.audit_logs.log_event(session, **EVENT)

    async def insert_one() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.fetchval(f"{INSERT} RETURNING created_at", *record())

    async def record_one() -> None:
        async with database.sessions() as session:
            await crud.audit_logs.record_event(session, **EVENT)

    async def insert_alone() -> None:
        async with pool.acquire() as connection:
            await connection.execute(INSERT, *record())

    batches = [[AuditLog(**EVENT) for _ in range(1000)] for _ in range(40)]

    async def log_thousand() -> None:
        async with database.session() as session:
            await crud.audit_logs.log_events(session, batches.pop())

    async def copy_thousand() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.copy_records_to_table(
                "audit_logs", columns=COLUMNS, records=[record() for _ in range(1000)]
            )

    return [
        Work("log one event in a transaction", log_one, insert_one, times=100),
        Work("record one event out of band", record_one, insert_alone, times=100),
        Work(
            "log 1,000 events that exist as objects, compared with COPY",
            log_thousand,
            copy_thousand,
            times=1,
        ),
    ]


async def fill(database: Database, rows: int = ROWS) -> None:
    """Insert events, spread over the last twelve months."""
    connection = await connect(database.settings)
    try:
        await connection.execute("SET statement_timeout = 0")
        for ago in range(1, MONTHS + 1):
            await connection.execute(
                "SELECT make_audit_partition(date_trunc('month', now() AT TIME ZONE 'UTC')"
                f" - make_interval(months => {ago}))"
            )
        await connection.execute(FILL, rows, MONTHS, timeout=3600)
        await connection.execute("VACUUM ANALYZE audit_logs", timeout=3600)
    finally:
        await connection.close()


async def page_works(database: Database, pool: "asyncpg.Pool[asyncpg.Record]") -> list[Work]:
    oldest = await pool.fetchval("SELECT id FROM audit_logs ORDER BY id OFFSET $1 LIMIT 1", PAGE)

    async def first_page() -> None:
        async with database.session() as session:
            page = await crud.audit_logs.search(session, limit=PAGE)
            assert len(page) == PAGE

    async def plain_first_page() -> None:
        async with pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(
                "SELECT * FROM audit_logs ORDER BY id DESC LIMIT $1", PAGE + 1
            )
            assert len(rows) > PAGE

    async def deep_page() -> None:
        async with database.session() as session:
            page = await crud.audit_logs.search(
                session, after=encode_cursor(EVENTS, oldest), limit=PAGE
            )
            assert len(page) == PAGE

    async def plain_deep_page() -> None:
        async with pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(
                "SELECT * FROM audit_logs WHERE id < $1 ORDER BY id DESC LIMIT $2",
                oldest,
                PAGE + 1,
            )
            assert len(rows) >= PAGE

    return [
        Work(f"first page ({PAGE} of {ROWS:,} events)", first_page, plain_first_page, times=60),
        Work(f"page {ROWS // PAGE:,} of the same events", deep_page, plain_deep_page, times=60),
        Work(DEPTH, deep_page, first_page, times=60),
    ]


async def facts(
    database: Database, pool: "asyncpg.Pool[asyncpg.Record]", writes: float
) -> AsyncIterator[str]:
    """Yield other measurements of the same million events.

    `writes` is the time in seconds that one writer needs for one event.
    """
    size = await pool.fetchval(SIZE)
    yield f"{ROWS:,} events take {size / 2**20:.0f} MiB, including indexes."
    settings = database.settings.model_copy(
        update={"audit_signing_key": SecretStr(generate_signing_key())}
    )
    async with Database(settings) as sealing:
        start = time.perf_counter()
        sealed = await audit.seal(sealing)
        rate = sealed.rows / (time.perf_counter() - start)
        assert sealed.rows == ROWS
        seals = await pool.fetchval("SELECT pg_total_relation_size('audit_seals')")
        yield (
            f"Sealing: {rate:,.0f} events a second, {rate * writes:.0f} times as many as one writer"
            f" records out of band. The seals take {seals / 2**20:.0f} MiB."
        )
        before = _peak()
        start = time.perf_counter()
        report = await audit.verify(sealing)
        assert report.sound
        assert report.rows == ROWS
        yield (
            f"Verifying all events: {time.perf_counter() - start:.1f} s. The memory of the process"
            f" grew by {_peak() - before:.0f} MiB."
        )
    plan = await pool.fetch(
        "EXPLAIN (ANALYZE, TIMING OFF, COSTS OFF) SELECT * FROM audit_logs"
        " WHERE id >= uuid7_floor(now() - interval '1 day')"
        " AND (severity IN ('high', 'critical') OR action IN ('security:key_leak'))"
        " ORDER BY id DESC LIMIT 51"
    )
    removed = sum(int(row[0].split(":")[1]) for row in plan if "Rows Removed by Filter" in row[0])
    async with database.session() as session:
        found = await crud.audit_logs.get_security_events(session)
    yield (
        f"Listing the {len(found)} security events of the last day reads {removed + len(found):,}"
        f" of {ROWS:,} rows."
    )


def _peak() -> float:
    """Return the peak memory of this process in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

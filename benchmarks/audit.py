"""Writing and paging the audit trail."""

from typing import Any

import asyncpg
from uuid_utils.compat import uuid7

from benchmarks.work import Work
from tiger_db import AuditAction, AuditLog, Database, crud
from tiger_db.crud.common import encode_cursor

ROWS = 200_000
PAGE = 20
EVENT: dict[str, Any] = {
    "action": AuditAction.TRADE_PLACE_ORDER,
    "resource_type": "order",
    "resource_id": "31318009878020096",
    "user_id": "alice",
    "request_id": "9f8b1c2d",
    "details": {"symbol": "AAPL", "side": "BUY", "quantity": 100, "limit_price": "187.5"},
    "duration_ms": 42,
}
DEPTH = "depth"
COLUMNS = ["id", "result", "severity", *EVENT]
INSERT = (
    f"INSERT INTO audit_logs ({', '.join(COLUMNS)})"
    f" VALUES ({', '.join(f'${n + 1}' for n in range(len(COLUMNS)))})"
)


def record() -> tuple[object, ...]:
    """An event as plain asyncpg takes it."""
    return (uuid7(), "success", "medium", *EVENT.values())


async def works(database: Database, pool: "asyncpg.Pool[asyncpg.Record]") -> list[Work]:
    async def log_one() -> None:
        async with database.session() as session:
            await crud.audit_logs.log_event(session, **EVENT)

    async def insert_one() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.fetchval(f"{INSERT} RETURNING created_at", *record())

    async def log_thousand() -> None:
        async with database.session() as session:
            await crud.audit_logs.log_events(session, [AuditLog(**EVENT) for _ in range(1000)])

    async def insert_thousand() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.executemany(INSERT, [record() for _ in range(1000)])

    async def copy_thousand() -> None:
        async with pool.acquire() as connection, connection.transaction():
            await connection.copy_records_to_table(
                "audit_logs", columns=COLUMNS, records=[record() for _ in range(1000)]
            )

    return [
        Work("log one event in a transaction", log_one, insert_one, times=100),
        Work("log 1,000 events in one, beside executemany", log_thousand, insert_thousand, times=1),
        Work("log 1,000 events in one, beside COPY", log_thousand, copy_thousand, times=1),
    ]


async def page_works(database: Database, pool: "asyncpg.Pool[asyncpg.Record]") -> list[Work]:
    async with pool.acquire() as connection:
        await connection.execute("TRUNCATE audit_logs")
        await connection.copy_records_to_table(
            "audit_logs", columns=COLUMNS, records=[record() for _ in range(ROWS)]
        )
        await connection.execute("VACUUM ANALYZE audit_logs")
        oldest = await connection.fetchval(
            "SELECT id FROM audit_logs ORDER BY id OFFSET $1 LIMIT 1", PAGE
        )

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
            page = await crud.audit_logs.search(session, after=encode_cursor(oldest), limit=PAGE)
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
        Work(f"first page ({PAGE} of {ROWS:,} events)", first_page, plain_first_page, times=100),
        Work(f"page {ROWS // PAGE:,} of the same", deep_page, plain_deep_page, times=100),
        Work(DEPTH, deep_page, first_page, times=100),
    ]

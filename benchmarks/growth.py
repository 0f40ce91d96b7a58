"""Measurements of the audit trail at several sizes."""

import hashlib
import statistics
import time
from collections.abc import Awaitable, Callable
from uuid import UUID

from pydantic import SecretStr

from benchmarks import audit as trail
from benchmarks.work import ROUNDS
from tiger_db import Database, audit, crud
from tiger_db.connections import connect
from tiger_db.database import AsyncSession
from tiger_db.signing import generate_signing_key

SIZES = (10_000, 100_000, 1_000_000)
ACCOUNT = UUID(hashlib.md5(b"7").hexdigest())  # an account of FILL
HEADER = (
    "| events | bulk load | page of 50 | search by account | security events of a day | seal"
    " | verify | size |\n|---:|---:|---:|---:|---:|---:|---:|---:|"
)


async def row(database: Database, events: int) -> str:
    """Fill an empty database, and return a row of the table."""
    load = await _seconds(lambda: trail.fill(database, events))
    page = await _query(database, crud.audit_logs.search)
    search = await _query(
        database, lambda session: crud.audit_logs.search(session, account_id=ACCOUNT)
    )
    security = await _query(database, crud.audit_logs.get_security_events)
    key = SecretStr(generate_signing_key())
    settings = database.settings.model_copy(update={"audit_signing_key": key})
    async with Database(settings) as sealing:
        seal = await _seconds(lambda: audit.seal(sealing))
        verify = await _seconds(lambda: audit.verify(sealing))
    connection = await connect(database.settings)
    try:
        size = await connection.fetchval(trail.SIZE)
    finally:
        await connection.close()
    queries = " | ".join(f"{seconds * 1000:.1f} ms" for seconds in (page, search, security))
    return (
        f"| {events:,} | {load:,.1f} s | {queries} | {seal:,.1f} s | {verify:,.1f} s"
        f" | {size / 2**20:,.0f} MiB |"
    )


async def _seconds(work: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


async def _query(database: Database, query: Callable[[AsyncSession], Awaitable[object]]) -> float:
    async def once() -> None:
        async with database.session() as session:
            await query(session)

    await once()
    return statistics.median([await _seconds(once) for _ in range(ROUNDS)])

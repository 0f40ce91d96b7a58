"""Pages of the audit trail read what they return, among a million events.

Filling the table takes a minute, so the tests run only in `make soak`.
"""

from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from sqlalchemy import text

from benchmarks.audit import MONTHS, ROWS, fill
from tests.support.plans import Plan, plan_of
from tests.support.servers import create_database
from tiger_db import AsyncSession, AuditLog, Database, Page
from tiger_db.crud import audit_logs
from tiger_db.crud.audit_logs.queries import EVENTS
from tiger_db.crud.pagination import encode_cursor
from tiger_db.testing import databases

PAGE = 50
PARTITIONS = MONTHS + 1  # partitions with events
MIDDLE = datetime.now(UTC) - timedelta(days=180)
# The event in the middle, with the values of its fields.
EXAMPLE = text("""
SELECT id, tiger_account_id, api_key_id, user_id, request_id FROM audit_logs
ORDER BY id OFFSET :middle LIMIT 1
""")

pytestmark = pytest.mark.soak


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def trail(server_url: str, template: str) -> AsyncIterator[tuple[Database, dict[str, Any]]]:
    """A database with a million events in twelve months, and one of the events."""
    name = f"tiger_db_trail_{uuid4().hex[:12]}"
    settings = await create_database(server_url, name, template)
    async with Database(settings) as database:
        await fill(database)
        async with database.session() as session:
            row = (await session.execute(EXAMPLE, {"middle": ROWS // 2})).mappings().one()
        yield database, dict(row)
    await databases.drop(server_url, name)


def rows_read(plan: Plan) -> int:
    """Return the number of rows that the scans of a plan read, with the rows that do not match."""
    numbers = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
    return sum(
        node["Actual Loops"] * node.get(number, 0)
        for node in plan
        if "Relation Name" in node
        for number in numbers
    )


@pytest.mark.parametrize("direction", ["first", "after", "before"])
@pytest.mark.parametrize(
    "name", ["newest", "time", "tiger_account_id", "api_key_id", "user_id", "request_id"]
)
async def test_a_page_reads_what_it_returns(
    trail: tuple[Database, dict[str, Any]], name: str, direction: str
) -> None:
    database, event = trail
    month = {"since": MIDDLE - timedelta(days=15), "until": MIDDLE + timedelta(days=15)}
    filters: dict[str, Any] = {"newest": {}, "time": month}.get(
        name, {name.removeprefix("tiger_"): event.get(name)}
    )
    cursor = encode_cursor(EVENTS, event["id"], filters=filters)
    position: dict[str, Any] = {} if direction == "first" else {direction: cursor}

    def query(session: AsyncSession) -> Awaitable[Page[AuditLog]]:
        return audit_logs.search(session, limit=PAGE, **position, **filters)

    async with database.session() as session:
        found = await query(session)
    plan = await plan_of(database, query, analyze=True)
    # PostgreSQL merges the partitions by id: it reads one row ahead in each partition.
    assert rows_read(plan) <= len(found) + 1 + PARTITIONS
    assert len(found) == (PAGE if name != "request_id" else direction == "first")
    assert not [node for node in plan if node["Node Type"] == "Seq Scan" and node["Actual Rows"]]

"""Pages of the audit trail read what they return, among a million events.

Filling the table takes a minute, so the tests run only in `make soak`.
"""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from sqlalchemy import text

from benchmarks.audit import ROWS, fill
from tests.support import databases
from tests.support.plans import Plan, plan_of
from tiger_db import Database, Settings
from tiger_db.crud import audit_logs
from tiger_db.crud.audit_logs.queries import EVENTS
from tiger_db.crud.pagination import encode_cursor

PAGE = 50
MIDDLE = datetime.now(UTC) - timedelta(days=180)
# The event in the middle, with the values of its fields.
EXAMPLE = text(f"""
SELECT id, tiger_account_id, api_key_id, user_id, request_id FROM audit_logs
WHERE details->>'quantity' IS NOT NULL ORDER BY id OFFSET {ROWS // 2} LIMIT 1
""")  # noqa: S608  # a number

pytestmark = pytest.mark.soak


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def trail(server_url: str, template: str) -> AsyncIterator[tuple[Settings, dict[str, Any]]]:
    """A database with a million events in twelve months, and one of the events."""
    name = f"tiger_db_trail_{uuid4().hex[:12]}"
    settings = await databases.create(server_url, name, template)
    async with Database(settings) as database:
        await fill(database)
        async with database.session() as session:
            row = (await session.execute(EXAMPLE)).mappings().one()
    yield settings, dict(row)
    await databases.drop(server_url, name)


def figures(plan: Plan) -> dict[str, float]:
    """Return the number of rows that a plan reads, its buffers, and its time in milliseconds."""
    scans = [node for node in plan if "Scan" in node["Node Type"] and "Relation Name" in node]
    removed = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")
    return {
        "rows": sum(node["Actual Loops"] * node.get(name, 0) for node in scans for name in removed),
        "buffers": plan[0]["Shared Hit Blocks"] + plan[0]["Shared Read Blocks"],
        "ms": plan[0]["Actual Total Time"],
    }


@pytest.mark.parametrize("direction", ["first", "after", "before"])
@pytest.mark.parametrize(
    "name", ["newest", "tiger_account_id", "api_key_id", "user_id", "request_id", "time"]
)
async def test_a_page_reads_what_it_returns(
    trail: tuple[Settings, dict[str, Any]], name: str, direction: str
) -> None:
    settings, event = trail
    filters: dict[str, Any] = {
        "newest": {},
        "tiger_account_id": {"account_id": event["tiger_account_id"]},
        "time": {"since": MIDDLE, "until": MIDDLE + timedelta(days=30)},
    }.get(name) or {name: event.get(name)}
    if name == "newest":
        filters = {}
    cursor = encode_cursor(EVENTS, UUID(str(event["id"])), filters=filters)
    position = {} if direction == "first" else {direction: cursor}
    plan = await plan_of(
        settings, partial(audit_logs.search, limit=PAGE, **position, **filters), analyze=True
    )
    found = figures(plan)
    print(f"\n{name:18} {direction:7} {found['rows']:7,.0f} rows {found['buffers']:6,} buffers {found['ms']:8.2f} ms", sorted({n["Node Type"] for n in plan}))

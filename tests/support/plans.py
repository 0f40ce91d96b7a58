"""How PostgreSQL carries out the statements of a function."""

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from sqlalchemy import event, text

from tiger_db import Database
from tiger_db.database import AsyncSession

Query = Callable[[AsyncSession], Awaitable[object]]
Plan = list[dict[str, Any]]


async def plan_of(database: Database, query: Query, *, analyze: bool = False) -> Plan:
    """The nodes of the plans of all the statements that a query sends, and rolls back.

    With `analyze`, the statements are run, and the nodes have the numbers of rows and buffers.
    """
    options = "FORMAT JSON, ANALYZE, BUFFERS" if analyze else "FORMAT JSON"
    sent: list[tuple[str, Any]] = []

    def record(_connection: object, _cursor: object, sql: str, values: object, *_: object) -> None:
        sent.append((sql, values))

    engine = database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", record)
    try:
        async with database.sessions() as session:
            await query(session)
    finally:
        event.remove(engine, "before_cursor_execute", record)
    async with database.engine.connect() as connection:
        plans = [
            await connection.exec_driver_sql(f"EXPLAIN ({options}) {sql}", values)
            for sql, values in sent
            if sql.lstrip().startswith(("SELECT", "INSERT", "UPDATE", "DELETE", "WITH"))
        ]
        return [node for plan in plans for node in nodes(as_json(plan.scalar())[0]["Plan"])]


def as_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes(inner)


async def used_indexes(database: Database, query: Query) -> set[str]:
    """By name; an index of a partition by its parent's."""
    plan = await plan_of(database, query)
    used = {node["Index Name"] for node in plan if "Index Name" in node}
    used |= {name for node in plan for name in node.get("Conflict Arbiter Indexes", [])}
    async with database.session() as session:
        parents = await session.execute(
            text(
                "SELECT inhrelid::regclass::text AS child, inhparent::regclass::text AS parent"
                " FROM pg_inherits"
                " JOIN pg_class ON oid = inhrelid AND relkind = 'i'"
            )
        )
        parent_of = {row.child: row.parent for row in parents}
    return {parent_of.get(name, name) for name in used}

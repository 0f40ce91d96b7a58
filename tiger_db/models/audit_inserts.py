"""Events as rows: what is written most is written past the ORM."""

import json
from collections.abc import Sequence
from typing import Any

import asyncpg
from sqlalchemy import Table
from sqlalchemy.dialects.postgresql import JSONB

from tiger_db.models.audit_logs import AuditLog
from tiger_db.models.mutable import Tracked

SERVER_COLUMNS = ("created_at", "position")  # by the database
_TABLE: Table = AuditLog.__table__  # type: ignore[attr-defined]  # SQLAlchemy's
_JSON = [column.name for column in _TABLE.columns if isinstance(column.type, JSONB)]
_PLAIN = [c.name for c in _TABLE.columns if c.name not in {*_JSON, *SERVER_COLUMNS}]
_COLUMNS = [*_PLAIN, *_JSON]
INSERT = (
    f"INSERT INTO audit_logs ({', '.join(_COLUMNS)})"  # noqa: S608  # names of columns
    f" VALUES ({', '.join(f'${n}' for n, _ in enumerate(_COLUMNS, start=1))})"
)


def insert_values(event: AuditLog) -> tuple[Any, ...]:
    """What `INSERT` takes."""
    values = event.__dict__
    row = [values.get(name) for name in _PLAIN]
    for name in _JSON:
        value = values.get(name)
        if isinstance(value, Tracked) and value.touched:
            value = event.validate_changes({name: value})[name]
        row.append(value if value is None else json.dumps(value))
    return tuple(row)


async def insert_events(
    connection: "asyncpg.Connection[asyncpg.Record]", events: Sequence[AuditLog]
) -> None:
    """Store events, all or none; in a transaction of their own, if none has begun."""
    if len(events) == 1:
        await connection.execute(INSERT, *insert_values(events[0]))
    else:
        rows = map(insert_values, events)
        await connection.copy_records_to_table("audit_logs", columns=_COLUMNS, records=rows)

"""The statements that a piece of code sends."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import event

from tiger_db import Database


@contextmanager
def recorded(database: Database) -> Iterator[list[str]]:
    """Collect the statements that are sent meanwhile, transaction control left out."""
    statements: list[str] = []

    def record(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(statement)

    engine = database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(engine, "before_cursor_execute", record)

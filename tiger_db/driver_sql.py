"""Short SQL statements on the driver's cursor, without SQLAlchemy's objects for each statement.

SQLAlchemy's context and result of a statement take more processor time than the driver needs for
the statement. This module alone uses a private attribute of SQLAlchemy's dialect for asyncpg.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.engine.interfaces import DBAPICursor

Report = Callable[[str, float], None]
# Names of execution options: of an engine, the function that gets the SQL and the seconds of each
# statement; of a statement, the error with which the statement failed outside SQLAlchemy.
REPORT = "tiger_db_report"
_ERROR = "tiger_db_error"


def observe(engine: Engine, report: Report) -> None:
    """Call `report` after each statement that SQLAlchemy executes on an engine."""

    # The event is `do_execute`, because a listener for `before_cursor_execute` would slow down each
    # query of SQLAlchemy.
    @event.listens_for(engine, "do_execute")
    def _execute(
        cursor: DBAPICursor,
        query: str,
        parameters: Any,  # noqa: ANN401  # the driver's type
        context: ExecutionContext,
    ) -> Literal[True]:
        if (error := context.execution_options.get(_ERROR)) is not None:
            raise error
        started = time.perf_counter()
        try:
            context.dialect.do_execute(cursor, query, parameters, context)
        finally:
            report(query, time.perf_counter() - started)
        return True


def fetch(connection: Connection, query: str, values: tuple[object, ...]) -> Sequence[Any]:
    """Execute constant SQL in the transaction of a connection, and return the rows as sequences.

    The query is logged, traced and reported as any statement of SQLAlchemy, and its errors are
    those of SQLAlchemy. If the queries of the engine are logged or traced, or if the connection has
    no active transaction, which SQLAlchemy then begins or refuses, SQLAlchemy executes the query.
    """
    report: Report | None = connection.get_execution_options().get(REPORT)
    transaction = connection.get_nested_transaction() or connection.get_transaction()
    is_active = transaction is not None and transaction.is_active
    if report is None or not is_active or _is_traced(connection):
        return connection.exec_driver_sql(query, values).all()
    cursor: Any = connection.connection.cursor()
    dialect: Any = connection.dialect
    # Statements that were prepared before a change of the schema are prepared again.
    cursor._invalidate_schema_cache_asof = dialect._invalidate_schema_cache_asof  # noqa: SLF001
    started = time.perf_counter()
    try:
        cursor.execute(query, values)
    except BaseException as error:
        # SQLAlchemy handles the error as if it had executed the query: the listeners for
        # `handle_error` convert it, and a lost connection leaves the pool.
        connection.exec_driver_sql(query, values, execution_options={_ERROR: error})
        raise
    finally:
        report(query, time.perf_counter() - started)
    rows: Sequence[Any] = cursor.fetchall()
    cursor.close()
    return rows


def _is_traced(connection: Connection) -> bool:
    """Return whether SQLAlchemy logs the statements of a connection, or calls event listeners."""
    listeners = connection.dispatch
    return bool(
        listeners.before_cursor_execute
        or listeners.after_cursor_execute
        or connection.engine.logger.isEnabledFor(logging.INFO)
    )

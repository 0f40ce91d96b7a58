"""Logging of slow SQL queries, without the parameters of the queries."""

import logging
import time
from typing import Any, Literal

import asyncpg
from asyncpg.connection import LoggedQuery
from sqlalchemy import Engine, event
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.engine.interfaces import DBAPICursor

from tiger_db.redaction import redact_known

_MAX_LOGGED_CHARACTERS = 500  # maximum length of a query in the log
_logger = logging.getLogger("tiger_db")


def log_slow_queries_of_engine(engine: Engine, threshold_seconds: float) -> None:
    """Log each query of SQLAlchemy that takes at least `threshold_seconds`."""

    # The event is `do_execute`, because a listener for `before_cursor_execute` would slow down each
    # query of SQLAlchemy.
    @event.listens_for(engine, "do_execute")
    def _execute(
        cursor: DBAPICursor,
        query: str,
        parameters: Any,  # noqa: ANN401  # the driver's type
        context: ExecutionContext,
    ) -> Literal[True]:
        started = time.perf_counter()
        try:
            context.dialect.do_execute(cursor, query, parameters, context)
        finally:
            _log_if_slow(query, time.perf_counter() - started, threshold_seconds)
        return True


def log_slow_queries_of_connection(
    connection: "asyncpg.Connection[asyncpg.Record]", threshold_seconds: float
) -> None:
    """Log each query that bypasses SQLAlchemy and takes at least `threshold_seconds`.

    Queries of SQLAlchemy are not logged twice, because SQLAlchemy executes prepared statements.
    asyncpg does not report executions of prepared statements to query loggers.
    """

    def log(query: LoggedQuery) -> None:
        _log_if_slow(query.query, query.elapsed, threshold_seconds)

    connection.add_query_logger(log)


def _log_if_slow(query: str, seconds: float, threshold_seconds: float) -> None:
    if seconds < threshold_seconds:
        return
    shown = redact_known(" ".join(query.split()))
    if len(shown) > _MAX_LOGGED_CHARACTERS:
        shown = f"{shown[:_MAX_LOGGED_CHARACTERS]}..."
    _logger.warning("slow query: %.3f s: %s", seconds, shown)

"""Logging of slow SQL queries, without the parameters of the queries."""

import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial, wraps

from tiger_db.connections.pool import Connection
from tiger_db.driver_sql import Report
from tiger_db.redaction import redact_known

_MAX_LOGGED_CHARACTERS = 500  # maximum length of a query in the log
_logger = logging.getLogger("tiger_db")


def slow_query_log(threshold_seconds: float) -> Report:
    """Return a function that logs a query that took at least `threshold_seconds`, if not zero."""
    return partial(_log_if_slow, threshold_seconds=threshold_seconds or math.inf)


class LoggingConnection(Connection):
    """A connection that logs slow queries that bypass SQLAlchemy.

    Queries of SQLAlchemy are not logged twice, because SQLAlchemy executes prepared statements. The
    query loggers of asyncpg are not used, because each of them adds two callbacks to a transaction.
    """

    slow_query_seconds = math.inf


def _logging(name: str) -> Callable[..., Awaitable[object]]:
    run = getattr(Connection, name)

    @wraps(run)
    async def logging_run(
        self: LoggingConnection, query: str, *arguments: object, **options: object
    ) -> object:
        started = time.perf_counter()
        try:
            return await run(self, query, *arguments, **options)
        finally:
            _log_if_slow(query, time.perf_counter() - started, self.slow_query_seconds)

    return logging_run


for _name in ("execute", "executemany", "fetch", "fetchmany", "fetchrow", "fetchval"):
    setattr(LoggingConnection, _name, _logging(_name))


def _log_if_slow(query: str, seconds: float, threshold_seconds: float) -> None:
    if seconds < threshold_seconds:
        return
    shown = redact_known(" ".join(query.split()))
    if len(shown) > _MAX_LOGGED_CHARACTERS:
        shown = f"{shown[:_MAX_LOGGED_CHARACTERS]}..."
    _logger.warning("slow query: %.3f s: %s", seconds, shown)

"""Who sends a statement, and which statements are slow."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, wraps
from types import CodeType, FrameType
from typing import Any, Literal
from urllib.parse import quote

import asyncpg
from greenlet import getcurrent
from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext, ExecutionContext
from sqlalchemy.engine.interfaces import DBAPICursor

from tiger_db.redaction import redact_known

_logger = logging.getLogger("tiger_db")
_PACKAGE = "tiger_db."
# What a statement passes through on its way.
_LIBRARIES = ("sqlalchemy.", "sqlmodel.", "asyncpg.", "contextlib")
_PASSES_ON = {
    f"{_PACKAGE}{name}" for name in ("statements", "database", "crud.common", "crud.pagination")
}
_SHOWN = 500  # characters of a slow statement


def watch(engine: Engine, *, slow: float, comments: bool) -> None:
    """Have an engine log what takes `slow` seconds or more (0: nothing), and name the callers.

    Who listens for its errors after this is told their kind only, not what they say.
    """

    @event.listens_for(engine, "handle_error")
    def _hide_values(context: ExceptionContext) -> None:
        # What PostgreSQL and asyncpg say quotes values, and whoever listens next may trace it.
        error = context.original_exception
        state = getattr(error, "sqlstate", None) or ""
        context.original_exception = RuntimeError(f"{type(error).__name__} {state}".rstrip())

    if not slow and not comments:
        return

    # The one event that costs nothing else: those of connections have SQLAlchemy do more.
    @event.listens_for(engine, "do_execute")
    def _execute(
        cursor: DBAPICursor,
        statement: str,
        parameters: Any,  # noqa: ANN401  # the driver's
        context: ExecutionContext,
    ) -> Literal[True]:
        started = time.perf_counter()
        try:
            context.dialect.do_execute(
                cursor, commented(statement) if comments else statement, parameters, context
            )
        finally:
            _tell(statement, started, slow)
        return True


@cache
def connection_class(*, slow: float, comments: bool) -> "type[asyncpg.Connection[asyncpg.Record]]":
    """The same for the statements that are given to a connection of asyncpg's itself.

    No `SET search_path` outlives its transaction in these connections.
    """
    base: type[asyncpg.Connection[asyncpg.Record]] = type(
        "Connection", (asyncpg.Connection,), {"execute": _execute}
    )
    if not slow and not comments:
        return base

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        async def run(
            self: object,
            query: str,
            *arguments: object,
            **options: object,
        ) -> object:
            if comments and arguments:  # BEGIN and COMMIT have none
                query = commented(query)
            started = time.perf_counter()
            try:
                return await method(self, query, *arguments, **options)
            finally:
                _tell(query, started, slow)

        return run

    methods = ("execute", "executemany", "fetch", "fetchrow", "fetchval")
    watching = {name: watched(getattr(base, name)) for name in methods}
    made: type[asyncpg.Connection[asyncpg.Record]] = type("Connection", (base,), watching)
    return made


async def _execute(
    connection: "asyncpg.Connection[asyncpg.Record]",
    query: str,
    *arguments: object,
    **options: Any,  # noqa: ANN401  # asyncpg's
) -> object:
    """Execute as asyncpg does; a transaction starts with the search path of the connection.

    The pool's next session would have the path that one has set. This takes no round trip.
    """
    if query.startswith("BEGIN") and not arguments:
        query = f"{query.rstrip(';')}; SET LOCAL search_path TO DEFAULT"
    return await asyncpg.Connection.execute(connection, query, *arguments, **options)


def _tell(statement: str, started: float, slow: float) -> None:
    seconds = time.perf_counter() - started
    if not slow or seconds < slow:
        return
    shown = redact_known(" ".join(statement.split()))
    _logger.warning(
        "slow statement: %.3f s, from %s: %s",
        seconds,
        caller() or "unknown",
        shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}...",
    )


def commented(statement: str) -> str:
    """With its caller: https://google.github.io/sqlcommenter/spec/."""
    return statement if statement.endswith("*/") else statement + _comment_of(caller())


@cache  # as many as there are functions that send statements
def _comment_of(function: str | None) -> str:
    named = f",function='{quote(function, safe='')}'" if function else ""
    return f"/*application='tiger_db'{named}*/"


def caller() -> str | None:
    """The function that sends a statement, by module and name; None: none is known.

    It is the innermost one outside the libraries, or of ours the public one that it works for.
    """
    private = None
    for code, module in _callers():
        if module in _PASSES_ON or module.startswith(_LIBRARIES):
            continue
        if module.startswith("asyncio."):
            break  # whoever made the task has gone on
        name = _name(code, module)
        if not module.startswith(_PACKAGE) or not code.co_name.startswith("_"):
            return name
        private = private or name
    return private


def _callers() -> Iterator[tuple[CodeType, str]]:
    # SQLAlchemy runs the driver in a greenlet; who awaits it is in the parent's stack.
    greenlet = getcurrent()
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # the documented way
    while True:
        while frame is not None:
            yield frame.f_code, frame.f_globals.get("__name__", "")
            frame = frame.f_back
        if (greenlet := greenlet.parent) is None:
            return
        frame = greenlet.gr_frame


@cache
def _name(code: CodeType, module: str) -> str:
    return f"{module.removeprefix(_PACKAGE)}.{code.co_qualname}"

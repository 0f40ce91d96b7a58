"""What a check finds, and how it is said."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sqlalchemy import Row, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.errors import Conflict, QueryTimeout
from tiger_db.health import explain

Status: TypeAlias = Literal["ok", "warning", "problem"]

MINUTE, HOUR, DAY = 60, 3600, 86400
GRANT = "to see them, GRANT pg_monitor TO this role"
_LIMITS = text(
    "SELECT set_config('statement_timeout', '5s', true), set_config('lock_timeout', '1s', true)"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen, how bad it is, and what to do about it; None: nothing."""

    check: str
    status: Status
    seen: str
    advice: str | None = None


Found: TypeAlias = tuple[Status, str, str | None]
Check: TypeAlias = Callable[[AsyncConnection], Awaitable[Found]]


async def checked(connection: AsyncConnection, name: str, check: Check) -> Finding:
    """What a check finds, or why it could not see it."""
    try:
        async with connection.begin():
            await connection.execute(_LIMITS)
            return Finding(name, *await check(connection))
    except (DBAPIError, Conflict, QueryTimeout) as error:
        return Finding(name, "warning", f"not seen: {explain(error)}", _unseen(error))


def _unseen(error: Exception) -> str:
    if isinstance(error, Conflict | QueryTimeout):
        return "run it again; see the blocked sessions and the longest transaction"
    if isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == "42501":
        return "GRANT this role what it lacks, or run it as the owner of the tables"
    return "see `tiger-db check`"


async def ask(connection: AsyncConnection, statement: str) -> Sequence[Row[Any]]:
    """All rows of a statement."""
    return (await connection.execute(text(statement))).all()


def grade(value: float, bounds: tuple[float, float]) -> Status:
    """By the bounds from which on it is a warning, and a problem."""
    warning, problem = bounds
    return "problem" if value >= problem else "warning" if value >= warning else "ok"


def lasting(seconds: float) -> str:
    """A length of time, for people."""
    for unit, length in (("d", DAY), ("h", HOUR), ("min", MINUTE)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"

"""Checks of an installation for `tiger-db doctor`: each check returns its status, and advice."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from sqlalchemy import Executable, Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

Status: TypeAlias = Literal["ok", "warning", "problem"]
MINUTE, HOUR, DAY = 60, 3600, 86400  # durations in seconds
_MAX_ITEMS_LISTED = 3  # maximum number of items that a message lists


class Outcome(NamedTuple):
    """The status of a check, the state that the check found, and advice or None."""

    status: Status
    seen: str
    advice: str | None = None


async def fetch_all(connection: AsyncConnection, statement: str | Executable) -> Sequence[Row[Any]]:
    query = text(statement) if isinstance(statement, str) else statement
    return (await connection.execute(query)).all()


def grade(value: float, thresholds: tuple[float, float]) -> Status:
    warning, problem = thresholds
    return "problem" if value >= problem else "warning" if value >= warning else "ok"


def duration(seconds: float) -> str:
    for unit, length in (("d", DAY), ("h", HOUR), ("min", MINUTE)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"


def join_first(items: Sequence[str]) -> str:
    """Join the first items with semicolons, and append the number of the omitted items."""
    more = len(items) - _MAX_ITEMS_LISTED
    return "; ".join(items[:_MAX_ITEMS_LISTED]) + (f"; and {more} more" if more > 0 else "")

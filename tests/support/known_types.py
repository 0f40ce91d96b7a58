"""A memory of the types in the databases of tests.

asyncpg asks about the types of a query's columns on each new connection. PostgreSQL needs longer to
plan this question than for most tests. All connections of a test database get the same answer.
"""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from asyncpg import Connection

_introspect_types = Connection._introspect_types
_known: dict[tuple[str, frozenset[int]], Any] = {}
_NOT_SENT = SimpleNamespace(name="not sent")  # in place of the prepared question


def remember() -> None:
    """Let asyncpg ask each database of this run only once about a type."""
    Connection._introspect_types = _remembered


def forget() -> None:
    """Let asyncpg ask about all types again, after a test has changed one."""
    _known.clear()


async def _remembered(
    self: Any,
    oids: Collection[int],
    timeout: float,  # noqa: ASYNC109  # asyncpg's
) -> tuple[Any, object]:
    # Only the names of these databases are unique: no other server has one with other types.
    if not (name := self._params.database).startswith("tiger_db_"):
        return await _introspect_types(self, oids, timeout)  # type: ignore[no-any-return]
    if (key := (name, frozenset(oids))) not in _known:
        _known[key], _ = await _introspect_types(self, oids, timeout)
    return _known[key], _NOT_SENT

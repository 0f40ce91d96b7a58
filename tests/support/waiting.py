"""Waiting for a condition, with a deadline."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

_PAUSE = 0.005  # seconds

# Tests run beside each other on one server, and a table has the same OID in all their databases.
WAITING_LOCKS = """
pg_locks JOIN pg_database ON pg_database.oid = database
WHERE datname = current_database() AND NOT granted
"""


async def until(condition: Callable[[], object | Awaitable[object]], seconds: float = 30) -> None:
    """Wait until a condition, which may be asynchronous, is true.

    Raises:
        TimeoutError: it is not true in time, or does not answer.
    """
    async with asyncio.timeout(seconds):
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(_PAUSE)


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Block until a condition is true.

    Raises:
        TimeoutError: it is not true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not true after {seconds} s")
        time.sleep(_PAUSE)

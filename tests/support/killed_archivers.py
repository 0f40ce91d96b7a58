"""A program that archives and retires months, and kills itself at given lines of the source.

The argument is a JSON list of numbers. For each number n, a child process runs `maintain` until it
reaches its n-th new line of code, and kills itself there with SIGKILL. Another child then verifies
the trail. The program prints, for each number, the signal that ended the child, and the number of
findings, of events in the database and of events in the archive.
"""

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import pyarrow.parquet  # noqa: F401  # before the fork, because the import takes most of the time

from tiger_db import Database, Settings, audit

FILES = ("archive_files.py", "archiving.py", "months.py", "retention.py", "sealer.py")
Tracer = Callable[[FrameType, str, Any], Any]


def killer(last: int) -> Tracer:
    seen = set[tuple[str, int]]()

    def trace(frame: FrameType, event: str, _argument: object) -> Tracer | None:
        name = frame.f_code.co_filename
        if not name.endswith(FILES) or "/audit/" not in name:
            return None
        if event == "line":
            seen.add((name, frame.f_lineno))
            if len(seen) == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


async def maintain() -> None:
    async with Database(Settings()) as database:
        await audit.maintain(database)


async def verify() -> None:
    async with Database(Settings()) as database:
        found = await audit.verify(database, archive=True)
    print(len(found.findings), found.rows + found.unsealed, found.archived)  # noqa: T201


def in_child(work: Callable[[], Coroutine[Any, Any, None]], trace: Tracer | None = None) -> int:
    """Run a coroutine in a new process. Return the number of the signal that ended the process."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        if trace is not None:
            threading.settrace(trace)
            sys.settrace(trace)
        try:
            asyncio.run(work())
            sys.stdout.flush()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    for number in json.loads(sys.argv[1]):
        print(-in_child(maintain, killer(number)), end=" ")  # noqa: T201
        in_child(verify)

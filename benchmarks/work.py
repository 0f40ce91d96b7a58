"""Comparison of two operations: one of tiger_db, and one with plain asyncpg or other work."""

import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

ROUNDS = 15


@dataclass(frozen=True)
class Work:
    """Two operations to compare. A round executes each one `times` times; the sides take turns."""

    name: str
    ours: Callable[[], Awaitable[object]]
    plain: Callable[[], Awaitable[object]]
    times: int


@dataclass(frozen=True)
class Result:
    """Medians of the seconds per operation."""

    name: str
    ours: float
    plain: float

    @property
    def ratio(self) -> float:
        return self.ours / self.plain


async def measure(work: Work) -> Result:
    # Otherwise, the garbage collector would visit all modules in some rounds.
    gc.collect()
    gc.freeze()
    await _round(work.ours, work.times)
    await _round(work.plain, work.times)
    rounds = [
        (await _round(work.ours, work.times), await _round(work.plain, work.times))
        for _ in range(ROUNDS)
    ]
    ours, plain = zip(*rounds, strict=True)
    return Result(work.name, statistics.median(ours), statistics.median(plain))


async def _round(operation: Callable[[], Awaitable[object]], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        await operation()
    return (time.perf_counter() - start) / times

"""Standbys that answer readonly sessions, as long as they are known to be fresh enough."""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tiger_db.errors import TigerDBError
from tiger_db.out_of_band import OutOfBandWriter

S = TypeVar("S", bound=AsyncSession)
_PAUSE = 5.0  # seconds for which a standby that is out of reach is left alone
_MARKS = 8
# What is committed durably is flushed.
_POSITION = "SELECT CAST(pg_current_wal_flush_lsn() AS text)"
_REACHED = text(
    "SELECT pg_is_in_recovery() AND"
    " pg_last_wal_replay_lsn() >= CAST(CAST(:position AS text) AS pg_lsn)"
)


@dataclass(slots=True)
class _Replica:
    engine: AsyncEngine
    away_until: float = 0.0  # this machine's monotonic time; 0: it is not away
    reached: tuple[float, str] = (-math.inf, "")  # the last mark of which that is known


class Replicas:
    """The standbys of one `Database`.

    What a standby believes of its lag is worth nothing when its line to the primary is cut: it has
    replayed all that it knows of. So the primary is asked for its place in the WAL, at most twice
    in a `max_lag` while it is asked for at all, and a standby is fresh if it has replayed up to a
    place that the primary had reached no longer ago than that. No clock but this machine's has a
    say. When the primary is away, standbys answer until the last place is too old.
    """

    def __init__(self, engines: Sequence[AsyncEngine], primary: OutOfBandWriter) -> None:
        self._replicas = [_Replica(engine) for engine in engines]
        self._primary = primary
        # Places in the primary's WAL, by the time at which it was asked. The oldest that is not too
        # old counts, so that a standby has time to get there.
        self._marks: deque[tuple[float, str]] = deque(maxlen=_MARKS)
        self._asking = asyncio.Lock()

    async def close(self) -> None:
        for standby in self._replicas:
            await standby.engine.dispose()

    async def session(self, on: Callable[[AsyncEngine], S], max_lag: timedelta) -> S | None:
        """A session of a standby that knows all that was committed `max_lag` ago; None: of none."""
        if not self._replicas:
            return None
        await self._mark(max_lag.total_seconds())
        oldest = time.monotonic() - max_lag.total_seconds()
        for standby in random.sample(self._replicas, len(self._replicas)):  # each its share
            now = time.monotonic()
            marks = [mark for mark in (standby.reached, *self._marks) if mark[0] >= oldest]
            if not marks or now < standby.away_until:
                continue
            if standby.away_until:
                standby.away_until = now + _PAUSE  # one session tries, the others do not wait
            session, fresh = on(standby.engine), False
            try:
                fresh = bool(await session.scalar(_REACHED, {"position": marks[0][1]}))
                standby.away_until = 0.0
            except (TigerDBError, SQLAlchemyError):
                standby.away_until = time.monotonic() + _PAUSE
            finally:
                if not fresh:
                    await session.close()
            if fresh:
                standby.reached = max(standby.reached, marks[0])
                return session
        return None

    async def _mark(self, max_lag: float) -> None:
        """Ask the primary, unless the last time is recent enough."""
        async with self._asking:
            now = time.monotonic()
            if not self._marks or self._marks[-1][0] < now - max_lag / 2:
                with suppress(TigerDBError):
                    async with self._primary.connection() as connection:
                        self._marks.append((now, await connection.fetchval(_POSITION)))

"""Readonly sessions on replicas that lag behind the primary by at most a given time."""

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
_RETRY_PAUSE_SECONDS = 5.0  # time until a failed replica is tried again, in seconds
_MAX_LSN_SAMPLES = 8
# A commit becomes visible to other sessions only after its WAL is flushed to disk.
_PRIMARY_LSN = "SELECT CAST(pg_current_wal_flush_lsn() AS text)"
_HAS_REPLAYED = text(
    "SELECT pg_is_in_recovery() AND pg_last_wal_replay_lsn() >= CAST(CAST(:lsn AS text) AS pg_lsn)"
)
_Sample = tuple[float, str]  # monotonic time in seconds, and LSN of the primary at that time


@dataclass(slots=True)
class _Replica:
    engine: AsyncEngine
    failed_until: float = 0.0  # Monotonic time (s) to connect again, or 0 after a success.
    replayed: _Sample = (-math.inf, "")  # Newest LSN sample that this replica has replayed.


class Replicas:
    """The replicas of one `Database`, for readonly sessions.

    The lag of a replica is measured by comparing its LSN with the primary's LSN. A replica that
    lost its connection to the primary cannot know that the primary has newer commits. While
    replicas are in use, the primary's current LSN is read up to twice per `max_lag`. A replica is
    fresh if the replica has replayed an LSN that the primary had at most `max_lag` ago. This
    machine's monotonic clock measures the age of an LSN. While the primary is unavailable, replicas
    are used until all LSN samples are older than `max_lag`.
    """

    def __init__(self, engines: Sequence[AsyncEngine], primary: OutOfBandWriter) -> None:
        self._replicas = [_Replica(engine) for engine in engines]
        self._primary = primary
        # Replicas replay WAL with a delay. Therefore, `session` accepts a replica that has replayed
        # the oldest of the LSN samples that are not older than `max_lag`.
        self._samples: deque[_Sample] = deque(maxlen=_MAX_LSN_SAMPLES)
        self._sampling = asyncio.Lock()

    async def close(self) -> None:
        for replica in self._replicas:
            await replica.engine.dispose()

    async def session(
        self, make_session: Callable[[AsyncEngine], S], max_lag: timedelta
    ) -> S | None:
        """Return a session on a replica that has replayed all commits older than `max_lag`.

        If all replicas are unavailable or lag too far behind, the result is None.
        """
        if not self._replicas:
            return None
        await self._sample_primary(max_lag.total_seconds())
        oldest = time.monotonic() - max_lag.total_seconds()
        # The random order of the replicas spreads sessions evenly.
        for replica in random.sample(self._replicas, len(self._replicas)):
            now = time.monotonic()
            samples = [s for s in (replica.replayed, *self._samples) if s[0] >= oldest]
            if not samples or now < replica.failed_until:
                continue
            if replica.failed_until:
                # While one session tries a failed replica, other sessions skip the replica.
                replica.failed_until = now + _RETRY_PAUSE_SECONDS
            session, fresh = make_session(replica.engine), False
            try:
                fresh = bool(await session.scalar(_HAS_REPLAYED, {"lsn": samples[0][1]}))
                replica.failed_until = 0.0
            except (TigerDBError, SQLAlchemyError):
                replica.failed_until = time.monotonic() + _RETRY_PAUSE_SECONDS
            finally:
                if not fresh:
                    await session.close()
            if fresh:
                replica.replayed = max(replica.replayed, samples[0])
                return session
        return None

    async def _sample_primary(self, max_lag_seconds: float) -> None:
        """Sample the primary's LSN if the last LSN sample is older than half the maximum lag."""
        async with self._sampling:
            now = time.monotonic()
            if not self._samples or self._samples[-1][0] < now - max_lag_seconds / 2:
                with suppress(TigerDBError):
                    async with self._primary.connection() as connection:
                        self._samples.append((now, await connection.fetchval(_PRIMARY_LSN)))

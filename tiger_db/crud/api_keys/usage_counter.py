"""A counter that collects the uses of API keys in memory and writes them in batches."""

import asyncio
import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import TextClause, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from tiger_db.errors import DatabaseUnavailable, TigerDBError
from tiger_db.models import APIKey

WRITE_INTERVAL_SECONDS = 1.0
_STATUS_INTERVAL_SECONDS, _STATUS_QUERIES = 0.1, 20
_HOUR_SECONDS = 3600

# With SKIP LOCKED, a write of usage counts never waits for another transaction. If another
# transaction has locked the row of an API key, the key's usage counts stay in memory until the next
# batch. Usage counts of deleted keys are dropped. A stored count above 2**62, which only plain SQL
# can have written, is lowered to 2**62, so that the sum does not overflow and make the batch fail.
_WRITE = """
WITH given AS (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:hours AS timestamptz[]),
        CAST(:counts AS bigint[]), CAST(:times AS timestamptz[])) AS g (id, hour, count, at)
), locked AS (
    SELECT id FROM api_keys WHERE id IN (SELECT id FROM given)
    ORDER BY id FOR NO KEY UPDATE {skip_locked}
), counted AS (
    SELECT given.* FROM given JOIN locked USING (id)
), used AS (
    UPDATE api_keys AS k
    SET usage_count = least(k.usage_count, 4611686018427387904) + c.count,
        last_used_at = greatest(k.last_used_at, c.at)
    FROM (SELECT id, sum(count)::bigint AS count, max(at) AS at FROM counted GROUP BY id) AS c
    WHERE k.id = c.id
), hourly AS (
    INSERT INTO api_key_usage AS u (api_key_id, hour, count)
    SELECT id, hour, count FROM counted ORDER BY id, hour
    ON CONFLICT (api_key_id, hour)
    DO UPDATE SET count = least(u.count, 4611686018427387904) + excluded.count
)
SELECT pg_current_xact_id(), ARRAY(SELECT id FROM api_keys WHERE id IN (SELECT id FROM given)
    EXCEPT SELECT id FROM locked)
"""
_WRITE_UNLOCKED = text(_WRITE.format(skip_locked="SKIP LOCKED"))
_WRITE_ALL = text(_WRITE.format(skip_locked=""))
# After a crash or a failover, PostgreSQL assigns the ids of lost transactions again. A transaction
# whose id is greater than the current transaction id was lost in a crash or failover.
_STATUS = text("""
SELECT CASE WHEN CAST(:xid AS xid8) > pg_current_xact_id() THEN 'aborted'
    ELSE pg_xact_status(CAST(:xid AS xid8)) END
""")
# Without _DELETE_OLD_LIMITS, the rows of deleted API keys would stay in api_key_limits forever.
_DELETE_OLD_LIMITS = text("DELETE FROM api_key_limits WHERE day < now() - interval '30 days'")
_COUNT_ONE = text("""
WITH used AS (
    UPDATE api_keys SET usage_count = usage_count + 1, last_used_at = greatest(last_used_at, :at)
    WHERE id = :id RETURNING id
)
INSERT INTO api_key_usage AS u (api_key_id, hour, count) SELECT id, :hour, 1 FROM used
ON CONFLICT (api_key_id, hour) DO UPDATE SET count = u.count + excluded.count
""")
_logger = logging.getLogger("tiger_db")


@dataclass(slots=True)
class _Uses:
    """The uses of one API key in one hour."""

    count: int
    last: float  # time of the last use, in seconds since 1970


# A batch maps the id of an API key and an hour (in hours since 1970) to the uses in the hour.
_Batch = dict[tuple[UUID, int], _Uses]


class UsageCounter:
    """A counter of API key uses in memory, which writes the counts to the database every second.

    A UsageCounter belongs to one event loop. A killed process loses the uses of the last second. If
    the connection breaks during the commit of a batch, the uses in the batch are counted exactly
    once. If the server crashes during the commit, the uses in the batch are counted at most once.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._uses: _Batch = {}
        # `_batch` contains the uses of API keys that are being written, until the commit succeeds.
        self._batch: _Batch = {}
        # `_xid` is the id of the transaction that wrote `_batch`.
        self._xid: int | None = None
        # `_skipped` contains the ids of API keys in `_batch` that were not written, because the
        # rows of the API keys were locked.
        self._skipped: Collection[UUID] = ()
        self._has_written = False
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._write_lock = asyncio.Lock()  # two tasks must not store the same batch

    def count(self, key_id: UUID, at: float) -> None:
        """Count one use of an API key. `at` is the time of the use in seconds since 1970."""
        slot = (key_id, int(at) // _HOUR_SECONDS)
        uses = self._uses.get(slot)
        if uses is not None:
            uses.count += 1
            uses.last = at
            return
        self._uses[slot] = _Uses(1, at)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Write all usage counts. If the write fails, log the number of lost uses as a warning."""
        self._closing.set()
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await self._task
        try:
            while self._batch or self._uses:
                await self._write(_WRITE_ALL)
            if self._has_written:
                # AsyncEngine.begin() uses an async generator, which cannot run while the event loop
                # shuts down. AsyncEngine.connect() uses no generator, and therefore can run.
                async with self._engine.connect() as connection:
                    await connection.execute(_DELETE_OLD_LIMITS)
                    await connection.commit()
        except (TigerDBError, SQLAlchemyError) as error:
            lost = sum(uses.count for uses in [*self._batch.values(), *self._uses.values()])
            if lost:
                reason = type(error).__name__
                _logger.warning("%d uses of API keys could not be counted (%s)", lost, reason)
        self._closing.clear()

    async def _run(self) -> None:
        while self._batch or self._uses:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), WRITE_INTERVAL_SECONDS)
                return
            # After an error of the database, the next iteration writes the same batch again.
            with suppress(TigerDBError, SQLAlchemyError):
                await self._write(_WRITE_UNLOCKED)

    async def _write(self, statement: TextClause) -> None:
        async with self._write_lock:
            if not self._batch:
                self._batch, self._uses = self._uses, {}
            if self._batch:
                await self._write_batch(statement)

    async def _write_batch(self, statement: TextClause) -> None:
        batch = self._batch
        async with self._engine.connect() as connection:
            if self._xid is None or await _was_rolled_back(connection, self._xid):
                result = await connection.execute(
                    statement,
                    {
                        "ids": [key_id for key_id, _ in batch],
                        "hours": [_utc(hour * _HOUR_SECONDS) for _, hour in batch],
                        "counts": [uses.count for uses in batch.values()],
                        "times": [_utc(uses.last) for uses in batch.values()],
                    },
                )
                self._xid, self._skipped = result.one()
                await connection.commit()
        self._batch, self._xid, self._has_written = {}, None, True
        for slot, uses in batch.items():
            if (
                slot[0] in self._skipped
                and (later := self._uses.setdefault(slot, uses)) is not uses
            ):
                later.count += uses.count


async def _was_rolled_back(connection: AsyncConnection, xid: int) -> bool:
    """Return whether a transaction with an unconfirmed commit was rolled back.

    Raises:
        DatabaseUnavailable: the transaction is still in progress after two seconds.
    """
    for _ in range(_STATUS_QUERIES):
        status = await connection.scalar(_STATUS, {"xid": xid})
        if status != "in progress":
            return bool(status == "aborted")
        await asyncio.sleep(_STATUS_INTERVAL_SECONDS)
    raise DatabaseUnavailable("the transaction that writes usage counts has not ended")


async def count_in_session(session: AsyncSession, key: APIKey, at: float) -> None:
    """Count one use of an API key in the session's transaction.

    `at` is the time of the use in seconds since 1970.
    """
    now = _utc(at)
    hour = now.replace(minute=0, second=0, microsecond=0)
    await session.execute(_COUNT_ONE, {"id": key.id, "hour": hour, "at": now})
    await session.refresh(key, ["usage_count", "last_used_at"])


def _utc(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)

"""What is written apart from the caller's transaction: counts of uses, denials, limits.

It goes through connections of its own, so that it neither waits for the pool, nor rolls back with
who caused it. Counts are collected for up to a second and written in one statement for many: a
process that is killed loses those of its last second, and nothing else does. An event is committed,
together with those of others who wait at the time, before `record` returns.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID, uuid4

import asyncpg
from sqlalchemy import TextClause, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tiger_db.errors import DatabaseUnavailable, TigerDBError
from tiger_db.models import AuditLog
from tiger_db.models.audit_inserts import insert_events
from tiger_db.sqlstates import LOST, raw_errors

SECONDS = 1.0  # for which counts are collected
_HOUR = 3600  # seconds

# A key that someone has locked is left for the next time, so that no count waits for a transaction;
# when the database closes, there is no next time. Keys that are gone are left out. A batch whose
# commit was not confirmed is sent again under the same number, and counts once. (The number of its
# transaction would not tell: after a crash, PostgreSQL gives those that it had not yet written down
# to others.)
_COUNT = """
WITH given AS (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:hours AS timestamptz[]),
        CAST(:counts AS bigint[]), CAST(:times AS timestamptz[])) AS g (id, hour, count, at)
), locked AS (
    SELECT id FROM api_keys WHERE id IN (SELECT id FROM given)
    ORDER BY id FOR NO KEY UPDATE {skip_locked}
), batch AS (
    INSERT INTO api_key_batches AS b (writer, number, left_out, written_at)
    SELECT CAST(:writer AS uuid), CAST(:number AS bigint), ARRAY(SELECT id FROM api_keys
        WHERE id IN (SELECT id FROM given) AND id NOT IN (SELECT id FROM locked)), now()
    ON CONFLICT (writer) DO UPDATE SET number = excluded.number, left_out = excluded.left_out,
        written_at = excluded.written_at WHERE b.number < excluded.number
    RETURNING b.left_out
), counted AS (
    SELECT given.* FROM given JOIN locked USING (id) CROSS JOIN batch
), used AS (
    UPDATE api_keys AS k
    SET usage_count = k.usage_count + c.count, last_used_at = greatest(k.last_used_at, c.at)
    FROM (SELECT id, sum(count)::bigint AS count, max(at) AS at FROM counted GROUP BY id) AS c
    WHERE k.id = c.id
), hourly AS (
    INSERT INTO api_key_usage AS u (api_key_id, hour, count)
    SELECT id, hour, count FROM counted ORDER BY id, hour
    ON CONFLICT (api_key_id, hour) DO UPDATE SET count = u.count + excluded.count
)
SELECT left_out FROM batch
"""
_COUNT_UNLOCKED = text(_COUNT.format(skip_locked="SKIP LOCKED"))
_COUNT_ALL = text(_COUNT.format(skip_locked=""))
LEFT_OUT = text("SELECT left_out FROM api_key_batches WHERE writer = CAST(:writer AS uuid)")
# A process that was killed leaves its row to others. Counts of a day that is over decide nothing:
# a line whose keys are gone leaves them.
_FORGET = text(
    "WITH counts AS (DELETE FROM api_key_limits WHERE day < now() - interval '30 days')"
    " DELETE FROM api_key_batches WHERE writer = CAST(:writer AS uuid)"
    " OR written_at < now() - interval '30 days'"
)
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
    """Of one key in one hour (UTC); `last` is in seconds since 1970."""

    count: int
    last: float


_Batch = dict[tuple[UUID, int], _Uses]


@dataclass(slots=True)
class _Waiting:
    """An event, and who waits for it to be on record."""

    event: AuditLog
    recorded: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def settle(self, error: Exception | None) -> None:
        if self.recorded.done():  # who waited has been cancelled
            return
        if error is None:
            self.recorded.set_result(None)
        else:
            self.recorded.set_exception(error)


class WriteBehind:
    """Writes for one `Database`, in its event loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._uses: _Batch = {}
        self._batch: _Batch = {}  # taken from `_uses` to be written, until that is confirmed
        self._number = 0  # of the batch
        self._writer = uuid4()
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._closing = False

    def connection(self) -> AbstractAsyncContextManager["asyncpg.Connection[asyncpg.Record]"]:
        """As `plain_connection`."""
        return plain_connection(self.engine)

    def count(self, key_id: UUID, at: float) -> None:
        """Count one use of a key, at a time in seconds since 1970; it is written in a second."""
        slot = (key_id, int(at) // _HOUR)
        uses = self._uses.get(slot)
        if uses is None:
            self._uses[slot] = _Uses(1, at)
            self._start()
        else:
            uses.count += 1
            uses.last = at

    async def record(self, event: AuditLog) -> None:
        """Store an event; it is committed when this returns.

        Raises:
            DatabaseUnavailable: it could not be stored.
        """
        waiting = _Waiting(event)
        self._waiting.append(waiting)
        self._hurry.set()
        self._start()
        await waiting.recorded

    async def close(self) -> None:
        """Write what is left. What cannot be written is lost, and said in the log."""
        self._closing = True
        self._hurry.set()
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await self._task
        try:
            while self._batch or self._uses:
                await self._write_uses(_COUNT_ALL)
            if self._number:
                async with self.engine.connect() as connection:
                    await connection.execute(_FORGET, {"writer": self._writer})
                    await connection.commit()
        except (TigerDBError, SQLAlchemyError) as error:
            lost = sum(uses.count for uses in [*self._batch.values(), *self._uses.values()])
            if lost:
                why = type(error).__name__
                _logger.warning("%d uses of API keys were not counted: %s", lost, why)
        await self.engine.dispose()
        self._closing = False

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """Write until nothing is left but, when closing, counts."""
        while self._waiting or ((self._batch or self._uses) and not self._closing):
            if not self._waiting:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), SECONDS)
            self._hurry.clear()
            await self._write_events()
            if not self._waiting and not self._closing:
                try:
                    await self._write_uses(_COUNT_UNLOCKED)
                except (TigerDBError, SQLAlchemyError):
                    await asyncio.sleep(SECONDS / 2)  # the counts stay, and are tried again

    async def _write_events(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            await self._store(waiting)

    async def _store(self, waiting: list[_Waiting]) -> None:
        error: Exception | None = DatabaseUnavailable("the process ends")
        try:
            async with self.connection() as connection:
                await insert_events(connection, [one.event for one in waiting])
            error = None
        except Exception as problem:  # noqa: BLE001  # whatever it is, who waits is told
            if len(waiting) > 1 and not isinstance(problem, DatabaseUnavailable):
                for one in waiting:  # one of them spoils it for the others
                    await self._store([one])
            error = problem
        finally:
            for one in waiting:
                one.settle(error)

    async def _write_uses(self, statement: TextClause) -> None:
        if not self._batch:
            self._batch, self._uses = self._uses, {}
            self._number += 1
        batch = self._batch
        if not batch:
            return
        async with self.engine.connect() as connection:
            written = await connection.execute(
                statement,
                {
                    "writer": self._writer,
                    "number": self._number,
                    "ids": [key_id for key_id, _ in batch],
                    "hours": [datetime.fromtimestamp(hour * _HOUR, UTC) for _, hour in batch],
                    "counts": [uses.count for uses in batch.values()],
                    "times": [datetime.fromtimestamp(uses.last, UTC) for uses in batch.values()],
                },
            )
            left_out = written.scalar_one_or_none()
            if left_out is None:  # it was written before the line was cut
                left_out = await connection.scalar(LEFT_OUT, {"writer": self._writer})
            await connection.commit()
        self._put_back({slot: uses for slot, uses in batch.items() if slot[0] in (left_out or ())})
        self._batch = {}

    def _put_back(self, batch: _Batch) -> None:
        for slot, uses in batch.items():
            newer = self._uses.get(slot)
            if newer is None:
                self._uses[slot] = uses
            else:
                newer.count += uses.count


async def count_now(session: AsyncSession, key_id: UUID, at: float) -> None:
    """Count one use in the session's own transaction, where it has no `WriteBehind`."""
    now = datetime.fromtimestamp(at, UTC)
    hour = now.replace(minute=0, second=0, microsecond=0)
    await session.execute(_COUNT_ONE, {"id": key_id, "hour": hour, "at": now})


@asynccontextmanager
async def plain_connection(
    engine: AsyncEngine,
) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection of asyncpg's own, on which each statement is a transaction of its own.

    Raises:
        DatabaseUnavailable: there is none, or it was lost.
        Conflict, QueryTimeout, StatementRefused: see `raw_errors`.
    """
    try:
        with raw_errors():
            async with engine.connect() as connection:
                raw = (await connection.get_raw_connection()).driver_connection
                assert raw is not None
                try:
                    yield raw
                except TimeoutError:
                    raise  # closed now, it would not cancel what it sent
                except (*LOST, asyncpg.ReadOnlySQLTransactionError):  # it is no primary any more
                    await connection.invalidate()
                    raise
    except PoolTimeoutError as error:
        raise DatabaseUnavailable(f"lost the database: {type(error).__name__}") from None

"""Out-of-band SQL statements, which run on connections that no session uses.

If the caller's transaction rolls back, the changes of an out-of-band statement stay.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field

import asyncpg
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from tiger_db.actor import Actor, attribute
from tiger_db.denial_counter import DenialCounter
from tiger_db.errors import DatabaseUnavailable
from tiger_db.models import AuditLog
from tiger_db.models.audit_logs import insert_events
from tiger_db.sqlstates import CONNECTION_ERRORS, raw_errors


@dataclass(slots=True)
class _PendingEvent:
    """An audit event, and a future that is done when the database stores or refuses the event."""

    event: AuditLog
    recorded: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def settle(self, error: Exception | None) -> None:
        if self.recorded.done():  # the future has a result, or was cancelled
            return
        if error is None:
            self.recorded.set_result(None)
        else:
            self.recorded.set_exception(error)


class OutOfBandWriter:
    """A writer of audit events that uses its own database connections, not those of sessions.

    `denials` combines the events of many denied API keys.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.denials = DenialCounter(self.connection)
        self._pending: list[_PendingEvent] = []
        self._task: asyncio.Task[None] | None = None

    def connection(self) -> AbstractAsyncContextManager["asyncpg.Connection[asyncpg.Record]"]:
        """Open an asyncpg connection to the database of the OutOfBandWriter."""
        return asyncpg_connection(self.engine)

    async def record(self, event: AuditLog, actor: Actor | None = None) -> None:
        """Store an audit event with the fields of the actor in force, and wait for the commit.

        The audit events of concurrent calls of `record` are stored in one transaction.

        Raises:
            DatabaseUnavailable: the audit event could not be stored.
        """
        pending = _PendingEvent(attribute(event, actor))
        self._pending.append(pending)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._store_pending())
        await pending.recorded

    async def close(self) -> None:
        """Store the pending and counted audit events, and close the connections of this writer."""
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await self._task
        await self.denials.close()
        await self.engine.dispose()

    async def _store_pending(self) -> None:
        try:
            while self._pending:
                batch, self._pending = self._pending, []
                await self._store(batch)
        finally:
            # At the end of the program, `asyncio.run` cancels the task of `_store_pending`, so a
            # new task stores the pending events.
            if self._pending:
                self._task = asyncio.create_task(self._store_pending())

    async def _store(self, batch: list[_PendingEvent]) -> None:
        error: Exception | None = DatabaseUnavailable(
            "the audit event is lost, because the process stops"
        )
        try:
            async with self.connection() as connection:
                await insert_events(connection, [pending.event for pending in batch])
            error = None
        except Exception as problem:  # noqa: BLE001  # the calls of `record` raise this error
            if len(batch) > 1 and not isinstance(problem, DatabaseUnavailable):
                # Each event is stored alone, so that a refused event does not block other events.
                for pending in batch:
                    await self._store([pending])
            error = problem
        finally:
            for pending in batch:
                pending.settle(error)


@asynccontextmanager
async def asyncpg_connection(
    engine: AsyncEngine,
) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Open an asyncpg connection, on which each SQL statement is its own transaction.

    Raises:
        DatabaseUnavailable: no connection could be opened, or the connection was lost.
        Conflict, QueryTimeout, StatementRefused: an SQL statement failed, as documented for
            `raw_errors`.
    """
    try:
        with raw_errors():
            async with engine.connect() as connection:
                raw = (await connection.get_raw_connection()).driver_connection
                assert raw is not None
                try:
                    yield raw
                except TimeoutError:
                    raise  # the connection stays usable, because asyncpg cancels the statement
                except asyncio.CancelledError as error:
                    # A transaction is possibly open, because the ROLLBACK was cancelled too.
                    await connection.invalidate(error)
                    raise
                except (*CONNECTION_ERRORS, asyncpg.ReadOnlySQLTransactionError):
                    # A server that is no longer the primary raises ReadOnlySQLTransactionError.
                    await connection.invalidate()
                    raise
    except PoolTimeoutError:
        raise DatabaseUnavailable(
            "all connections for out-of-band statements were in use (DB_POOL_SIZE)"
        ) from None

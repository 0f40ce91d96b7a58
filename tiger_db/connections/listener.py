"""Connections that LISTEN for notifications of PostgreSQL, and reconnect automatically."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import asyncpg

from tiger_db.connections import connect_directly
from tiger_db.errors import DatabaseUnavailable, TigerDBError
from tiger_db.settings import Settings
from tiger_db.sqlstates import raw_errors

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
# The function `on_notification` gets the payload of each notification. After a connection is opened
# or lost, `on_notification` gets None, because notifications were possibly missed.
OnNotification: TypeAlias = Callable[[str | None], None]
RECONNECT_PAUSE_SECONDS = 0.1
_logger = logging.getLogger("tiger_db")


@asynccontextmanager
async def open_listener(
    settings: Settings, channel: str, on_notification: OnNotification
) -> AsyncIterator[Connection]:
    """Open a connection that bypasses the pooler and listens on a channel of `DB_SCHEMA`.

    Raises:
        ConfigurationError, DatabaseUnavailable: the call of `connect_directly` raised this error.
        TigerDBError: asyncpg raised an error in the `with` block, and `raw_errors` converted the
            error.
    """
    with raw_errors():
        connection = await connect_directly(settings)
        try:
            connection.add_termination_listener(lambda _: on_notification(None))
            await connection.add_listener(
                settings.channel(channel), lambda *sent: on_notification(sent[-1])
            )
            on_notification(None)
            yield connection
        finally:
            on_notification(None)
            connection.terminate()


async def listen(
    settings: Settings,
    channel: str,
    on_notification: OnNotification,
    watch: Callable[[Connection], Awaitable[None]] | None = None,
) -> None:
    """Listen on a notification channel until the task is cancelled.

    If the connection is lost, `listen` opens a new connection. `listen` calls and awaits the
    function `watch` with each new connection. If `watch` raises an error, `listen` opens a new
    connection. Only the first failure after a successful connection is logged, as a warning.
    """
    failing = False
    while True:
        try:
            async with open_listener(settings, channel, on_notification) as connection:
                failing = False
                await (watch or _until_closed)(connection)
        except TigerDBError as error:
            if not failing:
                _logger.warning("LISTEN on the channel %s failed: %s", channel, error)
            failing = True
        await asyncio.sleep(RECONNECT_PAUSE_SECONDS)


async def _until_closed(connection: Connection) -> None:
    closed = asyncio.Event()
    connection.add_termination_listener(lambda _: closed.set())
    if not connection.is_closed():
        await closed.wait()
    raise DatabaseUnavailable("the connection to the database was closed")

"""Connections that LISTEN for notifications of PostgreSQL, and reconnect automatically."""

import asyncio
import logging
import socket
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
# The event loop handles all notifications of one read at once, and uvloop reads until the socket's
# buffer is empty. A small buffer limits the time in which the event loop runs no other task.
_RECEIVE_BUFFER_BYTES = 32 * 1024
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
            transport = connection._transport  # noqa: SLF001  # asyncpg has no public name
            receiver = transport.get_extra_info("socket")
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
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

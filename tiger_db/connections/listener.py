"""LISTEN on a direct connection, which is opened again when it is lost."""

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
# Takes the payload of a notification, or None when notifications may have been missed.
Heard: TypeAlias = Callable[[str | None], None]
_PAUSE = 0.1  # seconds before a new connection is opened
_logger = logging.getLogger("tiger_db")


@asynccontextmanager
async def listening(settings: Settings, channel: str, heard: Heard) -> AsyncIterator[Connection]:
    """Open a direct connection that listens on a channel of `DB_SCHEMA`.

    Raises:
        ConfigurationError, DatabaseUnavailable: see `connect_directly`.
        TigerDBError: for any error of asyncpg in the body of the `with`: see `raw_errors`.
    """
    with raw_errors():
        connection = await connect_directly(settings)
        try:
            connection.add_termination_listener(lambda _: heard(None))
            await connection.add_listener(settings.channel(channel), lambda *sent: heard(sent[-1]))
            heard(None)
            yield connection
        finally:
            heard(None)
            connection.terminate()


async def listen(
    settings: Settings, channel: str, heard: Heard,
    watch: Callable[[Connection], Awaitable[None]] | None = None,
) -> None:  # fmt: skip
    """Listen on a channel until cancelled, and reconnect when the connection is lost.

    `watch` is awaited on each connection, which is given up when it raises. The first failure after
    a success is logged as a warning.
    """
    deaf = False
    while True:
        try:
            async with listening(settings, channel, heard) as connection:
                deaf = False
                await (watch or _until_closed)(connection)
        except TigerDBError as error:  # the embedded server may not start, for example
            if not deaf:
                _logger.warning("not listening on %s: %s", channel, error)
            deaf = True
        await asyncio.sleep(_PAUSE)


async def _until_closed(connection: Connection) -> None:
    closed = asyncio.Event()
    connection.add_termination_listener(lambda _: closed.set())
    if not connection.is_closed():
        await closed.wait()
    raise DatabaseUnavailable("the connection was closed")

"""A function that waits until a token refresh has ended, in this process or in another one."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from uuid import UUID

from tiger_db.connections.listener import listen
from tiger_db.crud.common import get_or_raise
from tiger_db.database import Database
from tiger_db.errors import ConfigurationError, DatabaseUnavailable, WaitTimeout
from tiger_db.models import TokenStatus
from tiger_db.models.token_status import CHANNEL
from tiger_db.public import public

_POLL_SECONDS = 1.0  # Longest pause between two queries of the status.
_CANCEL_SECONDS = 1.0  # Longest wait for the end of the cancelled listener.


@public
async def wait_for_refresh(
    database: Database,
    refresh_id: UUID,
    *,
    timeout: timedelta,  # noqa: ASYNC109  # asyncio.timeout would cancel the last query
) -> TokenStatus:
    """Wait until a refresh has ended, and return the refresh.

    A refresh ends when a worker, in this process or another one, succeeds or gives up the refresh.
    A refresh can also be cancelled. After a failed attempt that a worker repeats later,
    `wait_for_refresh` continues to wait.

    NOTIFY of PostgreSQL ends the wait, and the status is also queried once a second. With
    `DB_POOLER` and without `DB_DIRECT_HOST`, no NOTIFY is received, and only the queries of the
    status end the wait. During the wait, no connection of the pool is in use, but one direct
    connection is open.

    Raises:
        NotFound: no refresh has the id `refresh_id`.
        WaitTimeout: the refresh did not end within `timeout`.
        DatabaseUnavailable: the database cannot be reached at the end of `timeout`.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    ended = asyncio.Event()
    async with _listening(database, refresh_id, ended):
        while True:
            ended.clear()
            try:
                async with database.session() as session:
                    refresh = await get_or_raise(session, TokenStatus, refresh_id)
                if not refresh.is_open:
                    return refresh
            except DatabaseUnavailable:  # the connection was lost, for example by a failover
                if time.monotonic() >= deadline:
                    raise
            seconds = min(deadline - time.monotonic(), _POLL_SECONDS)
            if seconds <= 0:
                raise WaitTimeout(f"the refresh did not end within {timeout}: it goes on")
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), seconds)


@asynccontextmanager
async def _listening(
    database: Database, refresh_id: UUID, ended: asyncio.Event
) -> AsyncIterator[None]:
    """Set the event `ended` after each notification that the refresh has possibly ended."""

    def handle_notification(payload: str | None) -> None:
        if payload in (None, str(refresh_id)):
            ended.set()

    try:
        database.settings.without_pooler()
    except ConfigurationError:
        yield
        return
    listener = asyncio.create_task(listen(database.settings, CHANNEL, handle_notification))
    try:
        yield
    finally:
        listener.cancel()
        await asyncio.wait([listener], timeout=_CANCEL_SECONDS)

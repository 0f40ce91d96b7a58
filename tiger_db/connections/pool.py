"""Connection pools that belong to one process and one event loop, and survive cancellations."""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

import asyncpg
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.pool import AsyncAdaptedQueuePool, PoolProxiedConnection

from tiger_db.errors import InvalidState

T = TypeVar("T")
# Longest wait until the server has ended the cancelled statement and the session, in seconds.
_CLOSE_SECONDS = 5.0
_REPEAT_SECONDS = 0.1
_ADVICE = "use get_database(), or a Database of its own"


class OwnedPool(AsyncAdaptedQueuePool):
    """A connection pool that belongs to the process and the event loop that first use the pool.

    After a fork, both processes have the same sockets: if both processes used the sockets, each
    process would read answers that are meant for the other process.
    """

    _sqla_logger_namespace = "sqlalchemy.pool.impl.OwnedPool"
    _owner: tuple[int, asyncio.AbstractEventLoop] | None = None

    def connect(self) -> PoolProxiedConnection:
        """Return a connection, as SQLAlchemy does.

        Raises:
            InvalidState: the method `claim` raised this error.
        """
        self.claim()
        return super().connect()

    def claim(self) -> None:
        """Check that this process and this event loop own the pool, or make them the owner.

        Raises:
            InvalidState: the pool belongs to another process or another event loop, or no event
                loop runs.
        """
        loop = running_loop()
        if self._owner is None:
            self._owner = os.getpid(), loop
        process, owner = self._owner
        if process != os.getpid():
            raise InvalidState(
                f"this Database belongs to the process {process}, but this is the process"
                f" {os.getpid()}: in each process, {_ADVICE}"
            )
        if owner is not loop:
            raise InvalidState(
                f"this Database belongs to the {_name(owner)}, but this is the {_name(loop)}:"
                f" in each event loop, {_ADVICE}"
            )

    @property
    def inherited(self) -> bool:
        """Whether the parent process owns the pool, and this process was forked from it."""
        return self._owner is not None and self._owner[0] != os.getpid()


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop.

    Raises:
        InvalidState: no event loop of asyncio runs in this thread.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise InvalidState(
            "no event loop of asyncio runs in this thread: call an async function of tiger_db with"
            " `asyncio.run` or with `tiger_db.run_blocking`"
        ) from None


def _name(loop: asyncio.AbstractEventLoop) -> str:
    closed = "closed " if loop.is_closed() else ""
    return f"{closed}event loop {type(loop).__name__} {id(loop):#x}"


class Connection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
    """An asyncpg connection that a forked process sees as closed.

    A forked process inherits the socket. If the forked process closed the connection, the server
    would end the session of the parent process.
    """

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401  # asyncpg's
        super().__init__(*args, **options)
        _connections.add(self)

    def disown(self) -> None:
        """Let this process see the connection as closed, and leave its socket open."""
        # Overridden methods would need the process id in each call, and asyncpg calls `is_closed`
        # several times for each statement.
        self.is_closed: Callable[[], bool] = lambda: True
        self.terminate: Callable[[], None] = lambda: None

    async def repeat_cancel_request(self) -> None:
        """Ask the server again and again to cancel the statement of this connection.

        A server that has not yet read the statement ignores the request.
        """
        while True:
            await asyncio.sleep(_REPEAT_SECONDS)
            request = asyncio.get_running_loop().create_future()
            request.add_done_callback(_ignore_error)
            self._cancel_current_command(request)


_connections: WeakSet[Connection] = WeakSet()


def _disown_connections() -> None:
    for connection in [*_connections]:
        connection.disown()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_disown_connections)


def _ignore_error(request: asyncio.Future[None]) -> None:
    # If the exception of a future is never retrieved, asyncio logs an error. Here, the exception
    # does not matter, because the request is repeated.
    if not request.cancelled():
        request.exception()


def end_cancelled_session(
    connection: AdaptedConnection, _record: object, exception: BaseException | None
) -> None:
    """End the session of a cancelled statement before its connection leaves the pool.

    A scope of anyio cancels every `await` of a task until the scope ends. Without a shield, the
    request to cancel the statement would be cancelled too. The statement would go on in the server,
    and keep its locks.
    """
    if isinstance(exception, asyncio.CancelledError):
        connection.run_async(_close)


async def _close(connection: Connection) -> None:
    # asyncpg asks the server to cancel the statement, waits for the end of the statement, and then
    # waits until the server has ended the session.
    closing = asyncio.create_task(connection.close(timeout=_CLOSE_SECONDS))
    repeating = asyncio.create_task(connection.repeat_cancel_request())
    with suppress(Exception, asyncio.CancelledError):  # asyncpg has cut the connection
        await run_to_completion(closing)
    repeating.cancel()


async def run_to_completion(task: asyncio.Task[T]) -> T:
    """Wait for the end of a task, even if the caller is cancelled, and return the task's result.

    A cancellation of the caller takes effect at the end.
    """
    import anyio  # noqa: PLC0415  # slow import

    cancelled = None
    with anyio.CancelScope(shield=True):  # scopes of anyio cancel in each iteration of the loop
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()

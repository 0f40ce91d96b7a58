"""Calls of async functions from synchronous code, such as Flask, Celery tasks and scripts."""

import atexit
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from threading import Lock, Thread, current_thread
from typing import TYPE_CHECKING, TypeVar

from tiger_db.errors import InvalidState, InvalidValue

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

T = TypeVar("T")
_lock = Lock()
_running: "tuple[BlockingPortal, Thread] | None" = None


def run_blocking(function: Callable[[], Awaitable[T]]) -> T:
    """Call an async function in the background event loop of this process, and return its result.

    All threads of a process share one event loop, which runs in a background thread, and therefore
    share the default `Database` of `get_session` and its connections. The first call starts the
    event loop. A forked process starts an event loop of its own. At the end of the program, the
    default `Database` is closed.

    If the wait for the result is interrupted, for example by Ctrl-C or by a time limit of Celery,
    the async function is cancelled.

    Raises:
        InvalidValue: `function` is not a function, but for example the coroutine of a call.
        InvalidState: the caller runs in the background event loop, which the call would block.
        Exception: the async function raised this exception.
    """
    if not callable(function):
        raise InvalidValue(
            "function: pass the async function itself, as in run_blocking(main), and not its call"
        )
    portal, thread = _start()
    if thread is current_thread():
        raise InvalidState("run_blocking cannot wait in its own event loop: write `await` instead")
    future = portal.start_task_soon(function)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _start() -> "tuple[BlockingPortal, Thread]":
    import anyio  # noqa: PLC0415  # slow import

    global _running  # noqa: PLW0603  # one event loop for each process
    with _lock:
        if _running is None:
            started: Future[BlockingPortal] = Future()
            thread = Thread(target=anyio.run, args=(_serve, started), daemon=True, name="tiger_db")
            thread.start()
            _running = started.result(), thread
        return _running


async def _serve(started: "Future[BlockingPortal]") -> None:
    from anyio.from_thread import BlockingPortal  # noqa: PLC0415  # slow import

    async with BlockingPortal() as portal:
        started.set_result(portal)
        await portal.sleep_until_stopped()


def _stop() -> None:
    if _running is not None:
        portal, thread = _running
        portal.call(portal.stop, True)  # noqa: FBT003  # cancel the functions that still run
        thread.join()


def _forget() -> None:
    """Forget the event loop of the parent process, whose thread does not run in this process."""
    global _lock, _running  # the lock is possibly locked by a thread of the parent
    _lock, _running = Lock(), None


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

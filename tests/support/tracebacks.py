"""Exceptions that are raised where our own frames hold plain secrets, and what tracebacks show."""

import asyncio
import linecache
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType, FrameType, TracebackType

import tiger_db

PACKAGE = str(Path(tiger_db.__file__).parent)
TESTING = str(Path(tiger_db.__file__).parent / "testing")
# These functions remove the local variables, also their own ones.
BOUNDARIES = {"wrapper", "checked", "forget_locals", "_clear", "__setattr__"}
_TRACED_LINES = 200  # of each call: the comparison of the schema runs for many thousands
Work = Callable[[], Awaitable[object]]


class Injected(BaseException):
    """An error that no handler expects."""


def shown(value: object) -> str:
    """Return what a tool such as Sentry stores of a local variable."""
    if isinstance(value, bytes | bytearray):
        return value.decode("latin-1")
    if isinstance(value, dict):
        return " ".join(f"{shown(key)} {shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return " ".join(map(shown, value))
    if isinstance(value, str):
        return value
    try:
        return repr(value)
    except Exception:  # noqa: BLE001  # a half-made object
        return ""


def plain(frame: FrameType, secrets: Collection[str]) -> list[str]:
    """Return the local variables of a frame that contain a plain secret."""
    return [
        name
        for name, value in frame.f_locals.items()
        if any(secret in text for text in [shown(value)] for secret in secrets)
    ]


def is_own(code: CodeType) -> bool:
    file = code.co_filename
    return file.startswith(PACKAGE) and not file.startswith(TESTING)


def is_with(frame: FrameType) -> bool:
    """Return whether a `with` statement begins or ends: an error at its end leaves a file open."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.lstrip().startswith(("with ", "async with "))


def leaks(error: BaseException, secrets: Collection[str]) -> list[str]:
    """Return the variables with plain secrets in our frames of a traceback, and of its causes."""
    found: list[str] = []
    seen: set[int] = set()

    def walk(error: BaseException | None) -> None:
        if error is None or id(error) in seen:
            return
        seen.add(id(error))
        for frame in frames(error.__traceback__):
            if is_own(frame.f_code):
                where = f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}"
                found.extend(f"{where}: {name}" for name in plain(frame, secrets))
        walk(error.__cause__)
        walk(error.__context__)

    walk(error)
    return sorted({*found})


def frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


class Injection:
    """Raises `Injected` in the first function of ours that holds a plain secret, once for each."""

    def __init__(self, secrets: Collection[str]) -> None:
        self.secrets = secrets
        self.done: set[CodeType] = set()
        self.injected = False

    def trace(self, frame: FrameType, *_: object) -> object:
        """Trace the lines of a call. A function gets its secrets in its first lines, if at all."""
        if not is_own(frame.f_code) or frame.f_code.co_name in BOUNDARIES:
            return None
        left = _TRACED_LINES

        def trace_line(frame: FrameType, event: str, _: object) -> object:
            nonlocal left
            left -= 1
            if frame.f_code in self.done or left == 0:
                frame.f_trace_lines = False
            elif (
                event == "line"
                and not self.injected
                and plain(frame, self.secrets)
                and not is_with(frame)
            ):
                self.done.add(frame.f_code)
                self.injected = True
                raise Injected
            return trace_line

        return None if frame.f_code in self.done else trace_line

    async def run(self, work: Work) -> BaseException | None:
        self.injected = False
        # Only new threads are traced, and those of an earlier run would be traced by its object.
        loop, executor = asyncio.get_running_loop(), ThreadPoolExecutor()
        loop.set_default_executor(executor)
        sys.settrace(self.trace)  # type: ignore[arg-type]
        threading.settrace(self.trace)  # type: ignore[arg-type]
        try:
            await work()
        except BaseException as error:  # noqa: BLE001
            return error
        finally:
            sys.settrace(None)
            threading.settrace(None)
            loop.set_default_executor(ThreadPoolExecutor())
            executor.shutdown(wait=False)
        return None

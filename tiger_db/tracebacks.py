"""Removal of local variables from tracebacks, because tools such as Sentry store these variables.

Functions that handle secrets have plain secrets in local variables for a short time. If such a
function raises an exception, the traceback would keep the variables.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

F_ = TypeVar("F_", bound=Callable[..., Any])

_PACKAGE = str(Path(__file__).parent)
_RESUMABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def forgets_locals(function: F_) -> F_:
    """Clear the local variables of a function, and of the functions it calls, if it raises."""
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def wrapper(*arguments: object, **keywords: object) -> object:
            try:
                return await function(*arguments, **keywords)
            except BaseException as error:
                forget_locals(error)
                raise
            finally:
                del arguments, keywords
    else:

        @wraps(function)
        def wrapper(*arguments: object, **keywords: object) -> object:
            try:
                return function(*arguments, **keywords)
            except BaseException as error:
                forget_locals(error)
                raise
            finally:
                del arguments, keywords

    return wrapper  # type: ignore[return-value]  # the wrapper has the signature of the function


def forget_locals(error: BaseException) -> None:
    """Clear the local variables of finished calls of tiger_db in the tracebacks of an error.

    The function that the caller has called is cleared, and functions that are not asynchronous. An
    asynchronous function is not cleared if it is called by another one, because the coroutine of a
    background task can pass an error on and continue. Before Python 3.13, `clear` would end this
    coroutine. The local variables of other packages and of the application are kept.
    """
    caller = error.__traceback__
    if caller is not None and caller.tb_next is not None:
        _clear(caller.tb_next.tb_frame)
    errors, seen = [error], set[int]()
    while errors:
        error = errors.pop()
        if id(error) in seen:
            continue
        seen.add(id(error))
        traceback = error.__traceback__
        while traceback is not None:
            code = traceback.tb_frame.f_code
            if not code.co_flags & _RESUMABLE or code.co_name == "<genexpr>":
                _clear(traceback.tb_frame)
            traceback = traceback.tb_next
        errors += [each for each in (error.__cause__, error.__context__) if each is not None]


def _clear(frame: FrameType) -> None:
    if frame.f_code.co_filename.startswith(_PACKAGE):
        with suppress(RuntimeError):  # the call is not finished
            frame.clear()

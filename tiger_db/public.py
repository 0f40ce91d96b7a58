"""The decorator of public functions, which checks arguments and converts errors of SQLAlchemy."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cache, cached_property, wraps
from math import isfinite
from types import UnionType
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

from pydantic_core import PydanticCustomError
from sqlalchemy.exc import SQLAlchemyError

from tiger_db.errors import InvalidFields
from tiger_db.sqlstates import typed
from tiger_db.tracebacks import forget_locals, forgets_locals

F_ = TypeVar("F_", bound=Callable[..., Any])
# The type of each parameter `progress` of a public function. While the public function works, it
# calls `progress` with the number of finished items, and with the number of all items. The number
# of all items is None if it is not known.
Progress: TypeAlias = Callable[[int, int | None], None]
# Public functions check these parameters themselves: a wrong `after` or `before` raises
# InvalidCursor, and a wrong `raw_key` raises InvalidAPIKey.
_CHECKED_BY_FUNCTION = {"after", "before", "raw_key"}
_MAX_DURATION = timedelta(days=36525)  # 100 years


def no_progress(done: int, total: int | None) -> None:
    """Do nothing. This function is the default value of each parameter `progress`."""


def public(function: F_) -> F_:
    """Check the arguments of a function, and convert errors of SQLAlchemy to errors of tiger_db.

    The arguments of each call are compared with the annotations of the parameters. For an enum, an
    argument can be a member or the value of a member. A datetime must have a time zone, and a
    duration is at most 100 years. A text is not accepted as a collection of texts. Keyword
    arguments that the function collects with `**` are not checked.

    Raises:
        InvalidFields: an argument has a wrong type. The error message names the parameter, but
            does not show the argument.
    """
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def checked(*arguments: object, **keywords: object) -> object:
            try:
                return await function(**_check(function, arguments, keywords))
            except BaseException as error:
                forget_locals(error)
                if isinstance(error, SQLAlchemyError):
                    raise typed(error) from None
                raise
            finally:
                del arguments, keywords
    else:

        @forgets_locals
        @wraps(function)
        def checked(*arguments: object, **keywords: object) -> object:
            return function(**_check(function, arguments, keywords))

    return checked  # type: ignore[return-value]  # the wrapper has the signature of the function


def _check(
    function: Callable[..., Any], arguments: tuple[object, ...], keywords: dict[str, object]
) -> dict[str, object]:
    """Check the arguments of a call, and return them by name."""
    positional, types = _parameters(function)
    given = dict(zip(positional, arguments, strict=False)) | keywords
    if len(given) != len(arguments) + len(keywords):
        # Python raises TypeError for a repeated or surplus argument.
        function(*arguments, **keywords)
    types.check(given)
    return given


@cache
def _parameters(function: Callable[..., Any]) -> tuple[list[str], "Types"]:
    """Return the names of the positional parameters, and the types of the parameters."""
    given = inspect.signature(function).parameters
    hints = {name: p.annotation for name, p in given.items() if p.kind is not p.VAR_KEYWORD}
    positional = [name for name, p in given.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return positional, Types(function.__qualname__, hints)


class Types:
    """The types of named values, such as the arguments of a function."""

    def __init__(self, title: str, hints: Mapping[str, Any]) -> None:
        self._title = title
        self._hints = hints

    @cached_property
    def _tests(self) -> dict[str, Callable[[Any], bool]]:
        return {
            name: _test(hint)
            for name, hint in self._hints.items()
            if name not in _CHECKED_BY_FUNCTION
        }

    @cached_property
    def _iterables(self) -> list[str]:
        return [name for name, hint in self._hints.items() if get_origin(hint) is Iterable]

    def check(self, values: dict[str, Any]) -> None:
        """Raise InvalidFields if a value has a wrong type.

        An iterable that is no collection is replaced by a list, because an iterator can be read
        only once.
        """
        for name in self._iterables:
            value = values.get(name)
            if isinstance(value, Iterable) and not isinstance(value, Collection):
                values[name] = list(value)
        wrong = []
        for name, value in values.items():
            test = self._tests.get(name)
            if test is not None and not test(value):
                wrong.append(((name,), _reason(self._hints[name], value)))
        if wrong:
            raise InvalidFields.of(self._title, wrong)


def _reason(hint: Any, value: object) -> PydanticCustomError:  # noqa: ANN401  # a type annotation
    """Return an error that describes why a value does not match a type annotation."""
    accepted = (hint, *get_args(hint))
    if isinstance(value, datetime) and datetime in accepted:
        return PydanticCustomError(
            "timezone_aware", "Input must have a time zone and be in the years 1 to 9999 in UTC"
        )
    if isinstance(value, timedelta) and timedelta in accepted:
        return PydanticCustomError("duration", "Input must be a duration of at most 100 years")
    wanted = re.sub(r"\w+\.", "", inspect.formatannotation(hint))
    return PydanticCustomError(
        "argument_type",
        "Input should be of the type {wanted}, not {given}",
        {"wanted": wanted, "given": _describe_type(hint, value)},
    )


def _describe_type(hint: Any, value: object) -> str:  # noqa: ANN401  # a type annotation
    """Return the name of a value's type.

    If an item of the value has a wrong type, the result also names the type of the first such item.
    """
    name = type(value).__name__
    for part in (hint, *get_args(hint)):
        kind, items = get_origin(part), get_args(part)
        if not (isinstance(kind, type) and issubclass(kind, Iterable) and isinstance(value, kind)):
            continue
        if isinstance(value, Collection) and not isinstance(value, str | bytes | bytearray):
            test = _test(items[0])
            for item in value:
                if not test(item):
                    return f"{name} with {type(item).__name__}"
    return name


def _test(hint: Any) -> Callable[[Any], bool]:  # noqa: ANN401, PLR0911  # each type has a return
    """Return a function that tests whether a value matches a type annotation."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        tests = [_test(part) for part in parts]
        return lambda value: any(test(value) for test in tests)
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in parts
    if origin is Callable:
        return callable
    kind = origin or hint
    if not isinstance(kind, type) or kind in (object, inspect.Parameter.empty):
        return lambda _value: True
    if issubclass(kind, Enum):
        return lambda value: (
            isinstance(value, kind) or (type(value) is str and _is_value(kind, value))
        )
    if issubclass(kind, Mapping):
        return lambda value: isinstance(value, kind) and all(isinstance(k, str) for k in value)
    if issubclass(kind, Iterable) and parts:
        item = _test(parts[0])
        return lambda value: (
            isinstance(value, kind)
            # A mapping does not count as a collection of its keys.
            and not isinstance(value, str | bytes | bytearray | Mapping)
            and all(map(item, value))
        )
    return _SPECIAL_TESTS.get(kind, lambda value: isinstance(value, kind))


def _is_value(kind: type[Enum], value: str) -> bool:
    try:
        return bool(kind(value))
    except ValueError:
        return False


def _is_storable_datetime(value: object) -> bool:
    try:
        return (
            isinstance(value, datetime)
            and value.utcoffset() is not None
            and bool(value.astimezone(UTC))
        )
    except OverflowError:
        return False


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


_SPECIAL_TESTS: dict[type, Callable[[Any], bool]] = {
    int: _is_int,
    float: lambda value: _is_int(value) or (isinstance(value, float) and isfinite(value)),
    datetime: _is_storable_datetime,
    timedelta: lambda value: isinstance(value, timedelta) and abs(value) <= _MAX_DURATION,
}

"""Dicts and lists that tell their row when they change, at any depth."""

from collections.abc import Callable
from typing import Any

from sqlalchemy.ext.mutable import Mutable


class Tracked(Mutable):
    """The column's value, or (with a `_root`) a part of it."""

    _root: "Tracked | None" = None

    @classmethod
    def coerce(cls, key: str, value: object) -> object:
        return value if value is None else track(value)

    def changed(self) -> None:
        if self._root is None:
            super().changed()
        else:
            self._root.changed()

    def _track(self, value: object) -> object:
        return track(value, self._root or self)


class TrackedDict(Tracked, dict[Any, Any]):
    """A dict whose changes are saved."""

    def __reduce__(self) -> tuple[type, tuple[dict[Any, Any]]]:
        return dict, (dict(self),)


class TrackedList(Tracked, list[Any]):
    """A list whose changes are saved."""

    def __reduce__(self) -> tuple[type, tuple[list[Any]]]:
        return list, (list(self),)


def track(value: object, root: Tracked | None = None) -> object:
    """A copy of a JSON value in which every dict and list reports its changes to the root."""
    if isinstance(value, dict):
        tracked: Tracked = TrackedDict()
        dict.update(tracked, {k: track(v, root or tracked) for k, v in value.items()})
    elif isinstance(value, list):
        tracked = TrackedList()
        list.extend(tracked, [track(item, root or tracked) for item in value])
    else:
        return value
    tracked._root = root
    return tracked


def _reporting(name: str, base: type) -> Callable[..., Any]:
    method = getattr(base, name)

    def report(self: Tracked, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        # New parts may have come in untracked: only the base class's methods know where.
        if isinstance(self, dict):
            for key, value in self.items():
                if type(value) in (dict, list):
                    dict.__setitem__(self, key, self._track(value))
        elif isinstance(self, list):
            for index, value in enumerate(self):
                if type(value) in (dict, list):
                    list.__setitem__(self, index, self._track(value))
        self.changed()
        return result

    report.__name__ = name
    return report


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):  # fmt: skip
    setattr(TrackedDict, _name, _reporting(_name, dict))
for _name in (
    "__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "clear", "extend", "insert",
    "pop", "remove", "reverse", "sort",
):  # fmt: skip
    setattr(TrackedList, _name, _reporting(_name, list))

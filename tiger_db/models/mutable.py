"""Dicts and lists that tell their row when they change, at any depth."""

from collections.abc import Callable
from typing import Any

from sqlalchemy.ext.mutable import Mutable
from sqlalchemy.orm import InstanceState


class Tracked(Mutable):
    """A column's value, or a part of it, whose changes are the root's."""

    root: "Tracked | None" = None
    touched = False  # whether the root was changed in place

    @classmethod
    def coerce(cls, key: str, value: object) -> object:  # noqa: ARG003  # SQLAlchemy's signature
        return track(value)

    @property
    def top(self) -> "Tracked":
        return self if self.root is None else self.root

    def is_foreign(self, value: object) -> bool:
        """Whether its changes are not yet reported to where those of this one are."""
        if isinstance(value, Tracked):
            return value.top is not self.top
        return isinstance(value, dict | list)

    def belong_to(self, state: InstanceState[Any], name: str) -> None:
        """Report changes to the row whose column this is; the ORM does this for what it loads."""
        self._parents[state] = name

    def changed(self) -> None:
        if self.root is None:
            self.touched = True
            super().changed()
        else:
            self.root.changed()


class TrackedDict(Tracked, dict[Any, Any]):
    """A dict that tells when it changes."""

    def adopt(self) -> None:
        for key, value in self.items():
            if self.is_foreign(value):
                dict.__setitem__(self, key, track(value, self.top))

    def become(self, value: dict[Any, Any]) -> None:
        """Take the value as validation has left it."""
        if value != self:
            self.clear()
            self.update(value)

    def setdefault(self, key: Any, default: Any = None, /) -> Any:  # noqa: ANN401  # as dict's
        if key not in self:
            self[key] = default
        return self[key]  # which is not the default itself, but what tracks it

    def __reduce__(self) -> tuple[Callable[..., object], tuple[dict[Any, Any]]]:
        return track, (dict(self),)  # copied or pickled, it belongs to no row


class TrackedList(Tracked, list[Any]):
    """A list that tells when it changes."""

    def adopt(self) -> None:
        for index, value in enumerate(self):
            if self.is_foreign(value):
                list.__setitem__(self, index, track(value, self.top))

    def become(self, value: list[Any]) -> None:
        """Take the value as validation has left it: texts may have become members of an enum."""
        if value != self or not all(map(isinstance, self, map(type, value))):
            self[:] = value

    def __reduce__(self) -> tuple[Callable[..., object], tuple[list[Any]]]:
        return track, (list(self),)


def track(value: object, root: Tracked | None = None) -> object:
    """A copy of a JSON value in which every dict and list reports its changes to the root."""
    if isinstance(value, dict):
        tracked: TrackedDict | TrackedList = TrackedDict({k: _plain(v) for k, v in value.items()})
    elif isinstance(value, list):
        tracked = TrackedList(map(_plain, value))
    else:
        return value
    tracked.root = root
    tracked.adopt()
    return tracked


def _plain(value: object) -> object:
    """A part that belongs to another root is copied, so that `adopt` takes it in."""
    match value:
        case TrackedDict():
            return dict(value)
        case TrackedList():
            return list(value)
    return value


def _reporting(cls: type[TrackedDict | TrackedList], name: str) -> Callable[..., Any]:
    change = getattr(cls, name)

    def report(self: TrackedDict | TrackedList, /, *args: object, **kwargs: object) -> object:
        try:
            return change(self, *args, **kwargs)
        finally:  # half of an update that failed is a change too
            self.adopt()
            self.changed()

    return report


for _name in (
    "__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "update",
):  # fmt: skip
    setattr(TrackedDict, _name, _reporting(TrackedDict, _name))
for _name in (
    "__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "clear", "extend", "insert",
    "pop", "remove", "reverse", "sort",
):  # fmt: skip
    setattr(TrackedList, _name, _reporting(TrackedList, _name))

"""Dicts and lists of entities, whose changes in place the ORM saves.

`sqlalchemy.ext.mutable` tracks each value when its row is loaded. A list of entities has thousands
of values, and most of them are only shown. Here, a loaded or assigned value is a plain dict or list
until its attribute is read.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

from sqlalchemy import event
from sqlalchemy.orm import QueryableAttribute
from sqlalchemy.orm.attributes import flag_modified


class TrackedAttribute:
    """The attribute of an entity class for a column of dicts or lists.

    The attribute replaces a plain dict or list by a `Tracked` copy when it is read.
    """

    __slots__ = ("_attribute", "_name")

    def __init__(self, attribute: QueryableAttribute[Any]) -> None:
        self._attribute = attribute
        self._name = attribute.key
        event.listen(attribute, "set", _copy_assigned, raw=True, retval=True, propagate=True)

    def __get__(self, entity: Any, owner: type[Any]) -> Any:  # noqa: ANN401  # any attribute or value
        value = self._attribute.__get__(entity, owner)
        # `Session.merge(load=False)` gives two entities the same value.
        if not isinstance(value, dict | list) or (
            isinstance(value, Tracked) and value.belongs_to(entity)
        ):
            return value
        tracked = track(value)
        assert isinstance(tracked, Tracked)
        tracked.entity, tracked.name = ref(entity), self._name
        vars(entity)[self._name] = tracked  # reading is not a change
        return tracked

    def __set__(self, entity: object, value: object) -> None:
        self._attribute.__set__(entity, value)

    def __delete__(self, entity: object) -> None:
        self._attribute.__delete__(entity)


def _copy_assigned(_state: object, value: object, _old: object, _initiator: object) -> object:
    """Copy an assigned value, so that it belongs to one entity only."""
    return plain_copy(value)


def plain_copy(value: object) -> object:
    """Copy a dict or list, and the dicts and lists in it. The copies are not tracked."""
    if isinstance(value, dict):
        return {key: plain_copy(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain_copy(part) for part in value]
    return value


class Tracked:
    """A dict or list that reports in-place changes, so that the ORM saves the changes.

    The root is the dict or list that is the value of a column. A nested dict or list reports
    changes to the root, and the root marks the column as modified. The attribute `root` is None in
    the dict or list that is the value of a column. The attributes `entity` and `name` of the root
    are a weak reference to its entity and the name of its column. The attribute `modified` is True
    after an in-place change of the root.
    """

    root: "Tracked | None" = None
    entity: ReferenceType[Any] | None = None
    name = ""
    modified = False

    def belongs_to(self, entity: object) -> bool:
        return self.entity is not None and self.entity() is entity

    def changed(self) -> None:
        if self.root is not None:
            self.root.changed()
            return
        self.modified = True
        entity = self.entity and self.entity()
        # After a refresh or an assignment, the entity has another value.
        if entity is not None and vars(entity).get(self.name) is self:
            flag_modified(entity, self.name)

    def tracked_part(self, value: object) -> object:
        """Return a nested value that notifies the root of this object when its content changes.

        A dict or list that does not report changes to the root yet is replaced by a tracked copy.
        """
        root = self.root or self
        if isinstance(value, Tracked) and (value.root or value) is root:
            return value
        return track(value, root)

    @abstractmethod
    def track_parts(self) -> None:
        """Replace nested dicts and lists by tracked copies that report changes to the root."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object]]:
        # A copied or unpickled dict or list belongs to no entity.
        return plain_copy, (plain_copy(self),)


class TrackedDict(Tracked, dict[Any, Any]):
    """A dict that reports in-place changes."""

    def track_parts(self) -> None:
        for key, value in self.items():
            dict.__setitem__(self, key, self.tracked_part(value))

    def replace_content(self, value: dict[Any, Any]) -> None:
        """Replace the content of this dict, and report a change if the new content differs."""
        if value != self:
            self.clear()
            self.update(value)

    def setdefault(self, key: Any, default: Any = None, /) -> Any:  # noqa: ANN401  # dict's signature
        if key not in self:
            self[key] = default
        return self[key]  # a new dict or list is stored as a tracked copy


class TrackedList(Tracked, list[Any]):
    """A list that reports in-place changes."""

    def track_parts(self) -> None:
        for index, value in enumerate(self):
            list.__setitem__(self, index, self.tracked_part(value))

    def replace_content(self, value: list[Any]) -> None:
        """Replace the content of this list, and report a change if the new content differs.

        An enum member and an equal text count as different content.
        """
        if value != self or not all(map(isinstance, self, map(type, value))):
            self[:] = value


def track(value: object, root: Tracked | None = None) -> object:
    """Copy a dict or list. The copy reports in-place changes, so that the ORM saves the changes.

    Nested dicts and lists are copied, too. Return a value unchanged if the value is neither a dict
    nor a list.
    """
    if isinstance(value, dict):
        tracked: Tracked = TrackedDict({k: _untracked(v) for k, v in value.items()})
    elif isinstance(value, list):
        tracked = TrackedList(map(_untracked, value))
    else:
        return value
    tracked.root = root
    tracked.track_parts()
    return tracked


def _untracked(value: object) -> object:
    """Return a plain copy of a tracked dict or list, or return any other value unchanged."""
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
        finally:  # before a method fails, the method can change a part of the dict or list
            self.track_parts()
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

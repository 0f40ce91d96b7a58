"""The Python and SQL types of columns."""

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import Enum, StrEnum
from ipaddress import IPv4Address, IPv4Network, ip_network
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, GetPydanticSchema, JsonValue, SerializeAsAny
from sqlalchemy import BigInteger, Boolean, DateTime, Dialect, MetaData
from sqlalchemy import Enum as SQLEnum
from sqlalchemy import Text as SQLText
from sqlalchemy.dialects.postgresql import ARRAY, CIDR, INET, JSONB
from sqlalchemy.dialects.postgresql import UUID as SQLUUID
from sqlalchemy.types import TypeDecorator, TypeEngine

from tiger_db.decoding import UNREADABLE, as_object, as_objects, unreadable_list
from tiger_db.encryption import EncryptedType, Secret

T = TypeVar("T")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Python types that validate values


def _to_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("datetime must be in the years 1 to 9999 in UTC") from None


def _require_storable_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("text must not contain a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("text must be valid Unicode") from None
    return value


def require_storable_json(value: T) -> T:
    """Return a JSON value unchanged. Raise ValueError if JSONB cannot store the value."""
    try:
        text = _storable_json(value)
        text.encode()
    except (ValueError, RecursionError):  # ValueError includes UnicodeEncodeError
        raise ValueError(
            "value must be JSON without NaN and infinity, as PostgreSQL requires"
        ) from None
    if "\\u0000" in text and _ESCAPED_NUL.search(text):
        raise ValueError("text in JSON must not contain a NUL character")
    return value


_storable_json = json.JSONEncoder(allow_nan=False, ensure_ascii=False).encode
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def _require_64_bits(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError("integer must fit in 64 bits")
    return value


Int64 = Annotated[int, AfterValidator(_require_64_bits)]
UTCDateTime = Annotated[AwareDatetime, AfterValidator(_to_utc)]
Text = Annotated[str, AfterValidator(_require_storable_text)]
JsonObject = Annotated[dict[str, JsonValue], AfterValidator(require_storable_json)]

# SQL types of columns


class Timestamp(TypeDecorator[datetime]):
    """A `timestamptz` column whose values are always aware datetimes.

    asyncpg returns PostgreSQL's infinity as a naive `datetime.max` or `datetime.min`. `Timestamp`
    adds the time zone UTC to naive values.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def result_processor(
        self,
        dialect: Dialect,  # noqa: ARG002  # SQLAlchemy's signature
        coltype: object,  # noqa: ARG002  # SQLAlchemy's signature
    ) -> Callable[[datetime | None], datetime | None]:
        # SQLAlchemy would call process_result_value() by way of another function.
        return _make_aware


def _make_aware(value: datetime | None) -> datetime | None:
    return value if value is None or value.tzinfo is not None else value.replace(tzinfo=UTC)


class Json(JSONB):
    """The SQL type of a `jsonb` column of objects, which detects changes between 1, 1.0 and true.

    Python compares the numbers 1 and 1.0 and the value True as equal, but their JSON differs.
    """

    json_type: ClassVar = "object"

    def adapt(self, cls: type[Any], **options: Any) -> Any:  # noqa: ANN401, ARG002  # SQLAlchemy's
        # SQLAlchemy 2.0 would replace this type by its JSONB type for asyncpg.
        return super().adapt(type(self), **options)

    def result_processor(
        self,
        dialect: Dialect,  # noqa: ARG002  # SQLAlchemy's signature
        coltype: object,  # noqa: ARG002  # SQLAlchemy's signature
    ) -> Callable[[Any], Any]:
        # The codec of the connection has parsed the JSON.
        return as_objects if self.json_type == "array" else as_object

    def compare_values(self, x: object, y: object) -> bool:
        return x == y and json.dumps(x, sort_keys=True) == json.dumps(y, sort_keys=True)


class JsonArray(Json):
    """The SQL type of a `jsonb` column of arrays of objects."""

    json_type: ClassVar = "array"


class List(ARRAY[Any]):
    """The SQL type of an array column, which reads each list that plain SQL can store.

    A null or a nested list among the items is read as the text `_unreadable` or as the network
    `::/128`, which match no request. If the items are members of an enum, the list lacks items that
    are no members.
    """

    render_bind_cast = True  # as in SQLAlchemy's array type for asyncpg

    def adapt(self, cls: type[Any], **options: Any) -> Any:  # noqa: ANN401, ARG002  # SQLAlchemy's
        # SQLAlchemy would replace this type by its array type for asyncpg.
        return super().adapt(type(self), **options)

    def result_processor(
        self,
        dialect: Dialect,  # noqa: ARG002  # SQLAlchemy's signature
        coltype: object,  # noqa: ARG002  # SQLAlchemy's signature
    ) -> Callable[[Any], Any]:
        read, replacement = self._item_reader()

        def process(items: list[Any] | None) -> list[Any] | None:
            if items is None:
                return None
            try:
                return [*map(read, items)]
            except _UNREADABLE_ITEM:
                return unreadable_list(_read_items(items, read, replacement))

        return process

    def _item_reader(self) -> tuple[Callable[[Any], object], list[object]]:
        """Return the function that reads an item, and the replacement of an unreadable item."""
        item_type = self.item_type
        if isinstance(item_type, SQLEnum):
            members = {member.value: member for member in item_type.enum_class or ()}
            return members.__getitem__, []
        if isinstance(item_type, CIDR):
            return ip_network, [_NO_NETWORK]
        return _require_text, [UNREADABLE]


_UNREADABLE_ITEM = (KeyError, TypeError, ValueError)
_NO_NETWORK = ip_network("::/128")  # the unspecified address, from which no request comes


def _require_text(item: object) -> str:
    if not isinstance(item, str):
        raise TypeError
    return item


def _read_items(
    items: list[object], read: Callable[[Any], object], replacement: list[object]
) -> Iterator[object]:
    for item in items:
        try:
            yield read(item)
        except _UNREADABLE_ITEM:
            yield from replacement


class OpenEnum(TypeDecorator[str]):
    """The SQL type of a column that stores members of an enum or other texts.

    A stored text that equals the value of an enum member is read as that member. A stored text that
    is no member of the enum is read as a `str`. An application or a newer release of tiger_db can
    store such a text, in a native enum after it has added a label.
    """

    impl = SQLText
    cache_ok = True

    def __init__(self, enum: type[StrEnum], impl: TypeEngine[Any]) -> None:
        self.enum = enum
        self.impl = impl  # type: ignore[assignment]  # the class attribute is only a default

    def result_processor(
        self,
        dialect: Dialect,  # noqa: ARG002  # SQLAlchemy's signature
        coltype: object,  # noqa: ARG002  # SQLAlchemy's signature
    ) -> Callable[[Any], Any]:
        # result_processor() is overridden instead of process_result_value(), because the result
        # processor of the native enum raises an error for texts that are not members.
        members: dict[str | None, StrEnum | None] = {m.value: m for m in self.enum}
        return _Members(members | {None: None}).__getitem__


class _Members(dict[str | None, StrEnum | None]):
    """The members of an enum by value. Another text is mapped to itself."""

    def __missing__(self, value: str) -> str:
        return value


def is_native_enum(type_: TypeEngine[Any]) -> bool:
    """Return whether an SQL type is a native PostgreSQL enum."""
    return isinstance(getattr(type_, "impl", type_), SQLEnum)


def open_enum(enum: type[StrEnum]) -> GetPydanticSchema:
    """Return the annotation for a field whose column has the SQL type `OpenEnum`.

    Validation accepts only members of the enum. Serialization accepts any text, because the
    database can contain texts that are not enum members.
    """
    open_: Any = SerializeAsAny  # with the type Any, mypy accepts the expression open_[enum]
    return GetPydanticSchema(lambda _source, handler: handler(open_[enum]))


def enum_type(enum: type[StrEnum]) -> SQLEnum:
    """Return the native PostgreSQL enum of a Python enum, with the member values as labels."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", enum.__name__).lower()
    return SQLEnum(
        enum, name=name, metadata=metadata, values_callable=lambda e: [m.value for m in e]
    )


# The SQL type of text columns in unique constraints and indexes. With the collation "C", PostgreSQL
# compares texts by code point. The sort order of other collations can change when the operating
# system or ICU is upgraded, and a unique index that has the old order accepts duplicates.
UNIQUE_TEXT = SQLText(collation="C")


_SQL_TYPES: list[tuple[type, Callable[[], TypeEngine[Any]]]] = [
    (Secret, EncryptedType),
    (bool, Boolean),
    (int, BigInteger),
    (str, SQLText),
    (AwareDatetime, Timestamp),
    (UUID, SQLUUID),
    (IPv4Address, INET),
    (IPv4Network, CIDR),
]


def sql_type(annotation: Any) -> TypeEngine[Any]:  # noqa: ANN401  # any annotation is valid
    """Return the SQL type for the annotation of a field.

    A field that is a list of scalars gets an array column. Dicts and lists of dicts become JSONB.
    The SQL type does not depend on `None` or on validators in the annotation.
    """
    while get_origin(annotation) in {Annotated, Union, UnionType}:
        annotation = get_args(annotation)[0]
    kind = get_origin(annotation) or annotation
    if issubclass(kind, list):
        item = sql_type(get_args(annotation)[0])
        if isinstance(item, JSONB):
            return JsonArray(none_as_null=True)
        if isinstance(item, OpenEnum):
            item = item.impl_instance
        return List(item, dimensions=1)
    if issubclass(kind, dict):
        return Json(none_as_null=True)
    if issubclass(kind, Enum):
        return OpenEnum(kind, enum_type(kind))
    return next(make() for python_type, make in _SQL_TYPES if issubclass(kind, python_type))

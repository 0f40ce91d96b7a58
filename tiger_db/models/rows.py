"""Rows read past the ORM, as the objects that it would have made of them.

Its own way of building a statement and reading its rows takes longer than PostgreSQL does.
"""

from collections.abc import Callable, Sequence
from functools import cache
from ipaddress import ip_network
from typing import Any, TypeVar

from sqlalchemy import ARRAY, Enum, Table, inspect
from sqlalchemy.dialects.postgresql import CIDR
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.orm import Mapper, Session, class_mapper, make_transient_to_detached
from sqlalchemy.orm.attributes import instance_state, set_committed_value
from sqlalchemy.types import TypeEngine

from tiger_db.encryption import KeyProvider
from tiger_db.models.base import Entity, bind_secrets, key_provider
from tiger_db.models.mutable import Tracked, track

E_ = TypeVar("E_", bound=Entity)
_DIALECT = dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's


def row_expression(entity: type[Entity], table: str) -> str:
    """What a statement has to return of a table, or its alias, for `hydrate` and `merge_row`.

    It is one value: what SQLAlchemy does for each column of a result takes longer than all of them.
    """
    return f"ROW({column_list(entity, table)})"


def column_list(entity: type[Entity], table: str) -> str:
    """Return the values of `row_expression` as columns, for statements of asyncpg."""
    return ", ".join(f"{table}.{name}{cast}" for name, cast, _ in _fields(entity))


def column_names(entity: type[Entity]) -> list[str]:
    """Return the names of `column_list`."""
    return [name for name, _, _ in _fields(entity)]


def hydrate(entity: type[E_], values: Sequence[Any], provider: KeyProvider | None) -> E_:
    """An object that belongs to no session; `provider` decrypts its secrets."""
    mapper: Mapper[E_] = class_mapper(entity)
    row = mapper.class_manager.new_instance()
    state = instance_state(row)
    # Its own, past what tracks changes: these are none.
    vars(row).update(_loaded(entity, values))
    for name, value in vars(row).items():
        if isinstance(value, Tracked):
            value.belong_to(state, name)
    bind_secrets(row, provider)
    make_transient_to_detached(row)
    return row


def merge_row(session: Session, entity: type[E_], values: Sequence[Any]) -> E_:
    """The session's object of the row, which is then as the row is now."""
    mapper: Mapper[E_] = class_mapper(entity)
    key = mapper.identity_key_from_primary_key((values[0],))  # id is the first column
    row: E_ | None = session.identity_map.get(key)
    if row is None:
        row = hydrate(entity, values, key_provider(session))
        session.add(row)
        return row
    state = instance_state(row)
    for name, value in _loaded(entity, values).items():
        set_committed_value(row, name, value)
        if isinstance(value, Tracked):
            value.belong_to(state, name)
    bind_secrets(row, key_provider(session))
    return row


@cache
def _fields(entity: type[Entity]) -> list[tuple[str, str, Callable[[Any], Any] | None]]:
    """The columns in the order of the fields: name, cast, and what SQLAlchemy makes of a value."""
    mapper: Mapper[Any] = inspect(entity)
    table = mapper.local_table
    assert isinstance(table, Table)
    names = [*entity.model_fields, *(table.c.keys() - entity.model_fields.keys())]
    return [
        (name, _cast(type_), _processor(type_)) for name in names for type_ in [table.c[name].type]
    ]


def _cast(type_: TypeEngine[Any]) -> str:
    # Within a row, asyncpg decodes built-in types only, and of their arrays not all.
    if isinstance(type_, Enum):
        return "::text"
    return "::text[]" if isinstance(type_, ARRAY) else ""


def _processor(type_: TypeEngine[Any]) -> Callable[[Any], Any] | None:
    if isinstance(type_, ARRAY) and isinstance(type_.item_type, CIDR):  # asyncpg's work: see _cast
        return lambda networks: [ip_network(network) for network in networks]
    return type_.dialect_impl(_DIALECT).result_processor(_DIALECT, None)


def _loaded(entity: type[Entity], values: Sequence[Any]) -> dict[str, Any]:
    return {
        name: track(value if process is None else process(value))
        for (name, _, process), value in zip(_fields(entity), values, strict=True)
    }

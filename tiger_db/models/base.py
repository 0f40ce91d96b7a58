"""The base classes of entities, and functions that create entities from raw rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any, ClassVar, Self, TypeVar

import annotated_types as rules
from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticUndefined
from sqlalchemy import CheckConstraint, Column, Connection, Table, event
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql.asyncpg import dialect
from sqlalchemy.orm import (
    InstanceState,
    Mapper,
    QueryContext,
    Session,
    class_mapper,
    make_transient_to_detached,
    object_mapper,
    object_session,
    registry,
)
from sqlalchemy.orm.attributes import instance_state, set_attribute, set_committed_value
from sqlalchemy.types import TypeEngine

from tiger_db.decoding import report_unreadable
from tiger_db.encryption import KeyProvider
from tiger_db.errors import InvalidFields
from tiger_db.models.columns import Json, Timestamp, is_native_enum, metadata, sql_type
from tiger_db.models.secrets import (
    bind_loaded_secrets,
    bind_secrets,
    encrypt_secrets,
    encrypted_columns,
    key_provider,
)
from tiger_db.models.tracking import Tracked, TrackedAttribute
from tiger_db.models.views import EntityView, MutableEntityView
from tiger_db.tracebacks import forgets_locals

E_ = TypeVar("E_", bound="Entity")
# SQLModel's model_validate() first creates an instance without arguments, and then sets its fields.
# Only for that instance, `_creates_empty` is true.
_creates_empty: ContextVar[bool] = ContextVar("_creates_empty", default=False)


class Entity(EntityView, registry=registry(metadata=metadata)):
    """Base class of entities. Construction and assignment validate the values of fields.

    Raises:
        InvalidFields: a value is invalid. The error message names the field, but does not show
            the value. An invalid assignment does not change the entity.
    """

    __abstract__: ClassVar[bool] = True
    # SQLModel declares another type, with which pyright refuses a text.
    __tablename__: ClassVar[str]
    # The columns to whose values the secrets of the entity are bound, each with a function that
    # converts a value that is not None to a text. If another value is stored without new
    # ciphertexts, the secrets cannot be decrypted.
    secrets_bound_to: ClassVar[Mapping[str, Callable[[Any], str | None]]] = {}
    # With eager_defaults, INSERT and UPDATE return the timestamps that the database sets.
    __mapper_args__: ClassVar[dict[str, object]] = {"eager_defaults": True}
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, validate_assignment=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401  # pydantic's signature
        """Choose the SQL type of each field that does not set `sa_type`."""
        super().__pydantic_init_subclass__(**options)
        for field in cls.model_fields.values():
            for info in field.metadata:
                if getattr(info, "sa_type", None) is PydanticUndefined:
                    info.sa_type = sql_type(field.annotation)

    @model_validator(mode="wrap")
    @classmethod
    def _validated(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:  # noqa: ANN401  # pydantic's signature
        try:
            return handler(data)
        except ValidationError as error:
            raise _invalid_fields(error) from None

    @forgets_locals
    def __init__(self, **data: Any) -> None:  # noqa: ANN401  # SQLModel's signature
        if not data and _creates_empty.get():
            _creates_empty.set(False)
            return
        state = self.__dict__
        related = {name: data.pop(name) for name in self.__sqlmodel_relationships__.keys() & data}
        try:
            self.__pydantic_validator__.validate_python(data, self_instance=self)
        except ValidationError as error:
            raise _invalid_fields(error) from None
        values, given = self.__dict__, self.__pydantic_fields_set__
        object.__setattr__(self, "__dict__", state)
        # Set the validated values again, because pydantic bypasses SQLAlchemy's instrumentation.
        # An attribute that is None by default is no change, so it needs no instrumentation.
        for name, value in values.items():
            if value is None and name not in given:
                state[name] = None
            else:
                set_attribute(self, name, value)
        object.__setattr__(self, "__pydantic_fields_set__", given)
        for name, value in related.items():
            self._relate(name, value)

    @classmethod
    @forgets_locals
    def untracked(cls, values: Mapping[str, object]) -> Self:
        """Create an entity for an INSERT that bypasses the ORM.

        The values are validated as in `__init__`. They bypass SQLAlchemy's change tracking, which
        takes as long as the validation.
        """
        entity = class_mapper(cls).class_manager.new_instance()
        state = instance_state(entity)
        try:
            cls.__pydantic_validator__.validate_python(values, self_instance=entity)
        except ValidationError as error:
            raise _invalid_fields(error) from None
        entity.__dict__["_sa_instance_state"] = state  # pydantic has replaced the dict
        return entity

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401  # SQLModel's signature
        try:
            if name == "_sa_instance_state":  # for each loaded row
                self.__dict__[name] = value
            else:
                self._assign(name, value)
        finally:
            del value  # as forgets_locals() does, whose wrapper would slow down loading

    @forgets_locals
    def _assign(self, name: str, value: object) -> None:
        if name in self.__sqlmodel_relationships__:
            self._relate(name, value)
        else:
            self.sqlmodel_update({name: value})

    def _relate(self, name: str, value: object) -> None:
        """Assign related objects to a relationship.

        Raises:
            InvalidFields: a related object has the wrong class, or the relationship is view-only.
        """
        relationship = object_mapper(self).relationships[name]
        if relationship.viewonly:
            columns = ", ".join(column.name for column in relationship.local_columns)
            read_only = PydanticCustomError(
                "read_only", "The relationship is view-only: set {columns}", {"columns": columns}
            )
            raise InvalidFields.of(type(self).__name__, [((name,), read_only)])
        kind = relationship.mapper.class_
        items = value if relationship.uselist else [] if value is None else [value]
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            wanted = f"a list of {kind.__name__}" if relationship.uselist else kind.__name__
            reason = PydanticCustomError(
                "relationship_type", "Input should be {wanted}", {"wanted": wanted}
            )
            raise InvalidFields.of(type(self).__name__, [((name,), reason)])
        set_attribute(self, name, value)

    @forgets_locals
    def sqlmodel_update(
        self, obj: dict[str, Any] | BaseModel, *, update: dict[str, Any] | None = None
    ) -> Self:
        """Assign several fields. If one value is invalid, no field is changed."""
        fields = (
            obj if isinstance(obj, dict) else {k: getattr(obj, k) for k in obj.model_fields_set}
        )
        for name, value in self.validate_changes({**fields, **(update or {})}).items():
            set_attribute(self, name, value)
            self.__pydantic_fields_set__.add(name)
        return self

    @forgets_locals
    def validate_changes(self, changes: Mapping[str, object]) -> dict[str, Any]:
        """Validate new field values on a copy of the entity, and return the validated values."""
        if not changes:
            return {}
        draft = object.__new__(type(self))
        for slot in ("__pydantic_extra__", "__pydantic_private__"):
            object.__setattr__(draft, slot, None)
        object.__setattr__(draft, "__pydantic_fields_set__", set())
        object.__setattr__(draft, "__dict__", self.__dict__.copy())
        del draft.__dict__["_sa_instance_state"]
        try:
            for name, value in changes.items():
                self.__pydantic_validator__.validate_assignment(draft, name, value)
        except ValidationError as error:
            raise _invalid_fields(error) from None
        return {name: draft.__dict__[name] for name in changes}

    def label(self) -> str:
        """Return the name of the entity for error messages, or an empty string."""
        return self.label_of(self.__dict__)

    @classmethod
    def label_of(cls, values: Mapping[str, Any]) -> str:  # noqa: ARG003  # subclasses use it
        """Return the name of the entity with the given values of columns."""
        return ""

    # SQLAlchemy loads the columns in any order. Here, the fields are sorted when they are shown.

    def __repr_args__(self) -> Sequence[tuple[str | None, Any]]:
        _sort_fields(self)
        return super().__repr_args__()

    def __iter__(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]  # pydantic's signature
        _sort_fields(self)
        return super().__iter__()

    # With an annotation of the result, the JSON schema would not describe the fields.
    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]  # noqa: ANN202
        _sort_fields(self)
        return handler(self)

    def __copy__(self) -> Self:
        """Return a transient copy of the entity with its loaded columns, without relationships."""
        mapper = object_mapper(self)
        twin: Self = mapper.class_manager.new_instance()
        for name in mapper.column_attrs.keys() & self.__dict__.keys():
            set_attribute(twin, name, self.__dict__[name])
        twin.__pydantic_fields_set__.update(self.__pydantic_fields_set__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.__copy__()

    def model_copy(
        self,
        *,
        update: Mapping[str, Any] | None = None,
        deep: bool = False,  # noqa: ARG002  # every copy is deep
    ) -> Self:
        """Return a copy of the entity with the validated changes in `update`."""
        return self.__copy__().sqlmodel_update(dict(update or {}))

    @classmethod
    @forgets_locals
    def model_validate(cls, obj: Any, **options: Any) -> Self:  # noqa: ANN401  # pydantic's signature
        token = _creates_empty.set(True)
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _invalid_fields(error) from None
        finally:
            _creates_empty.reset(token)

    @classmethod
    @forgets_locals
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:  # noqa: ANN401  # pydantic's signature
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise _invalid_fields(error) from None


class MutableEntity(Entity, MutableEntityView):
    """An entity whose rows can be updated."""

    __abstract__: ClassVar[bool] = True


def _sort_fields(entity: Entity) -> None:
    """Sort the values of an entity in the order of its fields."""
    values = entity.__dict__
    for name in _field_names(type(entity)):
        if name in values:
            values[name] = values.pop(name)


@cache
def _field_names(entity: type[Entity]) -> tuple[str, ...]:
    return tuple(entity.model_fields)


def _invalid_fields(error: ValidationError) -> InvalidFields:
    """Convert a pydantic error to InvalidFields, without invalid values, which can be secrets."""
    return InvalidFields.of(
        error.title,
        [
            (
                problem["loc"],
                PydanticCustomError(problem["type"], problem["msg"], problem.get("ctx")),
            )
            for problem in error.errors(include_url=False, include_input=False)
            # pydantic reports default_factory_not_called only if another field is also invalid.
            if problem["type"] != "default_factory_not_called"
        ],
    )


# CHECK constraints and column comments


@event.listens_for(Entity, "after_mapper_constructed", propagate=True)
def _add_constraints(mapper: Mapper[Entity], cls: type[Entity]) -> None:
    """Add column comments from field descriptions, and CHECK constraints from field limits.

    The name of each CHECK constraint contains the limit of the field, such as `max_50`. Alembic's
    autogenerate compares CHECK constraints by name, and so detects a changed limit.
    """
    table = mapper.local_table
    assert isinstance(table, Table)
    for name, field in cls.model_fields.items():
        column = table.c[name]
        column.comment = field.description
        for sql, suffix in (*_limits(column, field.metadata), *_readable(column)):
            table.append_constraint(CheckConstraint(sql, name=f"{name}_{suffix}"))


def _limits(column: Column[Any], metadata: Iterable[object]) -> Iterable[tuple[str, str]]:
    length = "cardinality" if isinstance(column.type, ARRAY) else "char_length"
    for rule in metadata:
        match rule:
            case rules.MinLen(limit):
                yield f"{length}({column.name}) >= {limit}", f"min_{limit}"
            case rules.MaxLen(limit):
                yield f"{length}({column.name}) <= {limit}", f"max_{limit}"
            case rules.Ge(limit):
                yield f"{column.name} >= {limit}", f"ge_{limit}"
            case rules.Le(limit):
                yield f"{column.name} <= {limit}", f"le_{limit}"


_YEARS = "years_1_to_9999"
_READABLE_SUFFIXES = (f"_{_YEARS}", "_object", "_array", "_objects", "_list")


def _readable(column: Column[Any]) -> Iterable[tuple[str, str]]:
    """Yield the constraints by which Python can read all values of a column."""
    name = column.name
    if isinstance(column.type, Timestamp):
        years = "BETWEEN '0001-01-01 00:00:00+00' AND '9999-12-31 23:59:59.999999+00'"
        yield f"NOT isfinite({name}) OR {name} {years}", _YEARS
    elif isinstance(column.type, Json):
        kind = column.type.json_type
        yield f"jsonb_typeof({name}) = '{kind}'", kind
        if kind == "array":
            # In the lax mode, the filter would look into nested arrays.
            path = "'strict $[*] ? (@.type() != \"object\")', silent => true"
            yield f"NOT jsonb_path_exists({name}, {path})", "objects"
    elif isinstance(column.type, ARRAY):
        is_flat = f"coalesce(array_ndims({name}), 1) = 1"
        yield f"{is_flat} AND num_nulls(VARIADIC {name}) = 0", "list"


def readable_rules(table: Table) -> dict[str, str]:
    """Return the names and SQL conditions of the constraints by which Python can read all rows."""
    return {
        str(rule.name): str(rule.sqltext)
        for rule in table.constraints
        if isinstance(rule, CheckConstraint) and str(rule.name).endswith(_READABLE_SUFFIXES)
    }


@event.listens_for(Entity, "after_mapper_constructed", propagate=True)
def _track_changes(mapper: Mapper[Entity], cls: type[Entity]) -> None:
    """Track in-place changes of the dicts and lists in the columns of an entity."""
    for name, column in mapper.local_table.c.items():
        if isinstance(column.type, ARRAY | JSONB):
            type.__setattr__(cls, name, TrackedAttribute(getattr(cls, name)))


# Event listeners that run when the ORM flushes or loads entities


@event.listens_for(Entity, "before_insert", propagate=True)
@event.listens_for(Entity, "before_update", propagate=True)
@forgets_locals
def _prepare_flush(mapper: Mapper[Any], connection: Connection, row: Entity) -> None:
    """Validate JSON values and lists that were changed in place, and encrypt new secrets."""
    changed = {
        name: row.__dict__[name]
        for name in instance_state(row).committed_state
        if isinstance(row.__dict__.get(name), Tracked)
    }
    for name, value in row.validate_changes(changed).items():
        changed[name].replace_content(value)
    encrypt_secrets(mapper, connection, row)


@event.listens_for(Entity, "after_mapper_constructed", propagate=True)
def _bind_secrets(mapper: Mapper[Entity], cls: type[Entity]) -> None:
    """Bind the secrets of an entity to its row when the ORM loads the row or reads it again."""
    if not encrypted_columns(mapper):
        return

    def load(state: InstanceState[Any], context: QueryContext | None) -> None:
        if context is None:  # `Session.merge(load=False)` has copied the values of another entity
            row = state.obj()
            assert row is not None
            bind_secrets(row, key_provider(state.session))
        else:
            bind_loaded_secrets(mapper, state.dict, key_provider(context.session))

    def refresh(row: Entity, *_: object) -> None:
        bind_secrets(row, key_provider(object_session(row)))

    event.listen(cls, "load", load, raw=True, propagate=True)
    event.listen(cls, "refresh", refresh, propagate=True)


# Functions that create entities from raw rows of asyncpg without the ORM loader


def row_expression(entity: type[Entity], table: str) -> str:
    """Return the SQL expression that selects a row for `hydrate` or `merge_row`.

    The expression combines all columns in one ROW value, because SQLAlchemy's overhead grows with
    the number of result columns.
    """
    columns = [f"{table}.{name}{_cast(type_)}" for name, type_ in _columns(entity).items()]
    return f"ROW({', '.join(columns)})"


def column_names(entity: type[Entity]) -> list[str]:
    """Return the column names in the order of `row_expression`."""
    return list(_columns(entity))


def hydrate(entity: type[E_], values: Sequence[Any], provider: KeyProvider | None) -> E_:
    """Create a detached entity from the column values of a row.

    The key provider `provider` decrypts each secret of the entity on access.
    """
    mapper: Mapper[E_] = class_mapper(entity)
    row = mapper.class_manager.new_instance()
    # vars(row).update() bypasses SQLAlchemy's change tracking, because loading is not a change.
    vars(row).update(_converted(entity, values))
    if encrypted_columns(mapper):
        bind_loaded_secrets(mapper, vars(row), provider)
    make_transient_to_detached(row)
    return row


def merge_row(session: Session, entity: type[E_], values: Sequence[Any]) -> E_:
    """Create or update an entity in the session from a raw row, and return the entity."""
    mapper: Mapper[E_] = class_mapper(entity)
    key = mapper.identity_key_from_primary_key((values[0],))  # the first value of a row is the id
    row: E_ | None = session.identity_map.get(key)
    if row is None:
        row = hydrate(entity, values, key_provider(session))
        session.add(row)
        return row
    for name, value in _converted(entity, values).items():
        set_committed_value(row, name, value)
    bind_secrets(row, key_provider(session))
    return row


def _converted(entity: type[Entity], values: Sequence[Any]) -> dict[str, Any]:
    """Convert a raw row as SQLAlchemy's loader does, and return the values by column name."""
    row = dict(zip(_columns(entity), values, strict=True))
    for name, convert in _converters(entity):
        if row[name] is not None:
            row[name] = convert(row[name])
    report_unreadable(entity.__tablename__, row)
    return row


@cache
def _columns(entity: type[Entity]) -> dict[str, TypeEngine[Any]]:
    """Return the SQL types of an entity's columns, by column name, columns of fields first."""
    # `class_mapper` would configure all mappers, and some modules call this function at import.
    table = metadata.tables[entity.__tablename__]
    names = [*entity.model_fields, *(table.c.keys() - entity.model_fields.keys())]
    return {name: table.c[name].type for name in names}


@cache
def _converters(entity: type[Entity]) -> list[tuple[str, Callable[[Any], Any]]]:
    """Return the names of columns that need a conversion, each with the conversion function."""
    converters = ((name, _converter(type_)) for name, type_ in _columns(entity).items())
    return [(name, convert) for name, convert in converters if convert is not None]


def _converter(type_: TypeEngine[Any]) -> Callable[[Any], Any] | None:
    return type_.dialect_impl(_DIALECT).result_processor(_DIALECT, None)


def _cast(type_: TypeEngine[Any]) -> str:
    # asyncpg cannot decode enums and some arrays in a ROW value, so enums and arrays become text.
    if is_native_enum(type_):
        return "::text"
    return "::text[]" if isinstance(type_, ARRAY) else ""


_DIALECT = dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's

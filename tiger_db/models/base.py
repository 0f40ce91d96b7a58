"""What every entity shares: validation, secrets, and rules that the database keeps too."""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, ClassVar, Self, TypeVar
from uuid import UUID

import annotated_types as rules
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    JsonValue,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from sqlalchemy import (
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Enum,
    FetchedValue,
    MetaData,
    Table,
    event,
    func,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapper, Session, object_mapper, object_session, registry
from sqlalchemy.orm.attributes import instance_state, set_attribute
from sqlalchemy.types import TypeDecorator, TypeEngine
from sqlmodel import Field, SQLModel
from sqlmodel._compat import SQLModelConfig, finish_init, partial_init
from uuid_utils.compat import uuid7

from tiger_db.encryption import (
    EncryptedSecret,
    EncryptedType,
    KeyProvider,
    Secret,
    encrypt,
    fingerprint,
)
from tiger_db.errors import ConfigurationError, EncryptionError
from tiger_db.models.mutable import Tracked, track

T = TypeVar("T")
CONTEXT = "tiger_db"  # key of the SessionContext (crud.common) in the `info` of a session

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _to_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be from the year 1 to 9999 in UTC") from None


def _storable(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    return value


_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def storable_json(value: T) -> T:
    """Refuse what JSONB cannot hold. For an `AfterValidator`."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):  # UnicodeEncodeError is one
        raise ValueError("must be JSON that PostgreSQL can store: no NaN, no infinity") from None
    if _ESCAPED_NUL.search(text):
        raise ValueError("must not contain a NUL character")
    return value


def _fits_64_bits(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError("must fit in 64 bits")
    return value


Int64 = Annotated[int, AfterValidator(_fits_64_bits)]
UTCDateTime = Annotated[AwareDatetime, AfterValidator(_to_utc)]
Text = Annotated[str, AfterValidator(_storable)]
JsonObject = Annotated[dict[str, JsonValue], AfterValidator(storable_json)]


class Timestamp(TypeDecorator[datetime]):
    """A `timestamptz`. Infinity comes as the first or last `datetime`, as asyncpg stores those."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(
        self,
        value: datetime | None,
        dialect: Dialect,  # noqa: ARG002  # SQLAlchemy's signature
    ) -> datetime | None:
        # asyncpg knows them only without a time zone.
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


def enum_type(enum: type[StrEnum]) -> Enum:
    """A native PostgreSQL enum that stores the members' values."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", enum.__name__).lower()
    return Enum(enum, name=name, metadata=metadata, values_callable=lambda e: [m.value for m in e])


def tracked_json() -> Any:  # noqa: ANN401  # as SQLModel's sa_type is typed
    """A JSONB column whose changes in place are saved."""
    return Tracked.as_mutable(JSONB(none_as_null=True))


def tracked_list(item: TypeEngine[Any]) -> Any:  # noqa: ANN401  # the same
    """An array column whose changes in place are saved."""
    return Tracked.as_mutable(ARRAY(item, dimensions=1))


class Entity(SQLModel, registry=registry(metadata=metadata)):
    """A row that is valid whenever it exists: constructing and assigning validate.

    Raises:
        ValidationError: names the field; the object stays as it was; no input is shown.
    """

    __abstract__: ClassVar[bool] = True
    # The database's clock sets timestamps: have INSERT and UPDATE return them.
    __mapper_args__: ClassVar[dict[str, object]] = {"eager_defaults": True}
    model_config = SQLModelConfig(
        extra="forbid", hide_input_in_errors=True, validate_assignment=True
    )

    id: UUID = Field(
        default_factory=uuid7,
        primary_key=True,
        description="UUIDv7, made by the application: ordered by time of creation",
    )
    created_at: UTCDateTime | None = Field(
        default=None,
        sa_type=Timestamp,
        nullable=False,
        sa_column_kwargs={"server_default": func.now()},
        description="When the row was made, by the database's clock",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _hide_input(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:  # noqa: ANN401  # as pydantic has it
        try:
            return handler(data)
        except ValidationError as error:
            raise _without_input(error) from None

    def __init__(self, **data: Any) -> None:  # noqa: ANN401  # as SQLModel has it
        if not finish_init.get():  # SQLModel.model_validate fills the instance itself
            return
        state = self.__dict__
        related = {name: data.pop(name) for name in self.__sqlmodel_relationships__.keys() & data}
        self.__pydantic_validator__.validate_python(data, self_instance=self)
        values, given = self.__dict__, self.__pydantic_fields_set__
        object.__setattr__(self, "__dict__", state)
        # Through SQLAlchemy's instrumentation, which pydantic bypasses.
        for name, value in values.items():
            set_attribute(self, name, value)
        object.__setattr__(self, "__pydantic_fields_set__", given)
        for name, value in related.items():
            self._relate(name, value)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401  # as SQLModel has it
        if name == "_sa_instance_state":
            self.__dict__[name] = value
        elif name in self.__sqlmodel_relationships__:
            self._relate(name, value)
        else:
            self.sqlmodel_update({name: value})

    def _relate(self, name: str, value: object) -> None:
        relationship = object_mapper(self).relationships[name]
        kind = relationship.mapper.class_
        items = value if relationship.uselist else [] if value is None else [value]
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            wanted = f"a list of {kind.__name__}" if relationship.uselist else kind.__name__
            refusal = PydanticCustomError(
                "relationship_type", "Input should be {wanted}", {"wanted": wanted}
            )
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [InitErrorDetails(type=refusal, loc=(name,), input=None)],
                hide_input=True,
            )
        set_attribute(self, name, value)

    def sqlmodel_update(
        self, obj: dict[str, Any] | BaseModel, *, update: dict[str, Any] | None = None
    ) -> Self:
        """Assign several fields: all of them, or none if one is refused."""
        fields = (
            obj if isinstance(obj, dict) else {k: getattr(obj, k) for k in obj.model_fields_set}
        )
        for name, value in self.validate_changes({**fields, **(update or {})}).items():
            set_attribute(self, name, value)
            self.__pydantic_fields_set__.add(name)
        return self

    def validate_changes(self, changes: dict[str, Any]) -> dict[str, Any]:
        """The values as they may be assigned; validated on a draft, which bears a refusal."""
        if not changes:
            return {}
        draft = object.__new__(type(self))
        for slot in ("__pydantic_extra__", "__pydantic_private__"):
            object.__setattr__(draft, slot, None)
        object.__setattr__(draft, "__pydantic_fields_set__", set())
        object.__setattr__(draft, "__dict__", self.__dict__.copy())
        del draft.__dict__["_sa_instance_state"]
        for name, value in changes.items():
            self.__pydantic_validator__.validate_assignment(draft, name, value)
        return {name: draft.__dict__[name] for name in changes}

    def label(self) -> str:
        """What errors may call the row, of values that are loaded already; empty: just its id."""
        return ""

    def __copy__(self) -> Self:
        """A row with the same values, id and all, that no session knows; nothing is related."""
        with partial_init():
            twin = type(self)()
        for name in object_mapper(self).column_attrs.keys() & self.__dict__.keys():
            set_attribute(twin, name, track(self.__dict__[name]))
        twin.__pydantic_fields_set__.update(self.__pydantic_fields_set__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.__copy__()

    def model_copy(
        self,
        *,
        update: Mapping[str, Any] | None = None,
        deep: bool = False,  # noqa: ARG002  # a copy shares nothing anyway
    ) -> Self:
        """A row with the same values, but for those in `update`, that no session knows."""
        return self.__copy__().sqlmodel_update(dict(update or {}))

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:  # noqa: ANN401  # as pydantic has it
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:  # it is not JSON
            raise _without_input(error) from None


class MutableEntity(Entity):
    """An entity whose rows change."""

    __abstract__: ClassVar[bool] = True

    updated_at: UTCDateTime | None = Field(
        default=None,
        sa_type=Timestamp,
        nullable=False,
        sa_column_kwargs={"server_default": func.now(), "server_onupdate": FetchedValue()},
        description="When the row was last changed, by the database's clock",
    )


def _without_input(error: ValidationError) -> ValidationError:
    """The same error without the values that were refused: one of them may be a secret."""
    return ValidationError.from_exception_data(
        error.title,
        [
            InitErrorDetails(
                type=PydanticCustomError(problem["type"], problem["msg"], problem.get("ctx")),
                loc=problem["loc"],
                input=None,
            )
            for problem in error.errors(include_url=False, include_input=False)
            # Says only that another field, which has an error of its own, was refused.
            if problem["type"] != "default_factory_not_called"
        ],
        hide_input=True,
    )


@event.listens_for(Entity, "after_mapper_constructed", propagate=True)
def _rules_to_constraints(mapper: Mapper[Entity], cls: type[Entity]) -> None:
    """Give the table the fields' descriptions as comments and their limits as CHECKs.

    The limit is part of a constraint's name, so that autogenerate sees it change.
    """
    table = mapper.local_table
    assert isinstance(table, Table)
    for name, field in cls.model_fields.items():
        column = table.c[name]
        column.comment = field.description
        for sql, suffix in _limits(column, field.metadata):
            table.append_constraint(CheckConstraint(sql, name=f"{name}_{suffix}"))


def _limits(column: Column[Any], metadata: Iterable[object]) -> Iterable[tuple[str, str]]:
    size = (
        f"cardinality({column.name})"
        if isinstance(column.type, ARRAY)
        else f"char_length({column.name})"
    )
    for rule in metadata:
        match rule:
            case rules.MinLen(limit):
                yield f"{size} >= {limit}", f"min_{limit}"
            case rules.MaxLen(limit):
                yield f"{size} <= {limit}", f"max_{limit}"
            case rules.Ge(limit):
                yield f"{column.name} >= {limit}", f"ge_{limit}"
            case rules.Le(limit):
                yield f"{column.name} <= {limit}", f"le_{limit}"


@cache
def encrypted_columns(mapper: Mapper[Any]) -> list[tuple[str, EncryptedType]]:
    """The names and types of an entity's secret columns."""
    return [(c.key, c.type) for c in mapper.local_table.c if isinstance(c.type, EncryptedType)]


def aad_of(mapper: Mapper[Any], name: str, row_id: UUID | str) -> str:
    """What a secret's ciphertext is bound to: `table.column:row id`."""
    assert isinstance(mapper.local_table, Table)
    return f"{mapper.local_table.name}.{name}:{row_id}"


@event.listens_for(Entity, "before_insert", propagate=True)
@event.listens_for(Entity, "before_update", propagate=True)
def _make_storable(mapper: Mapper[Any], connection: object, row: Entity) -> None:  # noqa: ARG001
    """Validate what was changed in place, and encrypt the secrets that were set."""
    state = instance_state(row)
    changed = {
        name: row.__dict__[name]
        for name in state.committed_state
        if isinstance(row.__dict__.get(name), Tracked)
    }
    for name, value in row.validate_changes(changed).items():
        changed[name].become(value)
    for name, type_ in encrypted_columns(mapper):
        _encrypt_field(mapper, name, type_, row)


def _encrypt_field(mapper: Mapper[Any], name: str, type_: EncryptedType, row: Entity) -> None:
    secret = row.__dict__.get(name)
    aad = aad_of(mapper, name, row.id)
    if not isinstance(secret, Secret):
        return
    if isinstance(secret, EncryptedSecret) and secret.aad == aad:
        return
    provider = key_provider(object_session(row))
    text = secret.get_secret_value()
    ciphertext = encrypt_secret(provider, text, aad)
    set_attribute(row, name, EncryptedSecret(ciphertext, aad, provider, row.label()))
    if type_.fingerprint:
        assert provider is not None  # or it could not have sealed
        mark = fingerprint(provider, provider.key_ids[0], text, aad.split(":")[0])
        set_attribute(row, type_.fingerprint, mark)


def encrypt_secret(provider: KeyProvider | None, text: str, aad: str) -> bytes:
    """The ciphertext of a secret for its aad.

    Raises:
        ConfigurationError: there is no provider.
    """
    if provider is None:
        raise ConfigurationError(f"{aad}: ENCRYPTION_KEYS is not set, so it cannot be stored")
    return encrypt(provider, text, aad)


@event.listens_for(Entity, "load", propagate=True)
def _order(row: Entity, *_: object) -> None:
    """Have the fields in the class's order, for `repr` and JSON: the ORM fills them in any."""
    values = row.__dict__
    for name in type(row).model_fields:
        if name in values:
            values[name] = values.pop(name)


@event.listens_for(Entity, "load", propagate=True)
@event.listens_for(Entity, "refresh", propagate=True)
def _bind(row: Entity, *_: object) -> None:
    bind_secrets(row, key_provider(object_session(row)))


def bind_secrets(row: Entity, provider: KeyProvider | None) -> None:
    """Tell loaded ciphertexts where they are and who can decrypt them."""
    mapper = object_mapper(row)
    secrets = encrypted_columns(mapper)
    if not secrets:
        return
    owner = row.label()
    row_id = str(row.id)  # once: it takes as long as the rest
    for name, _type in secrets:
        secret = row.__dict__.get(name)
        if isinstance(secret, EncryptedSecret) and not secret.aad:
            secret.aad = aad_of(mapper, name, row_id)
            secret.provider, secret.owner = provider, owner


def readable_secrets(row: Entity) -> list[str]:
    """The texts of a row's secrets, as far as the keys are here: to mask them elsewhere."""
    texts = []
    for secret in secrets_of(row):
        try:
            texts.append(secret.get_secret_value())
        except EncryptionError:
            continue
    return texts


def secrets_of(row: Entity) -> list[Secret]:
    """The secrets that a row has."""
    values = (row.__dict__.get(name) for name, _type in encrypted_columns(object_mapper(row)))
    return [value for value in values if isinstance(value, Secret)]


def key_provider(session: Session | None) -> KeyProvider | None:
    """Return the key provider of the session's Database, or None if there is none."""
    context = None if session is None else session.info.get(CONTEXT)
    provider: KeyProvider | None = None if context is None else context.key_provider
    return provider

"""The base classes of views. A view has the fields of an entity that are safe to show."""

from typing import TYPE_CHECKING, Annotated, Any, Generic, Self, TypeAlias, TypeVar, cast
from uuid import UUID

from pydantic import ConfigDict, GetJsonSchemaHandler, ModelWrapValidatorHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from sqlalchemy import FetchedValue, func
from sqlmodel import Field, SQLModel
from uuid_utils.compat import uuid7

from tiger_db.encryption import Secret
from tiger_db.models.columns import UTCDateTime
from tiger_db.models.tracking import plain_copy
from tiger_db.tracebacks import forgets_locals

T = TypeVar("T")
Read_co = TypeVar("Read_co", covariant=True)
Given_contra = TypeVar("Given_contra", contravariant=True)


_SET_BY_DATABASE = "set by the database"

# Type checkers see other types than pydantic. For a type checker, a field whose value the database
# sets is never None, and the type of a value that is assigned to a secret differs from the type
# that is read. At run time, the annotations are the types that pydantic validates.
if TYPE_CHECKING:

    class Converted(Generic[Read_co, Given_contra]):
        """The type of a field that converts a given value to the type that is read."""

        def __get__(self, instance: object, owner: type[object]) -> Read_co: ...

        def __set__(self, instance: object, value: Given_contra) -> None: ...

    SetByDatabase: TypeAlias = Annotated[T, _SET_BY_DATABASE]
    SecretField: TypeAlias = Converted[Secret, Secret | str]
    OptionalSecretField: TypeAlias = Converted[Secret | None, Secret | str | None]
    # `Secret | Any` means: a Secret, or None if the account is closed. A type checker accepts
    # `get_secret_value()` without a check for None, and also accepts the check.
    SecretUnlessClosed: TypeAlias = Converted[Secret | Any, Secret | str]
else:
    SetByDatabase = Annotated[T | None, _SET_BY_DATABASE]
    SecretField = Secret
    OptionalSecretField = SecretUnlessClosed = Secret | None


class EntityView(SQLModel):
    """Base class of views: the fields that each entity has."""

    # In OpenAPI, each field of a response is required, because a response has all fields.
    model_config = ConfigDict(  # type: ignore[assignment]  # SQLModel's own type is private
        json_schema_serialization_defaults_required=True
    )

    id: UUID = Field(
        default_factory=uuid7,
        primary_key=True,
        description="UUIDv7 that the application generates; ids increase with creation time",
    )
    created_at: SetByDatabase[UTCDateTime] = Field(
        default=None,
        nullable=False,
        sa_column_kwargs={"server_default": func.now()},
        description="Creation time, by the database's clock",
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Describe a response: values that the database sets are never null."""
        json_schema = handler.resolve_ref_schema(handler(schema))
        if handler.mode == "serialization":
            for name, field in cls.model_fields.items():
                if _SET_BY_DATABASE in field.metadata:
                    described = json_schema["properties"][name]
                    described.pop("default")
                    described |= described.pop("anyOf")[0]
        return json_schema

    @model_validator(mode="wrap")
    @classmethod
    def _validated(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:  # noqa: ANN401  # pydantic's signature
        # `Entity` overrides this function, because an entity validates its values.
        return cls._view_of(data) if cls._is_entity(data) else handler(data)

    @classmethod
    @forgets_locals
    def model_validate(cls, obj: Any, **options: Any) -> Self:  # noqa: ANN401  # pydantic's signature
        # SQLModel's function ignores the object that `_validated` returns.
        return cls._view_of(obj) if cls._is_entity(obj) else super().model_validate(obj, **options)

    @classmethod
    def _is_entity(cls, data: object) -> bool:
        return isinstance(data, cls) and type(data) is not cls

    @classmethod
    def _view_of(cls, entity: object) -> Self:
        """Return the view of an entity, with copies of the stored values.

        An entity is also an instance of its view. Therefore, pydantic itself would return the
        entity, with its secrets. The stored values are not validated again, because an earlier
        release can have stored values that are invalid now.
        """
        values: dict[str, Any] = {n: plain_copy(getattr(entity, n)) for n in cls.model_fields}
        # The mypy plugin of pydantic declares that model_construct() returns an EntityView.
        return cast("Self", cls.model_construct(**values))


class MutableEntityView(EntityView):
    """Base class of views of entities whose rows can be updated."""

    updated_at: SetByDatabase[UTCDateTime] = Field(
        default=None,
        nullable=False,
        sa_column_kwargs={"server_default": func.now(), "server_onupdate": FetchedValue()},
        description="Time of the last change, by the database's clock",
    )

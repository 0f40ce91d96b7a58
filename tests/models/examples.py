"""Parameters for the tests of all entities: valid values, fields and their limits."""

from collections.abc import Iterator
from typing import Any, TypeVar
from uuid import uuid4

import annotated_types as rules
from sqlalchemy import BigInteger, Table, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

from tests.support.factories import account_number
from tiger_db import APIKey, AuditLog, TigerAccount, TokenStatus
from tiger_db.encryption import EncryptedType
from tiger_db.models import Entity
from tiger_db.models.columns import Timestamp

ENTITIES: tuple[type[Entity], ...] = (TigerAccount, APIKey, AuditLog, TokenStatus)
E = TypeVar("E", bound=Entity)
Field = tuple[type[Entity], str]
FIELDS: list[Field] = [(entity, name) for entity in ENTITIES for name in entity.model_fields]
# AuditLog converts invalid values of its other fields: see test_event_sanitizer.py.
STRICT = [
    (entity, name)
    for entity, name in FIELDS
    if entity is not AuditLog or name in {"id", "created_at", "action", "result", "position"}
]
# A part of invalid values, which no error may show.
SECRET = "Kx9-never-shown"


def minimal(entity: type[Entity], **values: object) -> dict[str, Any]:
    """Return the required values of an entity and the given ones."""
    required: dict[type[Entity], dict[str, Any]] = {
        TigerAccount: {
            "account_name": "Main",
            "account_number": account_number(),
            "tiger_id": "20150001",
            "private_key": "test_key",
        },
        APIKey: {
            "name": "assistant",
            "key_prefix": f"tdb_{uuid4().hex[:16]}",
            "key_hash": "{SSHA256}hash",
            "scopes": ["mcp:read"],
        },
        AuditLog: {"action": "data:query"},
        TokenStatus: {"tiger_account_id": uuid4()},
    }
    return required[entity] | values


def made(entity: type[E], **values: object) -> E:
    """Return a valid row of an entity."""
    return entity(**minimal(entity, **values))


def table_of(entity: type[Entity]) -> Table:
    table = entity.__table__  # type: ignore[attr-defined]  # SQLAlchemy adds it
    assert isinstance(table, Table)
    return table


def fields_of(kind: type[TypeEngine[Any]]) -> list[Field]:
    """Return the fields whose column has this SQL type."""
    return [(e, name) for e, name in FIELDS if isinstance(table_of(e).c[name].type, kind)]


TEXTS = fields_of(Text)
INTEGERS = fields_of(BigInteger)
TIMESTAMPS = fields_of(Timestamp)
JSONS = fields_of(JSONB)
SECRETS = fields_of(EncryptedType)


def _limits() -> Iterator[tuple[type[Entity], str, str, Any, Any]]:
    """Yield each limit: entity, field, suffix of the constraint, a valid and an invalid value."""
    for entity, name in FIELDS:
        is_list = (entity, name) == (APIKey, "scopes")
        for rule in entity.model_fields[name].metadata:
            match rule:
                case rules.MinLen(1) if is_list:
                    yield entity, name, "min_1", ["mcp:read"], []
                case rules.MinLen(int(n)):
                    yield entity, name, f"min_{n}", "😀" * n, "😀" * (n - 1)
                case rules.MaxLen(int(n)) if (entity, name) == (AuditLog, "action"):
                    yield entity, name, f"max_{n}", "a:" + "b" * (n - 2), "a:" + "b" * (n - 1)
                case rules.MaxLen(int(n)):
                    yield entity, name, f"max_{n}", "😀" * n, "😀" * (n + 1)
                case rules.Ge(int(n)):
                    yield entity, name, f"ge_{n}", n, n - 1


LIMITS = list(_limits())


def label(value: object) -> str | None:
    """Return the id of a test parameter: the name of an entity."""
    return value.__name__ if isinstance(value, type) else None

"""Which encryption keys the stored secrets need."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    LargeBinary,
    Table,
    case,
    func,
    literal,
    or_,
    select,
    type_coerce,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper

from tiger_db.encryption import KeyProvider, ciphertext_header, key_id_of
from tiger_db.errors import ConfigurationError, EncryptionError
from tiger_db.models import Entity
from tiger_db.models.base import encrypted_columns, key_provider

DAMAGED = "(damaged)"  # in place of the key id of what is no ciphertext
_HEADER = 34  # bytes at most: version, length, 32 of key id


@dataclass(frozen=True, slots=True)
class KeyUse:
    """How many rows of a table have a secret under a key."""

    table: str
    key_id: str
    rows: int


async def key_uses(session: AsyncSession) -> list[KeyUse]:
    """The rows per table and key, as they are now; a row that needs several counts for each."""
    uses = []
    for mapper in encrypted_entities():
        table, counts = table_of(mapper), Counter[str]()
        heads = [_head(table.c[name]) for name in secret_names(mapper)]
        rows = await session.execute(select(func.count(), *heads).group_by(*heads))
        for count, *found in rows:
            for key_id in {_key_id(head) for head in found if head is not None}:
                counts[key_id] += count
        uses += [KeyUse(table.name, key_id, counts[key_id]) for key_id in sorted(counts)]
    return uses


def _head(secret: ColumnElement[Any]) -> ColumnElement[bytes | None]:
    """A ciphertext's version and key id. Of a long value, PostgreSQL reads the start alone."""
    start = func.substr(secret, 1, _HEADER)
    head = func.substr(start, 1, 2 + func.get_byte(start, 1), type_=LargeBinary)
    return case((func.octet_length(secret) > 1, head), else_=type_coerce(secret, LargeBinary))


def _key_id(head: bytes) -> str:
    try:
        return key_id_of(head)
    except EncryptionError:
        return DAMAGED


async def rows_to_rotate(session: AsyncSession) -> int:
    """How many rows have a secret that is not under the first key.

    Raises:
        ConfigurationError: there is no encryption key.
    """
    counts = [
        await session.scalar(
            select(func.count()).select_from(table_of(mapper)).where(outdated(session, mapper))
        )
        for mapper in encrypted_entities()
    ]
    return sum(filter(None, counts))


def encrypted_entities() -> list[Mapper[Any]]:
    """The entities that have secrets."""
    return [mapper for mapper in Entity._sa_registry.mappers if encrypted_columns(mapper)]  # noqa: SLF001  # SQLModel's name for the registry


def table_of(mapper: Mapper[Any]) -> Table:
    assert isinstance(mapper.local_table, Table)
    return mapper.local_table


def secret_names(mapper: Mapper[Any]) -> list[str]:
    return [name for name, _ in encrypted_columns(mapper)]


def outdated(session: AsyncSession, mapper: Mapper[Any]) -> ColumnElement[bool]:
    """Whether a row has a secret that is not under the first key."""
    current = ciphertext_header(required_provider(session).key_ids[0])
    table = table_of(mapper)
    starts = [
        func.substr(table.c[name], 1, len(current), type_=LargeBinary)
        for name in secret_names(mapper)
    ]
    return or_(*(func.coalesce(start != literal(current, LargeBinary), False) for start in starts))


def required_provider(session: AsyncSession) -> KeyProvider:
    provider = key_provider(session.sync_session)
    if provider is None:
        raise ConfigurationError("ENCRYPTION_KEYS is not set, so there is no key to rotate to")
    return provider

"""Which encryption keys the stored secrets need."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    LargeBinary,
    Table,
    and_,
    case,
    column,
    func,
    literal,
    or_,
    select,
    true,
)
from sqlalchemy.dialects.postgresql import array
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper

from tiger_db.encryption import KeyProvider, header_of
from tiger_db.errors import ConfigurationError
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
    for mapper in sealed_entities():
        table = table_of(mapper)
        starts = [func.substr(table.c[name], 1, _HEADER) for name in secret_names(mapper)]
        heads = (
            func.unnest(array(starts)).table_valued(column("head", LargeBinary)).render_derived()
        )
        head, length = heads.c.head, func.length(heads.c.head)
        is_ciphertext = case(
            (length > 2, and_(func.get_byte(head, 0) == 1, length >= 2 + func.get_byte(head, 1))),  # noqa: PLR2004  # version and length come first
            else_=False,
        )
        key_id = func.encode(func.substr(head, 3, func.get_byte(head, 1)), "escape")
        keys = (
            select(case((is_ciphertext, key_id), else_=DAMAGED).label("key_id"))
            .where(head.is_not(None))
            .distinct()
            .lateral()
        )
        rows = await session.execute(
            select(keys.c.key_id, func.count())
            .select_from(table)
            .join(keys, true())
            .group_by(keys.c.key_id)
            .order_by(keys.c.key_id)
        )
        uses += [KeyUse(table.name, key, count) for key, count in rows]
    return uses


async def rows_to_rotate(session: AsyncSession) -> int:
    """How many rows have a secret that is not under the first key.

    Raises:
        ConfigurationError: there is no encryption key.
    """
    counts = [
        await session.scalar(
            select(func.count()).select_from(table_of(mapper)).where(outdated(session, mapper))
        )
        for mapper in sealed_entities()
    ]
    return sum(filter(None, counts))


def sealed_entities() -> list[Mapper[Any]]:
    """The entities that have secrets."""
    return [mapper for mapper in Entity._sa_registry.mappers if encrypted_columns(mapper)]  # noqa: SLF001  # SQLModel's name for the registry


def table_of(mapper: Mapper[Any]) -> Table:
    assert isinstance(mapper.local_table, Table)
    return mapper.local_table


def secret_names(mapper: Mapper[Any]) -> list[str]:
    return [name for name, _ in encrypted_columns(mapper)]


def outdated(session: AsyncSession, mapper: Mapper[Any]) -> ColumnElement[bool]:
    """Whether a row has a secret that is not under the first key."""
    current = header_of(required_provider(session).key_ids[0])
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

"""Functions for keyset pagination, and the class of result pages."""

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar
from uuid import UUID

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.common import E_, fetch_all
from tiger_db.errors import InvalidCursor, InvalidValue

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of rows, with the cursor of the next page."""

    items: list[T]
    next_cursor: str | None = None  # `after` for the next page, or None on the last page

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


async def paginate(
    session: AsyncSession,
    statement: Select[E_],
    entity: type[E_],
    *,
    after: str | None,
    limit: int,
) -> Page[E_]:
    """Fetch one page of a statement's rows, newest row first, with one query.

    Raises:
        InvalidCursor: `after` is not the `next_cursor` of an earlier page of the same list.
        InvalidValue: `limit` is not from 1 to 1000.
    """
    check_limit(limit)
    name = str(entity.__tablename__)
    if after is not None:
        statement = statement.where(col(entity.id) < decode_cursor(name, after))
    # One row more than `limit` shows whether a next page exists.
    statement = statement.order_by(col(entity.id).desc()).limit(limit + 1)
    rows = await fetch_all(session, statement)
    more = len(rows) > limit
    return Page(rows[:limit], encode_cursor(name, rows[limit - 1].id) if more else None)


def check_limit(limit: int) -> None:
    """Raise InvalidValue unless `limit` is a whole number from 1 to 1000."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_PAGE_SIZE:
        raise InvalidValue(f"limit must be a whole number from 1 to {MAX_PAGE_SIZE}")


def encode_cursor(list_name: str, row_id: UUID) -> str:
    """Return a cursor: the position after a row in a list. The cursor contains the list's name."""
    content = list_name.encode() + row_id.bytes
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode("ascii")


def decode_cursor(list_name: str, cursor: str) -> UUID:
    """Return the row id that a cursor contains.

    Raises:
        InvalidCursor: the cursor is malformed, or belongs to another list.
    """
    try:
        row_id = UUID(bytes=base64.urlsafe_b64decode(cursor + "==")[-16:])
    except (binascii.Error, ValueError, TypeError, UnicodeError):
        raise InvalidCursor from None
    if encode_cursor(list_name, row_id) != cursor:
        raise InvalidCursor
    return row_id

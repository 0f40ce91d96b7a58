"""Lists of entities in pages: filters, orders and cursors (keyset pagination)."""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    String,
    TextClause,
    collate,
    func,
    inspect,
    literal,
    select,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncSession

from tiger_db.crud.common import E_, fetch_all, load_options, require_aware, typed_errors
from tiger_db.crud.filters import Filters, as_list
from tiger_db.errors import InvalidCursor, InvalidValue

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
NEWEST = "newest"
T_co = TypeVar("T_co", covariant=True)
_NO_FILTERS: Mapping[str, Any] = {}
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Page(Generic[T_co]):
    """One page of rows, with the cursors of the next page and of the previous page.

    `next_cursor` is the value of `after` for the next page, or None on the last page.
    `previous_cursor` is the value of `before` for the previous page, or None on the first page.
    `total` is the number of rows on all pages, or None if the rows were not counted.
    """

    items: list[T_co]
    next_cursor: str | None = None
    previous_cursor: str | None = None
    total: int | None = None

    def __iter__(self) -> Iterator[T_co]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class EntityList(NamedTuple, Generic[E_]):
    """A list of entities: its name, its filters and its orders.

    The order `newest` sorts by id, newest row first. `orders` maps the names of other orders to the
    columns by which the orders sort, ascending. Texts are sorted by code point.
    """

    name: str
    entity: type[E_]
    filters: Filters
    orders: Mapping[str, str] = {}


async def paginate(
    session: AsyncSession,
    listed: EntityList[E_],
    *criteria: ColumnElement[bool] | TextClause,
    filters: Mapping[str, Any],
    order_by: str = NEWEST,
    after: str | None = None,
    before: str | None = None,
    limit: int = DEFAULT_PAGE_SIZE,
    count: bool = False,
    load: Sequence[str] = (),
) -> Page[E_]:
    """Fetch one page of a list: the rows that match all criteria and all filters.

    To fetch the next page, pass the `next_cursor` of a page as `after`. To fetch the previous page,
    pass the `previous_cursor` of a page as `before`. One query fetches the page. If `count` is
    true, another query counts the rows of all pages, unless the first page has all rows. For each
    relationship whose name is in `load`, another query loads the relationship. An empty page has no
    cursors.

    Raises:
        InvalidCursor: `after` or `before` is malformed, or belongs to another list, order or set of
            filters.
        InvalidValue: `limit` is not from 1 to 1000, a filter or a relationship is invalid, or
            `after` and `before` are both given.
    """
    check_limit(limit)
    if after is not None and before is not None:
        raise InvalidValue("after and before cannot be combined")
    options = load_options(listed.entity, load)
    where: list[ColumnElement[bool] | TextClause] = [*criteria, *listed.filters.where(filters)]
    keys = _sort_keys(listed, order_by)
    ascending = (order_by != NEWEST) == (before is None)
    page = select(listed.entity).where(*where)
    if (cursor := before if after is None else after) is not None:
        values = decode_cursor(listed, cursor, order_by=order_by, filters=filters)[-len(keys) :]
        row = tuple_(*keys)
        position = tuple_(*map(literal, values, (key.type for key in keys)))
        page = page.where(row > position if ascending else row < position)
    sorting = [key.asc() if ascending else key.desc() for key in keys]
    # One row more than `limit` shows whether another page exists.
    page = page.order_by(*sorting).limit(limit + 1)
    if order_by != NEWEST:
        # Most values of `order_by` have no index. PostgreSQL sorts ids three times as fast as whole
        # rows.
        ids = page.with_only_columns(keys[-1], maintain_column_froms=True).correlate(None)
        page = select(listed.entity).where(keys[-1].in_(ids)).order_by(*sorting)
    rows = await fetch_all(session, page.options(*options))
    more = len(rows) > limit
    rows = rows[:limit]
    total = None
    if count and cursor is None and not more:
        total = len(rows)
    elif count:
        with typed_errors():
            total = await session.scalar(
                select(func.count()).select_from(listed.entity).where(*where)
            )
    if before is not None:
        rows.reverse()
    has_next, has_previous = (more, after is not None) if before is None else (True, more)
    if not rows:
        return Page(rows, total=total)

    def cursor_at(row: E_) -> str:
        key = _key(listed, order_by, row)
        return encode_cursor(listed, row.id, key, order_by=order_by, filters=filters)

    return Page(
        rows,
        cursor_at(rows[-1]) if has_next else None,
        cursor_at(rows[0]) if has_previous else None,
        total,
    )


def check_limit(limit: int) -> None:
    """Raise InvalidValue unless `limit` is a whole number from 1 to 1000."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_PAGE_SIZE:
        raise InvalidValue(f"limit must be a whole number from 1 to {MAX_PAGE_SIZE}")


def encode_cursor(
    listed: EntityList[E_],
    row_id: UUID,
    key: str | datetime | None = None,
    *,
    order_by: str = NEWEST,
    filters: Mapping[str, Any] = _NO_FILTERS,
) -> str:
    """Return the cursor of a row.

    A cursor contains the id and the sort key of the row, and a digest of the list, the order and
    the filters. A cursor is not encrypted, so anyone who has a cursor can read the sort key, such
    as a name.
    """
    text = key.isoformat() if isinstance(key, datetime) else key or ""
    content = _digest(listed, order_by, filters) + row_id.bytes + text.encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode("ascii")


def decode_cursor(
    listed: EntityList[E_],
    cursor: str,
    *,
    order_by: str = NEWEST,
    filters: Mapping[str, Any] = _NO_FILTERS,
) -> tuple[str | datetime | None, UUID]:
    """Return the sort key and the row id in a cursor. For the order `newest`, the sort key is None.

    Raises:
        InvalidCursor: the cursor is malformed, or belongs to another list, order or set of filters.
    """
    try:
        content = base64.urlsafe_b64decode(cursor + "==")
        digest, text = content[:_DIGEST_BYTES], content[_DIGEST_BYTES + 16 :].decode()
        row_id = UUID(bytes=content[_DIGEST_BYTES : _DIGEST_BYTES + 16])
        key: str | datetime | None = text
        if order_by == NEWEST:
            key = None
        elif not isinstance(_column(listed, order_by).type, String):
            key = require_aware("cursor", datetime.fromisoformat(text))
    except (binascii.Error, ValueError, TypeError, UnicodeError, InvalidValue):
        raise InvalidCursor from None
    canonical_form = base64.urlsafe_b64encode(content).rstrip(b"=").decode("ascii")
    if cursor != canonical_form or digest != _digest(listed, order_by, filters) or "\0" in text:
        raise InvalidCursor
    return key, row_id


def _digest(listed: EntityList[E_], order_by: str, filters: Mapping[str, Any]) -> bytes:
    """Return a digest of a list, an order and filters.

    A filter with one value has the same digest as a filter with a list that contains only the
    value.
    """
    given = {
        name: sorted({_canonical(item) for item in as_list(value)})
        for name, value in filters.items()
        if value is not None
    }
    content = json.dumps([listed.name, order_by, given], sort_keys=True)
    return hashlib.sha256(content.encode()).digest()[:_DIGEST_BYTES]


def _canonical(value: object) -> str:
    """Return a text that is the same for equal values of a filter."""
    if isinstance(value, Mapping):
        return json.dumps(dict(value), sort_keys=True, default=str)
    if isinstance(value, datetime):
        value = value.astimezone(UTC).isoformat()
    # json.dumps() quotes the text, so that the results of a text and of a mapping always differ.
    return json.dumps(str(value.value if isinstance(value, Enum) else value))


def _sort_keys(listed: EntityList[E_], order_by: str) -> list[ColumnElement[Any]]:
    """Return the sort keys of an order. The last sort key is the id."""
    row_id: ColumnElement[Any] = inspect(listed.entity).columns.id
    if order_by == NEWEST:
        return [row_id]
    column = _column(listed, order_by)
    return [collate(column, "C") if isinstance(column.type, String) else column, row_id]


def _column(listed: EntityList[E_], order_by: str) -> ColumnElement[Any]:
    column: ColumnElement[Any] = inspect(listed.entity).columns[listed.orders[order_by]]
    return column


def _key(listed: EntityList[E_], order_by: str, row: E_) -> str | datetime | None:
    key: str | datetime | None = None
    if order_by != NEWEST:
        key = getattr(row, listed.orders[order_by])
    return key

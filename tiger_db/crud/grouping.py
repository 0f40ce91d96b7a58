"""Counts of rows in groups, such as one group for each day and user."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Select, SQLColumnExpression, select

from tiger_db.crud.filters import OneOrMore, as_list
from tiger_db.crud.pagination import check_limit
from tiger_db.errors import InvalidValue


def count_groups(
    total: ColumnElement[int],
    columns: Mapping[str, SQLColumnExpression[Any]],
    by: OneOrMore[str],
    limit: int | None,
) -> Select[Any]:
    """Return a query of groups of rows, with the number of rows in each group.

    `columns` maps the names of fields, such as `day` and `hour`, to columns. Groups with a
    time are sorted by time. Groups with the same time, and groups without a time, are sorted by
    `total`, highest number first.

    Raises:
        InvalidValue: `by` is empty or combines hours with days, or `limit` is not from 1 to 1000.
    """
    if limit is not None:
        check_limit(limit)
    wanted = set(as_list(by))
    if not wanted or {"hour", "day"} <= wanted:
        fields = ", ".join(columns)
        raise InvalidValue(f"`by` must name one or more of {fields}, but not both hour and day")
    groups = [column for name, column in columns.items() if name in wanted]
    times = [columns[name] for name in ("day", "hour") if name in wanted]
    return (
        select(total, *groups)
        .group_by(*groups)
        .order_by(*times, total.desc(), *groups)
        .limit(limit)
    )

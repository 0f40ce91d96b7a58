"""The output of commands: data on stdout, messages and progress on stderr."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from tiger_db.files import output_files

if TYPE_CHECKING:
    import tiger_db
    from tiger_db.models import Entity

E_ = TypeVar("E_", bound="Entity")
_DAY = timedelta(days=1)
_COLUMN_GAP = 2  # number of spaces between two table columns
_MAX_CHART_WIDTH = 100
_UNLIMITED_WIDTH = 10_000  # line width if stdout is not a terminal, so that lines are not wrapped


def print_message(message: str) -> None:
    """Print a message to stderr as one line."""
    sys.stderr.write(_escape(" ".join(message.split())) + "\n")


def count_of(count: int, noun: str, plural: str | None = None) -> str:
    """Return a text with a number and a noun, such as `1 seal` or `1,200 seals`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def print_warning(message: str) -> None:
    print_message(f"warning: {message}")


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar if stderr is a terminal.

    The context manager yields a function that updates the bar. The function takes the keyword
    arguments of `rich.progress.Progress.update`.
    """
    from rich.progress import Progress  # noqa: PLC0415  # slow import, not needed by `--help`

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda **_changes: None
        return
    with Progress(console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda **changes: bar.update(task, **changes)


@contextmanager
def open_output(path: Path | None, *, overwrite: bool) -> Iterator[IO[str]]:
    """Open the output file of the option --out. If `path` is None, yield standard output."""
    if path is None:
        yield sys.stdout
        return
    with output_files(path, overwrite=overwrite) as (file,):
        yield file


def print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_values(items: Sequence[Mapping[str, object]]) -> None:
    """Print a list of mappings as JSON. The values can be times, ids or addresses."""
    from pydantic_core import to_jsonable_python  # noqa: PLC0415  # slow import, see `--help`

    print_json({"items": to_jsonable_python(items), "next_cursor": None})


def dump(row: "Entity") -> dict[str, Any]:
    """Return all fields of an entity as JSON values, in declaration order, with masked secrets."""
    dumped = row.model_dump(mode="json")
    return {name: dumped[name] for name in type(row).model_fields if name in dumped}


def show_row(row: "Entity", *, as_json: bool) -> None:
    if as_json:
        print_json(dump(row))
    else:
        show_fields({name: getattr(row, name) for name in dump(row)})


def show_page(
    page: "tiger_db.Page[E_]",
    columns: Mapping[str, Callable[[E_], object]],
    *,
    as_json: bool,
    more: Mapping[str, object] | None = None,
) -> None:
    """Print a page of entities as a table or as JSON.

    `columns` maps each column heading to a function that returns a cell's value for an entity.
    `more` contains fields to add to the JSON object. If the rows of all pages were counted, the
    JSON object also has the field `total`.
    """
    if as_json:
        print_json(
            {
                "items": [dump(row) for row in page],
                "next_cursor": page.next_cursor,
                "previous_cursor": page.previous_cursor,
                **({} if page.total is None else {"total": page.total}),
                **(more or {}),
            }
        )
        return
    show_table(columns, [[column(row) for column in columns.values()] for row in page])
    if page.total is not None:
        print_message(f"number of rows on all pages: {page.total:,}")
    if page.previous_cursor:
        print_message(f"to see the previous page, add --before {page.previous_cursor}")
    if page.next_cursor:
        print_message(f"to see the next page, add --after {page.next_cursor}")


def show_items(
    headings: Iterable[str], items: Sequence[Mapping[str, object]], *, as_json: bool
) -> None:
    """Print a list of mappings as a table or as JSON."""
    if as_json:
        print_json({"items": items, "next_cursor": None})
    else:
        show_table(headings, [list(item.values()) for item in items])


def show_lines(lines: Sequence[str], *, as_json: bool) -> None:
    """Print each text of a list on its own line, or print the list as JSON."""
    if as_json:
        print_json({"items": lines, "next_cursor": None})
    else:
        sys.stdout.write("".join(f"{line}\n" for line in lines))


def show_table(headings: Iterable[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table without its empty columns."""
    if not rows:
        print_message("no rows found")
        return
    cells = [[_format(value) for value in row] for row in rows]
    columns = [column for column in zip(headings, *cells, strict=True) if any(column[1:])]
    console, table = _console(), _table()
    for (heading, *_), width in zip(columns, _widths(columns, console.width), strict=True):
        # The first column is not wrapped, because users copy its values into other commands.
        rigid = width is None and heading == columns[0][0]
        table.add_column(heading, width=width, no_wrap=rigid, overflow="fold")
    for row in list(zip(*columns, strict=True))[1:]:
        table.add_row(*row)
    console.print(table)


def show_line(row: Iterable[object]) -> None:
    """Print the non-empty values of a row on one line."""
    sys.stdout.write("  ".join(text for value in row if (text := _format(value))) + "\n")


def _widths(columns: Sequence[Sequence[str]], width: int) -> list[int | None]:
    """Return column widths at which no word is broken.

    If a table of `width` characters cannot show all words unbroken, return None for each column.
    """
    least = [max(map(cell_len, " ".join(column).split())) for column in columns]
    room = width - sum(least) - _COLUMN_GAP * (len(least) - 1)
    if room < 0:
        return [None] * len(columns)
    widths: list[int | None] = []
    for column, word in zip(columns, least, strict=True):
        more = min(room, max(map(cell_len, column)) - word)
        widths.append(word + more)
        room -= more
    return widths


def show_fields(fields: Mapping[str, object]) -> None:
    """Print a line with the name and the value of each field that is not empty."""
    table = _table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if shown := _format(value):
            table.add_row(name.replace("_", " "), shown)
    _console().print(table)


def show_bars(counts: Mapping[str, int]) -> None:
    """Print a bar chart of counts."""
    counts = {_escape(name): count for name, count in counts.items()}
    greatest = max([*counts.values(), 1])
    room = min(_console().width, _MAX_CHART_WIDTH) - 2 * _COLUMN_GAP
    room -= max(map(len, counts)) + len(f"{greatest:,}")
    table = _table(show_header=False)
    for name, count in counts.items():
        # The last character of a bar may be a partial block. U+2588 is a full block. U+258F is a
        # block of one eighth.
        eighths = round(count / greatest * max(room, 1) * 8)
        part = chr(0x2590 - eighths % 8) if eighths % 8 else ""
        table.add_row(name, "\u2588" * (eighths // 8) + part, f"{count:,}")
    _console().print(table)


def unit_of_chart(since: datetime, until: datetime) -> Literal["hour", "day"]:
    """Return the unit of a chart: `hour` for a period of at most two days, or else `day`."""
    return "hour" if until - since <= 2 * _DAY else "day"


def count_by_period(
    starts: Mapping[datetime, int],
    since: datetime,
    until: datetime,
    unit: Literal["hour", "day"],
) -> dict[str, int]:
    """Map the label of each hour or day from `since` to `until` to a count.

    `starts` maps the start of an hour or day to the count. Hours and days without a count have the
    count 0.
    """
    by_hour = unit == "hour"
    step, form = (timedelta(hours=1), "%m-%d %H:00") if by_hour else (_DAY, "%Y-%m-%d")
    time = since.replace(minute=0, second=0, microsecond=0)
    counts: Counter[str] = Counter()
    while time <= until:
        counts[f"{time:{form}}"] = 0
        time += step
    for start, count in starts.items():
        counts[f"{start:{form}}"] += count
    return dict(counts)


def _table(*, show_header: bool = True) -> Table:
    padding = (0, _COLUMN_GAP, 0, 0)
    return Table(
        box=None, pad_edge=False, padding=padding, header_style="bold", show_header=show_header
    )


def _console() -> Console:
    width = None if sys.stdout.isatty() else _UNLIMITED_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def _format(value: object) -> str:  # noqa: PLR0911  # one return statement for each type of value
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        case Enum():
            return str(value.value)
        case dict():
            return _escape(json.dumps(value, ensure_ascii=False)) if value else ""
        case list() | tuple():
            return ", ".join(map(_format, value))
        case _:
            return _escape(str(value))


def _escape(text: str) -> str:
    """Escape control characters, so that a stored text cannot control the terminal."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )

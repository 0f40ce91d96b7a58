"""What the commands print: data on stdout, talk on stderr."""

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

import tiger_db
from tiger_db.files import output_files

if TYPE_CHECKING:
    from tiger_db.models import Entity

E_ = TypeVar("E_", bound="Entity")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A new file, a pipe or a device; else standard output."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
_DAY = timedelta(days=1)
_HOURLY = 2 * _DAY  # the longest time that is drawn by the hour
_GAP = 2  # between columns
_BARS = 100  # columns at most of a chart
_ANY_WIDTH = 10_000  # of what is not a terminal: a row stays on its line


def talk(message: str) -> None:
    """Say something to the person, in one line."""
    sys.stderr.write(_printable(" ".join(message.split())) + "\n")


def warn(message: str) -> None:
    talk(f"warning: {message}")


def failure(error: Exception) -> str:
    """Why a command failed, in one line. What is not known to be free of secrets is not shown."""
    from pydantic import ValidationError  # noqa: PLC0415  # slow, and `--help` is to be fast

    from tiger_db.connections.error_advice import explain  # noqa: PLC0415  # the same

    if explained := explain(error):
        return explained
    if isinstance(error, ValidationError):
        return "; ".join(
            f"--{str(problem['loc'][0]).replace('_', '-')}: " * bool(problem["loc"])
            + problem["msg"].removeprefix("Value error, ")
            for problem in error.errors(include_url=False, include_input=False)
        )
    if os.environ.get("DB_DEBUG", "").lower() in ("1", "true", "yes", "on"):
        sys.stderr.writelines(traceback.format_tb(error.__traceback__))  # code, no values
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"unexpected {type(error).__name__} in {os.path.basename(place.filename)}:{place.lineno}:"  # noqa: PTH119  # a name
        " please report it, with what DB_DEBUG=1 shows"
    )


@contextmanager
def progress(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if somebody looks; what is yielded is told of each step's length."""
    from rich.progress import Progress  # noqa: PLC0415  # slow, and `--help` is to be fast

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda length: bar.advance(task, length)


@contextmanager
def progress_to(doing: str) -> Iterator[Callable[[int, int], None]]:
    """As `progress`; what is yielded is told how much is done, and of how much."""
    from rich.progress import Progress  # noqa: PLC0415  # slow, and `--help` is to be fast

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counter(things: str) -> Iterator[Callable[[int], None]]:
    """How many there were until now, on stderr, where nobody knows how many there will be."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _count: None
        return
    with console.status("") as status:
        yield lambda count: status.update(f"{count:,} {things}")


@contextmanager
def output(path: Path | None, *, overwrite: bool) -> Iterator[IO[str]]:
    """Open the file of `--out` by the rules of `output_files`; standard output if there is none."""
    if path is None:
        yield sys.stdout
        return
    with output_files(path, overwrite=overwrite) as (file,):
        yield file


def print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def dump(row: "Entity") -> dict[str, Any]:
    """All fields as JSON has them, in their order; secrets are masked."""
    dumped = row.model_dump(mode="json")
    return {name: dumped[name] for name in type(row).model_fields if name in dumped}


def show_row(row: "Entity", *, as_json: bool) -> None:
    if as_json:
        print_json(dump(row))
    else:
        show_fields({name: getattr(row, name) for name in dump(row)})


def show_page(
    page: "tiger_db.Page[E_]", columns: Mapping[str, Callable[[E_], object]], *, as_json: bool
) -> None:
    """A list: each column is a heading and what it shows of a row."""
    if as_json:
        print_json({"items": [dump(row) for row in page], "next_cursor": page.next_cursor})
        return
    show_table(columns, [[show(row) for show in columns.values()] for row in page])
    if page.next_cursor:
        talk(f"there are more: add --after {page.next_cursor}")


def show_table(headings: Iterable[str], rows: Sequence[Sequence[object]]) -> None:
    """Empty columns are left out."""
    if not rows:
        talk("there are none")
        return
    cells = [[_text(value) for value in row] for row in rows]
    columns = [column for column in zip(headings, *cells, strict=True) if any(column[1:])]
    console, table = _console(), _table()
    for (heading, *_), width in zip(columns, _widths(columns, console.width), strict=True):
        # A row is told to other commands by its first column: that stays whole.
        rigid = width is None and heading == columns[0][0]
        table.add_column(heading, width=width, no_wrap=rigid, overflow="fold")
    for row in list(zip(*columns, strict=True))[1:]:
        table.add_row(*row)
    console.print(table)


def show_line(row: Iterable[object]) -> None:
    """A row by itself, of a table whose end is not known."""
    sys.stdout.write("  ".join(text for value in row if (text := _text(value))) + "\n")


def _widths(columns: Sequence[Sequence[str]], width: int) -> list[int | None]:
    """Such that no word is broken, or None where the words are too long for that."""
    least = [max(map(cell_len, " ".join(column).split())) for column in columns]
    room = width - sum(least) - _GAP * (len(least) - 1)
    if room < 0:
        return [None] * len(columns)
    widths: list[int | None] = []
    for column, word in zip(columns, least, strict=True):
        more = min(room, max(map(cell_len, column)) - word)
        widths.append(word + more)
        room -= more
    return widths


def show_fields(fields: Mapping[str, object]) -> None:
    """A line each; what is empty is left out."""
    table = _table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if shown := _text(value):
            table.add_row(name.replace("_", " "), shown)
    _console().print(table)


def show_bars(counts: Mapping[str, int]) -> None:
    """A bar for each number; the longest is the greatest."""
    greatest = max([*counts.values(), 1])
    room = min(_console().width, _BARS) - max(map(len, counts)) - len(f"{greatest:,}") - 2 * _GAP
    table = _table(show_header=False)
    for name, count in counts.items():
        # The last cell in eighths: U+2588 is a full block, U+258F the eighth of one.
        eighths = round(count / greatest * max(room, 1) * 8)
        part = chr(0x2590 - eighths % 8) if eighths % 8 else ""
        table.add_row(name, "\u2588" * (eighths // 8) + part, f"{count:,}")
    _console().print(table)


def over_time(hours: Mapping[datetime, int], since: datetime, until: datetime) -> dict[str, int]:
    """Return counts by the hour up to two days, else by the day; 0 where there are none."""
    step, form = (
        (timedelta(hours=1), "%m-%d %H:00") if until - since <= _HOURLY else (_DAY, "%Y-%m-%d")
    )
    at = since.replace(minute=0, second=0, microsecond=0)
    bars: Counter[str] = Counter()
    while at <= until:
        bars[f"{at:{form}}"] = 0
        at += step
    for hour, count in hours.items():
        bars[f"{hour:{form}}"] += count
    return dict(bars)


def _table(*, show_header: bool = True) -> Table:
    return Table(
        box=None,
        pad_edge=False,
        padding=(0, _GAP, 0, 0),
        header_style="bold",
        show_header=show_header,
    )


def _console() -> Console:
    width = None if sys.stdout.isatty() else _ANY_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


def _text(value: object) -> str:  # noqa: PLR0911  # one for each kind of value
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
            return _printable(json.dumps(value, ensure_ascii=False)) if value else ""
        case list() | tuple():
            return ", ".join(map(_text, value))
        case _:
            return _printable(str(value))


def _printable(text: str) -> str:
    """Without the control characters by which a stored text could govern the terminal."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )

"""What the commands are given: settings and sessions, accounts, secrets, lists and times."""

import logging
import re
import sys
import termios
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from uuid import UUID

import typer

import tiger_db
from tiger_db.cli.output import warn
from tiger_db.errors import InvalidValue, NotFound

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession

T = TypeVar("T")
S = TypeVar("S", bound=StrEnum)
DEFAULT_PAGE_SIZE = 50  # that of crud.pagination, which --help does not import
Limit = Annotated[int, typer.Option(min=1, max=1000, help="How many to show at most.")]
After = Annotated[
    str | None,
    typer.Option(metavar="CURSOR", help="Go on where an earlier list ended: its next_cursor."),
]
SINCE = typer.Option(
    metavar="TIME",
    help="From then on: such as 2026-01-31T12:00:00Z, or how long ago, such as 24h or 7d.",
)
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
_CENTURY = timedelta(days=36525)
_SECRET_LIMIT = 1_000_000  # characters
_LINE_END = 2  # characters, which may follow them
_LINE_LIMIT = 4095  # bytes of a line that Linux hands over from a terminal; it drops what follows
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def settings() -> "tiger_db.Settings":
    """What the environment says. With DB_DEBUG, statements are logged where talk goes."""
    found = tiger_db.Settings()
    logger = logging.getLogger("sqlalchemy.engine.Engine")
    if found.db_debug and not logger.handlers:  # else SQLAlchemy adds one, to stdout
        logger.addHandler(logging.StreamHandler())
    return found


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run it in an event loop of its own."""
    import asyncio  # noqa: PLC0415  # slow, and `--help` is to be fast

    return asyncio.run(work)


def query(ask: "Callable[[AsyncSession], Coroutine[Any, Any, T]]") -> T:
    """Run one transaction; it has been committed when this returns."""

    async def run() -> T:
        async with tiger_db.Database(settings()) as database, database.session() as session:
            return await ask(session)

    return finish(run())


async def find_account(session: "AsyncSession", number_or_id: str) -> "tiger_db.TigerAccount":
    account = await tiger_db.crud.accounts.get_by_account_number(session, number_or_id)
    if account is None and (account_id := as_uuid(number_or_id)):
        account = await tiger_db.crud.accounts.get(session, account_id)
    if account is None:
        raise NotFound("there is no account with this number or id")
    return account


async def find_api_key(session: "AsyncSession", prefix_or_id: str) -> "tiger_db.APIKey":
    key = await tiger_db.crud.api_keys.get_by_prefix(session, prefix_or_id)
    if key is None and (key_id := as_uuid(prefix_or_id)):
        key = await tiger_db.crud.api_keys.get(session, key_id)
    if key is None:
        # Not named, because it may be the whole key.
        raise NotFound("there is no API key with this prefix or id")
    return key


async def account_numbers(
    session: "AsyncSession", ids: Iterable[UUID | None]
) -> dict[UUID | None, str]:
    """What people know the accounts by; those that are gone, by their id."""
    from sqlmodel import col, select  # noqa: PLC0415  # slow, and `--help` is to be fast

    wanted: dict[UUID | None, str] = {
        account_id: str(account_id) for account_id in ids if account_id is not None
    }
    rows = await session.execute(
        select(col(tiger_db.TigerAccount.id), col(tiger_db.TigerAccount.account_number)).where(
            col(tiger_db.TigerAccount.id).in_(wanted)
        )
    )
    return {**wanted, **{row.id: row.account_number for row in rows}}


def as_uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def member(enum: type[S], value: str | None) -> S | None:
    """The member that an option's choice stands for."""
    return None if value is None else enum(value)


def members(enum: type[S], text: str | None, option: str) -> list[S]:
    """Those that an option names, separated by commas."""
    try:
        return [enum(word) for word in words(text)]
    except ValueError:
        raise typer.BadParameter(f"choose from {', '.join(enum)}", param_hint=option) from None


def words(text: str | None) -> list[str]:
    """The parts of `a,b, c`."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def moment(text: str, option: str) -> datetime:
    """Parse a time with its zone; return it in UTC.

    Raises:
        BadParameter: anything else, also a time whose zone would have to be guessed.
    """
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is not None:
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise typer.BadParameter(
        "give a date, time and zone, such as 2026-01-31T12:00:00Z", param_hint=option
    )


def past(text: str, option: str) -> datetime:
    """Parse a time with its zone, or a length of time before now, such as `24h`.

    Raises:
        BadParameter: anything else.
    """
    if re.fullmatch(r"\d+[a-z]", text, re.ASCII):
        return datetime.now(UTC) - duration(text, option)
    return moment(text, option)


def duration(text: str, option: str) -> timedelta:
    """A length of time such as `30d`.

    Raises:
        BadParameter: anything else.
    """
    if match := re.fullmatch(r"(\d{1,8})([smhdw])", text, re.ASCII):
        length = timedelta(**{_UNITS[match[2]]: int(match[1])})
        if timedelta(0) < length <= _CENTURY:
            return length
    raise typer.BadParameter(
        "give a number and a unit (s, m, h, d or w), such as 30d; a century at most",
        param_hint=option,
    )


def confirm(question: str, *, yes: bool) -> None:
    """Go on only if the person agrees.

    Raises:
        BadParameter: there is nobody to ask.
    """
    if yes:
        return
    if not _at_terminal():
        raise typer.BadParameter("is needed, because nobody can be asked here", param_hint="--yes")
    typer.confirm(question, abort=True, err=True)


def secret(name: str, value: str | None, file: str | None) -> str | None:
    """A secret from the command line, where a warning follows, a file, or `-`: standard input.

    Raises:
        BadParameter: both are given.
        InvalidValue: there is nothing in it, it is too long, or it is not text.
    """
    if value is not None and file is not None:
        raise typer.BadParameter("is given already", param_hint=f"--{name}-file")
    if value is None and file is None:
        return None
    try:
        if "-" in (value, file):
            text = (
                _hidden_lines(name)
                if _at_terminal()
                else sys.stdin.read(_SECRET_LIMIT + _LINE_END + 1)
            )
        elif file is not None:
            with Path(file).open(encoding="utf-8") as stream:
                text = stream.read(_SECRET_LIMIT + _LINE_END + 1)
        else:
            warn(
                "other users of this machine can see a secret on the command line, and the shell"
                f" remembers it: --{name}-file or - (standard input) keeps it to yourself"
            )
            text = value or ""
    except UnicodeDecodeError:
        raise InvalidValue(f"the {name.replace('-', ' ')} is not text") from None
    if max(len(text) - _LINE_END, len(text.strip())) > _SECRET_LIMIT:
        raise InvalidValue(
            f"the {name.replace('-', ' ')} has more than {_SECRET_LIMIT:,} characters"
        )
    if not text.strip():
        raise InvalidValue(f"the {name.replace('-', ' ')} is empty")
    return text.strip()


def required_secret(name: str, value: str | None, file: str | None) -> str:
    """As `secret`; where nothing is given, the person at the terminal is asked.

    Raises:
        BadParameter: nothing is given, and there is nobody to ask.
    """
    if value is None and file is None:
        if not _at_terminal():
            raise typer.BadParameter(
                "give a file, or - to read standard input", param_hint=f"--{name}-file"
            )
        value = "-"
    found = secret(name, value, file)
    assert found is not None
    return found


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _hidden_lines(name: str) -> str:
    """Ask without echo. A pasted PEM is read to its end: `getpass` would leave it to the shell.

    Raises:
        InvalidValue: a line is so long that the terminal may have cut it.
    """
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
        sys.stderr.write(f"{name.replace('-', ' ')} (hidden): ")
        sys.stderr.flush()
        lines = [sys.stdin.readline()]
        while lines[0].startswith("-----BEGIN") and lines[-1] and "-----END" not in lines[-1]:
            lines.append(sys.stdin.readline())
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
        sys.stderr.write("\n")
    if any(len(line.rstrip("\n").encode()) >= _LINE_LIMIT for line in lines):
        raise InvalidValue(f"a terminal may cut a line that is so long: use --{name}-file")
    return "".join(lines)

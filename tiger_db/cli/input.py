"""What the commands are given: settings and sessions, accounts, secrets, lists and times."""

import asyncio
import logging
import re
import sys
import termios
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from uuid import UUID

import typer

from tiger_db.cli.output import masked, talk, warn
from tiger_db.errors import InvalidValue, NotFound

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession
    from tiger_db.models import TigerAccount
    from tiger_db.settings import Settings

T = TypeVar("T")
S = TypeVar("S", bound=StrEnum)
Limit = Annotated[int, typer.Option(min=1, max=1000, help="How many to show at most.")]
After = Annotated[
    str | None,
    typer.Option(metavar="CURSOR", help="Go on where an earlier list ended: its next_cursor."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
_SECRET_LIMIT = 1_000_000  # characters
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def settings() -> "Settings":
    """What the environment says. With DB_DEBUG, statements are logged where talk goes."""
    from tiger_db.settings import Settings

    found = Settings()
    logger = logging.getLogger("sqlalchemy.engine.Engine")
    if found.db_debug and not logger.handlers:  # else SQLAlchemy adds one, to stdout
        logger.addHandler(logging.StreamHandler())
    return found


def query(ask: "Callable[[AsyncSession], Coroutine[Any, Any, T]]") -> T:
    """Run one transaction; it has been committed when this returns."""
    from tiger_db.database import Database

    async def run() -> T:
        async with Database(settings()) as database, database.session() as session:
            return await ask(session)

    return asyncio.run(run())


async def find_account(session: "AsyncSession", number_or_id: str) -> "TigerAccount":
    from tiger_db import crud

    account = await crud.accounts.get_by_account_number(session, number_or_id)
    if account is None and (account_id := as_uuid(number_or_id)):
        account = await crud.accounts.get(session, account_id)
    if account is None:
        raise NotFound(f"there is no account {masked(number_or_id)}")
    return account


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


def moment(text: str | None, option: str) -> datetime | None:
    """A time with its zone.

    Raises:
        BadParameter: anything else, also a time whose zone would have to be guessed.
    """
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is not None:
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise typer.BadParameter(
        "give a date, time and zone, such as 2026-01-31T12:00:00Z", param_hint=option
    )


def duration(text: str | None, option: str) -> timedelta | None:
    """A length of time such as `30d`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})([smhdw])", text, re.ASCII)
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter("give a number and a unit, such as 12h or 30d", param_hint=option)
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def confirm(question: str, *, yes: bool) -> None:
    """Go on only if the person agrees.

    Raises:
        BadParameter: there is nobody to ask.
    """
    if yes:
        return
    if not _at_terminal():
        raise typer.BadParameter("nobody can be asked here: add it", param_hint="--yes")
    typer.confirm(question, abort=True, err=True)


def secret(name: str, value: str | None, file: str | None) -> str | None:
    """A secret from the command line, where a warning follows, a file, or `-`: standard input.

    Raises:
        BadParameter: both are given.
        InvalidValue: there is nothing in it.
    """
    if value is not None and file is not None:
        raise typer.BadParameter(f"excludes {name}-file", param_hint=name)
    if value is None and file is None:
        return None
    if "-" in (value, file):
        text = _hidden_lines(name) if _at_terminal() else sys.stdin.read(_SECRET_LIMIT)
    elif file is not None:
        try:
            with Path(file).open(encoding="utf-8") as stream:
                text = stream.read(_SECRET_LIMIT)
        except UnicodeDecodeError:
            raise InvalidValue(f"{file} is not text") from None
    else:
        warn(
            f"other users of this machine can see what follows {name}, and the shell remembers it:"
            f" {name}-file and - (standard input) keep it to yourself"
        )
        text = value or ""
    if not text.strip():
        raise InvalidValue(f"{name} is empty")
    return text.strip()


def required_secret(name: str, value: str | None, file: str | None) -> str:
    """As `secret`; where nothing is given, the person at the terminal is asked.

    Raises:
        BadParameter: nothing is given, and there is nobody to ask.
    """
    if value is None and file is None:
        if not _at_terminal():
            raise typer.BadParameter(
                f"give {name}-file, or - to read standard input", param_hint=name
            )
        value = "-"
    found = secret(name, value, file)
    assert found is not None
    return found


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _hidden_lines(name: str) -> str:
    """Ask without echo. A pasted PEM is read to its end: `getpass` would leave it to the shell."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    sys.stderr.write(f"{name.lstrip('-').replace('-', ' ')} (hidden): ")
    sys.stderr.flush()
    try:
        termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
        lines = [sys.stdin.readline()]
        while lines[0].startswith("-----BEGIN") and lines[-1] and "-----END" not in lines[-1]:
            lines.append(sys.stdin.readline())
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
        sys.stderr.write("\n")
    return "".join(lines)

"""Options and arguments that several commands share, and functions that parse or ask for values."""

import getpass
import re
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from tiger_db.cli.output import print_warning
from tiger_db.errors import InvalidValue

if TYPE_CHECKING:
    from tiger_db.crud.filters import Tag

S = TypeVar("S", bound=StrEnum)
DEFAULT_PAGE_SIZE = 50  # equal to crud.pagination.DEFAULT_PAGE_SIZE, which is slow to import

# The following types repeat enums of tiger_db.models, because importing tiger_db.models is slow.
AccountTypes = Literal["standard", "prime", "global", "paper"]
OpenStatuses = Literal["active", "inactive", "suspended", "pending_verification"]
Licenses = Literal["TBNZ", "TBSG", "TBHK", "TBAU", "TBUS"]
Environments = Literal["PROD", "SANDBOX"]
Markets = Literal["US", "HK", "CN", "SG"]

AccountArgument = Annotated[str, typer.Argument(metavar="ACCOUNT", help="Account number or id.")]
AccountOption = Annotated[str | None, typer.Option(help="Number or id of an account.")]
KeyArgument = Annotated[str, typer.Argument(metavar="PREFIX", help="Prefix or id of the API key.")]
KeyFile = Annotated[str | None, typer.Option(metavar="FILE", help="File with the whole API key.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="Maximum number of rows.")]
After = Annotated[
    str | None,
    typer.Option(
        metavar="CURSOR", help="Cursor of the next page, as printed with the current page."
    ),
]
Before = Annotated[
    str | None,
    typer.Option(
        metavar="CURSOR", help="Cursor of the previous page, as printed with the current page."
    ),
]
Count = Annotated[
    bool, typer.Option("--count", help="Count the rows of all pages, which can take seconds.")
]
SINCE = typer.Option(
    metavar="TIME",
    help="Start of the period: a time such as 2026-01-31T12:00:00Z, or an age such as 24h or 7d.",
)
ExpiresIn = Annotated[
    str | None,
    typer.Option(metavar="30d", help="Time until the API key expires, such as 12h, 30d or 2w."),
]
ExpiresAt = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="Time at which the API key expires, such as 2026-01-31T12:00:00Z."
    ),
]
Reason = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Reason to record in the audit event.")
]
PrivateKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="RSA private key, or - to read the key from standard input."),
]
PrivateKeyFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="File with the RSA private key.")
]
KeyId = Annotated[
    str | None,
    typer.Option(
        "--id", metavar="ID", help="Id of the new key or pepper. Default: an id with today's date."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Output file, pipe or device. Default: standard output."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]

_MAX_DURATION = timedelta(days=36525)
_MAX_SECRET_LENGTH = 1_000_000
_LINE_END_LENGTH = 2  # number of characters in CR LF, the longest line end
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_MAX_TERMINAL_LINE_BYTES = 4095  # Linux truncates longer lines that a user types at a terminal


def parse_member(enum: type[S], value: str | None) -> S | None:
    return None if value is None else enum(value)


def parse_members(enum: type[S], text: str | None, option: str) -> list[S]:
    """Parse a comma-separated list of enum values. Raise BadParameter for an unknown value."""
    try:
        return [enum(word) for word in split_words(text)]
    except ValueError:
        raise typer.BadParameter(f"choose from {', '.join(enum)}", param_hint=option) from None


def parse_tags(texts: Sequence[str]) -> "list[Tag]":
    """Parse tags: the name of a tag, such as `desk`, or a name and a value, such as `desk=A`."""
    parts = [text.partition("=") for text in texts]
    return [{name: value} if equals else name for name, equals, value in parts]


def split_words(text: str | None) -> list[str]:
    """Split a text at commas, and strip white space from each word."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def parse_month(text: str, option: str) -> str:
    """Return a month such as 2026-01 unchanged. Raise BadParameter for another text."""
    try:
        date.fromisoformat(f"{text}-01")
    except ValueError:
        message = "give a year and a month, such as 2026-01"
        raise typer.BadParameter(message, param_hint=option) from None
    return text


def parse_time(text: str, option: str) -> datetime:
    """Parse a time, and return the time in UTC.

    Raises:
        BadParameter: the text is not a time with a time zone.
    """
    try:
        found = datetime.fromisoformat(text)
        if found.tzinfo is not None:
            return found.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise typer.BadParameter(
        "give a date, a time and a time zone, such as 2026-01-31T12:00:00Z", param_hint=option
    )


def parse_past(text: str, option: str) -> datetime:
    """Parse a time with a time zone, or an age such as `24h`. Return the time in UTC."""
    if re.fullmatch(r"\d+[a-z]", text, re.ASCII):
        return datetime.now(UTC) - parse_duration(text, option)
    return parse_time(text, option)


def parse_duration(text: str, option: str) -> timedelta:
    """Parse a duration such as `30d`, which must be positive and at most a century."""
    if match := re.fullmatch(r"(\d{1,8})([smhdw])", text, re.ASCII):
        length = timedelta(**{_UNITS[match[2]]: int(match[1])})
        if timedelta(0) < length <= _MAX_DURATION:
            return length
    raise typer.BadParameter(
        "give a number and a unit (s, m, h, d or w), such as 30d; the maximum is 100 years",
        param_hint=option,
    )


def parse_expiry(expires_in: str | None, expires_at: str | None) -> datetime | None:
    """Return the expiry that --expires-in or --expires-at sets, or None without these options."""
    if expires_in is not None and expires_at is not None:
        raise typer.BadParameter(
            "--expires-in cannot be combined with --expires-at", param_hint="--expires-in"
        )
    if expires_in is not None:
        return datetime.now(UTC) + parse_duration(expires_in, "--expires-in")
    expiry = None if expires_at is None else parse_time(expires_at, "--expires-at")
    if expiry is not None and expiry <= datetime.now(UTC):
        raise typer.BadParameter("the expiry must be in the future", param_hint="--expires-at")
    return expiry


def new_key_id() -> str:
    """Return a new unique key id, which consists of today's date and random digits."""
    import secrets  # noqa: PLC0415  # slow import, not needed by `--help`

    return f"{datetime.now(UTC):%Y-%m-%d}-{secrets.token_hex(2)}"


def confirm(question: str, *, yes: bool) -> None:
    """Ask a yes-or-no question at the terminal, and abort if the answer is no.

    If the argument `yes` is True, the question is not asked.
    """
    if yes:
        return
    if not _at_terminal():
        raise typer.BadParameter(
            "without a terminal, the command requires the option --yes", param_hint="--yes"
        )
    typer.confirm(question, abort=True, err=True)


def read_secret(name: str, value: str | None, file: str | None) -> str | None:
    """Read a secret from a file, from standard input (`-`), or from the command line.

    A secret on the command line causes a warning. If `value` and `file` are None, the result is
    None.

    Raises:
        BadParameter: both `value` and `file` are given.
        InvalidValue: the secret is empty, too long, or not text.
    """
    label = name.replace("-", " ")
    if value is not None and file is not None:
        raise typer.BadParameter(
            f"give the {label} or --{name}-file, but not both", param_hint=f"--{name}-file"
        )
    if value is None and file is None:
        return None
    limit = _MAX_SECRET_LENGTH + _LINE_END_LENGTH + 1
    try:
        if "-" in (value, file):
            text = _read_hidden(name) if _at_terminal() else sys.stdin.read(limit)
        elif file is not None:
            with Path(file).open(encoding="utf-8") as stream:
                text = stream.read(limit)
        else:
            print_warning(
                "other users of this machine can see a secret on the command line, and the shell"
                f" history stores the secret. Use --{name}-file, or - for standard input"
            )
            text = value or ""
    except UnicodeDecodeError:
        raise InvalidValue(f"the {label} is not text") from None
    if max(len(text) - _LINE_END_LENGTH, len(text.strip())) > _MAX_SECRET_LENGTH:
        raise InvalidValue(f"the {label} has more than {_MAX_SECRET_LENGTH:,} characters")
    if not text.strip():
        raise InvalidValue(f"the {label} is empty")
    return text.strip()


def read_required_secret(name: str, value: str | None, file: str | None) -> str:
    """Read a secret. If `value` and `file` are None, ask for the secret at the terminal."""
    if value is None and file is None:
        if not _at_terminal():
            raise typer.BadParameter(
                "give a file with the secret, or - to read the secret from standard input",
                param_hint=f"--{name}-file",
            )
        value = "-"
    secret = read_secret(name, value, file)
    assert secret is not None
    return secret


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _read_hidden(name: str) -> str:
    """Ask for a secret at the terminal. The terminal does not show the typed secret.

    All lines of a pasted PEM file are read. `getpass` would read only the first line of a pasted
    PEM file, and the shell would read the other lines as commands.

    On Windows, which has no termios, `getpass` reads one line.

    Raises:
        InvalidValue: a typed line is so long that the terminal may have truncated the line.
    """
    try:
        import termios  # noqa: PLC0415  # missing on Windows
    except ModuleNotFoundError:
        return getpass.getpass(f"{name.replace('-', ' ')} (hidden): ")
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
    if any(len(line.rstrip("\n").encode()) >= _MAX_TERMINAL_LINE_BYTES for line in lines):
        raise InvalidValue(f"a line of the secret is too long for a terminal: use --{name}-file")
    return "".join(lines)

"""The command line `tiger-db`.

Whatever is slow to import is imported where it is used, so that `--help` answers at once.
"""

import io
import os
import sys
from typing import Annotated

import typer

from tiger_db.cli import (
    accounts,
    api_key_care,
    api_keys,
    audit_events,
    audit_seals,
    database,
    encryption,
    refreshes,
    tiger,
)
from tiger_db.cli.output import failure, talk

app = typer.Typer(
    name="tiger-db",
    help="Accounts, API keys, audit trail and token refreshes of a Tiger Brokers MCP system.",
    epilog="Settings come from the environment: DATABASE_URL, or DB_HOST and its kin. Without"
    " them, an embedded PostgreSQL serves. Exit code: 0 done, 1 failed, 2 wrong usage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel in (
    database, accounts, api_keys, api_key_care, audit_events, audit_seals, refreshes, encryption,
    tiger,
):  # fmt: skip
    app.add_typer(_panel.app)


def _version(wanted: bool) -> None:  # noqa: FBT001  # how typer calls it
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415  # slow, and `--help` is to be fast

        typer.echo(f"tiger-db {version('tiger-db')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """Take the options that come before the command."""


def main() -> None:
    """Run the command of this process's arguments and end the process: never with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that lack a character
    code = _run()
    try:
        sys.stdout.flush()
    except OSError:  # which was told of; Python's own last attempt would tell again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run() -> int | str | None:
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        if end.code == 130:  # noqa: PLR2004  # what typer makes of Ctrl-C: 128 + SIGINT
            talk("interrupted")
        return end.code
    except BrokenPipeError:  # the reader has seen enough
        return 1
    except Exception as error:  # noqa: BLE001  # the last resort of a program
        talk(f"error: {failure(error)}")
        return 1
    return 0

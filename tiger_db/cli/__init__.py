"""Command line `tiger-db`.

Slow modules are imported inside functions, so that `tiger-db --help` is fast.
"""

import atexit
import gc
import io
import os
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from tiger_db.cli import (
    account_changes,
    accounts,
    api_key_changes,
    api_keys,
    audit_events,
    audit_seals,
    database,
    encryption,
    key_codes,
    refreshes,
    roles,
    tiger,
    trading,
)
from tiger_db.cli.output import print_message
from tiger_db.cli.runtime import SIGTERM_EXIT_CODE, actor_name, describe_error, exit_on_sigterm


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]  # the same class
        """Run a command. Messages about values begin without the prefix that pydantic adds."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


_SIGPIPE_EXIT_CODE = 141  # 128 + SIGPIPE, which Python does not have on Windows
_GC_THRESHOLD = 20_000  # new objects before a garbage collection

app = typer.Typer(
    name="tiger-db",
    cls=_Commands,
    help="Manage accounts, API keys, the audit trail and token refreshes of a Tiger Brokers MCP"
    " system.",
    epilog="Environment variables select the database: DATABASE_URL, or DB_HOST, DB_PORT, DB_NAME,"
    " DB_USER and DB_PASSWORD. Without DATABASE_URL and DB_HOST, the embedded PostgreSQL is used."
    " Exit codes: 0 success, 1 failure, 2 wrong usage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (
    database, roles, account_changes, accounts, api_key_changes, api_keys, key_codes, trading,
    audit_events, audit_seals, refreshes, encryption, tiger,
):  # fmt: skip
    app.add_typer(_module.app)


def _print_version(wanted: bool) -> None:  # noqa: FBT001  # typer's signature
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415  # slow import, not needed by `--help`

        typer.echo(f"tiger-db {version('tiger-db')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    actor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="User to record in the audit trail; by default the operating system's user.",
        ),
    ] = None,
) -> None:
    """Declare the options that precede the name of a command."""
    if actor is not None and not actor.strip():
        raise typer.BadParameter("the name is empty", param_hint="--actor")
    actor_name.set(actor)


def main() -> None:
    """Run the command in `sys.argv`, then exit the process. Print errors without a traceback."""
    exit_on_sigterm()
    # Imports make many objects and no garbage. With Python's threshold of 700 objects, the garbage
    # collections would take a tenth of most commands.
    gc.set_threshold(_GC_THRESHOLD, *gc.get_threshold()[1:])
    # The garbage collections of Python's exit would take longer than most commands.
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Escape the characters that the stream's encoding cannot encode.
            stream.reconfigure(errors="backslashreplace")
    code = _run()
    try:
        sys.stdout.flush()
    except OSError:  # Python flushes stdout again at exit: dup2() prevents a second OSError
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _run() -> int | str | None:
    try:
        try:
            app(prog_name="tiger-db")
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        if end.code == 130:  # noqa: PLR2004  # typer's exit code for Ctrl-C: 128 + SIGINT
            print_message("interrupted")
        elif end.code == SIGTERM_EXIT_CODE:
            print_message("terminated")
        elif isinstance(end.__context__, BrokenPipeError):  # Click exits with 1
            return _SIGPIPE_EXIT_CODE
        return end.code
    except BrokenPipeError:  # the reader of stdout, such as `head`, has closed the pipe
        return _SIGPIPE_EXIT_CODE
    except Exception as error:  # noqa: BLE001  # report every error in one line
        print_message(f"error: {describe_error(error)}")
        return 1
    return 0

"""Options that commands share: choices, secrets, and confirmations."""

import os
import re
import signal
import subprocess
from enum import StrEnum
from typing import get_args

import pytest

from tests.support.cli_accounts import NUMBER, REQUIRED, create, stored
from tests.support.command_line import CommandLine
from tests.support.factories import plain
from tests.support.terminal import Terminal
from tests.support.without_posix import PROGRAM
from tiger_db import models as enums
from tiger_db.cli import audit_events, options
from tiger_db.crud import pagination
from tiger_db.crud.audit_logs import EventDimension
from tiger_db.tiger import parse_private_key


def test_commands_and_functions_have_the_same_page_size() -> None:
    assert options.DEFAULT_PAGE_SIZE == pagination.DEFAULT_PAGE_SIZE


@pytest.fixture(scope="module")
def pem() -> str:
    made = subprocess.run(["openssl", "genrsa", "1024"], capture_output=True, check=True, text=True)
    return made.stdout


@pytest.mark.parametrize(
    ("choices", "enum"),
    [
        (options.AccountTypes, enums.AccountType),
        (options.Licenses, enums.TigerLicense),
        (options.Environments, enums.TigerEnvironment),
        (options.Markets, enums.MarketPermission),
    ],
)
def test_choices_are_the_values_of_the_enum(choices: object, enum: type[StrEnum]) -> None:
    assert list(get_args(choices)) == [member.value for member in enum]


def test_the_help_names_all_results_and_severities_and_groups_of_events() -> None:
    for name, enum in (("result", enums.AuditResult), ("severity", enums.AuditSeverity)):
        (option,) = audit_events._FILTERS[name].__metadata__
        assert f": {', '.join(enum)}, separated by commas" in option.help
    assert {*audit_events._DIMENSIONS} == {*get_args(EventDimension)}


@pytest.mark.parametrize("command", [["grant", "x", "--as"], ["set-account-status", "U1"]])
def test_an_unknown_choice_is_refused_with_the_choices(
    bare: CommandLine, command: list[str]
) -> None:
    message = bare.misused(*command, "boss")
    assert re.search("Invalid value for '[^']+': 'boss' is not one of 'a", message)


@pytest.mark.parametrize("command", [["grant", "--as", "app"], ["revoke-grants"]])
def test_a_role_has_a_name(bare: CommandLine, command: list[str]) -> None:
    assert "Invalid value for 'ROLE': the name is empty" in bare.misused(*command, "")


def test_some_options_have_fewer_choices() -> None:
    assert {*enums.AccountStatus} - set(get_args(options.OpenStatuses)) == {"closed"}


@pytest.mark.slow
def test_a_secret_is_read_from_the_terminal_without_echo(
    cli: CommandLine, terminal: Terminal, pem: str
) -> None:
    bare_key, _ = parse_private_key(pem)
    for number, typed in (("U1", "hunter2\n"), ("U2", bare_key + "\n"), ("U3", pem)):
        command = ("create-account", *REQUIRED, "--account-number", number, "--json")
        with terminal.program(cli, *command) as program:
            terminal.wait_for("private key (hidden): ")
            assert not terminal.echoes
            terminal.type(typed)
            assert terminal.end(program) == 0, terminal.seen
        assert terminal.echoes
        kept = plain(stored(cli, number).private_key)
        assert kept == ("hunter2" if number == "U1" else bare_key)
        os.set_blocking(terminal.screen, True)
        assert not any(line in terminal.seen for line in typed.split())
        terminal.seen = ""


@pytest.mark.slow
@pytest.mark.parametrize("length", [4094, 4095, 5000])
def test_a_line_that_the_terminal_may_have_cut_is_refused(
    cli: CommandLine, terminal: Terminal, length: int
) -> None:
    """A terminal passes on at most 4095 bytes of a line, and drops the others silently."""
    command = ("create-account", *REQUIRED, "--account-number", NUMBER, "--private-key", "-")
    with terminal.program(cli, *command) as program:
        terminal.wait_for("private key (hidden): ")
        terminal.type("x" * length + "\n")
        code = terminal.end(program)
    if length == 4094:
        assert (code, plain(stored(cli).private_key)) == (0, "x" * length)
    else:
        assert code == 1
        assert "is too long for a terminal: use --private-key-file" in terminal.seen
        assert cli.ok("list-accounts", "--json").json["items"] == []


@pytest.mark.slow
def test_a_secret_is_read_from_the_terminal_without_posix(
    bare: CommandLine, terminal: Terminal
) -> None:
    """Windows has no termios; there, `getpass` hides the typed text."""
    bare.env = {"DB_HOST": "127.0.0.1", "DB_PORT": "1"}
    command = ("create-account", *REQUIRED, "--account-number", NUMBER)
    with terminal.program(bare, *command, start=PROGRAM) as program:
        terminal.wait_for("private key (hidden): ")
        terminal.type("hunter2\n")
        assert terminal.end(program) == 1
    assert "cannot connect to 127.0.0.1:1" in terminal.seen


@pytest.mark.slow
def test_ctrl_c_at_a_prompt_ends_the_command(cli: CommandLine, terminal: Terminal) -> None:
    with terminal.program(cli, "verify-api-key") as program:
        terminal.wait_for("key (hidden): ")
        program.send_signal(signal.SIGINT)
        assert terminal.end(program) == 130
    assert terminal.echoes
    assert "interrupted" in terminal.seen
    assert "Traceback" not in terminal.seen


@pytest.mark.slow
def test_an_empty_answer_is_refused(cli: CommandLine, terminal: Terminal) -> None:
    with terminal.program(cli, "verify-api-key", "-") as program:
        terminal.wait_for("key (hidden): ")
        terminal.type("\x04")
        assert terminal.end(program) == 1
    assert "the key is empty" in terminal.seen


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_question_is_answered_at_the_terminal(
    cli: CommandLine, terminal: Terminal, answer: str
) -> None:
    create(cli)
    with terminal.program(cli, "close-account", NUMBER) as program:
        terminal.wait_for("[y/N]")
        terminal.type(answer + "\n")
        assert terminal.end(program) == (0 if answer == "y" else 1)
    assert stored(cli).status == ("closed" if answer == "y" else "active")

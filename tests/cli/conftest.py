"""Command lines with and without a database, and a terminal."""

import os
from collections.abc import Iterator

import pytest

from tests.support.cli_events import log
from tests.support.command_line import SECRETS, CommandLine
from tests.support.terminal import Terminal
from tiger_db.settings import Settings


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """A command line without a database."""
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def cli(bare: CommandLine, clone_settings: Settings) -> CommandLine:
    """A command line with a migrated database."""
    return _on(bare, clone_settings)


@pytest.fixture
def empty(bare: CommandLine, empty_database: Settings) -> CommandLine:
    """A command line with a database that has no schema."""
    return _on(bare, empty_database)


def _on(command_line: CommandLine, settings: Settings) -> CommandLine:
    assert settings.database_url is not None
    url = settings.database_url.get_secret_value()
    command_line.env = {"DATABASE_URL": url, **SECRETS}
    return command_line


@pytest.fixture
def signing(cli: CommandLine) -> CommandLine:
    """A command line with a migrated database and a signing key."""
    cli.env["AUDIT_SIGNING_KEY"] = cli.ok("generate-audit-signing-key").out.strip()
    return cli


@pytest.fixture
def sealed(signing: CommandLine, clone_settings: Settings) -> CommandLine:
    """A command line with a migrated database, a signing key and 12 sealed events."""
    log(clone_settings, *({"user_id": f"user {number}"} for number in range(12)))
    signing.ok("seal-audit")
    return signing


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    os.close(terminal.screen)
    os.close(terminal.device)

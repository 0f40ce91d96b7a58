"""The command line, run in this process or in a new one."""

import functools
import io
import json
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import typer.main

from tests.support.forks import run_python
from tiger_db.cli import main

# Typer creates all commands anew for each run, which takes longer than most runs.
_get_command = functools.cache(typer.main.get_command)

KEYS = "test:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=:v2"
SECRETS = {
    "ENCRYPTION_KEYS": KEYS,
    "API_KEY_PEPPERS": "test:ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=",
}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class CommandLine:
    """`tiger-db` with environment variables."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    env: dict[str, str] = field(default_factory=dict)

    def __call__(self, *arguments: str, stdin: str = "", **env: str) -> Result:
        """Run a command in this process."""
        with self.monkeypatch.context() as patch:
            for name, value in {**self.env, **env}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["tiger-db", *arguments])
            patch.setattr(typer.main, "get_command", _get_command)
            patch.setattr(
                sys,
                "stdin",
                io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8", "surrogateescape")), "utf-8"),
            )
            self.capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                main()
        out, err = self.capsys.readouterr()
        assert isinstance(end.value.code, int)
        assert "Traceback" not in err
        return Result(end.value.code, out, err)

    def ok(self, *arguments: str, stdin: str = "", **env: str) -> Result:
        result = self(*arguments, stdin=stdin, **env)
        assert result.code == 0, result.err
        return result

    def fails(self, *arguments: str, stdin: str = "", **env: str) -> str:
        """Run a command that fails, and return its one line on stderr."""
        result = self(*arguments, stdin=stdin, **env)
        assert (result.code, result.out) == (1, ""), result
        assert result.err.count("\n") == 1, result.err
        return result.err

    def misused(self, *arguments: str, stdin: str = "", **env: str) -> str:
        result = self(*arguments, stdin=stdin, **env)
        assert (result.code, result.out) == (2, ""), result
        return " ".join(result.err.replace("│", " ").split())

    def environment(self, **env: str) -> dict[str, str]:
        """Return the environment of a new process, in which output is buffered as usual."""
        inherited = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
        return {**inherited, **self.env, **env}

    def process(self, *arguments: str, stdin: str = "", **env: str) -> Result:
        """Run a command in a new process, in which every warning is an error."""
        env = self.environment(**env)
        done = run_python("-m", "tiger_db", *arguments, env=env, stdin=stdin)
        assert "Traceback" not in done.stderr
        return Result(done.returncode, done.stdout, done.stderr)


# The names of all commands, in the order of `tiger-db --help`.
COMMANDS = (
    "init", "migrate", "revision", "downgrade", "current", "history", "check", "health-check",
    "doctor", "start-embedded", "stop-embedded", "grant", "revoke-grants",
    "create-account", "set-default-account", "close-account", "reopen-account", "delete-account",
    "set-account-status", "add-market-permission", "remove-market-permission",
    "reset-account-errors", "list-accounts", "count-accounts", "explain-routing", "show-account",
    "create-api-key", "update-api-key", "activate-api-key", "deactivate-api-key", "rotate-api-key",
    "revoke-api-key", "delete-api-key", "list-api-keys", "verify-api-key", "show-api-key",
    "list-expiring-api-keys", "print-api-key-pattern", "generate-api-key-pepper", "sign-api-keys",
    "pause", "resume", "list-events", "count-events", "export-events",
    "generate-audit-signing-key", "print-audit-public-key", "seal-audit", "verify-audit",
    "change-audit-signing-key",
    "export-checkpoint", "maintain-audit", "archive-audit", "list-refreshes",
    "watch-refreshes", "run-refresh-worker",
    "refresh-token", "prune-refreshes", "generate-encryption-key", "list-encryption-keys",
    "rotate-encryption-key", "import-account", "export-account",
)  # fmt: skip
COMMAND = [sys.executable, "-W", "error", "-m", "tiger_db"]

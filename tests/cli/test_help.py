"""Help of the commands, and the imports that it needs."""

import re
import subprocess
import sys

import pytest

from tests.support.command_line import COMMANDS, CommandLine
from tiger_db import __all__ as names

SLOW = {
    "alembic", "asyncio", "asyncpg", "cryptography", "passlib", "pydantic", "sqlalchemy",
    "sqlmodel",
}  # fmt: skip
LOADED = (
    "import sys; sys.argv[0] = 'tiger-db'\n"
    "try:\n"
    "    from tiger_db.cli import main; main()\n"
    "finally:\n"
    "    print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)\n"
)


@pytest.mark.parametrize("command", [None, "create-account", "list-events", "init"])
@pytest.mark.slow
def test_help_imports_no_slow_module(bare: CommandLine, command: str | None) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADED, *([command] if command else []), "--help"],
        capture_output=True, check=True, text=True, env=bare.environment(),
    )  # fmt: skip
    loaded = set(done.stderr.split())
    assert "tiger_db" in loaded
    # typer imports pydantic for the options of a command.
    assert not loaded & (SLOW - {"pydantic"} if command else SLOW)


@pytest.mark.slow
def test_help_lists_all_commands(bare: CommandLine) -> None:
    shown = bare.ok("--help").out
    assert max(map(len, shown.splitlines())) <= 80
    assert bare.ok("--version").out.startswith("tiger-db ")
    for name in COMMANDS:
        assert re.search(rf"│ {name} ", shown), name
        assert "Usage: tiger-db " + name in bare.ok(name, "--help").out
    for panel in (
        "Database", "Accounts", "API keys", "Audit trail", "Token refreshes", "Encryption keys",
        "Tiger's files",
    ):  # fmt: skip
        assert f"─ {panel} ─" in shown
    listed = re.findall(r"^│ ([a-z][a-z-]+)", shown, re.MULTILINE)
    assert listed == list(COMMANDS)
    assert bare().out.strip() == shown.strip()


@pytest.mark.slow
def test_the_package_imports_its_names_lazily(bare: CommandLine) -> None:
    code = (
        "import sys, tiger_db\n"
        f"assert not {SLOW!r} & {{name.partition('.')[0] for name in sys.modules}}\n"
        "assert set(tiger_db.__all__) < set(dir(tiger_db))\n"
        "from tiger_db import *\n"
        f"assert all(getattr(tiger_db, name) is globals()[name] for name in {names!r})\n"
        "assert tiger_db.TigerAccount is tiger_db.models.TigerAccount\n"
        "assert tiger_db.crud.accounts.create and tiger_db.errors.NotFound\n"
        "assert tiger_db.settings.Settings is tiger_db.Settings\n"
        "assert not hasattr(tiger_db, 'nonsense')\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=bare.environment())

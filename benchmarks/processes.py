"""Benchmarks of the start of processes: imports and commands."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.work import Work
from tiger_db import Settings, embedded

STARTS = 31  # processes of each program
NAMES = "import all public names, compared with the libraries"
LIST = "tiger-db list-accounts, compared with SQLModel and asyncpg"
# The libraries without which no public name can be imported: SQLModel and the types and the dialect
# of PostgreSQL (entities), pydantic-settings (`Settings`), cryptography (`Secret`), and uuid-utils
# (ids). Libraries that tiger_db imports at their first use, such as Alembic and passlib, are left
# out.
_LIBRARIES = """
import asyncpg, pydantic_settings, sqlalchemy.dialects.postgresql.asyncpg
import sqlmodel.ext.asyncio.session, uuid_utils.compat
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
"""
_EMPTY = """
import typer
app = typer.Typer()
@app.command()
def nothing() -> None:
    pass
app()
"""
# What a user of SQLModel writes by hand to list the accounts.
_BARE_LIST = """
import asyncio, json, sys
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Field, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

class Account(SQLModel, table=True):
    __tablename__ = "tiger_accounts"
    id: str = Field(primary_key=True)
    account_number: str
    account_name: str
    account_type: str
    environment: str
    status: str
    error_count: int

async def main():
    arguments = json.loads(sys.argv[1])
    engine = create_async_engine("postgresql+asyncpg://", connect_args=arguments)
    async with AsyncSession(engine) as session:
        for account in await session.exec(select(Account).order_by(Account.id.desc()).limit(51)):
            print(account.account_number, account.account_name, account.account_type,
                account.environment, account.status, account.error_count)
    await engine.dispose()

asyncio.run(main())
"""


def import_work() -> Work:
    return Work(
        NAMES,
        _process(["-c", "from tiger_db import *"]),
        _process(["-c", _LIBRARIES]),
        times=1,
    )


@contextmanager
def command_work() -> Iterator[Work]:
    """Yield the benchmark of a command on an embedded server with three accounts."""
    with tempfile.TemporaryDirectory(prefix="tiger_db_") as home:
        Path(home).chmod(0o755)  # for the server, if root runs the benchmark
        keep = {"PATH", "HOME", "TMPDIR", "PYTHONPATH"}
        environment = {n: text for n, text in os.environ.items() if n in keep}
        environment["TIGER_DB_HOME"] = home
        _run(["-m", "tiger_db", "init"], environment)
        try:
            for number in range(3):
                account = ["--account-number", f"U{number}", "--account-name", "Bench"]
                secrets = ["--tiger-id", "20150001", "--private-key", "bench"]
                _run(["-m", "tiger_db", "create-account", *account, *secrets], environment)
            settings = Settings(tiger_db_home=Path(home))
            arguments = embedded.start(settings).connect_args(settings)
            given = {name: arguments[name] for name in ("host", "user", "database")}
            given["password"] = arguments["password"].get_secret_value()
            yield Work(
                LIST,
                _process(["-m", "tiger_db", "list-accounts"], environment),
                _process(["-c", _BARE_LIST, json.dumps(given)], environment),
                times=1,
            )
        finally:
            _run(["-m", "tiger_db", "stop-embedded"], environment)


def _process(
    program: list[str], environment: Mapping[str, str] | None = None
) -> Callable[[], Awaitable[object]]:
    async def run() -> None:
        _run(program, environment)

    return run


def _run(program: list[str], environment: Mapping[str, str] | None = None) -> None:
    subprocess.run(
        [sys.executable, *program], check=True, stdout=subprocess.DEVNULL, env=environment
    )


def facts() -> Iterator[str]:
    ours, nothing = _starts(["-c", "import tiger_db"], ["-c", ""])
    yield (
        f"A process with `import tiger_db`: {ours * 1000:.0f} ms, because names are loaded at first"
        f" use. A process without imports: {nothing * 1000:.0f} ms."
    )
    ours, empty = _starts(["-m", "tiger_db", "--help"], ["-c", _EMPTY, "--help"])
    yield (
        f"`tiger-db --help`: {ours * 1000:.0f} ms, {ours / empty:.2f} times as long as an empty"
        f" typer application ({empty * 1000:.0f} ms)."
    )


def _starts(*programs: list[str]) -> list[float]:
    """Return the median seconds of a process of each program; the programs take turns."""
    taken: list[list[float]] = [[] for _ in programs]
    for _ in range(STARTS):
        for program, seconds in zip(programs, taken, strict=True):
            start = time.perf_counter()
            _run(program)
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]

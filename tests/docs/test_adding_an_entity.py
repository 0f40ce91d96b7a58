"""docs/adding-an-entity.md, followed to the letter in a copy of this repository."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.docs.pages import IN_THIS_PACKAGE, NAMED_BLOCK, ROOT
from tests.docs.schema import PAGE as SCHEMA
from tiger_db.connections import maintenance_engine
from tiger_db.settings import Settings
from tiger_db.testing import servers

LEFT_BEHIND = shutil.ignore_patterns(
    ".git", ".venv*", ".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__"
)
# Of all the tests, those that the page is about.
TESTS = (
    "tests/crud/test_watchlists.py tests/crud/test_indexes.py tests/docs/test_schema.py"
    " tests/models tests/test_health.py tests/test_imports.py"
    " -k 'watchlist or every_index or up_to_date or estimates or no_other or test_imports' -n 0"
)
# What a caller writes, with the types that it may rely on.
CALLER = """
import asyncio
from typing import assert_type

from tiger_db import Page, TigerAccount, Watchlist, crud, get_session


async def main() -> None:
    async with get_session() as session:
        account = TigerAccount(
            account_name="Main",
            account_number="51230321",
            tiger_id="20150001",
            private_key="test_key",
        )
        await crud.accounts.create(session, account)
        made = Watchlist(tiger_account_id=account.id, name="Tech")
        assert_type(await crud.watchlists.create(session, made), Watchlist)
        await crud.watchlists.set_symbols(session, made.id, ["AAPL"])
    async with get_session() as session:
        page = await crud.watchlists.list_watchlists(session, account_id=account.id)
        assert_type(page, Page[Watchlist])
        assert_type(page.items[0].symbols, list[str])
        print([(found.name, found.symbols) for found in page])


asyncio.run(main())
"""


@dataclass(frozen=True)
class Copy:
    """A copy of this repository, and what its commands find in their environment."""

    folder: Path
    environ: dict[str, str]

    def write(self, file: str, text: str) -> None:
        path = self.folder / file
        assert not path.exists(), f"{file} is there already"
        path.write_text(text, encoding="utf-8")

    def change(self, file: str, diff: str) -> None:
        path = self.folder / file
        source = "\n" + path.read_text(encoding="utf-8")
        for change in diff.split("@@\n"):
            lines = change.splitlines(keepends=True)
            before = "\n" + "".join(line[1:] for line in lines if line[0] in " -")
            after = "\n" + "".join(line[1:] for line in lines if line[0] in " +")
            assert source.count(before) == 1, f"{file} does not have, once:{before}"
            source = source.replace(before, after)
        path.write_text(source[1:], encoding="utf-8")

    def run(self, command: str) -> str:
        """What a command prints, if it works; `make` takes this environment as it is."""
        make = f"make -o '{sys.prefix}/.ready' VENV='{sys.prefix}' ARGS=\"{TESTS}\""
        command = re.sub(r"^make\b", make, command)
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environ, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def follow(self) -> None:
        """Do what the page says."""
        for file, language, block in NAMED_BLOCK.findall(IN_THIS_PACKAGE):
            match language:
                case "python":
                    self.write(file, block)
                case "diff":
                    self.change(file, block)
                case _:
                    assert (file, language) == ("", "sh")
                    for command in block.splitlines():
                        self.run(command)


def copied(folder: Path, settings: Settings, server_url: str) -> Copy:
    shutil.copytree(ROOT, folder, ignore=LEFT_BEHIND)
    assert settings.database_url is not None
    assert settings.encryption_keys is not None
    # Not those by which this run's own processes know each other.
    ours = {name for name in os.environ if name.startswith("PYTEST_")}
    ours |= {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
    environ = {name: value for name, value in os.environ.items() if name not in ours} | {
        "PYTHONPATH": str(folder),
        "DATABASE_URL": settings.database_url.get_secret_value(),
        "ENCRYPTION_KEYS": settings.encryption_keys.get_secret_value(),
        servers.GIVEN: server_url,
    }
    return Copy(folder, environ)


@pytest.mark.slow
async def test_who_follows_the_page_has_a_new_entity(
    clone_settings: Settings, server_url: str, tmp_path: Path
) -> None:
    copy = await asyncio.to_thread(copied, tmp_path / "tiger_db", clone_settings, server_url)
    await asyncio.to_thread(copy.follow)

    (migration,) = (copy.folder / "alembic" / "versions").glob("*_watchlists.py")
    upgrade = migration.read_text().partition("def upgrade")[2].partition("def downgrade")[0]
    assert re.findall(r"op\.(\w+)", upgrade.replace("op.f(", "")) == ["create_table", "execute"]
    assert "CREATE TRIGGER set_updated_at" in upgrade
    async with maintenance_engine(clone_settings) as engine, engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM watchlists")) == 0
    assert "## watchlists" in (copy.folder / SCHEMA.relative_to(ROOT)).read_text()

    copy.write("caller.py", CALLER)
    await asyncio.to_thread(copy.run, f"'{sys.executable}' -m mypy --strict caller.py")
    printed = await asyncio.to_thread(copy.run, f"'{sys.executable}' -W error caller.py")
    assert printed == "[('Tech', ['AAPL'])]\n"

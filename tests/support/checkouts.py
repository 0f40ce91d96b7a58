"""This checkout and copies of it, with a database each, in which commands are run."""

import asyncio
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tiger_db import Settings

ROOT = Path(__file__).parents[2]
MODELS = "tiger_db/models"


@dataclass(frozen=True)
class Checkout:
    """A folder with the package and its migrations, and its database."""

    folder: Path
    settings: Settings

    async def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(self._run, command)

    def _run(self, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        assert self.settings.database_url
        assert self.settings.encryption_keys
        given = {
            "DATABASE_URL": self.settings.database_url.get_secret_value(),
            "ENCRYPTION_KEYS": self.settings.encryption_keys.get_secret_value(),
            "PYTHONPATH": str(self.folder),
        }
        return subprocess.run(
            command,
            cwd=self.folder,
            env=os.environ | given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    async def alembic(self, *arguments: str) -> str:
        """Run a command that must succeed, and return its output."""
        done = await self.run(str(Path(sys.executable).with_name("alembic")), *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def change(self, file: str, old: str, new: str) -> None:
        path = self.folder / MODELS / file
        before = path.read_text()
        assert before.count(old) == 1
        path.write_text(before.replace(old, new))


def copied(folder: Path, settings: Settings) -> Checkout:
    for name in ("tiger_db", "alembic"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("alembic.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return Checkout(folder, settings)

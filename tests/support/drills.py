"""An installation that outlives its servers: keys in a file, a folder of checkpoints, a load."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.support import factories
from tests.support.clusters import Server
from tests.support.command_line import Result
from tests.support.forks import run_python
from tiger_db import Database, Settings, audit
from tiger_db.encryption import generate_key
from tiger_db.errors import DatabaseUnavailable, InvalidState, OutcomeUnknown
from tiger_db.signing import generate_signing_key
from tiger_db.testing import environment_of


@dataclass(frozen=True)
class Installation:
    """The backup of the keys, which is apart from the database, and the folder of checkpoints."""

    keys: Path
    checkpoints: Path

    @classmethod
    def create(cls, folder: Path) -> "Installation":
        keys = {
            "encryption_keys": f"{generate_key()}:v2",
            "api_key_peppers": generate_key(),
            "audit_signing_key": generate_signing_key(),
        }
        made = cls(folder / "keys.json", folder / "checkpoints")
        made.keys.write_text(json.dumps(keys))
        made.checkpoints.mkdir()
        return made

    def settings(self, *servers: Server, **changed: object) -> Settings:
        options: dict[str, object] = {
            "db_host": ",".join(server.location for server in servers) or None,
            "audit_checkpoints": self.checkpoints,
            **json.loads(self.keys.read_text()),
            **changed,
        }
        return Settings.model_validate(options)


def run_command(settings: Settings, *arguments: str) -> Result:
    """Run `tiger-db` in a process of its own."""
    names = {name.upper() for name in Settings.model_fields}
    own = {name: value for name, value in os.environ.items() if name.upper() not in names}
    done = run_python("-m", "tiger_db", *arguments, env=own | environment_of(settings))
    return Result(done.returncode, done.stdout, done.stderr)


@dataclass
class Load:
    """Writers and a sealer that run until the end of the block, also through a failover."""

    database: Database
    # Account numbers, with the times before the start and after the end of their transactions.
    acknowledged: dict[str, tuple[datetime, datetime]] = field(default_factory=dict)
    sealed: int = 0  # Number of seals.
    refused: list[str] = field(default_factory=list)  # Errors of the sealer but lost connections.
    _done: asyncio.Event = field(default_factory=asyncio.Event)

    async def _write(self) -> None:
        while not self._done.is_set():
            name = factories.account_number()
            begun = datetime.now(UTC)
            try:
                async with self.database.session() as session:
                    await factories.account(session, account_number=name)
            except (DatabaseUnavailable, OutcomeUnknown):
                await asyncio.sleep(0.01)
            else:
                self.acknowledged[name] = begun, datetime.now(UTC)

    async def _seal(self) -> None:
        while not self._done.is_set():
            try:
                self.sealed += (await audit.seal(self.database)).seals
            except DatabaseUnavailable:
                pass
            except InvalidState as error:
                self.refused.append(str(error))
            await asyncio.sleep(0.1)

    def has_written(self, number: int) -> bool:
        return len(self.acknowledged) >= number

    def has_sealed(self, number: int) -> bool:
        return self.sealed >= number


@asynccontextmanager
async def load(settings: Settings, *, writers: int = 4, seals: bool = True) -> AsyncIterator[Load]:
    async with Database(settings) as database, asyncio.TaskGroup() as tasks:
        running = Load(database)
        for _ in range(writers):
            tasks.create_task(running._write())
        if seals:
            tasks.create_task(running._seal())
        try:
            yield running
        finally:
            running._done.set()

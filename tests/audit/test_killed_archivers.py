"""An archiver that is killed at any line of the source loses nothing, and the next one goes on."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.support.archives import archive_settings, files_in, put_old_months
from tests.support.worker_processes import environment
from tiger_db import Database, Settings, audit
from tiger_db.connections import connect

LINES = 400  # more than `maintain` runs
KILLS = LINES if os.environ.get("TIGER_DB_SOAK") else 5


@pytest.mark.slow
async def test_an_archiver_killed_at_any_line_loses_nothing(
    clone_settings: Settings, tmp_path: Path
) -> None:
    seed = int(os.environ.get("TIGER_DB_SEED") or Random().randrange(2**32))
    print(f"again with TIGER_DB_SEED={seed}")  # noqa: T201
    (tmp_path / "archive").mkdir()
    settings = archive_settings(clone_settings, str(tmp_path / "archive"))
    other = await connect(settings)
    async with Database(settings) as database:
        await put_old_months(database, other)
        await other.close()
        numbers = [*sorted(Random(seed).sample(range(1, LINES), KILLS - 1)), 10**9]
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "tests.support.killed_archivers", json.dumps(numbers)],
            env=environment(settings),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        runs = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
        assert len(runs) == KILLS, done.stderr
        assert runs[0][0] == signal.SIGKILL
        assert runs[-1][0] == 0
        for number, (_, findings, rows, archived) in zip(numbers, runs, strict=True):
            # Each event of a retired month is in the archive, with an event of the retirement.
            assert (findings, rows) == (0, 6 - archived + archived // 3), (number, runs)
        assert runs[-1][3] == 6
        assert len(files_in(tmp_path / "archive")) == 4
        assert (await audit.verify(database, archive=True)).findings == []

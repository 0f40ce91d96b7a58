"""Environment of worker processes."""

import os
from pathlib import Path

from tiger_db import Settings
from tiger_db.testing import environment_of

ROOT = Path(__file__).parents[2]


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment variables of a process that uses this database."""
    return {**os.environ, **environment_of(settings), "PYTHONPATH": str(ROOT)}

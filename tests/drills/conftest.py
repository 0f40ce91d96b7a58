"""Fixtures: a folder for the servers of a drill, and an installation that outlives them."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.drills import Installation
from tiger_db.testing import servers


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that the user postgres owns."""
    folder = servers.short_folder()
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation.create(tmp_path)

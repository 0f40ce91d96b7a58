"""Fixtures of the tests of migrations."""

from pathlib import Path

import pytest

from tests.support.checkouts import Checkout, copied
from tiger_db import Settings


@pytest.fixture
def checkout(tmp_path: Path, clone_settings: Settings) -> Checkout:
    """An unchanged copy with a migrated database."""
    return copied(tmp_path, clone_settings)

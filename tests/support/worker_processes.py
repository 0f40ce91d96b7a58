"""Environment of worker processes."""

import os
from pathlib import Path

from tiger_db import (
    Settings,
)

ROOT = Path(__file__).parents[2]


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment variables of a process that uses this database."""
    assert settings.database_url is not None
    assert settings.encryption_keys is not None
    assert settings.api_key_peppers is not None
    return {
        **os.environ,
        "DATABASE_URL": settings.database_url.get_secret_value(),
        "ENCRYPTION_KEYS": settings.encryption_keys.get_secret_value(),
        "API_KEY_PEPPERS": settings.api_key_peppers.get_secret_value(),
        "PYTHONPATH": str(ROOT),
    }

"""Settings that are refused, and what they must not show."""

import pytest

from tiger_db.errors import ConfigurationError
from tiger_db.settings import Settings

SECRET = "Kx9-never-shown"


def refused(**values: object) -> str:
    """The error's message, which is one line."""
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    assert "\n" not in str(caught.value)
    return str(caught.value)

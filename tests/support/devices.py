"""Device nodes of a test's own folder."""

import os
import stat
from pathlib import Path

import pytest


def device(path: Path, kind: int, major: int, minor: int) -> Path:
    try:
        os.mknod(path, kind | 0o600, os.makedev(major, minor))
        if kind == stat.S_IFCHR:
            os.close(os.open(path, os.O_WRONLY))  # refused where the file system has no devices
    except PermissionError:
        pytest.skip("devices cannot be made here")
    return path

"""Files and folders of one user alone, written so that a crash leaves all of them or nothing."""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tiger_db.errors import EmbeddedError

# Begins the name of everything that is renamed once it is whole, and may be removed before.
UNFINISHED = ".tiger_db-unfinished-"


def private_opener(path: str, flags: int) -> int:
    """For `open`: a new file is private, and a symbolic link is refused."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def keep_secret(path: Path, make: Callable[[], str]) -> str:
    """The text of the file, which `make` provides if it is missing; for one process at a time."""
    if not os.path.lexists(path):
        temporary = path.with_name(f"{UNFINISHED}{path.name}")
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", encoding="utf-8", opener=private_opener) as file:
            file.write(make())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    return read_secret(path)


def read_secret(path: Path) -> str:
    """The text of the file.

    Raises:
        EmbeddedError: others could have read or written it, or it is no text.
        OSError: it cannot be read.
    """
    with open(path, encoding="utf-8", opener=private_opener) as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise EmbeddedError(f"{path} must be yours and have mode 0600")
        try:
            return file.read()
        except UnicodeDecodeError:
            raise EmbeddedError(f"{path} is damaged: it is not text") from None


def sync_folder(path: Path) -> None:
    """Let a rename in it survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_private_folder(path: Path, uid: int) -> bool:
    """Whether it is a folder, and no link to one, that this user alone can enter."""
    with suppress(OSError):
        status = path.lstat()
        kind_and_mode = status.st_mode & ~stat.S_ISGID  # which folders inherit
        return (kind_and_mode, status.st_uid) == (stat.S_IFDIR | 0o700, uid)
    return False

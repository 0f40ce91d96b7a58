"""Output files: written whole or not at all, and never in place of a device or a pipe."""

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from tiger_db.errors import AlreadyExists, InvalidValue
from tiger_db.local_postgres.private_files import UNFINISHED, sync_folder

_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)", re.ASCII)  # /dev/stdout is a link to one
_MOST_LINKS = 40  # as Linux follows
_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def output_files(
    *paths: Path, overwrite: bool, without: Path | None = None
) -> Iterator[list[IO[str]]]:
    """Open files for writing UTF-8 text; in the end all of them are there, or no new one is.

    Symbolic links are followed. A file appears when it is complete, for its owner alone (0600), and
    so does one that replaces another, which needs `overwrite`. A pipe or a device is written into,
    as by a shell's redirection: a pipe is waited for until it has a reader. `without` is a file or
    link that goes when the others are there.

    Raises:
        AlreadyExists: a file, folder or block device is there and `overwrite` is false, or a link
            whose target is missing; names the path.
        InvalidValue: a socket is there.
        OSError: a file cannot be written; names the path.
    """
    with ExitStack() as cleanup, ExitStack() as undo:
        outputs = [_open(path, cleanup, overwrite=overwrite) for path in paths]
        yield [file for file, _, _ in outputs]
        for file, unfinished, _ in outputs:
            file.flush()
            if unfinished is not None:
                os.fsync(file.fileno())
            file.close()
        for _, unfinished, target in outputs:
            if unfinished is not None:
                _put(unfinished, target, undo, overwrite=overwrite)
        if without is not None and os.path.lexists(without) and not _is_stream(without.lstat()):
            without.unlink()
        for folder in {target.parent for _, unfinished, target in outputs if unfinished}:
            sync_folder(folder)
        undo.pop_all()


def check_output(path: Path, *, overwrite: bool) -> os.stat_result | None:
    """Return the status of what is there to be written into; None: a file is to be made.

    Raises:
        AlreadyExists, InvalidValue, OSError: see `output_files`.
    """
    try:
        found = path.stat()  # follows links, unless the system protects a shared folder
    except FileNotFoundError:
        if path.is_symlink():
            raise AlreadyExists(f"{path} is a link whose target is missing") from None
        return None
    if stat.S_ISSOCK(found.st_mode):
        raise InvalidValue(f"{path} is a socket: nothing can be written there")
    if not overwrite and not _is_stream(found) and _descriptor(path) is None:
        raise AlreadyExists(f"{path} is there already: --overwrite replaces it")
    return found


def _open(path: Path, cleanup: ExitStack, *, overwrite: bool) -> tuple[IO[str], Path | None, Path]:
    """Open one output. Returns the file, its temporary path or None, and its final path."""
    descriptor, unfinished, target = _descriptor(path), None, _followed(path)
    try:
        found = check_output(path, overwrite=overwrite)
        if descriptor is not None:
            # Only one that the caller's shell has opened: others are connections of this process.
            descriptor = os.dup(descriptor if os.get_inheritable(descriptor) else -1)
        elif found is None or stat.S_ISREG(found.st_mode):
            descriptor, name = tempfile.mkstemp(prefix=UNFINISHED, dir=target.parent)  # mode 0600
            unfinished = Path(name)
            cleanup.callback(unfinished.unlink, missing_ok=True)
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    file = cleanup.enter_context(os.fdopen(descriptor, "w", encoding="utf-8", newline=""))
    if (
        unfinished is None
        and found is not None
        and not os.path.samestat(found, os.fstat(file.fileno()))
    ):
        raise AlreadyExists(f"{path} was replaced meanwhile")
    return file, unfinished, target


def _put(unfinished: Path, target: Path, undo: ExitStack, *, overwrite: bool) -> None:
    """Give a complete file its name."""
    try:
        target.hardlink_to(unfinished)  # which, unlike a rename, never replaces anything
        undo.callback(target.unlink)
    except OSError as error:
        if error.errno not in {errno.EEXIST, *_NO_HARD_LINKS}:
            raise
        if os.path.lexists(target) and not (overwrite and stat.S_ISREG(target.lstat().st_mode)):
            raise AlreadyExists(f"{target} is there already") from None
        unfinished.replace(target)


def _followed(path: Path) -> Path:
    """Return where links lead, at most to a descriptor of this process."""
    for _ in range(_MOST_LINKS):
        if _DESCRIPTOR.fullmatch(str(path)) or not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return path


def _is_stream(found: os.stat_result) -> bool:
    return stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode)


def _descriptor(path: Path) -> int | None:
    found = _DESCRIPTOR.fullmatch(str(_followed(path)))
    return None if found is None else int(found[1])

"""Private files (mode 0600) that are written atomically.

A device or a pipe is never replaced by a file: output goes to the existing device or pipe.
"""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from tiger_db.errors import AlreadyExists, FileError, InvalidValue

# Prefix of the temporary names of incomplete files and folders.
UNFINISHED = ".tiger_db-unfinished-"
# `_DESCRIPTOR` matches the path of a file descriptor, such as the target of the link /dev/stdout.
_DESCRIPTOR = "/(?:dev|proc/self)/fd/([0-9]+)"
# Windows has access control lists instead of file modes.
HAS_FILE_MODES = hasattr(os, "geteuid")
_MAX_SYMLINKS = 40  # maximum number of symbolic links to follow, as in Linux
# The errors of file systems, such as mounted object stores, that have no hard links or no fsync().
# For hard links, EINVAL is the error of Windows.
_UNSUPPORTED_ERRORS = {
    errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP,
}  # fmt: skip


@contextmanager
def output_files(
    *paths: Path, overwrite: bool, obsolete: Path | None = None
) -> Iterator[list[IO[str]]]:
    """Open output files for UTF-8 text. If an error occurs, `output_files` creates no file.

    `output_files` follows symbolic links, and replaces existing files only if `overwrite` is true.
    A new file has mode 0600, and has a temporary name until the file is complete. Output to a pipe
    or a device works as in a shell redirection. Opening a pipe blocks until the pipe has a reader.
    After all output files are written, `output_files` removes the file or symbolic link `obsolete`.

    Raises:
        AlreadyExists: an output path is a file, folder or block device and `overwrite` is false, or
            is a symbolic link whose target is missing. The error message names the path.
        InvalidValue: an output path is a socket.
        OSError: an output file cannot be written. The error message names the path.
    """
    with ExitStack() as cleanup, ExitStack() as undo:
        outputs = [_open(path, cleanup, overwrite=overwrite) for path in paths]
        yield [file for file, _, _ in outputs]
        for file, unfinished, target in outputs:
            try:
                file.flush()
                if unfinished is not None:
                    _sync(file.fileno())
                file.close()
            except OSError as error:
                with suppress(OSError):
                    file.close()
                raise OSError(error.errno, error.strerror, str(target)) from None
        for _, unfinished, target in outputs:
            if unfinished is not None:
                _put(unfinished, target, undo, overwrite=overwrite)
        if obsolete is not None and os.path.lexists(obsolete) and not _is_stream(obsolete.lstat()):
            obsolete.unlink()
        for folder in {target.parent for _, unfinished, target in outputs if unfinished}:
            sync_path(folder)
        undo.pop_all()


@contextmanager
def file_errors() -> Iterator[None]:
    """Convert each OSError of a `with` block to FileError."""
    try:
        yield
    except OSError as error:
        text = error.strerror or type(error).__name__
        raise FileError(f"{text}: {error.filename}" if error.filename else text) from None


def write_private(
    folder: Path, texts: Mapping[str, str], *, overwrite: bool, obsolete: str | None = None
) -> list[Path]:
    """Write private files to a folder, and return the paths. `texts` maps file names to contents.

    If `overwrite` is true, `write_private` replaces existing files, and removes the file
    `obsolete`.

    Raises:
        AlreadyExists, InvalidValue, OSError: a file cannot be written, as documented for
            `output_files`.
    """
    paths = [folder / name for name in texts]
    path = folder / obsolete if overwrite and obsolete is not None else None
    with output_files(*paths, overwrite=overwrite, obsolete=path) as files:
        for file, text in zip(files, texts.values(), strict=True):
            file.write(text)
    return paths


def make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parent folders, with mode 0700."""
    if not folder.is_dir():
        make_private_folder(folder.parent)
        folder.mkdir(mode=0o700)


def is_private_folder(path: Path, uid: int) -> bool:
    """Return whether a path is a folder, not a symbolic link, with owner `uid` and mode 0700."""
    with suppress(OSError):
        status = path.lstat()
        kind_and_mode = status.st_mode & ~stat.S_ISGID  # a new folder can inherit the setgid bit
        return (kind_and_mode, status.st_uid) == (stat.S_IFDIR | 0o700, uid)
    return False


def private_opener(path: str, flags: int) -> int:
    """Open a file, and return the file's descriptor.

    Pass `private_opener` to Python's function `open()` as the argument `opener`. A new file has
    mode 0600.

    If the path is a symbolic link, raise OSError.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def remove_unfinished(folder: Path) -> None:
    """Remove incomplete files and folders that killed processes left in a folder."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Write a file, or the directory entries of a folder, to the disk with fsync().

    Windows cannot open a folder, and writes the directory entries without fsync().
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_ERRORS:
            raise


def check_output(path: Path, *, overwrite: bool) -> os.stat_result | None:
    """Check an output path. Return the file status of the path, or None if the path does not exist.

    Raises:
        AlreadyExists, InvalidValue, OSError: the output path is not allowed, as documented for
            `output_files`.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise AlreadyExists(f"{path} is a symbolic link whose target is missing") from None
        return None
    if stat.S_ISSOCK(found.st_mode):
        raise InvalidValue(f"{path} is a socket, and output to a socket is not supported")
    if not overwrite and not _is_stream(found) and _descriptor(path) is None:
        raise AlreadyExists(f"{path} already exists: --overwrite replaces it")
    return found


def _open(path: Path, cleanup: ExitStack, *, overwrite: bool) -> tuple[IO[str], Path | None, Path]:
    """Open an output file. Return the file, its temporary path or None, and its final path."""
    descriptor, unfinished, target = _descriptor(path), None, _followed(path)
    try:
        found = check_output(path, overwrite=overwrite)
        if descriptor is not None:
            # A file descriptor that this process has not inherited is not inheritable either. If a
            # file descriptor is not inheritable, dup() gets the number -1 instead, and raises
            # OSError.
            descriptor = os.dup(descriptor if os.get_inheritable(descriptor) else -1)
        elif found is None or stat.S_ISREG(found.st_mode):
            descriptor, name = tempfile.mkstemp(prefix=UNFINISHED, dir=target.parent)
            unfinished = Path(name)
            cleanup.callback(unfinished.unlink, missing_ok=True)
        else:
            descriptor = os.open(path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    file = cleanup.enter_context(os.fdopen(descriptor, "w", encoding="utf-8", newline=""))
    if (
        unfinished is None
        and found is not None
        and not os.path.samestat(found, os.fstat(file.fileno()))
    ):
        raise AlreadyExists(f"{path} was replaced by another file meanwhile: try again")
    return file, unfinished, target


def _put(unfinished: Path, target: Path, undo: ExitStack, *, overwrite: bool) -> None:
    """Move a complete file to its final path."""
    try:
        target.hardlink_to(unfinished)  # unlike a rename, a hard link never replaces a file
        undo.callback(target.unlink)
    except OSError as error:
        if error.errno not in {errno.EEXIST, *_UNSUPPORTED_ERRORS}:
            raise
        if os.path.lexists(target) and not (overwrite and stat.S_ISREG(target.lstat().st_mode)):
            raise AlreadyExists(f"{target} already exists") from None
        unfinished.replace(target)


def _followed(path: Path) -> Path:
    """Resolve symbolic links, except file descriptors of this process such as /dev/fd/1."""
    for _ in range(_MAX_SYMLINKS):
        if re.fullmatch(_DESCRIPTOR, str(path)) or not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return path


def _is_stream(found: os.stat_result) -> bool:
    return stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode)


def _descriptor(path: Path) -> int | None:
    found = re.fullmatch(_DESCRIPTOR, str(_followed(path)))
    return None if found is None else int(found[1])

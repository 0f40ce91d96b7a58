"""The folders of the embedded server, and the user who owns its data.

The functions raise EmbeddedError if a folder or user cannot be used. Its message names the remedy.
"""

import hashlib
import os
import pwd
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import platformdirs

from tiger_db.embedded import processes
from tiger_db.errors import EmbeddedError
from tiger_db.files import is_private_folder
from tiger_db.settings import Settings

SOCKET_NAME = ".s.PGSQL.5432"

_SYSTEM_FOLDER = Path("/var/lib/tiger_db")
_MAX_SOCKET_PATH_BYTES = 100  # macOS allows 104 bytes, Linux 108


def configured_folder(settings: Settings) -> Path:
    """Return `TIGER_DB_HOME`, or its default, as an absolute path."""
    home = settings.tiger_db_home
    try:
        folder = home or platformdirs.user_data_path("tiger_db", appauthor=False)
        resolved = folder.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        if home is None:  # HOME is not set, and /etc/passwd has no entry for the user
            raise EmbeddedError(f"TIGER_DB_HOME is not set: {error}") from None
        raise EmbeddedError(f"TIGER_DB_HOME {str(home)!r} cannot be used: {error}") from None
    if "\n" in str(resolved):
        raise EmbeddedError(f"TIGER_DB_HOME {str(resolved)!r} must not contain a line break")
    if len(os.fsencode(resolved)) > processes.MAX_PATH_BYTES:
        raise EmbeddedError(
            f"TIGER_DB_HOME {str(resolved)!r} is longer than {processes.MAX_PATH_BYTES} bytes"
        )
    return resolved


def find_folder(configured: Path) -> Path | None:
    """Return the home folder, or None if root has not started a server yet.

    The first start by root decides between two folders; later starts must find the same data.
    """
    if os.geteuid() != 0:
        return configured
    candidates = (_system_folder(configured), configured)
    return next((folder for folder in candidates if (folder / "lock").exists()), None)


def choose_folder(configured: Path) -> Path:
    """Choose the home folder of a server that root starts for the first time."""
    reachable = _can_reach(server_user(configured), configured)
    return configured if reachable else _system_folder(configured)


def _system_folder(path: Path) -> Path:
    return _SYSTEM_FOLDER / _digest(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def server_user(home: Path) -> processes.User:
    """Return the owner of the data, or the user who will own it.

    The owner has precedence, because a user `postgres` may be added between two starts by root.
    """
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        status = (home / "data").stat()
        return status.st_uid, status.st_gid
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)[2:4]
    raise EmbeddedError("PostgreSQL refuses root, and there is no user postgres or nobody")


def _can_reach(user: processes.User, path: Path) -> bool:
    """Return whether the user can enter a folder; also True where mkdir will report the reason."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    enter = ("/bin/sh", "-c", 'cd -- "$1"', "sh", existing)
    return not existing.is_dir() or processes.run(*enter, user=user).returncode == 0


def create_home(home: Path) -> None:
    """Create the home folder if it is missing, and check its owner and mode.

    mkdir has its own umask, so that other processes never see a folder with a wrong mode.
    """
    umask = 0o022 if os.geteuid() == 0 else 0o077
    if not home.is_dir():
        mkdir = processes.run("mkdir", "-p", "--", home, umask=umask)
        if mkdir.returncode:
            why = processes.failure_reason(mkdir.stderr)
            raise EmbeddedError(
                f"the folder {home} cannot be made: {why}: set TIGER_DB_HOME to another"
            )
    status = home.stat()
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
        raise EmbeddedError(
            f"the folder {home} belongs to another user or is writable by everyone:"
            " set TIGER_DB_HOME to one of your own"
        )


def create_programs_folder(home: Path) -> Path:
    """Return the folder for a copy of PostgreSQL's programs, and create it if it is missing.

    It is `home` if the programs can run there, else a folder in the user's cache or, for root, in
    `/var/lib/tiger_db`.
    """
    if processes.can_run_from(home):
        return home
    try:
        caches = _SYSTEM_FOLDER
        if os.geteuid() != 0:
            caches = platformdirs.user_cache_path("tiger_db", appauthor=False).resolve()
        folder = caches / _digest(home)
        if processes.can_run_from(folder):
            create_home(folder)
            return folder
        why = f"nor from {str(folder)!r}"
    except (EmbeddedError, RuntimeError) as error:  # RuntimeError: the user has no home
        why = str(error)
    raise EmbeddedError(
        f"PostgreSQL's programs cannot run from {str(home)!r}: set TIGER_DB_HOME to a folder whose"
        f" path is UTF-8 text without any of {processes.UNSAFE_CHARACTERS} ({why})"
    )


def create_socket_folder(home: Path, user: processes.User) -> Path:
    """Create the private folder of the server's socket.

    It is in `home` if the path of the socket is short enough, else in the runtime folder or the
    temporary folder.
    """
    bases = (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp")  # noqa: S108
    outside = [Path(base, f"tiger_db-{user[0]}-{_digest(home)}") for base in bases if base]
    for folder in (home / "socket", *filter(Path.is_absolute, outside)):
        if len(os.fsencode(folder / SOCKET_NAME)) >= _MAX_SOCKET_PATH_BYTES:
            continue
        # The runtime folder may belong to another user, or to a login session that has ended.
        with suppress(FileNotFoundError, PermissionError):
            if _can_reach(user, folder.parent):
                _create_private_folder(folder, user)
                return folder
    raise EmbeddedError(f"no folder is short enough for the socket of {home}: set XDG_RUNTIME_DIR")


def _create_private_folder(path: Path, user: processes.User) -> None:
    with suppress(FileExistsError):
        path.mkdir(0o700)
    if os.geteuid() == 0 and is_private_folder(path, 0):
        os.chown(path, *user)
    if not is_private_folder(path, user[0]):
        raise EmbeddedError(f"the socket folder {path} was made by somebody else: remove it")

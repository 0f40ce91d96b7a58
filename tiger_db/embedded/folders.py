"""The folders of the embedded server, and the user who owns the embedded server's data.

The functions in `tiger_db.embedded.folders` raise EmbeddedError with advice if a folder or an
operating-system user cannot be used.
"""

import hashlib
import os
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
_MAX_SOCKET_PATH_BYTES = 100  # macOS allows socket paths of 104 bytes, and Linux of 108 bytes


def configured_folder(settings: Settings) -> Path:
    """Return the absolute path of `TIGER_DB_HOME`, or of the default folder.

    Raises:
        EmbeddedError: the folder cannot be used, or the system is not Linux or macOS.
    """
    if not hasattr(os, "geteuid"):  # the functions of the embedded server need a POSIX system
        raise EmbeddedError(
            "the embedded PostgreSQL runs on Linux and macOS only: set DB_HOST or DATABASE_URL"
        )
    home = settings.tiger_db_home
    try:
        folder = home or platformdirs.user_data_path("tiger_db", appauthor=False)
        resolved = folder.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        if home is None:  # HOME is not set, and /etc/passwd does not list the user
            raise EmbeddedError(
                f"TIGER_DB_HOME is not set, and there is no default folder: {error}"
            ) from None
        raise EmbeddedError(f"TIGER_DB_HOME {str(home)!r} cannot be used: {error}") from None
    if "\n" in str(resolved):
        raise EmbeddedError(f"TIGER_DB_HOME {str(resolved)!r} must not contain a line break")
    if len(os.fsencode(resolved)) > processes.MAX_PATH_BYTES:
        raise EmbeddedError(
            f"TIGER_DB_HOME {str(resolved)!r} is longer than {processes.MAX_PATH_BYTES} bytes"
        )
    return resolved


def find_folder(configured: Path) -> Path | None:
    """Return the embedded server's home folder, or None if root has not started a server yet.

    When root starts the embedded server for the first time, `choose_folder` chooses `configured`
    or a folder in `/var/lib/tiger_db`. Later starts must use the same home folder.
    """
    if os.geteuid() != 0:
        return configured
    candidates = (_system_folder(configured), configured)
    return next((folder for folder in candidates if (folder / "lock").exists()), None)


def choose_folder(configured: Path) -> Path:
    """Choose the home folder when root starts the embedded server for the first time."""
    reachable = _can_reach(server_user(configured), configured)
    return configured if reachable else _system_folder(configured)


def _system_folder(path: Path) -> Path:
    return _SYSTEM_FOLDER / _digest(path)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def server_user(home: Path) -> processes.User:
    """Return the owner of the data folder, or the future owner if the data folder is missing.

    The owner of an existing data folder stays the same if a user `postgres` is created later.
    """
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        status = (home / "data").stat()
        return status.st_uid, status.st_gid
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    import pwd  # noqa: PLC0415  # missing on Windows

    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)[2:4]
    raise EmbeddedError("PostgreSQL refuses to run as root: create a user `postgres`")


def _can_reach(user: processes.User, path: Path) -> bool:
    """Return whether the user can enter a folder or, if it is missing, its nearest existing parent.

    If the nearest existing parent is a file, return True: mkdir reports the error later.
    """
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    enter = ("/bin/sh", "-c", 'cd -- "$1"', "sh", existing)
    return not existing.is_dir() or processes.run(*enter, user=user).returncode == 0


def create_home(home: Path) -> None:
    """Create the home folder if it is missing, and check the home folder's owner and mode.

    mkdir runs in a child process with its own umask, so that the new folder never has a wrong mode.
    """
    umask = 0o022 if os.geteuid() == 0 else 0o077
    if not home.is_dir():
        mkdir = processes.run("mkdir", "-p", "--", home, umask=umask)
        if mkdir.returncode:
            why = processes.failure_reason(mkdir.stderr)
            raise EmbeddedError(
                f"the folder {home} cannot be made: {why}: set TIGER_DB_HOME to another folder"
            )
    status = home.stat()
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
        raise EmbeddedError(
            f"the folder {home} belongs to another user or is writable by everyone:"
            " set TIGER_DB_HOME to a folder of your own"
        )


def create_programs_folder(home: Path) -> Path:
    """Create the folder for a copy of PostgreSQL's programs if it is missing, and return its path.

    If PostgreSQL's programs can run from `home`, the result is `home`. If PostgreSQL's programs
    cannot run from `home`, the result is a folder in the user's cache folder or, for root, in
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
        why = f"or from {str(folder)!r}"
    except (EmbeddedError, RuntimeError) as error:  # pathlib raises RuntimeError if HOME is unknown
        why = str(error)
    raise EmbeddedError(
        f"PostgreSQL's programs cannot run from {str(home)!r} ({why}): set TIGER_DB_HOME to a"
        " folder whose path is UTF-8 text without any of the characters"
        f" {processes.UNSAFE_CHARACTERS}"
    )


def create_socket_folder(home: Path, user: processes.User) -> Path:
    """Create the private folder of the embedded server's Unix socket, and return its path.

    If the path of the socket is short enough, the socket folder is in `home`. Otherwise, the socket
    folder is in `XDG_RUNTIME_DIR` or in the temporary folder.
    """
    bases = (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp")  # noqa: S108
    outside = [Path(base, f"tiger_db-{user[0]}-{_digest(home)}") for base in bases if base]
    for folder in (home / "socket", *filter(Path.is_absolute, outside)):
        if len(os.fsencode(folder / SOCKET_NAME)) >= _MAX_SOCKET_PATH_BYTES:
            continue
        # XDG_RUNTIME_DIR can name a folder of another user, or of a login session that has ended.
        with suppress(FileNotFoundError, PermissionError):
            if _can_reach(user, folder.parent):
                _create_private_folder(folder, user)
                return folder
    raise EmbeddedError(
        f"the socket of the embedded PostgreSQL in {home} needs a folder with a shorter path:"
        " set XDG_RUNTIME_DIR to such a folder"
    )


def _create_private_folder(path: Path, user: processes.User) -> None:
    with suppress(FileExistsError):
        path.mkdir(0o700)
    if os.geteuid() == 0 and is_private_folder(path, 0):
        os.chown(path, *user)
    if not is_private_folder(path, user[0]):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == user[0]:
            raise EmbeddedError(
                f"the socket folder {path} has mode {stat.S_IMODE(status.st_mode):04o}, so that"
                " other users can replace or use the socket: run `chmod 700` on the folder"
            )
        raise EmbeddedError(
            f"the socket folder {path} belongs to another user or is not a folder: remove {path}"
        )

"""Where the embedded server's files and its socket are, and which user they are for."""

import hashlib
import os
import pwd
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import platformdirs

from tiger_db.embedded.processes import (
    LONGEST_PATH,
    UNRUNNABLE,
    User,
    can_run_from,
    reason,
    run,
)
from tiger_db.errors import EmbeddedError
from tiger_db.files import is_private_folder
from tiger_db.settings import Settings

SOCKET = ".s.PGSQL.5432"

_FOR_ROOT = Path("/var/lib/tiger_db")
_SOCKET_LIMIT = 100  # of the 104 bytes that macOS allows, and the 108 of Linux


def wanted_folder(settings: Settings) -> Path:
    """The one that the settings name, whether or not it will do.

    Raises:
        EmbeddedError: they name none that could be.
    """
    home = settings.tiger_db_home
    try:
        folder = home or platformdirs.user_data_path("tiger_db", appauthor=False)
        resolved = folder.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        if home is None:  # neither HOME is set, nor has the user an entry in /etc/passwd
            raise EmbeddedError(f"TIGER_DB_HOME is not set: {error}") from None
        raise EmbeddedError(f"TIGER_DB_HOME {str(home)!r} cannot be used: {error}") from None
    if "\n" in str(resolved):
        raise EmbeddedError(f"TIGER_DB_HOME {str(resolved)!r} must not contain a line break")
    if len(os.fsencode(resolved)) > LONGEST_PATH:
        raise EmbeddedError(f"TIGER_DB_HOME {str(resolved)!r} is longer than {LONGEST_PATH} bytes")
    return resolved


def known_folder(wanted: Path) -> Path | None:
    """Where everything is. Root's first start decides, once: a later one must find its data."""
    if os.geteuid() != 0:
        return wanted
    places = (_folder_for_root(wanted), wanted)
    return next((place for place in places if (place / "lock").exists()), None)


def new_folder(wanted: Path) -> Path:
    """Where everything will be, as long as it is nowhere yet."""
    return wanted if _can_reach(server_user(wanted), wanted) else _folder_for_root(wanted)


def _folder_for_root(wanted: Path) -> Path:
    return _FOR_ROOT / _digest(wanted)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def server_user(home: Path) -> User:
    """Who owns the data, for a user `postgres` may come and go between two starts of root.

    Raises:
        EmbeddedError: nobody could.
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


def _can_reach(user: User, path: Path) -> bool:
    """Whether the server's user can, asked by trying; True where mkdir will tell why not."""
    existing = next(place for place in (path, *path.parents) if place.exists())
    enter = ("/bin/sh", "-c", 'cd -- "$1"', "sh", existing)
    return not existing.is_dir() or run(*enter, user=user).returncode == 0


def make_home(home: Path) -> None:
    """With mkdir, whose umask is its own, so that no other process meets a half-made folder.

    Raises:
        EmbeddedError: it cannot be made, or others can write to it.
    """
    umask = 0o022 if os.geteuid() == 0 else 0o077
    if not home.is_dir() and (made := run("mkdir", "-p", "--", home, umask=umask)).returncode:
        raise EmbeddedError(
            f"the folder {home} cannot be made: {reason(made.stderr)}: set TIGER_DB_HOME to another"
        )
    status = home.stat()
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
        raise EmbeddedError(
            f"the folder {home} belongs to another user or is writable by everyone:"
            " set TIGER_DB_HOME to one of your own"
        )


def make_programs_folder(home: Path) -> Path:
    """Return the folder for a copy of the server's programs, made if it is not there.

    It is `home` if they can run from its path, else a folder for it in the user's cache or, for
    root, in `/var/lib/tiger_db`.

    Raises:
        EmbeddedError: they can run from neither, or the folder cannot be made.
    """
    if can_run_from(home):
        return home
    try:
        caches = _FOR_ROOT
        if os.geteuid() != 0:
            caches = platformdirs.user_cache_path("tiger_db", appauthor=False).resolve()
        folder = caches / _digest(home)
        if can_run_from(folder):
            make_home(folder)
            return folder
        why = f"nor from {str(folder)!r}"
    except (EmbeddedError, RuntimeError) as error:  # RuntimeError: the user has no home
        why = str(error)
    raise EmbeddedError(
        f"PostgreSQL's programs cannot run from {str(home)!r}: set TIGER_DB_HOME to a folder whose"
        f" path is UTF-8 text without any of {UNRUNNABLE} ({why})"
    )


def make_socket_folder(home: Path, user: User) -> Path:
    """In our folder where the socket's path is short enough, else in the runtime or temp folder.

    Raises:
        EmbeddedError: none will do, or somebody else made it.
    """
    bases = (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp")  # noqa: S108
    outside = [Path(base, f"tiger_db-{user[0]}-{_digest(home)}") for base in bases if base]
    for place in (home / "socket", *filter(Path.is_absolute, outside)):
        # A runtime folder may be another user's, or of a login that has ended.
        with suppress(FileNotFoundError, PermissionError):
            if len(os.fsencode(place / SOCKET)) < _SOCKET_LIMIT and _can_reach(user, place.parent):
                _make_private_folder(place, user)
                return place
    raise EmbeddedError(f"no folder is short enough for the socket of {home}: set XDG_RUNTIME_DIR")


def _make_private_folder(path: Path, user: User) -> None:
    with suppress(FileExistsError):
        path.mkdir(0o700)
    if os.geteuid() == 0 and is_private_folder(path, 0):
        os.chown(path, *user)
    if not is_private_folder(path, user[0]):
        raise EmbeddedError(f"the socket folder {path} was made by somebody else: remove it")

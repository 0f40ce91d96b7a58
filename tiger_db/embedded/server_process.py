"""The processes of the embedded server, and the server lock that these processes hold.

The server lock is a flock on the file `server.lock`. The process that starts the embedded server
takes the server lock. The postmaster, the backends and pg_ctl inherit the open file
`server.lock`. The kernel releases the server lock when no process has `server.lock` open any more.
Backends that outlive a killed postmaster still use the server's data, and still hold the server
lock.

A process ID is valid in one container only, but a flock is valid in all containers that share one
kernel. If a process can take the server lock, the previous holder of the server lock has ended,
provided that one of two conditions is met:
- The file system of `server.lock` is local. Only one kernel can mount a local file system.
- If the file system is not local, the previous holder of the server lock must have been started
  after the last boot, and must have used the same mount. A network file system can hide the locks
  of other machines and mounts.

If a user or an older release started a server without the server lock, the server counts as running
until its file `postmaster.pid` is removed. If a server crashed before its identity was recorded in
`server.lock`, the crashed server counts as running until `postmaster.pid` is removed.

The functions in `tiger_db.embedded.server_process` raise EmbeddedError if a server does not start
or stop in time, or is possibly running in another container or on another machine.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from tiger_db.embedded.folders import SOCKET_NAME
from tiger_db.embedded.processes import SERVER_TIMEOUT_SECONDS, import_psutil
from tiger_db.errors import EmbeddedError
from tiger_db.files import is_private_folder, private_opener

# Types of file systems that only one kernel at a time can mount.
_LOCAL_FILE_SYSTEMS = frozenset(
    {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "overlay", "tmpfs", "xfs", "zfs"}
)
_open_locks: set[int] = set()


class Postmaster(NamedTuple):
    """The main process of a PostgreSQL server, with the contents of its file `postmaster.pid`."""

    process: Any  # a psutil.Process, but the package psutil has no types
    identity: str
    owner: int
    socket_folder: Path
    ready: bool

    def accepts_connections(self) -> bool:
        return (
            self.ready
            # If the socket folder is not private, the socket can belong to another user's server.
            and is_private_folder(self.socket_folder, self.owner)
            and is_listening(self.socket_folder)
        )

    def interrupt(self) -> None:
        """Send SIGINT to the postmaster, which then starts PostgreSQL's fast shutdown."""
        with suppress(import_psutil().NoSuchProcess):
            self.process.send_signal(signal.SIGINT)


class Origin(NamedTuple):
    """The machine and time of a server's start, from the first lines of `server.lock`.

    In `server.lock`, the line after the origin is the identity of the server, from
    `postmaster.pid`. The identity is missing if the start of the server failed, or if the process
    that started the server was killed early. If `server.lock` has no identity, `postmaster.pid` is
    possibly from a server that still runs without the server lock.
    """

    host: str
    since: str
    boot: str  # Boot ID, or an empty text on a system without boot IDs.
    namespace: str  # PID namespace, or an empty text on a system without PID namespaces.
    device: str

    @classmethod
    def here(cls, lock: int) -> Self:
        boot = namespace = ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            namespace = str(Path("/proc/self/ns/pid").readlink())
        since = datetime.now(UTC).isoformat(" ", "seconds")
        return cls(socket.gethostname(), since, boot, namespace, str(os.fstat(lock).st_dev))


def find_ready(home: Path) -> Postmaster | None:
    """Return the embedded server if the server accepts connections, else None."""
    found = _find(home)
    return found if found and found.accepts_connections() else None


def wait_until_settled(home: Path, lock: int) -> Postmaster | None:
    """Wait until a server that another process started accepts connections, or has ended.

    Return the running server. If the server has ended, take the server lock and return None.
    """
    for _ in _poll():
        found = _find(home)
        if found is None:
            if try_lock(lock):
                return None
            _refuse_other_namespace(home, lock)
        elif found.accepts_connections():
            return found
        elif found.ready:
            # The server's socket was removed, for example at the end of a login session.
            found.interrupt()
    server = _describe_server(home, lock, held=True)
    if holders := _lock_holders(lock):
        server = f"{', '.join(holders)} of {server}"
    raise _timed_out(f"{server} still uses {home / 'data'}")


def stop(home: Path, lock: int) -> bool:
    """Stop the embedded server. Return False if the embedded server was not running."""
    found = _find(home)
    if found is None:
        if not try_lock(lock):
            _refuse_other_namespace(home, lock)
        return False
    found.interrupt()
    for _ in _poll():
        if _process(home, found.process.pid) is None:
            with suppress(OSError):
                found.socket_folder.rmdir()
            return True
    raise _timed_out(f"the embedded PostgreSQL did not stop; see {home / 'log'}")


def is_listening(socket_folder: Path) -> bool:
    """Return whether a PostgreSQL server listens on the socket in a folder."""
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.settimeout(5)
        with suppress(BlockingIOError):  # the connection queue of a listening server is full
            client.connect(str(socket_folder / SOCKET_NAME))
        return True
    return False


def remove_stale_lock_files(home: Path, socket_folder: Path, lock: int) -> None:
    """Remove the lock files that PostgreSQL wrote for a server that has ended.

    The caller of `remove_stale_lock_files` must hold the server lock. PostgreSQL does not remove an
    old lock file if another process now has the process ID in the lock file.
    """
    pid_file = home / "data" / "postmaster.pid"
    if pid_file.exists() and not _has_ended(home, lock, _identity(_pid_file_lines(home))):
        raise EmbeddedError(
            f"{_describe_server(home, lock, held=False)} may still be using {home / 'data'}:"
            f" stop that server, or remove {pid_file} if you are certain that the server has ended"
        )
    for lock_file in (pid_file, socket_folder / f"{SOCKET_NAME}.lock"):
        lock_file.unlink(missing_ok=True)


# The functions below use the file `server.lock`.


@contextmanager
def open_lock(home: Path) -> Iterator[int]:
    """Open `server.lock`. A server that inherits the open file holds the server lock."""
    lock = private_opener(str(home / "server.lock"), os.O_RDWR | os.O_CREAT)
    _open_locks.add(lock)
    try:
        yield lock
    finally:
        _open_locks.remove(lock)
        os.close(lock)


def _close_in_fork() -> None:
    """Close `server.lock` in a forked process, because a forked process can outlive the server."""
    while _open_locks:
        os.close(_open_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_fork)


def try_lock(lock: int) -> bool:
    """Take the server lock, or return False if a server's process holds the server lock."""
    import fcntl  # noqa: PLC0415  # missing on Windows

    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def record_start(lock: int) -> None:
    """Write a server's origin to `server.lock` before the server is started.

    The caller of `record_start` must hold the server lock.
    """
    os.ftruncate(lock, 0)
    os.pwrite(lock, "".join(f"{line}\n" for line in Origin.here(lock)).encode(), 0)
    # PostgreSQL flushes `postmaster.pid` to the disk. If `server.lock` were not flushed to the
    # disk, a power failure could lose the origin of the server, and keep `postmaster.pid`.
    os.fsync(lock)


def record_server(home: Path, lock: int, *, started: bool = False) -> None:
    """Write a server's identity to `server.lock` if the server holds the server lock.

    If `server.lock` already has an identity, `record_server` does nothing.

    The caller of `record_server` must hold the lock of the home folder, so that no other process
    starts a server. If `started` is true, pg_ctl has just started the server, so the server
    inherited the server lock.
    """
    if lacks_identity(lock):
        found = _find(home)
        if found and (started or _has_open(found.process, lock)):
            write_identity(lock, found.identity)


def write_identity(lock: int, identity: str) -> None:
    """Write the identity of the server that holds the server lock to `server.lock`."""
    origin, _ = _read_lock_file(lock)
    os.pwrite(lock, f"{identity}\n".encode(), sum(len(line) + 1 for line in origin))
    os.fsync(lock)


def lacks_identity(lock: int) -> bool:
    """Return whether `server.lock` has the origin of a server, but not the server's identity."""
    origin, identity = _read_lock_file(lock)
    return len(origin) == len(Origin._fields) and not identity


def _origin(lock: int, identity: str | None) -> Origin | None:
    """Return the origin of the server with the given identity, or None if no origin is recorded.

    If `identity` is None, return the origin of the last server that held the server lock.
    """
    origin, recorded = _read_lock_file(lock)
    if len(origin) < len(Origin._fields) or (identity and recorded != [identity.encode()]):
        return None
    return Origin(*(line.decode(errors="replace") for line in origin))


def _read_lock_file(lock: int) -> tuple[list[bytes], list[bytes]]:
    """Return the lines of `server.lock` with the origin, and the lines with the identity.

    A last line without a line end is omitted, because the line is possibly incomplete.
    """
    *lines, _ = os.pread(lock, 4096, 0).split(b"\n")
    return lines[: len(Origin._fields)], lines[len(Origin._fields) :]


def _refuse_other_namespace(home: Path, lock: int) -> None:
    """Raise EmbeddedError if the last holder of the server lock is in another PID namespace."""
    origin, here = _origin(lock, None), Origin.here(lock)
    if origin and (origin.boot, origin.namespace) != (here.boot, here.namespace):
        raise EmbeddedError(
            f"{_describe_server(home, lock, held=True)} is using {home / 'data'}: stop that server"
            " in its own container or on its own machine, or connect to it there"
        )


def _has_ended(home: Path, lock: int, identity: str | None) -> bool:
    """Return whether the server lock proves that the writer of `postmaster.pid` has ended.

    The caller of `_has_ended` must hold the server lock. If `postmaster.pid` is damaged, `identity`
    is None. A running postmaster stops within a minute after `postmaster.pid` was damaged.
    """
    origin, here = _origin(lock, identity), Origin.here(lock)
    if origin is None:
        return False
    same_mount = bool(here.boot) and (origin.boot, origin.device) == (here.boot, here.device)
    return same_mount or _file_system(home) in _LOCAL_FILE_SYSTEMS


def _file_system(path: Path) -> str:
    """Return the type of the file system that contains a path."""
    # The mounts are reversed, because a later mount hides an earlier mount at the same mount point.
    mounts = reversed(import_psutil().disk_partitions(all=True))
    over = [mount for mount in mounts if path.is_relative_to(mount.mountpoint)]
    return str(max(over, key=lambda mount: len(mount.mountpoint)).fstype) if over else ""


def _lock_holders(lock: int) -> list[str]:
    """Return descriptions of the processes, except this process, that hold the server lock."""
    return [
        f"process {process.pid} ({process.info['name']})"
        for process in import_psutil().process_iter(["name"])
        if process.pid != os.getpid() and _has_open(process, lock)
    ]


def _has_open(process: Any, lock: int) -> bool:  # noqa: ANN401  # psutil has no types
    """Return whether the process has `server.lock` open, and therefore holds the server lock."""
    with suppress(import_psutil().Error, OSError):
        files = [Path(file.path) for file in process.open_files()]
        return any(
            os.path.samestat(file.stat(), os.fstat(lock))
            for file in files
            if file.name == "server.lock"
        )
    return False


def _describe_server(home: Path, lock: int, *, held: bool) -> str:
    """Return a description of the server that wrote `postmaster.pid`, for an error message.

    If `held` is true, a process of the server holds the server lock, and the origin in
    `server.lock` is the origin of that server.
    """
    lines = _pid_file_lines(home)
    identity = _identity(lines)
    process = f" (process {abs(int(lines[0]))} there)" if identity else ""
    unrecorded = held and lacks_identity(lock)
    if origin := _origin(lock, None if unrecorded else identity):
        return f"the server that host {origin.host} started at {origin.since}{process}"
    started_by = "by hand, by a killed process or by an older release of tiger_db"
    return f"a server{process} that was started {started_by}"


# The functions below find the processes of the embedded server.


def _find(home: Path) -> Postmaster | None:
    """Return the server that `postmaster.pid` names if it runs in the data folder, else None."""
    lines = _pid_file_lines(home)
    identity = _identity(lines)
    process = _process(home, lines[0]) if identity else None
    if identity is None or process is None:
        return None
    socket_folder, status = Path(os.fsdecode(lines[4])), lines[7].strip()
    return Postmaster(
        process, identity, (home / "data").stat().st_uid, socket_folder, status == b"ready"
    )


def _pid_file_lines(home: Path) -> list[bytes]:
    """Return the lines of `postmaster.pid`, padded with empty lines.

    PostgreSQL's source describes the format of `postmaster.pid`:
    https://github.com/postgres/postgres/blob/REL_18_STABLE/src/include/utils/pidfile.h
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        return [*(home / "data" / "postmaster.pid").read_bytes().split(b"\n"), *[b""] * 8]
    return [b""] * 8


def _identity(lines: list[bytes]) -> str | None:
    """Return a server's identity, which is the process ID and start time in `postmaster.pid`.

    If the lines of `postmaster.pid` are damaged, the result is None. A single-user backend has a
    negative process ID in `postmaster.pid`.
    """
    pid, started = lines[0].strip(), lines[2].strip()
    valid = pid.removeprefix(b"-").isdigit() and started.isdigit()
    return f"{pid.decode()} {started.decode()}" if valid else None


def _process(home: Path, pid: bytes | int) -> Any:  # noqa: ANN401  # psutil has no types
    """Return the process `pid` if it is PostgreSQL with the data folder of `home`, else None.

    After a reboot, another process can have the recorded process ID. PostgreSQL is identified by
    its working folder, because a comparison of start times would depend on the system clock.
    """
    with suppress(import_psutil().Error, ValueError, OverflowError):
        process = import_psutil().Process(int(pid))
        if process.name() == "postgres" and _works_in(process, (home / "data").resolve()):
            return process
    return None


def _works_in(process: Any, data: Path) -> bool:  # noqa: ANN401  # psutil has no types
    try:
        return bool(process.cwd() == str(data))
    except import_psutil().AccessDenied:  # a container has no capability CAP_SYS_PTRACE by default
        arguments = process.cmdline()
        return bool(
            process.uids().real == data.stat().st_uid
            and "-D" in arguments[:-1]
            and arguments[arguments.index("-D") + 1] in {str(data), data.name}
        )


def _poll() -> Iterator[None]:
    """Yield every 20 ms until the timeout, and once after the timeout.

    The yield after the timeout allows a last check, because the machine was possibly suspended
    since the check before the timeout.
    """
    deadline = time.monotonic() + SERVER_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        yield
        time.sleep(0.02)
    yield


def _timed_out(reason: str) -> EmbeddedError:
    return EmbeddedError(f"gave up after {SERVER_TIMEOUT_SECONDS} seconds: {reason}")

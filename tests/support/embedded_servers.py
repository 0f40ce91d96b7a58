"""Embedded servers for tests: real processes that are started, killed and inspected."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import asyncpg
import platformdirs
import psutil
import pytest

from tests.support.forks import FORKS
from tests.support.passed_settings import Passed
from tests.support.waiting import wait_until
from tiger_db import embedded
from tiger_db.embedded import EmbeddedServer, folders, processes, stop
from tiger_db.embedded.folders import server_user
from tiger_db.files import UNFINISHED
from tiger_db.settings import Settings

IS_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not IS_ROOT, reason="only root drops privileges")
# Processes with all imports done. A fork of pytest would inherit its threads and files.
STARTER = """
import sys, time
from pathlib import Path
from tiger_db import embedded
from tiger_db.settings import Settings
settings = Settings(tiger_db_home=Path(sys.argv[1]), database_url=None, db_host=None)
print("starting", flush=True)
print(embedded.start(settings).pid, flush=True)
time.sleep(60)
"""
# The starter is killed when it would record the server, which continues to start.
KILLED_STARTER = """
import os, signal, sys
from pathlib import Path
from tests.support.embedded_servers import settings_for
from tiger_db import embedded
from tiger_db.embedded import server_process
server_process.write_identity = lambda lock, identity: os.kill(os.getpid(), signal.SIGKILL)
embedded.start(settings_for(Path(sys.argv[1])))
"""


def settings_for(home: Path) -> Settings:
    return Settings(tiger_db_home=home, database_url=None, db_host=None)


@contextmanager
def reachable_folder() -> Iterator[Path]:
    """Create a folder that the server's user can enter, unlike `tmp_path` of root."""
    base = Path(tempfile.mkdtemp(prefix="tiger-")).resolve()
    base.chmod(0o755)
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def discard(home: Path) -> None:
    settings = settings_for(home)
    stop(settings)
    for folder in {home, embedded.home_folder(settings), copies_outside(home)}:
        shutil.rmtree(folder, ignore_errors=True)


def copies_outside(home: Path) -> Path:
    """Return the folder of the copied programs if they cannot run from the home folder."""
    caches = platformdirs.user_cache_path("tiger_db", appauthor=False)
    return (folders._SYSTEM_FOLDER if IS_ROOT else caches) / folders._digest(home)


def install_wheel(site: Path) -> None:
    """Copy the wheel of the server to a folder for `sys.path`."""
    package, _ = processes.find_wheel()
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.exists():
            shutil.copytree(source, site / source.name, symlinks=True)


async def connect(server: EmbeddedServer, settings: Settings) -> asyncpg.Connection:
    return await asyncpg.connect(**{**server.connect_args(settings), "database": "postgres"})


def fetch(server: EmbeddedServer, settings: Settings, query: str) -> object:
    async def ask() -> object:
        connection = await connect(server, settings)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(ask())


def kill(server: EmbeddedServer) -> None:
    psutil.Process(server.pid).kill()
    wait_until(lambda: not alive(server.pid))


def alive(pid: int) -> bool:
    """Return whether a process runs. Zombies do not count; some containers keep them long."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def unfinished(home: Path) -> list[Path]:
    return list(home.glob(f"{UNFINISHED}*"))


def run_as_server(home: Path, *command: str, cwd: str | Path = "/") -> subprocess.Popen[bytes]:
    uid, gid = server_user(home)
    return subprocess.Popen(
        command,
        cwd=cwd,
        user=uid if IS_ROOT else None,
        group=gid if IS_ROOT else None,
        extra_groups=[] if IS_ROOT else None,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def server_without_lock(server: EmbeddedServer) -> Iterator[subprocess.Popen[bytes]]:
    """Replace the server by one that holds no lock, like those of older releases."""
    settings, data = settings_for(server.folder), server.folder / "data"
    command = psutil.Process(server.pid).cmdline()
    stop(settings)
    server.socket_folder.mkdir(0o700)
    if IS_ROOT:
        os.chown(server.socket_folder, *server_user(server.folder))
    with run_as_server(server.folder, *command, cwd=server.folder) as process:
        try:
            wait_until(lambda: embedded.running(settings))
            yield process
        finally:
            process.kill()
            process.wait()
            wait_until(lambda: not works_in(data))


def start_and_kill_the_starter(settings: Settings) -> EmbeddedServer:
    command = [sys.executable, "-c", KILLED_STARTER, str(settings.tiger_db_home)]
    killed = subprocess.run(command, check=False)
    assert killed.returncode == -signal.SIGKILL
    wait_until(lambda: embedded.running(settings))
    server = embedded.running(settings)
    assert server
    assert not is_recorded(server)
    return server


def is_recorded(server: EmbeddedServer) -> bool:
    """Return whether the lock file has the identity of the server."""
    pid, _, since, *_ = (server.folder / "data" / "postmaster.pid").read_text().split("\n")
    return (server.folder / "server.lock").read_text().endswith(f"\n{pid} {since}\n")


def works_in(data: Path) -> list[int]:
    """Return the processes that have the data folder of a server as working folder."""
    found = psutil.process_iter(["cwd"])
    return [process.pid for process in found if process.info["cwd"] == str(data)]


def at_once(function: Callable[[Settings], object], settings: Settings) -> list[object]:
    """Call a function in ten processes at once, and return the results. Pipes need no /dev/shm."""
    pipes = [FORKS.Pipe() for _ in range(10)]
    children = [
        FORKS.Process(target=_wait_and_answer, args=(there, function, Passed(settings)))
        for _, there in pipes
    ]
    for child, (_, there) in zip(children, pipes, strict=True):
        child.start()
        there.close()
    lines = [here for here, _ in pipes]
    assert [line.recv() for line in lines] == ["ready"] * 10
    for line in lines:
        line.send("go")
    collected = [line.recv() for line in lines]
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    return collected


def _wait_and_answer(
    line: Connection, function: Callable[[Settings], object], settings: Settings
) -> None:
    line.send("ready")
    line.recv()
    line.send(function(settings))

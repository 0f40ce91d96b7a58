"""Containers with PID namespaces of their own that share a folder, and what crashes leave there."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.embedded_servers import (
    STARTER,
    alive,
    as_root,
    discard,
    fetch,
    kill,
    reachable_folder,
    server_without_lock,
    settings_for,
    start_and_kill_the_starter,
    works_in,
)
from tests.support.waiting import wait_until
from tiger_db.embedded import EmbeddedServer, running, start, stop
from tiger_db.embedded.folders import server_user
from tiger_db.embedded.server_process import Origin
from tiger_db.errors import EmbeddedError
from tiger_db.settings import Settings

CONTAINER = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
STOPPER = """
import sys
from pathlib import Path
from tests.support.embedded_servers import settings_for
from tiger_db import embedded
embedded.stop(settings_for(Path(sys.argv[1])))
"""


def can_make_containers() -> bool:
    if not shutil.which("unshare"):
        return False
    made = subprocess.run([*CONTAINER, "--ipc", "true"], check=False, stderr=subprocess.DEVNULL)
    return made.returncode == 0


containers = pytest.mark.skipif(not can_make_containers(), reason="unshare is not allowed here")
pytestmark = pytest.mark.slow


@pytest.fixture(params=["short", "long"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose socket lies inside, or where containers do not share it."""
    with reachable_folder() as base:
        (base / "run").mkdir(mode=0o711)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "run"))
        home = base / ("home" if request.param == "short" else "long" * 25)
        yield home
        discard(home)


@contextmanager
def container(home: Path, *flags: str, code: str = STARTER) -> Iterator[subprocess.Popen[str]]:
    """A process in a PID namespace of its own; its end is the end of all processes in there."""
    runtime = home.with_name(f"run-{os.urandom(4).hex()}")
    runtime.mkdir(mode=0o711)
    command = [*CONTAINER, *flags, sys.executable, "-c", code, str(home)]
    pipe = subprocess.PIPE
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            yield process
        finally:
            inside = children_of(process)
            process.kill()
            wait_until(lambda: not any(alive(pid) for pid in inside))


def children_of(process: subprocess.Popen[str]) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    return []


def refusal(home: Path, *flags: str, code: str = STARTER) -> str:
    """The message with which a container is refused."""
    with container(home, *flags, code=code) as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1, errors
    last = str(errors.splitlines()[-1])
    assert last.startswith("tiger_db.errors.EmbeddedError: "), errors
    return last


def started(process: subprocess.Popen[str]) -> str:
    """The process ID, in the container, of the server that it has started; else an empty text."""
    assert process.stdout
    assert process.stdout.readline() == "starting\n"
    return process.stdout.readline().strip()


def keep_an_answer(home: Path) -> EmbeddedServer:
    server = start(settings_for(home))
    fetch(server, settings_for(home), "CREATE TABLE kept AS SELECT 42 AS answer")
    return server


def check_the_answer(server: EmbeddedServer, home: Path) -> None:
    assert fetch(server, settings_for(home), "SELECT answer FROM kept") == 42


@containers
@as_root
@pytest.mark.parametrize("flags", [(), ("--ipc",)], ids=["shared IPC", "own IPC"])
def test_a_second_container_neither_starts_nor_stops_the_server_of_the_first(
    place: Path, flags: tuple[str, ...]
) -> None:
    server = keep_an_answer(place)
    pid_file = place / "data" / "postmaster.pid"
    recorded = pid_file.read_bytes()
    for code in (STARTER, STOPPER):
        message = refusal(place, *flags, code=code)
        assert f"is using {place / 'data'}" in message
        assert f"host {socket.gethostname()} started at 2" in message
        assert f"(process {server.pid} there)" in message
    assert pid_file.read_bytes() == recorded
    assert running(settings_for(place)) == server
    check_the_answer(server, place)


@containers
@as_root
def test_the_end_of_a_container_leaves_the_data_to_others(place: Path) -> None:
    settings = settings_for(place)
    keep_an_answer(place)
    stop(settings)
    with container(place, "--ipc") as first:
        pid = started(first)
        assert pid, first.stderr and first.stderr.read()
        recorded = (place / "data" / "postmaster.pid").read_bytes()
        assert recorded.startswith(f"{pid}\n".encode())
        assert running(settings) is None
        for refused in (start, stop):
            with pytest.raises(EmbeddedError, match=rf"\(process {pid} there\) is using"):
                refused(settings)
        assert (place / "data" / "postmaster.pid").read_bytes() == recorded
    assert (place / "data" / "postmaster.pid").read_bytes() == recorded  # it crashed

    with container(place, "--ipc") as second:  # as a container that is restarted after a crash
        assert started(second)
    check_the_answer(start(settings), place)


@containers
@as_root
def test_of_two_containers_that_start_at_once_one_has_the_server(place: Path) -> None:
    with container(place, "--ipc") as one, container(place, "--ipc") as other:
        found = {started(process): process for process in (one, other)}
        loser = found.pop("")
        assert loser.stderr
        assert f"is using {place / 'data'}" in loser.stderr.read()
        [winner] = found.values()
        assert winner.poll() is None


@containers
@as_root
@pytest.mark.parametrize("recorded", [True, False])
def test_a_server_of_an_older_release_counts_as_running(place: Path, *, recorded: bool) -> None:
    """Whether or not this release has started one here before."""
    settings, pid_file = settings_for(place), place / "data" / "postmaster.pid"
    with server_without_lock(keep_an_answer(place)) as process:
        if not recorded:
            (place / "server.lock").unlink()
        older = start(settings)
        assert older.pid == process.pid
        written = pid_file.read_bytes()
        for flags in ((), ("--ipc",)):
            message = refusal(place, *flags)
            # Where the socket is shared, it answers.
            assert "older release" in message or f"listens in {place / 'socket'}" in message
        assert pid_file.read_bytes() == written
        assert running(settings) == older
        check_the_answer(older, place)


@contextmanager
def started_by_hand(server: EmbeddedServer, command: list[str]) -> Iterator[None]:
    """A server that was started by hand in another container, with a socket of its own."""
    home = server.folder
    sockets = home.with_name("sockets of its own")
    sockets.mkdir(0o700)
    os.chown(sockets, *server_user(home))
    command = [*command, f"--unix_socket_directories={sockets}"]
    code = (
        "from pathlib import Path\n"
        "from tests.support.embedded_servers import run_as_server\n"
        f"home = Path({str(home)!r})\n"
        f"run_as_server(home, *{command!r}, cwd=home).wait()\n"
    )
    pid_file = home / "data" / "postmaster.pid"
    with container(home, "--ipc", code=code):
        wait_until(lambda: pid_file.exists() and b"ready" in pid_file.read_bytes())
        yield


@containers
@as_root
def test_a_server_started_by_hand_after_a_failed_start_counts_as_running(place: Path) -> None:
    settings, server = settings_for(place), keep_an_answer(place)
    command = psutil.Process(server.pid).cmdline()
    stop(settings)
    configuration = place / "data" / "postgresql.auto.conf"
    valid = configuration.read_text()
    configuration.write_text("nonsense = on\n")
    with pytest.raises(EmbeddedError, match=r"did not start: .*contains errors"):
        start(settings)
    configuration.write_text(valid)
    check_that_it_counts_as_running(server, command)


@containers
@as_root
def test_a_server_started_by_hand_after_a_starter_was_killed_counts_as_running(
    place: Path,
) -> None:
    settings, server = settings_for(place), keep_an_answer(place)
    command = psutil.Process(server.pid).cmdline()
    stop(settings)
    killed = start_and_kill_the_starter(settings)
    kill(killed)
    check_that_it_counts_as_running(server, command)


def check_that_it_counts_as_running(server: EmbeddedServer, command: list[str]) -> None:
    settings, pid_file = settings_for(server.folder), server.folder / "data" / "postmaster.pid"
    pid_file.unlink(missing_ok=True)
    with started_by_hand(server, command):
        recorded = pid_file.read_bytes()
        message = r"by hand, .* older release \(process \d+ there\) may still be using"
        with pytest.raises(EmbeddedError, match=message):
            start(settings)
        assert pid_file.read_bytes() == recorded
    pid_file.unlink()  # it was killed
    check_the_answer(start(settings), server.folder)


def test_what_a_crash_of_an_older_release_left_is_for_people_to_remove(place: Path) -> None:
    settings, pid_file = settings_for(place), place / "data" / "postmaster.pid"
    with server_without_lock(keep_an_answer(place)) as process:
        (place / "server.lock").unlink()
        pid = process.pid
    message = rf"older release \(process {pid} there\) may still be using .* remove {pid_file} if"
    with pytest.raises(EmbeddedError, match=message) as caught:
        start(settings)
    assert "\n" not in str(caught.value)
    pid_file.unlink()
    check_the_answer(start(settings), place)


def test_a_server_of_an_older_release_is_stopped(place: Path) -> None:
    settings = settings_for(place)
    with server_without_lock(keep_an_answer(place)) as process:
        assert stop(settings)
        process.wait(10)
    check_the_answer(start(settings), place)


def pretend(home: Path, field: str) -> None:
    """Change where the server was started, by its record."""
    lines = (home / "server.lock").read_text().splitlines()
    lines[Origin._fields.index(field)] = "another"
    (home / "server.lock").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("field", ["boot", "device", "host", "namespace"])
def test_on_a_file_system_of_one_kernel_no_crash_locks_anybody_out(
    settings: Settings, home: Path, field: str
) -> None:
    """As after a reboot, or where a volume was attached to another machine."""
    server = keep_an_answer(home)
    kill(server)
    wait_until(lambda: not works_in(home / "data"))
    pretend(home, field)
    check_the_answer(start(settings), home)


@as_root
@pytest.mark.parametrize("field", ["boot", "device", "host", "namespace"])
def test_on_a_file_system_of_several_machines_another_one_may_be_running(
    settings: Settings, home: Path, field: str
) -> None:
    """What is not known to be local, as ramfs, counts as a network file system."""
    home.mkdir()
    mount = ["mount", "-t", "ramfs", "-o", "mode=755", "ramfs", str(home)]
    if subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mount is not allowed here")
    try:
        server = keep_an_answer(home)
        pid_file = home / "data" / "postmaster.pid"
        recorded = pid_file.read_bytes()
        pretend(home, field)
        kill(server)
        wait_until(lambda: not works_in(home / "data"))
        if field in {"boot", "device"}:
            message = rf"host {socket.gethostname()} .* may still be using .* remove {pid_file} if"
            with pytest.raises(EmbeddedError, match=message):
                start(settings)
            assert pid_file.read_bytes() == recorded
            pid_file.unlink()
        check_the_answer(start(settings), home)
        stop(settings)
    finally:
        subprocess.run(["umount", str(home)], check=True)

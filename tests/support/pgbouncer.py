"""A PgBouncer with transaction pooling in front of the server of the tests."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from pydantic import SecretStr

from tiger_db import Settings
from tiger_db.testing import servers

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH')}:/usr/sbin")
PORT = 6432
SIZE = 4  # sessions of the server, for all clients of one database


def address_of(server_url: str) -> tuple[str, int]:
    """Return host or socket folder, and port, of the server."""
    url = urlsplit(server_url)
    query = parse_qs(url.query)
    port = url.port or int(query.get("port", ["5432"])[0])
    return url.hostname or query["host"][0], port


@contextmanager
def pgbouncer(server_url: str, **more: str) -> Iterator[Path]:
    """Start PgBouncer and return its socket folder."""
    assert PROGRAM is not None
    url, (host, port) = urlsplit(server_url), address_of(server_url)
    way = f"host='{host}' port={port} user='{url.username}'"
    if url.password:
        way += f" password='{unquote(url.password)}'"
    home = servers.short_folder()
    options = {
        "unix_socket_dir": home, "listen_port": PORT, "auth_type": "any",
        "pool_mode": "transaction", "default_pool_size": SIZE, "max_client_conn": 200,
    } | more  # fmt: skip
    ini = home / "pgbouncer.ini"
    ini.write_text(
        f"[databases]\nelsewhere = {way} dbname=postgres\n* = {way}\n[pgbouncer]\n"
        + "".join(f"{name} = {value}\n" for name, value in options.items())
    )
    user = "postgres" if os.geteuid() == 0 else None  # it refuses root
    if user:
        shutil.chown(home, user)
        shutil.chown(ini, user)  # whatever the umask
    with subprocess.Popen(
        [PROGRAM, "-q", ini],
        stderr=subprocess.DEVNULL,
        user=user,
        extra_groups=[] if user else None,
    ) as process:
        try:
            _wait(home / f".s.PGSQL.{PORT}")
            yield home
        finally:
            process.terminate()
    shutil.rmtree(home)


def _wait(path: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                return
        except OSError:
            assert time.monotonic() < deadline, "PgBouncer does not start"
            time.sleep(0.01)


def pooled(settings: Settings, folder: Path, server_url: str, **changes: object) -> Settings:
    """Return settings of the same database through the pooler, with `DB_DIRECT_HOST`."""
    host, port = address_of(server_url)
    login = urlsplit(server_url).netloc.rpartition("@")[0]
    query = urlencode({"host": str(folder), "port": PORT})
    through = {
        "database_url": SecretStr(f"postgresql://{login}@/{settings.database}?{query}"),
        "db_pooler": "pgbouncer",
        "db_direct_host": host,
        "db_direct_port": port,
    }
    return settings.model_copy(update=through | changes)

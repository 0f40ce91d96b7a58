"""A primary and a standby of the installed PostgreSQL, on the loopback address."""

import os
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.support.waiting import until
from tiger_db import Settings
from tiger_db.connections import connect
from tiger_db.database import AsyncSession
from tiger_db.encryption import generate_key
from tiger_db.testing import servers


def _programs() -> Path | None:
    try:
        found = (
            (servers.programs() / "initdb").resolve().parent
        )  # the folder of a link lacks some programs
    except ValueError:
        return None
    return found if (found / "pg_basebackup").exists() else None


PROGRAMS = _programs()
needs_postgresql = pytest.mark.skipif(
    PROGRAMS is None, reason="needs initdb, pg_ctl and pg_basebackup of an installed PostgreSQL"
)
KEYS = {"encryption_keys": generate_key(), "api_key_peppers": generate_key()}
LOOPBACK = "127.0.0.1"


def run(program: str, *arguments: str, programs: Path | None = PROGRAMS) -> None:
    """Run a program of PostgreSQL as an ordinary user, because it refuses root."""
    assert programs
    root = os.geteuid() == 0
    subprocess.run(
        [programs / program, *arguments],
        check=True,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user="postgres" if root else None,
        extra_groups=[] if root else None,
    )


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as taken:
        return int(taken.getsockname()[1])


@dataclass
class Server:
    """A PostgreSQL server with its data folder and port."""

    data: Path
    port: int

    @property
    def location(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def start(self, **settings: str) -> None:
        """Start the server with settings for this run only."""
        chosen = {
            "port": str(self.port),
            "listen_addresses": LOOPBACK,
            "fsync": "off",
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",  # so that no shared memory is left
            "wal_retrieve_retry_interval": "100ms",  # by default a standby sleeps for 5 s
        } | settings
        options = " ".join(f"-c {name}={value}" for name, value in chosen.items())
        run("pg_ctl", "-D", str(self.data), "-l", f"{self.data}.log", "-o", options, "-w", "start")

    def promote(self) -> None:
        run("pg_ctl", "-D", str(self.data), "-w", "promote")

    def stop(self) -> None:
        if (self.data / "postmaster.pid").exists():
            run("pg_ctl", "-D", str(self.data), "-m", "immediate", "-w", "stop")

    def kill(self) -> None:
        """Kill the postmaster with SIGKILL, and remove its shared memory and lock file."""
        file = self.data / "postmaster.pid"
        lines = file.read_text().splitlines()
        os.kill(int(lines[0]), signal.SIGKILL)
        subprocess.run(["ipcrm", "-m", lines[6].split()[1]], check=True)
        file.unlink()

    async def sql(self, statement: str, *values: object) -> Any:
        """Return one value of a query by the superuser, on a primary or a standby."""
        settings = Settings(
            database_url=f"postgresql://tiger_db@{self.location}/tiger_db?target_session_attrs=any"
        )
        connection = await connect(settings)
        try:
            return await connection.fetchval(statement, *values)
        finally:
            await connection.close()


@dataclass
class Cluster:
    primary: Server
    standby: Server

    def settings(self, *hosts: Server, replicas: tuple[Server, ...] = (), **more: Any) -> Settings:
        """Return settings with these hosts, or with the primary only."""
        return Settings(
            db_host=",".join(server.location for server in hosts or (self.primary,)),
            db_replica_hosts=",".join(server.location for server in replicas) or None,
            db_connect_timeout=5,
            **KEYS,
            **more,
        )


def first_server(home: Path) -> Server:
    """Create and start a server in a folder, with an empty database `tiger_db`."""
    if os.geteuid() == 0:
        shutil.chown(home, "postgres")
    server = Server(home / "primary", free_port())
    run("initdb", "-D", str(server.data), "-U", "tiger_db", "-A", "trust", "-E", "UTF8",
        "--locale=C", "--no-sync")  # fmt: skip
    server.start()
    run("createdb", "-h", LOOPBACK, "-p", str(server.port), "-U", "tiger_db", "tiger_db")
    return server


def standby_of(primary: Server) -> Server:
    standby = Server(primary.data.with_name("standby"), free_port())
    run("pg_basebackup", "-D", str(standby.data), "-h", LOOPBACK, "-p", str(primary.port),
        "-U", "tiger_db", "-R", "-c", "fast", "--no-sync")  # fmt: skip
    # The libpq of the server may not support the parameters that pg_basebackup writes.
    with (standby.data / "postgresql.auto.conf").open("a") as file:
        file.write(f"primary_conninfo = 'host={LOOPBACK} port={primary.port} user=tiger_db'\n")
    standby.start()
    return standby


async def port_of(session: AsyncSession) -> int:
    """Return the port of the server that a session is connected to."""
    return int(await session.scalar(text("SELECT inet_server_port()")) or 0)


async def has_caught_up(cluster: Cluster) -> None:
    """Wait until the standby has replayed what the primary has flushed."""
    lsn = await cluster.primary.sql("SELECT pg_current_wal_flush_lsn()::text")
    replayed = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
    await until(partial(cluster.standby.sql, replayed, lsn))

"""The PostgreSQL that the tests run on: given, in Docker, of this system, or embedded."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tiger_db import embedded
from tiger_db.connections import connect
from tiger_db.settings import Settings

# Handed from the first pytest process to its xdist workers.
CHOSEN = "TIGER_DB_CHOSEN_TEST_SERVER"
IMAGE = "postgres:17-alpine"
GIVEN = "TIGER_DB_TEST_URL"
# What makes settings of that server those of production: it may be on another machine.
PRODUCTION = {"environment": "production", "db_allow_unverified_tls": True}
MEMORY, ROOM = Path("/dev/shm"), 4 * 2**30  # as tmpfs is by default where there are 8 GiB


@dataclass(frozen=True)
class Server:
    """Where it is (a URL without a database), what it is, and how to stop it."""

    url: str
    kind: str
    stop: Callable[[], None] = lambda: None


def settings_for(url: str, database: str) -> Settings:
    """Settings of one database of the server."""
    parts = urlsplit(url)
    return Settings(
        database_url=urlunsplit(parts._replace(path=f"/{database}")),
        encryption_keys="test:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
        api_key_peppers="test:ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=",
        db_pool_size=5,
        db_max_overflow=40,
    )


def choose(*, in_memory: bool = True) -> Server:
    """TIGER_DB_TEST_URL if set, else Docker if an engine answers, else the embedded server.

    `TIGER_DB_TEST_URL=system` takes the PostgreSQL that is installed here, `docker` a container or
    nothing. `in_memory`: where there is room, the files of a server that is started here are not on
    the disk.
    """
    match os.environ.get(GIVEN):
        case "system":
            return _system(folder(in_memory=in_memory))
        case "docker":
            return _docker()
        case str(given) if given:
            return Server(given, GIVEN)
    return _docker() if _has_docker() else _embedded(folder(in_memory=in_memory))


def make_fast(server: Server) -> None:
    """Turn off what protects lasting data on a server that is thrown away."""

    async def apply() -> None:
        connection = await connect(settings_for(server.url, "postgres"))
        try:
            for name in ("fsync", "full_page_writes"):
                await connection.execute(f"ALTER SYSTEM SET {name} = off")
            await connection.execute("SELECT pg_reload_conf()")
            password = urlsplit(server.url).password
            if password and connection.get_server_version().major >= 16:
                # Each connection hashes the password 4096 times, unless it is stored otherwise.
                await connection.execute("SET scram_iterations = 1")
                await connection.execute(f"ALTER ROLE CURRENT_USER PASSWORD '{password}'")
        finally:
            await connection.close()

    asyncio.run(apply())


def version(server: Server) -> str:
    """What the server says it is."""

    async def ask() -> str:
        connection = await connect(settings_for(server.url, "postgres"))
        try:
            return str(await connection.fetchval("SHOW server_version"))
        finally:
            await connection.close()

    return asyncio.run(ask())


def _has_docker() -> bool:
    ping = "import docker; docker.from_env().ping()"
    run = subprocess.run([sys.executable, "-c", ping], capture_output=True, check=False)
    return run.returncode == 0


def _docker() -> Server:
    from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415  # slow

    container = PostgresContainer(IMAGE, driver=None)
    container.start()
    return Server(container.get_connection_url(), f"testcontainers {IMAGE}", container.stop)


def _embedded(home: Path) -> Server:
    settings = Settings(tiger_db_home=home, database_url=None, environment="testing")
    server = embedded.start(settings)
    password = server.connect_args(settings)["password"]

    def stop() -> None:
        embedded.stop(settings)
        shutil.rmtree(home)

    return Server(
        f"postgresql://tiger_db:{password}@/?host={server.socket_folder}", "embedded", stop
    )


def installed() -> bool:
    """Whether a PostgreSQL is installed here."""
    return bool(shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin")))


def _system(home: Path, more: str = "") -> Server:
    """A server of the programs installed here, as an ordinary user: PostgreSQL refuses root."""
    programs = _programs()
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        shutil.chown(home, user)

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, "-D", f"{home}/data", *arguments],
            check=True,
            cwd=home,
            stdout=subprocess.DEVNULL,
            user=user,
            extra_groups=[] if user else None,
        )

    run("initdb", "-U", "tiger_db", "-A", "trust", "-E", "UTF8", "--locale=C")
    options = (
        f"-c listen_addresses='' -c unix_socket_directories={home} -c max_connections=200 {more}"
    )
    run("pg_ctl", "-l", f"{home}/log", "-o", options, "-w", "start")

    def stop() -> None:
        run("pg_ctl", "-m", "fast", "-w", "stop")
        shutil.rmtree(home)

    return Server(f"postgresql://tiger_db@/?host={home}", "PostgreSQL installed here", stop)


def _programs() -> Path:
    """Where initdb and pg_ctl are: on PATH, else where Debian has them."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))


def folder(*, in_memory: bool = True) -> Path:
    """A short folder that the server's user can reach, whoever that is.

    Databases are made and dropped all the time, and files are what that costs.
    """
    place = MEMORY if in_memory and _has_room(MEMORY) else None
    folder = Path(tempfile.mkdtemp(prefix="tdb-", dir=place))
    folder.chmod(0o755)
    return folder


def _has_room(place: Path) -> bool:
    """Also for programs, which the embedded server may have to copy."""
    if not os.access(place, os.W_OK):
        return False
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize >= ROOM and not found.f_flag & os.ST_NOEXEC

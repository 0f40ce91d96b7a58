"""The PostgreSQL server that tests run on: given, in a container, installed here, or embedded."""

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tiger_db import embedded
from tiger_db.connections import connect
from tiger_db.errors import ConfigurationError, EmbeddedError, TigerDBError
from tiger_db.settings import Settings

IMAGE = "postgres:17-alpine"
GIVEN = "TIGER_DB_TEST_URL"
MEMORY = Path("/dev/shm")  # noqa: S108  # the files of a server are in a folder of its own
ROOM = 4 * 2**30  # bytes of a tmpfs, which has them by default where there are 8 GiB
_SCRAM_ITERATIONS = 16  # the version of PostgreSQL that has the setting


@dataclass(frozen=True, slots=True)
class Server:
    """A server: its URL, its description, and what `stop` needs, in any process of this machine."""

    url: str
    kind: str
    folder: str | None = None  # of a server that was started here
    container: str | None = None  # id

    def stop(self) -> None:
        """Stop the server and remove its files, if it was started for the tests."""
        if self.container is not None:
            _remove_container(self.container)
        elif self.folder is not None:
            if self.kind == "embedded":
                embedded.stop(_embedded_settings(Path(self.folder)))
            else:
                _run_installed(Path(self.folder), "pg_ctl", "-m", "fast", "-w", "stop")
            shutil.rmtree(self.folder)


def isolated_settings(**values: object) -> Settings:
    """Return settings that no environment variable influences."""
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    return Settings(**defaults | values)


def settings_for(url: str, database: str | None = None, **values: object) -> Settings:
    """Return settings of a database of the server, by default of the database that the URL names.

    A URL without a database means the database `postgres`.

    Raises:
        ConfigurationError: `database` is given, but a parameter of the URL names another database.
    """
    parts = urlsplit(url)
    path = f"/{database}" if database else parts.path.removesuffix("/") or "/postgres"
    settings = isolated_settings(database_url=urlunsplit(parts._replace(path=path)), **values)
    if database and settings.database != database:
        raise ConfigurationError("the URL of the server must not have the parameter dbname")
    return settings


def environment_of(settings: Settings) -> dict[str, str]:
    """Return environment variables from which `Settings()` in any process reads these settings."""
    variables = {}
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        if value is not None and value != field.default:
            secret = getattr(value, "get_secret_value", None)
            variables[name.upper()] = str(secret() if secret else value)
    return variables


def choose(*, in_memory: bool = True) -> Server:
    """Return the server that `TIGER_DB_TEST_URL` names, or else start one.

    `TIGER_DB_TEST_URL` can also be `docker`, `embedded`, or `system` (the PostgreSQL that is
    installed here). If it is not set, a container is started if a Docker engine answers, or else
    the embedded server. If `in_memory` is true and there is room, the files of a server that is
    started here are not on the disk.

    Raises:
        EmbeddedError: there is neither a URL, nor a Docker engine, nor an embedded server.
        ConfigurationError: the URL has the parameter `dbname`.
    """
    match os.environ.get(GIVEN):
        case "system":
            return start_installed(short_folder(in_memory=in_memory))
        case "docker":
            return _start_container()
        case "embedded":
            return start_embedded(short_folder(in_memory=in_memory))
        case str(given) if given:
            settings_for(given, "tests")  # refuses a URL that does not let the tests choose
            return Server(given, GIVEN)
    return (
        _start_container() if _has_docker() else start_embedded(short_folder(in_memory=in_memory))
    )


def shared(folder: Path) -> Server:
    """Return the server of a test run. The first process that asks for it starts it.

    All processes of the run give the same folder, which `stop_shared` removes.

    Raises:
        TigerDBError: no server can be started, or the given server cannot be reached.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    record = folder / "server.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if record.exists():
            return Server(**json.loads(record.read_text()))
        server = choose()
        try:
            if server.kind != GIVEN:
                make_fast(server)
            found = version(server)
        except TigerDBError:
            server.stop()
            raise
        record.write_text(json.dumps(asdict(server)))
        (folder / "version").write_text(found)
        return server


def stop_shared(folder: Path) -> str | None:
    """Stop the server of a test run, and return a description of it, or None if there is none."""
    record = folder / "server.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        return None
    server = Server(**json.loads(record.read_text()))
    description = f"{server.kind}, PostgreSQL {(folder / 'version').read_text()}"
    server.stop()
    shutil.rmtree(folder)
    return description


def make_fast(server: Server) -> None:
    """Turn off what protects lasting data on a server that is thrown away."""

    async def apply() -> None:
        connection = await connect(settings_for(server.url, "postgres"))
        try:
            for name in ("fsync", "full_page_writes"):
                await connection.execute(f"ALTER SYSTEM SET {name} = off")
            await connection.execute("SELECT pg_reload_conf()")
            password = urlsplit(server.url).password
            if password and connection.get_server_version().major >= _SCRAM_ITERATIONS:
                # Each connection hashes the password 4096 times, unless it is stored otherwise.
                await connection.execute("SET scram_iterations = 1")
                await connection.execute(f"ALTER ROLE CURRENT_USER PASSWORD '{password}'")
        finally:
            await connection.close()

    asyncio.run(apply())


def version(server: Server) -> str:
    """Return the version of the server."""

    async def ask() -> str:
        connection = await connect(settings_for(server.url))
        try:
            return str(await connection.fetchval("SHOW server_version"))
        finally:
            await connection.close()

    return asyncio.run(ask())


def start_installed(folder: Path, options: str = "") -> Server:
    """Start a server of the programs installed here, as an ordinary user: PostgreSQL refuses root.

    `options` are further options of the command `postgres`.
    """
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    _run_installed(folder, "initdb", "-U", "tiger_db", "-A", "trust", "-E", "UTF8", "--locale=C")
    options = (
        f"-c listen_addresses='' -c unix_socket_directories={folder} -c max_connections=200"
        f" {options}"
    )
    _run_installed(folder, "pg_ctl", "-l", f"{folder}/log", "-o", options, "-w", "start")
    url = f"postgresql://tiger_db@/?host={folder}"
    return Server(url, "PostgreSQL installed here", folder=str(folder))


def start_embedded(folder: Path) -> Server:
    """Start an embedded server whose files are in the folder."""
    settings = _embedded_settings(folder)
    try:
        server = embedded.start(settings)
    except EmbeddedError:
        shutil.rmtree(folder)
        raise
    password = server.connect_args(settings)["password"].get_secret_value()
    url = f"postgresql://tiger_db:{password}@/?host={server.socket_folder}"
    return Server(url, "embedded", folder=str(folder))


def installed() -> bool:
    """Return whether a PostgreSQL is installed here."""
    return bool(shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin")))


def programs() -> Path:
    """Return the folder of initdb and pg_ctl: on PATH, or else where Debian has them."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))


def short_folder(*, in_memory: bool = True) -> Path:
    """Create a folder with a short path for a server's files, which every user can enter.

    If possible, the folder is in memory, because tests create and drop databases frequently, and
    files on a disk would make that slow.
    """
    parent = MEMORY if in_memory and _has_room(MEMORY) else None
    folder = Path(tempfile.mkdtemp(prefix="tdb-", dir=parent))
    folder.chmod(0o755)
    return folder


def _embedded_settings(folder: Path) -> Settings:
    return isolated_settings(tiger_db_home=folder, environment="testing")


def _run_installed(folder: Path, program: str, *arguments: str) -> None:
    user = "postgres" if os.geteuid() == 0 else None
    subprocess.run(  # noqa: S603  # the programs of PostgreSQL
        [programs() / program, "-D", f"{folder}/data", *arguments],
        check=True,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        user=user,
        extra_groups=[] if user else None,
    )


def _has_docker() -> bool:
    # In another process, because the import is slow and can emit warnings.
    ping = "import docker, testcontainers.community.postgres; docker.from_env().ping()"
    run = subprocess.run([sys.executable, "-c", ping], capture_output=True, check=False)  # noqa: S603  # this text
    return run.returncode == 0


def _remove_container(container: str) -> None:
    import docker  # noqa: PLC0415  # slow

    client = docker.from_env()
    try:
        client.containers.get(container).remove(force=True, v=True)
    finally:
        client.close()


def _start_container() -> Server:
    try:
        from testcontainers.community.postgres import PostgresContainer  # noqa: PLC0415  # slow
        from testcontainers.core.config import testcontainers_config  # noqa: PLC0415
    except ModuleNotFoundError:
        raise EmbeddedError(
            f"{GIVEN}=docker needs testcontainers: pip install testcontainers"
        ) from None
    container = PostgresContainer(IMAGE, driver=None)
    # testcontainers removes the containers of a process soon after the process ends. With
    # pytest-xdist, the process that starts the container can end long before the last one.
    reaping = testcontainers_config.ryuk_disabled
    testcontainers_config.ryuk_disabled = reaping or "PYTEST_XDIST_WORKER" in os.environ
    try:
        container.start()
    finally:
        testcontainers_config.ryuk_disabled = reaping
    return Server(
        container.get_connection_url(),
        f"testcontainers {IMAGE}",
        container=container.get_wrapped_container().id,
    )


def _has_room(folder: Path) -> bool:
    """Return whether there is room, also for programs, which the embedded server may copy."""
    if not os.access(folder, os.W_OK):
        return False
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize >= ROOM and not found.f_flag & os.ST_NOEXEC

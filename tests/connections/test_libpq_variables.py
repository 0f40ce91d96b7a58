"""No variable and no file of libpq reaches a connection, unless a URL names a password file."""

import asyncio
import inspect
import re
import struct
from collections.abc import AsyncIterator
from getpass import getuser
from pathlib import Path
from urllib.parse import quote

import pytest
from asyncpg import connect_utils
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import pq

from tests.support.embedded_servers import discard, reachable_folder, settings_for
from tests.support.refused_settings import SECRET
from tiger_db import Settings
from tiger_db.connections import connect, passfile
from tiger_db.errors import ConfigurationError, DatabaseUnavailable

# Each of these values breaks a connection that uses it.
HOSTILE = {
    "PGHOST": "192.0.2.1", "PGPORT": "1", "PGDATABASE": "other", "PGUSER": "other",
    "PGPASSWORD": "wrong", "PGPASSFILE": "/nowhere", "PGSERVICE": "other",
    "PGSERVICEFILE": "/nowhere", "PGOPTIONS": "-cnothing=1", "PGAPPNAME": "other",
    "PGSSLMODE": "verify-full", "PGSSLROOTCERT": "/nowhere", "PGSSLCERT": "/nowhere",
    "PGSSLKEY": "/nowhere", "PGSSLCRL": "/nowhere", "PGSSLNEGOTIATION": "direct",
    "PGSSLMINPROTOCOLVERSION": "TLSv9", "PGSSLMAXPROTOCOLVERSION": "TLSv1",
    "PGTARGETSESSIONATTRS": "standby", "PGKRBSRVNAME": "other", "PGGSSLIB": "other",
    "PGCHANNELBINDING": "require", "PGREQUIREAUTH": "none", "PGGSSENCMODE": "require",
    "PGCLIENTENCODING": "LATIN1", "PGDATESTYLE": "nothing", "PGTZ": "nowhere",
    "PGCONNECT_TIMEOUT": "0", "PGDATA": "/nowhere",
}  # fmt: skip
FILES = [
    ".pgpass", ".pg_service.conf", ".postgresql/root.crt", ".postgresql/root.crl",
    ".postgresql/postgresql.crt", ".postgresql/postgresql.key",
]  # fmt: skip


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".postgresql").mkdir()
    for name in FILES:
        (tmp_path / name).write_text(f"*:*:*:*:{SECRET}\n")
        (tmp_path / name).chmod(0o600)


def test_all_variables_that_asyncpg_reads_are_tested() -> None:
    source = inspect.getsource(connect_utils)
    read = set(re.findall(r"(?:environ\.get|getenv)\(\s*[\"'](\w+)", source))
    assert {"PGHOST", "PGSSLMODE", "PGGSSLIB"} <= read
    assert read <= HOSTILE.keys() | {"SSLKEYLOGFILE"}  # the latter for contexts that asyncpg makes


@pytest.mark.usefixtures("hostile")
async def test_no_variable_reaches_a_server_of_the_settings(settings: Settings) -> None:
    connection = await connect(settings)
    try:
        assert await connection.fetchval("SELECT current_database()") == settings.database
        assert await connection.fetchval("SHOW application_name") == "tiger_db"
    finally:
        await connection.close()


@pytest.mark.slow
@pytest.mark.usefixtures("hostile")
async def test_no_variable_reaches_the_embedded_server() -> None:
    with reachable_folder() as base:
        embedded = settings_for(base / "home")
        try:
            connection = await connect(embedded, database="postgres")
            assert await connection.fetchval("SHOW DateStyle") == "ISO, MDY"
            await connection.close()
        finally:
            await asyncio.to_thread(discard, base / "home")


@pytest.mark.usefixtures("hostile")
def test_a_url_without_a_user_has_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Settings(database_url="postgresql:///d")
    assert chosen.connect_args()["user"] == getuser() != "other"
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def fail(*_: object) -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", fail)
    with pytest.raises(ConfigurationError, match="names no user"):
        chosen.connect_args()


# A false server, which asks for the password in clear


@pytest.fixture
async def asked() -> AsyncIterator[tuple[int, list[bytes]]]:
    """The port of a server without TLS, and the passwords that it was given."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (length,) = struct.unpack("!l", await reader.readexactly(4))
                body = await reader.readexactly(length - 4)
                if struct.unpack("!l", body[:4])[0] != 80877103:
                    break
                writer.write(b"N")  # no TLS
            writer.write(b"R" + struct.pack("!ll", 8, 3))  # AuthenticationCleartextPassword
            kind, length = struct.unpack("!cl", await reader.readexactly(5))
            assert kind == b"p"
            seen.append((await reader.readexactly(length - 4)).rstrip(b"\0"))
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], seen


@pytest.mark.usefixtures("hostile")
async def test_no_password_comes_from_a_variable_or_the_home(
    asked: tuple[int, list[bytes]],
) -> None:
    port, seen = asked
    for chosen in (
        Settings(db_host="127.0.0.1", db_port=port, db_ssl_mode="disable"),
        Settings(database_url=f"postgresql://u@127.0.0.1:{port}/d?sslmode=disable"),
    ):
        with pytest.raises(DatabaseUnavailable):
            await connect(chosen)
    assert seen == [b"", b""]


@pytest.mark.usefixtures("hostile")
async def test_a_url_can_name_a_file_of_passwords(
    asked: tuple[int, list[bytes]], tmp_path: Path
) -> None:
    port, seen = asked
    path = tmp_path / "a b"
    path.write_text(f"127.0.0.1:{port}:d:u:kept\nlocalhost:{port}:d:u:other\n")
    path.chmod(0o600)
    query = f"sslmode=disable&passfile={quote(str(path), safe='')}"
    for hosts in (f"127.0.0.1:{port}", f"localhost:{port}", f"127.0.0.1:{port},localhost:{port}"):
        with pytest.raises(DatabaseUnavailable):
            await connect(Settings(database_url=f"postgresql://u@{hosts}/d?{query}"))
    with pytest.raises(DatabaseUnavailable):
        await connect(Settings(database_url=f"postgresql://u:own@127.0.0.1:{port}/d?{query}"))
    assert seen == [b"kept", b"other", b"kept", b"other", b"own"]
    chosen = Settings(database_url=f"postgresql://u@127.0.0.1:{port}/d?{query}")
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="passfile can be accessed by other users"):
        await connect(chosen)
    path.unlink()
    with pytest.raises(ConfigurationError, match="passfile cannot be read: No such file"):
        await connect(chosen)


FIELDS = st.text(st.sampled_from("h:\\*1dué#"), min_size=1, max_size=3)
ESCAPED = st.one_of(
    st.just("*"), FIELDS.map(lambda text: text.replace("\\", "\\\\").replace(":", "\\:"))
)
LINES = st.tuples(ESCAPED, ESCAPED, ESCAPED, ESCAPED, ESCAPED).map(":".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=5), fields=st.tuples(FIELDS, FIELDS))
@example(lines=["#h:1:d:u:a", "h:1:d:u", "h:1:d:u:b:c"], fields=("d", "u"))
@example(lines=["", "h:1:d:u:b\\:\\\\c\\d "], fields=("d", "u"))
@example(lines=["*:*:*:*:"], fields=("d", "u"))
def test_a_file_of_passwords_has_the_format_of_libpq(
    tmp_path: Path, lines: list[str], fields: tuple[str, str]
) -> None:
    path = tmp_path / "passfile"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    path.chmod(0o600)
    database, user = fields
    found = passfile.find_password(path, "127.0.0.1", 1, database, user)
    parameters = {
        "host": "127.0.0.1", "port": "1", "dbname": database, "user": user, "passfile": str(path),
    }  # fmt: skip
    conninfo = " ".join(
        "{}='{}'".format(name, value.replace("\\", "\\\\").replace("'", "\\'"))
        for name, value in parameters.items()
    )
    connection = pq.PGconn.connect_start(conninfo.encode())
    try:
        assert found.encode() == (connection.password or b"")
    finally:
        connection.finish()


def test_a_socket_folder_matches_localhost(tmp_path: Path) -> None:
    path = tmp_path / "passfile"
    path.write_text("/run/x:5432:d:u:no\nlocalhost:*:d:u:yes\n")
    path.chmod(0o600)
    assert passfile.find_password(path, "/run/x", 5432, "d", "u") == "yes"
    assert passfile.find_password(path, "h", 5432, "d", "u") == ""

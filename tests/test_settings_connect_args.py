"""Connection arguments of settings, parsed by asyncpg and used with a real server."""

import asyncio
import inspect
import os
import ssl
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from asyncpg.connect_utils import _parse_connect_arguments
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.refused_settings import SECRET, refused
from tests.support.servers import settings_for
from tiger_db.connections import connect, tls
from tiger_db.errors import ConfigurationError, DatabaseUnavailable
from tiger_db.settings import Settings
from tiger_db.testing import servers
from tiger_db.url_parameters import SSLMode


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable and no file of this machine's user has a say."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def parsed(chosen: Settings) -> SimpleNamespace:
    """What asyncpg takes the settings to be."""
    unset = inspect.signature(_parse_connect_arguments).parameters
    caches = dict.fromkeys(
        ["statement_cache_size", "max_cached_statement_lifetime", "max_cacheable_statement_size"], 0
    )
    arguments: dict[str, Any] = {**dict.fromkeys(unset), **caches, **chosen.connect_args()}
    del arguments["timeout"]
    assert (
        arguments["dsn"] is None
    )  # asyncpg takes a DSN apart with urlsplit, whose versions differ
    addresses, parameters, _ = _parse_connect_arguments(**arguments)
    return SimpleNamespace(**parameters._asdict(), addresses=addresses)


def test_without_a_host_the_embedded_server_is_used() -> None:
    assert Settings().embedded
    assert not Settings(db_host="h").embedded
    assert not Settings(database_url="postgresql://h/d").embedded


def test_database_url_takes_precedence() -> None:
    others = {"db_host": "other", "db_port": 1, "db_name": "o", "db_user": "o", "db_password": "o"}
    taken = parsed(Settings(database_url="postgresql://u:p@h:6432/d", **others))
    assert (taken.addresses, taken.user, taken.password(), taken.database) == (
        [("h", 6432)], "u", "p", "d",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("url", "database", "place"),
    [
        ("postgresql://u:p@h/d", "d", "h:5432/d"),
        ("postgres://u:p@h:1/d", "d", "h:1/d"),
        ("postgresql+asyncpg://u:p@[::1]:1/a%20b", "a b", "[::1]:1/a b"),
        ("postgresql://u:p@h1:1,h2:2/d?target_session_attrs=read-write", "d", "h1:1,h2:2/d"),
        ("postgresql://u:p@h1,[fd00::1]/d", "d", "h1:5432,[fd00::1]:5432/d"),
        ("postgresql://u:p@/d?host=/tmp/a%20b&port=5433", "d", "/tmp/a b:5433/d"),
        ("postgresql://%2Ftmp%2Fa%2Cb:5433/d", "d", "/tmp/a,b:5433/d"),
        ("postgresql://h?dbname=d&user=u&password=p", "d", "h:5432/d"),
        ("postgresql://u:p@h", "u", "h:5432/u"),
        ("postgresql://", "tiger_db", "localhost:5432/tiger_db"),
    ],
)
def test_a_url_gives_database_and_location(url: str, database: str, place: str) -> None:
    chosen = Settings(database_url=url)
    assert (chosen.database, chosen.location) == (database, place)
    assert parsed(chosen).database == database


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://u:p@h:65536/d", "port"),
        ("postgresql://u:p@h:0/d", "port"),
        ("postgresql://u:p@h/d?port=x", "port"),
        ("postgresql://u:p@h:x/d", "percent-encode"),
        ("postgresql://u:p@h/d?sslmode=on", "sslmode must be one of disable, allow"),
        ("postgresql://u:p@h/d?ssl=false", "ssl must be one of true, disable"),
        ("postgresql://u:p@h/d?sslrequire=true", "unknown parameter: sslrequire"),
        ("postgresql://u:p@h/d?connect_timeout=0", "connect_timeout"),
        ("postgresql://u:p@h/d?connect_timeout=soon", "connect_timeout"),
        ("postgresql://u:p%00@h/d", "NUL"),
        ("postgresql://u:p@h/d?sslmode", "percent-encode"),
    ],
)
def test_an_unusable_url_is_refused(url: str, reason: str) -> None:
    message = refused(database_url=url)
    assert message.startswith("DATABASE_URL")
    assert reason in message


@given(before=st.text(max_size=4), mark=st.sampled_from("@/?#[]:% \\"), after=st.text(max_size=4))
@example(before="1", mark="/", after="w")
@example(before="1", mark="#", after="x")
@example(before="1", mark="?", after="x=")
@example(before="", mark="@", after="")
def test_a_password_that_is_not_percent_encoded_works_or_is_refused_but_never_shows(
    before: str, mark: str, after: str
) -> None:
    password = f"{before}{mark}{SECRET}{after}"
    try:
        chosen = Settings(database_url=f"postgresql://user:{password}@host/data")
    except ConfigurationError as error:
        shown = str(error)
    else:
        shown = chosen.location
        assert (shown, parsed(chosen).addresses) == ("host:5432/data", [("host", 5432)])
        assert SECRET in parsed(chosen).password()
    assert SECRET not in shown


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@pytest.mark.slow
@given(user=TEXTS, password=TEXTS, database=TEXTS)
@example(user="u@x", password="p@s%20s:/?#[]&=+ \n'\"\\é\N{TIGER}", database="a/b?c#d")
@example(user="u", password="%41", database="%41")
def test_any_character_is_allowed(user: str, password: str, database: str) -> None:
    by_parts = Settings(db_host="h", db_user=user, db_password=password, db_name=database)
    encoded = f"{quote(user, safe='')}:{quote(password, safe='')}@h/{quote(database, safe='')}"
    by_url = Settings(database_url=f"postgresql://{encoded}")
    for chosen in (by_parts, by_url):
        taken = parsed(chosen)
        assert (taken.user, taken.password(), taken.database) == (user, password, database)
        assert taken.addresses == [("h", 5432)]
        assert chosen.database == database


# In whose name asyncpg sees no socket.
FOLDERS = TEXTS.map(lambda name: f"/{name}").filter(lambda folder: ".s.PGSQL." not in folder)


@given(folder=FOLDERS)
@example(folder="/tmp/a b,c%d&e=f?g#h:5433")
def test_a_host_may_be_any_socket_folder(folder: str) -> None:
    assert parsed(Settings(db_host=folder)).addresses == [os.path.join(folder, ".s.PGSQL.5432")]  # noqa: PTH118  # as asyncpg


@pytest.mark.parametrize(
    ("chosen", "addresses", "place"),
    [
        ({"db_host": "h1,h2"}, [("h1", 5432), ("h2", 5432)], "h1:5432,h2:5432/d"),
        ({"db_host": "h1:1, [::1]:2", "db_port": 3}, [("h1", 1), ("::1", 2)], "h1:1,[::1]:2/d"),
        ({"db_host": "h1,/tmp/a"}, [("h1", 5432), "/tmp/a/.s.PGSQL.5432"], "h1:5432,/tmp/a:5432/d"),
        ({"db_host": "h:1"}, [("h", 1)], "h:1/d"),
        ({"db_host": "::1"}, [("::1", 5432)], "[::1]:5432/d"),
        ({"database_url": "postgresql://h1:1,h2/d"}, [("h1", 1), ("h2", 5432)], "h1:1,h2:5432/d"),
        (
            {"database_url": "postgresql:///d?host=h1,h2&port=1,2"},
            [("h1", 1), ("h2", 2)],
            "h1:1,h2:2/d",
        ),
        (
            {"database_url": "postgresql:///d?host=h1,h2&port=3"},
            [("h1", 3), ("h2", 3)],
            "h1:3,h2:3/d",
        ),
    ],
)
def test_several_hosts_are_tried_until_one_accepts_writes(
    chosen: dict[str, Any], addresses: list[object], place: str
) -> None:
    settings = Settings(db_name="d", db_replica_hosts="s1,[::2]:6", **chosen)
    taken = parsed(settings)
    assert (taken.addresses, settings.location) == (addresses, place)
    assert taken.target_session_attrs == "read-write"
    for replica in settings.replicas:
        arguments = settings.connect_args(replica)
        assert (arguments["host"], arguments["port"]) == replica
        assert arguments["target_session_attrs"] == "standby"
    assert [*settings.replicas] == [("s1", settings.db_port), ("::2", 6)]


@pytest.mark.parametrize(
    "url", ["postgresql://h1,,h2/d", "postgresql://h1,h2/d?port=1,2,3", "postgresql:///d?host=h,"]
)
def test_a_url_with_an_ambiguous_list_of_hosts_is_refused(url: str) -> None:
    assert "separate hosts by single commas" in refused(database_url=url)


def test_without_a_host_the_default_hosts_are_tried_and_pg_variables_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGHOST", "elsewhere.example")
    monkeypatch.setenv("PGPORT", "1")
    for url, port in (
        ("postgresql:///d", 5432),
        ("postgresql://:6/d", 6),
        ("postgres:///?port=7", 7),
    ):
        folders = [f"/var/run/postgresql/.s.PGSQL.{port}", f"/tmp/.s.PGSQL.{port}"]
        assert parsed(Settings(database_url=url)).addresses == [*folders, ("localhost", port)]


def test_a_url_can_have_a_password_file(tmp_path: Path) -> None:
    path = tmp_path / "a b"
    url = f"postgresql://u@h/d?passfile={quote(str(path), safe='')}"
    assert Settings(database_url=url).passfile == path


def test_a_url_can_select_another_kind_of_server() -> None:
    chosen = Settings(database_url="postgresql://h/d?target_session_attrs=any")
    assert parsed(chosen).target_session_attrs == "any"


@pytest.mark.parametrize(
    ("seconds", "milliseconds"), [(30, "30000"), (0, "0"), (0.0001, "1"), (0.25, "250")]
)
def test_a_short_query_timeout_is_not_rounded_to_none(seconds: float, milliseconds: str) -> None:
    chosen = Settings(db_host="h", db_query_timeout=seconds, db_idle_transaction_timeout=seconds)
    server = parsed(chosen).server_settings
    assert server["statement_timeout"] == milliseconds
    assert server["idle_in_transaction_session_timeout"] == milliseconds


def test_connect_timeout_application_name_and_options_of_a_url_take_precedence() -> None:
    url = "postgresql://h/d?connect_timeout=2.5&application_name=mine&options=-cgeqo%3Doff"
    arguments = Settings(database_url=url).connect_args()
    assert arguments["timeout"] == 2.5
    server = arguments["server_settings"]
    assert (server["application_name"], server["options"]) == ("mine", "-cgeqo=off")
    assert server["timezone"] == "UTC"


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of an authority of our own, at a path that needs encoding."""
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ours")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, None)
    )
    path = tmp_path_factory.mktemp("tls") / "our ca&+%20.crt"
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    return path


# https://www.postgresql.org/docs/current/libpq-ssl.html#LIBPQ-SSL-PROTECTION
@pytest.mark.parametrize(
    ("mode", "host_is_checked"),
    [
        ("allow", False),
        ("prefer", False),
        ("require", False),  # "if a root CA file exists, ... the same as verify-ca"
        ("verify-ca", False),
        ("verify-full", True),
    ],
)
def test_each_ssl_mode_has_the_meaning_of_libpq(
    authority: Path, mode: str, *, host_is_checked: bool
) -> None:
    url = f"postgresql://h/d?sslmode={mode}&sslrootcert={quote(str(authority), safe='')}"
    for chosen in (
        Settings(db_host="h", db_ssl_mode=mode, db_ssl_ca=authority),
        Settings(database_url="postgresql://h/d", db_ssl_mode=mode, db_ssl_ca=authority),
        Settings(database_url=url, db_ssl_mode="disable"),
    ):
        assert chosen.tls["sslmode"] == mode
        context = tls._context(chosen, chosen.tls)
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.check_hostname == host_is_checked
        assert len(context.get_ca_certs()) == 1


def test_behind_a_pooler_no_session_state_is_used() -> None:
    for chosen in (
        Settings(db_host="h", db_pooler="pgbouncer", db_query_timeout=3),
        Settings(database_url="postgresql://h/d", db_pooler="pgbouncer", db_query_timeout=3),
    ):
        arguments = chosen.connect_args()
        assert arguments["statement_cache_size"] == 0
        assert arguments["command_timeout"] == 3
        assert arguments["server_settings"].keys() == {"application_name", "timezone"}
    unlimited = Settings(db_host="h", db_pooler="pgbouncer", db_query_timeout=0)
    assert unlimited.connect_args()["command_timeout"] is None
    message = refused(database_url="postgresql://h/d?options=-cx%3D1", db_pooler="pgbouncer")
    assert message.startswith("DATABASE_URL must not have the parameter options")
    message = refused(database_url="postgresql://h/d?options=-csearch_path%3Dx")
    assert (
        message == "the parameter `options` in DATABASE_URL must not set search_path: use DB_SCHEMA"
    )


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("db.example", ("db.example", 5433)),
        ("fd00::1", ("fd00::1", 5433)),
        ("/a b%", "/a b%/.s.PGSQL.5433"),
    ],
)
def test_settings_without_the_pooler_differ_in_the_address_only(host: str, address: object) -> None:
    given = {"db_pooler": "pgbouncer", "db_direct_host": host, "db_direct_port": 5433}
    login = "postgresql://u%40x:p%40s"
    query = "sslmode=disable&application_name=mine"
    for url in (
        f"{login}@pooler:6432/d?{query}",
        f"{login}@/d?host=/pooler&port=6432&{query}",
        f"{login}@p1:1,p2:2/d?{query}",
    ):
        direct = Settings(database_url=url, **given).without_pooler()
        taken = parsed(direct)
        assert (taken.addresses, taken.user, taken.password(), taken.database) == (
            [address], "u@x", "p@s", "d",
        )  # fmt: skip
        assert direct.tls == {"sslmode": "disable"}
        assert {"application_name": "mine", "timezone": "UTC"}.items() <= (
            taken.server_settings.items()
        )
        assert "statement_timeout" in taken.server_settings
    by_parts = Settings(db_host="pooler", db_user="u", db_name="d", **given).without_pooler()
    taken = parsed(by_parts)
    assert (taken.addresses, taken.user, taken.database) == ([address], "u", "d")
    assert not by_parts.uses_pooler


def test_without_a_pooler_the_settings_are_the_same() -> None:
    for chosen in (Settings(db_host="h"), Settings(), Settings(db_pooler="pgbouncer")):
        assert chosen.without_pooler() is chosen


def test_without_a_ca_require_encrypts_and_verify_needs_one() -> None:
    required = Settings(db_host="h", db_ssl_mode="require")
    assert tls._context(required, required.tls).verify_mode == ssl.CERT_NONE
    for mode in ("verify-ca", "verify-full"):
        chosen = Settings(db_host="h", db_ssl_mode=mode)
        with pytest.raises(ConfigurationError, match="DB_SSL_CA is not set"):
            tls._context(chosen, chosen.tls)


def test_a_client_s_certificate_and_key_go_together() -> None:
    for name in ("db_ssl_cert", "db_ssl_key"):
        assert "DB_SSL_CERT and DB_SSL_KEY must be set together" in refused(**{name: "/x"})
    chosen = Settings(db_host="h", db_ssl_mode="require", db_ssl_cert="/c", db_ssl_key="/k")
    assert chosen.tls == {"sslmode": "require", "sslcert": "/c", "sslkey": "/k"}


# A false server, which asks for the password in clear


@pytest.fixture
async def false_server() -> AsyncIterator[tuple[int, list[bytes]]]:
    """Its port, and all that its clients have sent."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = {80877103: b"N", 196608: b"R" + struct.pack("!ll", 8, 3)}  # no TLS; your password
        try:
            while True:
                (length,) = struct.unpack("!l", await reader.readexactly(4))
                message = await reader.readexactly(length - 4)
                seen.append(message)
                code = struct.unpack("!l", message[:4])[0]
                writer.write(answer[code])
                if code == 196608:
                    seen.append(await reader.read(100))
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], seen


@pytest.mark.parametrize("mode", SSLMode)
async def test_in_production_no_password_is_sent_without_verified_tls(
    false_server: tuple[int, list[bytes]], authority: Path, mode: str
) -> None:
    port, seen = false_server
    host = "127.1"  # which leads here, and is none of this machine's for certain
    tls = {"db_ssl_mode": mode, "db_ssl_ca": authority}
    url = f"postgresql://u:{SECRET}@{host}:{port}/d"
    for place in (
        {"database_url": url},
        {"db_host": host, "db_port": port},
        {"db_host": "/nowhere", "db_direct_host": host, "db_direct_port": port},
    ):
        with pytest.raises((ConfigurationError, DatabaseUnavailable)):
            chosen = Settings(environment="production", db_password=SECRET, **tls, **place)
            await connect(chosen.without_pooler())
    copied = Settings(database_url=url, **tls).model_copy(update={"environment": "production"})
    with pytest.raises((ConfigurationError, DatabaseUnavailable)):
        await connect(copied)
    assert not any(SECRET.encode() in message for message in seen)
    assert bool(seen) == (mode == SSLMode.VERIFY_FULL)  # the others do not get as far
    with pytest.raises(DatabaseUnavailable):
        await connect(copied.model_copy(update={"db_allow_unverified_tls": True}))
    told = any(SECRET.encode() in message for message in seen)
    assert told == (mode in {SSLMode.DISABLE, SSLMode.ALLOW, SSLMode.PREFER})


# A real server that asks for passwords


ROLE = f"rôle @:/% {os.getpid()}"  # each test process has its own


async def administer(url: str, statement: str, *values: str) -> None:
    """Run a statement that takes no parameters, with literals in place of $1 and so on."""
    admin = await connect(settings_for(url, "postgres"))
    try:
        for number, value in enumerate(values, start=1):
            literal = await admin.fetchval("SELECT quote_literal($1)", value)
            statement = statement.replace(f"${number}", literal)
        await admin.execute(statement)
    finally:
        await admin.close()


@pytest.fixture(scope="module")
def guarded(server_url: str) -> Iterator[str]:
    """A server in a socket folder that asks for passwords, and has a role to give one to."""
    url = urlsplit(server_url)
    if url.password and "host=" in url.query:
        server = servers.Server(server_url, servers.GIVEN)
    else:
        server = servers.start_embedded(servers.short_folder())
    asyncio.run(administer(server.url, f'CREATE ROLE "{ROLE}" LOGIN'))
    yield server.url
    asyncio.run(administer(server.url, f'DROP ROLE "{ROLE}"'))
    server.stop()


async def set_password(guarded: str, password: str) -> None:
    await administer(guarded, f'ALTER ROLE "{ROLE}" PASSWORD $1', password)


def folder_of(guarded: str) -> tuple[str, int]:
    query = parse_qs(urlsplit(guarded).query)
    return query["host"][0], int(query.get("port", ["5432"])[0])


async def user_of(chosen: Settings) -> object:
    connection = await connect(chosen)
    try:
        return await connection.fetchval("SELECT session_user")
    finally:
        await connection.close()


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(password=TEXTS)
@example(password="p@s%20s:/?#[]&=+ $1 {x} \n\t'\"\\ é \N{TIGER}")
async def test_any_password_opens_a_real_server(guarded: str, password: str) -> None:
    await set_password(guarded, password)
    folder, port = folder_of(guarded)
    by_parts = Settings(
        db_host=folder, db_port=port, db_name="postgres", db_user=ROLE, db_password=password
    )
    login = f"{quote(ROLE, safe='')}:{quote(password, safe='')}"
    by_url = Settings(
        database_url=f"postgresql://{login}@/postgres?host={quote(folder, safe='')}&port={port}"
    )
    assert await user_of(by_parts) == await user_of(by_url) == ROLE


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for a socket: the path of one has 104 bytes on macOS."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.parametrize("form", ["DB_HOST", "the URL's query", "the URL's host"])
async def test_a_real_socket_folder_may_have_any_name(
    guarded: str, short_folder: Path, form: str
) -> None:
    folder, port = folder_of(guarded)
    odd = short_folder / "a b%20&c=d?é"
    odd.mkdir()
    (odd / f".s.PGSQL.{port}").symlink_to(Path(folder, f".s.PGSQL.{port}"))
    await set_password(guarded, "right")
    login, encoded = f"{quote(ROLE, safe='')}:right", quote(str(odd), safe="")
    chosen = {
        "DB_HOST": Settings(
            db_host=str(odd), db_port=port, db_name="postgres", db_user=ROLE, db_password="right"
        ),
        "the URL's query": Settings(
            database_url=f"postgresql://{login}@/postgres?host={encoded}&port={port}"
        ),
        "the URL's host": Settings(database_url=f"postgresql://{login}@{encoded}:{port}/postgres"),
    }[form]
    assert await user_of(chosen) == ROLE


async def test_a_wrong_password_is_an_error_that_does_not_show_it(guarded: str) -> None:
    await set_password(guarded, "right")
    folder, port = folder_of(guarded)
    wrong = Settings(
        db_host=folder, db_port=port, db_name="postgres", db_user=ROLE, db_password=SECRET
    )
    with pytest.raises(DatabaseUnavailable, match="password authentication failed") as caught:
        await user_of(wrong)
    assert SECRET not in str(caught.value)

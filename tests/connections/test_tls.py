"""Each sslmode against a real server with good and bad certificates, compared with libpq."""

import asyncio
import ctypes
import ctypes.util
import ipaddress
import itertools
import os
import shutil
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from tests.support.refused_settings import SECRET
from tiger_db import Database
from tiger_db.connections import connect
from tiger_db.connections.error_advice import explain
from tiger_db.encryption import generate_key
from tiger_db.errors import ConfigurationError, DatabaseUnavailable
from tiger_db.health import check_readiness
from tiger_db.settings import Settings
from tiger_db.testing import servers
from tiger_db.url_parameters import SSLMode

pytestmark = pytest.mark.skipif(
    not servers.installed(), reason="no PostgreSQL with TLS is installed here"
)
MODES = [mode.value for mode in SSLMode]
NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable and no file of this machine's user has a say."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(autouse=True)
async def _closed() -> AsyncIterator[None]:
    """Let the loop finish what TLS has to say when a connection is closed."""
    yield
    deadline = time.monotonic() + 10
    while any(
        one.raddr and one.status == psutil.CONN_ESTABLISHED
        for one in psutil.Process().net_connections("tcp")
    ):
        assert time.monotonic() < deadline, "a connection is not closed"
        await asyncio.sleep(0.01)


@dataclass(frozen=True)
class Authority:
    """Issues certificates into one folder."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        self.issue(self.name, authority=True)

    @property
    def certificate(self) -> Path:
        return self.folder / f"{self.name}.crt"

    def issue(
        self,
        name: str,
        *hosts: str,
        common_name: str | None = None,
        days: tuple[int, int] = (-1, 30),
        authority: bool = False,
    ) -> Path:
        """Write `name.crt` and `name.key`; returns the former."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name or f"the {name}")]
        )
        issuer, signer = subject, key
        if not authority:
            issuer = x509.load_pem_x509_certificate(self.certificate.read_bytes()).subject
            pem = (self.folder / f"{self.name}.key").read_bytes()
            loaded = serialization.load_pem_private_key(pem, None)
            assert isinstance(loaded, ec.EllipticCurvePrivateKey)
            signer = loaded
        builder = (
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(NOW + timedelta(days=days[0]))
            .not_valid_after(NOW + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if hosts:
            names = [_name(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        path = self.folder / f"{name}.crt"
        path.write_bytes(builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM))
        write_key(path.with_suffix(".key"), key)
        return path


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Our authority, with a certificate of every kind, in a folder whose name needs encoding."""
    authority = Authority(tmp_path_factory.mktemp("our ca&+%20"), "ours")
    authority.issue("good", "localhost", "127.0.0.1")
    authority.issue("address only", "127.0.0.1")
    authority.issue("other host", "db.example", common_name="localhost")
    authority.issue("common name", common_name="localhost")
    authority.issue("expired", "localhost", days=(-30, -1))
    authority.issue("not yet valid", "localhost", days=(1, 30))
    authority.issue("client", common_name="certified")
    authority.issue("other client", common_name="somebody")
    return authority


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that is nobody's."""
    authority = Authority(tmp_path_factory.mktemp("theirs"), "theirs")
    authority.issue("unknown", "localhost", "127.0.0.1")
    authority.issue("client", common_name="certified")
    return authority


@pytest.fixture(scope="module")
def authorities(ours: Authority, theirs: Authority) -> tuple[Authority, Authority]:
    return ours, theirs


class TLSServer:
    """A server whose certificate can be changed. What a user may connect by is the user's name."""

    def __init__(self, home: Path, ours: Authority) -> None:
        self.home, self.ours = home, ours
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c fsync=off"
        self.stop = servers.start_installed(home, options).stop
        self.shown: Path | None = None
        hba = home / "data/pg_hba.conf"
        hba.write_text(
            "local all tiger_db trust\n"
            "host all anyone all trust\n"
            "hostssl all tls_only all trust\n"
            "hostnossl all plain_only all trust\n"
            "hostssl all certified all cert\n"
            "hostssl all guarded all scram-sha-256\n"
        )
        shutil.copy(ours.certificate, home / "data/root.crt")
        shutil.chown(home / "data/root.crt", hba.stat().st_uid)
        self.tell(
            "CREATE USER anyone; CREATE USER tls_only; CREATE USER plain_only;"
            " CREATE USER certified; CREATE USER guarded PASSWORD 'x';"
            "ALTER SYSTEM SET ssl_ca_file = 'root.crt'",
        )

    def tell(self, statements: str) -> None:
        async def run() -> None:
            admin = await connect(
                Settings(db_host=str(self.home), db_port=self.port, db_name="postgres")
            )
            for statement in statements.split(";"):
                await admin.execute(statement)
            await admin.close()

        asyncio.run(run())

    def show(self, certificate: Path | None) -> None:
        """Show this certificate to new clients; None: speak no TLS."""
        if certificate == self.shown:
            return
        self.shown = certificate
        data = self.home / "data"
        if certificate is not None:
            for source in (certificate, certificate.with_suffix(".key")):
                copy = data / f"server{source.suffix}"
                shutil.copy(source, copy)
                shutil.chown(copy, data.stat().st_uid)
        self.tell(
            f"ALTER SYSTEM SET ssl = {'off' if certificate is None else 'on'};"
            "SELECT pg_reload_conf()"
        )
        expected = certificate and ssl.PEM_cert_to_DER_cert(certificate.read_text())
        deadline = time.monotonic() + 10
        while self._seen() != expected:
            assert time.monotonic() < deadline, "the server did not take its certificate"
            time.sleep(0.01)

    def _seen(self) -> bytes | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", self.port)) as plain:
            plain.sendall(struct.pack("!ll", 8, 80877103))  # SSLRequest
            if plain.recv(1) != b"S":
                return None
            with context.wrap_socket(plain) as secure:
                return secure.getpeercert(binary_form=True)


@pytest.fixture(scope="module")
def server(ours: Authority) -> Iterator[TLSServer]:
    server = TLSServer(servers.short_folder(), ours)
    yield server
    server.stop()


def libpq(**parameters: object) -> str:
    """`TLS`, `plain` or `refused`: what comes of connecting by libpq."""
    name = ctypes.util.find_library("pq")
    if name is None:
        pytest.skip("libpq is not installed here")
    library = ctypes.CDLL(name)
    library.PQconnectdbParams.restype = ctypes.c_void_p
    given = {key: str(value).encode() for key, value in parameters.items() if value is not None}
    keys = (ctypes.c_char_p * (len(given) + 1))(*(key.encode() for key in given), None)
    values = (ctypes.c_char_p * (len(given) + 1))(*given.values(), None)
    connection = ctypes.c_void_p(library.PQconnectdbParams(keys, values, 0))
    try:
        if library.PQstatus(connection) != 0:
            return "refused"
        return "TLS" if library.PQsslInUse(connection) else "plain"
    finally:
        library.PQfinish(connection)


async def outcome(settings: Settings) -> str:
    """The same of ours."""
    try:
        connection = await connect(settings)
    except (DatabaseUnavailable, ConfigurationError):
        return "refused"
    try:
        tls = await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
        return "TLS" if tls else "plain"
    finally:
        await connection.close()


# The same as libpq


KINDS = [
    "good", "address only", "other host", "common name", "expired", "ours", "unknown", "none",
]  # fmt: skip


def certificate(kind: str, ours: Authority, theirs: Authority) -> Path | None:
    """The file of a kind; None: no TLS."""
    if kind == "none":
        return None
    return (theirs if kind == "unknown" else ours).folder / f"{kind}.crt"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_each_mode_has_the_same_result_as_libpq(
    server: TLSServer, ours: Authority, theirs: Authority, kind: str
) -> None:
    await asyncio.to_thread(server.show, certificate(kind, ours, theirs))
    differ = []
    for user, ca, host, mode in itertools.product(
        ["anyone", "tls_only", "plain_only"],
        [None, ours.certificate, theirs.certificate],
        ["localhost", "127.0.0.1"],
        MODES,
    ):
        if host == "127.0.0.1" and (user != "tls_only" or ca != ours.certificate):
            continue  # only a name that is checked makes a difference
        if kind not in {"good", "unknown"} and (user == "plain_only" or ca == theirs.certificate):
            continue  # as with those
        place = {"host": host, "port": server.port, "user": user}
        theirs_was = libpq(**place, dbname="postgres", sslmode=mode, sslrootcert=ca)
        by_parts = Settings(
            **{f"db_{name}": value for name, value in place.items()},
            db_name="postgres",
            db_ssl_mode=mode,
            db_ssl_ca=ca,
        )
        query = f"sslmode={mode}" + (f"&sslrootcert={quote(str(ca), safe='')}" if ca else "")
        by_url = Settings(database_url=f"postgresql://{user}@{host}:{server.port}/postgres?{query}")
        was = [theirs_was, await outcome(by_parts)]
        if user == "tls_only":
            was.append(await outcome(by_url))
        if len(set(was)) > 1:
            differ.append((user, ca and ca.stem, host, mode, *was))
    assert differ == []


# What is expected, without libpq as well


@pytest.mark.parametrize(
    ("kind", "host", "refused"),
    [
        ("good", "localhost", {}),
        ("good", "127.0.0.1", {}),
        ("address only", "127.0.0.1", {}),
        ("address only", "localhost", {"verify-full": "Hostname mismatch"}),
        ("other host", "localhost", {"verify-full": "Hostname mismatch"}),
        ("other host", "127.0.0.1", {"verify-full": "IP address mismatch"}),
        ("expired", "localhost", dict.fromkeys(MODES[1:], "certificate has expired")),
        ("not yet valid", "localhost", dict.fromkeys(MODES[1:], "not yet valid")),
        ("unknown", "localhost", dict.fromkeys(MODES[1:], "unable to get local issuer")),
    ],
)
async def test_with_a_ca_a_certificate_is_accepted_or_refused_in_one_line(
    server: TLSServer, authorities: tuple[Authority, Authority], kind: str, host: str,
    refused: dict[str, str],
) -> None:  # fmt: skip
    ours, theirs = authorities
    await asyncio.to_thread(server.show, certificate(kind, ours, theirs))
    for mode in MODES[1:]:
        settings = Settings(
            db_host=host, db_port=server.port, db_user="tls_only", db_name="postgres",
            db_ssl_mode=mode, db_ssl_ca=ours.certificate,
        )  # fmt: skip
        if mode not in refused:
            assert await outcome(settings) == "TLS"
            continue
        with pytest.raises(DatabaseUnavailable, match=refused[mode]) as caught:
            await connect(settings)
        assert str(caught.value).startswith(
            f"cannot connect to {host}:{server.port}/postgres: the server's certificate is refused:"
        )
        assert "DB_SSL_CA" in (explain(caught.value) or "")


async def test_a_server_without_tls(server: TLSServer, ours: Authority) -> None:
    await asyncio.to_thread(server.show, None)
    place = {"db_host": "127.0.0.1", "db_port": server.port, "db_name": "postgres"}
    for mode in MODES:
        settings = Settings(**place, db_user="anyone", db_ssl_mode=mode, db_ssl_ca=ours.certificate)
        if mode in {"disable", "allow", "prefer"}:
            assert await outcome(settings) == "plain"
            continue
        with pytest.raises(DatabaseUnavailable, match=r"the server offers no TLS$") as caught:
            await connect(settings)
        assert "DB_SSL_MODE" in (explain(caught.value) or "")


# A client's certificate


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_certificate_is_accepted(
    server: TLSServer, ours: Authority, mode: str
) -> None:
    await asyncio.to_thread(server.show, ours.folder / "good.crt")
    cert = ours.folder / "client.crt"
    files = {"sslrootcert": ours.certificate, "sslcert": cert, "sslkey": cert.with_suffix(".key")}
    query = "&".join(f"{name}={quote(str(path), safe='')}" for name, path in files.items())
    settings = Settings(
        db_host="localhost", db_port=server.port, db_user="certified", db_name="postgres",
        db_ssl_mode=mode, db_ssl_ca=files["sslrootcert"], db_ssl_cert=cert,
        db_ssl_key=files["sslkey"],
    )  # fmt: skip
    url = f"postgresql://certified@localhost:{server.port}/postgres?sslmode={mode}&{query}"
    expected = "refused" if mode == "disable" else "TLS"
    assert await outcome(settings) == expected
    assert await outcome(Settings(database_url=url)) == expected


@pytest.mark.parametrize(
    ("whose", "name", "reason"),
    [
        (0, None, "requires a valid client certificate"),
        (0, "other client", "certificate authentication failed"),
        (1, "client", "unknown ca|closed|reset"),
    ],
)
async def test_a_missing_or_wrong_client_certificate_is_explained(
    server: TLSServer,
    authorities: tuple[Authority, Authority],
    whose: int,
    name: str | None,
    reason: str,
) -> None:
    ours = authorities[0]
    await asyncio.to_thread(server.show, ours.folder / "good.crt")
    cert = None if name is None else authorities[whose].folder / f"{name}.crt"
    settings = Settings(
        db_host="localhost", db_port=server.port, db_user="certified", db_name="postgres",
        db_ssl_mode="verify-full", db_ssl_ca=ours.certificate, db_ssl_cert=cert,
        db_ssl_key=cert and cert.with_suffix(".key"),
    )  # fmt: skip
    with pytest.raises(DatabaseUnavailable, match=reason) as caught:
        await connect(settings)
    advice = explain(caught.value) or ""
    assert "\n" not in advice
    # Who is refused with an alert may see the end of the line before that.
    assert "DB_SSL_CERT" in advice or "closed" in advice


# Files that are none


def encrypted(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = BestAvailableEncryption(SECRET.encode())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("mode", ["prefer", "verify-full"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ca": "missing"}, "DB_SSL_CA cannot be read: No such file or directory"),
        ({"ca": "folder"}, "DB_SSL_CA cannot be read: Is a directory"),
        ({"ca": "text"}, "DB_SSL_CA is not a PEM file of certificates"),
        ({"cert": "missing"}, "DB_SSL_CERT cannot be read: No such file or directory"),
        (
            {"cert": "text"},
            "DB_SSL_CERT and DB_SSL_KEY must be a PEM certificate and its private key",
        ),
        ({"key": "missing"}, "DB_SSL_KEY cannot be read: No such file or directory"),
        (
            {"key": "encrypted"},
            "DB_SSL_CERT and DB_SSL_KEY must be a PEM certificate and its private key",
        ),
        ({"key": "other"}, "DB_SSL_KEY is not the private key of DB_SSL_CERT"),
        ({"key": "open"}, "DB_SSL_KEY can be read by other users"),
    ],
)
async def test_the_message_of_a_bad_file_names_its_variable(
    server: TLSServer, ours: Authority, mode: str, changes: dict[str, str], reason: str
) -> None:
    tmp_path = Path.home()
    await asyncio.to_thread(server.show, ours.folder / "good.crt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text(SECRET)
    shutil.copy(ours.folder / "client.key", tmp_path / "open")
    (tmp_path / "open").chmod(0o644)
    shutil.copy(ours.folder / "other client.key", tmp_path / "other")
    encrypted(tmp_path / "encrypted")
    files = {
        "ca": ours.certificate,
        "cert": ours.folder / "client.crt",
        "key": ours.folder / "client.key",
    } | {name: tmp_path / file for name, file in changes.items()}
    settings = Settings(
        db_host="localhost", db_port=server.port, db_user="certified", db_name="postgres",
        db_ssl_mode=mode, **{f"db_ssl_{name}": path for name, path in files.items()},
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match=f"^{reason}") as caught:
        await connect(settings)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    url = Settings(
        database_url=f"postgresql://certified@localhost:{server.port}/postgres?sslmode={mode}"
        + "".join(
            f"&{parameter}={quote(str(files[name]), safe='')}"
            for name, parameter in {"ca": "sslrootcert", "cert": "sslcert", "key": "sslkey"}.items()
        )
    )
    with pytest.raises(ConfigurationError, match=r"^DATABASE_URL: ssl"):
        await connect(url)


@pytest.mark.parametrize("name", ["ca", "cert"])
async def test_a_missing_file_is_found_before_the_first_connection(name: str) -> None:
    files = {"ca": ["db_ssl_ca"], "cert": ["db_ssl_cert", "db_ssl_key"]}
    settings = Settings(db_host="localhost", **dict.fromkeys(files[name], "/nowhere"))
    with pytest.raises(ConfigurationError, match=f"^DB_SSL_{name.upper()} cannot be read: No such"):
        Database(settings)


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
async def test_without_a_ca_nothing_can_be_verified(server: TLSServer, mode: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^DB_SSL_CA is not set: sslmode {mode}"):
        await connect(Settings(db_host="localhost", db_port=server.port, db_ssl_mode=mode))


@pytest.mark.parametrize("place", ["sslrootcert", "DB_SSL_CA"])
async def test_the_authorities_of_the_operating_system_can_verify_a_server(
    server: TLSServer, ours: Authority, theirs: Authority, monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:  # fmt: skip
    url = f"postgresql://tls_only@localhost:{server.port}/postgres"
    settings = {
        "sslrootcert": Settings(database_url=f"{url}?sslrootcert=system&channel_binding=require"),
        "DB_SSL_CA": Settings(database_url=url, db_ssl_mode="verify-full", db_ssl_ca="system"),
    }[place]
    await asyncio.to_thread(server.show, ours.folder / "good.crt")
    monkeypatch.setenv("SSL_CERT_FILE", str(ours.certificate))
    assert await outcome(settings) == "TLS"
    monkeypatch.setenv("SSL_CERT_FILE", str(theirs.certificate))
    with pytest.raises(DatabaseUnavailable, match="certificate is refused: self-signed"):
        await connect(settings)
    monkeypatch.setenv("SSL_CERT_FILE", str(ours.certificate))
    await asyncio.to_thread(server.show, ours.folder / "other host.crt")
    with pytest.raises(DatabaseUnavailable, match="Hostname mismatch"):
        await connect(settings)


async def test_no_variable_of_libpq_changes_tls(
    server: TLSServer, ours: Authority, theirs: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(server.show, ours.folder / "good.crt")
    for name, value in {
        "PGSSLMODE": "disable", "PGSSLROOTCERT": theirs.certificate, "PGSSLCERT": "/nowhere",
        "PGSSLNEGOTIATION": "direct", "PGSSLMAXPROTOCOLVERSION": "TLSv1", "PGSSLCRL": "/nowhere",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    place = {"db_host": "localhost", "db_port": server.port, "db_name": "postgres"}
    for mode in MODES:
        verified = {} if mode in {"disable", "require"} else {"db_ssl_ca": ours.certificate}
        settings = Settings(**place, db_user="anyone", db_ssl_mode=mode, **verified)
        assert await outcome(settings) == ("plain" if mode in {"disable", "allow"} else "TLS")
    assert await outcome(Settings(**place, db_user="tls_only")) == "TLS"


async def test_direct_negotiation_begins_with_tls(ours: Authority) -> None:
    seen: list[tuple[str | None, bytes]] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ours.folder / "good.crt", ours.folder / "good.key")
    context.set_alpn_protocols(["postgresql"])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        protocol = writer.get_extra_info("ssl_object").selected_alpn_protocol()
        seen.append((protocol, (await reader.readexactly(8))[4:]))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as false_server:
        port = false_server.sockets[0].getsockname()[1]
        ca = quote(str(ours.certificate), safe="")
        query = f"sslmode=verify-full&sslrootcert={ca}&sslnegotiation=direct"
        with pytest.raises(DatabaseUnavailable):
            await connect(Settings(database_url=f"postgresql://u@127.0.0.1:{port}/d?{query}"))
    assert seen == [("postgresql", struct.pack("!hh", 3, 0))]  # the version of the start packet


async def test_a_wrong_password_is_told_if_the_second_attempt_has_another_error(
    server: TLSServer, ours: Authority
) -> None:
    """With `prefer`, the attempt without TLS is refused for the lack of TLS."""
    await asyncio.to_thread(server.show, ours.folder / "good.crt")
    settings = Settings(
        db_host="localhost", db_port=server.port, db_name="postgres", db_user="guarded",
        db_password=SECRET,
    )  # fmt: skip
    with pytest.raises(DatabaseUnavailable, match="password authentication failed"):
        await connect(settings)


# Production


async def test_health_advises_verified_tls_in_production(keys: dict[str, str]) -> None:
    remote = {
        "environment": "production", "db_allow_unverified_tls": True, "db_connect_timeout": 0.1,
        **keys,
    }  # fmt: skip
    told = "is not verified: set DB_SSL_MODE=verify-full and DB_SSL_CA"
    for name, place in {
        "DB_HOST": {"db_host": "192.0.2.1"},
        "DATABASE_URL": {"database_url": "postgresql://192.0.2.1/d"},
        "DB_DIRECT_HOST": {
            "db_host": "/nowhere", "db_pooler": "pgbouncer", "db_direct_host": "192.0.2.1",
        },
        "DB_REPLICA_HOSTS": {"db_host": "/nowhere", "db_replica_hosts": "localhost,192.0.2.1"},
    }.items():  # fmt: skip
        report = await check_readiness(Settings(**remote, **place))
        assert [p for p in report.problems if told in p] == [
            f"the identity of the server in {name} {told}"
        ]
        report = await check_readiness(Settings(**remote | {"environment": "staging"}, **place))
        assert not any(told in problem for problem in report.problems)


@pytest.fixture
def keys() -> dict[str, str]:
    return {"encryption_keys": generate_key(), "api_key_peppers": generate_key()}

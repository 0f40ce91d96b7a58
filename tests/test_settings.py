"""Settings from environment variables, and messages that show no values."""

import os
import subprocess
import sys
from base64 import b64decode, b64encode, urlsafe_b64encode
from datetime import date
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

import tiger_db
from tests.support.refused_settings import SECRET, refused
from tiger_db import Database
from tiger_db.encryption import generate_key
from tiger_db.errors import ConfigurationError
from tiger_db.keys_in_force import API_KEY_PEPPERS, AUDIT_SIGNING_KEY, ENCRYPTION_KEYS, configured
from tiger_db.settings import Settings
from tiger_db.signing import generate_signing_key, parse_public_key
from tiger_db.url_parameters import SSLMode

# design.md, "Settings", as far as this version goes.
VARIABLES: dict[str, tuple[str, object]] = {
    "DATABASE_URL": ("postgresql://u:p@h/d", "postgresql://u:p@h/d"),
    "DB_HOST": ("db.example", "db.example"),
    "DB_PORT": ("6432", 6432),
    "DB_REPLICA_HOSTS": ("s1.example,[::1]:6433", "s1.example,[::1]:6433"),
    "DB_NAME": ("tiger one", "tiger one"),
    "DB_SCHEMA": ('Tiger "one"', 'Tiger "one"'),
    "DB_USER": ("tiger", "tiger"),
    "DB_PASSWORD": (" p@ss%20/#?é ", " p@ss%20/#?é "),
    "DB_POOL_SIZE": ("7", 7),
    "DB_MAX_OVERFLOW": ("0", 0),
    "DB_POOL_TIMEOUT": ("2.5", 2.5),
    "DB_POOL_RECYCLE": ("-1", -1),
    "DB_POOLER": ("pgbouncer", "pgbouncer"),
    "DB_DIRECT_HOST": ("db.example", "db.example"),
    "DB_DIRECT_PORT": ("5433", 5433),
    "DB_SSL_MODE": ("verify-full", SSLMode.VERIFY_FULL),
    "DB_SSL_CERT": ("/etc/ssl/a b.crt", Path("/etc/ssl/a b.crt")),
    "DB_SSL_KEY": ("/etc/ssl/a b.key", Path("/etc/ssl/a b.key")),
    "DB_SSL_CA": ("/etc/ssl/ca.crt", Path("/etc/ssl/ca.crt")),
    "DB_ALLOW_UNVERIFIED_TLS": ("true", True),
    "ENVIRONMENT": ("Staging", "staging"),
    "DB_DEBUG": ("true", True),
    "DB_CONNECT_TIMEOUT": ("3", 3.0),
    "DB_QUERY_TIMEOUT": ("0", 0.0),
    "DB_IDLE_TRANSACTION_TIMEOUT": ("0", 0.0),
    "DB_SLOW_QUERY_SECONDS": ("0.5", 0.5),
    "TIGER_DB_HOME": ("/srv/tiger", Path("/srv/tiger")),
    "ENCRYPTION_KEYS": ("k1:abc", "k1:abc"),
    "ENCRYPTION_KEYS_FILE": ("/run/secrets/keys", Path("/run/secrets/keys")),
    "API_KEY_PEPPERS": ("p1:abc", "p1:abc"),
    "API_KEY_PEPPERS_FILE": ("/run/secrets/peppers", Path("/run/secrets/peppers")),
    "API_KEYS_ALLOW_UNPEPPERED_UNTIL": ("2027-01-31", date(2027, 1, 31)),
    "API_KEYS_ALLOW_UNSIGNED_UNTIL": ("2027-01-31", date(2027, 1, 31)),
    "AUDIT_SIGNING_KEY": ("abc", "abc"),
    "AUDIT_SIGNING_KEY_FILE": ("/run/secrets/seal", Path("/run/secrets/seal")),
    "AUDIT_CHECKPOINTS": ("/srv/checkpoints", Path("/srv/checkpoints")),
    "AUDIT_ARCHIVE": ("s3://bucket/prefix", "s3://bucket/prefix"),
    "AUDIT_RETENTION_MONTHS": ("84", 84),
    "ACCOUNT_FAILING_AFTER": ("5", 5),
    "ACCOUNT_FAILING_FOR": ("0.5", 0.5),
    "ACCOUNT_SUSPEND_AFTER": ("1000000", 1_000_000),
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


# Variables


def test_there_is_a_variable_for_every_field() -> None:
    assert {name.upper() for name in Settings.model_fields} == VARIABLES.keys()


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = VARIABLES[name]
    monkeypatch.setenv(name, text)
    if name in {"DB_SSL_CERT", "DB_SSL_KEY"}:  # which go together
        monkeypatch.setenv("DB_SSL_CERT", VARIABLES["DB_SSL_CERT"][0])
        monkeypatch.setenv("DB_SSL_KEY", VARIABLES["DB_SSL_KEY"][0])
    if name == "DB_REPLICA_HOSTS":
        monkeypatch.setenv("DB_HOST", "db.example")
    read = getattr(Settings(), name.lower())
    assert (read.get_secret_value() if isinstance(read, SecretStr) else read) == value


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_variable_is_an_unset_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert Settings() == Settings(**dict(Settings()))


BAD = {
    "ENVIRONMENT": ["prod", "productive", " production"],
    "DATABASE_URL": ["h/d", "mysql://h/d", "'postgresql://h/d", "postgresql//h/d"],
    "DB_PORT": ["0", "65536", "-1", "5432x", "1e3", "0x10", "tcp://", "tcp://10.96.0.1"],
    "DB_POOL_SIZE": ["0", "1001", "-5", "five", "1.5"],
    "DB_MAX_OVERFLOW": ["-1", "1001", "ten"],
    "DB_POOL_TIMEOUT": ["0", "-1", "nan", "inf", "1h"],
    "DB_POOL_RECYCLE": ["-2", "never", "1.5"],
    "DB_CONNECT_TIMEOUT": ["0", "nan", "inf", "10s"],
    "DB_QUERY_TIMEOUT": ["-1", "nan", "inf", "86401"],
    "DB_IDLE_TRANSACTION_TIMEOUT": ["-1", "nan", "inf", "86401"],
    "DB_SSL_MODE": ["on", "true", "VERIFY-FULL", "verify_full", " require"],
    "DB_POOLER": ["pgpool", "PgBouncer", "true"],
    "DB_DIRECT_PORT": ["0", "65536", "x"],
    "DB_DIRECT_HOST": ["\udcff"],
    "DB_DEBUG": ["maybe", "2"],
    "DB_PASSWORD": ["a\udcff"],  # as a byte that is not UTF-8 comes from the environment
    "DB_HOST": ["\udcff", "h1,,h2", "h1,", "h1:0", "h1:65536,h2"],
    "DB_REPLICA_HOSTS": ["h1,,h2", "h1:0", "h1"],  # the last without a primary
    "DB_NAME": ["\udcff"],
    "DB_SCHEMA": ["pg_temp", "pg_x", "information_schema", "$user", "a" * 64, "é" * 32, "\udcff"],
    "DB_USER": ["\udcff"],
    "AUDIT_ARCHIVE": ["gs://bucket/prefix", "s3://", "s3:///prefix", "s3://key:secret@bucket/x"],
    "AUDIT_RETENTION_MONTHS": ["0", "-1", "1201", "1.5", "ever"],
    "ACCOUNT_FAILING_AFTER": ["0", "-1", "1000001", "1.5", "three"],
    "ACCOUNT_FAILING_FOR": ["0", "-1", "nan", "inf", "86401", "5m", "PT5M"],
    "ACCOUNT_SUSPEND_AFTER": ["0", "-1", "1000001", "1.5", "never"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in BAD for text in BAD[name]])
def test_the_message_of_a_bad_value_is_one_line_that_names_the_variable(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    assert name in refused()


SHOWN = {
    "DB_HOST",
    "DB_DIRECT_HOST",
    "DB_NAME",
    "DB_REPLICA_HOSTS",
    "DB_SCHEMA",
    "DB_USER",
    "TIGER_DB_HOME",
    "AUDIT_ARCHIVE",
    "AUDIT_CHECKPOINTS",
} | {n for n in VARIABLES if "_SSL_" in n}


@pytest.mark.parametrize("name", VARIABLES)
@settings(max_examples=4)
@example(text="\0", scheme="")
@given(text=st.text(max_size=20), scheme=st.sampled_from(["", "postgresql://", "k1:"]))
def test_no_value_ever_shows(name: str, text: str, scheme: str) -> None:
    assume(scheme or ":" not in text)  # else it is the id of a key, which shows
    for value in (scheme + text + SECRET, scheme + SECRET + text):
        try:
            chosen = Settings(**{name.lower(): value})
            configured(chosen, ENCRYPTION_KEYS)
            configured(chosen, API_KEY_PEPPERS)
            configured(chosen, AUDIT_SIGNING_KEY)
        except ConfigurationError as error:
            message = str(error)
        else:
            message = f"{name}: {'' if name in SHOWN else chosen!r}"
        assert name in message
        assert "\n" not in message
        assert SECRET not in message


# The embedded server refuses a TIGER_DB_HOME that cannot be a folder.
FILES = [
    "DB_SSL_CERT", "DB_SSL_KEY", "DB_SSL_CA", "ENCRYPTION_KEYS_FILE", "API_KEY_PEPPERS_FILE",
    "AUDIT_SIGNING_KEY_FILE",
]  # fmt: skip


@pytest.mark.parametrize("name", ["DATABASE_URL", *FILES])
def test_a_nul_is_refused(name: str) -> None:
    assert name in refused(**{name.lower(): "postgresql://h/\0"})


def test_the_message_names_all_bad_variables() -> None:
    message = refused(db_port=0, db_pool_size="x")
    assert "DB_PORT: " in message
    assert "DB_POOL_SIZE: " in message


def test_an_unknown_setting_is_refused() -> None:
    assert "DB_HOTS" in refused(db_hots=SECRET)


def test_settings_show_no_secret() -> None:
    chosen = Settings(
        database_url=f"postgresql://u:{SECRET}@h/d",
        db_password=SECRET,
        encryption_keys=SECRET,
        audit_signing_key=SECRET,
    )
    assert SECRET not in f"{chosen!r} {chosen} {chosen.model_dump()} {chosen.location}"


@pytest.mark.slow
def test_nothing_is_read_at_import_time(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DB_PORT=nonsense\n")
    environment = {**os.environ, **dict.fromkeys(VARIABLES, "nonsense")}
    environment["PYTHONPATH"] = str(Path(tiger_db.__file__).parents[1])
    modules = "tiger_db, tiger_db.settings, tiger_db.database, tiger_db.crud, tiger_db.cli"
    subprocess.run(
        [sys.executable, "-c", f"import {modules}; from tiger_db import *"],
        cwd=tmp_path,
        env=environment,
        check=True,
    )


def test_a_file_of_variables_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("DB_HOST=elsewhere\n")
    monkeypatch.chdir(tmp_path)
    assert Settings().db_host is None


@pytest.mark.parametrize("name", ["DB_PORT", "DB_DIRECT_PORT"])
@pytest.mark.parametrize(
    "value", ["tcp://10.96.0.1:6432", "tcp://[fd00::1]:6432", "udp://10.0.0.1:1"]
)
def test_a_port_that_kubernetes_sets_for_a_service_counts_as_unset(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert Settings().embedded
    assert getattr(Settings(db_host="h"), name.lower()) == 5432


# Production


def test_production_needs_a_server_of_its_own() -> None:
    assert "DB_HOST or DATABASE_URL is required" in refused(environment="PRODUCTION")
    assert Settings(environment="production", db_host="localhost").production


@pytest.mark.parametrize("environment", ["development", "test", "testing", "staging"])
def test_nothing_else_is_production(environment: str) -> None:
    chosen = Settings(environment=environment)
    assert not chosen.production
    assert configured(chosen, ENCRYPTION_KEYS) is None


def test_production_needs_encryption_keys() -> None:
    chosen = Settings(environment="production", db_host="localhost")
    for use in (lambda: configured(chosen, ENCRYPTION_KEYS), lambda: Database(chosen)):
        with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS or ENCRYPTION_KEYS_FILE"):
            use()
    with_keys = chosen.model_copy(update={"encryption_keys": SecretStr(generate_key("k7"))})
    assert str(configured(with_keys, ENCRYPTION_KEYS)) == "KeyRing(k7)"


@pytest.mark.parametrize(
    "bad",
    [
        "soon", "0", "1800000000", "20270131", "2027-W04-7", "2027-1-31", "2027-02-30",
        "31.01.2027", "2027-01-31T00:00:00", "2027-01-31Z", "\uff12027-01-31", "2027-01-31 x",
        "true", SECRET, 20270131, True,
    ],
)  # fmt: skip
def test_a_malformed_date_is_refused(bad: object) -> None:
    message = refused(api_keys_allow_unpeppered_until=bad)
    assert message == "API_KEYS_ALLOW_UNPEPPERED_UNTIL: the value must be a date such as 2027-01-31"


WEAK = [None, *(mode for mode in SSLMode if mode != SSLMode.VERIFY_FULL)]


def elsewhere(host: str) -> dict[str, dict[str, str]]:
    """Each way to name a host, by the variable that does."""
    local = {"db_host": "localhost"}
    return {
        "DB_HOST": {"db_host": f"localhost,{host}"},
        "DATABASE_URL": {"database_url": f"postgresql://u:{SECRET}@localhost,{host}/d"},
        "DB_DIRECT_HOST": {**local, "db_direct_host": host.strip("[]")},
        "DB_REPLICA_HOSTS": {**local, "db_replica_hosts": f"localhost,{host}"},
    }


@pytest.mark.parametrize(
    ("host", "mode"),
    [
        *(("db.example", mode) for mode in WEAK),
        *((host, None) for host in ("10.1.2.3", "[fd00::1]", "127.1", "0.0.0.0")),
        ("[::ffff:10.1.2.3]", SSLMode.REQUIRE),
    ],
)
def test_in_production_a_remote_server_needs_verify_full(host: str, mode: str | None) -> None:
    """Each name counts that is not this machine's for certain, whatever it resolves to."""
    production = {"environment": "production", "db_password": SECRET}
    for name, place in elsewhere(host).items():
        told = refused(**production, **place, db_ssl_mode=mode, db_ssl_ca="/ca.crt")
        assert told.startswith(
            "DB_SSL_MODE must be verify-full, because ENVIRONMENT=production and the server is on"
            f" another machine ({name}): "
        )
        assert "DB_ALLOW_UNVERIFIED_TLS=true" in told
        assert SECRET not in told
        for allowed in (
            {**production, "db_ssl_mode": "verify-full"},
            {**production, "db_ssl_mode": mode, "db_allow_unverified_tls": True},
            {"environment": "staging", "db_ssl_mode": mode},
        ):
            assert Settings(**allowed, **place).connect_args()


@pytest.mark.parametrize("mode", WEAK[1:])
def test_the_sslmode_of_the_url_takes_precedence(mode: str) -> None:
    given = {"environment": "production", "db_ssl_mode": "verify-full"}
    url = f"postgresql://u:{SECRET}@db.example/d?sslrootcert=/ca.crt&sslmode="
    told = refused(**given, database_url=url + mode)
    assert told.startswith("DATABASE_URL: sslmode must be verify-full")
    assert SECRET not in told
    assert Settings(**given | {"db_ssl_mode": mode}, database_url=f"{url}verify-full")


@pytest.mark.parametrize("query", ["host=db.example", "host=localhost,db.example", "port=1"])
def test_a_host_in_the_query_replaces_the_one_before_it(query: str) -> None:
    url = f"postgresql://{'db.example' if 'host' not in query else 'localhost'}/d?{query}"
    assert "verify-full" in refused(environment="production", database_url=url)
    # libpq would connect there, and verify the certificate of `host`.
    url = "postgresql://localhost/d?hostaddr=10.1.2.3"
    assert "hostaddr is not supported: write the address as host" in refused(
        environment="production", database_url=url
    )


def test_a_client_certificate_does_not_verify_the_server() -> None:
    certificate = {"db_ssl_mode": "require", "db_ssl_cert": "/c", "db_ssl_key": "/k"}
    told = refused(environment="production", db_host="db.example", **certificate)
    assert told.startswith("DB_SSL_MODE must be verify-full")


@pytest.mark.parametrize(
    ("host", "mode"),
    [
        *(("localhost", mode) for mode in WEAK),
        *((host, None) for host in ("LOCALHOST", "127.0.0.1", "127.9.9.9", "[::1]", "%2Frun")),
        ("[::ffff:127.0.0.1]", SSLMode.REQUIRE),
    ],
)
def test_a_local_server_needs_no_verified_tls(host: str, mode: str | None) -> None:
    given = {"environment": "production", "db_ssl_mode": mode}
    plain = unquote(host.strip("[]"))
    assert Settings(**given, database_url=f"postgresql://u@{host}:5432/d").connect_args()
    assert Settings(**given, db_host=plain, db_direct_host=plain).without_pooler().connect_args()
    assert Settings(**given, database_url="postgresql:///d").connect_args()


# Files


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"\n{generate_key('k1')},{generate_key('k2')}\r\n")
    assert (
        str(configured(Settings(encryption_keys_file=path), ENCRYPTION_KEYS)) == "KeyRing(k1, k2)"
    )


@pytest.mark.slow
def test_a_file_of_keys_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    _, _, key = generate_key("k").partition(":")
    keys = [f"k{number}:{key}" for number in range(25_000)]
    path.write_text(",".join(keys))
    assert path.stat().st_size > 1_000_000
    ring = configured(Settings(encryption_keys_file=path), ENCRYPTION_KEYS)
    assert ring is not None
    assert len(ring.key_ids) == len(keys)


def test_a_signing_key_is_optional_and_read_from_variable_or_file(tmp_path: Path) -> None:
    text = generate_signing_key()
    path = tmp_path / "key"
    path.write_text(f"{text}\n")
    of_file = configured(Settings(audit_signing_key_file=path), AUDIT_SIGNING_KEY)
    of_text = configured(Settings(audit_signing_key=text), AUDIT_SIGNING_KEY)
    assert of_file is not None
    assert of_text is not None
    assert of_file.private_bytes_raw() == of_text.private_bytes_raw() == b64decode(text)
    assert (
        configured(Settings(environment="production", db_host="localhost"), AUDIT_SIGNING_KEY)
        is None
    )


def test_a_signing_key_and_a_public_key_may_be_url_safe_base64() -> None:
    seed = b"\xff\xfe" * 16
    for encode in (b64encode, urlsafe_b64encode):
        text = encode(seed).decode()
        for written in (text, text.rstrip("="), f" {text}\n"):
            key = configured(Settings(audit_signing_key=written), AUDIT_SIGNING_KEY)
            assert key is not None
            assert key.private_bytes_raw() == seed
        assert key is not None
        raw = key.public_key().public_bytes_raw()
        assert parse_public_key(encode(raw).decode()).public_bytes_raw() == raw


@pytest.mark.parametrize("text", ["", SECRET, "AAAA", b64encode(bytes(33)).decode()])
def test_a_malformed_signing_key_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        configured(Settings(audit_signing_key_file=path), AUDIT_SIGNING_KEY)
    assert str(caught.value) == "AUDIT_SIGNING_KEY_FILE: the signing key must be base64 of 32 bytes"
    if text:
        with pytest.raises(ConfigurationError) as caught:
            configured(Settings(audit_signing_key=text), AUDIT_SIGNING_KEY)
        assert str(caught.value) == "AUDIT_SIGNING_KEY: the signing key must be base64 of 32 bytes"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "ENCRYPTION_KEYS_FILE cannot be read: No such file"),
        (b"", "ENCRYPTION_KEYS_FILE: key 1 does not have the form id:base64"),
        (SECRET.encode() + b"\xff", "ENCRYPTION_KEYS_FILE cannot be read: the file is not UTF-8"),
        (b"k1:" + SECRET.encode(), "ENCRYPTION_KEYS_FILE: key 'k1' is not 32 bytes of base64"),
    ],
)
def test_a_file_without_keys_is_an_error(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        configured(Settings(encryption_keys_file=path), ENCRYPTION_KEYS)
    assert str(caught.value).startswith(reason)
    assert SECRET not in str(caught.value)


def test_a_folder_in_place_of_a_file_of_keys_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        configured(Settings(encryption_keys_file=tmp_path), ENCRYPTION_KEYS)


def test_keys_in_variable_and_file_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="but not both"):
        configured(
            Settings(encryption_keys=generate_key(), encryption_keys_file=tmp_path), ENCRYPTION_KEYS
        )

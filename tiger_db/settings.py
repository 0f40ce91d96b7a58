"""What the environment says. Nothing is read before a `Settings()` is made."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypedDict, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from tiger_db.encryption import KeyRing
from tiger_db.errors import ConfigurationError, EncryptionError
from tiger_db.peppers import Peppers
from tiger_db.places import SCHEME, SSLMode, check_url, hosts_in, hosts_in_url
from tiger_db.signing import parse_signing_key

if TYPE_CHECKING:
    import asyncpg

T = TypeVar("T")


class ConnectArgs(TypedDict, total=False):
    """Keyword arguments of `asyncpg.connect`."""

    dsn: str
    host: str | list[str]  # several: each is to be tried
    port: int | list[int]
    user: str
    password: str | None
    database: str
    timeout: float
    command_timeout: float | None
    target_session_attrs: str
    statement_cache_size: int
    server_settings: dict[str, str]
    connection_class: "type[asyncpg.Connection[asyncpg.Record]]"


def _without_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def _path_without_nul(value: Path) -> Path:
    _without_nul(str(value))
    return value


def _sendable(value: SecretStr) -> SecretStr:
    try:
        _without_nul(value.get_secret_value()).encode()
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8 text") from None
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
File = Annotated[Path, AfterValidator(_path_without_nul)]
SecretText = Annotated[SecretStr, AfterValidator(_sendable)]
_GRACE = 5  # seconds beyond DB_QUERY_TIMEOUT, after which a server that does not answer is lost
# What PgBouncer takes at the start of a session, and keeps apart for each of its clients.
_POOLED_SETTINGS = ("application_name", "timezone")


class Settings(BaseSettings):
    """The settings of one process: each field is the environment variable of its name.

    Raises:
        ConfigurationError: one line that names the variable; values are never shown.
    """

    model_config = SettingsConfigDict(
        env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    environment: Annotated[
        Literal["development", "test", "testing", "staging", "production"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
    ] = "development"

    database_url: SecretText | None = None
    db_host: Text | None = None
    db_port: int = Field(default=5432, ge=1, le=65535)
    db_name: Text = "tiger_db"
    db_user: Text = "tiger_db"
    db_password: SecretText | None = None

    db_pooler: Literal["none", "pgbouncer"] = "none"
    db_direct_host: Text | None = None
    db_direct_port: int = Field(default=5432, ge=1, le=65535)
    db_replica_hosts: Text | None = None

    db_ssl_mode: SSLMode | None = None
    db_ssl_cert: File | None = None
    db_ssl_key: File | None = None
    db_ssl_ca: File | None = None

    db_pool_size: int = Field(default=5, ge=1, le=1000)
    db_max_overflow: int = Field(default=10, ge=0, le=1000)
    db_pool_timeout: float = Field(default=30, gt=0, le=3600, description="seconds")
    db_pool_recycle: int = Field(default=1800, ge=-1, description="seconds; -1: never")
    db_connect_timeout: float = Field(default=10, gt=0, le=3600, description="seconds")
    db_query_timeout: float = Field(default=30, ge=0, le=86400, description="seconds; 0: none")
    db_idle_transaction_timeout: float = Field(
        default=60, ge=0, le=86400, description="seconds; 0: none"
    )
    db_slow_query: float = Field(default=1, ge=0, le=86400, description="seconds; 0: log none")
    db_sql_comments: bool = Field(default=False, description="name the caller in every statement")
    db_debug: bool = Field(default=False, description="log every statement, without parameters")

    tiger_db_home: Path | None = Field(default=None, description="folder of the embedded server")

    encryption_keys: SecretStr | None = None
    encryption_keys_file: File | None = None
    api_key_peppers: SecretStr | None = None
    api_key_peppers_file: File | None = None
    audit_signing_key: SecretStr | None = None
    audit_signing_key_file: File | None = None
    audit_retention_months: int | None = Field(default=None, ge=1, le=1200)

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)  # type: ignore[arg-type]  # what pydantic is there to check
        except ValidationError as error:
            raise ConfigurationError(_one_line(error)) from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.database_url is not None:
            url = self.database_url.get_secret_value()
            check_url(url)
            if self.pooled and "options" in dict(parse_qsl(urlsplit(url).query)):
                raise ValueError("DATABASE_URL: options are not for DB_POOLER: use ALTER ROLE")
        if self.production and self.embedded:
            raise ValueError("DB_HOST or DATABASE_URL is required when ENVIRONMENT=production")
        if (self.db_ssl_cert is None) != (self.db_ssl_key is None):
            raise ValueError("DB_SSL_CERT and DB_SSL_KEY go together")
        if self.embedded and self.db_replica_hosts is not None:
            raise ValueError("DB_REPLICA_HOSTS needs DB_HOST or DATABASE_URL")
        for name, hosts in (("DB_HOST", self.db_host), ("DB_REPLICA_HOSTS", self.db_replica_hosts)):
            if hosts is not None:
                hosts_in(name, hosts, str(self.db_port))
        return self

    @property
    def production(self) -> bool:
        return self.environment == "production"

    @property
    def embedded(self) -> bool:
        """Whether the embedded PostgreSQL serves, because no other server is named."""
        return self.database_url is None and self.db_host is None

    @property
    def pooled(self) -> bool:
        """Whether each transaction may be in another session of the server."""
        return self.db_pooler != "none"

    def directly(self) -> Self:
        """Settings that lead past the pooler, for what outlasts a transaction.

        Raises:
            ConfigurationError: there is a pooler, and `DB_DIRECT_HOST` is not set.
        """
        if self.embedded:
            return self
        if self.db_direct_host is None:
            if self.pooled:
                raise ConfigurationError(
                    "DB_DIRECT_HOST is not set: with DB_POOLER, LISTEN, migrations and sealing need"
                    " a connection of their own to the server"
                )
            return self
        host, port = self.db_direct_host, self.db_direct_port
        changes: dict[str, object] = {"db_host": host, "db_port": port, "db_pooler": "none"}
        if self.database_url is not None:
            url = urlsplit(self.database_url.get_secret_value())
            login, at, _ = url.netloc.rpartition("@")
            quoted = f"[{host}]" if ":" in host and "/" not in host else quote(host, safe="")
            query = [item for item in parse_qsl(url.query) if item[0] not in {"host", "port"}]
            changes["database_url"] = SecretStr(
                urlunsplit(
                    url._replace(netloc=f"{login}{at}{quoted}:{port}", query=urlencode(query))
                )
            )
        return self.model_copy(update={**changes, "db_direct_host": None})

    @property
    def database(self) -> str:
        """The name of the database."""
        if self.database_url is None:
            return self.db_name
        url = urlsplit(self.database_url.get_secret_value())
        query = dict(parse_qsl(url.query))
        return (
            unquote(url.path.lstrip("/"))
            or query.get("dbname")
            or query.get("database")
            or query.get("user")
            or unquote(url.username or "")
            or self.db_name
        )

    @property
    def place(self) -> str:
        """Where the database is, for people: no user name and no password."""
        if self.embedded:
            return f"embedded/{self.database}"
        if self.database_url is None:
            hosts = hosts_in("DB_HOST", self.db_host or "", str(self.db_port))
            return f"{','.join(f'{host}:{port}' for host, port in hosts)}/{self.db_name}"
        url = urlsplit(self.database_url.get_secret_value())
        query = dict(parse_qsl(url.query))
        host = url.netloc.rpartition("@")[2] or query.get("host", "localhost")
        return f"{host}/{self.database}"

    @property
    def replicas(self) -> list[tuple[str, int]]:
        """Hosts, or socket folders, and ports of the standbys that may answer readonly sessions."""
        if self.db_replica_hosts is None:
            return []
        return hosts_in("DB_REPLICA_HOSTS", self.db_replica_hosts, str(self.db_port))

    def connect_args(self, replica: tuple[str, int] | None = None) -> ConnectArgs:
        """How to reach the server, or a replica, as keyword arguments of `asyncpg.connect`.

        A server that does not take writes will not do, unless DATABASE_URL says otherwise. Not for
        the embedded server, whose arguments `embedded.start` returns. TLS goes in as a DSN, because
        asyncpg gives `sslmode` and the files libpq's meaning only there.
        """
        tls = {
            name: str(value)
            for name, value in {
                "sslmode": self.db_ssl_mode,
                "sslrootcert": self.db_ssl_ca,
                "sslcert": self.db_ssl_cert,
                "sslkey": self.db_ssl_key,
            }.items()
            if value is not None
        }
        arguments = ConnectArgs(
            timeout=self.db_connect_timeout,
            command_timeout=self.db_query_timeout + _GRACE if self.db_query_timeout else None,
            server_settings=self.server_settings(),
        )
        if self.database_url is not None:
            url = urlsplit(SCHEME.sub("postgresql://", self.database_url.get_secret_value()))
            query = {**tls, **dict(parse_qsl(url.query))}
            if "connect_timeout" in query:
                arguments["timeout"] = float(query.pop("connect_timeout"))
            arguments["server_settings"].update(
                {name: query.pop(name) for name in ("application_name", "options") if name in query}
            )
            attributes = query.pop("target_session_attrs", "read-write")
            arguments["dsn"] = urlunsplit(url._replace(query=urlencode(query)))
            arguments["database"] = self.database
            if hosts := hosts_in_url(url.netloc, query):  # else asyncpg finds the host
                arguments["host"] = [host for host, _ in hosts]
                arguments["port"] = [port for _, port in hosts]
            return self._pooled(_at(arguments, replica, attributes))
        if self.db_host is None:
            raise ConfigurationError("DB_HOST or DATABASE_URL is not set")
        hosts = hosts_in("DB_HOST", self.db_host, str(self.db_port))
        arguments["host"] = [host for host, _ in hosts] if len(hosts) > 1 else hosts[0][0]
        arguments["port"] = [port for _, port in hosts] if len(hosts) > 1 else hosts[0][1]
        arguments["user"] = self.db_user
        arguments["database"] = self.db_name
        if self.db_password is not None:
            arguments["password"] = self.db_password.get_secret_value()
        if tls:
            arguments["dsn"] = f"postgresql://?{urlencode(tls)}"
        return self._pooled(_at(arguments, replica, "read-write"))

    def _pooled(self, arguments: ConnectArgs) -> ConnectArgs:
        """What of them a pooler allows: nothing that a session of the server would keep."""
        if self.pooled:
            given = arguments["server_settings"]
            arguments["server_settings"] = {
                name: given[name] for name in _POOLED_SETTINGS if name in given
            }
            arguments["statement_cache_size"] = 0
            arguments["command_timeout"] = self.db_query_timeout or None
        return arguments

    def server_settings(self) -> dict[str, str]:
        """What every session tells the server when it starts."""
        return {
            "application_name": "tiger_db",
            "statement_timeout": str(math.ceil(self.db_query_timeout * 1000)),
            "idle_in_transaction_session_timeout": str(
                math.ceil(self.db_idle_transaction_timeout * 1000)
            ),
            "timezone": "UTC",
        }

    def key_ring(self) -> KeyRing | None:
        """The encryption keys, or None where none is set.

        Raises:
            ConfigurationError: malformed, unreadable, or missing in production.
        """
        return self._keys("encryption_keys", KeyRing.parse)

    def peppers(self) -> Peppers | None:
        """The peppers of API keys, or None where none is set.

        Raises:
            ConfigurationError: malformed, unreadable, or missing in production.
        """
        return self._keys("api_key_peppers", Peppers.parse)

    def signing_key(self) -> Ed25519PrivateKey | None:
        """The key that signs the seals of the audit trail, or None where none is set.

        Raises:
            ConfigurationError: malformed or unreadable. Only who seals needs one.
        """
        return self._keys("audit_signing_key", parse_signing_key, required=False)

    def _keys(self, field: str, parse: Callable[[str], T], *, required: bool = True) -> T | None:
        name = field.upper()
        text = secret_text(name, getattr(self, field), getattr(self, f"{field}_file"))
        if text is None:
            if self.production and required:
                raise ConfigurationError(
                    f"{name} or {name}_FILE is required when ENVIRONMENT=production"
                )
            return None
        try:
            return parse(text)
        except EncryptionError as error:
            raise ConfigurationError(f"{name}: {error}") from None


def secret_text(name: str, value: SecretStr | None, file: Path | None) -> str | None:
    """A secret given either as itself or as the file that holds it."""
    if value is not None and file is not None:
        raise ConfigurationError(f"{name} and {name}_FILE exclude each other")
    if value is not None:
        return value.get_secret_value()
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigurationError(f"{name}_FILE cannot be read: {reason}") from None


def _at(arguments: ConnectArgs, replica: tuple[str, int] | None, attributes: str) -> ConnectArgs:
    if replica is not None:
        arguments["host"], arguments["port"] = replica
        attributes = "standby"
    arguments["target_session_attrs"] = attributes
    return arguments


def _one_line(error: ValidationError) -> str:
    return "; ".join(
        ": ".join(
            filter(
                None,
                (
                    ".".join(str(part) for part in problem["loc"]).upper(),
                    problem["msg"].removeprefix("Value error, "),
                ),
            )
        )
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    )

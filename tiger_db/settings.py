"""What the environment says. Nothing is read before a `Settings()` is made."""

import hashlib
import math
import re
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypedDict

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from tiger_db.database_urls import (
    DEFAULT_PORT,
    Address,
    DatabaseURL,
    SSLMode,
    encode_query,
    parse_hosts,
    parse_url,
)
from tiger_db.errors import ConfigurationError

if TYPE_CHECKING:
    import asyncpg


class ConnectArgs(TypedDict, total=False):
    """Keyword arguments of `asyncpg.connect`."""

    dsn: str
    host: str | list[str]  # several: each is to be tried
    port: int | list[int]
    user: str
    password: str | None
    passfile: Path
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


def _iso_date(value: object) -> object:
    """A date in the one form that nobody can mistake."""
    if value is None or type(value) is date:
        return value
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
        with suppress(ValueError):
            return date.fromisoformat(value)
    raise ValueError("must be a date such as 2027-01-31")


def _schema_name(value: str) -> str:
    """Allow what PostgreSQL allows: any text of 63 bytes but the names that it keeps for itself."""
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8 text") from None
    if size > _LONGEST_NAME:
        raise ValueError(f"must have {_LONGEST_NAME} bytes at most")
    if value.startswith("pg_") or value in ("information_schema", "$user"):
        raise ValueError("is a name that PostgreSQL keeps for itself")
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
File = Annotated[Path, AfterValidator(_path_without_nul)]
SecretText = Annotated[SecretStr, AfterValidator(_sendable)]
_LONGEST_NAME = 63  # bytes
_GRACE = 5  # seconds beyond DB_QUERY_TIMEOUT, after which a server that does not answer is lost
DEFAULT_SCHEMA = "public"
SCHEMA_OPTION = "tiger_db_schema"  # the execution option of an engine that has DB_SCHEMA
# What PgBouncer takes at the start of a session, and keeps apart for each of its clients.
_POOLED_SETTINGS = ("application_name", "timezone")
# Tried where DATABASE_URL names no host. asyncpg by itself would read PGHOST first.
_DEFAULT_HOSTS = ("/var/run/postgresql", "/tmp", "localhost")  # noqa: S108  # no file is made


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
    db_port: int = Field(default=DEFAULT_PORT, ge=1, le=65535)
    db_name: Text = "tiger_db"
    db_schema: Annotated[Text, AfterValidator(_schema_name)] = DEFAULT_SCHEMA
    db_user: Text = "tiger_db"
    db_password: SecretText | None = None

    db_pooler: Literal["none", "pgbouncer"] = "none"
    db_direct_host: Text | None = None
    db_direct_port: int = Field(default=DEFAULT_PORT, ge=1, le=65535)
    db_replica_hosts: Text | None = None

    db_ssl_mode: SSLMode | None = None
    db_ssl_cert: File | None = None
    db_ssl_key: File | None = None
    db_ssl_ca: File | None = None
    db_allow_unverified_tls: bool = Field(
        default=False, description="in production, any server elsewhere gets the password"
    )

    db_pool_size: int = Field(default=5, ge=1, le=1000)
    db_max_overflow: int = Field(default=10, ge=0, le=1000)
    db_pool_timeout: float = Field(default=30, gt=0, le=3600, description="seconds")
    db_pool_recycle: int = Field(default=1800, ge=-1, description="seconds; -1: never")
    db_connect_timeout: float = Field(default=10, gt=0, le=3600, description="seconds")
    db_query_timeout: float = Field(default=30, ge=0, le=86400, description="seconds; 0: none")
    db_idle_transaction_timeout: float = Field(
        default=60, ge=0, le=86400, description="seconds; 0: none"
    )
    db_slow_query_seconds: float = Field(
        default=1, ge=0, le=86400, description="seconds; 0: log none"
    )
    db_debug: bool = Field(default=False, description="log every statement, without parameters")

    tiger_db_home: Path | None = Field(default=None, description="folder of the embedded server")

    encryption_keys: SecretStr | None = None
    encryption_keys_file: File | None = None
    api_key_peppers: SecretStr | None = None
    api_key_peppers_file: File | None = None
    api_keys_allow_unpeppered_until: Annotated[date | None, BeforeValidator(_iso_date)] = Field(
        default=None, description="the last day, UTC"
    )
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
        url = self.url
        if url is not None and self.pooled and "options" in url.parameters:
            raise ValueError("DATABASE_URL: options are not for DB_POOLER: use ALTER ROLE")
        if url is not None and "search_path" in url.parameters.get("options", ""):
            raise ValueError("DATABASE_URL: options must not set search_path: use DB_SCHEMA")
        if self.production and self.embedded:
            raise ValueError("DB_HOST or DATABASE_URL is required when ENVIRONMENT=production")
        if (self.db_ssl_cert is None) != (self.db_ssl_key is None):
            raise ValueError("DB_SSL_CERT and DB_SSL_KEY go together")
        if self.embedded and self.db_replica_hosts is not None:
            raise ValueError("DB_REPLICA_HOSTS needs DB_HOST or DATABASE_URL")
        for name, hosts in (("DB_HOST", self.db_host), ("DB_REPLICA_HOSTS", self.db_replica_hosts)):
            if hosts is not None:
                parse_hosts(name, hosts, self.db_port)
        if problem := self._tls_problem():
            raise ValueError(problem)
        return self

    @property
    def url(self) -> DatabaseURL | None:
        """`DATABASE_URL`, parsed; None where it is not set."""
        text = self.database_url
        return None if text is None else parse_url(text.get_secret_value())

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

    def without_pooler(self) -> Self:
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
        address = Address(self.db_direct_host, self.db_direct_port)
        changes: dict[str, object] = {
            "db_host": address.host,
            "db_port": address.port,
            "db_pooler": "none",
            "db_direct_host": None,
        }
        if (url := self.url) is not None:
            changes["database_url"] = SecretStr(replace(url, addresses=(address,)).to_text())
        return self.model_copy(update=changes)

    @property
    def database(self) -> str:
        """The name of the database."""
        url = self.url
        return (url and (url.database or url.user)) or self.db_name

    @property
    def search_path(self) -> str:
        """The search path of every session: see the function `search_path`."""
        return search_path(self.db_schema)

    def channel(self, name: str) -> str:
        """The NOTIFY channel of this name in `DB_SCHEMA`.

        In `public` it is the name itself, as in releases without `DB_SCHEMA`. Elsewhere a digest
        follows, because the longest schema names leave no room in a channel's 63 bytes.
        """
        if self.db_schema == DEFAULT_SCHEMA:
            return name
        return f"{name}_{hashlib.sha256(self.db_schema.encode()).hexdigest()[:16]}"

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The servers, one of which takes writes; none of the embedded server."""
        if (url := self.url) is not None:
            return url.addresses
        return () if self.db_host is None else parse_hosts("DB_HOST", self.db_host, self.db_port)

    @property
    def location(self) -> str:
        """Where the database is, for people: no user name and no password."""
        servers = "embedded" if self.embedded else ",".join(map(str, self.addresses))
        return f"{servers}/{self.database}"

    @property
    def replicas(self) -> tuple[Address, ...]:
        """The standbys that may answer readonly sessions."""
        if self.db_replica_hosts is None:
            return ()
        return parse_hosts("DB_REPLICA_HOSTS", self.db_replica_hosts, self.db_port)

    @property
    def tls(self) -> dict[str, str]:
        """The parameters that libpq has for TLS: `DATABASE_URL` wins over `DB_SSL_*`."""
        if self.embedded:
            return {}
        given = {
            "sslmode": self.db_ssl_mode,
            "sslrootcert": self.db_ssl_ca,
            "sslcert": self.db_ssl_cert,
            "sslkey": self.db_ssl_key,
        }
        url = self.url
        parameters = {} if url is None else url.parameters
        return {
            **{name: str(value) for name, value in given.items() if value is not None},
            **{name: value for name, value in parameters.items() if name.startswith("ssl")},
        }

    @property
    def unverified(self) -> list[str]:
        """The variables that name a server on another machine whose identity is not verified.

        Only `verify-full` verifies it: `verify-ca` takes every server that has a certificate of the
        authority, which may be everybody's.
        """
        if self.embedded or self.tls.get("sslmode") == SSLMode.VERIFY_FULL:
            return []
        servers = {
            "DB_HOST" if self.database_url is None else "DATABASE_URL": self.addresses,
            "DB_DIRECT_HOST": [Address(self.db_direct_host)] if self.db_direct_host else [],
            "DB_REPLICA_HOSTS": self.replicas,
        }
        return [name for name, found in servers.items() if not all(a.is_local for a in found)]

    def _tls_problem(self) -> str | None:
        """Why no password may leave, in one line."""
        if not self.production or self.db_allow_unverified_tls or not self.unverified:
            return None
        in_url = self.url is not None and "sslmode" in self.url.parameters
        return (
            f"{'DATABASE_URL: sslmode' if in_url else 'DB_SSL_MODE'} must be verify-full when"
            f" ENVIRONMENT=production and {' and '.join(self.unverified)} names another machine:"
            " set it, with DB_SSL_CA, or set DB_ALLOW_UNVERIFIED_TLS=true to trust any server"
        )

    def connect_args(self, replica: Address | None = None) -> ConnectArgs:
        """How to reach the server, or a replica, as keyword arguments of `asyncpg.connect`.

        A server that does not take writes will not do, unless DATABASE_URL says otherwise. Not for
        the embedded server, whose arguments `embedded.start` returns. TLS goes in as a DSN, because
        asyncpg gives `sslmode` and the files libpq's meaning only there; nothing else is in it.

        Raises:
            ConfigurationError: neither `DB_HOST` nor `DATABASE_URL` is set, or in production the
                server's identity would not be verified.
        """
        if self.embedded:
            raise ConfigurationError("DB_HOST or DATABASE_URL is not set")
        if problem := self._tls_problem():  # of a copy, which pydantic does not validate
            raise ConfigurationError(problem)
        url = self.url or DatabaseURL(
            self.addresses,
            self.db_user,
            None if self.db_password is None else self.db_password.get_secret_value(),
        )
        found = url.parameters
        addresses = [
            Address(host, address.port)
            for address in ([replica] if replica else url.addresses)
            for host in ([address.host] if address.host else _DEFAULT_HOSTS)
        ]
        several = len(addresses) > 1
        arguments = ConnectArgs(
            host=[a.host for a in addresses] if several else addresses[0].host,
            port=[a.port for a in addresses] if several else addresses[0].port,
            database=self.database,
            timeout=float(found.get("connect_timeout", self.db_connect_timeout)),
            command_timeout=self.db_query_timeout + _GRACE if self.db_query_timeout else None,
            target_session_attrs=(
                "standby" if replica else found.get("target_session_attrs", "read-write")
            ),
            server_settings=self.server_settings(),
        )
        arguments["server_settings"].update(
            {name: found[name] for name in ("application_name", "options") if name in found}
        )
        if url.user is not None:
            arguments["user"] = url.user
        if url.password is not None:
            arguments["password"] = url.password
        if "passfile" in found:
            arguments["passfile"] = Path(found["passfile"])
        if tls := self.tls:
            arguments["dsn"] = f"postgresql://?{encode_query(tls)}"
        if self.pooled:  # which allows nothing that a session of the server would keep
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
            # Of the packet that starts a session: it overrides ALTER ROLE and ALTER DATABASE.
            "search_path": self.search_path,
        }


def quote_identifier(name: str) -> str:
    """A name as SQL has it between double quotes."""
    return '"' + name.replace('"', '""') + '"'


def search_path(schema: str) -> str:
    """The search path that leads to a schema, after pg_catalog and before temporary objects.

    PostgreSQL searches pg_catalog first where the path does not name it. It would search pg_temp
    even before that, so the path names it last.
    """
    return f"{quote_identifier(schema)}, pg_temp"


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

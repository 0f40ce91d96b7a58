"""The settings of tiger_db, which are read from environment variables."""

import getpass
import hashlib
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypedDict

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from tiger_db.database_urls import (
    DEFAULT_PORT,
    Address,
    DatabaseURL,
    parse_hosts,
    parse_url,
)
from tiger_db.errors import ConfigurationError
from tiger_db.redaction import add_known_secrets
from tiger_db.setting_values import Archive, Date, File, Port, SchemaName, SecretText, Text
from tiger_db.tracebacks import forgets_locals
from tiger_db.url_parameters import SYSTEM_CA, SSLMode, check_combination

if TYPE_CHECKING:
    import asyncpg


class ConnectionPassword(SecretStr):
    """The database's password as an argument of `asyncpg.connect`, which accepts a function.

    A `repr` of the arguments shows no password.
    """

    def __call__(self) -> str:
        return self.get_secret_value()


class ConnectArgs(TypedDict, total=False):
    """The keyword arguments of `asyncpg.connect`."""

    host: str | list[str]  # asyncpg tries the hosts of a list in their order
    port: int | list[int]
    user: str
    password: ConnectionPassword
    database: str
    timeout: float
    command_timeout: float | None
    target_session_attrs: str
    statement_cache_size: int
    krbsrvname: str
    gsslib: str
    server_settings: dict[str, str]
    connection_class: "type[asyncpg.Connection[asyncpg.Record]]"


# asyncpg reads a variable or a file of libpq, such as PGPASSWORD or ~/.pgpass, for each argument
# that is None. Therefore, tiger_db passes all arguments, with these defaults. `tls.connect` passes
# the arguments for TLS.
DEFAULT_ARGUMENTS = ConnectArgs(
    password=ConnectionPassword(""),
    target_session_attrs="any",
    krbsrvname="postgres",
    gsslib="sspi" if os.name == "nt" else "gssapi",
)


# If the server does not answer for DB_QUERY_TIMEOUT plus 5 seconds, the connection counts as lost.
_LOST_SERVER_SECONDS = 5
CHECK_INTERVAL = "client_connection_check_interval"
DEFAULT_SCHEMA = "public"
SCHEMA_OPTION = "tiger_db_schema"  # Name of the execution option that holds DB_SCHEMA.
# Session parameters that PgBouncer accepts from clients, and tracks for each client.
_PGBOUNCER_PARAMETERS = ("application_name", "timezone")
# Hosts for a DATABASE_URL without a host. asyncpg's default host is not used, because the default
# host depends on the environment variable PGHOST.
_DEFAULT_HOSTS = ("/var/run/postgresql", "/tmp", "localhost")  # noqa: S108  # a socket folder


class Settings(BaseSettings):
    """The settings of a process. Each field has the name of its environment variable.

    `Settings` reads the environment variables when a Settings object is created.

    Raises:
        ConfigurationError: the value of an environment variable is invalid. The error message is
            one line that names the variable and does not show the value.
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
    db_port: Port = DEFAULT_PORT
    db_name: Text = "tiger_db"
    db_schema: SchemaName = DEFAULT_SCHEMA
    db_user: Text = "tiger_db"
    db_password: SecretText | None = None

    db_pooler: Literal["none", "pgbouncer"] = "none"
    db_direct_host: Text | None = None
    db_direct_port: Port = DEFAULT_PORT
    db_replica_hosts: Text | None = None

    db_ssl_mode: SSLMode | None = None
    db_ssl_cert: File | None = None
    db_ssl_key: File | None = None
    db_ssl_ca: File | None = None
    db_allow_unverified_tls: bool = Field(
        default=False,
        description="allow production to connect to remote servers whose identity is not verified",
    )

    db_pool_size: int = Field(default=5, ge=1, le=1000)
    db_max_overflow: int = Field(default=10, ge=0, le=1000)
    db_pool_timeout: float = Field(
        default=30, gt=0, le=3600, description="maximum wait for a free connection, in seconds"
    )
    db_pool_recycle: int = Field(
        default=1800,
        ge=-1,
        description="maximum age of a connection in the pool, in seconds (-1: no limit)",
    )
    db_connect_timeout: float = Field(
        default=10, gt=0, le=3600, description="maximum wait for a new connection, in seconds"
    )
    db_query_timeout: float = Field(
        default=30,
        ge=0,
        le=86400,
        description="maximum duration of an SQL statement, in seconds (0: no limit)",
    )
    db_idle_transaction_timeout: float = Field(
        default=60,
        ge=0,
        le=86400,
        description="maximum time that a transaction may be idle, in seconds (0: no limit)",
    )
    db_slow_query_seconds: float = Field(
        default=1,
        ge=0,
        le=86400,
        description="duration from which a query is logged, in seconds (0: no query is logged)",
    )
    db_debug: bool = Field(default=False, description="log all SQL statements")

    tiger_db_home: Path | None = Field(default=None, description="folder of the embedded server")

    encryption_keys: SecretStr | None = None
    encryption_keys_file: File | None = None
    api_key_peppers: SecretStr | None = None
    api_key_peppers_file: File | None = None
    api_keys_allow_unpeppered_until: Date | None = Field(
        default=None, description="last day (UTC) on which API keys without a pepper are valid"
    )
    api_keys_allow_unsigned_until: Date | None = Field(
        default=None,
        description="last day (UTC) on which API keys without an authentication code are valid",
    )
    audit_signing_key: SecretStr | None = None
    audit_signing_key_file: File | None = None
    audit_checkpoints: File | None = Field(
        default=None, description="folder of the checkpoints that a sealer saves and compares"
    )
    audit_archive: Archive | None = Field(
        default=None, description="folder or s3:// URL that months are written to"
    )
    audit_retention_months: int | None = Field(default=None, ge=1, le=1200)

    account_failing_after: int = Field(default=3, ge=1, le=1_000_000, description="errors")
    account_failing_for: float = Field(default=300, gt=0, le=86400, description="seconds")
    account_suspend_after: int = Field(default=10, ge=1, le=1_000_000, description="errors")

    @forgets_locals
    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)  # type: ignore[arg-type]  # pydantic checks the types
        except ValidationError as error:
            raise ConfigurationError(_one_line(error)) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  # pydantic-settings passes all sources
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # No files are read, and `dotenv_settings` takes half of the time even without a file.
        return init_settings, env_settings

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("Settings cannot be pickled, because a pickle would contain its secrets")

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_combination(
            {} if self.url is None else self.url.parameters, self.tls, pooler=self.uses_pooler
        )
        if self.production and self.embedded:
            raise ValueError("DB_HOST or DATABASE_URL is required when ENVIRONMENT=production")
        if (self.db_ssl_cert is None) != (self.db_ssl_key is None):
            raise ValueError("DB_SSL_CERT and DB_SSL_KEY must be set together")
        if self.embedded and self.db_replica_hosts is not None:
            raise ValueError("DB_REPLICA_HOSTS needs DB_HOST or DATABASE_URL")
        for name, hosts in (("DB_HOST", self.db_host), ("DB_REPLICA_HOSTS", self.db_replica_hosts)):
            if hosts is not None:
                parse_hosts(name, hosts, self.db_port)
        if problem := self._tls_problem():
            raise ValueError(problem)
        if self.db_password is not None:
            add_known_secrets(self.db_password.get_secret_value())
        if self.url is not None and self.url.password is not None:
            add_known_secrets(self.url.password)
        return self

    @property
    def url(self) -> DatabaseURL | None:
        """The parsed `DATABASE_URL`, or None if `DATABASE_URL` is not set."""
        text = self.database_url
        return None if text is None else parse_url(text.get_secret_value())

    @property
    def production(self) -> bool:
        return self.environment == "production"

    @property
    def embedded(self) -> bool:
        """Whether tiger_db uses the embedded PostgreSQL, because the settings name no server."""
        return self.database_url is None and self.db_host is None

    @property
    def uses_pooler(self) -> bool:
        """Whether each transaction can have another PostgreSQL session, because of a pooler."""
        url = self.url
        in_url = url is not None and url.parameters.get("pgbouncer") == "true"
        return in_url or self.db_pooler != "none"

    @forgets_locals
    def without_pooler(self) -> Self:
        """Return settings whose connections bypass the pooler, for work that needs one session.

        Raises:
            ConfigurationError: the setting `DB_POOLER` needs `DB_DIRECT_HOST`, which is not set.
        """
        if self.embedded:
            return self
        if self.db_direct_host is None:
            if self.uses_pooler:
                raise ConfigurationError(
                    "DB_DIRECT_HOST is not set, but DB_POOLER or pgbouncer=true in DATABASE_URL is"
                    " set: migrations, sealing and LISTEN need direct connections to the server"
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
            parameters = {n: value for n, value in url.parameters.items() if n != "pgbouncer"}
            direct = replace(url, addresses=(address,), parameters=parameters)
            changes["database_url"] = SecretStr(direct.to_text())
        return self.model_copy(update=changes)

    @property
    def database(self) -> str:
        """The name of the database."""
        url = self.url
        return (url and (url.database or url.user)) or self.db_name

    @property
    def search_path(self) -> str:
        """The value of the parameter `search_path` in all sessions."""
        return search_path(self.db_schema)

    def channel(self, name: str) -> str:
        """Return the name of the NOTIFY channel that the installation in `DB_SCHEMA` uses.

        All schemas of a database share their channels. For the schema `public`, `channel` returns
        the argument `name` unchanged. For any other schema, `channel` appends a digest of the
        schema's name to `name`, because the name of a channel can have at most 63 bytes.
        """
        if self.db_schema == DEFAULT_SCHEMA:
            return name
        return f"{name}_{hashlib.sha256(self.db_schema.encode()).hexdigest()[:16]}"

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses of the servers, in the order in which `connect` tries the servers.

        The embedded server has no address, because the server listens on a Unix socket only.
        """
        if (url := self.url) is not None:
            return url.addresses
        return () if self.db_host is None else parse_hosts("DB_HOST", self.db_host, self.db_port)

    @property
    def location(self) -> str:
        """The servers and the database as a text for messages, without user and password."""
        servers = "embedded" if self.embedded else ",".join(map(str, self.addresses))
        return f"{servers}/{self.database}"

    @property
    def replicas(self) -> tuple[Address, ...]:
        """The addresses of the replicas for readonly sessions."""
        if self.db_replica_hosts is None:
            return ()
        return parse_hosts("DB_REPLICA_HOSTS", self.db_replica_hosts, self.db_port)

    @property
    def tls(self) -> dict[str, str]:
        """The TLS parameters with libpq's names. `DATABASE_URL` has precedence over `DB_SSL_*`."""
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
        found = {name: str(value) for name, value in given.items() if value is not None}
        found |= {name: value for name, value in parameters.items() if name.startswith("ssl")}
        if found.get("sslrootcert") == SYSTEM_CA:
            found.setdefault("sslmode", SSLMode.VERIFY_FULL)
        return found

    @property
    def command_timeout(self) -> float | None:
        """The seconds after which asyncpg gives up a statement, or None.

        With a pooler, this timeout replaces PostgreSQL's `statement_timeout`.
        """
        if not self.db_query_timeout:
            return None
        return self.db_query_timeout + (0 if self.uses_pooler else _LOST_SERVER_SECONDS)

    @property
    def passfile(self) -> Path | None:
        """The file of passwords that `DATABASE_URL` names."""
        found = None if self.url is None else self.url.parameters.get("passfile")
        return None if found is None else Path(found)

    @property
    def unverified_variables(self) -> list[str]:
        """The environment variables that name remote servers whose identity is not verified.

        Only the sslmode verify-full verifies the identity of a server. The sslmode verify-ca
        accepts any certificate of the certificate authority (CA), and a public CA issues
        certificates to anyone.
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
        """Return the reason why TLS is too weak for production, or None if TLS is strong enough."""
        if not self.production or self.db_allow_unverified_tls or not self.unverified_variables:
            return None
        in_url = self.url is not None and "sslmode" in self.url.parameters
        return (
            f"{'DATABASE_URL: sslmode' if in_url else 'DB_SSL_MODE'} must be verify-full, because"
            f" ENVIRONMENT=production and the server is on another machine"
            f" ({', '.join(self.unverified_variables)}): set verify-full and DB_SSL_CA, or set"
            " DB_ALLOW_UNVERIFIED_TLS=true to trust any server"
        )

    @forgets_locals
    def connect_args(self, replica: Address | None = None) -> ConnectArgs:
        """Return the keyword arguments of `asyncpg.connect` for the server, or for a replica.

        With these arguments, asyncpg refuses a server that accepts no writes, unless
        `DATABASE_URL` has the parameter `target_session_attrs`. `tls.connect` adds the arguments
        for TLS. For the embedded server, call `embedded.start` instead of `connect_args`.

        Raises:
            ConfigurationError: neither `DB_HOST` nor `DATABASE_URL` is set, or TLS is too weak for
                production, or `DATABASE_URL` names no user and the process has no user name.
        """
        if self.embedded:
            raise ConfigurationError("neither DB_HOST nor DATABASE_URL is set")
        if problem := self._tls_problem():  # pydantic does not validate the result of `model_copy`
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
        arguments: ConnectArgs = {
            **DEFAULT_ARGUMENTS,
            "host": [a.host for a in addresses] if several else addresses[0].host,
            "port": [a.port for a in addresses] if several else addresses[0].port,
            "user": _user_name() if url.user is None else url.user,
            "password": ConnectionPassword(url.password or ""),
            "database": self.database,
            "timeout": float(found.get("connect_timeout", self.db_connect_timeout)),
            "command_timeout": self.command_timeout,
            "target_session_attrs": (
                "standby" if replica else found.get("target_session_attrs", "read-write")
            ),
            "server_settings": {
                **self.server_settings(),
                **{name: found[name] for name in ("application_name", "options") if name in found},
            },
        }
        if self.uses_pooler:
            # PgBouncer can refuse session parameters that are not in _PGBOUNCER_PARAMETERS.
            given = arguments["server_settings"]
            arguments["server_settings"] = {
                name: given[name] for name in _PGBOUNCER_PARAMETERS if name in given
            }
            arguments["statement_cache_size"] = 0
        return arguments

    def server_settings(self) -> dict[str, str]:
        """Return the PostgreSQL parameters that tiger_db sets in each session, by name."""
        return {
            "application_name": "tiger_db",
            "statement_timeout": str(math.ceil(self.db_query_timeout * 1000)),
            "idle_in_transaction_session_timeout": str(
                math.ceil(self.db_idle_transaction_timeout * 1000)
            ),
            # If the client is gone, the server ends a running statement within a second.
            CHECK_INTERVAL: "1000",
            "timezone": "UTC",
            # `search_path` overrides a search path that ALTER ROLE or ALTER DATABASE has set.
            "search_path": self.search_path,
        }


def _user_name() -> str:
    """Return the name of this process's user, which is libpq's default for the role."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise ConfigurationError(
            "DATABASE_URL names no user, and this process has no user name: write"
            " postgresql://user@host/name"
        ) from None


def quote_identifier(name: str) -> str:
    """Quote an SQL identifier, such as the name of a table."""
    return '"' + name.replace('"', '""') + '"'


def search_path(schema: str) -> str:
    """Return the SQL text of the `search_path` for a schema.

    PostgreSQL searches pg_catalog first if the search path does not contain pg_catalog. If the
    search path did not contain pg_temp, PostgreSQL would search pg_temp before pg_catalog.
    """
    return f"{quote_identifier(schema)}, pg_temp"


def _one_line(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        variable = ".".join(map(str, problem["loc"])).upper()
        message = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{variable}: {message}" if variable else message)
    return "; ".join(problems)

"""The parameters of a `DATABASE_URL`: each is honoured, ignored or refused.

The table in `docs/settings.md` has the same rows as `PARAMETERS`.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal, NamedTuple


class SSLMode(StrEnum):
    """The values of the connection parameter `sslmode` of libpq.

    https://www.postgresql.org/docs/current/libpq-ssl.html#LIBPQ-SSL-PROTECTION
    """

    DISABLE = "disable"
    ALLOW = "allow"
    PREFER = "prefer"
    REQUIRE = "require"
    VERIFY_CA = "verify-ca"
    VERIFY_FULL = "verify-full"


class Parameters(NamedTuple):
    """Parameters of URLs that are treated alike.

    If `values` is not empty, a parameter with another value is refused. The text `note` is the
    meaning of honoured parameters, the reason for ignoring others, or what to write instead of
    refused ones.
    """

    names: tuple[str, ...]
    use: Literal["honoured", "ignored", "refused"]
    note: str
    values: tuple[str, ...] = ()


def _honoured(names: str, note: str, *values: str) -> Parameters:
    return Parameters(tuple(names.split()), "honoured", note, values)


def _ignored(names: str, note: str, *values: str) -> Parameters:
    return Parameters(tuple(names.split()), "ignored", note, values)


def _refused(names: str, note: str) -> Parameters:
    return Parameters(tuple(names.split()), "refused", note)


# The value of `sslrootcert` for the certificate authorities of the operating system.
SYSTEM_CA = "system"
_OPTIONAL_TLS = (SSLMode.DISABLE, SSLMode.ALLOW, SSLMode.PREFER)
_TLS_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_UTF8 = ("utf8", "UTF8", "utf-8", "UTF-8", "auto")
PARAMETERS = (
    # libpq: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
    _honoured("host port user password dbname database", "override the other parts of the URL"),
    _honoured("passfile", "a file of passwords in the format of libpq's `~/.pgpass`"),
    _honoured("connect_timeout", "seconds, instead of `DB_CONNECT_TIMEOUT`"),
    _honoured("application_name", "as in libpq"),
    _honoured("options", "as in libpq, but without search_path, and not behind a pooler"),
    _honoured(
        "target_session_attrs", "as in libpq, but read-write by default",
        "any", "read-write", "read-only", "primary", "standby", "prefer-standby",
    ),
    _honoured("sslmode", "as in libpq, instead of `DB_SSL_MODE`", *SSLMode),
    _honoured("ssl", "true is sslmode=require, other values are as for sslmode", "true", *SSLMode),
    _honoured("sslrootcert", "instead of `DB_SSL_CA`: a file, or `system`"),
    _honoured("sslcert sslkey", "instead of `DB_SSL_CERT` and `DB_SSL_KEY`"),
    _honoured("sslcrl sslpassword", "as in libpq"),
    _honoured("sslnegotiation", "as in libpq", "postgres", "direct"),
    _honoured("ssl_min_protocol_version ssl_max_protocol_version", "as in libpq", *_TLS_VERSIONS),
    _ignored(
        "channel_binding", "asyncpg has no channel binding; require needs sslmode=verify-full",
        "disable", "prefer", "require",
    ),
    _ignored("gssencmode", "asyncpg has no GSSAPI encryption", "disable", "prefer"),
    _ignored(
        "keepalives keepalives_idle keepalives_interval keepalives_count tcp_user_timeout",
        "`DB_QUERY_TIMEOUT` limits the wait for a lost server",
    ),
    _ignored("client_encoding", "all connections use UTF-8", *_UTF8),
    _ignored("fallback_application_name", "application_name has a default"),
    _ignored("load_balance_hosts", "hosts are tried in their order; see `DB_REPLICA_HOSTS`"),
    _ignored("sslcompression", "TLS is never compressed"),
    _ignored("sslsni", "the server's name is always sent", "1"),
    _ignored("sslcertmode", "sslcert is sent if the server asks for it", "allow"),
    _ignored("max_protocol_version", "asyncpg uses version 3.0"),
    _ignored("min_protocol_version", "asyncpg uses version 3.0", "3.0"),
    _refused("hostaddr", "write the address as host"),
    _refused("service servicefile", "write host, port, user and dbname"),
    _refused("requiressl", "write sslmode=require"),
    _refused("require_auth", "write sslmode=verify-full, so that no other server can ask"),
    _refused("requirepeer", "use a socket folder that only the server can write to"),
    _refused("sslcrldir", "write sslcrl with one file"),
    _refused("sslkeylogfile", "remove it, because tiger_db writes no file with keys of TLS"),
    _refused("krbsrvname gsslib gssdelegation", "use a password or sslcert, not Kerberos"),
    _refused("scram_client_key scram_server_key", "write the password"),
    _refused(
        "oauth_issuer oauth_client_id oauth_client_secret oauth_scope",
        "use a password or sslcert, not OAuth",
    ),
    _refused("replication", "remove it"),
    # SQLAlchemy and asyncpg
    _ignored(
        "prepared_statement_cache_size statement_cache_size",
        "tiger_db sizes its caches; 0 needs `DB_POOLER=pgbouncer`",
    ),
    _refused("timeout", "write connect_timeout"),
    _refused("direct_tls", "write sslnegotiation=direct"),
    _refused("command_timeout statement_timeout socket_timeout", "set `DB_QUERY_TIMEOUT`"),
    _refused("idle_in_transaction_session_timeout", "set `DB_IDLE_TRANSACTION_TIMEOUT`"),
    _refused("search_path schema currentSchema", "set `DB_SCHEMA`"),
    # Prisma, node-postgres and Supabase
    _honoured("pgbouncer", "true is `DB_POOLER=pgbouncer`", "true", "false"),
    _ignored("uselibpqcompat", "sslmode has libpq's meaning in any case"),
    _ignored("supa", "the parameter only names a product of Supabase"),
    _refused("connection_limit", "set `DB_POOL_SIZE` and `DB_MAX_OVERFLOW`"),
    _refused("pool_timeout", "set `DB_POOL_TIMEOUT`"),
    _refused("sslaccept", "write sslmode=verify-full and sslrootcert"),
    _refused("sslidentity", "write sslcert and sslkey"),
)  # fmt: skip
_BY_NAME = {name: row for row in PARAMETERS for name in row.names}


def check_parameters(given: Mapping[str, str]) -> None:
    """Check the names and values of the parameters of a `DATABASE_URL`.

    Raises:
        ValueError: a parameter is unknown or refused, or has an invalid value. The error message is
            one line that says what to write instead, and shows no value.
    """
    if unknown := sorted(given.keys() - _BY_NAME.keys()):
        raise ValueError(f"DATABASE_URL has an unknown parameter: {', '.join(unknown)}")
    for name, value in given.items():
        row, note = _BY_NAME[name], _BY_NAME[name].note.replace("`", "")
        if row.use == "refused":
            raise ValueError(f"DATABASE_URL: {name} is not supported: {note}")
        if value and row.values and value not in row.values:
            reason = f", because {note}" if row.use == "ignored" else ""
            wanted = f"{'one of ' if row.values[1:] else ''}{', '.join(row.values)}"
            raise ValueError(f"DATABASE_URL: {name} must be {wanted}{reason}")


def check_combination(given: Mapping[str, str], tls: Mapping[str, str], *, pooler: bool) -> None:
    """Check the parameters of a `DATABASE_URL` together with the other settings.

    The argument `tls` has the TLS parameters of all settings. Each parameter is ignored only where
    that is safe.

    Raises:
        ValueError: a parameter needs another setting, which the error message names.
    """
    if pooler and "options" in given:
        raise ValueError(
            "DATABASE_URL must not have the parameter options if DB_POOLER is set: use ALTER ROLE"
        )
    if "search_path" in given.get("options", ""):
        raise ValueError(
            "the parameter `options` in DATABASE_URL must not set search_path: use DB_SCHEMA"
        )
    for name in ("prepared_statement_cache_size", "statement_cache_size"):
        if given.get(name) == "0" and not pooler:
            raise ValueError(
                f"DATABASE_URL: {name}=0 is for poolers: set DB_POOLER=pgbouncer if the URL leads"
                " to a pooler, or remove the parameter"
            )
    mode = tls.get("sslmode", SSLMode.PREFER)
    if tls.get("sslrootcert") == SYSTEM_CA and mode != SSLMode.VERIFY_FULL:
        raise ValueError(
            "DB_SSL_MODE or sslmode must be verify-full if DB_SSL_CA or sslrootcert is `system`"
        )
    if tls.get("sslnegotiation") == "direct" and mode in _OPTIONAL_TLS:
        raise ValueError("DATABASE_URL: sslnegotiation=direct needs sslmode=verify-full or require")
    if given.get("channel_binding") == "require" and mode != SSLMode.VERIFY_FULL:
        raise ValueError(
            "DATABASE_URL: channel_binding=require is not supported, because asyncpg has no channel"
            " binding: write sslmode=verify-full&sslrootcert=system, which also excludes other"
            " servers, or remove channel_binding"
        )

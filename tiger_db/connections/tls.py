"""TLS connections of asyncpg, with the same meaning of `sslmode` as in libpq.

asyncpg's own `sslmode` is not used, because asyncpg would read the variables PGSSL* and the files
in ~/.postgresql. In addition, libpq verifies a certificate with the sslmodes `allow` and `prefer`
if a CA file is set, but asyncpg does not.
"""

import asyncio
import ssl
from pathlib import Path

import asyncpg

from tiger_db.errors import ConfigurationError
from tiger_db.files import HAS_FILE_MODES
from tiger_db.settings import ConnectArgs, Settings
from tiger_db.tracebacks import forgets_locals
from tiger_db.url_parameters import SYSTEM_CA, SSLMode

# For each sslmode, whether the connection attempts use TLS. Other sslmodes have one attempt.
_ATTEMPTS = {SSLMode.DISABLE: (False,), SSLMode.ALLOW: (False, True), SSLMode.PREFER: (True, False)}
# After one of these errors, the other attempt of the sslmode `allow` or `prefer` can succeed.
_ATTEMPT_ERRORS = (
    ConnectionError,
    ssl.SSLError,
    asyncpg.ConnectionDoesNotExistError,
    asyncpg.InvalidAuthorizationSpecificationError,
)
_VARIABLES = {"sslrootcert": "DB_SSL_CA", "sslcert": "DB_SSL_CERT", "sslkey": "DB_SSL_KEY"}
# `_load_client_certificate` refuses a private key file whose mode has one of the forbidden
# permission bits. As in libpq, group read permission is allowed only if root owns the file.
_FORBIDDEN_MODE, _FORBIDDEN_MODE_ROOT = 0o077, 0o037


@forgets_locals
async def connect(
    settings: Settings, arguments: ConnectArgs
) -> "asyncpg.Connection[asyncpg.Record]":
    """Call `asyncpg.connect` for one host, so that each sslmode has the same effect as in libpq.

    Raises:
        ConfigurationError: a certificate or key file for TLS is missing or malformed.
        Exception: `connect` passes on the exceptions of `asyncpg.connect`.
    """
    parameters = settings.tls
    attempts = _ATTEMPTS.get(SSLMode(parameters.get("sslmode", "prefer")), (True,))
    if str(arguments["host"]).startswith("/"):  # PostgreSQL uses no TLS for Unix sockets
        attempts = (False,)
    context = _context(settings, parameters) if True in attempts else None
    direct = parameters.get("sslnegotiation") == "direct"
    async with asyncio.timeout(arguments["timeout"]):
        first, *others = attempts
        try:
            return await _attempt(arguments, context if first else None, direct=direct)
        except _ATTEMPT_ERRORS as error:
            if not others or isinstance(error, ConnectionRefusedError):
                raise
            try:
                return await _attempt(arguments, None if first else context, direct=direct)
            except (OSError, asyncpg.PostgresError) as other:
                # These errors of the first attempt explain the failure better than others.
                explains = ssl.SSLError, asyncpg.InvalidPasswordError
                if isinstance(error, explains) and not isinstance(other, explains):
                    raise error from None
                raise


@forgets_locals
async def _attempt(
    arguments: ConnectArgs, context: ssl.SSLContext | None, *, direct: bool
) -> "asyncpg.Connection[asyncpg.Record]":
    tls = {"ssl": context or False, "direct_tls": context is not None and direct}
    try:
        return await asyncpg.connect(**arguments, **tls)
    except asyncpg.ConnectionDoesNotExistError as error:
        if isinstance(error.__cause__, ssl.SSLError):  # the server refused the client certificate
            raise error.__cause__ from None
        raise


def check_files(settings: Settings) -> None:
    """Check that the files of the TLS parameters can be read, before the first connection.

    Raises:
        ConfigurationError: a file cannot be read.
    """
    parameters = settings.tls
    if parameters.get("sslmode") == SSLMode.DISABLE:
        return
    for name in ("sslrootcert", "sslcrl", "sslcert", "sslkey"):
        if parameters.get(name, SYSTEM_CA) != SYSTEM_CA:
            _check_readable(settings, parameters, name)


def _context(settings: Settings, parameters: dict[str, str]) -> ssl.SSLContext:
    mode, ca = parameters.get("sslmode", "prefer"), parameters.get("sslrootcert")
    if ca is None and mode in (SSLMode.VERIFY_CA, SSLMode.VERIFY_FULL):
        raise ConfigurationError(
            f"DB_SSL_CA is not set: sslmode {mode} needs the certificate of the certificate"
            " authority, or `system`"
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == SSLMode.VERIFY_FULL
    context.verify_mode = ssl.CERT_NONE if ca is None else ssl.CERT_REQUIRED
    context.minimum_version = _version(parameters.get("ssl_min_protocol_version", "TLSv1.2"))
    if "ssl_max_protocol_version" in parameters:
        context.maximum_version = _version(parameters["ssl_max_protocol_version"])
    context.set_alpn_protocols(["postgresql"])  # required for sslnegotiation=direct
    if ca == SYSTEM_CA:
        context.load_default_certs()
    for name in ("sslrootcert", "sslcrl"):
        if name in parameters and parameters[name] != SYSTEM_CA:
            _check_readable(settings, parameters, name)
            try:
                context.load_verify_locations(parameters[name])
            except ssl.SSLError:
                variable = _name(settings, name)
                raise ConfigurationError(f"{variable} is not a PEM file of certificates") from None
    if "sslcrl" in parameters:
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    if "sslcert" in parameters:
        _load_client_certificate(context, settings, parameters)
    return context


def _version(name: str) -> ssl.TLSVersion:
    return ssl.TLSVersion[name.replace(".", "_")]


def _load_client_certificate(
    context: ssl.SSLContext, settings: Settings, parameters: dict[str, str]
) -> None:
    cert, key = _name(settings, "sslcert"), _name(settings, "sslkey")
    for name in ("sslcert", "sslkey"):
        if name in parameters:
            _check_readable(settings, parameters, name)
    if "sslkey" in parameters and HAS_FILE_MODES:
        found = Path(parameters["sslkey"]).stat()
        if found.st_mode & (_FORBIDDEN_MODE if found.st_uid else _FORBIDDEN_MODE_ROOT):
            raise ConfigurationError(
                f"{key} can be read by other users: run `chmod 600` on the file"
            )
    password = parameters.get("sslpassword", "")
    try:
        context.load_cert_chain(parameters["sslcert"], parameters.get("sslkey"), password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigurationError(f"{key} is not the private key of {cert}") from None
        raise ConfigurationError(
            f"{cert} and {key} must be a PEM certificate and its private key, without a passphrase"
        ) from None


def _check_readable(settings: Settings, parameters: dict[str, str], name: str) -> None:
    try:
        Path(parameters[name]).read_bytes()
    except OSError as error:
        variable = _name(settings, name)
        raise ConfigurationError(f"{variable} cannot be read: {error.strerror}") from None


def _name(settings: Settings, parameter: str) -> str:
    """Return the name of the environment variable that sets a TLS parameter."""
    url = settings.url
    if url is not None and parameter in url.parameters:
        return f"DATABASE_URL: {parameter}"
    return _VARIABLES.get(parameter, parameter)

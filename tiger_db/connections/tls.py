"""TLS connections of asyncpg, with the same meaning of `sslmode` as in libpq."""

import ssl
from pathlib import Path

import asyncpg

from tiger_db.errors import ConfigurationError
from tiger_db.settings import ConnectArgs, Settings

# If a CA file is set, libpq verifies the server's certificate even with the sslmodes `allow` and
# `prefer`, but asyncpg does not. Therefore, if a CA file is set, `connect` replaces `allow` and
# `prefer` by two connection attempts with other sslmodes of asyncpg.
_ATTEMPTS_WITH_CA = {"allow": ("disable", "require"), "prefer": ("require", "disable")}
_VARIABLES = {"sslrootcert": "DB_SSL_CA", "sslcert": "DB_SSL_CERT", "sslkey": "DB_SSL_KEY"}
# `_check_mode_of_key` refuses a private key file whose mode has one of the forbidden permission
# bits. As in libpq, group read permission is allowed only if root owns the file.
_FORBIDDEN_MODE, _FORBIDDEN_MODE_ROOT = 0o077, 0o037


async def connect(
    settings: Settings, arguments: ConnectArgs
) -> "asyncpg.Connection[asyncpg.Record]":
    """Call `asyncpg.connect` so that each sslmode has the same effect as in libpq.

    Raises:
        ConfigurationError: a certificate or key file for TLS is missing or malformed.
        Exception: `connect` passes on the exceptions of `asyncpg.connect`.
    """
    parameters = settings.tls
    attempts = (
        _ATTEMPTS_WITH_CA.get(parameters.get("sslmode", "prefer"), ())
        if "sslrootcert" in parameters
        else ()
    )
    try:
        _check_mode_of_key(settings, parameters)
        if not attempts:
            return await asyncpg.connect(**arguments)
        try:
            return await asyncpg.connect(**arguments, ssl=attempts[0])
        except (ConnectionError, ssl.SSLError, asyncpg.InvalidAuthorizationSpecificationError) as e:
            _check_files(settings, parameters)
            try:
                return await asyncpg.connect(**arguments, ssl=attempts[1])
            except (OSError, asyncpg.PostgresError):
                # A TLS error of the first connection attempt explains the failure better than the
                # error of the second connection attempt.
                if isinstance(e, ssl.SSLError):
                    raise e from None
                raise
    except asyncpg.ClientConfigurationError:
        if parameters.get("sslmode", "").startswith("verify-") and "sslrootcert" not in parameters:
            raise ConfigurationError(
                f"DB_SSL_CA is not set: sslmode {parameters['sslmode']} needs the certificate of"
                " the certificate authority"
            ) from None
        raise
    except asyncpg.ConnectionDoesNotExistError as error:
        if isinstance(error.__cause__, ssl.SSLError):  # the server refused the client certificate
            raise error.__cause__ from None
        raise
    except OSError:
        _check_files(settings, parameters)
        raise


def _name(settings: Settings, parameter: str) -> str:
    """Return the name of the environment variable that sets a TLS parameter."""
    url = settings.url
    if url is not None and parameter in url.parameters:
        return f"DATABASE_URL: {parameter}"
    return _VARIABLES.get(parameter, parameter)


def _check_mode_of_key(settings: Settings, parameters: dict[str, str]) -> None:
    key = parameters.get("sslkey")
    if key is None or parameters.get("sslmode") == "disable":
        return
    found = Path(key).stat()
    if found.st_mode & (_FORBIDDEN_MODE if found.st_uid else _FORBIDDEN_MODE_ROOT):
        raise ConfigurationError(
            f"{_name(settings, 'sslkey')} can be read by other users: run `chmod 600` on the file"
        )


def _check_files(settings: Settings, parameters: dict[str, str]) -> None:
    """Raise ConfigurationError if a certificate or key file for TLS is missing or malformed."""
    if parameters.get("sslmode") == "disable":
        return
    files = [name for name in ("sslrootcert", "sslcrl", "sslcert", "sslkey") if name in parameters]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for file in files:
        try:
            Path(parameters[file]).read_bytes()
        except OSError as error:
            name = _name(settings, file)
            raise ConfigurationError(f"{name} cannot be read: {error.strerror}") from None
    for file in (name for name in files if name in ("sslrootcert", "sslcrl")):
        try:
            context.load_verify_locations(parameters[file])
        except ssl.SSLError:
            name = _name(settings, file)
            raise ConfigurationError(f"{name} is not a PEM file of certificates") from None
    if "sslcert" in files:
        cert, key = _name(settings, "sslcert"), _name(settings, "sslkey")
        password = parameters.get("sslpassword", "")
        try:
            context.load_cert_chain(parameters["sslcert"], parameters.get("sslkey"), password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ConfigurationError(f"{key} is not the private key of {cert}") from None
            raise ConfigurationError(
                f"{cert} and {key} must be a PEM certificate and its private key, without a"
                " passphrase"
            ) from None

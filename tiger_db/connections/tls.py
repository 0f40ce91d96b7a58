"""What TLS means, as libpq means it, where asyncpg means something else or does not say it."""

import ssl
from pathlib import Path

import asyncpg

from tiger_db.errors import ConfigurationError
from tiger_db.settings import ConnectArgs, Settings

# With a CA, libpq verifies in these modes too, so that they are two attempts.
_ATTEMPTS = {"allow": ("disable", "require"), "prefer": ("require", "disable")}
_VARIABLES = {"sslrootcert": "DB_SSL_CA", "sslcert": "DB_SSL_CERT", "sslkey": "DB_SSL_KEY"}
_OTHERS_MAY = 0o077, 0o037  # of a key of one's own, and of one of root's


async def connect(
    settings: Settings, arguments: ConnectArgs
) -> "asyncpg.Connection[asyncpg.Record]":
    """As `asyncpg.connect`, whose errors it raises.

    Raises:
        ConfigurationError: a file that TLS needs is missing or bad.
    """
    given = settings.tls
    attempts = _ATTEMPTS.get(given.get("sslmode", "prefer"), ()) if "sslrootcert" in given else ()
    try:
        _check_mode_of_key(settings, given)
        if not attempts:
            return await asyncpg.connect(**arguments)
        try:
            return await asyncpg.connect(**arguments, ssl=attempts[0])
        except (ConnectionError, ssl.SSLError, asyncpg.InvalidAuthorizationSpecificationError) as e:
            _check_files(settings, given)
            try:
                return await asyncpg.connect(**arguments, ssl=attempts[1])
            except (OSError, asyncpg.PostgresError):
                if isinstance(e, ssl.SSLError):  # the root of it
                    raise e from None
                raise
    except asyncpg.ClientConfigurationError:
        if given.get("sslmode", "").startswith("verify-") and "sslrootcert" not in given:
            raise ConfigurationError(
                f"DB_SSL_CA is not set: {given['sslmode']} needs the certificate of the authority"
            ) from None
        raise
    except asyncpg.ConnectionDoesNotExistError as error:
        if isinstance(error.__cause__, ssl.SSLError):  # the server refuses our certificate
            raise error.__cause__ from None
        raise
    except OSError:
        _check_files(settings, given)
        raise


def reason_of(error: BaseException) -> str:
    """Why there is no connection, in one line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is refused: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return f"TLS failed: {error.reason.lower().replace('_', ' ')}"
    if rejected(error):
        return "it offers no TLS"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def rejected(error: BaseException | None) -> bool:
    """Whether the server was asked for TLS and has none."""
    return type(error) is ConnectionError and "rejected SSL upgrade" in str(error)


def _name(settings: Settings, parameter: str) -> str:
    url = settings.url
    if url is not None and parameter in url.parameters:
        return f"DATABASE_URL: {parameter}"
    return _VARIABLES.get(parameter, parameter)


def _check_mode_of_key(settings: Settings, given: dict[str, str]) -> None:
    key = given.get("sslkey")
    if key is None or given.get("sslmode") == "disable":
        return
    found = Path(key).stat()
    if found.st_mode & _OTHERS_MAY[found.st_uid == 0]:
        raise ConfigurationError(
            f"{_name(settings, 'sslkey')} can be read by others: take that away with `chmod 600`"
        )


def _check_files(settings: Settings, given: dict[str, str]) -> None:
    """Say what is wrong with the files, if that is why it failed."""
    if given.get("sslmode") == "disable":
        return
    for parameter in ("sslrootcert", "sslcrl", "sslcert", "sslkey"):
        if parameter in given:
            try:
                Path(given[parameter]).read_bytes()
            except OSError as error:
                name = _name(settings, parameter)
                raise ConfigurationError(f"{name} cannot be read: {error.strerror}") from None
    _check_contents(settings, given)


def _check_contents(settings: Settings, given: dict[str, str]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for parameter in ("sslrootcert", "sslcrl"):
        if parameter in given:
            try:
                context.load_verify_locations(given[parameter])
            except ssl.SSLError:
                name = _name(settings, parameter)
                raise ConfigurationError(f"{name} is not a PEM file of certificates") from None
    if "sslcert" in given:
        cert, key = _name(settings, "sslcert"), _name(settings, "sslkey")
        try:
            context.load_cert_chain(
                given["sslcert"], given.get("sslkey"), lambda: given.get("sslpassword", "")
            )
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ConfigurationError(f"{key} is not the key of {cert}") from None
            raise ConfigurationError(
                f"{cert} and {key} are not a PEM certificate and its key, without a passphrase"
            ) from None

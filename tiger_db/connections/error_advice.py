"""Explanations of database errors for users, with reasons and advice."""

import ssl

import asyncpg
from sqlalchemy.exc import DBAPIError

from tiger_db.errors import DatabaseUnavailable, PrivilegeMissing, TigerDBError
from tiger_db.sqlstates import classify


def reason(error: BaseException) -> str:
    """Return the reason why a connection failed or was lost, in one line without credentials."""
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return "the server accepts no writes"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is refused: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return f"TLS failed: {error.reason.lower().replace('_', ' ')}"
    if _lacks_tls(error):
        return "the server offers no TLS"
    if isinstance(error, asyncpg.ConnectionDoesNotExistError):
        return "the server closed the connection"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def explain(error: Exception) -> str | None:
    """Return one line with the reason of an error, and with advice.

    Return None if the error is no DBAPIError, TigerDBError or OSError.
    """
    if isinstance(error, DBAPIError):
        if isinstance(known := classify(error), PrivilegeMissing):
            return str(known)
        cause = getattr(error.orig, "__cause__", None) or error.orig
        text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        return f"the database refused a statement: {text}"
    if isinstance(error, TigerDBError):
        advice = _advice(error.__context__) if isinstance(error, DatabaseUnavailable) else None
        return f"{error}: {advice}" if advice else str(error)
    if not isinstance(error, OSError):
        return None
    text = error.strerror or type(error).__name__
    return f"{text}: {error.filename}" if error.filename else text


def _advice(cause: BaseException | None) -> str | None:  # noqa: PLR0911  # one return for each cause
    match cause:
        case asyncpg.InsufficientPrivilegeError():
            return "grant privileges to the role with `tiger-db grant`, or connect as another role"
        case asyncpg.InvalidAuthorizationSpecificationError() if "certificate" in str(cause):
            return "check DB_USER, DB_SSL_CERT and DB_SSL_KEY"
        case asyncpg.InvalidAuthorizationSpecificationError() if "encryption" in str(cause):
            return "check DB_SSL_MODE and DB_USER"
        case asyncpg.InvalidAuthorizationSpecificationError():
            return "check DATABASE_URL, or DB_USER and DB_PASSWORD"
        case asyncpg.ProtocolViolationError() if "startup parameter" in str(cause):
            return "behind PgBouncer, set DB_POOLER=pgbouncer and DB_DIRECT_HOST"
        case ssl.SSLCertVerificationError():
            return "check DB_SSL_MODE, DB_SSL_CA, and the host name in DATABASE_URL or DB_HOST"
        case ssl.SSLError():
            return "check DB_SSL_MODE, DB_SSL_CA, DB_SSL_CERT and DB_SSL_KEY"
        case _ if _lacks_tls(cause):
            return "enable TLS on the server, or check DB_SSL_MODE"
        # TimeoutError is a subclass of OSError.
        case OSError() | asyncpg.ConnectionDoesNotExistError():
            return "is the server running? Check DATABASE_URL, or DB_HOST and DB_PORT"
    return None  # The message of a missing database already contains advice.


def _lacks_tls(error: BaseException | None) -> bool:
    return type(error) is ConnectionError and "rejected SSL upgrade" in str(error)

"""One-line explanations of errors for people: the reason, and advice where it is known."""

import ssl

import asyncpg
from sqlalchemy.exc import DBAPIError

from tiger_db.connections import tls
from tiger_db.errors import DatabaseUnavailable, TigerDBError


def explain(error: Exception) -> str | None:
    """Return the reason of an error and what to do about it, or None for an unknown error."""
    if isinstance(error, DBAPIError):
        cause = getattr(error.orig, "__cause__", None) or error.orig
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        return f"the database refused: {reason}"
    if isinstance(error, TigerDBError):
        advice = _advice(error.__context__) if isinstance(error, DatabaseUnavailable) else None
        return f"{error}: {advice}" if advice else str(error)
    if not isinstance(error, OSError):
        return None
    reason = error.strerror or type(error).__name__
    return f"{reason}: {error.filename}" if error.filename else reason


def _advice(cause: BaseException | None) -> str | None:  # noqa: PLR0911  # one for each cause
    match cause:
        case asyncpg.InvalidCatalogNameError():
            return None  # the message has the advice
        case asyncpg.InvalidAuthorizationSpecificationError() if "certificate" in str(cause):
            return "check DB_USER, DB_SSL_CERT and DB_SSL_KEY"
        case asyncpg.InvalidAuthorizationSpecificationError() if "encryption" in str(cause):
            return "check DB_SSL_MODE and DB_USER"
        case asyncpg.InvalidAuthorizationSpecificationError():
            return "check DATABASE_URL, or DB_USER and DB_PASSWORD"
        case asyncpg.ProtocolViolationError() if "startup parameter" in str(cause):
            return "behind PgBouncer, set DB_POOLER=pgbouncer and DB_DIRECT_HOST"
        case ssl.SSLCertVerificationError():
            return "check DB_SSL_MODE, DB_SSL_CA, and the server's name in DB_HOST"
        case ssl.SSLError():
            return "check DB_SSL_MODE, DB_SSL_CA, DB_SSL_CERT and DB_SSL_KEY"
        case _ if tls.rejected(cause):
            return "enable TLS on the server, or check DB_SSL_MODE"
        case OSError():  # also TimeoutError
            return "is the server running? Check DATABASE_URL, or DB_HOST and DB_PORT"
    return None

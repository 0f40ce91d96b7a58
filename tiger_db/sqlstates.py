"""Conversion of PostgreSQL's SQLSTATEs to the errors of tiger_db.

https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm.exc import StaleDataError

from tiger_db.errors import (
    AlreadyExists,
    Conflict,
    DatabaseUnavailable,
    InvalidState,
    InvalidValue,
    MissingReference,
    PrivilegeMissing,
    QueryTimeout,
    StatementRefused,
    TigerDBError,
)

# If a connection is lost, asyncpg raises an error of a class in CONNECTION_ERRORS.
CONNECTION_ERRORS = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError)
# asyncpg raises an error of a class in SCHEMA_CHANGED if a prepared statement is executed after the
# schema was changed, for example after a column got another type.
SCHEMA_CHANGED = (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError)
DISK_FULL = "53100"
READ_ONLY_SQL_TRANSACTION = "25006"  # A former primary or a readonly session refused a write.
IDLE_IN_TRANSACTION_TIMEOUT = "25P03"
INSUFFICIENT_PRIVILEGE = "42501"
PRIVILEGE_ADVICE = "connect as another role, or see `tiger-db grant` and docs/roles.md"
ROW_SECURITY_ADVICE = "`tiger-db check` prints the SQL that disables row security"
# Before version 18, PostgreSQL uses the same SQLSTATE for a reference to a missing row and for the
# deletion of a referenced row.
_BROKEN_REFERENCE = "the referenced row does not exist, or other rows refer to the deleted row"
# `_ERRORS` maps a SQLSTATE, or its first characters, to an error's type and message. If the message
# in `_ERRORS` is None, the error has PostgreSQL's own message, which contains no values of a row.
_ERRORS: dict[str, tuple[type[TigerDBError], str | None]] = {
    "08": (DatabaseUnavailable, "the connection to the database was lost"),
    "22000": (InvalidValue, "a value is not of its column's type"),
    "22001": (InvalidValue, "a text is too long"),
    "22003": (InvalidValue, "a number is out of range"),
    "22008": (InvalidValue, "a time is out of range"),
    "22021": (InvalidValue, "a text has a character that cannot be stored"),
    "22P02": (InvalidValue, "a value is not of its column's type"),
    "22P05": (InvalidValue, "a text has a character that cannot be stored"),
    "23001": (MissingReference, _BROKEN_REFERENCE),
    "23502": (InvalidValue, "a value is missing"),
    "23503": (MissingReference, _BROKEN_REFERENCE),
    "23505": (AlreadyExists, "the value already exists"),  # see `_DUPLICATES`
    "23514": (InvalidValue, "a value is not allowed"),
    "25P02": (InvalidState, "an earlier error aborted the transaction: roll back the session"),
    READ_ONLY_SQL_TRANSACTION: (DatabaseUnavailable, "the database accepts no writes"),
    IDLE_IN_TRANSACTION_TIMEOUT: (
        DatabaseUnavailable,
        "the connection was lost: a transaction exceeded DB_IDLE_TRANSACTION_TIMEOUT",
    ),
    "25P04": (
        DatabaseUnavailable,
        "the connection was lost: a transaction exceeded transaction_timeout",
    ),
    "28": (DatabaseUnavailable, "the database refuses the login of this role"),
    "3D000": (DatabaseUnavailable, "the database does not exist: run `tiger-db init`"),
    "40001": (Conflict, None),  # Serialization failure, or conflict with recovery on a replica.
    "40P01": (Conflict, None),  # Deadlock.
    INSUFFICIENT_PRIVILEGE: (PrivilegeMissing, None),
    DISK_FULL: (DatabaseUnavailable, "the disk of the database server is full"),
    "53300": (
        DatabaseUnavailable,
        "the database server allows no more connections: see max_connections",
    ),
    "55P03": (Conflict, None),  # Lock timeout.
    "P0001": (StatementRefused, None),  # A trigger raised an exception.
    "57014": (QueryTimeout, None),
    "57P0": (DatabaseUnavailable, "the connection to the database was lost"),
}
# Messages for violations of unique constraints and indexes, by the name of the constraint or index.
_DUPLICATES = {
    "uq_tiger_accounts_account_number": "an account with this account number already exists",
    "uq_tiger_accounts_is_default_trading": "a default account for trading already exists",
    "uq_tiger_accounts_is_default_data": "a default account for market data already exists",
    "uq_api_keys_key_prefix": "an API key with this prefix already exists",
    "uq_token_statuses_tiger_account_id_open": "an open refresh of this account already exists",
}
# The first two characters of the SQLSTATEs of transient errors. PostgreSQL calls the classes of
# transient errors "connection exception", "transaction rollback", "insufficient resources", "object
# not in prerequisite state" and "operator intervention".
_TRANSIENT_CLASSES = {"08", "40", "53", "55", "57"}


def error_type(sqlstate: str) -> type[TigerDBError] | None:
    """Return tiger_db's error type for a SQLSTATE, or None for an unknown SQLSTATE."""
    return _entry(sqlstate)[0]


def _entry(sqlstate: str) -> tuple[type[TigerDBError] | None, str | None]:
    for length in (5, 4, 2):
        if (entry := _ERRORS.get(sqlstate[:length])) is not None:
            return entry
    return None, None


def classify(
    error: BaseException, *, statement_timeout: str = "DB_QUERY_TIMEOUT"
) -> TigerDBError | None:
    """Convert an error of asyncpg or SQLAlchemy to an error of tiger_db, or return None.

    The message of the new error contains no values of a row, but can name a constraint or a column.
    The argument `statement_timeout` is the name of the setting that limits statements.
    """
    cause = _cause(error)
    if isinstance(cause, SCHEMA_CHANGED):
        return Conflict(
            "the schema of the database was changed after this statement was prepared:"
            " repeat the transaction"
        )
    if isinstance(cause, asyncpg.PostgresError):
        return _classify_sqlstate(cause, statement_timeout)
    if isinstance(cause, CONNECTION_ERRORS):
        return DatabaseUnavailable(
            f"the connection to the database was lost: {type(cause).__name__}"
        )
    return None


def _classify_sqlstate(error: asyncpg.PostgresError, statement_timeout: str) -> TigerDBError | None:
    kind, message = _entry(error.sqlstate or "")
    if kind is None:
        return None
    where = getattr(error, "constraint_name", None) or getattr(error, "column_name", None)
    if message is None:
        text = str(error).partition("\n")[0]
        if kind is PrivilegeMissing:
            # A trigger that refuses a change has this SQLSTATE, too.
            if error.server_source_function == "exec_stmt_raise":
                return StatementRefused(text)
            is_hidden = error.server_source_function == "check_enable_rls"
            return kind(f"{text}: {ROW_SECURITY_ADVICE if is_hidden else PRIVILEGE_ADVICE}")
        setting = _setting(error.sqlstate or "", text, statement_timeout)
        return kind(f"{text} ({setting})" if setting else text)
    if where:
        return kind(f"{_DUPLICATES.get(where, message)} ({where})")
    return kind(message)


def _setting(sqlstate: str, message: str, statement_timeout: str) -> str | None:
    """Return the name of the setting that ended a statement, or None."""
    # A statement that a person cancels and a statement timeout have the same SQLSTATE, and so have
    # NOWAIT and a lock timeout. Only PostgreSQL's message tells which of the two happened.
    if sqlstate == "57014" and "user request" not in message:
        return statement_timeout
    if sqlstate == "55P03" and "lock timeout" in message:
        return "lock_timeout"
    return None


def typed(error: SQLAlchemyError) -> TigerDBError:
    """Convert any error of SQLAlchemy to an error of tiger_db without values of a row."""
    if (known := classify(error)) is not None:
        return known
    if isinstance(error, PoolTimeoutError):
        return DatabaseUnavailable(
            "all connections of the connection pool were in use:"
            " increase DB_POOL_SIZE or DB_MAX_OVERFLOW"
        )
    if isinstance(error, StaleDataError):
        return Conflict("another transaction has deleted a row that this transaction changes")
    if isinstance(error, DBAPIError):
        return StatementRefused(f"the database refused a statement: {type(_cause(error)).__name__}")
    # This message of SQLAlchemy means that a session of `Database` has left out secrets.
    if "raiseload=True" in str(error):
        return PrivilegeMissing(f"this role may not read secrets: {PRIVILEGE_ADVICE}")
    return InvalidState(f"SQLAlchemy refuses the call on this session: {type(error).__name__}")


def is_transient(error: BaseException) -> bool:
    """Return whether an error is transient, so that the same transaction can succeed later.

    An unavailable server, a lack of resources, or another transaction causes a transient error.
    """
    if isinstance(error, DatabaseUnavailable | Conflict | QueryTimeout):
        return True
    lost: bool = getattr(error, "connection_invalidated", False)
    return lost or (getattr(_cause(error), "sqlstate", None) or "")[:2] in _TRANSIENT_CLASSES


@contextmanager
def raw_errors() -> Iterator[None]:
    """Convert errors of asyncpg in a `with` block to errors of tiger_db.

    Raises:
        DatabaseUnavailable, Conflict, QueryTimeout: asyncpg raised a transient error.
        AlreadyExists, MissingReference, InvalidValue: a constraint or a column type refuses a
            value.
        StatementRefused: the database refused a statement, for example because a privilege is
            missing.
    """
    try:
        yield
    except TigerDBError:  # such as FileError, which is an OSError
        raise
    except (*CONNECTION_ERRORS, asyncpg.PostgresError) as error:
        refused = StatementRefused(f"the database refused a statement: {type(error).__name__}")
        raise classify(error) or refused from None


def _cause(error: BaseException) -> BaseException | None:
    """Return the asyncpg error inside a DBAPIError. Return any other error itself."""
    return error.orig and error.orig.__cause__ if isinstance(error, DBAPIError) else error

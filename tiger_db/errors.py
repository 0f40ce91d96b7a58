"""The errors of this package. The default message of an error is the docstring of its class."""

from collections.abc import Iterable
from datetime import timedelta
from typing import ClassVar, Self

from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError


class TigerDBError(Exception):
    """An operation of tiger_db failed."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ConfigurationError(TigerDBError):
    """A setting is missing or not valid."""

    code = "configuration_error"


class DatabaseUnavailable(TigerDBError):
    """The database cannot be reached, or the connection to the database was lost."""

    code = "database_unavailable"


class OutcomeUnknown(DatabaseUnavailable):
    """The commit or the outcome of an action was not confirmed: it is unknown what was saved."""

    code = "outcome_unknown"


class QueryTimeout(TigerDBError):
    """An SQL statement took longer than DB_QUERY_TIMEOUT or was cancelled. Nothing was saved."""

    code = "query_timeout"


class Conflict(TigerDBError):
    """Another transaction caused a conflict. Nothing was saved: repeat the transaction."""

    code = "conflict"


class StatementRefused(TigerDBError):
    """The database refused an SQL statement, for example because a privilege is missing."""

    code = "statement_refused"


class PrivilegeMissing(StatementRefused):
    """The database role lacks a privilege."""

    code = "privilege_missing"


class SchemaMismatch(TigerDBError):
    """The schema of the database does not match this version of tiger_db."""

    code = "schema_mismatch"


class MigrationError(TigerDBError):
    """The schema could not be migrated."""

    code = "migration_error"


class EmbeddedError(TigerDBError):
    """The embedded PostgreSQL failed."""

    code = "embedded_error"


class EncryptionError(TigerDBError):
    """A secret could not be encrypted or decrypted."""

    code = "encryption_error"


class FileError(TigerDBError, OSError):
    """A file or folder cannot be written."""

    code = "file_error"


class NotFound(TigerDBError):
    """The row does not exist."""

    code = "not_found"


class AlreadyExists(TigerDBError):
    """A row with these values already exists."""

    code = "already_exists"


class MissingReference(TigerDBError):
    """A referenced row does not exist, or other rows refer to the deleted row."""

    code = "missing_reference"


class InvalidValue(TigerDBError):
    """A value is not allowed for its field or parameter."""

    code = "invalid_value"


class InvalidFields(InvalidValue, ValidationError):
    """Fields or arguments are not valid. The error names each field, and hides the values."""

    code = "invalid_fields"

    def __init__(self, *_arguments: object) -> None:
        # pydantic_core stores the arguments in __new__, and builds the message from the arguments.
        Exception.__init__(self)

    @classmethod
    def of(
        cls, title: str, problems: Iterable[tuple[tuple[str | int, ...], PydanticCustomError]]
    ) -> Self:
        """Create the error for invalid fields of the class or function `title`.

        Each of `problems` is the path of a field or argument, and the reason.
        """
        details = [InitErrorDetails(type=why, loc=where, input=None) for where, why in problems]
        return cls.from_exception_data(title, details, hide_input=True)


class InvalidCursor(InvalidValue):
    """The cursor is not from this list: pass a cursor of a page with the same order and filters."""

    code = "invalid_cursor"


class InvalidState(TigerDBError):
    """The status of the row does not allow this operation."""

    code = "invalid_state"


class StaleToken(InvalidState):
    """The account has a newer access token."""

    code = "stale_token"


class LeaseLost(InvalidState):
    """The claim on the refresh has ended: another worker may have claimed the refresh."""

    code = "lease_lost"


class RefreshFailed(TigerDBError):
    """The access token was not refreshed. `broker_code` is the broker's error code, or None."""

    code = "refresh_failed"

    def __init__(self, message: str = "", *, broker_code: int | None = None) -> None:
        super().__init__(message)
        self.broker_code = broker_code


class RefreshLimited(RefreshFailed):
    """The broker's rate limit is reached: repeat the request after `retry_after`."""

    code = "refresh_limited"

    def __init__(
        self, message: str = "", *, broker_code: int | None = None, retry_after: timedelta
    ) -> None:
        super().__init__(message, broker_code=broker_code)
        self.retry_after = retry_after


class CredentialsRefused(RefreshFailed):
    """The broker refuses the credentials of the account: a retry cannot succeed."""

    code = "credentials_refused"


class AnswerLost(RefreshFailed):
    """The broker's answer was lost: the broker may have issued a new token."""

    code = "answer_lost"


class WaitTimeout(TigerDBError, TimeoutError):
    """The refresh did not end in time, and goes on."""

    code = "wait_timeout"


class AccessDenied(TigerDBError):
    """The API key does not allow this request."""

    code = "access_denied"


class InvalidAPIKey(AccessDenied):
    """The API key is not valid."""

    code = "invalid_api_key"


class APIKeyExpired(AccessDenied):
    """The API key has expired."""

    code = "api_key_expired"


class APIKeyRevoked(AccessDenied):
    """The API key is revoked or not active."""

    code = "api_key_revoked"


class AccountNotActive(AccessDenied):
    """The account of this API key is not active."""

    code = "account_not_active"


class AccountNotAllowed(AccessDenied):
    """The API key is bound to another account."""

    code = "account_not_allowed"


class AddressNotAllowed(AccessDenied):
    """The API key may not be used from this IP address."""

    code = "address_not_allowed"


class UserAgentNotAllowed(AccessDenied):
    """The API key may not be used with this user agent."""

    code = "user_agent_not_allowed"


class ScopeMissing(AccessDenied):
    """The API key does not have a required scope."""

    code = "scope_missing"


class TradingPaused(AccessDenied):
    """Trading is paused. `reason` is the reason of the pause."""

    code = "trading_paused"

    def __init__(self, message: str = "", *, reason: str) -> None:
        super().__init__(message or f"trading is paused: {reason}")
        self.reason = reason


class RateLimited(AccessDenied):
    """The API key has reached its rate limit."""

    code = "rate_limited"

    def __init__(self, message: str = "", *, retry_after: timedelta, remaining: int = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.remaining = remaining

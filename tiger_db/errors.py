"""The errors of this package. The default message of an error is the docstring of its class."""

from datetime import timedelta


class TigerDBError(Exception):
    """An operation of tiger_db failed."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ConfigurationError(TigerDBError):
    """A setting is missing or not valid."""


class DatabaseUnavailable(TigerDBError):
    """The database cannot be reached, or the connection to it was lost."""


class OutcomeUnknown(DatabaseUnavailable):
    """The commit or the outcome of an action was not confirmed: it is unknown what was saved."""


class QueryTimeout(TigerDBError):
    """A statement took longer than DB_QUERY_TIMEOUT or was cancelled. Nothing was saved."""


class Conflict(TigerDBError):
    """Another transaction caused a conflict. Nothing was saved: repeat the transaction."""


class StatementRefused(TigerDBError):
    """The database refused a statement, for example because a privilege is missing."""


class SchemaMismatch(TigerDBError):
    """The schema of the database does not match this version of tiger_db."""


class MigrationError(TigerDBError):
    """The schema could not be migrated."""


class EmbeddedError(TigerDBError):
    """The embedded PostgreSQL failed."""


class EncryptionError(TigerDBError):
    """A secret could not be encrypted or decrypted."""


class NotFound(TigerDBError):
    """The row does not exist."""


class AlreadyExists(TigerDBError):
    """A row with these values already exists."""


class MissingReference(TigerDBError):
    """A referenced row does not exist."""


class InvalidValue(TigerDBError):
    """A value is not allowed for its field or parameter."""


class InvalidCursor(InvalidValue):
    """The cursor is malformed: pass the next_cursor of a page unchanged."""


class InvalidState(TigerDBError):
    """The status of the row does not allow this operation."""


class StaleToken(InvalidState):
    """The account has a newer access token."""


class LeaseLost(InvalidState):
    """The claim on the refresh has ended: another worker may have claimed the refresh."""


class RefreshFailed(TigerDBError):
    """The access token was not refreshed. `code` is the error code of the broker, or None."""

    def __init__(self, message: str = "", *, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class RefreshLimited(RefreshFailed):
    """The broker's rate limit is reached: repeat the request after `retry_after`."""

    def __init__(
        self, message: str = "", *, code: int | None = None, retry_after: timedelta
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class CredentialsRefused(RefreshFailed):
    """The broker refuses the credentials of the account: a retry cannot succeed."""


class AnswerLost(RefreshFailed):
    """The broker's answer was lost: the broker may have issued a new token."""


class AccessDenied(TigerDBError):
    """The API key does not allow this request."""


class InvalidAPIKey(AccessDenied):
    """The API key is not valid."""


class APIKeyExpired(AccessDenied):
    """The API key has expired."""


class APIKeyRevoked(AccessDenied):
    """The API key is revoked or not active."""


class AccountNotActive(AccessDenied):
    """The account of this API key is not active."""


class AccountNotAllowed(AccessDenied):
    """The API key is bound to another account."""


class AddressNotAllowed(AccessDenied):
    """The API key may not be used from this IP address."""


class UserAgentNotAllowed(AccessDenied):
    """The API key may not be used with this user agent."""


class ScopeMissing(AccessDenied):
    """The API key does not have a required scope."""


class RateLimited(AccessDenied):
    """The API key has reached its rate limit."""

    def __init__(self, message: str = "", *, retry_after: timedelta, remaining: int = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.remaining = remaining

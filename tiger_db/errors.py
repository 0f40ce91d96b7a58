"""Everything this package raises on purpose. The default message is the class's docstring."""

from datetime import timedelta


class TigerDBError(Exception):
    """Something went wrong in tiger_db."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ConfigurationError(TigerDBError):
    """A setting is missing or has a bad value."""


class DatabaseUnavailable(TigerDBError):
    """The database cannot be reached, or the connection to it was lost."""


class OutcomeUnknown(DatabaseUnavailable):
    """The commit was not confirmed: it may have happened, or not."""


class QueryTimeout(TigerDBError):
    """A statement took longer than DB_QUERY_TIMEOUT, or was cancelled; nothing was saved."""


class Conflict(TigerDBError):
    """Other transactions were in the way, nothing was saved: the whole of it may be run again."""


class StatementRefused(TigerDBError):
    """The database refused a statement, for want of a right, for one."""


class SchemaMismatch(TigerDBError):
    """The database's schema is not the one this version of tiger_db needs."""


class MigrationError(TigerDBError):
    """The schema could not be migrated."""


class EmbeddedError(TigerDBError):
    """The embedded PostgreSQL cannot do what was asked."""


class EncryptionError(TigerDBError):
    """A secret could not be encrypted or decrypted."""


class NotFound(TigerDBError):
    """There is no such row."""


class AlreadyExists(TigerDBError):
    """A row with these values exists already."""


class MissingReference(TigerDBError):
    """A row that this one refers to does not exist."""


class InvalidValue(TigerDBError):
    """A value is not allowed here."""


class InvalidCursor(InvalidValue):
    """The cursor is malformed: pass a page's next_cursor, unchanged."""


class InvalidState(TigerDBError):
    """The row's status does not allow this."""


class StaleToken(InvalidState):
    """The account has a newer access token than this one."""


class LeaseLost(InvalidState):
    """The claim on this refresh has ended: another worker may hold it."""


class RefreshFailed(TigerDBError):
    """The access token could not be refreshed this time; `code` is the broker's, if it answered."""

    def __init__(self, message: str = "", *, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class RefreshLimited(RefreshFailed):
    """The broker wants to be asked later."""

    def __init__(
        self, message: str = "", *, code: int | None = None, retry_after: timedelta
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class CredentialsRefused(RefreshFailed):
    """The broker refuses the account's credentials: asking again is of no use."""


class AnswerLost(RefreshFailed):
    """The broker was asked and its answer was lost: the account may have another token now."""


class AccessDenied(TigerDBError):
    """The API key does not allow this."""


class InvalidAPIKey(AccessDenied):
    """The API key is not valid."""


class APIKeyExpired(AccessDenied):
    """The API key has expired."""


class APIKeyRevoked(AccessDenied):
    """The API key has been revoked or switched off."""


class AccountNotActive(AccessDenied):
    """The account of this API key is not active."""


class AccountNotAllowed(AccessDenied):
    """The API key is bound to another account."""


class AddressNotAllowed(AccessDenied):
    """The API key may not be used from this address."""


class UserAgentNotAllowed(AccessDenied):
    """The API key may not be used by this client."""


class ScopeMissing(AccessDenied):
    """The API key lacks a scope."""


class RateLimited(AccessDenied):
    """The API key has reached its limit."""

    def __init__(self, message: str = "", *, retry_after: timedelta, remaining: int = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.remaining = remaining

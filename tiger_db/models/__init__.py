"""The entities (ORM classes). Importing this package maps all entity classes to tables."""

from tiger_db.encryption import EncryptedType
from tiger_db.models.accounts import (
    AccountStatus,
    AccountType,
    AccountView,
    MarketPermission,
    QuotePermission,
    TigerAccount,
    TigerEnvironment,
    TigerLicense,
)
from tiger_db.models.api_keys import APIKey, APIKeyScope, APIKeyStatus, APIKeyView
from tiger_db.models.audit_logs import AuditAction, AuditLog, AuditResult, AuditSeverity
from tiger_db.models.base import Entity, MutableEntity
from tiger_db.models.columns import metadata
from tiger_db.models.private_keys import PrivateKeyFormat
from tiger_db.models.roles import RoleKind
from tiger_db.models.token_status import NewToken, RefreshTrigger, TokenRefreshStatus, TokenStatus

# The names of tiger_db's tables. An application can add its own tables to `metadata`.
TABLES = frozenset(metadata.tables)
# The columns with ciphertexts, hashes and authentication codes, by table.
SECRET_COLUMNS = {
    "api_keys": frozenset({"key_hash", "mac"}),
    "tiger_accounts": frozenset(
        column.name
        for column in metadata.tables["tiger_accounts"].c
        if isinstance(column.type, EncryptedType) or column.name == "tiger_id_fingerprint"
    ),
    "token_statuses": frozenset({"old_token_hash", "new_token_hash"}),
}

__all__ = [
    "SECRET_COLUMNS",
    "TABLES",
    "APIKey",
    "APIKeyScope",
    "APIKeyStatus",
    "APIKeyView",
    "AccountStatus",
    "AccountType",
    "AccountView",
    "AuditAction",
    "AuditLog",
    "AuditResult",
    "AuditSeverity",
    "Entity",
    "MarketPermission",
    "MutableEntity",
    "NewToken",
    "PrivateKeyFormat",
    "QuotePermission",
    "RefreshTrigger",
    "RoleKind",
    "TigerAccount",
    "TigerEnvironment",
    "TigerLicense",
    "TokenRefreshStatus",
    "TokenStatus",
    "metadata",
]

"""The database of a Tiger Brokers MCP system."""

from tiger_db import crud, errors
from tiger_db.crud import Page
from tiger_db.database import Database, get_session
from tiger_db.models import (
    AccountStatus,
    AccountType,
    APIKey,
    APIKeyScope,
    APIKeyStatus,
    AuditAction,
    AuditLog,
    AuditResult,
    AuditSeverity,
    MarketPermission,
    PrivateKeyFormat,
    RefreshTrigger,
    TigerAccount,
    TigerEnvironment,
    TigerLicense,
    TokenRefreshStatus,
    TokenStatus,
)
from tiger_db.settings import Settings
from tiger_db.verifier import KeyVerifier

__all__ = [
    "APIKey",
    "APIKeyScope",
    "APIKeyStatus",
    "AccountStatus",
    "AccountType",
    "AuditAction",
    "AuditLog",
    "AuditResult",
    "AuditSeverity",
    "Database",
    "KeyVerifier",
    "MarketPermission",
    "Page",
    "PrivateKeyFormat",
    "RefreshTrigger",
    "Settings",
    "TigerAccount",
    "TigerEnvironment",
    "TigerLicense",
    "TokenRefreshStatus",
    "TokenStatus",
    "crud",
    "errors",
    "get_session",
]

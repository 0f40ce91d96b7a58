"""The database of a Tiger Brokers MCP system.

The names below load what they need when first asked for: `tiger-db --help` needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

# Where the names are that are not in `tiger_db.models`.
_HOMES = {
    "Database": "database",
    "KeyVerifier": "verifier",
    "Page": "crud",
    "Settings": "settings",
    "get_session": "database",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("crud", "errors"):
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'models')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

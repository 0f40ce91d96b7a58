"""The database package of an MCP server or dashboard for the broker Tiger Brokers.

Each public name and each submodule is imported at its first use, so that `tiger-db --help` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiger_db import actor as actor
    from tiger_db import audit as audit
    from tiger_db import blocking as blocking
    from tiger_db import connections as connections
    from tiger_db import crud as crud
    from tiger_db import database as database
    from tiger_db import doctor as doctor
    from tiger_db import embedded as embedded
    from tiger_db import encryption as encryption
    from tiger_db import encryption_key_rotation as encryption_key_rotation
    from tiger_db import errors as errors
    from tiger_db import health as health
    from tiger_db import keys_in_force as keys_in_force
    from tiger_db import migrations as migrations
    from tiger_db import models as models
    from tiger_db import out_of_band as out_of_band
    from tiger_db import peppers as peppers
    from tiger_db import redaction as redaction
    from tiger_db import signing as signing
    from tiger_db import tiger as tiger
    from tiger_db.actor import Actor, acting_as
    from tiger_db.blocking import run_blocking
    from tiger_db.crud import Page
    from tiger_db.crud.filters import OneOrMore, Tag
    from tiger_db.database import AsyncSession, Database, Isolation, get_database, get_session
    from tiger_db.encryption import Secret
    from tiger_db.key_verifier import KeyVerifier
    from tiger_db.models import (
        AccountStatus,
        AccountType,
        AccountView,
        APIKey,
        APIKeyScope,
        APIKeyStatus,
        APIKeyView,
        AuditAction,
        AuditLog,
        AuditResult,
        AuditSeverity,
        MarketPermission,
        NewToken,
        PrivateKeyFormat,
        QuotePermission,
        RefreshTrigger,
        TigerAccount,
        TigerEnvironment,
        TigerLicense,
        TokenRefreshStatus,
        TokenStatus,
    )
    from tiger_db.public import Progress
    from tiger_db.refresh_waiting import wait_for_refresh
    from tiger_db.refresh_worker import Refresher, RefreshWorker
    from tiger_db.settings import Settings

__all__ = [
    "APIKey", "APIKeyScope", "APIKeyStatus", "APIKeyView", "AccountStatus", "AccountType",
    "AccountView", "Actor", "AsyncSession", "AuditAction", "AuditLog", "AuditResult",
    "AuditSeverity", "Database", "Isolation", "KeyVerifier", "MarketPermission", "NewToken",
    "OneOrMore", "Page", "PrivateKeyFormat", "Progress", "QuotePermission", "RefreshTrigger",
    "RefreshWorker", "Refresher", "Secret", "Settings", "Tag", "TigerAccount", "TigerEnvironment",
    "TigerLicense", "TokenRefreshStatus", "TokenStatus", "acting_as", "crud", "errors",
    "get_database", "get_session", "run_blocking", "wait_for_refresh",
]  # fmt: skip
# `_SUBMODULES` maps public names to submodules. A public name that is not in `_SUBMODULES` is in
# `tiger_db.models`.
_SUBMODULES = {
    # The import of `change_events` registers functions that record changes of entities.
    "APIKey": "crud.change_events",
    "Actor": "actor",
    "AsyncSession": "database",
    "Database": "database",
    "Isolation": "database",
    "KeyVerifier": "key_verifier",
    "OneOrMore": "crud.filters",
    "Page": "crud",
    "Progress": "public",
    "RefreshWorker": "refresh_worker",
    "Refresher": "refresh_worker",
    "Secret": "encryption",
    "Settings": "settings",
    "Tag": "crud.filters",
    "TigerAccount": "crud.change_events",
    "acting_as": "actor",
    "get_database": "database",
    "get_session": "database",
    "run_blocking": "blocking",
    "wait_for_refresh": "refresh_waiting",
}


if not TYPE_CHECKING:  # a type checker that sees `__getattr__` accepts any name

    def __getattr__(name: str) -> object:
        try:
            if not name.startswith("_"):
                return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_SUBMODULES.get(name, 'models')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

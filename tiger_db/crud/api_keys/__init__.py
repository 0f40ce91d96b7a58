"""CRUD functions for API keys, and functions that pause and resume trading for all API keys."""

from tiger_db.crud.api_keys.authorize import authorize_api_key, verify_api_key
from tiger_db.crud.api_keys.key_format import KEY_PATTERN
from tiger_db.crud.api_keys.lifecycle import (
    KeyChanges,
    activate,
    create_api_key,
    deactivate,
    delete,
    revoke,
    rotate,
    update,
)
from tiger_db.crud.api_keys.pausing import TradingPause, current_pause, is_paused, pause, resume
from tiger_db.crud.api_keys.queries import (
    APIKeyFilters,
    UsageCount,
    UsageDimension,
    find_by_raw_key,
    get,
    get_by_prefix,
    get_keys_for_account,
    list_api_keys,
    list_expiring,
    usage,
)
from tiger_db.crud.api_keys.rate_limits import KeyLimits, Limit, limits
from tiger_db.crud.api_keys.signing import list_unsigned, sign

__all__ = [
    "KEY_PATTERN",
    "APIKeyFilters",
    "KeyChanges",
    "KeyLimits",
    "Limit",
    "TradingPause",
    "UsageCount",
    "UsageDimension",
    "activate",
    "authorize_api_key",
    "create_api_key",
    "current_pause",
    "deactivate",
    "delete",
    "find_by_raw_key",
    "get",
    "get_by_prefix",
    "get_keys_for_account",
    "is_paused",
    "limits",
    "list_api_keys",
    "list_expiring",
    "list_unsigned",
    "pause",
    "resume",
    "revoke",
    "rotate",
    "sign",
    "update",
    "usage",
    "verify_api_key",
]

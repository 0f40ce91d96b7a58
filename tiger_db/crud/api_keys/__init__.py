"""CRUD functions that create, authorize, rotate, extend, revoke and look up API keys.

Other functions pause and resume trading for all API keys.
"""

from tiger_db.crud.api_keys.authorize import authorize_api_key, verify_api_key
from tiger_db.crud.api_keys.key_format import KEY_PATTERN
from tiger_db.crud.api_keys.lifecycle import create_api_key, extend, revoke, rotate
from tiger_db.crud.api_keys.pausing import TradingPause, current_pause, is_paused, pause, resume
from tiger_db.crud.api_keys.queries import (
    HourlyUsage,
    find_by_raw_key,
    get,
    get_by_prefix,
    get_keys_for_account,
    list_api_keys,
    list_expiring,
    usage,
)

__all__ = [
    "KEY_PATTERN",
    "HourlyUsage",
    "TradingPause",
    "authorize_api_key",
    "create_api_key",
    "current_pause",
    "extend",
    "find_by_raw_key",
    "get",
    "get_by_prefix",
    "get_keys_for_account",
    "is_paused",
    "list_api_keys",
    "list_expiring",
    "pause",
    "resume",
    "revoke",
    "rotate",
    "usage",
    "verify_api_key",
]

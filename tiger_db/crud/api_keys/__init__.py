"""CRUD functions that create, authorize, rotate, extend, revoke and look up API keys."""

from tiger_db.crud.api_keys.authorize import authorize_api_key, verify_api_key
from tiger_db.crud.api_keys.key_format import KEY_PATTERN
from tiger_db.crud.api_keys.lifecycle import create_api_key, extend, revoke, rotate
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
    "authorize_api_key",
    "create_api_key",
    "extend",
    "find_by_raw_key",
    "get",
    "get_by_prefix",
    "get_keys_for_account",
    "list_api_keys",
    "list_expiring",
    "revoke",
    "rotate",
    "usage",
    "verify_api_key",
]

"""API keys: creating, checking, rotating and revoking them."""

from tiger_db.crud.api_keys.authorizing import authorize_api_key, verify_api_key
from tiger_db.crud.api_keys.changing import create_api_key, extend, revoke, rotate
from tiger_db.crud.api_keys.reading import (
    HourlyUsage,
    find_by_text,
    get,
    get_by_prefix,
    get_keys_for_account,
    list_api_keys,
    list_expiring,
    usage,
)
from tiger_db.crud.api_keys.text import KEY_PATTERN

__all__ = [
    "KEY_PATTERN",
    "HourlyUsage",
    "authorize_api_key",
    "create_api_key",
    "extend",
    "find_by_text",
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

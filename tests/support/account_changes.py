"""Changes of accounts, and their secrets."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from tiger_db import MarketPermission
from tiger_db.crud import accounts
from tiger_db.database import AsyncSession

Change = Callable[[AsyncSession, UUID], Awaitable[object]]
CHANGES: dict[str, Change] = {
    "add_market_permission": lambda s, i: accounts.add_market_permission(s, i, MarketPermission.HK),
    "remove_market_permission": lambda s, i: accounts.remove_market_permission(
        s, i, MarketPermission.US
    ),
    "delete": accounts.delete,
    "update": lambda s, i: accounts.update(s, i, description="new"),
    "set_default_trading_account": accounts.set_default_trading_account,
    "set_default_data_account": accounts.set_default_data_account,
    "update_tokens": lambda s, i: accounts.update_tokens(s, i, access_token="new"),
    "record_error": lambda s, i: accounts.record_error(s, i, message="no answer"),
    "reset_errors": accounts.reset_errors,
    "close": accounts.close,
    "reopen": lambda s, i: accounts.reopen(s, i, private_key="new"),
}
SECRETS: dict[str, Any] = {
    "tiger_id": "20159999",
    "private_key": "MIICXQIBAAKBgQ",
    "secret_key": "institutional",
    "access_token": "access-token",
    "refresh_token": "refresh-token",
}

"""CRUD functions for accounts.

A change of an account and the audit event of the change are stored in the same transaction.
"""

from tiger_db.crud.accounts.changes import (
    AccountChanges,
    add_market_permission,
    create,
    remove_market_permission,
    set_default_data_account,
    set_default_trading_account,
    update,
)
from tiger_db.crud.accounts.closing import close, delete, reopen
from tiger_db.crud.accounts.failures import record_error, reset_errors
from tiger_db.crud.accounts.queries import (
    AccountCounts,
    AccountFilters,
    counts,
    get,
    get_accounts_needing_token_refresh,
    get_by_account_number,
    get_default_data_account,
    get_default_trading_account,
    list_accounts,
    list_by_tiger_id,
)
from tiger_db.crud.accounts.routing import (
    RoutingReason,
    explain_for_operation,
    find_for_operation,
)
from tiger_db.crud.accounts.tokens import update_tokens

__all__ = [
    "AccountChanges",
    "AccountCounts",
    "AccountFilters",
    "RoutingReason",
    "add_market_permission",
    "close",
    "counts",
    "create",
    "delete",
    "explain_for_operation",
    "find_for_operation",
    "get",
    "get_accounts_needing_token_refresh",
    "get_by_account_number",
    "get_default_data_account",
    "get_default_trading_account",
    "list_accounts",
    "list_by_tiger_id",
    "record_error",
    "remove_market_permission",
    "reopen",
    "reset_errors",
    "set_default_data_account",
    "set_default_trading_account",
    "update",
    "update_tokens",
]

"""The functions that return pages, and a row for each."""

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from tests.support import factories
from tiger_db import AuditAction, Page, crud
from tiger_db.crud.accounts.queries import ACCOUNTS
from tiger_db.crud.api_keys.queries import API_KEYS
from tiger_db.crud.audit_logs.queries import EVENTS, SECURITY_EVENTS
from tiger_db.crud.pagination import EntityList, encode_cursor
from tiger_db.crud.token_status.queries import REFRESHES
from tiger_db.database import AsyncSession
from tiger_db.models import Entity

ACCOUNT = UUID("0190a000-0000-7000-8000-000000000000")
LEAK = AuditAction.SECURITY_KEY_LEAK
List = Callable[..., Awaitable[Page[Any]]]
LISTS: dict[str, List] = {
    "list_accounts": crud.accounts.list_accounts,
    "list_api_keys": crud.api_keys.list_api_keys,
    "get_keys_for_account": lambda s, **p: crud.api_keys.get_keys_for_account(s, ACCOUNT, **p),
    "get_recent_events": crud.audit_logs.get_recent_events,
    "get_security_events": crud.audit_logs.get_security_events,
    "search": lambda s, **p: crud.audit_logs.search(s, action=[LEAK], **p),
    "get_pending_refreshes": crud.token_status.get_pending_refreshes,
    "get_failed_refreshes": crud.token_status.get_failed_refreshes,
    "history": crud.token_status.history,
    "history of an account": lambda s, **p: crud.token_status.history(s, account_id=ACCOUNT, **p),
}

_QUERIES: dict[str, EntityList[Any]] = {
    "list_accounts": ACCOUNTS,
    "list_api_keys": API_KEYS,
    "get_keys_for_account": API_KEYS,
    "get_recent_events": EVENTS,
    "get_security_events": SECURITY_EVENTS,
    "search": EVENTS,
    "get_pending_refreshes": REFRESHES,
    "get_failed_refreshes": REFRESHES,
    "history": REFRESHES,
    "history of an account": REFRESHES,
}
_FILTERS: dict[str, dict[str, object]] = {
    "get_keys_for_account": {"account_id": ACCOUNT},
    "search": {"action": [LEAK]},
    "get_pending_refreshes": {"status": "pending"},
    "get_failed_refreshes": {"status": "failed"},
    "history of an account": {"account_id": ACCOUNT},
}


def cursor_of(name: str, row_id: UUID) -> str:
    """Return the cursor of a list after the row with the given id."""
    return encode_cursor(_QUERIES[name], row_id, filters=_FILTERS.get(name, {}))


async def one_row_for(name: str, session: AsyncSession) -> Entity:
    """A new row that the list shows."""
    row: Entity
    match name:
        case "list_accounts":
            row = await factories.account(session)
        case "list_api_keys":
            row, _ = await factories.api_key(session)
        case "get_keys_for_account":
            row, _ = await factories.api_key(session, tiger_account_id=ACCOUNT)
        case "get_recent_events" | "get_security_events" | "search":
            row = await crud.audit_logs.log_event(session, action=LEAK)
        case "get_pending_refreshes":
            row = await factories.refresh(session)
        case "get_failed_refreshes":
            claim = await factories.claim(session, max_retries=1)
            row = await crud.token_status.fail(session, claim, message="no answer")
        case _:
            account = await crud.accounts.get(session, ACCOUNT)
            row = await factories.refresh(session, account)
            await crud.token_status.cancel(session, row.id)
    return row

"""CRUD functions, in one module per entity. CRUD functions flush the session, and never commit."""

from tiger_db.crud import accounts, api_keys, audit_logs, token_status
from tiger_db.crud.pagination import Page

__all__ = ["Page", "accounts", "api_keys", "audit_logs", "token_status"]

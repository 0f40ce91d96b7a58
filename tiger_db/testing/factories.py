"""One factory per entity: valid values, and the values that a test is about on top.

Each factory calls the CRUD function of the entity, so it also records audit events.
"""

import base64
import itertools
import os
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text

from tiger_db import crud
from tiger_db.crud.api_key_codes import compute_code, signed_values
from tiger_db.crud.api_keys.hashing import peppers_of
from tiger_db.database import AsyncSession
from tiger_db.models import (
    APIKey,
    APIKeyScope,
    AuditAction,
    AuditLog,
    RefreshTrigger,
    TigerAccount,
    TokenStatus,
)

_TOKEN_LIFETIME = timedelta(days=30)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_numbers = itertools.count(51230321)


def account_number() -> str:
    """Return the number of an account that no other factory of this process returns."""
    return str(next(_numbers))


def access_token(
    generated_at: datetime | None = None, lifetime: timedelta = _TOKEN_LIFETIME
) -> str:
    """Return a new access token in Tiger's format, by default one that is generated now."""
    start = datetime.now(UTC) if generated_at is None else generated_at
    stamps = [(at - _EPOCH) // timedelta(milliseconds=1) for at in (start, start + lifetime)]
    return base64.b64encode(f"{stamps[0]},{stamps[1]}".encode() + os.urandom(16)).decode()


def new_account(**fields: object) -> TigerAccount:
    """Return an account that is not stored."""
    values: dict[str, Any] = {
        "account_name": "Main",
        "account_number": account_number(),
        "tiger_id": "20150001",
        "private_key": "test_key",
    }
    return TigerAccount(**values | fields)


async def account(session: AsyncSession, **fields: object) -> TigerAccount:
    """Store an account."""
    return await crud.accounts.create(session, new_account(**fields))


async def api_key(session: AsyncSession, **arguments: object) -> tuple[APIKey, str]:
    """Store an API key, by default with the scope `mcp:read`. Return the key and the raw key.

    `arguments` are those of `crud.api_keys.create_api_key`, but `expires_at` can be in the past.
    """
    given: dict[str, Any] = {"name": "assistant", "scopes": [APIKeyScope.MCP_READ]} | arguments
    expires_at = given.get("expires_at")
    if expires_at is None or expires_at.tzinfo is None or expires_at > datetime.now(UTC):
        return await crud.api_keys.create_api_key(session, **given)
    # `create_api_key` refuses an expiry in the past.
    key, raw_key = await crud.api_keys.create_api_key(session, **{**given, "expires_at": None})
    mac = compute_code(peppers_of(session.info), {**signed_values(key), "expires_at": expires_at})
    expire = text("UPDATE api_keys SET expires_at = :expires_at, mac = :mac WHERE id = :id")
    await session.execute(expire, {"expires_at": expires_at, "mac": mac, "id": key.id})
    await session.refresh(key)
    return key, raw_key


def new_event(**fields: object) -> AuditLog:
    """Return an audit event that is not stored, by default with the action `dashboard:login`."""
    values: dict[str, Any] = {"action": AuditAction.DASHBOARD_LOGIN}
    return AuditLog(**values | fields)


async def event(session: AsyncSession, **arguments: object) -> AuditLog:
    """Store an audit event. `arguments` are those of `crud.audit_logs.log_event`."""
    given: dict[str, Any] = {"action": AuditAction.DASHBOARD_LOGIN}
    return await crud.audit_logs.log_event(session, **given | arguments)


async def account_with_token(session: AsyncSession, **fields: object) -> TigerAccount:
    """Store an account whose token expires in ten minutes, so that its refresh is due."""
    soon = datetime.now(UTC) + timedelta(minutes=10)
    values: dict[str, Any] = {"access_token": "token-1", "token_expires_at": soon}
    made = await account(session, **values | fields)
    if made.token_refresh_at is not None and made.token_expires_at is not None:
        # The refresh of an older token is due an hour before its expiry.
        made.token_refresh_at = made.token_expires_at - timedelta(hours=1)
        await session.flush()
    return made


async def refresh(
    session: AsyncSession, of: TigerAccount | None = None, **arguments: object
) -> TokenStatus:
    """Store an open refresh that is due, by default of a new account with a token.

    `arguments` are those of `crud.token_status.create_refresh_operation`.
    """
    of = of or await account_with_token(session)
    given: dict[str, Any] = {"tiger_account_id": of.id, "trigger": RefreshTrigger.MANUAL}
    return await crud.token_status.create_refresh_operation(session, **given | arguments)

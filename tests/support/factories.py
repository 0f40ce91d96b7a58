"""One small factory per entity: valid defaults, and what the test is about on top."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import text

from tiger_db import (
    APIKey,
    APIKeyScope,
    AuditAction,
    AuditLog,
    RefreshTrigger,
    TigerAccount,
    TokenStatus,
    crud,
)
from tiger_db.database import AsyncSession
from tiger_db.encryption import Secret

_numbers = itertools.count(51230321)


def plain(secret: Secret | None) -> str:
    """The text of a secret that must be there."""
    assert secret is not None
    return secret.get_secret_value()


def account_number() -> str:
    """The number of an account that no other test has."""
    return str(next(_numbers))


def new_account(**overrides: Any) -> TigerAccount:
    return TigerAccount(
        **{
            "account_name": "Main",
            "account_number": account_number(),
            "tiger_id": "20150001",
            "private_key": "test_key",
        }
        | overrides
    )


async def account(session: AsyncSession, **overrides: Any) -> TigerAccount:
    return await crud.accounts.create(session, new_account(**overrides))


async def api_key(session: AsyncSession, **overrides: Any) -> tuple[APIKey, str]:
    arguments = {"name": "assistant", "scopes": [APIKeyScope.MCP_READ]} | overrides
    expires_at = arguments.get("expires_at")
    if expires_at is None or expires_at.tzinfo is None or expires_at > datetime.now(UTC):
        return await crud.api_keys.create_api_key(session, **arguments)
    # `create_api_key` refuses an expiry in the past.
    key, raw_key = await crud.api_keys.create_api_key(session, **{**arguments, "expires_at": None})
    expire = text("UPDATE api_keys SET expires_at = :expires_at WHERE id = :id")
    await session.execute(expire, {"expires_at": expires_at, "id": key.id})
    await session.refresh(key)
    return key, raw_key


async def account_with_token(session: AsyncSession, **overrides: Any) -> TigerAccount:
    """An account whose token expires in ten minutes, so that it is due.

    Its refresh is due an hour before the expiry, as that of an older token is.
    """
    soon = datetime.now(UTC) + timedelta(minutes=10)
    made = await account(
        session, **{"access_token": "token-1", "token_expires_at": soon} | overrides
    )
    if made.token_refresh_at is not None and made.token_expires_at is not None:
        made.token_refresh_at = made.token_expires_at - timedelta(hours=1)
        await session.flush()
    return made


async def refresh(
    session: AsyncSession, of: TigerAccount | None = None, **overrides: Any
) -> TokenStatus:
    """An open refresh, of a new account if none is given."""
    of = of or await account_with_token(session)
    arguments: dict[str, Any] = {"tiger_account_id": of.id, "trigger": RefreshTrigger.MANUAL}
    arguments |= overrides
    return await crud.token_status.create_refresh_operation(session, **arguments)


async def claim(session: AsyncSession, **overrides: Any) -> TokenStatus:
    """A claim on a new refresh, if no other is due."""
    await refresh(session, **overrides)
    (claimed,) = await crud.token_status.claim_due(session, worker="worker-1")
    return claimed


async def events(session: AsyncSession) -> list[AuditLog]:
    """The audit trail, oldest first."""
    return (await crud.audit_logs.get_recent_events(session, limit=1000)).items[::-1]


def new_event(**overrides: Any) -> AuditLog:
    return AuditLog(**{"action": AuditAction.DASHBOARD_LOGIN} | overrides)


async def everything(session: AsyncSession) -> str:
    """All rows of all tables, as text; bytes are hexadecimal."""
    tables = await session.scalars(
        text("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename")
    )
    rows = [
        await session.scalars(text(f'SELECT t::text FROM "{table}" t ORDER BY 1'))
        for table in tables
    ]
    return "\n".join(row for table in rows for row in table)

"""The factories of `tiger_db.testing`, and what only these tests need."""

from sqlalchemy import text

from tiger_db import AuditLog, TigerAccount, TokenStatus, crud
from tiger_db.database import AsyncSession
from tiger_db.encryption import Secret
from tiger_db.testing.factories import (
    account,
    account_number,
    account_with_token,
    api_key,
    new_account,
    new_event,
    refresh,
)

__all__ = [
    "account", "account_number", "account_with_token", "api_key", "claim", "events", "everything",
    "new_account", "new_event", "plain", "refresh",
]  # fmt: skip


def plain(secret: Secret | None) -> str:
    """The text of a secret that must be there."""
    assert secret is not None
    return secret.get_secret_value()


async def claim(
    session: AsyncSession, of: TigerAccount | None = None, **overrides: object
) -> TokenStatus:
    """A claim on a new refresh, if no other is due."""
    await refresh(session, of, **overrides)
    (claimed,) = await crud.token_status.claim_due(session, worker="worker-1")
    return claimed


async def events(session: AsyncSession) -> list[AuditLog]:
    """The audit trail, oldest first."""
    return (await crud.audit_logs.get_recent_events(session, limit=1000)).items[::-1]


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

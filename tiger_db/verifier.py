"""Checks API keys for a server that has no session at hand."""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType
from typing import Self
from uuid import UUID

from tiger_db.crud import api_keys
from tiger_db.database import Database
from tiger_db.errors import AccessDenied
from tiger_db.models import APIKey, APIKeyScope


class KeyVerifier:
    """Decides on API keys, each in a transaction of its own: nothing it says is ever stale."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def __aenter__(self) -> Self:
        await self.database.check()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the database open: it belongs to the caller."""

    async def authorize(
        self,
        raw_key: str,
        *,
        scopes: Iterable[APIKeyScope] = (),
        account_id: UUID | None = None,
        ip_address: str | IPv4Address | IPv6Address | None = None,
        user_agent: str | None = None,
    ) -> APIKey:
        """As `crud.api_keys.authorize_api_key`, and the use is counted when this returns."""
        async with self.database.session() as session:
            return await api_keys.authorize_api_key(
                session,
                raw_key,
                scopes=scopes,
                account_id=account_id,
                ip_address=ip_address,
                user_agent=user_agent,
            )

    async def verify(
        self,
        raw_key: str,
        *,
        ip_address: str | IPv4Address | IPv6Address | None = None,
        user_agent: str | None = None,
    ) -> APIKey | None:
        """As `crud.api_keys.verify_api_key`, and the use is counted when this returns."""
        try:
            return await self.authorize(raw_key, ip_address=ip_address, user_agent=user_agent)
        except AccessDenied:
            return None

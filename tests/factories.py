"""One small factory per entity: valid defaults, and what the test is about on top."""

import itertools
from typing import Any

from tiger_db import APIKey, APIKeyScope, TigerAccount, crud
from tiger_db.database import AsyncSession

_numbers = itertools.count(51230321)


def new_account(**overrides: Any) -> TigerAccount:
    return TigerAccount(
        **{
            "account_name": "Main",
            "account_number": str(next(_numbers)),
            "tiger_id": "20150001",
            "private_key": "test_key",
        }
        | overrides
    )


async def account(session: AsyncSession, **overrides: Any) -> TigerAccount:
    return await crud.accounts.create(session, new_account(**overrides))


async def api_key(session: AsyncSession, **overrides: Any) -> tuple[APIKey, str]:
    arguments = {"name": "assistant", "scopes": [APIKeyScope.MCP_READ]} | overrides
    return await crud.api_keys.create_api_key(session, **arguments)

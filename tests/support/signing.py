"""Authentication codes of API keys that a test has changed with plain SQL."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select, text

from tiger_db import APIKey
from tiger_db.crud.api_key_codes import compute_code, signed_values
from tiger_db.crud.api_keys.hashing import peppers_of
from tiger_db.database import AsyncSession

FRESH = {"populate_existing": True}


async def sign_rows(session: AsyncSession, info: Mapping[Any, object] | None = None) -> None:
    """Give all API keys the codes of their rows, as if tiger_db had written the rows."""
    peppers = peppers_of(info or session.info)
    for key in await session.scalars(select(APIKey), execution_options=FRESH):
        await session.execute(
            text("UPDATE api_keys SET mac = :code WHERE id = :id"),
            {"id": key.id, "code": compute_code(peppers, signed_values(key))},
        )
        await session.refresh(key, ["mac", "updated_at"])

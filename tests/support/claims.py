"""Functions that use a claim."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from tiger_db import (
    TokenStatus,
)
from tiger_db.crud import token_status
from tiger_db.database import AsyncSession

LEASE = timedelta(microseconds=1)  # expires at once
Use = Callable[[AsyncSession, TokenStatus], Awaitable[object]]
USES: dict[str, Use] = {
    "heartbeat": token_status.heartbeat,
    "complete": lambda s, c: token_status.complete(s, c, access_token="zombie"),
    "fail": lambda s, c: token_status.fail(s, c, message="zombie"),
    "fail for good": lambda s, c: token_status.fail(s, c, message="z", credentials_refused=True),
    "give back": token_status.give_back,
}


async def claim_due(session: AsyncSession, **arguments: Any) -> list[TokenStatus]:
    return await token_status.claim_due(session, **{"worker": "worker-1"} | arguments)

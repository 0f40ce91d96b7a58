"""Audit events for tests of the command line."""

from typing import Any

from tests.support import factories
from tests.support.sql import write
from tiger_db import Settings, crud
from tiger_db.database import AsyncSession


def log(settings: Settings, *events: dict[str, Any]) -> None:
    """Store audit events with these fields."""

    async def run(session: AsyncSession) -> None:
        await crud.audit_logs.log_events(session, [factories.new_event(**e) for e in events])

    write(settings, run)

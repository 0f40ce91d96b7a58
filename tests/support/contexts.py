"""Other session contexts than a Database hands over."""

from collections.abc import Mapping
from typing import Any

from tiger_db.crud.common import SessionContext, context_of
from tiger_db.database import AsyncSession
from tiger_db.models.secrets import CONTEXT


def changed_context(info: Mapping[Any, object], **changes: Any) -> dict[str, SessionContext]:
    """Return the `info` of a session or a Database with changes to its context."""
    return {CONTEXT: context_of(info)._replace(**changes)}


def change_context(session: AsyncSession, **changes: Any) -> None:
    """Change the context of a session, such as the limit `suspend_after`."""
    session.info.update(changed_context(session.info, **changes))


def context_without_out_of_band(info: Mapping[Any, object]) -> dict[str, SessionContext]:
    """Return an `info` whose sessions write events and counts in their own transaction."""
    return changed_context(info, out_of_band=None, count_use=None)

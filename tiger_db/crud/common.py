"""Helpers of the CRUD modules: the session context, pages, row look-ups, typed errors."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal, TypeVar
from uuid import UUID

from sqlalchemy import Row, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql.selectable import TypedReturnsRows
from sqlmodel import col

from tiger_db.encryption import KeyProvider
from tiger_db.errors import (
    ConfigurationError,
    InvalidState,
    InvalidValue,
    NotFound,
)
from tiger_db.models import Entity
from tiger_db.models.base import CONTEXT
from tiger_db.out_of_band import OutOfBandWriter
from tiger_db.peppers import Peppers
from tiger_db.sqlstates import classify

# What a statement returns is what the rows are now, whatever the session remembers of them.
FRESH = {"populate_existing": True, "synchronize_session": False}
E_ = TypeVar("E_", bound=Entity)


async def fetch_one(session: AsyncSession, statement: TypedReturnsRows[E_]) -> E_ | None:
    """The row that a statement finds or changes, as it is now; None if there is none."""
    with typed_errors():
        row: E_ | None = await session.scalar(statement, execution_options=FRESH)
    return row


async def fetch_all(session: AsyncSession, statement: TypedReturnsRows[E_]) -> list[E_]:
    """The rows that a statement finds or changes, as they are now."""
    with typed_errors():
        return list(await session.scalars(statement, execution_options=FRESH))


async def execute_driver_sql(
    session: AsyncSession, statement: str, *values: object
) -> Sequence[Row[Any]]:
    """The rows of a statement in PostgreSQL's own words; what the session has pending goes first.

    For constant statements whose building would take longer than their work.
    """

    def run(sync_session: Session) -> Sequence[Row[Any]]:
        sync_session.flush()
        return sync_session.connection().exec_driver_sql(statement, values).all()

    return await session.run_sync(run)  # one switch of context, where each call would be one


async def get_or_raise(
    session: AsyncSession, entity: type[E_], row_id: UUID, *, lock: bool = False
) -> E_:
    """The row, as it is now; with `lock`, nobody else changes it before this transaction ends.

    Raises:
        NotFound: there is none.
    """
    statement = select(entity).where(col(entity.id) == row_id)
    if lock:
        statement = statement.with_for_update(key_share=True)
    row = await fetch_one(session, statement)
    if row is None:
        raise NotFound(f"there is no {entity.__name__} {row_id}")
    return row


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionContext:
    """What CRUD functions need of their Database: in the `info` of each session."""

    key_provider: KeyProvider | None
    peppers: Peppers | None
    key_environment: Literal["live", "test"]  # of new API keys
    allow_unpeppered_until: date | None  # the last day, UTC
    # Without these two, events and counts are written in the session's transaction.
    out_of_band: OutOfBandWriter | None
    count_use: Callable[[UUID, float], None] | None  # of a UsageCounter
    readonly: bool = False


def context_of(info: Mapping[Any, object]) -> SessionContext:
    """Return the SessionContext in the `info` of a session or a Database.

    Raises:
        ConfigurationError: there is none, so the session was not made for a Database.
    """
    context = info.get(CONTEXT)
    if not isinstance(context, SessionContext):
        raise ConfigurationError(
            f"the session's info has no {CONTEXT!r}: use Database.session(), or make the session"
            " with info=database.info"
        )
    return context


def refuse_readonly(
    session: AsyncSession, what: str = "decide: a standby may not know the latest"
) -> None:
    """Refuse a readonly session where PostgreSQL would not, as it does for locks and writes.

    Raises:
        InvalidState: the session is readonly.
    """
    if CONTEXT in session.info and context_of(session.info).readonly:
        raise InvalidState(f"a readonly session cannot {what}")


def require_aware(name: str, value: datetime | None) -> datetime | None:
    """Refuse a naive datetime: whose noon it means cannot be known.

    Raises:
        InvalidValue: naive.
    """
    if value is not None and value.tzinfo is None:
        raise InvalidValue(f"{name} must have a time zone")
    return value


def replace_unstorable(text: str) -> str:
    """A text from elsewhere, such as an error's message, with what cannot be stored replaced."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


@asynccontextmanager
async def savepoint(session: AsyncSession, *rows: Entity) -> AsyncIterator[None]:
    """A savepoint around changes. If a constraint refuses them, the transaction goes on without.

    The stored `rows` that were changed are then as they are in the database again.

    Raises:
        AlreadyExists, MissingReference, InvalidValue: by the violated constraint.
    """
    try:
        async with session.begin_nested():
            yield
    except DBAPIError as error:
        for row in rows:
            await session.refresh(row)
        raise classify(error) or error from None


@contextmanager
def typed_errors() -> Iterator[None]:
    """Name what the database refuses: a constraint's violation, or a value that it cannot take.

    Raises:
        AlreadyExists, MissingReference, InvalidValue: by SQLSTATE.
    """
    try:
        yield
    except DBAPIError as error:
        raise classify(error) or error from None

"""Helpers of the CRUD modules: the session context, row look-ups, savepoints, typed errors."""

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
    AlreadyExists,
    ConfigurationError,
    InvalidState,
    InvalidValue,
    MissingReference,
    NotFound,
)
from tiger_db.models import Entity
from tiger_db.models.secrets import CONTEXT
from tiger_db.out_of_band import OutOfBandWriter
from tiger_db.peppers import Peppers
from tiger_db.sqlstates import classify

# Execution options: returned rows overwrite the attributes of objects in the identity map.
FRESH = {"populate_existing": True, "synchronize_session": False}
E_ = TypeVar("E_", bound=Entity)


async def fetch_one(session: AsyncSession, statement: TypedReturnsRows[E_]) -> E_ | None:
    """Execute a statement; return its first row with current values, or None."""
    with typed_errors():
        row: E_ | None = await session.scalar(statement, execution_options=FRESH)
    return row


async def fetch_all(session: AsyncSession, statement: TypedReturnsRows[E_]) -> list[E_]:
    """Execute a statement; return its rows with current values."""
    with typed_errors():
        return list(await session.scalars(statement, execution_options=FRESH))


async def execute_driver_sql(
    session: AsyncSession, statement: str, *values: object
) -> Sequence[Row[Any]]:
    """Flush the session, execute constant SQL without SQLAlchemy's compiler, and return the rows.

    Raises:
        AlreadyExists, MissingReference, InvalidValue: as `typed_errors`.
    """

    def run(sync_session: Session) -> Sequence[Row[Any]]:
        sync_session.flush()
        return sync_session.connection().exec_driver_sql(statement, values).all()

    with typed_errors():
        return await session.run_sync(run)  # one greenlet switch for all three calls


async def get_or_raise(
    session: AsyncSession, entity: type[E_], row_id: UUID, *, lock: bool = False
) -> E_:
    """Return a row with current values; `lock` locks it until the transaction ends.

    Raises:
        NotFound: there is no such row.
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
    """The objects of a Database that CRUD functions use, in the `info` of each session."""

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


def refuse_readonly(session: AsyncSession) -> None:
    """Raise InvalidState if a session is readonly, where PostgreSQL would not refuse the work."""
    if CONTEXT in session.info and context_of(session.info).readonly:
        raise InvalidState("a readonly session cannot write, or decide by data that may be old")


def require_aware(name: str, value: datetime | None) -> datetime | None:
    """Return a datetime; raise InvalidValue if it has no time zone."""
    if value is not None and value.tzinfo is None:
        raise InvalidValue(f"{name} must have a time zone")
    return value


def replace_unstorable(text: str) -> str:
    """Replace the characters of a text that PostgreSQL cannot store: NUL and lone surrogates."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


@asynccontextmanager
async def savepoint(session: AsyncSession, *rows: Entity) -> AsyncIterator[None]:
    """Wrap changes in a savepoint: a violated constraint rolls back to it, not the transaction.

    After a rollback, the given changed `rows` are refreshed from the database.

    Raises:
        AlreadyExists, MissingReference, InvalidValue: as `typed_errors`.
    """
    try:
        async with session.begin_nested():
            yield
    except (DBAPIError, AlreadyExists, MissingReference, InvalidValue) as error:
        for row in rows:
            await session.refresh(row)
        raise classify(error) or error from None


@contextmanager
def typed_errors() -> Iterator[None]:
    """Convert errors of the database driver to those of tiger_db, by SQLSTATE.

    Raises:
        AlreadyExists, MissingReference: a constraint is violated.
        InvalidValue: a check is violated, or PostgreSQL cannot take a value.
    """
    try:
        yield
    except DBAPIError as error:
        raise classify(error) or error from None

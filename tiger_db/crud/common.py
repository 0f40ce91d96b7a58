"""The session context, and functions that several CRUD modules share."""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, class_mapper, selectinload
from sqlalchemy.sql.base import ExecutableOption
from sqlalchemy.sql.selectable import TypedReturnsRows
from sqlmodel import col

from tiger_db.actor import Actor
from tiger_db.decoding import Unreadable, report_unreadable
from tiger_db.driver_sql import fetch
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

# With the execution options FRESH, a fetched row overwrites the entity in the session's identity
# map.
_NOT_SYNCHRONIZED = {"synchronize_session": False}
FRESH = {"populate_existing": True, **_NOT_SYNCHRONIZED}
E_ = TypeVar("E_", bound=Entity)


def _fresh(session: AsyncSession) -> Mapping[str, bool]:
    """Return FRESH, or no options if the session holds no entity that a row could overwrite."""
    sync_session = session.sync_session
    if sync_session.identity_map or sync_session.new:
        return FRESH
    return _NOT_SYNCHRONIZED  # SQLAlchemy loads each row a quarter faster


async def fetch_one(session: AsyncSession, statement: TypedReturnsRows[E_]) -> E_ | None:
    """Execute a statement. Return the entity of the first row, or None if there is no row.

    If the session already holds the entity, the values of the row replace the entity's values.
    """
    with typed_errors():
        row: E_ | None = await session.scalar(statement, execution_options=_fresh(session))
    if row is not None:
        report_unreadable(row.__tablename__, row.__dict__)
    return row


async def fetch_all(session: AsyncSession, statement: TypedReturnsRows[E_]) -> list[E_]:
    """Execute a statement. Return the entities of all rows.

    If the session already holds an entity, the values of the row replace the entity's values.
    """
    with typed_errors():
        rows = list(await session.scalars(statement, execution_options=_fresh(session)))
    # A listener for loaded rows would make each row slower to load, by a tenth.
    if Unreadable.exists:
        for row in rows:
            report_unreadable(row.__tablename__, row.__dict__)
    return rows


async def fetch_rows(session: AsyncSession, query: str, *values: object) -> Sequence[Any]:
    """Flush the session, execute constant SQL on the driver's cursor, and return the rows.

    The rows are plain sequences: their columns have no names.

    Raises:
        AlreadyExists, MissingReference, InvalidValue: the SQL statement violates a constraint.
    """

    def run(sync_session: Session) -> Sequence[Any]:
        sync_session.flush()
        return fetch(sync_session.connection(), query, values)

    with typed_errors():
        # One call of run_sync() for all three steps of run() is faster than one call per step.
        return await session.run_sync(run)


async def get_or_raise(
    session: AsyncSession, entity: type[E_], row_id: UUID, *, lock: bool = False
) -> E_:
    """Return the entity with the given id, read from the database. If `lock` is true, lock the row.

    Raises:
        NotFound: no row of the entity has the id `row_id`.
    """
    statement = select(entity).where(col(entity.id) == row_id)
    if lock:
        statement = statement.with_for_update(key_share=True)
    row = await fetch_one(session, statement)
    if row is None:
        raise NotFound(f"there is no {entity.__name__} {row_id}")
    return row


def load_options(entity: type[Entity], names: Sequence[str]) -> list[ExecutableOption]:
    """Return the options that load relationships of an entity, with one query per relationship.

    Raises:
        InvalidValue: an item of `names` is not the name of a relationship of the entity.
    """
    relationships = class_mapper(entity).relationships  # an application can add relationships
    if unknown := [name for name in names if name not in relationships]:
        raise InvalidValue(f"{entity.__name__} has no relationship {', '.join(map(repr, unknown))}")
    return [selectinload(getattr(entity, name)) for name in names]


class SessionContext(NamedTuple):
    """Helpers and settings of a Database, stored in the `info` of each session of the Database.

    `key_environment` is the environment of new API keys. Hashes without a pepper are accepted until
    the end of the day `allow_unpeppered_until` (UTC), and API keys without an authentication code
    until the end of the day `allow_unsigned_until` (UTC). `count_use` is the method
    `UsageCounter.count`. `actor` is the argument `actor` of `Database.session`. If `out_of_band` is
    None, audit events are written in the session's transaction. If `count_use` is None, uses of API
    keys are counted in the session's transaction. `failing_after`, `failing_for` and
    `suspend_after` are the settings `ACCOUNT_FAILING_AFTER`, `ACCOUNT_FAILING_FOR` and
    `ACCOUNT_SUSPEND_AFTER`.
    """

    key_provider: KeyProvider | None
    peppers: Peppers | None
    key_environment: Literal["live", "test"]
    allow_unpeppered_until: date | None
    allow_unsigned_until: date | None
    out_of_band: OutOfBandWriter | None
    count_use: Callable[[UUID, float], None] | None
    failing_after: int
    failing_for: timedelta
    suspend_after: int
    readonly: bool = False
    actor: Actor | None = None


def context_of(info: Mapping[Any, object]) -> SessionContext:
    """Return the SessionContext in the `info` of a session or a Database.

    Raises:
        ConfigurationError: `info` has no SessionContext.
    """
    context = info.get(CONTEXT)
    if not isinstance(context, SessionContext):
        raise ConfigurationError(
            f"session.info has no {CONTEXT!r}: use Database.session(), or create the session with"
            " info=database.info"
        )
    return context


def actor_of(info: Mapping[Any, object]) -> Actor | None:
    """Return the actor of the session, or None if the session has no actor."""
    return context_of(info).actor if CONTEXT in info else None


def refuse_readonly(session: AsyncSession) -> None:
    """Raise InvalidState if the session is readonly. A readonly session can read stale data."""
    if CONTEXT in session.info and context_of(session.info).readonly:
        raise InvalidState(
            "a readonly session cannot write, and may read stale data: use Database.session()"
        )


def has_passed(until: date | None, now: float) -> bool:
    """Return whether the day `until` (UTC) is None or over. `now` is in seconds since 1970."""
    return until is None or datetime.fromtimestamp(now, UTC).date() > until


def require_aware(name: str, value: datetime | None) -> datetime | None:
    """Return a datetime unchanged, or raise InvalidValue if the datetime has no time zone."""
    if value is not None and value.tzinfo is None:
        raise InvalidValue(f"{name} must have a time zone")
    return value


def replace_unstorable(text: str) -> str:
    """Replace NUL and lone surrogates, because PostgreSQL cannot store these characters."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def error_text(error: BaseException) -> str:
    """Return the message of an error, or the name of the error's type if `__str__` fails."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # an application's `__str__` may raise any exception
        return type(error).__name__


@asynccontextmanager
async def savepoint(session: AsyncSession, *rows: Entity) -> AsyncIterator[None]:
    """Run a code block in a savepoint.

    If an SQL statement in the code block violates a constraint, only the changes of the code block
    are rolled back. After a rollback to the savepoint, the entities in `rows` are refreshed from
    the database.

    Raises:
        AlreadyExists, MissingReference, InvalidValue: an SQL statement in the code block violates a
            constraint.
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
    """Convert errors of the database driver to errors of tiger_db, by SQLSTATE.

    Raises:
        AlreadyExists: a unique constraint is violated.
        MissingReference: a foreign key constraint is violated.
        InvalidValue: another constraint is violated, or PostgreSQL cannot store a value.
    """
    try:
        yield
    except DBAPIError as error:
        raise classify(error) or error from None

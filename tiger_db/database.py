"""Engines, sessions and their health."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

import asyncpg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event
from sqlalchemy.engine import AdaptedConnection, ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.ext.asyncio import AsyncSession as SQLAlchemySession
from sqlalchemy.pool import NullPool
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from tiger_db.encryption import KeyProvider, KeyRing, generate_key
from tiger_db.errors import ConfigurationError, DatabaseUnavailable, EncryptionError
from tiger_db.migrations import schema_state
from tiger_db.peppers import Peppers
from tiger_db.settings import ConnectArgs, Settings
from tiger_db.signing import generate_signing_key, parse_signing_key
from tiger_db.statements import connection_class, watch
from tiger_db.write_behind import LOST, WriteBehind

T = TypeVar("T")
_APART = 4  # connections at most, beside the pool's, for what is written apart from sessions
# SQLSTATEs, whole or by class, of a server that is gone, going, full or not letting us in.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_UNAVAILABLE = ("08", "28", "3D000", "53300", "57P0")


async def connect_args(settings: Settings) -> ConnectArgs:
    """How to reach the database with `asyncpg.connect`; the embedded server is started if need be.

    Raises:
        EmbeddedError: the embedded server cannot be started.
    """
    if settings.embedded:
        from tiger_db import embedded  # noqa: PLC0415  # needs POSIX and an extra

        server = await asyncio.to_thread(embedded.start, settings)
        return server.connect_args(settings)
    return settings.connect_args()


async def connect(
    settings: Settings, *, database: str | None = None
) -> "asyncpg.Connection[asyncpg.Record]":
    """One plain asyncpg connection, to another database of the server if one is named.

    Raises:
        DatabaseUnavailable: unreachable, or it does not let us in; says where, never a credential.
    """
    arguments = await connect_args(settings)
    if database is not None:
        arguments["database"] = database
    with _unavailable(settings):
        return await asyncpg.connect(
            **arguments,
            connection_class=connection_class(
                slow=settings.db_slow_query, comments=settings.db_sql_comments
            ),
        )


@contextmanager
def _unavailable(settings: Settings) -> Iterator[None]:
    try:
        yield
    except asyncpg.InvalidCatalogNameError:
        raise DatabaseUnavailable(f"{settings.place} does not exist: run `tiger-db init`") from None
    except (*LOST, TimeoutError, ValueError, asyncpg.PostgresError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DatabaseUnavailable(f"cannot connect to {settings.place}: {reason}") from None


def _engine(settings: Settings, **options: Any) -> AsyncEngine:  # noqa: ANN401  # the pool's
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda **_: connect(settings),
        echo=settings.db_debug,
        hide_parameters=True,
        **options,
    )

    @event.listens_for(engine.sync_engine, "handle_error")
    def _typed(context: ExceptionContext) -> None:
        error = context.original_exception
        if not isinstance(error, Exception):
            return  # a cancelled task, say: the connection is given up, but not for lost
        state = getattr(error, "sqlstate", None) or ""
        lost = isinstance(error, OSError) or isinstance(
            error.__cause__, asyncpg.InternalClientError
        )
        if lost or context.is_disconnect or state.startswith(_UNAVAILABLE):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DatabaseUnavailable(f"lost {settings.place}: {reason}") from None

    @event.listens_for(engine.sync_engine, "checkout")
    def _alive(connection: AdaptedConnection, _record: object, _proxy: object) -> None:
        # asyncpg has seen the end of a connection long before a ping would have: no round trip.
        if connection.driver_connection.is_closed():
            raise DisconnectionError("closed by the server")

    watch(engine.sync_engine, slow=settings.db_slow_query, comments=settings.db_sql_comments)
    return engine


@asynccontextmanager
async def migration_engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """An engine for migrations: connections of its own, no time limit on statements."""
    patient = settings.model_copy(update={"db_query_timeout": 0, "db_slow_query": 0})
    engine = _engine(patient, poolclass=NullPool)
    try:
        yield engine
    finally:
        await engine.dispose()


def kept_key_ring(settings: Settings) -> KeyRing:
    """The encryption keys that the embedded server keeps beside its data, made if missing.

    Raises:
        ConfigurationError: the file was damaged; it says which.
    """
    return _kept(settings, "encryption_keys", generate_key, KeyRing.parse)


def kept_peppers(settings: Settings) -> Peppers:
    """The peppers that the embedded server keeps beside its data, made if missing.

    Raises:
        ConfigurationError: the file was damaged; it says which.
    """
    return _kept(settings, "api_key_peppers", generate_key, Peppers.parse)


def kept_signing_key(settings: Settings) -> Ed25519PrivateKey:
    """The audit trail's key that the embedded server keeps beside its data, made if missing.

    Raises:
        ConfigurationError: the file was damaged; it says which.
    """
    return _kept(settings, "audit_signing_key", generate_signing_key, parse_signing_key)


def _kept(
    settings: Settings, name: str, generate: Callable[[], str], parse: Callable[[str], T]
) -> T:
    from tiger_db import embedded  # noqa: PLC0415  # needs POSIX and an extra

    try:
        return parse(embedded.kept_secret(settings, name, generate))
    except EncryptionError as error:
        path = embedded.folder(settings) / name
        raise ConfigurationError(f"{path}: {error}: restore it") from None


class AsyncSession(SQLModelSession):
    """SQLModel's session, with SQLAlchemy's `execute`, which SQLModel's warns of at run time."""

    execute = SQLAlchemySession.execute


class Database:
    """The connections of one process to one database, in one event loop.

    `key_provider` encrypts in place of `ENCRYPTION_KEYS`: a KMS, say. Beside its pool it has up to
    four connections more, for what is written apart from sessions: see `write_behind`.

    Raises:
        ConfigurationError: `ENCRYPTION_KEYS` or `API_KEY_PEPPERS` is malformed, or missing in
            production.
    """

    def __init__(
        self, settings: Settings | None = None, *, key_provider: KeyProvider | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.engine = _engine(
            self.settings,
            pool_size=self.settings.db_pool_size,
            max_overflow=self.settings.db_max_overflow,
            pool_timeout=self.settings.db_pool_timeout,
            pool_recycle=self.settings.db_pool_recycle,
        )
        self.write_behind = WriteBehind(
            _engine(
                self.settings,
                pool_size=min(_APART, self.settings.db_pool_size),
                max_overflow=0,
                pool_timeout=self.settings.db_pool_timeout,
                pool_recycle=self.settings.db_pool_recycle,
            )
        )
        # What CRUD functions find in session.info.
        self.info: dict[str, object] = {
            "key_provider": key_provider or self.settings.key_ring(),
            "peppers": self.settings.peppers(),
            "key_environment": "live" if self.settings.production else "test",
            "write_behind": self.write_behind,
        }
        self.sessions = async_sessionmaker(
            self.engine, class_=AsyncSession, expire_on_commit=False, info=self.info
        )
        self._checked = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Write what is left to write, and close every connection."""
        await self.write_behind.close()
        await self.engine.dispose()

    async def check(self) -> None:
        """Make sure that the database can be used; once it could, this costs nothing.

        Raises:
            DatabaseUnavailable: it cannot be reached.
            SchemaMismatch: its schema is missing, or older or newer than this code.
        """
        if self._checked:
            return
        if self.info["key_provider"] is None and self.settings.embedded:
            self.info["key_provider"] = await asyncio.to_thread(kept_key_ring, self.settings)
        if self.info["peppers"] is None and self.settings.embedded:
            self.info["peppers"] = await asyncio.to_thread(kept_peppers, self.settings)
        async with self.engine.connect() as connection:
            (await schema_state(connection)).check()
        self._checked = True

    async def signing_key(self) -> Ed25519PrivateKey | None:
        """The key that signs the seals of the audit trail; None: there is none.

        Raises:
            ConfigurationError: `AUDIT_SIGNING_KEY` is malformed or unreadable.
        """
        key = self.settings.signing_key()
        if key is None and self.settings.embedded:
            key = await asyncio.to_thread(kept_signing_key, self.settings)
        return key

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """A session that commits on success and rolls back on an exception.

        Raises:
            DatabaseUnavailable: unreachable or lost; nothing of the transaction was saved, unless
                the connection was lost during the commit itself.
            SchemaMismatch: see `check`.
        """
        try:
            await self.check()
            async with self.sessions() as session:
                yield session
                await session.commit()
        except PoolTimeoutError:
            raise DatabaseUnavailable(
                f"all connections to {self.settings.place} were in use for"
                f" {self.settings.db_pool_timeout:g} s (DB_POOL_SIZE, DB_MAX_OVERFLOW)"
            ) from None


_defaults: WeakKeyDictionary[
    asyncio.AbstractEventLoop, tuple[Database, AsyncGenerator[Database, None]]
] = WeakKeyDictionary()


async def _default_database() -> AsyncGenerator[Database, None]:
    async with Database() as database:
        try:
            yield database
        finally:
            _defaults.pop(asyncio.get_running_loop(), None)  # they refer to each other


@asynccontextmanager
async def get_session() -> AsyncIterator[AsyncSession]:
    """A session of the process's default Database, which follows the environment's settings.

    Raises:
        ConfigurationError, DatabaseUnavailable, SchemaMismatch: see `Database`.
    """
    loop = asyncio.get_running_loop()
    if loop not in _defaults:
        # A suspended generator, because the loop closes those before it ends: no leaked pool.
        generator = _default_database()
        _defaults[loop] = (await anext(generator), generator)
    async with _defaults[loop][0].session() as session:
        yield session

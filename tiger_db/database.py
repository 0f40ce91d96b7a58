"""Engines, sessions and their health."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from weakref import WeakKeyDictionary

import asyncpg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event
from sqlalchemy.engine import AdaptedConnection, Connection, ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.ext.asyncio import AsyncSession as SQLAlchemySession
from sqlalchemy.pool import NullPool
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from tiger_db import tls
from tiger_db.crud.common import SessionContext
from tiger_db.encryption import KeyProvider
from tiger_db.errors import (
    Conflict,
    DatabaseUnavailable,
    InvalidState,
    OutcomeUnknown,
    QueryTimeout,
)
from tiger_db.keys_in_force import (
    API_KEY_PEPPERS,
    AUDIT_SIGNING_KEY,
    ENCRYPTION_KEYS,
    configured,
    in_force,
)
from tiger_db.migrations import SCHEMA_OPTION, schema_state
from tiger_db.models.base import CONTEXT
from tiger_db.places import Address
from tiger_db.settings import ConnectArgs, Settings
from tiger_db.sqlstates import LOST, READ_ONLY, error_type
from tiger_db.standbys import Standbys
from tiger_db.statements import connection_class, watch
from tiger_db.write_behind import WriteBehind

T = TypeVar("T")
Isolation = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
_APART = 4  # connections at most, beside the pool's, for what is written apart from sessions
_ABSENT = (*LOST, TimeoutError, asyncpg.CannotConnectNowError)  # another host may do
_REFUSED = (*_ABSENT, ValueError, asyncpg.PostgresError)
# Seconds before a transaction is run again, doubled each time: at most, and half of it at least.
_WAIT, _LONG_WAIT = 0.05, 1.0


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
    settings: Settings,
    *,
    database: str | None = None,
    replica: Address | None = None,
) -> "asyncpg.Connection[asyncpg.Record]":
    """One plain asyncpg connection, to another database of the server if one is named.

    Of several hosts, the first that takes writes; each has the whole of `DB_CONNECT_TIMEOUT`. Or to
    the `replica`, as long as it is a standby.

    Raises:
        ConfigurationError: a file of `DB_SSL_*` is missing or bad.
        DatabaseUnavailable: unreachable, or it does not let us in; says where, never a credential.
    """
    arguments = await connect_args(settings) if replica is None else settings.connect_args(replica)
    if database is not None:
        arguments["database"] = database
    with _unavailable(settings):
        arguments["connection_class"] = connection_class(
            slow=settings.db_slow_query, comments=settings.db_sql_comments
        )
        hosts, ports = arguments.get("host"), arguments.get("port")
        if not isinstance(hosts, list) or not isinstance(ports, list):
            return await tls.connect(settings, arguments)
        # asyncpg would have them share the time: a host that is silent would keep it from the next.
        reasons = []
        for host, port in zip(hosts, ports, strict=True):
            try:
                return await tls.connect(settings, {**arguments, "host": host, "port": port})
            except _ABSENT as error:
                reasons.append(f"{Address(host, port)}: {_reason(error)}")
        raise ConnectionError("; ".join(reasons))


async def connect_directly(
    settings: Settings, *, database: str | None = None
) -> "asyncpg.Connection[asyncpg.Record]":
    """As `connect`, past a pooler: for what outlasts a transaction, as LISTEN does.

    Raises:
        ConfigurationError: there is a pooler and no way past it is given, or see `connect`.
        DatabaseUnavailable: see `connect`.
    """
    return await connect(settings.directly(), database=database)


@contextmanager
def _unavailable(settings: Settings) -> Iterator[None]:
    try:
        yield
    except asyncpg.InvalidCatalogNameError:
        raise DatabaseUnavailable(f"{settings.place} does not exist: run `tiger-db init`") from None
    except _REFUSED as e:
        raise DatabaseUnavailable(f"cannot connect to {settings.place}: {_reason(e)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return "it takes no writes"
    return tls.reason_of(error)


def _engine(
    settings: Settings,
    *,
    replica: Address | None = None,
    **options: Any,  # noqa: ANN401  # the pool's
) -> AsyncEngine:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        connect_args={
            "async_creator_fn": lambda **_: connect(settings, replica=replica),
            # Behind a pooler, who knows which server session has prepared what.
            **({"prepared_statement_cache_size": 0} if settings.pooled else {}),
        },
        execution_options={SCHEMA_OPTION: settings.db_schema},
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
        kind = error_type(state)
        if kind is Conflict or kind is QueryTimeout:
            raise kind(_reason(error)) from None
        if state == READ_ONLY and _is_readonly(context.connection):
            raise InvalidState("a readonly session cannot write") from None
        lost = isinstance(error, OSError) or isinstance(
            error.__cause__, asyncpg.InternalClientError
        )
        if lost or context.is_disconnect or kind is DatabaseUnavailable:
            # Also what was a primary and takes no writes any more; the pool's others are no better.
            context.is_disconnect = True
            place = replica or settings.place
            reason = _reason(error)
            if isinstance(error, TimeoutError) and settings.pooled:  # ours, as behind a pooler
                reason = f"no answer in {settings.db_query_timeout:g} s (DB_QUERY_TIMEOUT)"
            raise DatabaseUnavailable(f"lost {place}: {reason}") from None

    @event.listens_for(engine.sync_engine, "checkout")
    def _alive(connection: AdaptedConnection, _record: object, _proxy: object) -> None:
        # asyncpg has seen the end of a connection long before a ping would have: no round trip.
        if connection.driver_connection.is_closed():
            raise DisconnectionError("closed by the server")

    watch(engine.sync_engine, slow=settings.db_slow_query, comments=settings.db_sql_comments)
    return engine


def _is_readonly(connection: Connection | None) -> bool:
    return bool(connection and connection.get_execution_options().get("postgresql_readonly"))


@asynccontextmanager
async def migration_engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """An engine for migrations: direct connections of its own, no time limit on statements.

    Raises:
        ConfigurationError: see `connect_directly`.
    """
    patient = {"db_query_timeout": 0, "db_idle_transaction_timeout": 0, "db_slow_query": 0}
    engine = _engine(settings.directly().model_copy(update=patient), poolclass=NullPool)
    try:
        yield engine
    finally:
        await engine.dispose()


class AsyncSession(SQLModelSession):
    """SQLModel's session, with SQLAlchemy's `execute`, which SQLModel's warns of at run time."""

    execute = SQLAlchemySession.execute

    async def commit(self) -> None:
        """Store what is pending, and commit.

        Raises:
            OutcomeUnknown: the connection was lost during the commit itself, or the synchronous
                standby did not confirm it in time.
            DatabaseUnavailable: it was lost before; nothing was saved.
            Conflict: other transactions were in the way; nothing was saved.
        """
        await self.flush()
        try:
            await super().commit()
        except DatabaseUnavailable as error:
            raise OutcomeUnknown(
                f"{error}, during the commit: whether it happened is unknown"
            ) from None


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
        pool: dict[str, Any] = {
            "pool_size": self.settings.db_pool_size,
            "max_overflow": self.settings.db_max_overflow,
            "pool_timeout": self.settings.db_pool_timeout,
            "pool_recycle": self.settings.db_pool_recycle,
        }
        self.engine = _engine(self.settings, **pool)
        # Sessions that wait for what is written apart may have all that a pooler has.
        apart = self.settings.directly() if self.settings.db_direct_host else self.settings
        self.write_behind = WriteBehind(
            _engine(
                apart,
                pool_size=min(_APART, self.settings.db_pool_size),
                max_overflow=0,
                pool_timeout=self.settings.db_pool_timeout,
                pool_recycle=self.settings.db_pool_recycle,
            )
        )
        self.standbys = Standbys(
            [_engine(self.settings, replica=replica, **pool) for replica in self.settings.replicas],
            self.write_behind,
        )
        context = SessionContext(
            key_provider=key_provider or configured(self.settings, ENCRYPTION_KEYS),
            peppers=configured(self.settings, API_KEY_PEPPERS),
            key_environment="live" if self.settings.production else "test",
            allow_unpeppered_until=self.settings.api_keys_allow_unpeppered_until,
            write_behind=self.write_behind,
        )
        self.info = {CONTEXT: context}  # of every session
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
        await self.standbys.close()
        await self.engine.dispose()

    async def check(self) -> None:
        """Make sure that the database can be used; once it could, this costs nothing.

        Raises:
            DatabaseUnavailable: it cannot be reached.
            SchemaMismatch: its schema is missing, or older or newer than this code, or sessions do
                not find the one of `DB_SCHEMA`, because a pooler dropped their search path.
        """
        if self._checked:
            return
        if self.settings.embedded:
            provider, peppers = self.info[CONTEXT].key_provider, self.info[CONTEXT].peppers
            provider = provider or await asyncio.to_thread(in_force, self.settings, ENCRYPTION_KEYS)
            peppers = peppers or await asyncio.to_thread(in_force, self.settings, API_KEY_PEPPERS)
            self.info[CONTEXT] = replace(self.info[CONTEXT], key_provider=provider, peppers=peppers)
        async with self.engine.connect() as connection:
            (await schema_state(connection)).check()
        self._checked = True

    async def signing_key(self) -> Ed25519PrivateKey | None:
        """Return the key that signs the seals of the audit trail, or None if there is none.

        Raises:
            ConfigurationError: `AUDIT_SIGNING_KEY` is malformed or unreadable.
        """
        return await asyncio.to_thread(in_force, self.settings, AUDIT_SIGNING_KEY)

    @asynccontextmanager
    async def session(
        self,
        *,
        readonly: bool = False,
        max_lag: timedelta = timedelta(seconds=5),
        isolation: Isolation | None = None,
    ) -> AsyncIterator[AsyncSession]:
        """A session that commits on success and rolls back on an exception.

        `readonly`: nothing can be written or decided in it, and one of `DB_REPLICA_HOSTS` answers
        that knows all that was committed `max_lag` before the session began, else the primary. It
        may not know what this process committed a moment ago. `isolation`: the server's default if
        none is given; "SERIALIZABLE" is beyond standbys.

        Raises:
            DatabaseUnavailable: unreachable or lost; nothing of the transaction was saved.
            OutcomeUnknown: lost during the commit itself: see `AsyncSession.commit`.
            Conflict: others were in the way (deadlock, serialization, lock_timeout); nothing was
                saved.
            QueryTimeout: a statement took longer than `DB_QUERY_TIMEOUT`; nothing was saved.
            InvalidState: something is to be written or decided in a readonly session.
            SchemaMismatch: see `check`.
        """
        options: dict[str, Any] = {"isolation_level": isolation} if isolation else {}
        if readonly:
            options["postgresql_readonly"] = True

        def on(engine: AsyncEngine) -> AsyncSession:
            bind = engine.execution_options(**options) if options else engine
            info = {CONTEXT: replace(self.info[CONTEXT], readonly=True)} if readonly else {}
            return self.sessions(bind=bind, info=info)

        try:
            await self.check()
            standby = None
            if readonly and isolation != "SERIALIZABLE":
                standby = await self.standbys.session(on, max_lag)
            async with standby or on(self.engine) as session:
                yield session
                await session.commit()
        except PoolTimeoutError:
            raise DatabaseUnavailable(
                f"all connections to {self.settings.place} were in use for"
                f" {self.settings.db_pool_timeout:g} s (DB_POOL_SIZE, DB_MAX_OVERFLOW)"
            ) from None

    async def transaction(
        self,
        work: Callable[[AsyncSession], Awaitable[T]],
        *,
        retries: int = 3,
        isolation: Isolation | None = None,
    ) -> T:
        """What `work` returns, whose session is committed then.

        When nothing was saved because others were in the way, or the server was lost, all of `work`
        is run again in a new session, `retries` times at most, after random and growing waits: at
        most 0.05, 0.1, 0.2 s, or 1, 2, 4 s for a server. So it makes its objects itself, and has no
        effect outside of the session.

        Raises:
            OutcomeUnknown: see `AsyncSession.commit`. Look whether it happened before you do it
                again.
            Conflict, DatabaseUnavailable: also the last time.
            QueryTimeout, SchemaMismatch: as `session`; this is not run again.
        """
        attempt = 0
        while True:
            try:
                async with self.session(isolation=isolation) as session:
                    return await work(session)
            except (Conflict, DatabaseUnavailable) as error:
                if isinstance(error, OutcomeUnknown) or attempt >= retries:
                    raise
                longest = (_WAIT if isinstance(error, Conflict) else _LONG_WAIT) * 2**attempt
            attempt += 1
            await asyncio.sleep(longest * random.uniform(0.5, 1))  # noqa: S311  # spreads load


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

"""Engines, sessions and their health."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from weakref import WeakKeyDictionary

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.ext.asyncio import AsyncSession as SQLAlchemySession
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from tiger_db.connections import create_engine
from tiger_db.connections.replicas import Replicas
from tiger_db.crud.api_keys.usage_counter import UsageCounter
from tiger_db.crud.common import SessionContext
from tiger_db.encryption import KeyProvider
from tiger_db.errors import (
    Conflict,
    DatabaseUnavailable,
    OutcomeUnknown,
)
from tiger_db.keys_in_force import (
    API_KEY_PEPPERS,
    AUDIT_SIGNING_KEY,
    ENCRYPTION_KEYS,
    configured,
    in_force,
)
from tiger_db.migrations import schema_state
from tiger_db.models.base import CONTEXT
from tiger_db.out_of_band import OutOfBandWriter
from tiger_db.settings import Settings

T = TypeVar("T")
Isolation = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
_OUT_OF_BAND_CONNECTIONS = 4  # at most, besides those of the pool
# Seconds before a transaction is run again, doubled each time: at most, and half of it at least.
_WAIT, _LONG_WAIT = 0.05, 1.0


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
    four connections more, for writes out of band: see `out_of_band`.

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
        self.engine = create_engine(self.settings, **pool)
        # Sessions that wait for an out-of-band write can hold all connections of a pooler.
        out_of_band = (
            self.settings.without_pooler() if self.settings.db_direct_host else self.settings
        )
        self.out_of_band = OutOfBandWriter(
            create_engine(
                out_of_band,
                pool_size=min(_OUT_OF_BAND_CONNECTIONS, self.settings.db_pool_size),
                max_overflow=0,
                pool_timeout=self.settings.db_pool_timeout,
                pool_recycle=self.settings.db_pool_recycle,
            )
        )
        self.usage_counter = UsageCounter(self.out_of_band.engine)
        self.replicas = Replicas(
            [
                create_engine(self.settings, replica=replica, **pool)
                for replica in self.settings.replicas
            ],
            self.out_of_band,
        )
        context = SessionContext(
            key_provider=key_provider or configured(self.settings, ENCRYPTION_KEYS),
            peppers=configured(self.settings, API_KEY_PEPPERS),
            key_environment="live" if self.settings.production else "test",
            allow_unpeppered_until=self.settings.api_keys_allow_unpeppered_until,
            out_of_band=self.out_of_band,
            count_use=self.usage_counter.count,
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
        await self.usage_counter.close()
        await self.out_of_band.close()
        await self.replicas.close()
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
                standby = await self.replicas.session(on, max_lag)
            async with standby or on(self.engine) as session:
                yield session
                await session.commit()
        except PoolTimeoutError:
            raise DatabaseUnavailable(
                f"all connections to {self.settings.location} were in use for"
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

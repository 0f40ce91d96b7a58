"""Databases, sessions and transactions."""

import asyncio
import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, Literal, Self, TypeVar, cast
from weakref import WeakKeyDictionary

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event, inspect, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.ext.asyncio import AsyncSession as SQLAlchemySession
from sqlalchemy.orm import Load, ORMExecuteState
from sqlalchemy.orm import Session as SyncSession
from sqlmodel import Session
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from tiger_db.actor import Actor
from tiger_db.connections import create_engine
from tiger_db.connections.pool import OwnedPool, run_to_completion, running_loop
from tiger_db.connections.replicas import Replicas
from tiger_db.crud.api_keys.usage_counter import UsageCounter
from tiger_db.crud.common import SessionContext
from tiger_db.encryption import KeyProvider
from tiger_db.errors import Conflict, DatabaseUnavailable, OutcomeUnknown
from tiger_db.keys_in_force import (
    API_KEY_PEPPERS,
    AUDIT_SIGNING_KEY,
    ENCRYPTION_KEYS,
    configured,
    in_force,
)
from tiger_db.models import SECRET_COLUMNS
from tiger_db.models.secrets import CONTEXT
from tiger_db.out_of_band import OutOfBandWriter
from tiger_db.public import public
from tiger_db.settings import Settings
from tiger_db.sqlstates import typed

T = TypeVar("T")
# NULL if the current role may not use the schema.
_READS_SECRETS = text("SELECT has_column_privilege('tiger_accounts', 'private_key', 'SELECT')")
Isolation = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
# Maximum number of connections for out-of-band writes, which do not use the pool of the sessions.
_OUT_OF_BAND_CONNECTIONS = 4
# Maximum waits before the first retry of a transaction, after `Conflict` and after
# `DatabaseUnavailable`. The maximum wait doubles with each further retry.
_CONFLICT_WAIT_SECONDS, _UNAVAILABLE_WAIT_SECONDS = 0.05, 1.0


class AsyncSession(SQLModelSession):
    """An SQLModel session with SQLAlchemy's method `execute`, which SQLModel deprecates."""

    execute = SQLAlchemySession.execute

    async def commit(self) -> None:
        """Flush the session and commit the transaction.

        Raises:
            AlreadyExists, MissingReference, InvalidValue: the changes violate a constraint. The
                database saved nothing of the transaction.
            OutcomeUnknown: the connection was lost during the commit, or the synchronous replica
                did not confirm the commit in time.
            DatabaseUnavailable: the connection was lost before the commit. The database saved
                nothing of the transaction.
            Conflict: another transaction conflicts with this transaction, or has deleted a row that
                this transaction changes. The database saved nothing of this transaction.
        """
        # One call of run_sync() for both steps is faster than one call per step.
        await self.run_sync(_flush_and_commit)


def _flush_and_commit(session: SyncSession) -> None:
    try:
        session.flush()
    except SQLAlchemyError as error:
        raise typed(error) from None
    try:
        session.commit()
    except SQLAlchemyError as error:  # for example, the commit violates a deferred constraint
        raise typed(error) from None
    except DatabaseUnavailable as error:
        raise OutcomeUnknown(
            f"{error}, during the commit: it is unknown whether the transaction was saved"
        ) from None


class _SessionWithoutSecrets(Session):
    """A session whose role may not read the columns of secrets, such as the role of an auditor.

    The entities that the session loads lack these columns, and reading them raises an error.
    """


@event.listens_for(_SessionWithoutSecrets, "do_orm_execute")
def _leave_out_secrets(state: ORMExecuteState) -> None:
    if not state.is_select or state.is_column_load:
        return
    # The path leads from the selected entity to the entity that a relationship loads.
    path: Any = state.loader_strategy_path.path if state.loader_strategy_path else ()
    for described in getattr(state.statement, "column_descriptions", ()):
        entity = described.get("entity")
        if entity is None or described["expr"] is not entity:
            continue
        option = Load(path[0].class_ if path else entity)
        for relationship in path[1::2]:
            option = option.defaultload(relationship.class_attribute)
        for name in SECRET_COLUMNS.get(inspect(entity).mapper.local_table.name, ()):
            option = option.defer(getattr(entity, name), raiseload=True)
        state.statement = state.statement.options(option)


class Database:
    """The connections of one process to one database, in one event loop.

    A Database belongs to the process and the event loop that first use the Database, until the
    Database is closed. In any other process or event loop, each method raises InvalidState, except
    that a forked process may close the Database, which has no effect there. `get_database` returns
    a Database that belongs to the running event loop.

    The parameter `key_provider` replaces `ENCRYPTION_KEYS`, for example with the keys of a key
    management service. Out-of-band writes (`tiger_db.out_of_band`) use up to four connections
    in addition to the pool.

    Raises:
        ConfigurationError: the setting `ENCRYPTION_KEYS` or `API_KEY_PEPPERS` is malformed, or is
            missing in production.
    """

    @public
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
        # Out-of-band writes bypass the pooler, because sessions that wait for out-of-band writes
        # can use all connections of the pooler.
        out_of_band = (
            self.settings.without_pooler() if self.settings.db_direct_host else self.settings
        )
        size = min(_OUT_OF_BAND_CONNECTIONS, self.settings.db_pool_size)
        self.out_of_band = OutOfBandWriter(
            create_engine(out_of_band, **{**pool, "pool_size": size, "max_overflow": 0})
        )
        self.usage_counter = UsageCounter(self.out_of_band.engine)
        replicas = (create_engine(self.settings, replica=r, **pool) for r in self.settings.replicas)
        self.replicas = Replicas(list(replicas), self.out_of_band)
        context = SessionContext(
            key_provider=key_provider or configured(self.settings, ENCRYPTION_KEYS),
            peppers=configured(self.settings, API_KEY_PEPPERS),
            key_environment="live" if self.settings.production else "test",
            allow_unpeppered_until=self.settings.api_keys_allow_unpeppered_until,
            allow_unsigned_until=self.settings.api_keys_allow_unsigned_until,
            out_of_band=self.out_of_band,
            count_use=self.usage_counter.count,
            failing_after=self.settings.account_failing_after,
            failing_for=timedelta(seconds=self.settings.account_failing_for),
            suspend_after=self.settings.account_suspend_after,
        )
        self.info = {CONTEXT: context}  # each session gets a copy of the dict `info`
        self.sessions = async_sessionmaker(
            self.engine, class_=AsyncSession, expire_on_commit=False, info=self.info
        )
        self._checked = False
        # The process and the event loop of the last call of `claim`.
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await run_to_completion(asyncio.create_task(self.close()))

    def claim(self) -> None:
        """Check that this Database belongs to this process and to the running event loop.

        A Database that belongs to none yet belongs to this process and event loop from now on.

        Raises:
            InvalidState: the Database belongs to another process or to another event loop. The
                error message names both.
        """
        owner = os.getpid(), running_loop()
        if owner == self._owner:  # each check of a cached API key calls this method
            return
        for pool in self._pools:
            pool.claim()
        self._owner = owner

    @property
    def _pools(self) -> list[OwnedPool]:
        engines = (self.engine, self.out_of_band.engine)
        return [cast("OwnedPool", engine.pool) for engine in engines]

    async def close(self) -> None:
        """Write pending audit events and usage counts of API keys, then close all connections.

        In a forked process, `close` does nothing, because the connections belong to the parent.

        Raises:
            InvalidState: the Database belongs to another event loop.
        """
        if any(pool.inherited for pool in self._pools):
            return
        self.claim()
        await self.usage_counter.close()
        await self.out_of_band.close()
        await self.replicas.close()
        await self.engine.dispose()
        self._owner = None

    async def check(self) -> None:
        """Check the connection and the schema revision, unless an earlier check succeeded.

        Raises:
            InvalidState: the Database belongs to another process or to another event loop.
            DatabaseUnavailable: the database cannot be reached.
            SchemaMismatch: the schema is missing, is older or newer than this tiger_db release, or
                a pooler dropped the `search_path`.
        """
        self.claim()
        if self._checked:
            return
        from tiger_db.migrations import schema_state  # noqa: PLC0415  # slow import

        if self.settings.embedded:
            context = self.info[CONTEXT]
            provider, peppers = context.key_provider, context.peppers
            provider = provider or await asyncio.to_thread(in_force, self.settings, ENCRYPTION_KEYS)
            peppers = peppers or await asyncio.to_thread(in_force, self.settings, API_KEY_PEPPERS)
            self.info[CONTEXT] = context._replace(key_provider=provider, peppers=peppers)
        async with self.engine.connect() as connection:
            (await schema_state(connection)).check()
            if await connection.scalar(_READS_SECRETS) is False:
                self.sessions.configure(sync_session_class=_SessionWithoutSecrets)
        self._checked = True

    async def signing_key(self) -> Ed25519PrivateKey | None:
        """Return the key that signs audit seals, or None if no signing key is configured.

        Raises:
            ConfigurationError: the key in `AUDIT_SIGNING_KEY` is malformed or unreadable.
        """
        return await asyncio.to_thread(in_force, self.settings, AUDIT_SIGNING_KEY)

    @public
    @asynccontextmanager
    async def session(
        self,
        *,
        actor: Actor | None = None,
        readonly: bool = False,
        max_lag: timedelta = timedelta(seconds=5),
        isolation: Isolation | None = None,
    ) -> AsyncIterator[AsyncSession]:
        """Open a session that commits on success and rolls back on an exception.

        The audit events of the session are attributed to `actor`, or else to the actor of
        `acting_as`. A `readonly` session can neither write nor authorize API keys. A `readonly`
        session uses a replica (`DB_REPLICA_HOSTS`) that has replayed all commits older than
        `max_lag`, or else the primary. A replica can lack the last commits of this process. The
        default of `isolation` is the default isolation level of the server. Replicas do not support
        the isolation level "SERIALIZABLE", so sessions with this level use the primary.

        Raises:
            AlreadyExists, MissingReference, InvalidValue: the changes violate a constraint, so the
                database saved nothing of the transaction.
            DatabaseUnavailable: the database cannot be reached, or the connection was lost before
                the commit, so the database saved nothing of the transaction.
            OutcomeUnknown: the connection was lost during the commit, or the synchronous replica
                did not confirm the commit in time.
            Conflict: a deadlock, serialization failure or lock timeout occurred, or the schema was
                changed after this process prepared a statement. The database saved nothing of the
                transaction.
            QueryTimeout: an SQL statement took longer than `DB_QUERY_TIMEOUT`, so the database
                saved nothing of the transaction.
            InvalidFields: an argument has a wrong type.
            InvalidState: a readonly session tried to write or to authorize an API key, or the
                Database belongs to another process or to another event loop.
            SchemaMismatch: the schema is missing, or does not fit this tiger_db release.
        """
        options: dict[str, Any] = {"isolation_level": isolation} if isolation else {}
        if readonly:
            options["postgresql_readonly"] = True

        def session_on(engine: AsyncEngine) -> AsyncSession:
            if engine is self.engine and not options and actor is None:
                return self.sessions()
            bind = engine.execution_options(**options) if options else engine
            context = self.info[CONTEXT]
            if readonly or actor:
                context = context._replace(readonly=readonly, actor=actor)
            return self.sessions(bind=bind, info={CONTEXT: context})

        try:
            await self.check()
            on_replica = None
            if readonly and isolation != "SERIALIZABLE":
                on_replica = await self.replicas.session(session_on, max_lag)
            async with on_replica or session_on(self.engine) as session:
                yield session
                await session.commit()
        except PoolTimeoutError:
            raise DatabaseUnavailable(
                f"all connections to {self.settings.location} were in use for"
                f" {self.settings.db_pool_timeout:g} s (DB_POOL_SIZE, DB_MAX_OVERFLOW)"
            ) from None

    @public
    async def transaction(
        self,
        work: Callable[[AsyncSession], Awaitable[T]],
        *,
        retries: int = 3,
        isolation: Isolation | None = None,
    ) -> T:
        """Call `work` with a session, commit the session, and return the result of `work`.

        After a `Conflict` or `DatabaseUnavailable` error, `transaction` calls `work` again with a
        new session, at most `retries` times. After `Conflict`, the waits before the first three
        retries are at most 0.05, 0.1 and 0.2 s. After `DatabaseUnavailable`, the waits
        before the first three retries are at most 1, 2 and 4 s. The function `work` can run several
        times, so `work` must create all objects that it stores, and must have no effects outside
        the session.

        Raises:
            OutcomeUnknown: the connection was lost during the commit. Before you repeat the
                transaction, check whether the database has saved the transaction.
            Conflict, DatabaseUnavailable: the last retry of the transaction failed with this error.
            QueryTimeout, SchemaMismatch: the session raised this error, after which `transaction`
                does not call `work` again.
        """
        attempt = 0
        while True:
            try:
                async with self.session(isolation=isolation) as session:
                    return await work(session)
            except (Conflict, DatabaseUnavailable) as error:
                if isinstance(error, OutcomeUnknown) or attempt >= retries:
                    raise
                conflict = isinstance(error, Conflict)
            wait_seconds = _CONFLICT_WAIT_SECONDS if conflict else _UNAVAILABLE_WAIT_SECONDS
            spread = random.uniform(0.5, 1)  # noqa: S311  # so that processes retry at different times
            await asyncio.sleep(wait_seconds * 2**attempt * spread)
            attempt += 1


_defaults: WeakKeyDictionary[
    asyncio.AbstractEventLoop, tuple[Database, AsyncGenerator[None, None]]
] = WeakKeyDictionary()


async def _close_at_end_of_loop(database: Database) -> AsyncGenerator[None, None]:
    async with database:
        try:
            yield
        finally:
            # The removal of the Database from `_defaults` breaks a reference cycle.
            _defaults.pop(asyncio.get_running_loop(), None)


@public
def get_database() -> Database:
    """Return the default `Database` of this process and the running event loop.

    The first call in an event loop creates the Database with `Settings()`. The Database is closed
    when `asyncio.run` ends the event loop.

    Raises:
        InvalidState: no event loop runs.
        ConfigurationError: the class `Database` raised this error.
    """
    loop = running_loop()
    if loop not in _defaults:
        database = Database()
        # When the event loop ends, asyncio closes the generator, and the generator closes the
        # Database. asyncio knows only generators that have begun. Up to its `yield`, this
        # generator awaits nothing.
        generator = _close_at_end_of_loop(database)
        with suppress(StopIteration):
            generator.asend(None).send(None)
        _defaults[loop] = (database, generator)
    return _defaults[loop][0]


@public
@asynccontextmanager
async def get_session(*, actor: Actor | None = None) -> AsyncIterator[AsyncSession]:
    """Open a session of `get_database`, which is the default `Database` of the event loop.

    The session's audit events are attributed to `actor`, or else to the actor of `acting_as`.

    Raises:
        ConfigurationError, DatabaseUnavailable, SchemaMismatch, InvalidValue: the class `Database`
            or the method `Database.session` raised this error.
    """
    async with get_database().session(actor=actor) as session:
        yield session

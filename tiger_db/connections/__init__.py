"""Connections to the database, and engines: hosts, TLS, typed errors."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
from sqlalchemy import event
from sqlalchemy.engine import AdaptedConnection, Connection, ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tiger_db.connections import tls
from tiger_db.connections.sql_logging import connection_class, watch
from tiger_db.database_urls import Address
from tiger_db.errors import (
    Conflict,
    DatabaseUnavailable,
    InvalidState,
    QueryTimeout,
)
from tiger_db.migrations import SCHEMA_OPTION
from tiger_db.settings import ConnectArgs, Settings
from tiger_db.sqlstates import LOST, READ_ONLY, error_type

_ABSENT = (*LOST, TimeoutError, asyncpg.CannotConnectNowError)  # another host may do
_REFUSED = (*_ABSENT, ValueError, asyncpg.PostgresError)


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
            slow=settings.db_slow_query_seconds, comments=settings.db_sql_comments
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
    return await connect(settings.without_pooler(), database=database)


@contextmanager
def _unavailable(settings: Settings) -> Iterator[None]:
    try:
        yield
    except asyncpg.InvalidCatalogNameError:
        raise DatabaseUnavailable(
            f"{settings.location} does not exist: run `tiger-db init`"
        ) from None
    except _REFUSED as e:
        raise DatabaseUnavailable(f"cannot connect to {settings.location}: {_reason(e)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return "it takes no writes"
    return tls.reason_of(error)


def create_engine(
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
            place = replica or settings.location
            reason = _reason(error)
            if isinstance(error, TimeoutError) and settings.pooled:  # ours, as behind a pooler
                reason = f"no answer in {settings.db_query_timeout:g} s (DB_QUERY_TIMEOUT)"
            raise DatabaseUnavailable(f"lost {place}: {reason}") from None

    @event.listens_for(engine.sync_engine, "checkout")
    def _alive(connection: AdaptedConnection, _record: object, _proxy: object) -> None:
        # asyncpg has seen the end of a connection long before a ping would have: no round trip.
        if connection.driver_connection.is_closed():
            raise DisconnectionError("closed by the server")

    watch(
        engine.sync_engine, slow=settings.db_slow_query_seconds, comments=settings.db_sql_comments
    )
    return engine


def _is_readonly(connection: Connection | None) -> bool:
    return bool(connection and connection.get_execution_options().get("postgresql_readonly"))


@asynccontextmanager
async def maintenance_engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """An engine for migrations: direct connections of its own, no time limit on statements.

    Raises:
        ConfigurationError: see `connect_directly`.
    """
    patient = {"db_query_timeout": 0, "db_idle_transaction_timeout": 0, "db_slow_query_seconds": 0}
    engine = create_engine(settings.without_pooler().model_copy(update=patient), poolclass=NullPool)
    try:
        yield engine
    finally:
        await engine.dispose()

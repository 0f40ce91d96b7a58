"""Functions that open asyncpg connections and create SQLAlchemy engines."""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
from sqlalchemy import event
from sqlalchemy.engine import AdaptedConnection, ExceptionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tiger_db import driver_sql
from tiger_db.connections import tls
from tiger_db.connections.error_advice import reason
from tiger_db.connections.passfile import find_password
from tiger_db.connections.pool import OwnedPool, end_cancelled_session
from tiger_db.connections.sql_logging import LoggingConnection, slow_query_log
from tiger_db.database_urls import Address
from tiger_db.decoding import decode_json, decode_time, encode_time
from tiger_db.errors import Conflict, DatabaseUnavailable, InvalidState, QueryTimeout
from tiger_db.settings import (
    CHECK_INTERVAL,
    SCHEMA_OPTION,
    ConnectArgs,
    ConnectionPassword,
    Settings,
)
from tiger_db.sqlstates import (
    CONNECTION_ERRORS,
    DISK_FULL,
    IDLE_IN_TRANSACTION_TIMEOUT,
    READ_ONLY_SQL_TRANSACTION,
    SCHEMA_CHANGED,
    classify,
    error_type,
    raw_errors,
)
from tiger_db.tracebacks import forgets_locals

# If a connection fails with one of _HOST_ERRORS, a connection to the next host can succeed.
_HOST_ERRORS = (
    *CONNECTION_ERRORS,
    TimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.ConnectionDoesNotExistError,  # for example, a proxy whose server is down
)
_NEXT_HOST_SECONDS = 0.25  # the "Connection Attempt Delay" of RFC 8305
# A server, or a pooler, that does not support a session parameter refuses the connection.
_PARAMETER_ERRORS = (
    asyncpg.InvalidParameterValueError,
    asyncpg.UndefinedObjectError,
    asyncpg.ProtocolViolationError,
)
# Locations of servers that cannot check the connections of their clients, such as on Windows, and
# of poolers.
_without_check_interval: set[str] = set()
_CONNECT_ERRORS = (*_HOST_ERRORS, ValueError, asyncpg.PostgresError)


async def connect_args(settings: Settings) -> ConnectArgs:
    """Return arguments for `asyncpg.connect`.

    If the settings name no server, start the embedded server.

    Raises:
        EmbeddedError: the embedded PostgreSQL server cannot be started.
    """
    if settings.embedded:
        from tiger_db import embedded  # noqa: PLC0415  # `embedded` needs POSIX and an extra

        server = await asyncio.to_thread(embedded.start, settings)
        return server.connect_args(settings)
    return settings.connect_args()


@forgets_locals
async def connect(
    settings: Settings,
    *,
    database: str | None = None,
    replica: Address | None = None,
) -> "asyncpg.Connection[asyncpg.Record]":
    """Open an asyncpg connection to `database`, or by default to the database of the settings.

    `connect` tries the configured hosts in order until a host accepts writes. If a host does not
    answer in 0.25 s, the next host is tried as well. The timeout for each host is
    `DB_CONNECT_TIMEOUT`. If `replica` is given, `connect` tries only this replica, which must be a
    standby.

    Raises:
        ConfigurationError: a file that a `DB_SSL_*` variable names is missing or malformed.
        DatabaseUnavailable: every host is unreachable or refuses the connection. The error message
            names the hosts and contains no credentials.
    """
    arguments = await connect_args(settings) if replica is None else settings.connect_args(replica)
    if database is not None:
        arguments["database"] = database
    arguments["connection_class"] = _Connection
    if settings.location in _without_check_interval:
        arguments["server_settings"].pop(CHECK_INTERVAL, None)
    with _unavailable(settings):
        try:
            connection = await _connect_to_first(settings, arguments)
        except _PARAMETER_ERRORS as error:
            if CHECK_INTERVAL not in str(error):
                raise
            _without_check_interval.add(settings.location)
            return await connect(settings, database=database, replica=replica)
    connection.add_termination_listener(_Connection.record_end)
    try:
        await connection.set_type_codec(
            "timestamptz",
            schema="pg_catalog",
            encoder=encode_time,
            decoder=decode_time,
            format="tuple",
        )
    except BaseException:  # also if the caller is cancelled
        connection.terminate()
        raise
    if settings.db_slow_query_seconds:
        connection.slow_query_seconds = settings.db_slow_query_seconds
    return connection


async def connect_directly(
    settings: Settings, *, database: str | None = None
) -> "asyncpg.Connection[asyncpg.Record]":
    """Open a connection that bypasses the pooler, for work that needs one session, such as LISTEN.

    Raises:
        ConfigurationError: the setting `DB_POOLER` needs `DB_DIRECT_HOST`, which is not set, or the
            call of `connect` raised this error.
        DatabaseUnavailable: every host is unreachable or refuses the connection.
    """
    return await connect(settings.without_pooler(), database=database)


@forgets_locals
async def _connect_to_first(
    settings: Settings, arguments: ConnectArgs
) -> "asyncpg.Connection[asyncpg.Record]":
    hosts, ports = arguments.get("host"), arguments.get("port")
    if not isinstance(hosts, list) or not isinstance(ports, list):
        return await _connect_to_host(settings, arguments)
    # asyncpg tries the next host only after the timeout of a host that does not answer. Here, the
    # next host is tried after a short time, as in RFC 8305. Hosts that refused, such as standbys,
    # are tried again while another host has not answered: one of them can be promoted meanwhile.
    addresses = dict.fromkeys(map(Address, hosts, ports))
    untried, reasons = deque(addresses), dict[Address, str]()
    attempts: dict[asyncio.Task[asyncpg.Connection[asyncpg.Record]], Address] = {}
    try:
        while len(reasons) < len(addresses):
            if untried:
                address = untried.popleft()
                attempt = _connect_to_host(
                    settings, {**arguments, "host": address.host, "port": address.port}
                )
                attempts[asyncio.create_task(attempt)] = address
            await asyncio.wait(
                attempts, timeout=_NEXT_HOST_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            done = [task for task in attempts if task.done()]
            for task in done:
                address = attempts.pop(task)
                try:
                    return task.result()
                except _HOST_ERRORS as error:
                    reasons[address] = f"{address}: {reason(error)}"
            if not done and not untried:
                untried.extend(a for a in addresses if a not in attempts.values())
    finally:
        # No `await` here: a second cancellation would lose the connection that is returned.
        for task in attempts:
            task.cancel()
            task.add_done_callback(_discard)
    raise ConnectionError("; ".join(reasons[address] for address in addresses))


def _discard(attempt: "asyncio.Task[asyncpg.Connection[asyncpg.Record]]") -> None:
    """Close the connection of an attempt that is not needed any more."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().terminate()


@forgets_locals
async def _connect_to_host(
    settings: Settings, arguments: ConnectArgs
) -> "asyncpg.Connection[asyncpg.Record]":
    file, host, port = settings.passfile, arguments["host"], arguments["port"]
    if file is not None and not arguments["password"]:
        assert isinstance(host, str)
        assert isinstance(port, int)
        password = find_password(file, host, port, arguments["database"], arguments["user"])
        arguments["password"] = ConnectionPassword(password)
    try:
        return await tls.connect(settings, arguments)
    except TimeoutError as error:
        if str(error):  # a timeout of the operating system
            raise
        in_url = settings.url is not None and "connect_timeout" in settings.url.parameters
        setting = "connect_timeout in DATABASE_URL" if in_url else "DB_CONNECT_TIMEOUT"
        raise TimeoutError(
            f"the server did not answer in {arguments['timeout']:g} s ({setting})"
        ) from None


class _Connection(LoggingConnection):
    """A connection that resets `search_path` at the start of each transaction."""

    begun_at = math.inf  # Monotonic time (s) of the BEGIN of the current transaction.
    closed_at: float | None = None  # Monotonic time (s) at which the connection was closed.

    def record_end(self) -> None:
        self.closed_at = time.monotonic()

    async def set_type_codec(
        self,
        *args: Any,  # noqa: ANN401  # asyncpg's
        **options: Any,  # noqa: ANN401  # asyncpg's
    ) -> None:
        """Set a codec. Raise DatabaseUnavailable if the connection was lost.

        SQLAlchemy sets codecs on each new connection, and does not convert errors of these calls.
        """
        with raw_errors():
            await super().set_type_codec(*args, **options)

    async def execute(
        self,
        query: str,
        *args: object,
        **options: Any,  # noqa: ANN401  # asyncpg's
    ) -> Any:  # noqa: ANN401  # asyncpg's
        """Execute a query.

        If the query is BEGIN, reset `search_path` in the same round trip.
        """
        if query.startswith("BEGIN") and not args:
            query = f"{query.rstrip(';')}; SET LOCAL search_path TO DEFAULT"
            self.begun_at = time.monotonic()
        else:
            self.begun_at = math.inf  # COMMIT or ROLLBACK
        return await super().execute(query, *args, **options)


@contextmanager
def _unavailable(settings: Settings) -> Iterator[None]:
    try:
        yield
    except asyncpg.InvalidCatalogNameError:
        raise DatabaseUnavailable(
            f"the database {settings.location} does not exist: run `tiger-db init`"
        ) from None
    except _CONNECT_ERRORS as e:
        raise DatabaseUnavailable(f"cannot connect to {settings.location}: {reason(e)}") from None


def create_engine(
    settings: Settings,
    *,
    replica: Address | None = None,
    **pool_options: Any,  # noqa: ANN401  # SQLAlchemy's
) -> AsyncEngine:
    """Create an SQLAlchemy engine for the database of the settings, or for one of its replicas.

    The engine raises an error of `tiger_db.errors` if a connection fails, a timeout expires, or
    another transaction causes a conflict.

    Raises:
        ConfigurationError: a file that a `DB_SSL_*` variable names cannot be read.
    """
    tls.check_files(settings)
    report = slow_query_log(settings.db_slow_query_seconds)
    engine = create_async_engine(
        "postgresql+asyncpg://",
        connect_args={
            "async_creator_fn": lambda **_: connect(settings, replica=replica),
            # Statements are not cached, because a pooler may run the next transaction in a session
            # without the prepared statement.
            **({"prepared_statement_cache_size": 0} if settings.uses_pooler else {}),
        },
        json_deserializer=decode_json,
        execution_options={
            SCHEMA_OPTION: settings.db_schema,
            driver_sql.REPORT: report,
        },
        echo=settings.db_debug,
        hide_parameters=True,
        **{"poolclass": OwnedPool, **pool_options},
    )

    @event.listens_for(engine.sync_engine, "handle_error")
    def _raise_typed(context: ExceptionContext) -> None:
        error = context.original_exception
        if not isinstance(error, Exception):
            return  # a CancelledError, for example, does not mean that the connection is lost
        # SQLAlchemy 2.1 wraps all errors of asyncpg, and SQLAlchemy 2.0 only some of them.
        cause = error.__cause__ or error
        if isinstance(cause, SCHEMA_CHANGED):
            # SQLAlchemy prepares its statements again after an InvalidCachedStatementError, but not
            # after an OutdatedSchemaCacheError.
            context.is_disconnect = isinstance(cause, asyncpg.OutdatedSchemaCacheError)
            raise classify(cause) or error from None
        state = getattr(error, "sqlstate", None) or ""
        kind = error_type(state)
        if kind is Conflict or kind is QueryTimeout:
            limited = settings.db_query_timeout and not settings.uses_pooler
            setting = "DB_QUERY_TIMEOUT" if limited else "statement_timeout"
            raise classify(cause, statement_timeout=setting) or kind(reason(error)) from None
        if state == DISK_FULL:  # the connection stays usable
            raise DatabaseUnavailable(str(classify(cause))) from None
        options = context.connection.get_execution_options() if context.connection else {}
        if state == READ_ONLY_SQL_TRANSACTION and options.get("postgresql_readonly"):
            raise InvalidState("a readonly session cannot write") from None
        lost = isinstance(error, OSError) or isinstance(cause, asyncpg.InternalClientError)
        if lost or context.is_disconnect or kind is DatabaseUnavailable:
            # `is_disconnect` makes SQLAlchemy close all connections of the pool, because they
            # possibly lead to a former primary.
            context.is_disconnect = True
            why = _idle_reason(context, settings) or reason(error)
            if isinstance(error, TimeoutError) and not str(error):
                seconds = settings.command_timeout or 0
                why = f"the server did not answer in {seconds:g} s (see DB_QUERY_TIMEOUT)"
            location = replica or settings.location
            raise DatabaseUnavailable(f"the connection to {location} was lost: {why}") from None

    event.listen(engine.sync_engine, "handle_error", _hide_values)
    event.listen(engine.sync_engine, "checkout", _check_open)
    event.listen(engine.sync_engine, "invalidate", end_cancelled_session)
    driver_sql.observe(engine.sync_engine, report)
    return engine


def _idle_reason(context: ExceptionContext, settings: Settings) -> str | None:
    """Return the reason if DB_IDLE_TRANSACTION_TIMEOUT ended the connection, or None.

    asyncpg discards PostgreSQL's message to an idle connection. Therefore, the reason is inferred:
    the connection was closed without another message, in a transaction that was open for that long.
    """
    error = context.original_exception
    limit = settings.db_idle_transaction_timeout
    idle = f"a transaction may be idle for {limit:g} s (DB_IDLE_TRANSACTION_TIMEOUT)"
    if getattr(error, "sqlstate", None) == IDLE_IN_TRANSACTION_TIMEOUT:
        return idle
    cause = error.__cause__
    if (
        not limit
        or settings.uses_pooler
        or context.connection is None
        or not isinstance(cause, asyncpg.InterfaceError | asyncpg.ConnectionDoesNotExistError)
        or isinstance(cause.__cause__, asyncpg.PostgresError)  # PostgreSQL's message in a statement
    ):
        return None
    connection = context.connection.connection.driver_connection
    if not isinstance(connection, _Connection) or not connection.is_closed():
        return None
    # asyncpg calls `record_end` in the iteration of the event loop after the connection was closed.
    seconds = (connection.closed_at or time.monotonic()) - connection.begun_at
    if seconds < limit:
        return None
    return f"the server closed it in a transaction that was open for {seconds:.1f} s: {idle}"


def _hide_values(context: ExceptionContext) -> None:
    """Hide an error's message from later event listeners: the message can contain row values."""
    error = context.original_exception
    state = getattr(error, "sqlstate", None) or ""
    context.original_exception = RuntimeError(f"{type(error).__name__} {state}".rstrip())


def _check_open(connection: AdaptedConnection, _record: object, _proxy: object) -> None:
    # `is_closed` sends no query, because asyncpg notices when the server closes the connection.
    if connection.driver_connection.is_closed():
        raise DisconnectionError("the server closed the connection")


@asynccontextmanager
async def maintenance_engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """Open an engine for migrations and checks, which bypasses the pooler and has no query timeout.

    Raises:
        ConfigurationError: the setting `DB_POOLER` needs `DB_DIRECT_HOST`, which is not set.
    """
    unlimited = {
        "db_query_timeout": 0,
        "db_idle_transaction_timeout": 0,
        "db_slow_query_seconds": 0,
    }
    settings = settings.without_pooler().model_copy(update=unlimited)
    engine = create_engine(settings, poolclass=NullPool)
    try:
        yield engine
    finally:
        await engine.dispose()

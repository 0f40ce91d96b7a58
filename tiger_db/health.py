"""Whether the database is as it should be, and what to do where it is not."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import asyncpg
from sqlalchemy import event, select, text
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from tiger_db.connections import connect, connect_directly, maintenance_engine, tls
from tiger_db.database import AsyncSession
from tiger_db.encryption import EncryptedSecret, KeyRing, decrypt
from tiger_db.errors import ConfigurationError, DatabaseUnavailable, EncryptionError, TigerDBError
from tiger_db.keys_in_force import API_KEY_PEPPERS, ENCRYPTION_KEYS, configured, in_force
from tiger_db.migrations import MONTHS_AHEAD, SEARCH_PATH, SearchPath, schema_state
from tiger_db.migrations.comparison import find_differences
from tiger_db.models import TigerAccount, metadata
from tiger_db.settings import Settings
from tiger_db.sqlstates import raw_errors

_IDENTITY = """
SELECT (system_identifier, pg_is_in_recovery(), oid)::text
FROM pg_control_system(), pg_database WHERE datname = current_database()
"""
_SHOWN = 3  # of each kind
_FEW_MONTHS = 2  # ahead, below which it warns


@dataclass(frozen=True, slots=True)
class Health:
    """What is known of the database. None: it could not be found out, or does not apply."""

    location: str
    live: bool = True  # the process and its settings are sound
    ready: bool | None = None  # and so is the database, as far as serving goes
    embedded_folder: str | None = None
    embedded_socket_folder: str | None = None
    embedded_pid: int | None = None
    server_version: str | None = None
    latency_ms: float | None = None
    revision: str | None = None
    head: str | None = None
    pool: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # estimates
    audit_months_ahead: int | None = None
    encryption_keys: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # a line each, with what to do about it


async def liveness(settings: Settings) -> Health:
    """Look at what the process has by itself: its settings and keys. No database is asked."""
    report, _ = await _alone(settings)
    return report


async def health(settings: Settings) -> Health:
    """Look at everything, start nothing. Whatever is wrong is a problem in the report.

    A database that does not answer within `DB_CONNECT_TIMEOUT` is not ready.
    """
    report, ring = await _alone(settings)
    report = replace(report, ready=False)
    if settings.embedded:
        try:
            report = await asyncio.to_thread(_embedded, report, settings)
        except TigerDBError as error:
            report.problems.insert(0, explain(error) or str(error))
    if settings.embedded and report.embedded_pid is None:
        return report
    loop = asyncio.get_running_loop()
    deadline = loop.time() + settings.db_connect_timeout
    try:
        report.problems.extend(_unverified(settings))
        if settings.pooled:
            async with asyncio.timeout_at(deadline):
                await _check_pooler(settings)
        async with maintenance_engine(settings) as engine:
            # First of all: SQLAlchemy itself asks things before it hands a connection over.
            @event.listens_for(engine.sync_engine, "connect", insert=True)
            def _hang_up_in_time(connection: AdaptedConnection, _record: object) -> None:
                loop.call_at(deadline, connection.driver_connection.terminate)

            async with engine.connect() as connection:
                looking = _look(connection, settings, ring, report.problems, live=report.live)
                async for found in looking:
                    report = replace(report, **found)
    except DBAPIError as error:
        report.problems.append(f"{explain(error)} (see `tiger-db check`)")
    except (TigerDBError, OSError) as error:
        late = loop.time() >= deadline and not isinstance(error.__context__, TimeoutError)
        report.problems.append(
            f"{settings.location} was not done answering within {settings.db_connect_timeout:g} s"
            " (DB_CONNECT_TIMEOUT)"
            if late
            else explain(error) or str(error)
        )
    return report


async def _alone(settings: Settings) -> tuple[Health, KeyRing | None]:
    report = Health(
        location=settings.location,
        pool={
            "size": settings.db_pool_size,
            "max_overflow": settings.db_max_overflow,
            "timeout": settings.db_pool_timeout,
            "recycle": settings.db_pool_recycle,
            "connect_timeout": settings.db_connect_timeout,
            "query_timeout": settings.db_query_timeout,
        },
    )
    ring = None
    try:
        ring = await asyncio.to_thread(key_ring, settings)
        report = replace(report, encryption_keys=list(ring.key_ids))
    except TigerDBError as error:
        report.problems.append(explain(error) or str(error))
    try:
        if configured(settings, API_KEY_PEPPERS) is None and not settings.embedded:
            report.problems.append(
                "API_KEY_PEPPERS is not set, so API keys cannot be made or checked: run"
                " `tiger-db init`"
            )
    except TigerDBError as error:
        report.problems.append(explain(error) or str(error))
    return replace(report, live=not report.problems), ring


def some(items: Sequence[str]) -> str:
    """Join the first of the items, and say how many more there are."""
    more = len(items) - _SHOWN
    return "; ".join(items[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def explain(error: Exception) -> str | None:
    """Why it failed and what to do about it, in one line; None: that is not known."""
    if isinstance(error, DBAPIError):
        cause = getattr(error.orig, "__cause__", None) or error.orig
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        return f"the database refused: {reason}"
    if isinstance(error, TigerDBError):
        advice = _advice(error.__context__) if isinstance(error, DatabaseUnavailable) else None
        return f"{error}: {advice}" if advice else str(error)
    if not isinstance(error, OSError):
        return None
    reason = error.strerror or type(error).__name__
    return f"{reason}: {error.filename}" if error.filename else reason


def _advice(cause: BaseException | None) -> str | None:
    advice = None
    match cause:
        case asyncpg.InvalidCatalogNameError():
            pass  # the message says it
        case asyncpg.InvalidAuthorizationSpecificationError() if "certificate" in str(cause):
            advice = "check DB_USER, DB_SSL_CERT and DB_SSL_KEY"
        case asyncpg.InvalidAuthorizationSpecificationError() if "encryption" in str(cause):
            advice = "check DB_SSL_MODE and DB_USER"
        case asyncpg.InvalidAuthorizationSpecificationError():
            advice = "check DATABASE_URL, or DB_USER and DB_PASSWORD"
        case asyncpg.ProtocolViolationError() if "startup parameter" in str(cause):
            advice = "behind PgBouncer, set DB_POOLER=pgbouncer and DB_DIRECT_HOST"
        case ssl.SSLCertVerificationError():
            advice = "check DB_SSL_MODE, DB_SSL_CA, and the name by which you reach it"
        case ssl.SSLError():
            advice = "check DB_SSL_MODE, DB_SSL_CA, DB_SSL_CERT and DB_SSL_KEY"
        case _ if tls.rejected(cause):
            advice = "switch TLS on there, or check DB_SSL_MODE"
        case OSError():  # TimeoutError is one
            advice = "is the server running? Check DATABASE_URL, or DB_HOST and DB_PORT"
    return advice


def _embedded(report: Health, settings: Settings) -> Health:
    from tiger_db import embedded  # noqa: PLC0415  # needs POSIX and an extra

    folder = embedded.home_folder(settings)
    server = embedded.running(settings)
    if server is None:
        report.problems.insert(
            0, f"the embedded PostgreSQL in {folder} is not running: run `tiger-db start-embedded`"
        )
        return replace(report, embedded_folder=str(folder))
    return replace(
        report,
        embedded_folder=str(folder),
        embedded_socket_folder=str(server.socket_folder),
        embedded_pid=server.pid,
    )


def key_ring(settings: Settings) -> KeyRing:
    """Return the encryption keys in force; generate none.

    Raises:
        ConfigurationError: there are none, or they are malformed or unreadable.
    """
    if ring := in_force(settings, ENCRYPTION_KEYS, generate=False):
        return ring
    raise ConfigurationError(
        "there is no encryption key yet: run `tiger-db init`"
        if settings.embedded
        else "ENCRYPTION_KEYS is not set, so accounts cannot be stored: run `tiger-db init`"
    )


def _unverified(settings: Settings) -> list[str]:
    if not settings.production:
        return []
    return [
        f"the server of {name} is not asked to prove who it is: set DB_SSL_MODE=verify-full and"
        " DB_SSL_CA"
        for name in settings.unverified
    ]


async def _check_pooler(settings: Settings) -> None:
    """Make sure that the pooler and the way past it lead to the same database and schema.

    Raises:
        ConfigurationError: they lead to different databases.
        SchemaMismatch: the sessions behind the pooler do not use the schema of `DB_SCHEMA`.
        DatabaseUnavailable: one of them leads nowhere.
    """
    found, paths = [], []
    for open_one in (connect, connect_directly):
        connection = await open_one(settings)
        try:
            with raw_errors():
                found.append(await connection.fetchval(_IDENTITY))
                paths.append(SearchPath(*await connection.fetchrow(SEARCH_PATH)))
        finally:
            connection.terminate()
    if found[0] != found[1]:
        raise ConfigurationError("DB_DIRECT_HOST is another server than the one behind the pooler")
    paths[0].check(settings.db_schema)


async def _look(
    connection: AsyncConnection,
    settings: Settings,
    ring: KeyRing | None,
    problems: list[str],
    *,
    live: bool,
) -> AsyncIterator[dict[str, Any]]:
    """The report's fields, as they are found."""
    await connection.execute(
        text("SELECT set_config('statement_timeout', :timeout, false)"),
        {"timeout": str(round(settings.db_query_timeout * 1000))},
    )
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    # A pooler does not tell its clients the process id of the server, but one that it made up.
    if driver.get_server_pid() != await connection.scalar(text("SELECT pg_backend_pid()")):
        problems.append(
            "DB_DIRECT_HOST leads to a pooler: name the server itself"
            if settings.db_direct_host
            else "there is a pooler between: set DB_POOLER=pgbouncer and DB_DIRECT_HOST"
        )
    version = text("SHOW server_version")
    yield {"server_version": await connection.scalar(version)}
    start = time.perf_counter()
    await connection.scalar(version)  # which is prepared now: one round trip
    yield {"latency_ms": round((time.perf_counter() - start) * 1000, 3)}
    state = await schema_state(connection)
    yield {"revision": state.current, "head": state.head}
    if state.problem:
        problems.append(state.problem)
        return
    yield {"rows": await _rows(connection, sorted(metadata.tables))}
    ahead = await audit_months_ahead(connection)
    yield {"audit_months_ahead": ahead}
    if ahead is not None and ahead < _FEW_MONTHS:
        problems.append(
            "next month has no audit partition yet: run `tiger-db migrate`"
            if ahead == 0
            else "the audit trail has partitions for one month ahead: run `tiger-db maintain-audit`"
        )
    problems += await _strays(connection)
    unreadable = await _unreadable(connection, ring) if ring is not None else []
    problems += unreadable
    if changed := [one for one in await find_differences(connection) if not one.undeclared]:
        seen = some([one.description for one in changed])
        problems.append(f"{seen}: run `tiger-db check` for the SQL that restores this")
    yield {"ready": live and not unreadable}  # with what upkeep has missed, it serves all the same


async def _rows(connection: AsyncConnection, tables: Sequence[str]) -> dict[str, int]:
    """Of a table and its partitions, as of the last ANALYZE, or else as the statistics have it."""
    rows = await connection.execute(
        text(
            "SELECT name, CAST(sum(CASE WHEN reltuples >= 0 THEN reltuples"
            " ELSE pg_stat_get_live_tuples(pg_class.oid) END) AS bigint)"
            " FROM unnest(CAST(:tables AS text[])) AS name"
            " LEFT JOIN pg_inherits ON inhparent = to_regclass(name)"
            " JOIN pg_class ON pg_class.oid IN (to_regclass(name), inhrelid) AND relkind = 'r'"
            " GROUP BY name ORDER BY name"
        ),
        {"tables": list(tables)},
    )
    return {name: estimate for name, estimate in rows}  # noqa: C416  # names the two columns


async def audit_months_ahead(connection: AsyncConnection) -> int | None:
    ahead: int | None = await connection.scalar(
        text(
            "SELECT coalesce(min(n) - 1, 120) FROM generate_series(1, 120) AS n"
            " WHERE NOT EXISTS (SELECT FROM pg_inherits"
            " WHERE inhparent = CAST('audit_logs' AS regclass)"
            " AND inhrelid = to_regclass('audit_logs_' || to_char("
            "date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => n), 'YYYY_MM')"
            "))"
        )
    )
    return ahead


async def _strays(connection: AsyncConnection) -> list[str]:
    """Events in no month's partition; `migrate` moves those of the months that it makes."""
    waiting, elsewhere = (
        await connection.execute(
            text(
                "SELECT EXISTS (SELECT FROM audit_logs_default WHERE id >= lower AND id < upper),"
                " EXISTS (SELECT FROM audit_logs_default WHERE id < lower OR id >= upper)"
                " FROM date_trunc('month', now() AT TIME ZONE 'UTC') AS month,"
                " uuid7_floor(month AT TIME ZONE 'UTC') AS lower,"
                " uuid7_floor((month + make_interval(months => :months)) AT TIME ZONE 'UTC')"
                " AS upper"
            ),
            {"months": MONTHS_AHEAD + 1},
        )
    ).one()
    problems = []
    if waiting:
        problems.append(
            "audit_logs_default holds events whose month has no partition: run `tiger-db migrate`"
        )
    if elsewhere:
        problems.append(
            "audit_logs_default holds events dated before or long after this month:"
            " check the clocks of the machines that write them"
        )
    return problems


async def _unreadable(connection: AsyncConnection, ring: KeyRing) -> list[str]:
    """Return a problem if the keys do not decrypt the newest account."""
    async with AsyncSession(connection) as session:
        account = await session.scalar(
            select(TigerAccount).order_by(col(TigerAccount.id).desc()).limit(1)
        )
    if account is not None:
        secret = account.tiger_id
        assert isinstance(secret, EncryptedSecret)  # as it was loaded
        try:
            decrypt(ring, secret.ciphertext, secret.aad, secret.owner)
        except EncryptionError as error:
            return [f"stored secrets cannot be read: {error}: set ENCRYPTION_KEYS as it was"]
    return []

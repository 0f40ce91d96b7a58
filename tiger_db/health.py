"""Health reports for liveness and readiness probes, with advice on problems."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import event, select, text
from sqlalchemy.engine import AdaptedConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col

from tiger_db.checks.database import (
    audit_months_ahead,
    check_citus,
    check_triggers,
    grade_partitions,
)
from tiger_db.connections import connect, connect_directly, maintenance_engine
from tiger_db.connections.error_advice import explain
from tiger_db.crud.api_keys import current_pause
from tiger_db.database import AsyncSession
from tiger_db.encryption import EncryptedSecret, KeyRing, decrypt
from tiger_db.errors import (
    ConfigurationError,
    Conflict,
    EncryptionError,
    QueryTimeout,
    TigerDBError,
)
from tiger_db.keys_in_force import required_key_ring, required_peppers
from tiger_db.migrations import MONTHS_AHEAD, SEARCH_PATH, SearchPath, schema_state
from tiger_db.models import TABLES, TigerAccount
from tiger_db.settings import Settings
from tiger_db.sqlstates import raw_errors

_IDENTITY = """
SELECT (system_identifier, pg_is_in_recovery(), oid)::text
FROM pg_control_system(), pg_database WHERE datname = current_database()
"""


@dataclass(frozen=True, slots=True)
class HealthReport:
    """The health of a process and of its database. A field is None if its value is unknown.

    The field `live` is true if the settings and keys of the process are valid. The field `ready` is
    true if the process and its database can serve requests. The field `rows` maps the name of each
    table to the estimated number of rows in the table. The field `problems` has one line with
    advice for each problem.
    """

    location: str
    live: bool = True
    ready: bool | None = None
    embedded_folder: str | None = None
    embedded_socket_folder: str | None = None
    embedded_pid: int | None = None
    server_version: str | None = None
    latency_ms: float | None = None
    revision: str | None = None
    head: str | None = None
    pool: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    audit_months_ahead: int | None = None
    encryption_keys: list[str] = field(default_factory=list)
    # The current pause of trading. A pause is not a problem, and does not affect readiness.
    trading_pause: dict[str, str | None] | None = None
    problems: list[str] = field(default_factory=list)


async def check_liveness(settings: Settings) -> HealthReport:
    """Check the settings and keys of this process, without connecting to a database."""
    report, _ = await _check_process(settings)
    return report


async def check_readiness(settings: Settings) -> HealthReport:
    """Check this process and its database. Return a report that lists the problems found.

    If the database does not answer within `DB_CONNECT_TIMEOUT`, the field `ready` is false.
    """
    report, ring = await _check_process(settings)
    report = replace(report, ready=False)
    if settings.embedded:
        try:
            report = await asyncio.to_thread(_check_embedded, report, settings)
        except TigerDBError as error:
            report.problems.insert(0, _describe(error))
        if report.embedded_pid is None:
            return report
    loop = asyncio.get_running_loop()
    deadline = loop.time() + settings.db_connect_timeout
    try:
        if settings.production:
            report.problems.extend(
                f"the identity of the server in {name} is not verified:"
                " set DB_SSL_MODE=verify-full and DB_SSL_CA"
                for name in settings.unverified_variables
            )
        if settings.uses_pooler:
            async with asyncio.timeout_at(deadline):
                await _check_pooler(settings)
        async with maintenance_engine(settings) as engine:
            # When a connection is opened, SQLAlchemy's own event listeners send queries. With
            # insert=True, _terminate_at_deadline runs before SQLAlchemy's listeners, so that the
            # deadline limits their queries.
            @event.listens_for(engine.sync_engine, "connect", insert=True)
            def _terminate_at_deadline(connection: AdaptedConnection, _record: object) -> None:
                loop.call_at(deadline, connection.driver_connection.terminate)

            async with engine.connect() as connection:
                fields = _check_database(connection, settings, ring, report.problems)
                async for found in fields:
                    report = replace(report, **found)
    except DBAPIError as error:
        report.problems.append(f"{explain(error)} (see `tiger-db check`)")
    except (TigerDBError, OSError) as error:
        late = loop.time() >= deadline and not isinstance(error.__context__, TimeoutError)
        report.problems.append(
            f"{settings.location} did not finish answering within {settings.db_connect_timeout:g} s"
            " (DB_CONNECT_TIMEOUT)"
            if late
            else _describe(error)
        )
    return replace(report, ready=report.ready and report.live)


def _describe(error: Exception) -> str:
    return explain(error) or str(error)


async def _check_process(settings: Settings) -> tuple[HealthReport, KeyRing | None]:
    report = HealthReport(
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
        ring = await asyncio.to_thread(required_key_ring, settings)
        report = replace(report, encryption_keys=list(ring.key_ids))
    except TigerDBError as error:
        report.problems.append(_describe(error))
    try:
        await asyncio.to_thread(required_peppers, settings)
    except TigerDBError as error:
        report.problems.append(_describe(error))
    return replace(report, live=not report.problems), ring


def _check_embedded(report: HealthReport, settings: Settings) -> HealthReport:
    from tiger_db import embedded  # noqa: PLC0415  # `embedded` needs POSIX and an extra

    folder = embedded.home_folder(settings)
    report = replace(report, embedded_folder=str(folder))
    server = embedded.running(settings)
    if server is None:
        report.problems.insert(
            0, f"the embedded PostgreSQL in {folder} is not running: run `tiger-db start-embedded`"
        )
        return report
    return replace(
        report, embedded_socket_folder=str(server.socket_folder), embedded_pid=server.pid
    )


async def _check_pooler(settings: Settings) -> None:
    """Check that the pooler and the direct connection use the same database and schema.

    Raises:
        ConfigurationError: the pooler and the direct connection lead to different databases.
        SchemaMismatch: the sessions behind the pooler do not use the schema `DB_SCHEMA`.
        DatabaseUnavailable: the pooler or the server cannot be reached.
    """
    databases, paths = [], []
    for open_connection in (connect, connect_directly):
        connection = await open_connection(settings)
        try:
            with raw_errors():
                databases.append(await connection.fetchval(_IDENTITY))
                paths.append(SearchPath(*await connection.fetchrow(SEARCH_PATH)))
        finally:
            connection.terminate()
    if databases[0] != databases[1]:
        raise ConfigurationError(
            "DB_DIRECT_HOST and the pooler lead to different servers: set DB_DIRECT_HOST to the"
            " server behind the pooler"
        )
    paths[0].check(settings.db_schema)


async def _check_database(
    connection: AsyncConnection, settings: Settings, ring: KeyRing | None, problems: list[str]
) -> AsyncIterator[dict[str, Any]]:
    """Check the database. Yield fields of the HealthReport as soon as the fields are known.

    For each problem, append a text with advice to `problems`.
    """
    await connection.execute(
        text("SELECT set_config('statement_timeout', :timeout, false)"),
        {"timeout": str(round(settings.db_query_timeout * 1000))},
    )
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    # A pooler reports to its clients a process ID that differs from pg_backend_pid().
    if driver.get_server_pid() != await connection.scalar(text("SELECT pg_backend_pid()")):
        problems.append(
            "DB_DIRECT_HOST leads to a pooler: set DB_DIRECT_HOST to the PostgreSQL server"
            if settings.db_direct_host
            else "the connection leads to a pooler: set DB_POOLER=pgbouncer and DB_DIRECT_HOST"
        )
    version = text("SHOW server_version")
    yield {"server_version": await connection.scalar(version)}
    start = time.perf_counter()
    # The first call prepared the statement: the second call takes one round trip.
    await connection.scalar(version)
    yield {"latency_ms": round((time.perf_counter() - start) * 1000, 3)}
    state = await schema_state(connection)
    yield {"revision": state.current, "head": state.head}
    if state.problem:
        problems.append(state.problem)
        return
    async with AsyncSession(connection) as session:
        if (paused := await current_pause(session)) is not None:
            yield {"trading_pause": paused.as_json()}
    yield {"rows": await _estimate_rows(connection, sorted(TABLES))}
    months_ahead = await audit_months_ahead(connection)
    yield {"audit_months_ahead": months_ahead}
    partitions = grade_partitions(months_ahead)
    if partitions.status != "ok":
        problems.append(f"{partitions.seen}: {partitions.advice}")
    problems += await _run_optional(connection, "audit_logs_default", _check_default_partition)
    problems += await _run_optional(connection, "Citus", _check_citus)
    unreadable = await _check_decryption(connection, ring) if ring is not None else []
    problems += unreadable
    triggers = await check_triggers(connection)
    if triggers.status == "problem":
        problems.append(f"{triggers.seen}: {triggers.advice}")
    yield {"ready": not unreadable}  # overdue maintenance does not affect readiness


async def _estimate_rows(connection: AsyncConnection, tables: Sequence[str]) -> dict[str, int]:
    """Return the estimated number of rows of each table, including the table's partitions.

    The estimate for a table comes from the last ANALYZE of the table. If a table was never
    analyzed, the estimate comes from PostgreSQL's cumulative statistics.
    """
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
    return {name: estimate for name, estimate in rows}  # noqa: C416  # the loop names the two columns


async def _run_optional(
    connection: AsyncConnection,
    name: str,
    check: Callable[[AsyncConnection], Awaitable[list[str]]],
) -> list[str]:
    """Run a check in a savepoint. If the check fails, return a warning.

    A failed check of maintenance does not affect readiness.
    """
    try:
        async with connection.begin_nested():
            return await check(connection)
    except (DBAPIError, Conflict, QueryTimeout) as error:
        return [f"{name} was not checked: {explain(error)} (see `tiger-db doctor`)"]


async def _check_citus(connection: AsyncConnection) -> list[str]:
    citus = await check_citus(connection)
    return [] if citus.status == "ok" else [f"{citus.seen}: {citus.advice}"]


async def _check_default_partition(connection: AsyncConnection) -> list[str]:
    """Return a text with advice for each problem with audit events in the default partition.

    `tiger-db migrate` creates the partitions of the current month and the next months.
    `tiger-db migrate` also moves the audit events of these months out of the default partition.
    """
    movable, other = (
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
    if movable:
        problems.append(
            "audit_logs_default has events whose month has no partition: run `tiger-db migrate`"
        )
    if other:
        problems.append(
            "audit_logs_default has events dated before or long after this month:"
            " check the clocks of the machines that write events"
        )
    return problems


async def _check_decryption(connection: AsyncConnection, ring: KeyRing) -> list[str]:
    """Return a list with one problem if the key ring cannot decrypt the newest account."""
    async with AsyncSession(connection) as session:
        account = await session.scalar(
            select(TigerAccount).order_by(col(TigerAccount.id).desc()).limit(1)
        )
    if account is None:
        return []
    secret = account.tiger_id
    assert isinstance(secret, EncryptedSecret)  # the loaded secret is not decrypted yet
    try:
        decrypt(ring, secret.ciphertext, secret.aad, secret.owner, secret.bound)
    except EncryptionError as error:
        return [
            f"stored secrets cannot be decrypted: {error}: set ENCRYPTION_KEYS to its earlier value"
        ]
    return []

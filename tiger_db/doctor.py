"""One look at the database that tells what is wrong, and what to do about it.

Each check is one statement, in a transaction of its own that waits for nobody: what it may not see
or cannot see in time is a finding too, and the others go on. None reads a whole large table.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sqlalchemy import Row, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.database import AsyncSession, migration_engine
from tiger_db.encryption import KeyRing
from tiger_db.errors import Conflict, QueryTimeout, TigerDBError
from tiger_db.health import audit_months_ahead, explain, key_ring
from tiger_db.key_uses import key_uses
from tiger_db.migrations import schema_state
from tiger_db.settings import Settings

Status: TypeAlias = Literal["ok", "warning", "problem"]

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
# From where on it is a warning, and a problem.
CONNECTIONS = (0.8, 0.95)  # of max_connections
OPEN = (_MINUTE, 10 * _MINUTE)  # seconds of a transaction
BLOCKED = (1, 30)  # seconds
LAG, LAG_MIB = (10, 300), (256, 4096)  # seconds and MiB of a standby
SLOT_MIB = (0, 4096)  # held for a reader that is not there
AGE = (2**29, 2**30)  # transactions, of the 2**31 at which PostgreSQL would have stopped
UNSEALED = (_HOUR, _DAY)
OVERDUE = (5 * _MINUTE, _HOUR)  # refreshes, by seconds
STALE = (_HOUR, _DAY)  # tokens, by seconds after their time of refresh
_LIMITS = text(
    "SELECT set_config('statement_timeout', '5s', true), set_config('lock_timeout', '1s', true)"
)
_SHOWN = 3  # of each kind


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen, how bad it is, and what to do about it; None: nothing."""

    check: str
    status: Status
    seen: str
    advice: str | None = None


async def doctor(settings: Settings) -> list[Finding]:
    """Look at everything, change and start nothing.

    Raises:
        ConfigurationError: the encryption keys are malformed.
    """
    if settings.embedded:
        from tiger_db import embedded  # noqa: PLC0415  # needs POSIX and an extra

        if await asyncio.to_thread(embedded.running, settings) is None:
            seen = f"{settings.place} is not running"
            return [Finding("server", "problem", seen, "run `tiger-db start-embedded`")]
    findings: list[Finding] = []
    try:
        async with migration_engine(settings) as engine, engine.connect() as connection:
            for name, check in _SERVER.items():
                findings.append(await _checked(connection, name, check))
            findings.append(schema := await _checked(connection, "schema", _schema))
            if schema.status == "ok":
                for name, check in _TABLES.items():
                    findings.append(await _checked(connection, name, check))
                findings.append(await _encryption_keys(connection, settings))
    except (TigerDBError, OSError) as error:
        findings.append(Finding("server", "problem", explain(error) or type(error).__name__))
    return findings


Found: TypeAlias = tuple[Status, str, str | None]
Check: TypeAlias = Callable[[AsyncConnection], Awaitable[Found]]


async def _checked(connection: AsyncConnection, name: str, check: Check) -> Finding:
    try:
        async with connection.begin():
            await connection.execute(_LIMITS)
            return Finding(name, *await check(connection))
    except (DBAPIError, Conflict, QueryTimeout) as error:
        return Finding(name, "warning", f"not seen: {explain(error)}", _unseen(error))


def _unseen(error: Exception) -> str:
    if isinstance(error, Conflict | QueryTimeout):
        return "run it again; see the blocked sessions and the longest transaction"
    if isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == "42501":
        return "GRANT this role what it lacks, or run it as the owner of the tables"
    return "see `tiger-db check`"


async def _rows(connection: AsyncConnection, statement: str) -> Sequence[Row[Any]]:
    return (await connection.execute(text(statement))).all()


def _grade(value: float, bounds: tuple[float, float]) -> Status:
    warning, problem = bounds
    return "problem" if value >= problem else "warning" if value >= warning else "ok"


def _long(seconds: float) -> str:
    for unit, length in (("d", _DAY), ("h", _HOUR), ("min", _MINUTE)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"


def _some(items: Sequence[str]) -> str:
    more = len(items) - _SHOWN
    return "; ".join(items[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


_GRANT = "to see them, GRANT pg_monitor TO this role"


# --- the server ---------------------------------------------------------------------------------

# What another role's session does is hidden from whoever lacks pg_monitor.
_CONNECTIONS = """
SELECT coalesce(state, 'hidden') AS state,
    count(*) FILTER (WHERE starts_with(application_name, 'tiger_db')
        AND datname = current_database()) AS ours,
    sum(count(*)) OVER () AS used, current_setting('max_connections')::int AS most
FROM pg_stat_activity
WHERE datid IS NOT NULL AND coalesce(backend_type, 'client backend') = 'client backend'
GROUP BY 1 ORDER BY 1
"""


async def _connections(connection: AsyncConnection) -> Found:
    rows = await _rows(connection, _CONNECTIONS)
    used, most = int(rows[0].used), rows[0].most
    ours = ", ".join(f"{row.ours} {row.state}" for row in rows if row.ours)
    return (
        _grade(used / most, CONNECTIONS),
        f"{used} of {most} connections; of tiger_db, this one included: {ours or 'none'}",
        "lower DB_POOL_SIZE and DB_MAX_OVERFLOW, use a pooler, or raise max_connections"
        if used / most >= CONNECTIONS[0]
        else None,
    )


_TRANSACTIONS = """
SELECT pid, application_name AS name, state,
    extract(epoch FROM clock_timestamp() - xact_start)::float AS age,
    count(*) FILTER (WHERE query = '<insufficient privilege>') OVER () AS hidden
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND coalesce(backend_type, 'client backend') = 'client backend'
ORDER BY xact_start NULLS LAST LIMIT 1
"""


async def _transactions(connection: AsyncConnection) -> Found:
    rows = await _rows(connection, _TRANSACTIONS)
    if not rows or (rows[0].age is None and not rows[0].hidden):
        return "ok", "none is open", None
    row = rows[0]
    hidden = f"{row.hidden} sessions are hidden from this role"
    if row.age is None:
        return "warning", hidden, _GRANT
    seen = f"{_long(row.age)} by pid {row.pid} ({row.name or 'unnamed'}, {row.state})"
    status = _grade(row.age, OPEN)
    if status != "ok":
        return (
            status,
            seen,
            f"it keeps locks and dead rows: end it with SELECT pg_terminate_backend({row.pid})",
        )
    return ("warning", f"{seen}; {hidden}", _GRANT) if row.hidden else ("ok", seen, None)


_BLOCKED = """
SELECT l.pid, a.application_name AS name,
    extract(epoch FROM clock_timestamp() - coalesce(l.since, a.query_start))::float AS seconds,
    b.pid AS by, b.application_name AS by_name, coalesce(b.state, 'hidden') AS by_state,
    array_length(pg_blocking_pids(b.pid), 1) IS NULL AS first
FROM (SELECT pid, min(waitstart) AS since FROM pg_locks WHERE NOT granted GROUP BY pid) AS l
JOIN pg_stat_activity a ON a.pid = l.pid AND a.datname = current_database()
CROSS JOIN LATERAL (SELECT DISTINCT unnest(pg_blocking_pids(l.pid)) AS pid) AS blocker
JOIN pg_stat_activity b ON b.pid = blocker.pid
ORDER BY seconds DESC NULLS LAST, l.pid, first DESC
"""


async def _blocked(connection: AsyncConnection) -> Found:
    rows = await _rows(connection, _BLOCKED)
    if not rows:
        return "ok", "none", None
    seen = _some(
        [
            f"pid {row.pid} ({row.name or 'unnamed'}) waits {_long(row.seconds or 0)}"
            f" for pid {row.by} ({row.by_name or 'unnamed'}, {row.by_state})"
            for row in rows
        ]
    )
    status = _grade(rows[0].seconds or 0, BLOCKED)
    # Who waits for nobody holds up all the others.
    root = next((row.by for row in rows if row.first), rows[0].by)
    return (
        status,
        seen,
        None if status == "ok" else f"end the one in front: SELECT pg_terminate_backend({root})",
    )


_REPLICATION = """
SELECT coalesce(application_name, 'unnamed') AS name, state,
    extract(epoch FROM replay_lag)::float AS lag,
    pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
        ELSE pg_current_wal_lsn() END, replay_lsn)::float / 1048576 AS mib
FROM pg_stat_replication ORDER BY lag DESC NULLS LAST, mib DESC NULLS LAST
"""


async def _replication(connection: AsyncConnection) -> Found:
    rows = await _rows(connection, _REPLICATION)
    if not rows:
        return "ok", "no standby", None
    if any(row.state is None for row in rows):
        return "warning", f"{len(rows)} standbys, hidden from this role", _GRANT
    seen = _some(
        [
            f"{row.name} is {row.state}, {_long(row.lag or 0)} and {row.mib or 0:.0f} MiB behind"
            for row in rows
        ]
    )
    lag, mib = (max(row[n] or 0 for row in rows) for n in (2, 3))
    status = max(_grade(lag, LAG), _grade(mib, LAG_MIB), key=_RANK.index)
    return (
        status,
        seen,
        None
        if status == "ok"
        else "look at the standby's load, network and long queries; readers see old rows",
    )


_RANK: tuple[Status, ...] = ("ok", "warning", "problem")

_SLOTS = """
SELECT slot_name AS name, wal_status AS status,
    pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
        ELSE pg_current_wal_lsn() END, restart_lsn)::float / 1048576 AS mib
FROM pg_replication_slots WHERE NOT active ORDER BY mib DESC NULLS LAST
"""


async def _slots(connection: AsyncConnection) -> Found:
    rows = await _rows(connection, _SLOTS)
    if not rows:
        return "ok", "none is unused", None
    return (
        _grade(rows[0].mib or 0, SLOT_MIB),
        _some([f"nobody reads {row.name}, which holds {row.mib or 0:.0f} MiB" for row in rows]),
        "start its reader, or pg_drop_replication_slot it before the disk is full",
    )


_AGE = """
SELECT greatest(age(datfrozenxid), mxid_age(datminmxid)) AS age FROM pg_database
WHERE datname = current_database()
"""


async def _wraparound(connection: AsyncConnection) -> Found:
    age = (await _rows(connection, _AGE))[0].age
    status = _grade(age, AGE)
    return (
        status,
        f"the oldest transaction id is {age:,} of {2**31:,} old",
        None
        if status == "ok"
        else "VACUUM FREEZE the database; see the longest transaction and unused slots",
    )


_DEAD = """
SELECT relname AS name, n_dead_tup AS dead, n_dead_tup::float / (n_live_tup + n_dead_tup) AS share,
    to_char(greatest(last_autovacuum, last_vacuum) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI"Z"')
        AS vacuumed
FROM pg_stat_user_tables WHERE n_dead_tup > 0 ORDER BY n_dead_tup DESC
"""
_FEW, _SHARE = 1000, 0.3  # autovacuum comes at a fifth of the live rows


async def _dead_rows(connection: AsyncConnection) -> Found:
    rows = await _rows(connection, _DEAD)
    bad = [row for row in rows if row.dead >= _FEW and row.share >= _SHARE]
    seen = _some(
        [
            f"{row.name} {row.share:.0%} ({row.dead:,}), vacuumed {row.vacuumed or 'never'}"
            for row in bad or rows
        ]
    )
    if not bad:
        return "ok", seen or "none", None
    return "warning", seen, f"VACUUM {bad[0].name}; see the longest transaction and autovacuum"


# The index of a partition counts for that of the whole table.
_UNUSED = """
SELECT i.indexrelid::regclass::text AS name, sum(pg_relation_size(s.indexrelid)) AS size,
    (SELECT to_char(coalesce(stats_reset, pg_postmaster_start_time()) AT TIME ZONE 'UTC',
        'YYYY-MM-DD HH24:MI"Z"') FROM pg_stat_database WHERE datname = current_database()) AS since
FROM pg_stat_user_indexes s
CROSS JOIN LATERAL (SELECT coalesce((SELECT max(relid::oid) FROM
    pg_partition_ancestors(s.indexrelid) AS relid
    WHERE NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = relid)), s.indexrelid) AS top) AS t
JOIN pg_index i ON i.indexrelid = t.top
WHERE NOT i.indisunique AND i.indisvalid
    AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = i.indexrelid)
GROUP BY 1 HAVING sum(s.idx_scan) = 0 AND sum(pg_relation_size(s.indexrelid)) >= 1048576
ORDER BY 2 DESC
"""


async def _unused_indexes(connection: AsyncConnection) -> Found:
    rows = await _rows(connection, _UNUSED)
    if not rows:
        return "ok", "none of a MiB or more", None
    return (
        "warning",
        f"since {rows[0].since}: "
        + _some([f"{row.name} ({row.size / 1048576:.0f} MiB)" for row in rows]),
        f"if standbys and rare reports do not need it: DROP INDEX CONCURRENTLY {rows[0].name}",
    )


_INVALID = """
SELECT i.indexrelid::regclass::text AS name, i.indisunique AS "unique" FROM pg_index i
WHERE NOT (i.indisvalid AND i.indisready)
    AND i.indexrelid NOT IN (SELECT index_relid FROM pg_stat_progress_create_index)
ORDER BY 2 DESC, 1
"""


async def _invalid_indexes(connection: AsyncConnection) -> Found:
    rows = await _rows(connection, _INVALID)
    if not rows:
        return "ok", "none", None
    return (
        "problem",
        _some([f"{row.name}{' (unique)' if row.unique else ''}" for row in rows]),
        f"its making failed: REINDEX INDEX CONCURRENTLY {rows[0].name}, or drop it",
    )


# --- tiger_db's tables --------------------------------------------------------------------------


async def _schema(connection: AsyncConnection) -> Found:
    state = await schema_state(connection)
    if state.problem is None:
        return "ok", f"revision {state.current}, the newest", None
    seen, _, advice = state.problem.partition(": ")
    return "problem", seen, advice


async def _partitions(connection: AsyncConnection) -> Found:
    ahead = await audit_months_ahead(connection)
    status = _grade(-(ahead or 0), (-1, 0))
    return (
        status,
        f"the audit trail has partitions for {ahead} months ahead",
        None if status == "ok" else "run `tiger-db maintain-audit` every day",
    )


# Of the oldest events a thousand places are looked at: ix_audit_logs_position finds their pages.
UNSEALED_EVENTS = """
SELECT taken - upto AS events, seals, extract(epoch FROM clock_timestamp() - (
    SELECT min(created_at) FROM audit_logs WHERE position > upto AND position <= upto + 1000
))::float AS age
FROM (SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS taken FROM audit_logs_position_seq)
    AS t,
    (SELECT coalesce(max((statement::json ->> 'upto')::bigint), 0) AS upto, count(*) AS seals
    FROM (SELECT statement FROM audit_seals ORDER BY number DESC LIMIT 1) AS s) AS last
"""


async def _unsealed(connection: AsyncConnection) -> Found:
    row = (await _rows(connection, UNSEALED_EVENTS))[0]
    if row.age is None:
        return "ok", "none", None
    status = _grade(row.age, UNSEALED)
    if status == "problem" and not row.seals:
        status = "warning"  # that it was never sealed may be meant so
    return (
        status,
        f"{row.events:,} events at most, the oldest of {_long(row.age)} ago",
        None if status == "ok" else "run `tiger-db seal-audit` every minute",
    )


# Two partial indexes hold the open ones; OFFSET 0: their accounts are looked up one by one.
OPEN_REFRESHES = """
SELECT count(*) FILTER (WHERE status = 'pending') AS waiting,
    count(*) FILTER (WHERE status = 'in_progress' AND lease_expires_at < now()) AS abandoned,
    extract(epoch FROM now() - min(CASE WHEN status = 'pending' THEN scheduled_at
        WHEN lease_expires_at < now() THEN lease_expires_at END))::float AS age
FROM token_statuses t
WHERE status IN ('pending', 'in_progress') AND scheduled_at <= now()
    AND EXISTS (SELECT FROM tiger_accounts a WHERE a.id = tiger_account_id AND a.status = 'active'
        OFFSET 0)
"""


async def _refreshes(connection: AsyncConnection) -> Found:
    row = (await _rows(connection, OPEN_REFRESHES))[0]
    if row.age is None:
        return "ok", "none is overdue", None
    status = _grade(row.age, OVERDUE)
    return (
        status,
        f"{row.waiting} are due, {row.abandoned} have lost their worker, for {_long(row.age)}",
        None if status == "ok" else "are there enough of `tiger-db run-refreshes`?",
    )


# ix_tiger_accounts_token_refresh_at has the order; one whose refresh was given up is no surprise.
DUE_TOKENS = """
SELECT count(*) AS accounts, count(*) FILTER (WHERE token_expires_at <= now()) AS expired,
    extract(epoch FROM now() - min(token_refresh_at))::float AS age
FROM tiger_accounts
WHERE status = 'active' AND access_token IS NOT NULL AND token_refresh_at <= now()
"""


async def _tokens(connection: AsyncConnection) -> Found:
    row = (await _rows(connection, DUE_TOKENS))[0]
    if not row.accounts:
        return "ok", "all are fresh", None
    status: Status = "problem" if row.expired else _grade(row.age, STALE)
    return (
        status,
        f"{row.accounts} are due for a refresh, for {_long(row.age)}; {row.expired} have expired",
        None
        if status == "ok"
        else "see `tiger-db show-refreshes`; is `tiger-db run-refreshes` running?",
    )


# ix_api_keys_expires_at_id
EXPIRING_KEYS = """
SELECT key_prefix, extract(epoch FROM expires_at - now())::float AS left, count(*) OVER () AS keys
FROM api_keys
WHERE status = 'active' AND expires_at > now() AND expires_at <= now() + interval '7 days'
ORDER BY expires_at LIMIT 1
"""


async def _api_keys(connection: AsyncConnection) -> Found:
    rows = await _rows(connection, EXPIRING_KEYS)
    if not rows:
        return "ok", "none expires within 7 days", None
    row = rows[0]
    return (
        "warning",
        f"{row.keys} expire within 7 days, {row.key_prefix} in {_long(row.left)}",
        "see `tiger-db list-expiring-api-keys`; `extend-api-key` or `rotate-api-key` them",
    )


async def _encryption_keys(connection: AsyncConnection, settings: Settings) -> Finding:
    try:
        ring = await asyncio.to_thread(key_ring, settings)
    except TigerDBError as error:
        return Finding("encryption keys", "problem", str(error), "set ENCRYPTION_KEYS as it was")

    async def look(connection: AsyncConnection) -> Found:
        return await _key_uses(connection, ring)

    return await _checked(connection, "encryption keys", look)


async def _key_uses(connection: AsyncConnection, ring: KeyRing) -> Found:
    async with AsyncSession(connection) as session:
        uses = await key_uses(session)
    seen = ", ".join(f"{use.key_id}: {use.rows:,} rows of {use.table}" for use in uses)
    needed = {use.key_id for use in uses}
    if missing := sorted(needed - {*ring.key_ids}):
        return "problem", seen, f"nobody can read these: put {', '.join(missing)} back"
    if old := sorted(needed - {ring.key_ids[0]}):
        return "warning", seen, f"run `tiger-db rotate-encryption-key`; until then keep {old[0]}"
    return "ok", seen or "none is in use", None


_SERVER: dict[str, Check] = {
    "connections": _connections,
    "longest transaction": _transactions,
    "blocked sessions": _blocked,
    "replication": _replication,
    "replication slots": _slots,
    "wraparound": _wraparound,
    "dead rows": _dead_rows,
    "unused indexes": _unused_indexes,
    "invalid indexes": _invalid_indexes,
}
_TABLES: dict[str, Check] = {
    "audit partitions": _partitions,
    "unsealed events": _unsealed,
    "refreshes": _refreshes,
    "tokens": _tokens,
    "API keys": _api_keys,
}

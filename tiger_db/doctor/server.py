"""Checks of the server and its sessions: whose tables it holds makes no difference."""

from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.connections import connect
from tiger_db.doctor.findings import (
    GRANT,
    MINUTE,
    Check,
    Finding,
    Found,
    Status,
    ask,
    checked,
    grade,
    lasting,
)
from tiger_db.errors import TigerDBError
from tiger_db.health import explain, some
from tiger_db.migrations import SEARCH_PATH, SearchPath
from tiger_db.settings import Settings, quote_identifier

# From where on it is a warning, and a problem.
CONNECTIONS = (0.8, 0.95)  # of max_connections
OPEN = (MINUTE, 10 * MINUTE)  # seconds of a transaction
BLOCKED = (1, 30)  # seconds
LAG, LAG_MIB = (10, 300), (256, 4096)  # seconds and MiB of a standby
SLOT_MIB = (0, 4096)  # held for a reader that is not there
AGE = (2**29, 2**30)  # transactions, of the 2**31 at which PostgreSQL would have stopped


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
    rows = await ask(connection, _CONNECTIONS)
    used, most = int(rows[0].used), rows[0].most
    ours = ", ".join(f"{row.ours} {row.state}" for row in rows if row.ours)
    return (
        grade(used / most, CONNECTIONS),
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
    rows = await ask(connection, _TRANSACTIONS)
    if not rows or (rows[0].age is None and not rows[0].hidden):
        return "ok", "none is open", None
    row = rows[0]
    hidden = f"{row.hidden} sessions are hidden from this role"
    if row.age is None:
        return "warning", hidden, GRANT
    seen = f"{lasting(row.age)} by pid {row.pid} ({row.name or 'unnamed'}, {row.state})"
    status = grade(row.age, OPEN)
    if status != "ok":
        return (
            status,
            seen,
            f"it keeps locks and dead rows: end it with SELECT pg_terminate_backend({row.pid})",
        )
    return ("warning", f"{seen}; {hidden}", GRANT) if row.hidden else ("ok", seen, None)


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
    rows = await ask(connection, _BLOCKED)
    if not rows:
        return "ok", "none", None
    seen = some(
        [
            f"pid {row.pid} ({row.name or 'unnamed'}) waits {lasting(row.seconds or 0)}"
            f" for pid {row.by} ({row.by_name or 'unnamed'}, {row.by_state})"
            for row in rows
        ]
    )
    status = grade(rows[0].seconds or 0, BLOCKED)
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
    rows = await ask(connection, _REPLICATION)
    if not rows:
        return "ok", "no standby", None
    if any(row.state is None for row in rows):
        return "warning", f"{len(rows)} standbys, hidden from this role", GRANT
    seen = some(
        [
            f"{row.name} is {row.state}, {lasting(row.lag or 0)} and {row.mib or 0:.0f} MiB behind"
            for row in rows
        ]
    )
    lag, mib = (max(row[n] or 0 for row in rows) for n in (2, 3))
    status = max(grade(lag, LAG), grade(mib, LAG_MIB), key=_RANK.index)
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
    rows = await ask(connection, _SLOTS)
    if not rows:
        return "ok", "none is unused", None
    return (
        grade(rows[0].mib or 0, SLOT_MIB),
        some([f"nobody reads {row.name}, which holds {row.mib or 0:.0f} MiB" for row in rows]),
        "start its reader, or pg_drop_replication_slot it before the disk is full",
    )


_AGE = """
SELECT greatest(age(datfrozenxid), mxid_age(datminmxid)) AS age FROM pg_database
WHERE datname = current_database()
"""


async def _wraparound(connection: AsyncConnection) -> Found:
    age = (await ask(connection, _AGE))[0].age
    status = grade(age, AGE)
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
    rows = await ask(connection, _DEAD)
    bad = [row for row in rows if row.dead >= _FEW and row.share >= _SHARE]
    seen = some(
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
    rows = await ask(connection, _UNUSED)
    if not rows:
        return "ok", "none of a MiB or more", None
    return (
        "warning",
        f"since {rows[0].since}: "
        + some([f"{row.name} ({row.size / 1048576:.0f} MiB)" for row in rows]),
        f"if standbys and rare reports do not need it: DROP INDEX CONCURRENTLY {rows[0].name}",
    )


_INVALID = """
SELECT i.indexrelid::regclass::text AS name, i.indisunique AS "unique" FROM pg_index i
WHERE NOT (i.indisvalid AND i.indisready)
    AND i.indexrelid NOT IN (SELECT index_relid FROM pg_stat_progress_create_index)
ORDER BY 2 DESC, 1
"""


async def _invalid_indexes(connection: AsyncConnection) -> Found:
    rows = await ask(connection, _INVALID)
    if not rows:
        return "ok", "none", None
    return (
        "problem",
        some([f"{row.name}{' (unique)' if row.unique else ''}" for row in rows]),
        f"its making failed: REINDEX INDEX CONCURRENTLY {rows[0].name}, or drop it",
    )


CHECKS: dict[str, Check] = {
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


async def search_path(direct: AsyncConnection, settings: Settings) -> Finding:
    """Compare the search path of sessions with the one that tiger_db needs.

    Behind a pooler, which refuses or drops what a session would set when it starts, that is the
    setting of the role or of the database.
    """

    async def look(connection: AsyncConnection) -> Found:
        row = (await connection.exec_driver_sql(SEARCH_PATH)).one()
        return _judge(SearchPath._make(row), settings)

    if not settings.pooled:
        return await checked(direct, "search path", look)
    try:
        connection = await connect(settings)
        try:
            row = await connection.fetchrow(SEARCH_PATH)
        finally:
            connection.terminate()
    except (TigerDBError, OSError) as error:
        return Finding("search path", "problem", explain(error) or type(error).__name__)
    assert row is not None
    return Finding("search path", *_judge(SearchPath._make(row), settings))


def _judge(path: SearchPath, settings: Settings) -> Found:
    schema, advice = settings.db_schema, f"run {path.repair_sql(settings.db_schema)}"
    if settings.pooled:
        advice += "; then RECONNECT on the pooler's console"
    if not path.resolves_to(schema):
        seen = f"{path.setting}, which does not lead to {quote_identifier(schema)} (DB_SCHEMA)"
        return "problem", seen, advice
    # Quoted as settings has it, or as PostgreSQL writes what ALTER ROLE has set.
    if path.setting.removeprefix("pg_catalog, ") in (settings.search_path, f"{schema}, pg_temp"):
        return "ok", path.setting, None
    seen = f"{path.setting}: another schema or a temporary table may come before DB_SCHEMA"
    return "warning", seen, advice

"""Checks of what tiger_db keeps: its tables, and the keys that their rows need."""

import asyncio

from sqlalchemy.ext.asyncio import AsyncConnection

from tiger_db.database import AsyncSession
from tiger_db.doctor.findings import (
    DAY,
    HOUR,
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
from tiger_db.encryption import KeyRing
from tiger_db.errors import TigerDBError
from tiger_db.health import audit_months_ahead, key_ring, some
from tiger_db.key_uses import key_uses
from tiger_db.migrations.comparison import find_differences
from tiger_db.settings import Settings

# From where on it is a warning, and a problem.
UNSEALED = (HOUR, DAY)
OVERDUE = (5 * MINUTE, HOUR)  # refreshes, by seconds
STALE = (HOUR, DAY)  # tokens, by seconds after their time of refresh


async def _changed(connection: AsyncConnection) -> Found:
    differences = await find_differences(connection)
    changed = [one.description for one in differences if not one.undeclared]
    added = [one for one in differences if one.undeclared]
    seen = some([*changed, *(one.description for one in added)])
    if changed:
        return "problem", seen, "run the SQL that `tiger-db check` gives; find out who it was"
    if added:
        # It can change or refuse what is written, a revocation for one.
        return "warning", seen, added[0].repair
    return "ok", "all are as tiger_db makes them", None


async def _partitions(connection: AsyncConnection) -> Found:
    ahead = await audit_months_ahead(connection)
    status = grade(-(ahead or 0), (-1, 0))
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
    row = (await ask(connection, UNSEALED_EVENTS))[0]
    if row.age is None:
        return "ok", "none", None
    status = grade(row.age, UNSEALED)
    if status == "problem" and not row.seals:
        status = "warning"  # that it was never sealed may be meant so
    return (
        status,
        f"{row.events:,} events at most, the oldest of {lasting(row.age)} ago",
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
    row = (await ask(connection, OPEN_REFRESHES))[0]
    if row.age is None:
        return "ok", "none is overdue", None
    status = grade(row.age, OVERDUE)
    return (
        status,
        f"{row.waiting} are due, {row.abandoned} have lost their worker, for {lasting(row.age)}",
        None if status == "ok" else "are there enough of `tiger-db run-refresh-worker`?",
    )


# ix_tiger_accounts_token_refresh_at has the order; one whose refresh was given up is no surprise.
DUE_TOKENS = """
SELECT count(*) AS accounts, count(*) FILTER (WHERE token_expires_at <= now()) AS expired,
    extract(epoch FROM now() - min(token_refresh_at))::float AS age
FROM tiger_accounts
WHERE status = 'active' AND access_token IS NOT NULL AND token_refresh_at <= now()
"""


async def _tokens(connection: AsyncConnection) -> Found:
    row = (await ask(connection, DUE_TOKENS))[0]
    if not row.accounts:
        return "ok", "all are fresh", None
    status: Status = "problem" if row.expired else grade(row.age, STALE)
    return (
        status,
        f"{row.accounts} are due for a refresh, for {lasting(row.age)}; {row.expired} have expired",
        None
        if status == "ok"
        else "see `tiger-db watch-refreshes`; is `tiger-db run-refresh-worker` running?",
    )


# ix_api_keys_expires_at_id
EXPIRING_KEYS = """
SELECT key_prefix, extract(epoch FROM expires_at - now())::float AS left, count(*) OVER () AS keys
FROM api_keys
WHERE status = 'active' AND expires_at > now() AND expires_at <= now() + interval '7 days'
ORDER BY expires_at LIMIT 1
"""


async def _api_keys(connection: AsyncConnection) -> Found:
    rows = await ask(connection, EXPIRING_KEYS)
    if not rows:
        return "ok", "none expires within 7 days", None
    row = rows[0]
    return (
        "warning",
        f"{row.keys} expire within 7 days, {row.key_prefix} in {lasting(row.left)}",
        "see `tiger-db list-expiring-api-keys`; `extend-api-key` or `rotate-api-key` them",
    )


CHECKS: dict[str, Check] = {
    "triggers and functions": _changed,
    "audit partitions": _partitions,
    "unsealed events": _unsealed,
    "refreshes": _refreshes,
    "tokens": _tokens,
    "API keys": _api_keys,
}


# Of few rows beside the others: no index is for this alone.
UNPEPPERED_KEYS = """
SELECT array_agg(key_prefix ORDER BY id) AS prefixes,
    (clock_timestamp() AT TIME ZONE 'UTC')::date AS today
FROM api_keys
WHERE status = 'active' AND coalesce(expires_at > now(), true) AND pepper_id IS NULL
"""


async def api_key_hashes(connection: AsyncConnection, settings: Settings) -> Finding:
    """Find the active keys whose hashes have no pepper."""
    until = settings.api_keys_allow_unpeppered_until

    async def look(connection: AsyncConnection) -> Found:
        row = (await ask(connection, UNPEPPERED_KEYS))[0]
        if row.prefixes is None:
            return "ok", "all active keys have hashes with a pepper", None
        seen = f"{len(row.prefixes)} active keys have hashes without a pepper"
        seen = f"{seen}: {some(row.prefixes)}"
        advice = "revoke those that you did not make, `rotate-api-key` the others"
        if until is not None and row.today <= until:
            seen += f"; accepted until the end of {until} (UTC)"
            return (
                "warning",
                seen,
                f"{advice} unless they are used by then: a use replaces the hash",
            )
        setting = "API_KEYS_ALLOW_UNPEPPERED_UNTIL"
        return "problem", f"{seen}; refused", f"{advice}, or set {setting} to a day"

    return await checked(connection, "API key hashes", look)


async def encryption_keys(connection: AsyncConnection, settings: Settings) -> Finding:
    try:
        ring = await asyncio.to_thread(key_ring, settings)
    except TigerDBError as error:
        return Finding("encryption keys", "problem", str(error), "set ENCRYPTION_KEYS as it was")

    async def look(connection: AsyncConnection) -> Found:
        return await _key_uses(connection, ring)

    return await checked(connection, "encryption keys", look)


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

"""Time that passes for stored rows.

PostgreSQL's clock decides when a key expires, a limit ends, a lease expires and a token is due, and
Python's clock answers the properties of loaded objects. A test cannot move both clocks, and
tiger_db has no setting that moves one. Therefore, `let_time_pass` moves the stored times instead.
"""

from datetime import timedelta

from sqlalchemy import select, text

from tiger_db.crud.api_key_codes import (
    CodeState,
    check_code,
    compute_code,
    optional_peppers,
    signed_values,
)
from tiger_db.crud.common import FRESH
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidValue
from tiger_db.models import APIKey

# The columns of times of all tables, but for the audit trail, whose seals would no longer verify,
# for the counts of API keys, and for generated columns.
_TABLES = r"""
SELECT format('%I.%I', n.nspname, c.relname) AS name,
    string_agg(format('%1$I = %1$I - CAST(\:by AS interval)', a.attname), ', ') AS changes
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition
    AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
    AND a.atttypid = 'timestamptz'::regtype AND a.attgenerated = ''
    AND NOT (n.nspname = current_schema() AND c.relname IN
        ('api_key_limits', 'api_key_usage', 'audit_logs', 'audit_seals'))
GROUP BY 1
"""
# A limit counts the uses since the start of a clock hour or day. It begins anew if a clock hour or
# day would begin in the time that passes.
_LIMITS = """
UPDATE api_key_limits SET
    hour = hour - (date_trunc('hour', now + CAST(:by AS interval), 'UTC')
        - date_trunc('hour', now, 'UTC')),
    day = day - (date_trunc('day', now + CAST(:by AS interval), 'UTC')
        - date_trunc('day', now, 'UTC'))
FROM clock_timestamp() AS now
"""
# The triggers that notify are off. The channels are those of `Settings.channel`.
_NOTIFY = """
SELECT pg_notify(concat(channel, '_' || left(encode(sha256(convert_to(
    nullif(current_schema(), 'public'), 'UTF8')), 'hex'), 16)), payload)
FROM (VALUES ('tiger_db_api_keys', 'all'), ('tiger_db_refreshes', '')) AS sent (channel, payload)
"""
_SIGN = text("UPDATE api_keys SET mac = :code WHERE id = :id")


async def let_time_pass(session: AsyncSession, duration: timedelta) -> None:
    """Move all stored times into the past, as if `duration` had passed since they were stored.

    Then an API key or a token that expires within `duration` has expired, a lease or a retry is
    due, and a limit of a clock hour or day begins anew if one would begin. The tables of the
    application are moved, too. Not moved are audit events, seals, usage statistics and ids. The
    objects of the session are read again. Other sessions, a `KeyVerifier` and a `RefreshWorker` see
    the change after the commit. The role must be allowed to turn off triggers, as a superuser is.

    Raises:
        InvalidValue: `duration` is negative.
    """
    if duration < timedelta(0):
        raise InvalidValue("time cannot pass backwards: the duration is negative")
    await session.flush()
    # The authentication code of an API key covers its expiry. A wrong code stays wrong.
    peppers = optional_peppers(session.info)
    signed = [
        key.id
        for key in await _fetch_keys(session)
        if check_code(peppers, signed_values(key), key.mac) is CodeState.VALID
    ]
    await session.execute(text("SET LOCAL session_replication_role = replica"))
    for name, changes in (await session.execute(text(_TABLES))).all():
        await session.execute(text(f"UPDATE {name} SET {changes}"), {"by": duration})  # noqa: S608  # quoted by PostgreSQL
    await session.execute(text(_LIMITS), {"by": duration})
    for key in await _fetch_keys(session):
        if peppers is not None and key.id in signed:
            code = compute_code(peppers, signed_values(key))
            await session.execute(_SIGN, {"id": key.id, "code": code})
    await session.execute(text("SET LOCAL session_replication_role = origin"))
    await session.execute(text(_NOTIFY))
    for loaded in list(session):
        await session.refresh(loaded)


async def _fetch_keys(session: AsyncSession) -> list[APIKey]:
    return list(await session.scalars(select(APIKey), execution_options=FRESH))

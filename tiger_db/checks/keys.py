"""Checks of API keys, peppers and encryption keys."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import class_mapper

from tiger_db.checks import Outcome, duration, fetch_all, join_first
from tiger_db.crud.api_keys.signing import find_invalid_codes
from tiger_db.database import AsyncSession
from tiger_db.encryption import BOUND_MARK
from tiger_db.encryption_key_rotation import find_unnormalized_secrets, list_encryption_key_usage
from tiger_db.errors import TigerDBError
from tiger_db.keys_in_force import (
    API_KEY_PEPPERS,
    ENCRYPTION_KEYS,
    KeySetting,
    required_key_ring,
    required_peppers,
)
from tiger_db.models import SECRET_COLUMNS, TigerAccount
from tiger_db.settings import Settings

T = TypeVar("T")


_MAY_READ_SECRETS = text("""
SELECT bool_or(has_column_privilege(attrelid, attnum, 'SELECT')) FROM pg_attribute
WHERE attrelid = to_regclass(:table) AND attname = ANY (CAST(:columns AS text[]))
""")


def unless_unreadable(
    table: str, check: Callable[[AsyncConnection, Settings], Awaitable[Outcome]], settings: Settings
) -> Callable[[AsyncConnection], Awaitable[Outcome]]:
    """Return a check that passes if the current role may read no secret of the table.

    An auditor or a sealer, for example, needs neither encryption keys nor peppers.
    """
    columns = {"table": table, "columns": sorted(SECRET_COLUMNS[table])}

    async def check_if_readable(connection: AsyncConnection) -> Outcome:
        if await connection.scalar(_MAY_READ_SECRETS, columns):
            return await check(connection, settings)
        seen = f"not needed: this role may not read the secrets in the table {table}"
        return Outcome("ok", seen)

    return check_if_readable


def _unusable(error: TigerDBError, keys: KeySetting[T]) -> Outcome:
    """Return the outcome of a check whose secret keys are missing, malformed or unreadable."""
    return Outcome("problem", str(error).removesuffix(f": {keys.advice}"), keys.advice)


# For EXPIRING_KEYS, PostgreSQL reads the index ix_api_keys_expires_at_id.
EXPIRING_KEYS = """
SELECT key_prefix, extract(epoch FROM expires_at - now())::float AS left, count(*) OVER () AS keys
FROM api_keys
WHERE status = 'active' AND expires_at > now() AND expires_at <= now() + interval '7 days'
ORDER BY expires_at LIMIT 1
"""


async def check_api_keys(connection: AsyncConnection) -> Outcome:
    rows = await fetch_all(connection, EXPIRING_KEYS)
    if not rows:
        return Outcome("ok", "no API key expires within 7 days")
    row = rows[0]
    return Outcome(
        "warning",
        f"API keys that expire within 7 days: {row.keys}, the first ({row.key_prefix}) in"
        f" {duration(row.left)}",
        "list the API keys with `tiger-db list-expiring-api-keys`; give each key a later expiry"
        " with `tiger-db update-api-key`, or rotate the key",
    )


# _UNPEPPERED_KEYS scans the whole table api_keys, because the table is small, and no other query
# needs an index of API keys without a pepper.
_UNPEPPERED_KEYS = """
SELECT array_agg(key_prefix ORDER BY id) AS prefixes,
    (clock_timestamp() AT TIME ZONE 'UTC')::date AS today
FROM api_keys
WHERE status = 'active' AND coalesce(expires_at > now(), true) AND pepper_id IS NULL
"""


async def check_hashes(connection: AsyncConnection, settings: Settings) -> Outcome:
    """Find the active API keys whose hashes have no pepper."""
    until = settings.api_keys_allow_unpeppered_until
    row = (await fetch_all(connection, _UNPEPPERED_KEYS))[0]
    if row.prefixes is None:
        return Outcome("ok", "all active API keys have hashes with a pepper")
    seen = f"active API keys whose hash has no pepper: {len(row.prefixes)}"
    seen = f"{seen} ({join_first(row.prefixes)})"
    advice = "revoke the keys that you did not create, and rotate the other keys"
    if until is not None and row.today <= until:
        return Outcome(
            "warning",
            f"{seen}; these API keys are accepted until the end of {until} (UTC)",
            f"{advice}; the next use of an API key stores a new hash with a pepper",
        )
    advice += "; to accept these keys until a date, set API_KEYS_ALLOW_UNPEPPERED_UNTIL"
    return Outcome("problem", f"{seen}; these API keys are refused", advice)


# _PEPPERS_IN_USE scans the small table api_keys.
_PEPPERS_IN_USE = """
SELECT pepper_id AS id, count(*) AS keys FROM api_keys
WHERE status = 'active' AND coalesce(expires_at > now(), true) AND pepper_id IS NOT NULL
GROUP BY pepper_id ORDER BY pepper_id
"""


async def check_peppers(connection: AsyncConnection, settings: Settings) -> Outcome:
    """Find the active API keys whose pepper is missing."""
    try:
        peppers = await asyncio.to_thread(required_peppers, settings)
    except TigerDBError as error:
        return _unusable(error, API_KEY_PEPPERS)
    configured = peppers.key_ids if peppers is not None else ()
    rows = await fetch_all(connection, _PEPPERS_IN_USE)
    if missing := [row for row in rows if row.id not in configured]:
        refused = sum(row.keys for row in missing)
        names = ", ".join(row.id for row in missing)
        seen = f"active API keys whose pepper is missing: {refused}; these API keys are refused"
        return Outcome("problem", seen, f"put {names} back into API_KEY_PEPPERS")
    seen = ", ".join(
        f"{row.id}: {row.keys:,} active {'key' if row.keys == 1 else 'keys'}" for row in rows
    )
    return Outcome("ok", seen or "no pepper is in use")


async def check_codes(connection: AsyncConnection, settings: Settings) -> Outcome:
    """Find the API keys in force whose authentication code is missing or wrong."""
    try:
        peppers = await asyncio.to_thread(required_peppers, settings)
    except TigerDBError as error:
        return _unusable(error, API_KEY_PEPPERS)
    if peppers is None:
        return Outcome("ok", "no pepper exists yet, and no API key")
    async with AsyncSession(connection) as session:
        found = await find_invalid_codes(session, peppers)
        today = await session.scalar(text("SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date"))
    if found.wrong:
        seen = (
            "API keys whose row was created or changed by another program than tiger_db:"
            f" {len(found.wrong)} ({join_first(found.wrong)}); these API keys are refused"
        )
        advice = "revoke or delete these API keys, and find out who changed the table api_keys"
        return Outcome("problem", seen, advice)
    if not found.missing:
        return Outcome("ok", "all active API keys have valid authentication codes")
    seen = f"active API keys without an authentication code: {len(found.missing)}"
    seen = f"{seen} ({join_first(found.missing)})"
    advice = "revoke the API keys that you did not create, and run `tiger-db sign-api-keys`"
    until = settings.api_keys_allow_unsigned_until
    if until is not None and today is not None and today <= until:
        seen += f"; these API keys are accepted until the end of {until} (UTC)"
        return Outcome("warning", seen, advice)
    return Outcome("problem", f"{seen}; these API keys are refused", advice)


async def check_tiger_ids(connection: AsyncConnection, settings: Settings) -> Outcome:
    """Find accounts whose Tiger ids an older release of tiger_db stored without normalization."""
    try:
        ring = await asyncio.to_thread(required_key_ring, settings)
    except TigerDBError as error:
        advice = "to check the encrypted Tiger ids, run `tiger-db doctor` with ENCRYPTION_KEYS set"
        return Outcome("warning", f"not checked: {error}", advice)
    async with AsyncSession(connection) as session:
        found = await find_unnormalized_secrets(session, class_mapper(TigerAccount), ring)
    if found.foreign:
        ids = join_first([*map(str, found.foreign)])
        seen = f"accounts whose secrets do not belong to their row: {ids}"
        advice = (
            "undo changes of account_number, environment, server_url and client_options that were"
            " made with SQL, or set new values for all secrets with `crud.accounts.update`"
        )
        return Outcome("problem", seen, advice)
    if found.normalizable:
        ids = join_first([*map(str, found.normalizable)])
        seen = f"accounts whose Tiger ids are not normalized: {ids}"
        return Outcome("warning", seen, "run `tiger-db rotate-encryption-key`")
    if found.invalid:
        ids = join_first([*map(str, found.invalid)])
        seen = f"accounts whose Tiger ids are not printable ASCII: {ids}"
        return Outcome("warning", seen, "set the Tiger ids with `crud.accounts.update`")
    if found.unreadable:
        seen = f"Tiger ids that cannot be decrypted, and were not checked: {found.unreadable:,}"
        return Outcome("warning", seen, "put the missing encryption keys back into ENCRYPTION_KEYS")
    return Outcome("ok", "all Tiger ids are normalized")


async def check_encryption_keys(connection: AsyncConnection, settings: Settings) -> Outcome:
    try:
        ring = await asyncio.to_thread(required_key_ring, settings)
    except TigerDBError as error:
        return _unusable(error, ENCRYPTION_KEYS)
    async with AsyncSession(connection) as session:
        uses = await list_encryption_key_usage(session)
    seen = ", ".join(
        f"{use.key_id}: {use.rows:,} {'row' if use.rows == 1 else 'rows'} of {use.table}"
        for use in uses
    )
    needed = {use.key_id for use in uses}
    if missing := sorted(needed - {*ring.key_ids}):
        advice = f"to decrypt these rows, put {', '.join(missing)} back into ENCRYPTION_KEYS"
        return Outcome("problem", seen, advice)
    if old := sorted(needed - {ring.key_ids[0]}):
        advice = (
            f"keep {', '.join(old)} in ENCRYPTION_KEYS, and run `tiger-db rotate-encryption-key`"
        )
        return Outcome("warning", seen, advice)
    if unbound := sum(use.unbound for use in uses):
        advice = (
            "to bind these secrets to server_url, environment and account_number, run `tiger-db"
            " rotate-encryption-key`"
        )
        seen = f"{seen}; rows with ciphertexts of version 1: {unbound:,}"
        return Outcome("warning", seen, advice)
    if unmarked := [key_id for key_id in ring.key_ids if key_id not in ring.bound_key_ids]:
        advice = (
            f"append {BOUND_MARK} to {', '.join(unmarked)} in ENCRYPTION_KEYS, when no process of"
            " an earlier release is left. Then, ciphertexts of version 1 are refused"
        )
        return Outcome("warning", seen or "no encryption key is in use", advice)
    return Outcome("ok", seen or "no encryption key is in use")

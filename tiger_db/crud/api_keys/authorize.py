"""Authorize an API key for a request."""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from tiger_db.crud.api_keys.hashing import (
    UnpepperedHash,
    hash_secret,
    outdated,
    peppers_of,
    refuse_unpeppered,
    verify_secret,
)
from tiger_db.crud.api_keys.key_format import ParsedKey, parse_key
from tiger_db.crud.api_keys.policy import (
    AccessRequest,
    KeyPermissions,
    check_access,
    denial_event,
    replaced_hash_event,
    unpeppered_use_event,
)
from tiger_db.crud.api_keys.rate_limits import consume
from tiger_db.crud.api_keys.usage_counter import count_in_session
from tiger_db.crud.audit_logs import insert_event
from tiger_db.crud.common import context_of, execute_driver_sql, refuse_readonly
from tiger_db.errors import AccessDenied, InvalidAPIKey
from tiger_db.models import APIKey, APIKeyScope, AuditLog
from tiger_db.models.audit_logs import insert_events
from tiger_db.models.base import column_list, column_names, hydrate, merge_row, row_expression
from tiger_db.out_of_band import OutOfBandWriter
from tiger_db.peppers import Peppers
from tiger_db.sqlstates import raw_errors

if TYPE_CHECKING:
    import asyncpg

_FIND = """
SELECT {}, a.status::text, clock_timestamp() FROM api_keys AS k
LEFT JOIN tiger_accounts AS a ON a.id = k.tiger_account_id WHERE k.key_prefix = $1
"""
FIND_KEY = _FIND.format(column_list(APIKey, "k"))
_FIND_IN_SESSION = _FIND.format(row_expression(APIKey, "k"))
_NAMES = column_names(APIKey)
_COUNTERS = ("usage_count", "last_used_at", "updated_at")  # which change with every use
# A hash that was changed since it was read stays. A locked row is skipped, so that no use waits.
_REPLACE_HASH = """
UPDATE api_keys SET key_hash = $3, pepper_id = $4 WHERE id IN
    (SELECT id FROM api_keys WHERE id = $1 AND key_hash = $2 FOR NO KEY UPDATE SKIP LOCKED)
RETURNING true
"""


class KeyRow(NamedTuple):
    """The row of a key as PostgreSQL returned it; empty if there is no such key."""

    values: Sequence[Any] = ()  # all columns, to hydrate the key from
    columns: Mapping[str, Any] = {}  # by name, with account_status and without the counters
    now: float = 0.0  # the database's time, in seconds since 1970


@dataclass(slots=True)
class VerifiedKey:
    """A key whose secret was verified, and the columns that were read then."""

    key: APIKey
    permissions: KeyPermissions
    columns: Mapping[str, Any] = field(repr=False)
    outdated: bool  # its hash should be replaced
    read_at: float = 0.0  # monotonic time of the caches that keep it


@dataclass(frozen=True, slots=True)
class _TransactionWriter:
    """The methods of OutOfBandWriter, in the transaction of a session."""

    session: AsyncSession

    @asynccontextmanager
    async def connection(self) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
        own = await (await self.session.connection()).get_raw_connection()
        assert own.driver_connection is not None
        with raw_errors():
            yield own.driver_connection

    async def record(self, event: AuditLog) -> None:
        await insert_event(self.session, event)


async def verify_api_key(
    session: AsyncSession,
    raw_key: str,
    *,
    ip_address: str | IPv4Address | IPv6Address | None = None,
    user_agent: str | None = None,
) -> APIKey | None:
    """Return the row of a key and count the use, or return None if the key is refused.

    Raises:
        InvalidState: the session is readonly.
    """
    try:
        return await authorize_api_key(
            session, raw_key, ip_address=ip_address, user_agent=user_agent
        )
    except AccessDenied:
        return None


async def authorize_api_key(
    session: AsyncSession,
    raw_key: str,
    *,
    scopes: Iterable[APIKeyScope] = (),
    account_id: UUID | None = None,
    ip_address: str | IPv4Address | IPv6Address | None = None,
    user_agent: str | None = None,
) -> APIKey:
    """Return the row of a key that may do what is requested, and count the use.

    The checks, in this order: format, existence and hash (`InvalidAPIKey` for each of them),
    status, expiry, status of the bound account, address, user agent, scopes, account, rate limits.
    The first check that fails raises its error. Every denial but that of a malformed key is
    recorded in the audit trail before the error is raised. The audit event and the counted use
    survive a rollback of the caller's transaction: they are written out of band.

    A hash without a pepper is denied with `InvalidAPIKey`; the audit event has the reason. Until
    the end of the day (UTC, the database's clock) in API_KEYS_ALLOW_UNPEPPERED_UNTIL, such a hash
    is accepted, and each use is recorded. An accepted use replaces a hash with an older pepper,
    with none, or by a slow scheme, and records that in the same transaction.

    Rate limits count the uses of a key together with those of all keys that it was rotated from or
    to. They are exact across processes. Their windows are the clock hour and the calendar day
    (UTC): at worst, twice the limit passes in a short time around the end of a window.

    `usage_count` and `last_used_at` are written within a second, or when the Database closes;
    `kill -9` can lose the uses of the last second. A use of a key that was created in the same
    transaction may not be counted.

    Raises:
        AccessDenied: a subclass of it, by the check that failed. The use is not counted.
        ConfigurationError: API_KEY_PEPPERS is not set, or the session has no Database.
        InvalidState: the session is readonly.
        DatabaseUnavailable: the key could not be checked, or the denial could not be recorded.
    """
    refuse_readonly(session)
    parsed = parse_key(raw_key)
    if parsed is None:
        raise InvalidAPIKey
    request = AccessRequest(tuple(scopes), account_id, ip_address, user_agent)
    return (await authorize_parsed_key(parsed, request, session.info, session=session)).key


async def authorize_parsed_key(
    parsed: ParsedKey,
    request: AccessRequest,
    info: Mapping[Any, object],
    *,
    session: AsyncSession | None = None,
    known: VerifiedKey | None = None,
) -> VerifiedKey:
    """Authorize a well-formed key, whose row is read in the session, or out of band without one.

    `info` is that of the session or of the Database. If `known` has the columns of the row, its
    secret is not verified again. Raises what `authorize_api_key` raises.
    """
    peppers = peppers_of(info)
    writer = limiter = _writer(info, session)
    counted = False
    while not counted:
        row = KeyRow()
        try:
            async with AsyncExitStack() as opened:
                connection = None
                if session is not None:
                    row = await find_key(session, parsed.prefix)
                else:
                    connection = await opened.enter_async_context(writer.connection())
                    record = await connection.fetchrow(FIND_KEY, parsed.prefix)
                    row = _key_row(record[:-2], *record[-2:]) if record else KeyRow()
                if known is None or known.columns != row.columns:
                    await opened.aclose()  # a slow hash must not hold a connection
                    connection = None
                    known = await _verify(parsed, row, info, session)
                check_access(known.permissions, row.now, request)
                counted = not known.permissions.limited
                if not counted:
                    if connection is None:
                        connection = await opened.enter_async_context(limiter.connection())
                    counted = await consume(connection, known.permissions)
        except AccessDenied as reason:
            key_id, account_id = row.columns.get("id"), row.columns.get("tiger_account_id")
            await writer.record(denial_event(reason, parsed.prefix, request, key_id, account_id))
            if isinstance(reason, UnpepperedHash):
                raise InvalidAPIKey from None
            raise
        # An out-of-band connection does not see a key that the session's transaction has created.
        limiter = _TransactionWriter(session) if session is not None else writer
    assert known is not None
    if known.outdated:
        async with writer.connection() as connection:
            await _replace_hash(connection, parsed, request, row, peppers)
    if (count_use := context_of(info).count_use) is not None:
        count_use(known.permissions.key_id, row.now)
    else:
        assert session is not None
        await count_in_session(session, known.key, row.now)
    return known


def _writer(
    info: Mapping[Any, object], session: AsyncSession | None
) -> OutOfBandWriter | _TransactionWriter:
    writer = context_of(info).out_of_band
    if writer is not None:
        return writer
    assert session is not None
    return _TransactionWriter(session)


async def find_key(session: AsyncSession, prefix: str) -> KeyRow:
    """Read the row of a key by its prefix. What the session has pending is flushed before."""
    rows: Sequence[Sequence[Any]] = await execute_driver_sql(session, _FIND_IN_SESSION, prefix)
    return _key_row(*rows[0]) if rows else KeyRow()


def _key_row(values: Sequence[Any], account_status: str | None, now: datetime) -> KeyRow:
    by_name = dict(zip(_NAMES, values, strict=True), account_status=account_status)
    for name in _COUNTERS:
        del by_name[name]
    return KeyRow(values, by_name, now.timestamp())


async def _verify(
    parsed: ParsedKey,
    row: KeyRow,
    info: Mapping[Any, object],
    session: AsyncSession | None,
) -> VerifiedKey:
    """Verify the secret of a key, and hydrate the key; the session tracks it, if there is one.

    Raises:
        InvalidAPIKey: the secret is wrong, or there is no such key; both take equal time.
        UnpepperedHash: the hash has no pepper, and such hashes are not allowed.
    """
    peppers = peppers_of(info)
    key_hash, pepper_id = row.columns.get("key_hash", ""), row.columns.get("pepper_id")
    if not await verify_secret(peppers, parsed.secret, key_hash, pepper_id):
        raise InvalidAPIKey
    refuse_unpeppered(info, pepper_id, row.now)
    if session is not None:
        key = merge_row(session.sync_session, APIKey, row.values)
    else:
        key = hydrate(APIKey, row.values, None)
    permissions = KeyPermissions.of(key, row.columns["account_status"])
    return VerifiedKey(key, permissions, row.columns, outdated(peppers, key_hash, pepper_id))


async def _replace_hash(
    connection: "asyncpg.Connection[asyncpg.Record]",
    parsed: ParsedKey,
    request: AccessRequest,
    row: KeyRow,
    peppers: Peppers,
) -> None:
    """Replace the outdated hash of an accepted key by one with the first pepper, and record it.

    A hash that was changed since it was read stays. The use of a hash without a pepper is recorded
    even then.
    """
    key_id, old_pepper_id = row.columns["id"], row.columns["pepper_id"]
    ids = (key_id, row.columns["tiger_account_id"])
    new_hash, new_pepper_id = hash_secret(peppers, parsed.secret)
    events: list[AuditLog] = []
    if old_pepper_id is None:
        events.append(unpeppered_use_event(parsed.prefix, request, *ids))
    async with connection.transaction():
        if await connection.fetchval(
            _REPLACE_HASH, key_id, row.columns["key_hash"], new_hash, new_pepper_id
        ):
            events.append(replaced_hash_event(old_pepper_id, new_pepper_id, *ids))
        if events:
            await insert_events(connection, events)

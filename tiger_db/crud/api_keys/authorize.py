"""Functions that authorize an API key for a request."""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from tiger_db.actor import Actor, attribute
from tiger_db.crud.api_key_codes import (
    CodeState,
    ForgedRow,
    UnsignedRow,
    check_stored_code,
    compute_code,
    refuse_unauthentic,
    signed_values,
)
from tiger_db.crud.api_keys.denials import record_denial, request_event
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
    check_in_force,
)
from tiger_db.crud.api_keys.rate_limits import consume
from tiger_db.crud.api_keys.usage_counter import count_in_session
from tiger_db.crud.audit_logs.recording import api_key_event, insert_event
from tiger_db.crud.common import (
    actor_of,
    context_of,
    fetch_rows,
    refuse_readonly,
)
from tiger_db.errors import AccessDenied, InvalidAPIKey
from tiger_db.models import APIKey, APIKeyScope, APIKeyStatus, AuditAction, AuditLog, AuditSeverity
from tiger_db.models.audit_logs import insert_events
from tiger_db.models.base import column_names, hydrate, merge_row, row_expression
from tiger_db.out_of_band import OutOfBandWriter
from tiger_db.public import public
from tiger_db.sqlstates import raw_errors

if TYPE_CHECKING:
    import asyncpg

_FIND_PAUSE = "SELECT reason FROM trading_pauses"
FIND_KEY = f"""
SELECT {row_expression(APIKey, "k")}, a.status::text, clock_timestamp(),
    ({_FIND_PAUSE}),
    current_setting('transaction_isolation') IN ('repeatable read', 'serializable')
FROM api_keys AS k LEFT JOIN tiger_accounts AS a ON a.id = k.tiger_account_id
WHERE k.key_prefix = $1
"""  # noqa: S608  # the f-string inserts only constants
_NAMES = column_names(APIKey)
# Each use of an API key changes the columns in _COUNTERS.
_COUNTERS = ("usage_count", "last_used_at", "updated_at")
_STATUSES = frozenset(APIKeyStatus)
# _REPLACE_HASH replaces the hash of an API key, unless another transaction has already replaced the
# hash or changed a signed column. With SKIP LOCKED, an authorization never waits for a row lock.
_REPLACE_HASH = """
UPDATE api_keys SET key_hash = $4, pepper_id = $5, mac = $6 WHERE id IN
    (SELECT id FROM api_keys WHERE id = $1 AND key_hash = $2 AND mac IS NOT DISTINCT FROM $3
    FOR NO KEY UPDATE SKIP LOCKED)
RETURNING true
"""


class KeyRow(NamedTuple):
    """A row of `api_keys`, or an empty KeyRow if no row has the prefix of the API key.

    `values` contains the values of all columns of the row. `columns` maps the names of the columns
    to the values, without the columns in `_COUNTERS`. `now` is the database's time in seconds since
    1970. `pause_reason` is the reason of the current pause of trading, or None if trading is not
    paused. `from_snapshot` is true if the transaction can read an old snapshot of the database.
    """

    values: Sequence[Any] = ()
    columns: Mapping[str, Any] = {}
    now: float = 0.0
    pause_reason: str | None = None
    from_snapshot: bool = False

    @classmethod
    def of(cls, records: Sequence[Sequence[Any]]) -> Self:
        """Build a KeyRow from the result of `FIND_KEY`."""
        if not records:
            return cls()
        values, account_status, now, pause_reason, from_snapshot = records[0]
        by_name = dict(zip(_NAMES, values, strict=True), account_status=account_status)
        for name in _COUNTERS:
            del by_name[name]
        return cls(values, by_name, now.timestamp(), pause_reason, from_snapshot)

    @property
    def expires_at(self) -> float | None:
        """Return the expiry of the API key in seconds since 1970, or None for no expiry."""
        expires_at: datetime | None = self.columns["expires_at"]
        if expires_at is None:
            return None
        # asyncpg returns PostgreSQL's infinity as a naive datetime.
        aware = expires_at if expires_at.tzinfo is not None else expires_at.replace(tzinfo=UTC)
        return aware.timestamp()


@dataclass(slots=True)
class VerifiedKey:
    """An API key whose secret was verified, and the key's columns at the time of verification.

    `outdated` is true if the hash of the API key should be replaced. `signed` is false if the row
    of the API key has no authentication code, but is accepted until a date. `read_at` is the
    monotonic time at which the row of the API key was read.
    """

    key: APIKey
    permissions: KeyPermissions
    columns: Mapping[str, Any] = field(repr=False)
    outdated: bool
    signed: bool
    read_at: float = 0.0

    @property
    def cacheable(self) -> bool:
        """Whether a KeyVerifier may cache the API key.

        An API key without an authentication code, or with an outdated hash, is possibly accepted
        only up to a configured day, so it is read from the database at each call.
        """
        return self.signed and not self.outdated


class _SessionWriter(NamedTuple):
    """A substitute for OutOfBandWriter that writes in the transaction of a session."""

    session: AsyncSession
    denials: None = None  # each denial has an event of its own

    @asynccontextmanager
    async def connection(self) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
        connection = await (await self.session.connection()).get_raw_connection()
        assert connection.driver_connection is not None
        with raw_errors():
            yield connection.driver_connection

    async def record(self, event: AuditLog, _: Actor | None) -> None:
        await insert_event(self.session, event)


@public
async def verify_api_key(
    session: AsyncSession,
    raw_key: str,
    *,
    ip_address: str | IPv4Address | IPv6Address | None = None,
    user_agent: str | None = None,
) -> APIKey | None:
    """Authorize an API key with `authorize_api_key`. Return None if the key is denied.

    `verify_api_key` does not check scopes and pauses of trading. To authorize a trade, call
    `authorize_api_key` with the scope that the trade requires.

    Raises:
        InvalidState: the session is readonly.
    """
    try:
        return await authorize_api_key(
            session, raw_key, ip_address=ip_address, user_agent=user_agent
        )
    except AccessDenied:
        return None


@public
async def authorize_api_key(
    session: AsyncSession,
    raw_key: str,
    *,
    scopes: Iterable[APIKeyScope] = (),
    account_id: UUID | None = None,
    ip_address: str | IPv4Address | IPv6Address | None = None,
    user_agent: str | None = None,
) -> APIKey:
    """Authorize an API key for a request, and count the use. Return the APIKey entity.

    The first checks concern the format, the existence and the hash of the API key, and raise
    `InvalidAPIKey`. After the hash, `authorize_api_key` checks the status and expiry of the key,
    the status of its account, the IP address and the user agent. The last checks concern the
    scopes, the requested account, a pause of trading and the rate limits. The first failed check
    raises an error.

    Each denial is recorded, except the denial of a malformed API key. Many denials in a short time
    share audit events, whose `details` contain the number of denials (`count`) and the time of the
    first one (`since`). Denials and the use of the key are recorded out of band.

    A key whose row has a wrong authentication code is denied with `InvalidAPIKey`, because another
    program has created or changed the row. A row without a code is accepted until the date in
    API_KEYS_ALLOW_UNSIGNED_UNTIL (UTC, database clock). These denials are recorded once per hour
    and key at most.

    A key whose hash has no pepper is denied with `InvalidAPIKey`, unless the date in
    API_KEYS_ALLOW_UNPEPPERED_UNTIL is today (UTC, database clock) or later. The hash of an accepted
    key is replaced if the hash has an older pepper, no pepper or a slow algorithm. An audit event
    records the replacement of the hash.

    Rate limits are exact, even if several processes authorize the same key. All keys of a rotation
    chain share one count of uses. A rate limit applies to a clock hour or a calendar day (UTC).
    Around the end of an hour or day, a caller can use twice the limit in a short time.

    The columns `usage_count` and `last_used_at` are updated about a second after the use. The
    use of a new key is not counted if tiger_db writes usage counts before the key's creation is
    committed.

    Raises:
        AccessDenied: the API key is denied. Each check raises its own subclass of AccessDenied. A
            denied use is not counted.
        ConfigurationError: API_KEY_PEPPERS is not set, or the session does not belong to a
            Database.
        InvalidState: the session is readonly.
        DatabaseUnavailable: the API key could not be read, or the denial could not be recorded.
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
    cached: VerifiedKey | None = None,
    count_use: bool = True,
) -> VerifiedKey:
    """Authorize a well-formed API key. If `session` is None, the key's row is read out of band.

    In a flood of denials, calls with unknown keys run one after another, unless the session has
    begun a transaction, and so possibly has a connection that other calls wait for.

    With `count_use=False`, no use is counted and no rate limit is checked. `info` is
    `AsyncSession.info` or `Database.info`. The secret is verified only if the key's row has changed
    since `cached` was read. `authorize_parsed_key` raises the same errors as `authorize_api_key`.
    """
    writer = context_of(info).out_of_band
    if writer is None:
        return await _authorize(parsed, request, info, session, cached, count_use=count_use)
    wait = session is None or not session.in_transaction()
    async with writer.denials.admit(writer.denials.digest(parsed.raw_key), wait=wait) as waited:
        if waited and session is not None:
            # A refusal out of band takes half the processor time of a refusal in a session.
            await _authorize(parsed, request, info, None, cached, count_use=False)
        return await _authorize(parsed, request, info, session, cached, count_use=count_use)


async def _authorize(
    parsed: ParsedKey,
    request: AccessRequest,
    info: Mapping[Any, object],
    session: AsyncSession | None,
    cached: VerifiedKey | None,
    *,
    count_use: bool,
) -> VerifiedKey:
    in_session = _SessionWriter(session) if session is not None else None
    writer = limiter = context_of(info).out_of_band or in_session
    assert writer is not None
    assert limiter is not None
    found: Sequence[Sequence[Any]]
    verified, counted = cached, False
    while not counted:
        row = KeyRow()
        try:
            async with AsyncExitStack() as stack:
                connection = None
                if session is not None:
                    found = await fetch_rows(session, FIND_KEY, parsed.prefix)
                else:
                    connection = await stack.enter_async_context(writer.connection())
                    found = await connection.fetch(FIND_KEY, parsed.prefix)
                row = KeyRow.of(found)
                if verified is None or verified.columns != row.columns:
                    # Return the connection to the pool, because verifying a hash can be slow.
                    await stack.aclose()
                    connection = None
                    verified = await _verify(parsed, row, info, session)
                pause_reason = await _pause_reason(row, request, writer)
                check_access(verified.permissions, row.now, request, pause_reason)
                counted = not (count_use and verified.permissions.limited)
                if not counted:
                    if connection is None:
                        connection = await stack.enter_async_context(limiter.connection())
                    counted = await consume(connection, verified.permissions)
        except AccessDenied as reason:
            ids = row.columns.get("id"), row.columns.get("tiger_account_id")
            actor = actor_of(info)
            await record_denial(writer, reason, parsed.prefix, request, ids=ids, actor=actor)
            if isinstance(reason, UnpepperedHash | UnsignedRow | ForgedRow):
                raise InvalidAPIKey from None
            raise
        # If there is a session, the next iteration of the loop calls the function `consume` in the
        # session's transaction. An out-of-band connection cannot read an API key that the session's
        # transaction has created but not committed.
        limiter = in_session or writer
    assert verified is not None
    if verified.outdated:
        async with writer.connection() as connection:
            await _replace_hash(connection, parsed, request, verified, info)
    if count_use:
        await _count_use(verified, row.now, info, session)
    return verified


async def _count_use(
    verified: VerifiedKey, now: float, info: Mapping[Any, object], session: AsyncSession | None
) -> None:
    if (count := context_of(info).count_use) is not None:
        count(verified.permissions.key_id, now)
    else:
        assert session is not None
        await count_in_session(session, verified.key, now)


async def _pause_reason(
    row: KeyRow, request: AccessRequest, writer: OutOfBandWriter | _SessionWriter
) -> str | None:
    """Return the reason of the current pause of trading, or None."""
    if row.pause_reason is None and row.from_snapshot and request.trades:
        # The snapshot of a session's transaction hides a pause that began after the snapshot.
        async with writer.connection() as connection:
            reason: str | None = await connection.fetchval(_FIND_PAUSE)
        return reason
    return row.pause_reason


async def _verify(
    parsed: ParsedKey,
    row: KeyRow,
    info: Mapping[Any, object],
    session: AsyncSession | None,
) -> VerifiedKey:
    """Verify the secret of an API key, and hydrate the APIKey entity.

    If `session` is not None, the entity belongs to `session`. A wrong secret and an unknown API key
    are denied after the same time.

    Raises:
        InvalidAPIKey: the secret is wrong, or the API key does not exist.
        UnpepperedHash: the hash of the API key has no pepper, and API_KEYS_ALLOW_UNPEPPERED_UNTIL
            is not set or is a past day (UTC).
        UnsignedRow: the row of the API key has no authentication code, and
            API_KEYS_ALLOW_UNSIGNED_UNTIL is not set or is a past day (UTC).
        ForgedRow: the authentication code of the row is wrong.
        APIKeyExpired, APIKeyRevoked: the row has no valid code, and the API key is not in force.
    """
    peppers = peppers_of(info)
    key_hash, pepper_id = row.columns.get("key_hash") or "", row.columns.get("pepper_id")
    if not await verify_secret(peppers, parsed.secret, key_hash, pepper_id):
        raise InvalidAPIKey
    refuse_unpeppered(info, pepper_id, row.now)
    # Plain SQL can store values that `hydrate` cannot convert, so the code is checked before.
    signed = check_stored_code(peppers, row.columns)
    if signed is not CodeState.VALID:
        # Plain SQL can revoke an API key, although the authentication code is then wrong.
        if (status := row.columns["status"]) in _STATUSES:
            check_in_force(APIKeyStatus(status), row.expires_at, row.now)
        refuse_unauthentic(info, signed, row.now)
    if session is not None:
        key = merge_row(session.sync_session, APIKey, row.values)
    else:
        key = hydrate(APIKey, row.values, None)
    permissions = KeyPermissions.of(key, row.columns["account_status"])
    return VerifiedKey(
        key,
        permissions,
        row.columns,
        outdated=outdated(peppers, key_hash, pepper_id),
        signed=signed is CodeState.VALID,
    )


async def _replace_hash(
    connection: "asyncpg.Connection[asyncpg.Record]",
    parsed: ParsedKey,
    request: AccessRequest,
    verified: VerifiedKey,
    info: Mapping[Any, object],
) -> None:
    """Replace an outdated hash by a hash with the first pepper, and record the replacement.

    The authentication code is renewed with the hash. A row without a code stays without a code. An
    audit event records each use of an API key whose hash has no pepper, even if the hash is not
    replaced.
    """
    peppers, columns = peppers_of(info), verified.columns
    old_pepper_id = columns["pepper_id"]
    ids = columns["id"], columns["tiger_account_id"]
    new_hash, new_pepper_id = hash_secret(peppers, parsed.secret)
    new = {**signed_values(verified.key), "key_hash": new_hash, "pepper_id": new_pepper_id}
    mac = compute_code(peppers, new) if verified.signed else None
    events: list[AuditLog] = []
    if old_pepper_id is None:
        event = request_event(
            request,
            *ids,
            action=AuditAction.API_KEY_USE,
            severity=AuditSeverity.HIGH,
            details={
                "key_prefix": parsed.prefix, "accepted_by": "API_KEYS_ALLOW_UNPEPPERED_UNTIL",
            },
        )  # fmt: skip
        events.append(event)
    async with connection.transaction():
        if await connection.fetchval(
            _REPLACE_HASH, ids[0], columns["key_hash"], columns["mac"], new_hash, new_pepper_id, mac
        ):
            event = api_key_event(
                *ids,
                action=AuditAction.API_KEY_UPDATE,
                old_values={"pepper_id": old_pepper_id},
                new_values={"pepper_id": new_pepper_id},
            )
            events.append(event)
        if events:
            actor = actor_of(info)
            await insert_events(connection, [attribute(event, actor) for event in events])

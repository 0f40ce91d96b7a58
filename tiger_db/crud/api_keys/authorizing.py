"""Whether a key may do this, from here, now."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.api_keys.decision import Powers, Request, decide, denial, unpeppered_use
from tiger_db.crud.api_keys.hashing import (
    UnpepperedHash,
    hash_secret,
    outdated,
    peppers_of,
    refuse_unpeppered,
    verify_secret,
)
from tiger_db.crud.api_keys.limits import take
from tiger_db.crud.api_keys.text import KeyText, parse_key
from tiger_db.crud.common import FRESH, context_of, refuse_readonly
from tiger_db.errors import AccessDenied, InvalidAPIKey
from tiger_db.models import APIKey, APIKeyScope, AuditAction, AuditLog, TigerAccount
from tiger_db.models.audit_rows import copy_events
from tiger_db.peppers import Peppers
from tiger_db.sqlstates import raw_errors
from tiger_db.write_behind import WriteBehind, count_now

if TYPE_CHECKING:
    import asyncpg

# Guarded, so that a hash that was changed meanwhile stays; and it waits for nobody.
_UPGRADE = """
UPDATE api_keys SET key_hash = $3, pepper_id = $4 WHERE id IN
    (SELECT id FROM api_keys WHERE id = $1 AND key_hash = $2 FOR NO KEY UPDATE SKIP LOCKED)
RETURNING true
"""


async def verify_api_key(
    session: AsyncSession,
    raw_key: str,
    *,
    ip_address: str | IPv4Address | IPv6Address | None = None,
    user_agent: str | None = None,
) -> APIKey | None:
    """The key's row if it is accepted, and counted as used; else None.

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
    """The key's row if it may do this, from here, now; then it is counted as used.

    The first reason not to, in this order: form, existence and hash (all `InvalidAPIKey`), status,
    expiry, the bound account's status, address, user agent, scopes, account, limits. Each but a
    malformed text is on record in the audit trail when this raises. That record and the count stay
    when the caller's transaction rolls back: they go through connections of the Database's own.

    A hash without a pepper is refused as `InvalidAPIKey`, and the audit trail has the reason. Until
    the end of the day (UTC, the database's clock) in API_KEYS_ALLOW_UNPEPPERED_UNTIL it is
    accepted; each such use has an event. A hash under an older pepper, by a slow scheme or without
    a pepper is replaced at an accepted use, with an event in the same transaction.

    The limits count the uses of all keys of a line: of a key and those that it was rotated to.

    Limits are exact, from any number of processes. Their windows are fixed: the clock hour and the
    calendar day (UTC). At worst, twice the limit passes in a short time around the turn of one.

    `usage_count` and `last_used_at` are written behind, within a second or when the Database
    closes; `kill -9` can lose those of the last second. Those of a key that was created in the same
    transaction may be left out.

    Raises:
        AccessDenied: one of its subclasses, by the reason. None of them counts as a use.
        ConfigurationError: API_KEY_PEPPERS is not set, or the session has no Database.
        InvalidState: the session is readonly.
        DatabaseUnavailable: it could not be decided, or not be put on record.
    """
    refuse_readonly(session)
    text = parse_key(raw_key)
    if text is None:
        raise InvalidAPIKey
    request = Request(tuple(scopes), account_id, ip_address, user_agent)
    peppers = peppers_of(session.info)
    apart = context_of(session.info).write_behind
    limits_apart = apart
    while True:
        found = await _find(session, text.prefix)
        key_id, bound_to, key_hash, pepper_id = found or (None, None, "", None)
        try:
            # The row is loaded only then, because loading it takes time that could be measured.
            if not await verify_secret(peppers, text.secret, key_hash, pepper_id):
                raise InvalidAPIKey
            key, powers, now = await load(session, key_id)
            refuse_unpeppered(session.info, pepper_id, now)
            decide(powers, now, request)
            counted = not powers.limited or await _take(session, limits_apart, powers)
        except AccessDenied as reason:
            event = denial(reason, text.prefix, request, key_id, bound_to)
            if apart is not None:
                await apart.record(event)
            else:
                session.add(event)
                await session.flush()
            if isinstance(reason, UnpepperedHash):
                raise InvalidAPIKey from None
            raise
        if counted:
            break
        limits_apart = None  # it was made in this transaction, or changed since it was read
    if outdated(peppers, key_hash, pepper_id):
        async with _connection(session, apart) as connection:
            await replace_hash(
                connection, peppers, text, request, powers, key_hash=key_hash, pepper_id=pepper_id
            )
    if apart is not None:
        apart.count(key.id, now)
    else:
        await count_now(session, key.id, now)
        await session.refresh(key, ["usage_count", "last_used_at"])
    return key


async def replace_hash(
    connection: "asyncpg.Connection[asyncpg.Record]",
    peppers: Peppers,
    text: KeyText,
    request: Request,
    powers: Powers,
    *,
    key_hash: str,
    pepper_id: str | None,
) -> None:
    """Replace an outdated hash of an accepted key by one under the first pepper, on record.

    A hash that was changed meanwhile stays. The use of a hash without a pepper is on record, too,
    whether the hash is replaced or not.
    """
    events = []
    if pepper_id is None:
        events.append(unpeppered_use(text.prefix, request, powers.key_id, powers.account_id))
    new_hash, new_pepper_id = hash_secret(peppers, text.secret)
    async with connection.transaction():
        if await connection.fetchval(_UPGRADE, powers.key_id, key_hash, new_hash, new_pepper_id):
            events.append(
                AuditLog(
                    action=AuditAction.API_KEY_UPDATE,
                    resource_type="api_key",
                    resource_id=str(powers.key_id),
                    api_key_id=powers.key_id,
                    tiger_account_id=powers.account_id,
                    old_values={"pepper_id": pepper_id},
                    new_values={"pepper_id": new_pepper_id},
                )
            )
        if events:
            await copy_events(connection, events)


async def _find(
    session: AsyncSession, prefix: str
) -> tuple[UUID, UUID | None, str, str | None] | None:
    columns = (APIKey.id, APIKey.tiger_account_id, APIKey.key_hash, APIKey.pepper_id)
    statement = select(*map(col, columns)).where(col(APIKey.key_prefix) == prefix)
    found = (await session.execute(statement)).one_or_none()
    return tuple(found) if found is not None else None


async def load(session: AsyncSession, key_id: UUID | None) -> tuple[APIKey, Powers, float]:
    """The key, what it may do, and the database's time in seconds since 1970.

    Raises:
        InvalidAPIKey: it was deleted meanwhile.
    """
    found = (
        await session.execute(
            select(APIKey, col(TigerAccount.status), func.clock_timestamp())
            .outerjoin(TigerAccount, col(APIKey.tiger_account_id) == col(TigerAccount.id))
            .where(col(APIKey.id) == key_id),
            execution_options=FRESH,
        )
    ).one_or_none()
    if found is None:
        raise InvalidAPIKey
    key, account_status, now = found
    return key, Powers.of(key.__dict__, account_status), now.timestamp()


async def _take(session: AsyncSession, apart: WriteBehind | None, powers: Powers) -> bool:
    async with _connection(session, apart) as connection:
        return await take(connection, powers)


@asynccontextmanager
async def _connection(
    session: AsyncSession, apart: WriteBehind | None
) -> "AsyncIterator[asyncpg.Connection[asyncpg.Record]]":
    """One that commits each statement; without such, that of the session's transaction."""
    if apart is not None:
        async with apart.connection() as connection:
            yield connection
    else:
        own = await (await session.connection()).get_raw_connection()
        assert own.driver_connection is not None
        with raw_errors():
            yield own.driver_connection

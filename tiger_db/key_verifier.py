"""The class `KeyVerifier`, which authorizes API keys for servers, with an optional cache."""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Self
from uuid import UUID

from tiger_db.connections.listener import Connection, listen
from tiger_db.crud.api_keys.authorize import VerifiedKey, authorize_parsed_key
from tiger_db.crud.api_keys.denials import record_denial
from tiger_db.crud.api_keys.key_format import parse_key
from tiger_db.crud.api_keys.policy import AccessRequest, access_request, check_access
from tiger_db.database import Database
from tiger_db.errors import AccessDenied, InvalidAPIKey, InvalidValue, SchemaMismatch
from tiger_db.models import APIKey, APIKeyScope
from tiger_db.public import public
from tiger_db.tracebacks import forgets_locals

CHANNEL = "tiger_db_api_keys"
_TABLES = {"api_keys", "tiger_accounts"}  # Tables whose triggers notify the channel `CHANNEL`.
HEARTBEAT_SECONDS = 0.2  # Pause between two heartbeat queries, in seconds.
LEASE_SECONDS = 0.5  # Time after a heartbeat query in which calls use the cache, in seconds.
# Age at which a cached API key is read from the database again, in seconds.
MAX_AGE_SECONDS = 60.0
# Number of evicted API keys that are freed in one iteration of the event loop.
_FREED_AT_ONCE = 500
# Interval, in seconds, at which calls that use the cache let the event loop read notifications.
_YIELD_INTERVAL_SECONDS = 0.005


class KeyVerifier:
    """A verifier of API keys that needs no session. Use a KeyVerifier in one event loop only.

    By default, each call reads the row of the API key with one query, so that changes of the API
    key take effect at once. A KeyVerifier verifies the hash of an API key in the first call, and
    again after a change of the API key's row.

    With `memory=True`, a KeyVerifier caches verified API keys inside the `async with` block.
    Triggers on api_keys and tiger_accounts notify the KeyVerifier of each change within
    milliseconds, including changes by plain SQL. At the start of the `async with` block, the
    KeyVerifier checks that the triggers are as `migrations.declared` declares them. A cached API
    key is read from the database again after 60 seconds, in case a notification was lost.

    A call does not use the cache if it checks rate limits of the API key, or if the request
    requires a scope of the family `trade`. If the listening connection is lost, or has not answered
    for half a second, no call uses the cache. Because requests for trades do not use the cache, a
    pause of trading takes effect with its commit, even if no notification arrives.

    The cache of a KeyVerifier holds at most `capacity` API keys, and evicts the least recently used
    API key first. Instead of raw keys, the cache contains keyed BLAKE2b digests of raw keys.

    Raises:
        InvalidValue: the argument `capacity` is not positive.
    """

    @public
    def __init__(self, database: Database, *, memory: bool = False, capacity: int = 10_000) -> None:
        if capacity < 1:
            raise InvalidValue("capacity must be positive")
        self.database = database
        self.memory = memory
        self.capacity = capacity
        self._digest_key = secrets.token_bytes(32)
        # The cache maps the digests of raw keys to verified API keys.
        self._cache: OrderedDict[bytes, VerifiedKey] = OrderedDict()
        self._digests: dict[UUID, bytes] = {}  # Digests of raw keys, by id of the API key.
        # Digests of raw keys, by id of the account to which the API keys are bound.
        self._account_digests: dict[UUID | None, set[bytes]] = {}
        # Number of received notifications of changed API keys and accounts. An API key that was
        # read before the last notification is not cached.
        self._notifications = 0
        self._valid_until = 0.0  # Monotonic time until which the cache is valid.
        self._clock_offset = 0.0  # Database time (seconds since 1970) minus monotonic time.
        self._yielded_at = 0.0  # Monotonic time at which a call last yielded to the event loop.
        self._listener: asyncio.Task[None] | None = None
        self._listening = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Check the schema. With `memory=True`, also listen for changes of API keys and accounts.

        Raises:
            DatabaseUnavailable: the database cannot be reached.
            SchemaMismatch: the schema is missing, is older or newer than this tiger_db release, or
                (with `memory=True`) has unexpected changes of api_keys or tiger_accounts.
            ConfigurationError: `memory` is true and `DB_POOLER` is set, but `DB_DIRECT_HOST` is not
                set.
        """
        if self.memory:
            self.database.settings.without_pooler()
        await self.database.check()
        if self.memory:
            await self._compare_triggers()
            settings = self.database.settings
            listening = listen(settings, CHANNEL, self._handle_notification, self._hold_lease)
            self._listener = asyncio.create_task(listening)
            # Until the KeyVerifier listens for changes, calls read the database.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._listening.wait(), settings.db_connect_timeout)
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop listening for changes of API keys, and leave the Database open."""
        if self._listener is not None:
            listener, self._listener = self._listener, None
            listener.cancel()
            self._listening.clear()
            self._clear()
            await asyncio.wait([listener])

    async def _compare_triggers(self) -> None:
        from tiger_db.migrations.comparison import find_differences  # noqa: PLC0415  # slow import

        async with self.database.engine.connect() as connection:
            for difference in await find_differences(connection):
                if not (difference.undeclared or _TABLES.isdisjoint(difference.tables)):
                    raise SchemaMismatch(
                        "a KeyVerifier with memory needs api_keys and tiger_accounts as tiger_db"
                        f" declares them, but {difference.description}: run `tiger-db check`"
                    )

    @forgets_locals
    async def authorize(
        self,
        raw_key: str,
        *,
        scopes: Iterable[APIKeyScope] = (),
        account_id: UUID | None = None,
        ip_address: str | IPv4Address | IPv6Address | None = None,
        user_agent: str | None = None,
        count_use: bool = True,
    ) -> APIKey:
        """Authorize an API key like the function `crud.api_keys.authorize_api_key`.

        With `count_use=False`, no use is counted and no rate limit is checked, for example because
        an earlier call has counted the use for the same request. A denial is still on record.

        Several calls can return the same APIKey object, so do not change the returned object.

        Raises:
            InvalidState: the Database belongs to another process or to another event loop.
        """
        self.database.claim()
        request = access_request(scopes, account_id, ip_address, user_agent, count_use=count_use)
        # The cache does not contain pauses of trading, so a request for a trade reads the database.
        if self._listener is not None and not request.trades:
            key = await self._from_memory(raw_key, request, count_use=count_use)
            if key is not None:
                return key
        parsed = parse_key(raw_key)
        if parsed is None:
            raise InvalidAPIKey
        await self.database.check()
        digest = self._digest(raw_key)
        changes, read_at = self._notifications, time.monotonic()
        try:
            verified = await authorize_parsed_key(
                parsed,
                request,
                self.database.info,
                cached=self._cache.get(digest),
                count_use=count_use,
            )
        except AccessDenied:
            self._drop(digest)
            raise
        if changes == self._notifications and verified.cacheable:
            verified.read_at = read_at
            self._store(digest, verified)
        return verified.key

    async def verify(
        self,
        raw_key: str,
        *,
        ip_address: str | IPv4Address | IPv6Address | None = None,
        user_agent: str | None = None,
    ) -> APIKey | None:
        """Authorize an API key like the method `authorize`, but return None if access is denied.

        `verify` requires no scopes, so `verify` also returns an API key during a pause of trading.
        To authorize a trade, call `authorize` with the scope that the trade requires.
        """
        try:
            return await self.authorize(raw_key, ip_address=ip_address, user_agent=user_agent)
        except AccessDenied:
            return None

    @forgets_locals
    async def _from_memory(
        self, raw_key: str, request: AccessRequest, *, count_use: bool
    ) -> APIKey | None:
        """Authorize an API key from the cache, or return None if the database must be read.

        Raises:
            AccessDenied: the API key does not allow the request. The subclass of AccessDenied shows
                why access is denied.
        """
        now = time.monotonic()
        if now - self._yielded_at > _YIELD_INTERVAL_SECONDS:
            # Without an await, calls that use the cache would block the listening connection. The
            # event loop polls a socket in one iteration, and reads the socket in the next.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self._yielded_at = now = time.monotonic()
        digest = self._digest(raw_key)
        if now >= self._valid_until or (cached := self._cache.get(digest)) is None:
            return None
        permissions = cached.permissions
        if (permissions.limited and count_use) or now - cached.read_at >= MAX_AGE_SECONDS:
            return None
        self._cache.move_to_end(digest)
        now += self._clock_offset
        try:
            check_access(permissions, now, request, None)
        except AccessDenied as reason:
            prefix = cached.key.key_prefix
            ids = permissions.key_id, permissions.account_id
            writer = self.database.out_of_band
            await record_denial(writer, reason, prefix, request, ids=ids, actor=None)
            raise
        if count_use:
            self.database.usage_counter.count(permissions.key_id, now)
        return cached.key

    def _store(self, digest: bytes, verified: VerifiedKey) -> None:
        self._drop(self._digests.get(verified.permissions.key_id))
        while len(self._cache) >= self.capacity:
            self._drop(next(iter(self._cache)))
        permissions = verified.permissions
        self._cache[digest] = verified
        self._digests[permissions.key_id] = digest
        self._account_digests.setdefault(permissions.account_id, set()).add(digest)

    def _drop(self, digest: bytes | None) -> VerifiedKey | None:
        cached = self._cache.pop(digest, None) if digest is not None else None
        if digest is not None and cached is not None:
            permissions = cached.permissions
            del self._digests[permissions.key_id]
            digests = self._account_digests[permissions.account_id]
            digests.remove(digest)
            if not digests:
                del self._account_digests[permissions.account_id]
        return cached

    def _clear(self) -> None:
        self._notifications += 1
        self._valid_until = 0.0
        evicted = [*self._cache.values()]
        self._cache.clear()
        self._digests.clear()
        self._account_digests.clear()
        _free(evicted)

    def _digest(self, raw_key: str) -> bytes:
        try:
            return hashlib.blake2b(raw_key.encode(), digest_size=16, key=self._digest_key).digest()
        except (AttributeError, UnicodeEncodeError):  # the raw key is not valid text
            return b""

    async def _hold_lease(self, connection: Connection) -> None:
        """Send heartbeat queries until a query fails.

        After the answer to each query, the cache is valid for another `LEASE_SECONDS`.
        """
        while True:
            sent = time.monotonic()
            async with asyncio.timeout(LEASE_SECONDS):
                now = await connection.fetchval("SELECT clock_timestamp()")
            # Before the result of the heartbeat query, PostgreSQL sends the notifications of all
            # earlier commits. The difference between the database's clock and this process's clock
            # is measured from the start of the query. Therefore, a cached API key never
            # expires too late, but can expire too early by the duration of the query.
            self._clock_offset = now.timestamp() - sent
            self._valid_until = sent + LEASE_SECONDS
            self._listening.set()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def _handle_notification(self, payload: str | None) -> None:
        """Evict the changed API keys from the cache.

        The payload of a notification is the text `all`, or the word `key` or `account` followed
        by a space and the id of the changed API key or account.
        """
        kind, _, text = (payload or "").partition(" ")
        try:
            changed = UUID(text)
        except ValueError:
            kind = ""
        if kind == "key":
            self._notifications += 1
            self._drop(self._digests.get(changed))
        elif kind == "account":
            self._notifications += 1
            _free([self._drop(digest) for digest in [*self._account_digests.get(changed, ())]])
        else:
            # If the payload is `all`, or None because the connection was opened or lost, or unknown
            # to this release, any API key has possibly changed.
            self._clear()


def _free(evicted: list[VerifiedKey] | list[VerifiedKey | None]) -> None:
    """Free evicted API keys in several iterations of the event loop, because each key takes 10 µs.

    `evicted` must hold the last references to the API keys.
    """
    del evicted[-_FREED_AT_ONCE:]
    if evicted:
        asyncio.get_running_loop().call_soon(_free, evicted)

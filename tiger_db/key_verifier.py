"""Authorize API keys for servers, with a cache of verified keys."""

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
from tiger_db.crud.api_keys.authorize import VerifiedKey, authorize_parsed_key, denial_event
from tiger_db.crud.api_keys.key_format import parse_key
from tiger_db.crud.api_keys.policy import AccessRequest, check_access
from tiger_db.database import Database
from tiger_db.errors import AccessDenied, InvalidAPIKey, InvalidValue, SchemaMismatch
from tiger_db.migrations.comparison import find_differences
from tiger_db.models import APIKey, APIKeyScope

CHANNEL = "tiger_db_api_keys"
_TABLES = {"api_keys", "tiger_accounts"}  # whose triggers notify the channel
HEARTBEAT_SECONDS = 0.2  # between two queries on the listening connection
LEASE_SECONDS = 0.5  # from a heartbeat, during which cached keys are valid
MAX_AGE_SECONDS = 60.0  # after which a cached key is read again, even without a notification
_YIELD_SECONDS = 0.005  # after which a call lets the event loop read notifications


class KeyVerifier:
    """Authorizes API keys without a session, in one event loop.

    Each call reads the row of the key with one query, so that no answer is older than the call. The
    hash is verified once, and again when the row has changed.

    With `memory=True`, an entered verifier listens for changes, and authorizes verified keys from a
    cache. Triggers on api_keys and tiger_accounts notify it of each change within milliseconds,
    also of changes by plain SQL. `__aenter__` compares them with `migrations.declared`. A cached
    key is read again after 60 s, in case that a notification is missing. Every call reads the
    database while the listening connection is lost or has not answered for half a second, and for
    each key with rate limits.

    The cache holds at most `capacity` keys, by digests under a random key instead of the raw keys.
    The least recently used key is evicted first.

    Raises:
        InvalidValue: `capacity` is not positive.
    """

    def __init__(self, database: Database, *, memory: bool = False, capacity: int = 10_000) -> None:
        if capacity < 1:
            raise InvalidValue("capacity must be positive")
        self.database = database
        self.memory = memory
        self.capacity = capacity
        self._digest_key = secrets.token_bytes(32)
        self._cache: OrderedDict[bytes, VerifiedKey] = OrderedDict()  # by digest
        self._digests: dict[UUID, bytes] = {}  # by id of the key
        self._notifications = 0  # a row that was read before a notification is not cached
        self._valid_until = 0.0  # monotonic time of the end of the lease
        self._clock_offset = 0.0  # from monotonic time to the database's, in seconds since 1970
        self._yielded_at = 0.0  # monotonic time
        self._listener: asyncio.Task[None] | None = None
        self._listening = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Check the schema. With memory, compare the triggers and start to listen.

        Raises:
            DatabaseUnavailable: the database cannot be reached.
            SchemaMismatch: the schema is missing, older or newer than this code, or, with memory, a
                trigger or its function differs from the declared one.
            ConfigurationError: with memory, behind a pooler and without `DB_DIRECT_HOST`.
        """
        if self.memory:
            self.database.settings.without_pooler()
        await self.database.check()
        if self.memory:
            await self._compare_triggers()
            settings = self.database.settings
            listening = listen(settings, CHANNEL, self._handle_notification, self._hold_lease)
            self._listener = asyncio.create_task(listening)
            with contextlib.suppress(TimeoutError):  # calls read the database until it listens
                await asyncio.wait_for(self._listening.wait(), settings.db_connect_timeout)
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop listening. The database stays open."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])
            self._listener = None
            self._listening.clear()
        self._clear()

    async def _compare_triggers(self) -> None:
        async with self.database.engine.connect() as connection:
            for difference in await find_differences(connection):
                if not (difference.undeclared or _TABLES.isdisjoint(difference.tables)):
                    raise SchemaMismatch(
                        "a KeyVerifier with memory relies on api_keys and tiger_accounts as"
                        f" tiger_db makes them, but {difference.description}: run `tiger-db check`"
                    )

    async def authorize(
        self,
        raw_key: str,
        *,
        scopes: Iterable[APIKeyScope] = (),
        account_id: UUID | None = None,
        ip_address: str | IPv4Address | IPv6Address | None = None,
        user_agent: str | None = None,
    ) -> APIKey:
        """Authorize a key as `crud.api_keys.authorize_api_key` does.

        All callers get the same object of a key: do not change it.
        """
        request = AccessRequest(tuple(scopes), account_id, ip_address, user_agent)
        if self._listener is not None:
            key = await self._from_memory(raw_key, request)
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
                parsed, request, self.database.info, cached=self._cache.get(digest)
            )
        except AccessDenied:
            self._drop(digest)
            raise
        if changes == self._notifications and not verified.outdated:
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
        """Authorize a key as `authorize` does. Return None if the key is denied."""
        try:
            return await self.authorize(raw_key, ip_address=ip_address, user_agent=user_agent)
        except AccessDenied:
            return None

    async def _from_memory(self, raw_key: str, request: AccessRequest) -> APIKey | None:
        """Authorize a key from the cache. Return None if the database must be read.

        Raises:
            AccessDenied: a subclass of it, by the check that failed.
        """
        now = time.monotonic()
        if now - self._yielded_at > _YIELD_SECONDS:
            # Calls without any other await would starve the listening connection. The event loop
            # polls the socket in its first iteration, and reads it in its second.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self._yielded_at = now = time.monotonic()
        digest = self._digest(raw_key)
        if now >= self._valid_until or (cached := self._cache.get(digest)) is None:
            return None
        permissions = cached.permissions
        if permissions.limited or now - cached.read_at >= MAX_AGE_SECONDS:
            return None
        self._cache.move_to_end(digest)
        now += self._clock_offset
        try:
            check_access(permissions, now, request)
        except AccessDenied as reason:
            prefix = cached.key.key_prefix
            event = denial_event(
                reason, prefix, request, permissions.key_id, permissions.account_id
            )
            await self.database.out_of_band.record(event)
            raise
        self.database.usage_counter.count(permissions.key_id, now)
        return cached.key

    def _store(self, digest: bytes, verified: VerifiedKey) -> None:
        self._drop(self._digests.get(verified.permissions.key_id))
        while len(self._cache) >= self.capacity:
            self._drop(next(iter(self._cache)))
        self._cache[digest] = verified
        self._digests[verified.permissions.key_id] = digest

    def _drop(self, digest: bytes | None) -> None:
        cached = self._cache.pop(digest, None) if digest is not None else None
        if cached is not None:
            del self._digests[cached.permissions.key_id]

    def _clear(self) -> None:
        self._notifications += 1
        self._valid_until = 0.0
        self._cache.clear()
        self._digests.clear()

    def _digest(self, raw_key: str) -> bytes:
        try:
            return hashlib.blake2b(raw_key.encode(), digest_size=16, key=self._digest_key).digest()
        except (AttributeError, UnicodeEncodeError):  # not a string, or not a key
            return b""

    async def _hold_lease(self, connection: Connection) -> None:
        """Query the listening connection until it fails, and extend the lease after each answer."""
        while True:
            sent = time.monotonic()
            async with asyncio.timeout(LEASE_SECONDS):
                now = await connection.fetchval("SELECT clock_timestamp()")
            # Notifications of transactions that were committed before this query arrive before its
            # result. The offset is measured from the time of sending, so that a key may expire too
            # early by the round trip, but never too late.
            self._clock_offset = now.timestamp() - sent
            self._valid_until = sent + LEASE_SECONDS
            self._listening.set()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    def _handle_notification(self, payload: str | None) -> None:
        """Evict the keys of a notification: `key ID`, `account ID`, or `all` after a TRUNCATE."""
        kind, _, text = (payload or "").partition(" ")
        try:
            changed = UUID(text)
        except ValueError:  # `all`, or notifications may be missing
            self._clear()
            return
        self._notifications += 1
        if kind == "key":
            self._drop(self._digests.get(changed))
        else:
            for digest, cached in list(self._cache.items()):
                if cached.permissions.account_id == changed:
                    self._drop(digest)

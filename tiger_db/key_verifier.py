"""Authorize API keys for servers, with a cache of verified keys."""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType
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
_TABLES = {"api_keys", "tiger_accounts"}  # whose triggers notify
HEARTBEAT = 0.2  # seconds between queries on the listening connection
LEASE = 0.5  # seconds after a heartbeat was sent in which memory may answer
MAX_AGE = 60.0  # seconds after which a remembered key is read again, notified or not
_YIELD_AFTER = 0.005  # seconds after which a call lets the event loop read notifications


class KeyVerifier:
    """Authorize API keys without a session. A verifier belongs to one event loop.

    Each call reads the row of the key with one query, so that no answer is older than the call. The
    hash is verified once, and again when the row has changed.

    With `memory=True`, while the verifier is entered, a connection listens for changes, and a
    verified key is authorized from memory. A change by anyone, by raw SQL too, takes effect within
    milliseconds, through the notifications of triggers on api_keys and tiger_accounts; these are
    compared with `migrations.declared` when the verifier is entered. A key is read again 60 s after
    it was read, so a change without a notification takes effect by then. If the connection is lost
    or has not answered for half a second, every call reads the database until the verifier listens
    again. Every call for a key with rate limits reads the database.

    At most `capacity` keys are remembered, by digests under a random key instead of the raw keys.
    The least recently used key is forgotten first.

    Raises:
        InvalidValue: `capacity` is not positive.
    """

    def __init__(self, database: Database, *, memory: bool = False, capacity: int = 10_000) -> None:
        if capacity < 1:
            raise InvalidValue("capacity must be positive")
        self.database = database
        self.memory = memory
        self.capacity = capacity
        self._changes = 0  # notifications received: no row that was read before one is remembered
        self._digest_key = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, VerifiedKey] = OrderedDict()
        self._digests: dict[UUID, bytes] = {}
        self._until = 0.0  # this machine's monotonic time up to which memory may answer
        self._offset = 0.0  # from that time to the database's, in seconds since 1970
        self._yielded_at = 0.0  # this machine's monotonic time
        self._listener: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Check the schema; with memory, compare the triggers and start to listen.

        Raises:
            DatabaseUnavailable: the database cannot be reached.
            SchemaMismatch: the schema is missing, or older or newer than this code; with memory,
                also: a trigger or its function differs from the declared one.
            ConfigurationError: with memory, behind a pooler and without `DB_DIRECT_HOST`.
        """
        if self.memory:
            self.database.settings.without_pooler()
        await self.database.check()
        if self.memory:
            await self._compare_triggers()
            listening = asyncio.Event()
            self._listener = asyncio.create_task(self._listen(listening))
            with contextlib.suppress(TimeoutError):  # meanwhile, calls read the database
                await asyncio.wait_for(listening.wait(), self.database.settings.db_connect_timeout)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop listening. The database stays open, because it belongs to the caller."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])
            self._listener = None
        self._forget()

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

        All callers get the same object of a key, as it was when it was read: do not change it.
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
        changes, read_at = self._changes, time.monotonic()
        try:
            verified = await authorize_parsed_key(
                parsed, request, self.database.info, known=self._known.get(digest)
            )
        except AccessDenied:
            self._drop(digest)
            raise
        if changes == self._changes and not verified.outdated:
            verified.read_at = read_at
            self._keep(digest, verified)
        return verified.key

    async def verify(
        self,
        raw_key: str,
        *,
        ip_address: str | IPv4Address | IPv6Address | None = None,
        user_agent: str | None = None,
    ) -> APIKey | None:
        """Verify a key as `crud.api_keys.verify_api_key` does; callers share the key."""
        try:
            return await self.authorize(raw_key, ip_address=ip_address, user_agent=user_agent)
        except AccessDenied:
            return None

    async def _from_memory(self, raw_key: str, request: AccessRequest) -> APIKey | None:
        """Authorize a key from memory; return None if the database must be read.

        Raises:
            AccessDenied: one of its subclasses, by the reason.
        """
        now = time.monotonic()
        if now - self._yielded_at > _YIELD_AFTER:
            # A caller that awaits nothing else would starve the listening connection. The event
            # loop polls the socket in its first iteration, and reads it in its second.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self._yielded_at = now = time.monotonic()
        digest = self._digest(raw_key)
        if now >= self._until or (known := self._known.get(digest)) is None:
            return None
        permissions = known.permissions
        if permissions.limited or now - known.read_at >= MAX_AGE:
            return None
        self._known.move_to_end(digest)
        now += self._offset
        try:
            check_access(permissions, now, request)
        except AccessDenied as reason:
            prefix = known.key.key_prefix
            event = denial_event(
                reason, prefix, request, permissions.key_id, permissions.account_id
            )
            await self.database.out_of_band.record(event)
            raise
        self.database.usage_counter.count(permissions.key_id, now)
        return known.key

    def _keep(self, digest: bytes, verified: VerifiedKey) -> None:
        self._drop(self._digests.get(verified.permissions.key_id))
        while len(self._known) >= self.capacity:
            self._drop(next(iter(self._known)))
        self._known[digest] = verified
        self._digests[verified.permissions.key_id] = digest

    def _drop(self, digest: bytes | None) -> None:
        known = self._known.pop(digest, None) if digest is not None else None
        if known is not None:
            del self._digests[known.permissions.key_id]

    def _forget(self) -> None:
        self._changes += 1
        self._until = 0.0
        self._known.clear()
        self._digests.clear()

    def _digest(self, raw_key: str) -> bytes:
        try:
            return hashlib.blake2b(raw_key.encode(), digest_size=16, key=self._digest_key).digest()
        except (AttributeError, UnicodeEncodeError):  # no string, or one that cannot be a key
            return b""

    async def _listen(self, listening: asyncio.Event) -> None:
        """Follow the changes of API keys until cancelled. `listening` is set once that works."""

        async def hold_lease(connection: Connection) -> None:
            while True:
                sent = time.monotonic()
                async with asyncio.timeout(LEASE):
                    now = await connection.fetchval("SELECT clock_timestamp()")
                # The notifications of all transactions that were committed before this query have
                # come before its answer. The database's time is set against the time of sending, so
                # a key may expire too early by the round trip, but never too late.
                self._offset = now.timestamp() - sent
                self._until = sent + LEASE
                listening.set()
                await asyncio.sleep(HEARTBEAT)

        await listen(self.database.settings, CHANNEL, self._changed, hold_lease)

    def _changed(self, payload: str | None) -> None:
        """Forget the keys of a notification: `key ID`, `account ID`, or `all` after a TRUNCATE."""
        if payload is None:  # notifications may have been missed
            self._forget()
            return
        self._changes += 1
        kind, _, text = payload.partition(" ")
        try:
            changed = UUID(text)
        except ValueError:
            self._known.clear()
            self._digests.clear()
            return
        if kind == "key":
            self._drop(self._digests.get(changed))
        else:
            for digest, known in list(self._known.items()):
                if known.permissions.account_id == changed:
                    self._drop(digest)

"""Authorize API keys for a server: from the database, or from memory while it is kept current."""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType
from typing import Self
from uuid import UUID

import asyncpg
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import col

from tiger_db.crud.api_keys.authorizing import replace_hash
from tiger_db.crud.api_keys.decision import Powers, Request, decide, denial
from tiger_db.crud.api_keys.hashing import (
    UnpepperedHash,
    outdated,
    peppers_of,
    refuse_unpeppered,
    verify_secret,
)
from tiger_db.crud.api_keys.limits import take
from tiger_db.crud.api_keys.text import KeyText, parse_key
from tiger_db.database import Database
from tiger_db.declared import compare
from tiger_db.errors import AccessDenied, InvalidAPIKey, SchemaMismatch
from tiger_db.listener import Connection, listen
from tiger_db.models import APIKey, APIKeyScope

CHANNEL = "tiger_db_api_keys"
_TABLES = {"api_keys", "tiger_accounts"}  # whose changes are heard of
HEARTBEAT = 0.2  # seconds between questions to the listening connection
LEASE = 0.5  # seconds for which an answer vouches that no change was missed
MAX_AGE = 60.0  # seconds after which a remembered key is read again, whatever was heard
_TURN = 0.005  # seconds after which the event loop gets a turn, to hear of changes

_COUNTERS = {"usage_count", "last_used_at", "updated_at"}  # which change with every use
_COLUMNS = ", ".join(f"k.{c.name}" for c in APIKey.__table__.columns if c.name not in _COUNTERS)  # type: ignore[attr-defined]  # SQLAlchemy's
FIND = f"""
SELECT {_COLUMNS}, a.status AS account_status, clock_timestamp() AS now FROM api_keys AS k
LEFT JOIN tiger_accounts AS a ON a.id = k.tiger_account_id WHERE k.key_prefix = $1
"""  # noqa: S608  # names of columns


@dataclass(slots=True)
class _Known:
    """A key whose text was checked, and the row it was checked against."""

    key: APIKey
    powers: Powers
    row: tuple[object, ...] = field(repr=False)
    read_at: float  # this machine's monotonic time, before the row was read


class KeyVerifier:
    """Authorize API keys outside of any session.

    Each call reads the row of the key by one plain fetch, so that no answer is older than that. The
    hash is verified once, and again when the row has changed. A verifier serves one event loop.

    `memory=True`: while the verifier is entered, a connection of its own listens for changes, and a
    key that was checked is authorized from memory. A change by anyone, also by raw SQL, is honoured
    within milliseconds, by notifications that triggers of api_keys and tiger_accounts send; these
    are compared with `tiger_db.declared` when the verifier is entered. A key that was read 60 s ago
    is read again upon use, so that a change without a notification is honoured by then. When the
    connection is lost, or has not answered for half a second, every call reads the database until
    the verifier listens again; so does every call for a key with limits.

    Digests of at most `capacity` good keys are kept, under a random key, never their text. The one
    that was unused for longest is forgotten first.
    """

    def __init__(self, database: Database, *, memory: bool = False, capacity: int = 10_000) -> None:
        self.database = database
        self.memory = memory
        self.capacity = capacity
        self._apart = database.write_behind
        self._digest_key = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._digests: dict[UUID, bytes] = {}
        self._changes = 0  # how many were heard of, so that nothing read before one is kept
        self._until = 0.0  # this machine's monotonic time up to which memory may answer
        self._offset = 0.0  # from that time to the database's, in seconds since 1970
        self._turned = 0.0
        self._listener: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Check the schema; with memory, compare the triggers and start to listen.

        Raises:
            DatabaseUnavailable: it cannot be reached.
            SchemaMismatch: its schema is missing, or older or newer than this code; with memory,
                also: a trigger, or a function that one calls, was changed.
            ConfigurationError: with memory, behind a pooler and without `DB_DIRECT_HOST`.
        """
        if self.memory:
            self.database.settings.directly()
        await self.database.check()
        if self.memory:
            await self._compare_triggers()
            listening = asyncio.Event()
            self._listener = asyncio.create_task(self._listen(listening))
            with contextlib.suppress(TimeoutError):  # until then, the database answers
                await asyncio.wait_for(listening.wait(), self.database.settings.db_connect_timeout)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop listening, and leave the database open: it belongs to the caller."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])
            self._listener = None
        self._forget()

    async def _compare_triggers(self) -> None:
        async with self.database.engine.connect() as connection:
            for difference in await compare(connection):
                if not (difference.unknown or _TABLES.isdisjoint(difference.tables)):
                    raise SchemaMismatch(
                        "a KeyVerifier with memory relies on api_keys and tiger_accounts as"
                        f" tiger_db makes them, but {difference.seen}: run `tiger-db check`"
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
        """As `crud.api_keys.authorize_api_key`.

        The key is one object for all who ask for it, as it was when it was read: do not change it.
        """
        request = Request(tuple(scopes), account_id, ip_address, user_agent)
        if self._listener is not None:
            key = await self._from_memory(raw_key, request)
            if key is not None:
                return key
        return await self._from_database(raw_key, request)

    async def verify(
        self,
        raw_key: str,
        *,
        ip_address: str | IPv4Address | IPv6Address | None = None,
        user_agent: str | None = None,
    ) -> APIKey | None:
        """As `crud.api_keys.verify_api_key`; the key is shared, see `authorize`."""
        try:
            return await self.authorize(raw_key, ip_address=ip_address, user_agent=user_agent)
        except AccessDenied:
            return None

    async def _from_memory(self, raw_key: str, request: Request) -> APIKey | None:
        """Return the key, or None if the database has to be asked.

        Raises:
            AccessDenied: one of its subclasses, by the reason.
        """
        now = time.monotonic()
        if now - self._turned > _TURN:
            # A caller that never waits for anything else would keep changes from being heard: one
            # turn to see that there is something to read, one to read it.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self._turned = now = time.monotonic()
        digest = self._digest(raw_key)
        if now >= self._until or (known := self._known.get(digest)) is None:
            return None
        powers = known.powers
        if powers.limited or now - known.read_at >= MAX_AGE:
            return None
        self._known.move_to_end(digest)
        now += self._offset
        try:
            decide(powers, now, request)
        except AccessDenied as reason:
            prefix = known.key.key_prefix
            event = denial(reason, prefix, request, powers.key_id, powers.account_id)
            await self._apart.record(event)
            raise
        self._apart.count(powers.key_id, now)
        return known.key

    async def _from_database(self, raw_key: str, request: Request) -> APIKey:
        text = parse_key(raw_key)
        if text is None:
            raise InvalidAPIKey
        await self.database.check()
        peppers = peppers_of(self.database.info)
        while True:
            changes, read_at, row = self._changes, time.monotonic(), None
            try:
                async with self._apart.connection() as connection:
                    row = await connection.fetchrow(FIND, text.prefix)
                    known = self._unchanged(text, row)
                    if known is not None:
                        known.read_at = read_at
                        passed = await _passes(known.powers, row, request, connection)
                if known is None:
                    known = await self._check(text, row, changes, read_at)
                    async with self._apart.connection() as connection:
                        passed = await _passes(known.powers, row, request, connection)
                        hashed = {"key_hash": row["key_hash"], "pepper_id": row["pepper_id"]}
                        if passed and outdated(peppers, *hashed.values()):
                            await replace_hash(
                                connection, peppers, text, request, known.powers, **hashed
                            )
            except AccessDenied as reason:
                ids = (row["id"], row["tiger_account_id"]) if row is not None else (None, None)
                await self._apart.record(denial(reason, text.prefix, request, *ids))
                if isinstance(reason, UnpepperedHash):
                    raise InvalidAPIKey from None
                raise
            if passed:
                self._apart.count(known.powers.key_id, row["now"].timestamp())
                return known.key

    def _unchanged(self, text: KeyText, row: "asyncpg.Record | None") -> _Known | None:
        """What was checked before on the same row."""
        digest = self._digest(text.raw_key)
        known = self._known.get(digest)
        if known is None or row is None or known.row != _columns(row):
            return None
        self._known.move_to_end(digest)
        return known

    async def _check(
        self, text: KeyText, row: "asyncpg.Record | None", changes: int, read_at: float
    ) -> _Known:
        """The key, if the text is its own; then it is remembered.

        Raises:
            InvalidAPIKey: it is not, or there is no key; both take as long.
        """
        peppers = peppers_of(self.database.info)
        key_hash: str = row["key_hash"] if row is not None else ""
        pepper_id: str | None = row["pepper_id"] if row is not None else None
        if not await verify_secret(peppers, text.secret, key_hash, pepper_id) or row is None:
            raise InvalidAPIKey
        refuse_unpeppered(self.database.info, pepper_id, row["now"].timestamp())
        async with AsyncSession(self._apart.engine) as session:
            key = await session.scalar(select(APIKey).where(col(APIKey.id) == row["id"]))
        if key is None:
            raise InvalidAPIKey
        known = _Known(key, Powers.of(row, row["account_status"]), _columns(row), read_at)
        if changes == self._changes and not outdated(peppers, key_hash, pepper_id):
            self._keep(self._digest(text.raw_key), known)
        return known

    def _keep(self, digest: bytes, known: _Known) -> None:
        self._drop(self._digests.get(known.powers.key_id))
        while len(self._known) >= self.capacity:
            self._drop(next(iter(self._known)))
        self._known[digest] = known
        self._digests[known.powers.key_id] = digest

    def _drop(self, digest: bytes | None) -> None:
        known = self._known.pop(digest, None) if digest is not None else None
        if known is not None:
            del self._digests[known.powers.key_id]

    def _forget(self) -> None:
        self._changes += 1
        self._until = 0.0
        self._known.clear()
        self._digests.clear()

    def _digest(self, raw_key: str) -> bytes:
        try:
            return hashlib.blake2b(raw_key.encode(), digest_size=16, key=self._digest_key).digest()
        except (AttributeError, UnicodeEncodeError):  # no text, or none that could be a key
            return b""

    async def _listen(self, listening: asyncio.Event) -> None:
        """Follow the changes of API keys until cancelled. `listening` is set once that works."""

        async def hold_lease(connection: Connection) -> None:
            while True:
                sent = time.monotonic()
                async with asyncio.timeout(LEASE):
                    now = await connection.fetchval("SELECT clock_timestamp()")
                # A change that was committed before the query was sent is heard of before its
                # answer. Counting from `sent` can honour an expiry too early, never too late.
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
                if known.powers.account_id == changed:
                    self._drop(digest)


def _columns(row: "asyncpg.Record") -> tuple[object, ...]:
    """All but the time."""
    return tuple(row)[:-1]


async def _passes(
    powers: Powers,
    row: "asyncpg.Record",
    request: Request,
    connection: "asyncpg.Connection[asyncpg.Record]",
) -> bool:
    """Decide on what was read just now; False: it has changed since, so read it again.

    Raises:
        AccessDenied: one of its subclasses, by the reason.
    """
    decide(powers, row["now"].timestamp(), request)
    return not powers.limited or await take(connection, powers)

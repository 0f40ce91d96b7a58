"""Refreshes access tokens as they become due: any number of workers on any number of machines."""

import asyncio
import logging
import math
import os
import socket
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import UUID, uuid4

import asyncpg
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError

from tiger_db import crud
from tiger_db.crud.common import get_or_raise
from tiger_db.database import AsyncSession, Database, connect_directly
from tiger_db.errors import (
    AnswerLost,
    Conflict,
    CredentialsRefused,
    DatabaseUnavailable,
    InvalidState,
    InvalidValue,
    LeaseLost,
    NotFound,
    QueryTimeout,
    RefreshFailed,
    RefreshLimited,
    StaleToken,
    TigerDBError,
)
from tiger_db.models import TigerAccount, TokenRefreshStatus, TokenStatus
from tiger_db.tokens import NewToken
from tiger_db.write_behind import LOST

T = TypeVar("T")
Refresher = Callable[[TigerAccount], Awaitable[NewToken]]
CHANNEL = "tiger_db_refreshes"
POLL = 5.0  # seconds after which it looks, though nothing was heard: for leases that ran out
_PAUSE = 0.2  # seconds before the database is tried again
_LONGEST_PAUSE = 5.0
_MINUTE = 60.0
_BEATS = 3  # in a lease
_GRACE = 30.0  # seconds
# SQLSTATE classes: connection, rollback by others, resources, intervention by the operator.
_PASSING = {"08", "40", "53", "55", "57"}
_TYPED = (DatabaseUnavailable, Conflict, QueryTimeout)  # which always pass
_logger = logging.getLogger("tiger_db")


class RefreshWorker:
    """Claims refreshes that are due, asks for the new tokens, and saves them.

    `refresher` is given an account, with its secrets readable, and returns its new token, or raises
    one of the errors derived from `RefreshFailed`. It should ask once, and end by itself. No
    transaction is open meanwhile, and the claim's lease is renewed. `per_minute` bounds how often
    this worker asks for one `tiger_id`, as brokers limit that.

    What the broker answered is saved whatever happens: while the database is away, it is tried
    again; when the claim was lost, the token is still offered to the account, which takes it if it
    is newer than what it has. Only `kill -9` between the answer and the commit loses a token. The
    next attempt then finds the old token refused: the account is suspended, with an event of
    severity critical that says so, until a person gives it a new token.
    """

    def __init__(
        self,
        database: Database,
        refresher: Refresher,
        *,
        concurrency: int = 4,
        lease: timedelta = timedelta(seconds=60),
        per_minute: int = 10,
        name: str | None = None,
    ) -> None:
        if concurrency < 1 or per_minute < 1 or lease <= timedelta(0):
            raise InvalidValue("concurrency, per_minute and lease must be positive")
        self.database = database
        self.refresher = refresher
        self.concurrency = concurrency
        self.lease = lease
        self.per_minute = per_minute
        self.name = name or f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:6]}"[-100:]
        self.counts: Counter[str] = Counter()  # of what became of its claims
        self._asked: dict[bytes | None, deque[float]] = defaultdict(deque)
        self._running: dict[UUID, asyncio.Task[None]] = {}  # by refresh
        self._news = asyncio.Event()
        self._stopping = False
        self._give_up = math.inf

    def stop(self) -> None:
        """Claim nothing more: what is under way is finished, or given back; then `run` returns.

        A database that is away is waited for, for half a minute.
        """
        self._stopping = True
        self._give_up = time.monotonic() + _GRACE
        self._news.set()

    async def run(self, *, once: bool = False) -> None:
        """Work until `stop` is called, or, with `once`, until nothing is due.

        A database that is away is waited for.

        Raises:
            ConfigurationError: without `once`: there is a pooler, and no way past it is given.
        """
        if not once:
            self.database.settings.directly()
        listener = None if once else asyncio.create_task(self._listen())
        pause = _PAUSE
        try:
            while not self._stopping:
                self._news.clear()
                try:
                    wait = await self._claim()
                    pause = _PAUSE
                except (*_TYPED, DBAPIError) as error:
                    if once or not _passes(error):
                        raise
                    _logger.warning("refreshes wait for the database: %s", error)
                    wait, pause = pause, min(pause * 2, _LONGEST_PAUSE)
                if once and wait > 0 and not self._running and not self._news.is_set():
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), wait)
        finally:
            if listener is not None:
                listener.cancel()
                await asyncio.wait([listener])
            if self._running:
                await asyncio.wait(self._running.values())

    async def run_one(self, refresh_id: UUID) -> None:
        """Claim one refresh, if nobody has, and finish one attempt.

        Raises:
            InvalidState: another worker is at it, or it has ended.
        """
        start = time.monotonic()
        async with self.database.session() as session:
            claim = await crud.token_status.claim(
                session, refresh_id, worker=self.name, lease=self.lease
            )
        await self._refresh(claim, start)

    def _ended(self, refresh_id: UUID, task: asyncio.Task[None]) -> None:
        del self._running[refresh_id]
        self._news.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.counts["broken"] += 1
            _logger.error("a refresh broke: %s", type(error).__name__)

    async def _claim(self) -> float:
        """Start on what is due, as far as there is room; after how many seconds to look again."""
        free = min(self.concurrency - len(self._running), 1000)
        if free <= 0:
            return POLL
        start = time.monotonic()
        async with self.database.session() as session:
            claims = await crud.token_status.claim_due(
                session, worker=self.name, limit=free, lease=self.lease, skip=self._running
            )
        for claim in claims:
            task = asyncio.create_task(self._refresh(claim, start))
            self._running[claim.id] = task
            task.add_done_callback(partial(self._ended, claim.id))
        if len(claims) == free:
            return POLL if len(self._running) >= self.concurrency else 0.0
        async with self.database.session() as session:
            if await crud.token_status.schedule_due(session, limit=100):
                return 0.0
            wait = await crud.token_status.next_due(session)
        return POLL if wait is None else min(max(wait.total_seconds(), 0.0), POLL)

    async def _refresh(self, claim: TokenStatus, start: float) -> None:
        """One attempt at what was claimed not before `start`, by the monotonic clock."""
        account = claim.tiger_account
        try:
            wait = self._wait_for(account)
            if self._stopping or wait > 0:
                await self._saved(
                    lambda session: crud.token_status.give_back(
                        session, claim, wait=timedelta(seconds=wait)
                    )
                )
                self.counts["given back"] += 1
                return
            if time.monotonic() - start > self.lease.total_seconds() / _BEATS:
                # Not with a lease that others may take for lost.
                await self._saved(
                    lambda session: crud.token_status.heartbeat(session, claim, lease=self.lease)
                )
        except LeaseLost:
            self.counts["lost"] += 1
            return
        beating = asyncio.create_task(self._beat(claim))
        try:
            await self._ask(claim, account)
        finally:
            beating.cancel()
            await asyncio.wait([beating])

    async def _ask(self, claim: TokenStatus, account: TigerAccount) -> None:
        start = time.monotonic()

        def milliseconds() -> int:
            return round((time.monotonic() - start) * 1000)

        try:
            token = await self.refresher(account)
        except RefreshFailed as error:
            await self._fail(claim, account, error, milliseconds())
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a refresher may raise anything
            why = str(error) if isinstance(error, TigerDBError) else type(error).__name__
            await self._fail(claim, account, RefreshFailed(why), milliseconds())
        else:
            await self._complete(claim, account, token, milliseconds())

    async def _complete(
        self, claim: TokenStatus, account: TigerAccount, token: NewToken, milliseconds: int
    ) -> None:
        who = account.known_as()

        async def complete(session: AsyncSession) -> TokenStatus:
            return await crud.token_status.complete(
                session,
                claim,
                access_token=token.access_token,
                refresh_token=token.refresh_token,
                expires_at=token.expires_at,
                api_response_code=token.code,
                api_response_time_ms=milliseconds,
            )

        try:
            done = await self._saved(complete)
        except (LeaseLost, NotFound):
            await self._offer(claim, who, token)
        except (ValidationError, InvalidValue) as error:
            why = f"the new token cannot be stored: {type(error).__name__}"
            await self._fail(claim, account, AnswerLost(why, code=token.code), milliseconds)
        except StaleToken:
            self.counts["stale"] += 1
            _logger.warning("%s has a newer token than the one that was refreshed", who)
        else:
            self.counts["refreshed"] += 1
            _logger.info("%s has a new token; the next at %s", who, done.next_refresh_at)

    async def _offer(self, claim: TokenStatus, who: str, token: NewToken) -> None:
        """The claim was lost, or the commit was not confirmed: the token may be the valid one."""

        async def offer(session: AsyncSession) -> bool:
            now = await crud.token_status.get(session, claim.id)
            if now is not None and now.new_token_hash == crud.token_status.token_hash(
                token.access_token
            ):
                return True  # it was saved
            await crud.accounts.update_tokens(
                session,
                claim.tiger_account_id,
                access_token=token.access_token,
                refresh_token=token.refresh_token,
                token_expires_at=token.expires_at,
                refresh_id=claim.id,
            )
            return False

        try:
            saved = await self._saved(offer)
        except (InvalidState, NotFound) as error:  # StaleToken is one
            self.counts["lost"] += 1
            _logger.warning("%s: the claim was lost, and the token is not needed: %s", who, error)
            return
        self.counts["refreshed" if saved else "offered"] += 1
        if not saved:
            _logger.warning("%s: the claim was lost; its token was newer, and is kept", who)

    async def _fail(
        self, claim: TokenStatus, account: TigerAccount, error: RefreshFailed, milliseconds: int
    ) -> None:
        who = account.known_as()

        async def fail(session: AsyncSession) -> TokenStatus:
            refused, said = isinstance(error, CredentialsRefused), str(error)
            if refused:
                now = await get_or_raise(session, TigerAccount, account.id, lock=True)
                if now.readable_token() != account.readable_token():
                    refused, said = False, f"{error} (of a token that the account no longer has)"
            return await crud.token_status.fail(
                session,
                claim,
                error=said,
                error_code=type(error).__name__,
                retry_after=error.retry_after if isinstance(error, RefreshLimited) else None,
                credentials_dead=refused,
                answer_lost=isinstance(error, AnswerLost),
                api_response_code=error.code,
                api_response_time_ms=milliseconds,
            )

        try:
            done = await self._saved(fail)
        except (LeaseLost, NotFound):
            self.counts["lost"] += 1
            _logger.warning("%s: the claim was lost after a failure", who)
            return
        self.counts["failed"] += 1
        again = (
            "given up"
            if done.status == TokenRefreshStatus.FAILED
            else f"again at {done.scheduled_at}"
        )
        _logger.warning("%s: no new token: %s; %s", who, done.error_message, again)

    async def _beat(self, claim: TokenStatus) -> None:
        """Renew the lease until it is lost; a database that is away may be back in time."""
        while True:
            await asyncio.sleep(self.lease.total_seconds() / _BEATS)
            try:
                async with self.database.session() as session:
                    await crud.token_status.heartbeat(session, claim, lease=self.lease)
            except LeaseLost:
                return
            except (*_TYPED, DBAPIError) as error:
                if not _passes(error):
                    raise

    async def _saved(self, work: Callable[[AsyncSession], Coroutine[Any, Any, T]]) -> T:
        """What a transaction returns, which is tried again as long as the database is away."""
        pause = _PAUSE
        while True:
            try:
                async with self.database.session() as session:
                    return await work(session)
            except (*_TYPED, DBAPIError) as error:
                if not _passes(error) or time.monotonic() > self._give_up:
                    raise
                _logger.warning("a refresh waits for the database: %s", type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _wait_for(self, account: TigerAccount) -> float:
        """Seconds until the account's `tiger_id` may be asked for again; if none, it counts."""
        now = time.monotonic()
        asked = self._asked[account.tiger_id_fingerprint]
        while asked and asked[0] <= now - _MINUTE:
            asked.popleft()
        if len(asked) >= self.per_minute:
            return asked[0] + _MINUTE - now
        asked.append(now)
        return 0.0

    async def _listen(self) -> None:
        """Wake up when PostgreSQL tells that something is due, however often the line breaks."""
        while True:
            with suppress(*LOST, TigerDBError, TimeoutError, asyncpg.PostgresError):
                connection = await connect_directly(self.database.settings)
                try:
                    gone = asyncio.Event()
                    connection.add_termination_listener(lambda _, gone=gone: gone.set())
                    await connection.add_listener(
                        self.database.settings.channel(CHANNEL), lambda *_: self._news.set()
                    )
                    self._news.set()  # for what came before
                    await gone.wait()
                finally:
                    connection.terminate()
            await asyncio.sleep(_PAUSE)


def _passes(error: Exception) -> bool:
    """Whether the same transaction may succeed later: the server was away, or others in the way."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
    lost = getattr(error, "connection_invalidated", False)
    return isinstance(error, _TYPED) or lost or state[:2] in _PASSING

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

from sqlalchemy.exc import DBAPIError

from tiger_db import crud
from tiger_db.connections.listener import listen
from tiger_db.crud.common import get_or_raise, replace_unstorable
from tiger_db.database import AsyncSession, Database
from tiger_db.errors import (
    AnswerLost,
    CredentialsRefused,
    InvalidState,
    InvalidValue,
    LeaseLost,
    NotFound,
    RefreshFailed,
    RefreshLimited,
    StaleToken,
    TigerDBError,
)
from tiger_db.models import Entity, TigerAccount, TokenRefreshStatus, TokenStatus
from tiger_db.models.token_status import NewToken
from tiger_db.sqlstates import is_transient

T = TypeVar("T")
Refresher = Callable[[TigerAccount], Awaitable[NewToken]]
CHANNEL = "tiger_db_refreshes"
POLL = 5.0  # seconds after which it looks, though nothing was heard: for leases that ran out
_PAUSE = 0.2  # seconds before the database is tried again
_LONGEST_PAUSE = 5.0
_MINUTE = 60.0
_BEATS = 3  # in a lease
_GRACE = 30.0  # seconds from `stop` to the end of `run`
_RESERVE = 0.2  # of the grace, to store what became of the attempts
_LAST = 0.05  # of the grace, to end what is still under way
_CANCELLING = 1.0  # seconds for a task to end that was cancelled
_LONGEST_CODE = 50  # characters
_LONGEST_WAIT = timedelta(days=7)  # that a broker may ask for
_logger = logging.getLogger("tiger_db")


class RefreshWorker:
    """Claims refreshes that are due, asks for the new tokens, and saves them.

    `refresher` is given an account, with its secrets readable, and returns its new token, or raises
    one of the errors derived from `RefreshFailed`. It should ask once, and end by itself. No
    transaction is open meanwhile, and the claim's lease is renewed. `per_minute` bounds how often
    this worker asks for one `tiger_id`, as brokers limit that.

    A refresher that takes longer than `attempt_timeout` is cancelled: the broker may have issued a
    token, so the attempt fails with `AnswerLost`. A refresher that does not end when it is
    cancelled is left behind; a token that it returns after all is offered to the account. Neither
    helps against a refresher that blocks the event loop.

    What the broker answered is saved whatever happens: while the database is away, it is tried
    again; when the claim was lost, the token is still offered to the account, which takes it if it
    is newer than what it has. What else came with a token is left out where it cannot be stored.
    Only `kill -9` between the answer and the commit loses a token. The next attempt then finds the
    old token refused: the account is suspended, with an event of severity critical that says so,
    until a person gives it a new token.

    Raises:
        InvalidValue: `concurrency`, `lease`, `attempt_timeout` or `per_minute` is not positive.
    """

    def __init__(
        self,
        database: Database,
        refresher: Refresher,
        *,
        concurrency: int = 4,
        lease: timedelta = timedelta(seconds=60),
        attempt_timeout: timedelta = timedelta(minutes=2),
        per_minute: int = 10,
        name: str | None = None,
    ) -> None:
        if concurrency < 1 or per_minute < 1 or min(lease, attempt_timeout) <= timedelta(0):
            raise InvalidValue("concurrency, per_minute, lease, attempt_timeout must be positive")
        self.database = database
        self.refresher = refresher
        self.concurrency = concurrency
        self.lease = lease
        self.attempt_timeout = attempt_timeout
        self.per_minute = per_minute
        self.name = name or f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:6]}"[-100:]
        self.counts: Counter[str] = Counter()  # of what became of its claims
        self._asked: dict[bytes | None, deque[float]] = defaultdict(deque)
        self._running: dict[UUID, asyncio.Task[None]] = {}  # by refresh
        self._news = asyncio.Event()
        self._late: set[asyncio.Task[Any]] = set()  # refreshers left behind, and their offers
        self._stopping = asyncio.Event()
        self._give_up = math.inf

    def stop(self) -> None:
        """Claim nothing more, finish or give back what is under way, and have `run` return.

        It returns within half a minute: by then a refresher that has not answered is cancelled, as
        after `attempt_timeout`, and an outcome that could not be stored is left to the next worker.
        """
        self._give_up = min(self._give_up, time.monotonic() + _GRACE)
        self._stopping.set()
        self._news.set()

    async def run(self, *, once: bool = False) -> None:
        """Work until `stop` is called, or, with `once`, until nothing is due.

        A database that is away is waited for. Cancelling it is `stop`, too.

        Raises:
            ConfigurationError: without `once`: there is a pooler, and no way past it is given.
        """
        if not once:
            self.database.settings.without_pooler()
        working = asyncio.create_task(self._work(once=once))
        try:
            await self._wait(working, reserve=_LAST)
        except asyncio.CancelledError:
            self.stop()
            await self._wait(working, reserve=_LAST)
            raise
        finally:
            if not working.done():
                _logger.warning("%d refreshes were not finished in time", len(self._running))
                await _cancel(working, *self._running.values())
        if working.done() and not working.cancelled():
            working.result()

    async def _work(self, *, once: bool) -> None:
        listener = None
        if not once:
            hearing = listen(self.database.settings, CHANNEL, lambda _: self._news.set())
            listener = asyncio.create_task(hearing)
        pause = _PAUSE
        try:
            while not self._stopping.is_set():
                self._news.clear()
                try:
                    wait = await self._claim()
                    pause = _PAUSE
                except (TigerDBError, DBAPIError) as error:
                    if once or not is_transient(error):
                        raise
                    _logger.warning("refreshes wait for the database: %s", error)
                    wait, pause = pause, min(pause * 2, _LONGEST_PAUSE)
                if once and wait > 0 and not self._running and not self._news.is_set():
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), wait)
        finally:
            if listener is not None:
                await _cancel(listener)
            if self._running:
                await asyncio.wait(self._running.values())

    async def _wait(
        self, task: asyncio.Task[Any], seconds: float | None = None, *, reserve: float = 0.0
    ) -> None:
        """Wait for a task to end, or for its time to be up.

        That is after `seconds`, and when `stop` was called, at the end of the grace but for
        `reserve`, a share of it.
        """
        start = time.monotonic()
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait(
                {task, stopping}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            stopping.cancel()
        if not task.done() and self._stopping.is_set():
            end = self._give_up - reserve * _GRACE
            if seconds is not None:
                end = min(end, start + seconds)
            await asyncio.wait({task}, timeout=max(end - time.monotonic(), 0))

    async def run_one(self, refresh_id: UUID) -> None:
        """Claim one refresh, if nobody has, and finish one attempt.

        Raises:
            InvalidState: another worker is at it, it has ended, or its attempts are used up.
        """
        start = time.monotonic()
        async with self.database.session() as session:
            await crud.token_status.fail_expired_leases(session, skip=self._running)
        async with self.database.session() as session:
            claim = await crud.token_status.claim(
                session, refresh_id, worker=self.name, lease=self.lease
            )
        await self._refresh(claim, start)

    def _ended(self, refresh_id: UUID, task: asyncio.Task[None]) -> None:
        del self._running[refresh_id]
        self._news.set()
        if task.cancelled():
            self.counts["abandoned"] += 1
        elif (error := task.exception()) is not None:
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
            if self._stopping.is_set() or wait > 0:
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
        answer = await self._answer(claim, account)
        milliseconds = round((time.monotonic() - start) * 1000)
        failure = (
            await self._complete(claim, account, answer, milliseconds)
            if isinstance(answer, NewToken)
            else answer
        )
        if failure is not None:
            await self._fail(claim, account, failure, milliseconds)

    async def _answer(self, claim: TokenStatus, account: TigerAccount) -> NewToken | RefreshFailed:
        """Ask the refresher; return the token, or why there is none."""

        async def ask() -> NewToken:
            return await self.refresher(account)

        start = time.monotonic()
        asking = asyncio.create_task(ask())
        try:
            await self._wait(asking, self.attempt_timeout.total_seconds(), reserve=_RESERVE)
            if not asking.done():
                await _cancel(asking)
        finally:
            if not asking.done():
                asking.cancel()
                self._late.add(asking)
                asking.add_done_callback(partial(self._came_late, claim, account, start))
        if not asking.done() or asking.cancelled():
            return AnswerLost(
                "the refresher was stopped before it answered: the broker may have issued a token"
            )
        error = asking.exception()
        if isinstance(error, RefreshFailed):
            return error
        if error is not None:
            return RefreshFailed(
                _text(error) if isinstance(error, TigerDBError) else type(error).__name__
            )
        token = asking.result()
        if not isinstance(token, NewToken):
            return AnswerLost(f"the refresher returned no NewToken, but {type(token).__name__}")
        return token

    def _came_late(
        self,
        claim: TokenStatus,
        account: TigerAccount,
        start: float,
        asking: asyncio.Task[NewToken],
    ) -> None:
        """Store the token of a refresher that was left behind, if there is one and still time."""
        self._late.discard(asking)
        if asking.cancelled() or asking.exception() or not isinstance(asking.result(), NewToken):
            return
        if self._stopping.is_set():  # the database may be closed
            _logger.warning("%s: a token came too late, and is lost", account.label())
            return
        milliseconds = round((time.monotonic() - start) * 1000)
        storing = asyncio.create_task(self._complete(claim, account, asking.result(), milliseconds))
        self._late.add(storing)
        storing.add_done_callback(self._stored_late)

    def _stored_late(self, storing: asyncio.Task[AnswerLost | None]) -> None:
        self._late.discard(storing)
        if not storing.cancelled() and (error := storing.exception() or storing.result()):
            self.counts["broken"] += 1
            _logger.error("a token that came late is lost: %s", type(error).__name__)

    async def _complete(
        self, claim: TokenStatus, account: TigerAccount, token: NewToken, milliseconds: int
    ) -> AnswerLost | None:
        """Store a token with what came with it, as far as that can be stored; None: it is stored.

        Without it, if that fails still.
        """
        token = _storable(claim, account, token)
        for stored in (token, NewToken(token.access_token)):
            try:
                await self._store(claim, account.label(), stored, milliseconds)
            except Exception as error:
                if is_transient(error):
                    raise
                why = f"the new token cannot be stored: {type(error).__name__}"
            else:
                return None
        return AnswerLost(why, code=token.code)

    async def _store(
        self, claim: TokenStatus, who: str, token: NewToken, milliseconds: int
    ) -> None:
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
        who = account.label()

        async def fail(session: AsyncSession) -> TokenStatus:
            refused, said = isinstance(error, CredentialsRefused), _text(error)
            if refused:
                now = await get_or_raise(session, TigerAccount, account.id, lock=True)
                if now.readable_token() != account.readable_token():
                    refused, said = False, f"{error} (of a token that the account no longer has)"
            return await crud.token_status.fail(
                session,
                claim,
                error=said,
                error_code=replace_unstorable(type(error).__name__)[:_LONGEST_CODE],
                retry_after=_retry_after(error),
                credentials_refused=refused,
                answer_lost=isinstance(error, AnswerLost),
                api_response_code=_kept(claim, "api_response_code", error.code),
                api_response_time_ms=milliseconds,
            )

        async def lose(session: AsyncSession) -> None:
            await crud.token_status.fail_unknown(session, claim)

        try:
            try:
                done = await self._saved(fail)
            except (LeaseLost, NotFound):
                raise
            except Exception as problem:
                if is_transient(problem):
                    raise
                await self._saved(lose)
                self.counts["failed"] += 1
                _logger.error("%s: a failure cannot be stored: %s", who, type(problem).__name__)  # noqa: TRY400  # it may quote a secret
                return
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
            except (TigerDBError, DBAPIError) as error:
                if not is_transient(error):
                    raise

    async def _saved(self, work: Callable[[AsyncSession], Coroutine[Any, Any, T]]) -> T:
        """What a transaction returns, which is tried again as long as the database is away."""
        pause = _PAUSE
        while True:
            try:
                async with self.database.session() as session:
                    return await work(session)
            except (TigerDBError, DBAPIError) as error:
                if not is_transient(error) or time.monotonic() + pause > self._give_up:
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


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait for them to end, a second at most."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=_CANCELLING)


def _storable(claim: TokenStatus, account: TigerAccount, token: NewToken) -> NewToken:
    """Return a token without what else came with it and cannot be stored."""
    refresh_token = token.refresh_token
    return NewToken(
        token.access_token,
        expires_at=_kept(account, "token_expires_at", token.expires_at),
        refresh_token=refresh_token if _kept(account, "refresh_token", refresh_token) else None,
        code=_kept(claim, "api_response_code", token.code),
    )


def _kept(row: Entity, name: str, value: T | None) -> T | None:
    """Return a value that came from a broker as the row's field can hold it, else None."""
    try:
        kept: T | None = row.validate_changes({name: value})[name]
    except (ValueError, TypeError, OverflowError):  # ValidationError is a ValueError
        _logger.warning("%s: a broker's %s cannot be stored, and is left out", row.label(), name)
        return None
    return kept


def _text(error: BaseException) -> str:
    """Return an error's text, or its type where it has none that can be had."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # its class may be anyone's
        return type(error).__name__


def _retry_after(error: RefreshFailed) -> timedelta | None:
    """Return how long the broker wants to be left alone; None: it says nothing that makes sense."""
    wait = error.retry_after if isinstance(error, RefreshLimited) else None
    if not isinstance(wait, timedelta) or wait < timedelta(0):
        return None
    return min(wait, _LONGEST_WAIT)

"""A worker that refreshes due access tokens. Any number of workers can run at the same time."""

import asyncio
import logging
import math
import os
import socket
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import UUID, uuid4

from sqlalchemy.exc import DBAPIError

from tiger_db.actor import Actor, acting_as
from tiger_db.connections.listener import listen
from tiger_db.crud import token_status
from tiger_db.crud.common import error_text, get_or_raise
from tiger_db.database import Database
from tiger_db.errors import (
    AnswerLost,
    InvalidValue,
    LeaseLost,
    RefreshFailed,
    TigerDBError,
)
from tiger_db.models import TigerAccount, TokenStatus
from tiger_db.models.token_status import CHANNEL, NewToken
from tiger_db.public import public
from tiger_db.refresh_outcomes import MAX_RETRY_PAUSE_SECONDS, RETRY_PAUSE_SECONDS, OutcomeWriter
from tiger_db.sqlstates import is_transient

T = TypeVar("T")
Refresher = Callable[[TigerAccount], Awaitable[NewToken]]
POLL_SECONDS = 5.0  # Longest pause between two queries for due refreshes and expired leases.
_RATE_WINDOW_SECONDS = 60.0
_HEARTBEATS_PER_LEASE = 3
_GRACE_SECONDS = 30.0  # Longest time from a call of `stop` to the end of `run`.
_STORING_SHARE = 0.2  # Share of _GRACE_SECONDS that is reserved for storing the outcomes.
_CANCELLING_SHARE = 0.05  # Share of _GRACE_SECONDS that is reserved for cancelling attempts.
_CANCEL_SECONDS = 1.0  # Longest wait for the end of a cancelled task.
_logger = logging.getLogger("tiger_db")


class RefreshWorker:
    """A worker that claims due refreshes, asks the broker for new tokens, and stores the tokens.

    The `refresher` gets an account with readable secrets, asks the broker once, and returns the new
    token or raises a `RefreshFailed`. While the refresher runs, no transaction is open, and the
    worker renews the lease of the claim. `per_minute` is the maximum number of calls of the
    refresher per minute for each `tiger_id`. The worker's audit events have the user id `name` and
    the user type `worker`.

    If the refresher takes longer than `attempt_timeout`, the worker cancels the refresher, and the
    attempt fails with `AnswerLost`. After a cancellation or a lost claim, the worker stores a new
    token only if the account's token is older. The refresher must not block the event loop.

    While the database is unavailable, the worker keeps a new token in memory and stores the token
    later. If the process is killed before the new token is stored, the token is lost. After
    the loss of a token, the broker refuses the next attempt, and the account is suspended.
    Invalid values in the broker's answer are not stored.

    Raises:
        InvalidValue: the argument `concurrency`, `lease`, `attempt_timeout` or `per_minute` is not
            positive.
    """

    @public
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
            raise InvalidValue(
                "concurrency, per_minute, lease and attempt_timeout must be positive"
            )
        self.database = database
        self.refresher = refresher
        self.concurrency = concurrency
        self.lease = lease
        self.attempt_timeout = attempt_timeout
        self.per_minute = per_minute
        self.name = name or f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:6]}"[-100:]
        self._actor = Actor(user_id=self.name, user_type="worker")
        self.counts: Counter[str] = Counter()  # number of claims with each outcome
        self._outcomes = OutcomeWriter(database, self.counts)
        self._call_times: dict[bytes | None, deque[float]] = defaultdict(deque)
        self._attempts: dict[UUID, asyncio.Task[None]] = {}  # Attempts in progress, by refresh id.
        self._late: set[asyncio.Task[Any]] = set()  # Tasks that wait for cancelled refreshers.
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Claim no more refreshes, so that `run` returns within 30 seconds.

        If the refresher does not return in time, the worker cancels the refresher. If the outcome
        of a refresh cannot be stored in time, the lease of the refresh expires.
        """
        end = time.monotonic() + _GRACE_SECONDS
        self._outcomes.deadline = min(self._outcomes.deadline, end)
        self._stopping.set()
        self._wake.set()

    @public
    async def run(self, *, once: bool = False) -> None:
        """Refresh due tokens until `stop` is called or, with `once`, until no refresh is due.

        If `once` is false, the worker waits while the database is unavailable. If the task of `run`
        is cancelled, `run` calls `stop`.

        Raises:
            ConfigurationError: the setting `DB_POOLER` needs `DB_DIRECT_HOST`, and `once` is false.
            InvalidState: the Database belongs to another process or to another event loop.
        """
        import anyio  # noqa: PLC0415  # slow import

        self.database.claim()
        if not once:
            self.database.settings.without_pooler()
        with acting_as(self._actor):  # the tasks that the worker starts inherit the actor
            working = asyncio.create_task(self._work(once=once))
        try:
            await self._wait(working, reserve=_CANCELLING_SHARE)
        except asyncio.CancelledError:
            self.stop()
            with anyio.CancelScope(shield=True):  # a scope of anyio cancels each further await
                await self._wait(working, reserve=_CANCELLING_SHARE)
            raise
        finally:
            if not working.done():
                _logger.warning("the worker stopped %d unfinished refreshes", len(self._attempts))
                with anyio.CancelScope(shield=True):
                    await _cancel(working, *self._attempts.values())
        if working.done() and not working.cancelled():
            working.result()

    @public
    async def run_one(self, refresh_id: UUID) -> TokenStatus:
        """Claim one refresh, make one attempt to refresh the token, and return the refresh.

        After a failed attempt, the refresh can be pending again. If the limit `per_minute` is
        reached, or `stop` was called, no attempt is made, and the refresh is pending again.

        Raises:
            NotFound: no refresh has the id `refresh_id`.
            InvalidState: the refresh has ended, has no attempt left, or another worker has claimed
                the refresh.
        """
        start = time.monotonic()
        with acting_as(self._actor):
            async with self.database.session() as session:
                await token_status.fail_expired_leases(session, skip=[*self._attempts])
            async with self.database.session() as session:
                claim = await token_status.claim(
                    session, refresh_id, worker=self.name, lease=self.lease
                )
            await self._attempt(claim, start)
            return await self._outcomes.save(
                lambda session: get_or_raise(session, TokenStatus, refresh_id)
            )

    async def _work(self, *, once: bool) -> None:
        listener = None
        if not once:
            listening = listen(self.database.settings, CHANNEL, self._handle_notification)
            listener = asyncio.create_task(listening)
        pause = RETRY_PAUSE_SECONDS
        try:
            while not self._stopping.is_set():
                self._wake.clear()
                try:
                    wait = await self._start_due()
                    pause = RETRY_PAUSE_SECONDS
                except (TigerDBError, DBAPIError) as error:
                    if once or not is_transient(error):
                        raise
                    _logger.warning("the refresh worker waits for the database: %s", error)
                    wait, pause = pause, min(pause * 2, MAX_RETRY_PAUSE_SECONDS)
                if once and wait > 0 and not self._attempts and not self._wake.is_set():
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), wait)
        finally:
            if listener is not None:
                await _cancel(listener)
            if self._attempts:
                await asyncio.wait(self._attempts.values())

    def _handle_notification(self, payload: str | None) -> None:
        """Look for due refreshes, unless a notification's payload is the id of an ended refresh."""
        if not payload:
            self._wake.set()

    async def _wait(
        self, task: asyncio.Task[Any], seconds: float | None = None, *, reserve: float
    ) -> None:
        """Wait for a task, for at most `seconds`.

        After a call of `stop`, the wait ends when only the share `reserve` of _GRACE_SECONDS is
        left before `run` must end.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({task, stop}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        if not task.done() and self._stopping.is_set():
            end = min(end, self._outcomes.deadline - reserve * _GRACE_SECONDS)
            await asyncio.wait({task}, timeout=max(end - time.monotonic(), 0))

    async def _start_due(self) -> float:
        """Claim due refreshes and start attempts.

        Return the seconds to wait before the next call of `_start_due`.
        """
        free = min(self.concurrency - len(self._attempts), 1000)
        if free <= 0:
            return POLL_SECONDS
        start = time.monotonic()
        async with self.database.session() as session:
            claims = await token_status.claim_due(
                session, worker=self.name, limit=free, lease=self.lease, skip=[*self._attempts]
            )
        for claim in claims:
            task = asyncio.create_task(self._attempt(claim, start))
            self._attempts[claim.id] = task
            task.add_done_callback(partial(self._attempt_ended, claim.id))
        if len(claims) == free:
            return POLL_SECONDS if len(self._attempts) >= self.concurrency else 0.0
        async with self.database.session() as session:
            if await token_status.schedule_due(session, limit=100):
                return 0.0
            wait = await token_status.next_due(session)
        return POLL_SECONDS if wait is None else min(max(wait.total_seconds(), 0.0), POLL_SECONDS)

    def _attempt_ended(self, refresh_id: UUID, task: asyncio.Task[None]) -> None:
        del self._attempts[refresh_id]
        self._wake.set()
        if task.cancelled():
            self.counts["abandoned"] += 1
        elif (error := task.exception()) is not None:
            self.counts["broken"] += 1
            _logger.error("a refresh stopped with an unexpected error: %s", type(error).__name__)

    async def _attempt(self, claim: TokenStatus, claimed_after: float) -> None:
        """Make one attempt for a claim that was made after the monotonic time `claimed_after`."""
        try:
            wait = self._rate_limit_wait(claim.tiger_account)
            if self._stopping.is_set() or wait > 0:
                again = timedelta(seconds=wait)
                await self._outcomes.save(partial(token_status.give_back, claim=claim, wait=again))
                self.counts["given back"] += 1
                return
            interval = self.lease.total_seconds() / _HEARTBEATS_PER_LEASE
            if time.monotonic() - claimed_after > interval:  # the lease possibly expires soon
                await self._outcomes.save(
                    partial(token_status.heartbeat, claim=claim, lease=self.lease)
                )
        except LeaseLost:
            self.counts["lost"] += 1
            return
        heartbeats = asyncio.create_task(self._send_heartbeats(claim, interval))
        try:
            start = time.monotonic()
            answer: NewToken | RefreshFailed | None = await self._ask(claim)
            milliseconds = round((time.monotonic() - start) * 1000)
            if isinstance(answer, NewToken):
                answer = await self._outcomes.complete(claim, answer, milliseconds)
            if answer is not None:
                await self._outcomes.fail(claim, answer, milliseconds)
        finally:
            heartbeats.cancel()
            await asyncio.wait([heartbeats])

    def _rate_limit_wait(self, account: TigerAccount) -> float:
        """Count a refresher call and return 0, or return the seconds until the call is allowed."""
        now = time.monotonic()
        times = self._call_times[account.tiger_id_fingerprint]
        while times and times[0] <= now - _RATE_WINDOW_SECONDS:
            times.popleft()
        if len(times) >= self.per_minute:
            return times[0] + _RATE_WINDOW_SECONDS - now
        times.append(now)
        return 0.0

    async def _send_heartbeats(self, claim: TokenStatus, interval: float) -> None:
        """Renew the lease of the claim every `interval` seconds until the claim is lost."""
        while True:
            await asyncio.sleep(interval)
            try:
                async with self.database.session() as session:
                    await token_status.heartbeat(session, claim, lease=self.lease)
            except LeaseLost:
                return
            except (TigerDBError, DBAPIError) as error:
                if not is_transient(error):  # the database can recover before the lease expires
                    raise

    async def _ask(self, claim: TokenStatus) -> NewToken | RefreshFailed:
        """Call the refresher. Return the new token, or a RefreshFailed if the refresher fails."""

        async def call() -> NewToken:
            return await self.refresher(claim.tiger_account)

        start = time.monotonic()
        asking = asyncio.create_task(call())
        try:
            await self._wait(asking, self.attempt_timeout.total_seconds(), reserve=_STORING_SHARE)
            if not asking.done():
                await _cancel(asking)
        finally:
            if not asking.done():
                asking.cancel()
                late = asyncio.create_task(self._store_late(claim, start, asking))
                self._late.add(late)
                late.add_done_callback(self._late.discard)
        if not asking.done() or asking.cancelled():
            return AnswerLost("the refresher was stopped: the broker may have issued a token")
        error = asking.exception()
        if isinstance(error, RefreshFailed):
            return error
        if error is not None:  # an error message of another library can contain secrets
            known = isinstance(error, TigerDBError)
            return RefreshFailed(error_text(error) if known else type(error).__name__)
        token = asking.result()
        if not isinstance(token, NewToken):
            return AnswerLost(f"the refresher returned {type(token).__name__} instead of NewToken")
        return token

    async def _store_late(self, claim: TokenStatus, start: float, task: asyncio.Task[Any]) -> None:
        """Store the token that a refresher returns although the refresher was cancelled."""
        await asyncio.wait([task])
        if task.cancelled() or task.exception() or not isinstance(task.result(), NewToken):
            return
        if self._stopping.is_set():  # the Database is possibly closed already
            label = claim.tiger_account.label()
            _logger.warning(
                "%s: a new token is lost, because the worker was stopped before storing the token",
                label,
            )
            return
        milliseconds = round((time.monotonic() - start) * 1000)
        try:
            error: Exception | None = await self._outcomes.complete(
                claim, task.result(), milliseconds
            )
        except Exception as problem:  # noqa: BLE001  # the error message may show a secret
            error = problem
        if error is not None:
            self.counts["broken"] += 1
            _logger.error("a new token cannot be stored and is lost: %s", type(error).__name__)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait at most one second until the tasks end."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)

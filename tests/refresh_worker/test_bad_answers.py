"""Refreshers that return invalid values, raise unexpected errors, or hang."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import text

from tests.support.factories import plain
from tests.support.refresh_workers import (
    SECOND,
    account_of,
    counted,
    events,
    failing,
    fresh,
    opened,
    row,
    run_once,
    working,
)
from tests.support.waiting import WAITING_LOCKS, until
from tests.support.worker_processes import environment
from tiger_db import (
    AccountStatus,
    AuditAction,
    AuditResult,
    Database,
    RefreshWorker,
    Settings,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
    crud,
    refresh_worker,
)
from tiger_db.connections import connect
from tiger_db.crud.token_status import outcomes
from tiger_db.errors import (
    AnswerLost,
    CredentialsRefused,
    InvalidFields,
    InvalidState,
    InvalidValue,
    RefreshFailed,
    RefreshLimited,
    StaleToken,
)
from tiger_db.models.token_status import NewToken
from tiger_db.redaction import MASK
from tiger_db.refresh_worker import Refresher

S = TokenRefreshStatus
EXPIRY = datetime.now(UTC).replace(microsecond=0) + timedelta(days=99)


@pytest.fixture(autouse=True)
def _no_short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the random backoff, which is rarely so short that the run does not end."""
    monkeypatch.setattr(outcomes, "_backoff", lambda _: outcomes.BACKOFF)


def answering(answer: object) -> Refresher:
    """Return a refresher that returns this value."""

    async def answer_it(_: TigerAccount) -> Any:
        return answer

    return answer_it


# A token with what cannot be stored


@pytest.mark.parametrize(
    "more",
    [
        {"code": -(10**20)},
        {"code": 2**63},
        {"code": "success"},
        {"code": float("nan")},
        {"code": [0]},
        {"expires_at": datetime(2030, 1, 1)},  # noqa: DTZ001  # naive: the point
        {"expires_at": "soon"},
        {"expires_at": float("nan")},
        {"expires_at": 10**30},
        {"refresh_token": ""},
        {"refresh_token": 7},
        {"refresh_token": "\ud800"},
        {"refresh_token": "**********"},
    ],
)
async def test_a_token_is_stored_without_a_value_that_cannot_be_stored(
    clone: Database, more: dict[str, Any]
) -> None:
    refresh = await opened(clone)
    token = fresh().access_token
    await run_once(clone, answering(NewToken(token, **more)))
    account = await account_of(clone, refresh.tiger_account_id)
    assert plain(account.access_token) == token
    assert account.token_expires_at is not None  # the token itself says it
    assert account.refresh_token is None
    now = await row(clone, refresh.id)
    assert (now.status, now.api_response_code) == (S.SUCCESS, None)


@pytest.mark.parametrize("lost", [False, True])
async def test_a_token_is_stored_without_values_that_cannot_be_stored(
    clone: Database, *, lost: bool
) -> None:
    """This is also true if the claim is lost and the account is offered the token."""
    refresh = await opened(clone)
    token = fresh().access_token

    async def answer(_: TigerAccount) -> NewToken:
        if lost:
            await expire_lease(clone, refresh)
            async with clone.session() as session:
                await crud.token_status.claim(session, refresh.id, worker="another")
        return NewToken(token, code=10**20, expires_at="soon", refresh_token=7)  # type: ignore[arg-type]

    async with working(clone, answer) as worker:
        await counted(worker, "offered" if lost else "refreshed")
    account = await account_of(clone, refresh.tiger_account_id)
    assert plain(account.access_token) == token
    assert account.token_expires_at is not None  # the token itself says it
    assert account.refresh_token is None
    now = await row(clone, refresh.id)
    assert (now.status, now.api_response_code) == (S.IN_PROGRESS if lost else S.SUCCESS, None)


async def test_storable_values_are_stored_although_others_are_not(clone: Database) -> None:
    refresh = await opened(clone)
    await run_once(clone, answering(NewToken("opaque", EXPIRY, "again", 10**20)))
    account = await account_of(clone, refresh.tiger_account_id)
    assert (plain(account.access_token), plain(account.refresh_token)) == ("opaque", "again")
    assert account.token_expires_at == EXPIRY
    assert (await row(clone, refresh.id)).api_response_code is None


# No token


@pytest.mark.parametrize(
    "answer",
    [None, "token", {"access_token": "x"}, NewToken(""), NewToken(7), NewToken("\ud800"),  # type: ignore[arg-type]
     NewToken(None), NewToken("**********")],  # type: ignore[arg-type]
)  # fmt: skip
async def test_an_answer_that_is_no_token_is_a_lost_answer(clone: Database, answer: object) -> None:
    refresh = await opened(clone)
    worker = await run_once(clone, answering(answer))
    now = await row(clone, refresh.id)
    assert (now.status, now.error_code, now.retry_count) == (S.PENDING, "AnswerLost", 1)
    assert (now.details, worker.counts) == ({"answer_lost": True}, {"failed": 1})


@pytest.mark.parametrize("refresher", [lambda _: None, lambda: None])
async def test_a_function_that_is_no_refresher_fails(clone: Database, refresher: Any) -> None:
    refresh = await opened(clone)
    worker = await run_once(clone, refresher)
    now = await row(clone, refresh.id)
    assert (now.status, now.error_message, now.retry_count) == (S.PENDING, "TypeError", 1)
    assert worker.counts == {"failed": 1}


def test_an_object_that_cannot_be_called_is_refused(clone: Database) -> None:
    wrong: Any = None
    with pytest.raises(InvalidFields, match="refresher"):
        RefreshWorker(clone, wrong)


# A failure that cannot be stored as it is


class Mute(RefreshFailed):
    """Its `__str__` fails."""

    def __str__(self) -> str:
        raise ZeroDivisionError


class MuteToo(StaleToken):
    """Its `__str__` fails, and it is no RefreshFailed."""

    def __str__(self) -> str:
        raise ZeroDivisionError


Long = type("Long" * 30, (RefreshFailed,), {})


@pytest.mark.parametrize(
    "error",
    [
        RefreshFailed("no", broker_code=10**20),
        RefreshFailed("no", broker_code="E5"),  # type: ignore[arg-type]
        RefreshFailed("no", broker_code=float("nan")),  # type: ignore[arg-type]
        AnswerLost("no", broker_code=[1]),  # type: ignore[arg-type]
        RefreshLimited("no", retry_after=timedelta.max),
        RefreshLimited("no", retry_after=timedelta.min),
        RefreshLimited("no", retry_after=-SECOND),
        RefreshLimited("no", retry_after=float("nan")),  # type: ignore[arg-type]
        RefreshLimited("no", retry_after=60.0),  # type: ignore[arg-type]
        RefreshLimited("no", retry_after=None),  # type: ignore[arg-type]
        RefreshFailed("a\0b \ud800"),
        RefreshFailed("x " * 5_000_000),
        Mute(),
        MuteToo(),
        Long("no"),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__[:15],
)
async def test_a_failure_with_unstorable_values_is_stored(
    clone: Database, error: BaseException
) -> None:
    async def fail(_: TigerAccount) -> NewToken:
        raise error

    refresh = await opened(clone)
    worker = await run_once(clone, fail)
    now = await row(clone, refresh.id)
    assert (now.status, now.retry_count, worker.counts) == (S.PENDING, 1, {"failed": 1})
    assert (now.lease_expires_at, now.api_response_code) == (None, None)
    assert now.scheduled_at is not None
    assert -SECOND < now.scheduled_at - datetime.now(UTC) <= timedelta(days=7)
    assert len(now.error_message or "") < 11_000
    (event,) = await events(clone, AuditAction.TOKEN_REFRESH)
    assert event.result == AuditResult.FAILURE


@pytest.mark.parametrize("at", [9_000, 11_990])
async def test_a_message_is_cut_and_no_part_of_a_secret_is_left(clone: Database, at: int) -> None:
    refresh = await opened(clone)
    secret = plain((await account_of(clone, refresh.tiger_account_id)).access_token)
    said = ("no " * 5000)[:at] + secret + " no" * 5000
    await run_once(clone, failing(RefreshFailed(said)))
    message = (await row(clone, refresh.id)).error_message
    assert message is not None
    assert message.endswith(f"... ({len(said)} characters)")
    assert (MASK in message) == (at == 9_000)
    assert not [part for part in (secret[n : n + 8] for n in range(len(secret))) if part in message]


@pytest.mark.slow
@pytest.mark.parametrize("error", [RefreshFailed("no"), AnswerLost("no"), CredentialsRefused("no")])
@pytest.mark.parametrize("max_retries", [1, 3])
async def test_fail_unknown_writes_constants(
    clone: Database, error: Exception, max_retries: int
) -> None:
    """The database refuses every other failure."""
    refresh = await opened(clone, max_retries=max_retries)
    async with clone.session() as session:
        await session.execute(
            text(
                "ALTER TABLE token_statuses ADD CHECK"
                f" (coalesce(error_message, '{outcomes.UNKNOWN_OUTCOME}')"
                f" = '{outcomes.UNKNOWN_OUTCOME}')"
            )
        )
    worker = await run_once(clone, failing(error))
    now = await row(clone, refresh.id)
    given_up = max_retries == 1
    assert now.status == (S.FAILED if given_up else S.PENDING)
    assert (now.retry_count, now.lease_expires_at) == (1, None)
    assert (now.details, now.error_code) == ({"answer_lost": True}, "AnswerLost")
    assert now.error_message == outcomes.UNKNOWN_OUTCOME
    later = now.next_refresh_at if given_up else now.scheduled_at
    assert later is not None
    assert timedelta(minutes=29) < later - datetime.now(UTC) < timedelta(minutes=31)
    assert worker.counts == {"failed": 1}
    (event,) = await events(clone, AuditAction.TOKEN_REFRESH)
    assert (event.result, event.error_message) == (AuditResult.FAILURE, outcomes.UNKNOWN_OUTCOME)
    account = await account_of(clone, refresh.tiger_account_id)
    assert (account.error_count, account.last_error) == (
        (1, outcomes.UNKNOWN_OUTCOME) if given_up else (0, None)
    )
    assert account.status == AccountStatus.ACTIVE


# Attempts whose worker vanished


async def expire_lease(database: Database, refresh: TokenStatus) -> None:
    async with database.session() as session:
        await session.execute(
            text("UPDATE token_statuses SET lease_expires_at = now() - interval '1 s'")
        )


# Says in a file that it asks, and dies.
DYING = """
import asyncio, datetime, os, sys
import tiger_db
from tiger_db import refresh_worker
from tiger_db.settings import Settings
refresh_worker.POLL_SECONDS = 0.05
async def ask(account):
    with open(sys.argv[1], "a") as asked:
        asked.write("x")
    os._exit(9)
async def main():
    async with tiger_db.Database(Settings()) as database:
        worker = tiger_db.RefreshWorker(database, ask, lease=datetime.timedelta(seconds=0.2))
        await worker.run(once=True)
asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_worker_that_always_dies_asks_at_most_max_retries_times(
    clone: Database, tmp_path: Path
) -> None:
    refresh = await opened(clone, max_retries=2)
    asked = tmp_path / "asked"
    codes = []
    for _ in range(4):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DYING, str(asked), env=environment(clone.settings)
        )
        codes.append(await asyncio.wait_for(process.wait(), 30))
        await asyncio.sleep(0.25)  # its lease runs out
    assert codes == [9, 9, 0, 0]
    assert asked.read_text() == "xx"
    now = await row(clone, refresh.id)
    assert (now.status, now.retry_count, now.error_code) == (S.FAILED, 2, "AnswerLost")


@pytest.mark.parametrize(("max_retries", "claims"), [(0, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("by_id", [False, True])
async def test_a_refresh_that_is_always_lost_is_given_up(
    clone: Database, max_retries: int, claims: int, *, by_id: bool
) -> None:
    refresh = await opened(clone, max_retries=max_retries)
    for number in range(claims):
        async with clone.session() as session:
            if by_id:
                claim = await crud.token_status.claim(session, refresh.id, worker="w")
            else:
                (claim,) = await crud.token_status.claim_due(session, worker="w")
        assert (claim.retry_count, claim.fencing_token) == (number, number + 1)
        await expire_lease(clone, refresh)
    if by_id:
        with pytest.raises(InvalidState, match="no attempt left"):
            async with clone.session() as session:
                await crud.token_status.claim(session, refresh.id, worker="w")
        with pytest.raises(InvalidState):
            await RefreshWorker(clone, answering(fresh())).run_one(refresh.id)
    else:
        async with clone.session() as session:
            assert await crud.token_status.claim_due(session, worker="w", skip=[refresh.id]) == []
        assert (await row(clone, refresh.id)).status == S.IN_PROGRESS  # its own worker is at it
        async with clone.session() as session:
            assert await crud.token_status.claim_due(session, worker="w") == []
    now = await row(clone, refresh.id)
    assert (now.status, now.retry_count, now.lease_expires_at) == (S.FAILED, claims, None)
    assert (now.error_code, now.details) == ("AnswerLost", {"answer_lost": True})
    assert now.completed_at is not None
    (event,) = await events(clone, AuditAction.TOKEN_REFRESH)
    assert (event.result, event.error_code, event.resource_id) == (
        AuditResult.FAILURE,
        "AnswerLost",
        str(refresh.id),
    )
    account = await account_of(clone, refresh.tiger_account_id)
    assert (account.error_count, account.last_error) == (1, now.error_message)
    (event,) = await events(clone, AuditAction.ACCOUNT_ERROR)
    assert (event.old_values, event.new_values) == ({"error_count": 0}, {"error_count": 1})
    async with clone.session() as session:
        assert await crud.token_status.schedule_due(session, within=timedelta(days=99)) == []


async def test_a_refresh_that_is_given_up_counts_for_the_failing_of_its_account(
    clone: Database,
) -> None:
    refresh = await opened(clone, max_retries=1)
    async with clone.session() as session:
        for _ in range(2):
            await crud.accounts.record_error(session, refresh.tiger_account_id, message="no")
        await crud.token_status.claim_due(session, worker="w")
    assert not (await account_of(clone, refresh.tiger_account_id)).is_failing
    await expire_lease(clone, refresh)
    async with clone.session() as session:
        assert await crud.token_status.fail_expired_leases(session) == 1
    account = await account_of(clone, refresh.tiger_account_id)
    assert (account.error_count, account.is_failing) == (3, True)
    assert account.last_error_at is not None
    assert account.failing_until == account.last_error_at + timedelta(minutes=5)
    (*_, event) = await events(clone, AuditAction.ACCOUNT_ERROR)
    assert event.details == {"failing_until": account.failing_until.isoformat()}


@pytest.mark.slow
async def test_parallel_callers_give_up_a_refresh_once(clone: Database) -> None:
    refreshes = [await opened(clone, max_retries=1) for _ in range(10)]
    async with clone.session() as session:
        assert len(await crud.token_status.claim_due(session, worker="w")) == 10
    await expire_lease(clone, refreshes[0])

    async def give_up() -> int:
        async with clone.session() as session:
            return await crud.token_status.fail_expired_leases(session)

    assert sum(await asyncio.gather(*(give_up() for _ in range(8)))) == 10
    assert len(await events(clone, AuditAction.TOKEN_REFRESH)) == 10
    for refresh in refreshes:
        assert (await account_of(clone, refresh.tiger_account_id)).error_count == 1


@pytest.mark.parametrize("table", ["tiger_accounts", "token_statuses"])
async def test_giving_up_skips_locked_rows(clone: Database, table: str) -> None:
    refresh = await opened(clone, max_retries=1)
    async with clone.session() as session:
        await crud.token_status.claim(session, refresh.id, worker="w")
    await expire_lease(clone, refresh)
    async with clone.session() as other:
        await other.execute(text(f"SELECT FROM {table} FOR UPDATE"))
        async with asyncio.timeout(5), clone.session() as session:
            assert await crud.token_status.fail_expired_leases(session) == 0
    async with clone.session() as session:
        assert await crud.token_status.fail_expired_leases(session) == 1


async def test_an_attempt_that_ends_is_not_counted_twice(clone: Database) -> None:
    refresh = await opened(clone, max_retries=3)
    async with clone.session() as session:
        claim = await crud.token_status.claim(session, refresh.id, worker="w")
        failed = await crud.token_status.fail(
            session, claim, message="no", retry_after=timedelta(0)
        )
        assert failed.retry_count == 1
        (claim,) = await crud.token_status.claim_due(session, worker="w")
        assert claim.retry_count == 1
        given = await crud.token_status.give_back(session, claim)
        assert given.retry_count == 1


# Refreshers that hang


class Hanging:
    """Refresher that hangs for the account with the lowest number."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.asked = asyncio.Event()
        self.release = asyncio.Event()
        self.token = fresh()
        self.times = 0

    async def __call__(self, _: TigerAccount) -> NewToken:
        self.times += 1
        if self.times > 1:
            return fresh()
        self.asked.set()
        match self.how:
            case "sleeps":
                await self.release.wait()
            case "ignores cancellation":
                while not self.release.is_set():
                    try:
                        await self.release.wait()
                    except asyncio.CancelledError:
                        continue
            case "blocks a thread":
                loop = asyncio.get_running_loop()
                await asyncio.to_thread(
                    lambda: asyncio.run_coroutine_threadsafe(self.release.wait(), loop).result()
                )
            case _:
                try:
                    await self.release.wait()
                except asyncio.CancelledError:
                    if self.how.startswith("fails"):
                        raise RefreshLimited("later", retry_after=SECOND) from None
        return self.token


@asynccontextmanager
async def hanging(how: str) -> AsyncIterator[Hanging]:
    """Run a worker with a refresher that hangs."""
    refresher = Hanging(how)
    try:
        yield refresher
    finally:
        refresher.release.set()


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh_worker, "_CANCEL_SECONDS", 0.1, raising=False)


LOST = {
    "sleeps": "AnswerLost",
    "ignores cancellation": "AnswerLost",
    "blocks a thread": "AnswerLost",
    "fails when it is cancelled": "RefreshLimited",
    "answers when it is cancelled": None,
}


@pytest.mark.parametrize("how", LOST)
@pytest.mark.slow
async def test_a_refresher_that_hangs_is_ended(clone: Database, how: str) -> None:
    """Another account is refreshed in its place."""
    refresh, other = await opened(clone), await opened(clone)
    async with hanging(how) as refresher:
        async with working(clone, refresher, concurrency=1, attempt_timeout=0.2 * SECOND) as worker:
            await refresher.asked.wait()
            await counted(worker, "refreshed", 1 if LOST[how] else 2)
            now = await row(clone, refresh.id)
        assert (await row(clone, other.id)).status == S.SUCCESS
    assert now.error_code == LOST[how]
    if LOST[how] is None:
        assert now.status == S.SUCCESS
    else:
        assert (now.status, now.retry_count, now.lease_expires_at) == (S.PENDING, 1, None)
        assert now.details == ({"answer_lost": True} if LOST[how] == "AnswerLost" else None)


async def test_a_token_that_comes_too_late_is_kept(clone: Database) -> None:
    refresh = await opened(clone)
    async with (
        hanging("ignores cancellation") as refresher,
        working(clone, refresher, attempt_timeout=0.1 * SECOND) as worker,
    ):
        await counted(worker, "failed")
        refresher.release.set()
        await counted(worker, "offered")
    account = await account_of(clone, refresh.tiger_account_id)
    assert plain(account.access_token) == refresher.token.access_token
    assert worker._late == set()


@pytest.mark.parametrize("timeout", [timedelta(0), -SECOND])
def test_the_attempt_timeout_must_be_positive(timeout: timedelta) -> None:
    with pytest.raises(InvalidValue, match="attempt_timeout"):
        RefreshWorker(Database(Settings()), answering(None), attempt_timeout=timeout)


async def stops(
    worker: RefreshWorker, ready: Callable[[], Awaitable[object]], *, cancel: bool
) -> float:
    """Stop or cancel a running worker when it is ready; return the seconds until it ended."""
    task = asyncio.create_task(worker.run())
    await asyncio.wait_for(ready(), 10)
    start = time.monotonic()
    if cancel:
        task.cancel()
    else:
        worker.stop()
    await asyncio.wait({task}, timeout=10)  # much more than the grace
    took = time.monotonic() - start
    assert task.done()
    assert task.cancelled() == cancel
    if not cancel:
        await task
    return took


@pytest.mark.slow
@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("how", LOST)
async def test_stopping_ends_within_its_grace_if_a_refresher_hangs(
    clone: Database, monkeypatch: pytest.MonkeyPatch, how: str, *, cancel: bool
) -> None:
    monkeypatch.setattr(refresh_worker, "_GRACE_SECONDS", 2.0)
    refresh = await opened(clone)
    async with hanging(how) as refresher:
        worker = RefreshWorker(clone, refresher)
        took = await stops(worker, refresher.asked.wait, cancel=cancel)
        now = await row(clone, refresh.id)
    assert took > 1.5  # nearly the whole grace is for the answer
    assert now.error_code == LOST[how]
    assert now.status == (S.SUCCESS if LOST[how] is None else S.PENDING)
    assert now.lease_expires_at is None


async def test_a_worker_finishes_if_a_scope_of_anyio_is_cancelled(clone: Database) -> None:
    """Such a scope cancels each further await, of which the end of a worker has several."""
    refresh = await opened(clone)

    async def ask(_: TigerAccount) -> NewToken:
        scope.cancel()
        await asyncio.sleep(0.1)
        return fresh()

    with anyio.CancelScope() as scope:
        await RefreshWorker(clone, ask).run()
    assert scope.cancelled_caught
    assert (await row(clone, refresh.id)).status == S.SUCCESS


@pytest.mark.slow
@pytest.mark.parametrize("cancel", [False, True])
async def test_stopping_ends_within_its_grace_if_the_database_hangs(
    clone: Database, monkeypatch: pytest.MonkeyPatch, *, cancel: bool
) -> None:
    """This concerns storing an answer and claiming the next refresh."""
    monkeypatch.setattr(refresh_worker, "_GRACE_SECONDS", 2.0)
    monkeypatch.setattr(refresh_worker, "POLL_SECONDS", 0.05)
    refresh = await opened(clone)
    other = await connect(clone.settings)
    asked = asyncio.Event()

    async def ask(_: TigerAccount) -> NewToken:
        await other.execute("BEGIN; LOCK TABLE token_statuses IN ACCESS EXCLUSIVE MODE")
        asked.set()
        return fresh()

    async def two_wait() -> bool:
        waiting = await other.fetchval(
            f"SELECT count(*) FROM {WAITING_LOCKS} AND relation = 'token_statuses'::regclass"
        )
        return bool(waiting >= 2)

    async def stuck() -> None:
        await asked.wait()
        await until(two_wait)

    worker = RefreshWorker(clone, ask, lease=0.3 * SECOND)
    await stops(worker, stuck, cancel=cancel)
    await other.close()
    assert worker.counts["abandoned"] == 1
    assert (await row(clone, refresh.id)).status == S.IN_PROGRESS  # another takes over


# Prints what became of its claims. Its refresher ignores one cancellation.
STUBBORN = """
import asyncio, signal, sys
import tiger_db
from tiger_db import refresh_worker
from tiger_db.settings import Settings
refresh_worker._GRACE_SECONDS, refresh_worker._CANCEL_SECONDS = 5.0, 0.2
async def ask(account):
    print("asked", flush=True)
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        await asyncio.sleep(3600)
async def main():
    async with tiger_db.Database(Settings()) as database:
        worker = tiger_db.RefreshWorker(database, ask)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()
        print(dict(worker.counts), flush=True)
asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_process_ends_within_its_grace(clone: Database) -> None:
    refresh = await opened(clone)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", STUBBORN, env=environment(clone.settings), stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 30) == b"asked\n"
        start = time.monotonic()
        process.terminate()
        out, _ = await asyncio.wait_for(process.communicate(), 30)
    finally:
        if process.returncode is None:
            process.kill()
    assert time.monotonic() - start < 10  # the grace, and the end of the process
    assert (out, process.returncode) == (b"{'failed': 1}\n", 0)
    now = await row(clone, refresh.id)
    assert (now.status, now.error_code, now.lease_expires_at) == (S.PENDING, "AnswerLost", None)

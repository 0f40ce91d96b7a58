"""Workers that continue after their lease has expired, and workers with wrong clocks."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select

from tests.support import factories
from tests.support.claims import LEASE, USES
from tests.support.private_keys import KEY
from tests.support.refresh_gateway import Gateway, due_token, serving
from tests.support.tiger_files import PK8
from tests.support.waiting import until
from tests.support.worker_processes import environment
from tiger_db import (
    AccountStatus,
    Database,
    RefreshTrigger,
    Settings,
    TigerAccount,
    TokenRefreshStatus,
    TokenStatus,
    crud,
)
from tiger_db.crud.token_status import token_hash
from tiger_db.errors import LeaseLost

S = TokenRefreshStatus
SECOND = timedelta(seconds=1)
# Works until SIGTERM or the end of what is due; arguments: name, lease in s, shift of its clock in
# s, "once" or "on". Prints what became of its claims.
WORKER = """
import asyncio, datetime, signal, sys, time
name, lease, shift, how = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
if shift:
    real, now, nanoseconds = datetime.datetime, time.time, time.time_ns
    class Shifted(type):
        def __instancecheck__(cls, other):
            return isinstance(other, real)
    class datetime_(real, metaclass=Shifted):
        @classmethod
        def now(cls, tz=None):
            return real.now(tz) + datetime.timedelta(seconds=shift)
        @classmethod
        def utcnow(cls):
            return real.utcnow() + datetime.timedelta(seconds=shift)
    import uuid, pydantic, sqlalchemy, asyncpg  # which keep the real class for their own types
    import tiger_db.models, tiger_db.refresh_worker, tiger_db.crud
    for module in [m for n, m in sys.modules.items() if n.startswith("tiger_db")]:
        if vars(module).get("datetime") is real:
            module.datetime = datetime_
    time.time = lambda: now() + shift
    time.time_ns = lambda: nanoseconds() + int(shift * 10**9)
import tiger_db
from tiger_db import refresh_worker
from tiger_db.settings import Settings
from tiger_db.tiger import refresh_token
refresh_worker.POLL_SECONDS = 0.05
if shift:
    assert abs(tiger_db.models.accounts.datetime.now(datetime.UTC).timestamp() - time.time()) < 1
    assert abs(real.now().timestamp() + shift - time.time()) < 1
async def main():
    async with tiger_db.Database(Settings()) as database:
        worker = tiger_db.RefreshWorker(
            database, refresh_token, name=name, lease=datetime.timedelta(seconds=lease),
            per_minute=10**6,
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run(once=how == "once")
        print(dict(worker.counts))
asyncio.run(main())
"""


@dataclass
class Worker:
    process: subprocess.Popen[str]

    def tell(self, what: signal.Signals) -> None:
        self.process.send_signal(what)

    def end(self) -> dict[str, int]:
        """Wait for the process to end; return its counts."""
        self.tell(signal.SIGTERM)
        return self.ended()

    def ended(self) -> dict[str, int]:
        out, err = self.process.communicate(timeout=40)
        assert self.process.returncode == 0, err
        assert "Traceback" not in err
        return dict(eval(out))  # what WORKER prints


@contextmanager
def worker(
    settings: Settings, name: str, *, lease: float = 60, shift: float = 0, how: str = "on"
) -> Iterator[Worker]:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, name, str(lease), str(shift), how],
        env=environment(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield Worker(process)
        finally:
            process.kill()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with serving(KEY.public_key()) as gateway:
        yield gateway


async def account_at(database: Database, gateway: Gateway, tiger_id: str) -> TigerAccount:
    """Create an account whose token is due."""
    token = gateway.add(tiger_id)
    async with database.session() as session:
        return await factories.account(
            session, tiger_id=tiger_id, access_token=token, private_key=PK8,
            server_url=gateway.url, client_options={"timeout": "60"},
        )  # fmt: skip


async def latest(database: Database, account: TigerAccount) -> TokenStatus | None:
    async with database.session() as session:
        return await crud.token_status.get_latest_status(session, account.id)


async def now(database: Database, account: TigerAccount) -> TigerAccount:
    async with database.session() as session:
        found = await crud.accounts.get(session, account.id)
    assert found is not None
    return found


@asynccontextmanager
async def lost_claims(database: Database, count: int) -> AsyncIterator[list[TokenStatus]]:
    """Yield claims whose leases have expired, and which another worker has claimed."""
    async with database.session() as session:
        for _ in range(count):
            await factories.refresh(session)
    async with database.session() as session:
        zombies = await crud.token_status.claim_due(
            session, worker="zombie", lease=LEASE, limit=1000
        )
    async with database.session() as session:
        others = await crud.token_status.claim_due(session, worker="another", limit=1000)
    assert len(zombies) == len(others) == count
    assert {claim.id for claim in zombies} == {claim.id for claim in others}
    yield zombies


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
async def test_a_lost_claim_is_always_refused(clone: Database, use: str) -> None:
    refused = 0
    async with lost_claims(clone, 10) as zombies:
        async with clone.session() as session:
            before = await factories.everything(session)
        for claim in zombies:
            async with clone.session() as session:
                with pytest.raises(LeaseLost):
                    await USES[use](session, claim)
            refused += 1
        async with clone.session() as session:
            assert await factories.everything(session) == before
    assert refused == 10


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
async def test_a_stopped_process_comes_back_too_late(
    clone: Database, gateway: Gateway, *, late: bool
) -> None:
    """The process is stopped while it asks. Its token is newer or older than the stored one."""
    account = await account_at(clone, gateway, "1")
    # The first request is held before or after it has replaced the token.
    gateway.plan("1", "gate" if late else "gate after")
    with worker(clone.settings, "zombie", lease=0.6) as zombie:
        await asyncio.to_thread(gateway.wait_for, 1, 30)
        zombie.tell(signal.SIGSTOP)
        stopped = datetime.now(UTC)
        with worker(clone.settings, "another", how="on") as another:

            async def taken_over() -> bool:
                refresh = await latest(clone, account)
                return refresh is not None and not refresh.is_open

            await until(taken_over)
            counts = another.end()
        refresh = await latest(clone, account)
        assert refresh is not None
        assert refresh.started_at is not None
        assert refresh.started_at > stopped
        assert (refresh.worker, refresh.fencing_token) == ("another", 2)
        async with clone.session() as session:
            trail = len(await factories.events(session))
        gateway.gates["1"].set()
        zombie.tell(signal.SIGCONT)
        told = zombie.end()
    after = await latest(clone, account)
    assert after == refresh
    stored = await now(clone, account)
    assert stored.readable_token() == gateway.known["1"].token
    async with clone.session() as session:
        more = len(await factories.events(session)) - trail
    if late:  # the gateway refuses the old token, and so does the database the zombie
        assert (counts, told, more) == ({"refreshed": 1}, {"lost": 1}, 0)
        assert refresh.status == S.SUCCESS
        assert refresh.new_token_hash == token_hash(stored.readable_token())
    else:  # the other was refused: what the zombie brings is the token that is valid
        assert (counts, told, more) == ({"failed": 1}, {"offered": 1}, 2)
        assert refresh.error_message is not None
        assert "the answer to an earlier attempt was lost" in refresh.error_message
        assert stored.status == AccountStatus.ACTIVE


@pytest.mark.slow
async def test_a_stopped_process_does_not_ask_again_itself(
    clone: Database, gateway: Gateway
) -> None:
    """The lease expired while the process was asking, and no other worker runs."""
    account = await account_at(clone, gateway, "1")
    gateway.plan("1", "gate after")
    with worker(clone.settings, "alone", lease=0.6) as alone:
        await asyncio.to_thread(gateway.wait_for, 1, 30)
        alone.tell(signal.SIGSTOP)

        async def run_out() -> bool:
            refresh = await latest(clone, account)
            assert refresh is not None
            assert refresh.lease_expires_at is not None
            async with clone.session() as session:
                return bool(
                    await session.scalar(select(func.clock_timestamp() > refresh.lease_expires_at))
                )

        await until(run_out)
        alone.tell(signal.SIGCONT)

        async def renewed() -> bool:
            return not await run_out()

        await until(renewed)
        gateway.gates["1"].set()

        async def ended() -> bool:
            refresh = await latest(clone, account)
            return refresh is not None and not refresh.is_open

        await until(ended)
        assert alone.end() == {"refreshed": 1}
    refresh = await latest(clone, account)
    assert refresh is not None
    assert (refresh.status, refresh.fencing_token, refresh.details) == (S.SUCCESS, 1, None)
    assert (await now(clone, account)).readable_token() == gateway.known["1"].token


@pytest.mark.slow
@pytest.mark.parametrize("shift", [-3600, 3600])
async def test_the_clock_of_a_worker_has_no_effect(
    clone: Database, gateway: Gateway, shift: float
) -> None:
    """Due times and leases follow the clock of the database."""
    due = await account_at(clone, gateway, "1")
    later = await account_at(clone, gateway, "2")
    async with clone.session() as session:
        await crud.token_status.create_refresh_operation(
            session, tiger_account_id=later.id, trigger=RefreshTrigger.MANUAL,
            scheduled_at=datetime.now(UTC) + timedelta(minutes=30),
        )  # fmt: skip
    soon = await account_at(clone, gateway, "3")
    async with clone.session() as session:
        held = await factories.refresh(session, soon)
        claim = await crud.token_status.claim(session, held.id, worker="dead", lease=2.5 * SECOND)
    assert claim.lease_expires_at is not None
    with worker(clone.settings, "shifted", shift=shift) as shifted:

        async def both_ended() -> bool:
            rows = [await latest(clone, account) for account in (due, soon)]
            return all(row is not None and not row.is_open for row in rows)

        await until(both_ended)
        counts = shifted.end()
    assert counts == {"refreshed": 2}
    done, waiting, taken = [await latest(clone, a) for a in (due, later, soon)]
    assert done is not None
    assert waiting is not None
    assert taken is not None
    assert (done.status, waiting.status, taken.status) == (S.SUCCESS, S.PENDING, S.SUCCESS)
    assert waiting.fencing_token == 0
    assert (taken.fencing_token, taken.worker) == (2, "shifted")
    assert taken.started_at is not None
    assert taken.started_at > claim.lease_expires_at
    for refresh in (done, taken):
        assert refresh.started_at is not None
        assert refresh.completed_at is not None
        assert abs(refresh.completed_at - datetime.now(UTC)) < timedelta(minutes=1)
        assert refresh.duration_ms is not None
        assert refresh.duration_ms < 60_000
    assert len(gateway.refreshes) == 2


@pytest.mark.slow
async def test_workers_whose_clocks_differ_share_the_work(
    clone: Database, gateway: Gateway
) -> None:
    accounts = [await account_at(clone, gateway, str(number)) for number in range(20)]
    with (
        worker(clone.settings, "slow", shift=-3600, lease=1.5) as slow,
        worker(clone.settings, "fast", shift=3600, lease=1.5) as fast,
    ):

        async def all_done() -> bool:
            rows = [await latest(clone, account) for account in accounts]
            return all(row is not None and not row.is_open for row in rows)

        await until(all_done)
        counts = [slow.end(), fast.end()]
    assert sum(count.get("refreshed", 0) for count in counts) == 20, counts
    assert len(gateway.refreshes) == 20
    assert max(known.most for known in gateway.known.values()) == 1
    for account in accounts:
        refresh = await latest(clone, account)
        assert refresh is not None
        assert (refresh.status, refresh.fencing_token) == (S.SUCCESS, 1)


def test_a_due_token_is_due() -> None:
    account = factories.new_account(access_token=due_token())
    assert account.check_not_stale(account.readable_token(), None) is not None

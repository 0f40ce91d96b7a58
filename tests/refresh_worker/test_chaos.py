"""Workers survive kills, stops, restarts of the database and lost answers.

`make test` runs a short version; TIGER_DB_SOAK=1 the full one.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support import factories
from tests.support.private_keys import KEY
from tests.support.private_servers import new_database, server
from tests.support.refresh_gateway import Odds, due_token, outcomes, state_of, tell
from tests.support.tiger_files import PK8
from tests.support.worker_processes import ROOT, environment
from tiger_db import (
    AccountStatus,
    AuditAction,
    AuditResult,
    Database,
    RefreshWorker,
    Settings,
    TokenRefreshStatus,
    TokenStatus,
    crud,
    embedded,
)
from tiger_db.connections import connect, maintenance_engine
from tiger_db.crud.token_status import token_hash
from tiger_db.migrations import upgrade
from tiger_db.tiger import refresh_token

S = TokenRefreshStatus
SOAK = bool(os.environ.get("TIGER_DB_SOAK"))
WORKERS, ACCOUNTS, CONCURRENCY = (8, 500, 8) if SOAK else (3, 60, 8)
KILLS, STOPS = (40, 25) if SOAK else (3, 2)
LEASE = 2.0 if SOAK else 1.0  # seconds
ODDS = Odds(slow=0.9, seconds=6.0 if SOAK else 4.0, drop_before=0.08, drop_after=0.04, limited=0.04)
# Waits that Tiger or politeness make long are short here. The path tells the gateway who asks.
WORKER = """
import asyncio, signal, sys
from datetime import timedelta
import tiger_db
from tiger_db import refresh_worker
from tiger_db.crud.token_status import outcomes
from tiger_db.settings import Settings
from tiger_db.tiger import refreshing
name, concurrency, lease = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
refresh_worker.POLL_SECONDS = 0.5
outcomes.BACKOFF, refreshing._RATE_LIMIT_WINDOW = timedelta(seconds=0.2), timedelta(seconds=0.3)
async def ask(account):
    account.server_url += "/" + name
    return await refreshing.refresh_token(account)
async def main():
    async with tiger_db.Database(Settings()) as database:
        worker = tiger_db.RefreshWorker(
            database, ask, name=name, concurrency=concurrency,
            lease=timedelta(seconds=lease), per_minute=10**6,
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()
    if worker.counts["broken"]:
        sys.exit("broken")
asyncio.run(main())
"""
# Everything that ever becomes of a claim, by the database's clock.
LOG = """
CREATE TABLE claims_log (
    at double precision, account uuid, worker text, fencing bigint, lease double precision,
    status text, old_fencing bigint, old_lease double precision, old_status text, old_worker text
);
CREATE FUNCTION log_claim() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO claims_log VALUES (
        extract(epoch FROM clock_timestamp()), NEW.tiger_account_id, NEW.worker,
        NEW.fencing_token, extract(epoch FROM NEW.lease_expires_at), NEW.status,
        OLD.fencing_token, extract(epoch FROM OLD.lease_expires_at), OLD.status, OLD.worker
    );
    RETURN NULL;
END
$$;
CREATE TRIGGER log_claim AFTER UPDATE ON token_statuses FOR EACH ROW EXECUTE FUNCTION log_claim();
"""
CLAIMED = "SELECT * FROM claims_log WHERE fencing = old_fencing + 1 ORDER BY at"


@dataclass
class Staff:
    """Worker processes, and the times (`time.time`) of faults."""

    settings: Settings
    log: Path
    random: random.Random
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    stopped: dict[str, float] = field(default_factory=dict)  # name: when it goes on
    hurt: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)
    early: set[str] = field(default_factory=set)  # ended before they were at work
    away: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        name = f"w{self.counts['started']}"
        self.counts["started"] += 1
        with self.log.open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-c", WORKER, name, str(CONCURRENCY), str(LEASE)],
                env=environment(self.settings), stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        self.stopped.pop(name, None)
        process.kill()
        process.wait(10)
        self.hurt[name].append(time.time())
        self.counts["killed"] += 1

    def stop(self, name: str) -> None:
        """Stop a worker for longer than its lease."""
        self.running[name].send_signal(signal.SIGSTOP)
        self.hurt[name].append(time.time())
        self.stopped[name] = time.time() + LEASE + 0.3 + self.random.random()
        self.counts["stopped"] += 1

    def wake(self, *, everyone: bool = False) -> None:
        for name, at in [*self.stopped.items()]:
            if everyone or at <= time.time():
                self.running[name].send_signal(signal.SIGCONT)
                del self.stopped[name]

    def end(self) -> None:
        self.wake(everyone=True)
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for name, process in self.running.items():
            code = process.wait(60)
            assert code in {0, -signal.SIGTERM}, (name, self.log.read_text())
            if code:
                self.early.add(name)

    def clear(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait(10)


@contextmanager
def gateway_process(seed: int) -> Iterator[str]:
    """Run the gateway in a process; return its URL."""
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.refresh_gateway"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        given = {"key": public.decode(), "odds": asdict(ODDS), "seed": seed}
        process.stdin.write(json.dumps(given) + "\n")
        process.stdin.flush()
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(10)


@pytest.fixture(scope="module")
def private_server() -> Iterator[Settings]:
    with server() as settings:
        yield settings


async def open_refreshes(database: Database) -> int:
    async with database.session() as session:
        page = await crud.token_status.history(session, limit=1000)
    return sum(refresh.is_open for refresh in page) + (ACCOUNTS - len(page.items))


async def havoc(staff: Staff, database: Database, place: Settings, url: str) -> None:
    """Cause all faults, and go on until no work is left."""
    for _ in range(WORKERS):
        staff.start()
    deadline = time.monotonic() + (600 if SOAK else 60)
    asked = 0
    while asked < WORKERS:
        await asyncio.sleep(0.05)
        asked = len(state_of(url)["refreshes"])
        assert time.monotonic() < deadline
    plan = ["kill"] * KILLS + ["stop"] * STOPS
    staff.random.shuffle(plan)
    plan.insert(len(plan) // 2, "restart")
    for what in plan:
        await asyncio.sleep(staff.random.uniform(0.5, 1.0))
        staff.wake()
        awake = sorted(staff.running.keys() - staff.stopped.keys())
        if what == "restart":
            begun = time.time()
            await asyncio.to_thread(embedded.stop, place)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(embedded.start, place)
            staff.away = (begun, time.time())
        elif what == "kill":
            staff.kill(staff.random.choice(sorted(staff.running)))
            staff.start()
        elif awake:
            staff.stop(staff.random.choice(awake))
    if not SOAK:  # the rest is worked off by a worker that nothing happens to
        return
    while await open_refreshes(database):
        staff.wake()
        await asyncio.sleep(0.1)
        assert time.monotonic() < deadline


async def work_off(database: Database) -> int:
    """Finish the work with one worker, which claims expired leases."""
    worker = RefreshWorker(
        database, refresh_token, name="last", concurrency=8, per_minute=10**6,
        lease=timedelta(seconds=60),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while await open_refreshes(database):
        await worker.run(once=True)
        await asyncio.sleep(0.05)
        assert time.monotonic() < deadline
    assert not worker.counts["broken"]
    return sum(worker.counts.values())


@pytest.mark.slow
async def test_workers_survive_kills_and_outages(private_server: Settings, tmp_path: Path) -> None:
    settings = await new_database(private_server)
    async with maintenance_engine(settings) as engine:
        await upgrade(engine)
    connection = await connect(settings)
    await connection.execute(LOG)
    await connection.close()
    seed = random.randrange(10**6)
    staff = Staff(settings, tmp_path / "workers.log", random.Random(seed))
    begun = time.monotonic()
    with gateway_process(seed) as url:
        async with Database(settings) as database:
            first = {f"2015{number:04}": due_token() for number in range(ACCOUNTS)}
            tell(url, "PUT", first)
            async with database.session() as session:
                accounts = {
                    (
                        await factories.account(
                            session, tiger_id=tiger_id, access_token=token, private_key=PK8,
                            server_url=url,
                        )
                    ).id: tiger_id
                    for tiger_id, token in first.items()
                }  # fmt: skip
            try:
                await havoc(staff, database, private_server, url)
                tell(url, "PATCH")
                staff.end()
            finally:
                staff.clear()
            left = await work_off(database)
        state = state_of(url)
    log = staff.log.read_text()
    assert "a refresh stopped with an unexpected error" not in log, log
    # SQLAlchemy's pool shows those of connections that a stopping server closes under its hands.
    assert log.count("Traceback") == log.count("Exception closing connection"), log
    assert not [token for token in state["tokens"].values() if token in log]
    figures = await judge(settings, state, staff, accounts)
    print(  # noqa: T201
        f"seed {seed}: {ACCOUNTS} accounts, {WORKERS} workers, {time.monotonic() - begun:.1f} s; "
        f"workers: {dict(staff.counts)}; asked {len(state['refreshes'])} times: "
        f"{dict(outcomes(state['refreshes']))}; {figures}; {left} worked off at last"
    )
    assert staff.counts["killed"] == KILLS
    assert staff.counts["stopped"] > 0


async def judge(
    settings: Settings, state: dict[str, Any], staff: Staff, accounts: dict[Any, str]
) -> str:
    """Assert the invariants of the whole run."""
    connection = await connect(settings)
    claimed = await connection.fetch(CLAIMED)
    await connection.close()
    async with Database(settings) as database, database.session() as session:
        refreshes = (await crud.token_status.history(session, limit=1000)).items
        stored = {i: await crud.accounts.get(session, i) for i in accounts}
        trail = await crud.audit_logs.get_recent_events(session, limit=1000)
        events = [*trail]
        while trail.next_cursor:
            trail = await crud.audit_logs.get_recent_events(
                session, after=trail.next_cursor, limit=1000
            )
            events += trail
    overlaps = judge_claims(claimed, state, staff, accounts)
    ends = judge_ends(refreshes, stored, state, accounts)
    written = sum(
        event.action == AuditAction.TOKEN_REFRESH and event.result == AuditResult.SUCCESS
        for event in events
    )
    assert written == ends["success"]
    taken_over = sum(row["old_status"] == "in_progress" for row in claimed)
    return (
        f"{len(claimed)} claims, {taken_over} of them taken over; {dict(overlaps)}; {dict(ends)}; "
        f"at most {max(state['most'].values())} in flight for one account"
    )


def judge_claims(
    claimed: list[asyncpg.Record], state: dict[str, Any], staff: Staff, accounts: dict[Any, str]
) -> Counter[str]:
    """No worker claimed a leased refresh, no claim asked twice, and overlapping claims were lost.

    Of two requests in flight for one account, that of the older claim had lost its lease before the
    newer claim was made, and so before its request.
    """
    by_account: dict[str, list[asyncpg.Record]] = defaultdict(list)
    for row in claimed:
        assert row["worker"] not in staff.early
        if row["old_status"] == "in_progress":
            assert row["old_lease"] < row["at"], dict(row)
        by_account[accounts[row["account"]]].append(row)
    requests: dict[str, list[tuple[asyncpg.Record, dict[str, Any]]]] = defaultdict(list)
    for refresh in state["refreshes"]:
        name = refresh["worker"] if refresh["worker"] != "gateway" else "last"
        mine = [
            row
            for row in by_account[refresh["tiger_id"]]
            if row["worker"] == name and row["at"] <= refresh["start"]
        ]
        requests[refresh["tiger_id"]].append((mine[-1], refresh))
    overlaps: Counter[str] = Counter()
    for tiger_id, of_account in requests.items():
        numbers = [claim["fencing"] for claim, _ in of_account]
        assert len(numbers) == len({*numbers}), tiger_id  # each claim asked once at most
        for pair in combinations(of_account, 2):
            (old, older), (new, newer) = sorted(pair, key=lambda one: one[0]["fencing"])
            ends = [request["end"] or float("inf") for request in (older, newer)]
            if older["start"] >= ends[1] or newer["start"] >= ends[0]:
                continue
            (lost,) = [row for row in by_account[tiger_id] if row["old_fencing"] == old["fencing"]]
            assert lost["old_status"] == "in_progress", tiger_id
            assert lost["old_lease"] < lost["at"] <= new["at"] <= newer["start"], tiger_id
            hurt = any(old["at"] - LEASE <= at <= lost["at"] for at in staff.hurt[old["worker"]])
            away = staff.away[0] <= lost["at"] and old["at"] - LEASE <= staff.away[1]
            why = "killed or stopped" if hurt else "database away" if away else "only late"
            overlaps[f"overlapped, the older {why}"] += 1
    return overlaps


def judge_ends(
    refreshes: list[TokenStatus],
    stored: dict[Any, Any],
    state: dict[str, Any],
    accounts: dict[Any, str],
) -> Counter[str]:
    """Each account has the current token, or an error that mentions a lost answer.

    A completed refresh has brought one token, and no other refresh has.
    """
    made = [refresh["made"] for refresh in state["refreshes"] if refresh["made"]]
    assert len(made) == len({*made})
    hashes = {token_hash(token) for token in made}
    brought = [r.new_token_hash for r in refreshes if r.status == S.SUCCESS]
    assert len(brought) == len({*brought})
    assert {*brought} <= hashes
    assert {refresh.tiger_account_id for refresh in refreshes} == accounts.keys()
    assert len(refreshes) == len(accounts)
    ends: Counter[str] = Counter()
    for refresh in refreshes:
        account = stored[refresh.tiger_account_id]
        current = account.readable_token() == state["tokens"][accounts[account.id]]
        ends[refresh.status.value] += 1
        assert refresh.status in {S.SUCCESS, S.FAILED}
        assert refresh.lease_expires_at is None
        if refresh.status == S.SUCCESS:
            assert current, refresh
            assert account.status == AccountStatus.ACTIVE
            continue
        suspended = account.status == AccountStatus.SUSPENDED
        says = "lost" in (refresh.error_message or "")
        assert (refresh.details or {}).get("answer_lost") or not suspended, refresh
        assert current or says, (refresh.error_message, refresh.details, refresh.retry_count)
        # If the answer that was missed comes later, the account takes it, and is active again.
        assert suspended == (refresh.error_code == "CredentialsRefused" and not current)
        ends[
            f"{'suspended' if suspended else 'given up'}"
            f"{', its token is current' if current else ', says that the answer was lost'}"
        ] += 1
    return ends

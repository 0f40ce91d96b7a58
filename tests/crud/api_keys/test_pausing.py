"""A pause of trading denies trade scopes everywhere, from its commit on."""

import asyncio
import time
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.concurrency import at_once, until_waiting
from tests.support.forks import FORKS
from tests.support.passed_settings import Passed
from tests.support.raw_keys import sent_statements
from tests.support.verifiers import checkouts
from tests.support.waiting import until
from tiger_db import (
    Actor,
    APIKeyScope,
    AuditAction,
    AuditLog,
    AuditSeverity,
    Database,
    KeyVerifier,
    Settings,
)
from tiger_db.crud import api_keys
from tiger_db.database import AsyncSession, Isolation
from tiger_db.errors import (
    InvalidState,
    InvalidValue,
    ScopeMissing,
    StatementRefused,
    TradingPaused,
)

TRADES = [APIKeyScope.TRADE_READ, APIKeyScope.TRADE_WRITE, APIKeyScope.TRADE_ADMIN]
OTHERS = [scope for scope in APIKeyScope if scope not in TRADES]
EVERYTHING = [scope for scope in APIKeyScope if scope.endswith(":admin")]
REASON = "the assistant sells everything"


async def key_for_everything(database: Database, **values: Any) -> str:
    async with database.session() as session:
        return (await factories.api_key(session, scopes=EVERYTHING, **values))[1]


async def pause(database: Database) -> None:
    async with database.session() as session:
        await api_keys.pause(session, reason=REASON)


async def resume(database: Database) -> None:
    async with database.session() as session:
        assert await api_keys.resume(session) is not None


async def told(session: AsyncSession, *actions: AuditAction) -> list[AuditLog]:
    events = await factories.events(session)
    return [event for event in events if event.action in actions]


@pytest.mark.parametrize("by", ["session", "verifier", "listening verifier"])
async def test_a_pause_denies_the_trade_scopes_only(clone: Database, by: str) -> None:
    raw_key = await key_for_everything(clone, rate_limit_per_hour=len(OTHERS) + 2)
    async with KeyVerifier(clone, memory=by == "listening verifier") as verifier:

        async def authorize(*scopes: APIKeyScope) -> None:
            if by != "session":
                await verifier.authorize(raw_key, scopes=scopes)
                return
            async with clone.session() as session:
                await api_keys.authorize_api_key(session, raw_key, scopes=scopes)

        await pause(clone)
        for scopes in (*([scope] for scope in TRADES), [*OTHERS, APIKeyScope.TRADE_READ]):
            with pytest.raises(TradingPaused, match=f"^trading is paused: {REASON}$") as denied:
                await authorize(*scopes)
            assert denied.value.reason == REASON
        for scope in OTHERS:
            await authorize(scope)
        assert await verifier.verify(raw_key), "no scope is required"
        await resume(clone)
        await authorize(*TRADES)  # the last use before the limit: the denials are not counted


async def test_the_pause_is_the_last_check(session: AsyncSession) -> None:
    _, raw_key = await factories.api_key(session)
    await api_keys.pause(session, reason=REASON)
    with pytest.raises(ScopeMissing):
        await api_keys.authorize_api_key(session, raw_key, scopes=TRADES)


async def test_a_pause_and_its_end_are_on_record(clone: Database) -> None:
    alice, bob = (Actor(user_id=name, user_type="user") for name in ("alice", "bob"))
    async with clone.session(actor=alice) as session:
        assert not await api_keys.is_paused(session)
        paused = await api_keys.pause(session, reason=REASON)
        assert (paused.reason, paused.paused_by) == (REASON, "alice")
        assert await api_keys.pause(session, reason="again, in this transaction") == paused
        assert await api_keys.is_paused(session)
    async with clone.session(actor=bob) as session:
        assert await api_keys.pause(session, reason="another") == paused
        assert await api_keys.current_pause(session) == paused
    async with clone.session(actor=bob) as session:
        assert await api_keys.resume(session, reason="the assistant is stopped") == paused
        assert await api_keys.resume(session, reason="again") is None
        assert not await api_keys.is_paused(session)
        assert (await api_keys.pause(session, reason="another")).paused_by == "bob"
        values = paused.as_json()
        assert values["paused_at"] == paused.paused_at.isoformat()
        events = await told(session, AuditAction.TRADING_PAUSE, AuditAction.TRADING_RESUME)
    start, end, other = events
    assert (start.action, start.user_id, start.new_values) == ("trading:pause", "alice", values)
    assert (end.action, end.user_id, end.old_values) == ("trading:resume", "bob", values)
    assert end.details == {"reason": "the assistant is stopped"}
    assert (other.action, other.user_id) == ("trading:pause", "bob")
    assert {event.severity for event in events} == {AuditSeverity.CRITICAL}


async def test_a_pause_that_is_rolled_back_is_none(clone: Database) -> None:
    raw_key = await key_for_everything(clone)
    async with clone.session() as session:
        await api_keys.pause(session, reason=REASON)
        with pytest.raises(TradingPaused):  # in the transaction of the pause
            await api_keys.authorize_api_key(session, raw_key, scopes=TRADES)
        assert await KeyVerifier(clone).authorize(raw_key, scopes=TRADES), "not committed"
        await session.rollback()
    async with clone.session() as session:
        assert await api_keys.authorize_api_key(session, raw_key, scopes=TRADES)
        assert await told(session, AuditAction.TRADING_PAUSE) == []


@pytest.mark.parametrize("reason", ["", " \n", "x" * 501, None, 5])
async def test_an_invalid_reason_is_refused(session: AsyncSession, reason: Any) -> None:
    with pytest.raises(InvalidValue, match="reason"):
        await api_keys.pause(session, reason=reason)
    if reason is not None:
        with pytest.raises(InvalidValue, match="reason"):
            await api_keys.resume(session, reason=reason)
    assert not await api_keys.is_paused(session)


async def test_no_character_of_a_reason_prevents_a_pause(session: AsyncSession) -> None:
    paused = await api_keys.pause(session, reason="stop\0 \udcff 停")
    assert paused.reason == "stop\ufffd ? 停"
    assert await api_keys.resume(session, reason="go\0 \udcff") == paused


async def test_a_secret_in_a_reason_is_masked(session: AsyncSession) -> None:
    _, raw_key = await factories.api_key(session, scopes=TRADES)
    pause = await api_keys.pause(session, reason=f"stolen: {raw_key}, password=hunter2")
    with pytest.raises(TradingPaused) as raised:
        await api_keys.authorize_api_key(session, raw_key, scopes=TRADES)
    for text_ in (pause.reason, str(raised.value), repr(raised.value.reason)):
        assert "stolen" in text_
        assert raw_key not in text_
        assert "hunter2" not in text_


async def test_a_readonly_session_can_only_read_the_pause(clone: Database) -> None:
    async with clone.session(readonly=True) as session:
        with pytest.raises(InvalidState, match="readonly"):
            await api_keys.pause(session, reason=REASON)
        with pytest.raises(InvalidState, match="readonly"):
            await api_keys.resume(session)
        assert not await api_keys.is_paused(session)


@pytest.mark.slow
async def test_pauses_at_once_are_one_pause(crowd: Database) -> None:
    reasons = [f"reason {number}" for number in range(20)]
    calls = [partial(api_keys.pause, reason=reason) for reason in reasons]
    paused = await at_once(crowd, calls)
    assert len(set(paused)) == 1
    async with crowd.session() as session:
        (event,) = await told(session, AuditAction.TRADING_PAUSE)
        assert event.new_values == paused[0].as_json()
        assert await api_keys.current_pause(session) == paused[0]
    ended = await at_once(crowd, [api_keys.resume] * 20)
    assert sorted(ended, key=str) == [*[None] * 19, paused[0]]
    async with crowd.session() as session:
        assert len(await told(session, AuditAction.TRADING_RESUME)) == 1


async def test_a_resume_waits_for_a_second_pause(clone: Database) -> None:
    await pause(clone)
    async with clone.session() as session:
        await api_keys.pause(session, reason="another")
        resuming = asyncio.create_task(resume(clone))
        await until_waiting(session, 1, resuming)
        assert not resuming.done(), "the caller of `pause` has been told that trading is paused"
    await resuming


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_a_pause_denies_in_transactions_that_began_before_it(
    clone: Database, isolation: Isolation
) -> None:
    raw_key = await key_for_everything(clone)
    async with clone.session(isolation=isolation) as session:
        assert await api_keys.authorize_api_key(session, raw_key, scopes=TRADES)
        await pause(clone)
        with pytest.raises(TradingPaused, match=REASON):
            await api_keys.authorize_api_key(session, raw_key, scopes=TRADES)
        assert await api_keys.authorize_api_key(session, raw_key, scopes=OTHERS)


async def test_the_pause_costs_no_statement(clone: Database) -> None:
    raw_key = await key_for_everything(clone)
    for scopes in (TRADES, OTHERS):
        with sent_statements(clone) as sent:
            async with clone.session() as session:
                await api_keys.authorize_api_key(session, raw_key, scopes=scopes)
        assert len(sent) == 1, sent


async def test_a_pause_needs_no_notification(
    clone: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_key = await key_for_everything(clone)
    async with KeyVerifier(clone, memory=True) as listening:
        await until(lambda: listening._valid_until > time.monotonic())
        monkeypatch.setattr(listening, "_handle_notification", lambda _: None)
        monkeypatch.setattr(listening, "_valid_until", float("inf"))
        assert await listening.authorize(raw_key, scopes=OTHERS)
        assert await listening.authorize(raw_key, scopes=TRADES)
        await pause(clone)
        with pytest.raises(TradingPaused):
            await listening.authorize(raw_key, scopes=TRADES)
        await until(lambda: listening._valid_until > time.monotonic())
        assert await listening.authorize(raw_key, scopes=OTHERS)
        with checkouts(clone) as taken:
            assert await listening.authorize(raw_key, scopes=OTHERS)
        assert taken == [], "other scopes are served from memory"


def trade(settings: Settings, raw_key: str, by: str, pipe: Any) -> None:
    """Authorize trades in a loop until one is denied, and report the start of the last success."""

    async def run() -> None:
        async with (
            Database(settings) as database,
            KeyVerifier(database, memory=by == "memory") as verifier,
        ):

            async def authorize() -> None:
                if by != "session":
                    await verifier.authorize(raw_key, scopes=TRADES)
                    return
                async with database.session() as session:
                    await api_keys.authorize_api_key(session, raw_key, scopes=TRADES)

            await authorize()
            pipe.send("ready")
            calls, denied, last = 0, 0, 0.0
            deadline = time.monotonic() + 30
            while denied < 50 and time.monotonic() < deadline:
                started = time.monotonic()
                try:
                    await authorize()
                except TradingPaused:
                    denied += 1
                else:
                    calls, last = calls + 1, started
            pipe.send((calls, last, denied))

    asyncio.run(run())


@pytest.mark.slow
async def test_after_the_commit_no_process_accepts_a_trade(clone: Database) -> None:
    raw_key = await key_for_everything(clone)
    children = []
    for by in ("memory", "memory", "verifier", "session"):
        here, there = FORKS.Pipe()
        child = FORKS.Process(target=trade, args=(Passed(clone.settings), raw_key, by, there))
        child.start()
        children.append((child, here))
    for _, here in children:
        assert await asyncio.to_thread(here.recv) == "ready"
    await asyncio.sleep(0.3)  # time for the loops
    await pause(clone)
    committed = time.monotonic()
    for child, here in children:
        calls, last, denied = await asyncio.to_thread(here.recv)
        await asyncio.to_thread(child.join, 10)
        assert calls > 10
        assert last < committed
        assert denied == 50


async def test_no_trade_is_accepted_if_the_pauses_cannot_be_read(clone: Database) -> None:
    raw_key = await key_for_everything(clone)
    async with clone.session() as session:
        await session.execute(text("ALTER TABLE trading_pauses RENAME TO moved"))
        with pytest.raises(StatementRefused):
            await api_keys.authorize_api_key(session, raw_key, scopes=TRADES)
        await session.rollback()

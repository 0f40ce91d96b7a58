"""Callers without a valid key flood the audit trail, or slow down the callers with a valid key."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, TypeAlias

import pytest

from tests.support import factories
from tests.support.raw_keys import unknown_key, wrong_secret
from tests.support.waiting import until
from tiger_db import (
    Actor,
    APIKeyScope,
    AuditAction,
    AuditLog,
    Database,
    KeyVerifier,
    acting_as,
    denial_counter,
)
from tiger_db.connections import connect
from tiger_db.crud import api_keys, audit_logs
from tiger_db.crud.api_keys.denials import request_event
from tiger_db.crud.api_keys.policy import AccessRequest
from tiger_db.denial_counter import DenialCounter
from tiger_db.errors import AccessDenied, DatabaseUnavailable
from tiger_db.redaction import add_known_secrets

Verify: TypeAlias = Callable[[str, str | None], Awaitable[object]]
DENY = "api_key:deny"
BLOCKED = "pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
WAYS = ["session", "verifier", "memory"]


async def denials(database: Database) -> list[AuditLog]:
    """Return the denials on record after the counts were written, oldest first."""
    await database.out_of_band.denials.close()
    async with database.session() as session:
        found = await audit_logs.search(session, action=DENY, limit=1000)
    return found.items[::-1]


def count_of(event: AuditLog) -> int:
    """Return the number of denials that an event stands for."""
    count = (event.details or {}).get("count", 1)
    assert isinstance(count, int)
    return count


def verify_by(way: str, database: Database, verifier: KeyVerifier) -> Verify:
    async def verify(raw_key: str, address: str | None) -> object:
        if way != "session":
            return await verifier.verify(raw_key, ip_address=address)
        async with database.session() as session:
            return await api_keys.verify_api_key(session, raw_key, ip_address=address)

    return verify


@pytest.mark.parametrize("way", WAYS)
async def test_a_flood_of_unknown_keys_has_two_events(clone: Database, way: str) -> None:
    started = datetime.now(UTC)
    async with KeyVerifier(clone, memory=way == "memory") as verifier:
        verify = verify_by(way, clone, verifier)
        for _ in range(30):
            assert await verify(unknown_key(), "10.0.0.1") is None
    first, rest = await denials(clone)
    assert (count_of(first), count_of(rest)) == (1, 29)
    for event in (first, rest):
        assert (event.error_code, event.ip_address) == ("InvalidAPIKey", ip_address("10.0.0.1"))
    assert first.details is not None
    assert "since" not in first.details
    assert rest.details is not None
    assert started <= datetime.fromisoformat(str(rest.details["since"])) <= datetime.now(UTC)


async def test_a_denial_that_is_counted_sends_no_event(clone: Database) -> None:
    verifier = KeyVerifier(clone)
    for _ in range(5):
        await verifier.verify(unknown_key())
    async with clone.session() as session:
        assert len(await audit_logs.search(session, action=DENY)) == 1


async def test_each_address_has_its_own_events(clone: Database) -> None:
    verifier = KeyVerifier(clone)
    addresses = ["10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8:0:1::1", "::ffff:10.0.0.1", None]
    for _ in range(3):
        for address in addresses:
            await verifier.verify(unknown_key(), ip_address=address)
    with acting_as(Actor(user_id="proxy", ip_address="10.0.0.2")):
        await verifier.verify(unknown_key())
    combined = [e for e in await denials(clone) if "count" in (e.details or {})]
    found = {str(event.ip_address): count_of(event) for event in combined}
    expected = {"10.0.0.1": 5, "10.0.0.2": 3, "2001:db8::1": 2, "2001:db8:0:1::1": 2, "None": 2}
    assert found == expected


@pytest.mark.slow
async def test_an_attacker_with_many_addresses_is_one_group(clone: Database) -> None:
    verifier = KeyVerifier(clone)
    for number in range(20):  # addresses of one IPv6 network
        await verifier.verify(unknown_key(), ip_address=f"2001:db8::{number:x}")
    for number in range(100):  # addresses of several networks
        await verifier.verify(unknown_key(), ip_address=f"10.0.{number}.1")
    events = await denials(clone)
    assert len(events) <= 2 * 21
    assert sum(map(count_of, events)) == 120
    network = [e for e in events if e.details and e.details.get("network") == "2001:db8::/64"]
    assert [count_of(event) for event in network] == [19]
    (others,) = [event for event in events if event.details and "others" in event.details]
    assert count_of(others) == 100 - 19 - 1
    assert (others.ip_address, others.api_key_id, others.user_id) == (None, None, None)
    assert "key_prefix" not in (others.details or {})


@pytest.mark.parametrize("name", ["user_agent", "ip_address"])
async def test_a_long_text_of_a_caller_stops_no_other_task(clone: Database, name: str) -> None:
    verifier = KeyVerifier(clone)
    await verifier.verify(unknown_key())
    asked: dict[str, Any] = {name: "http://a:b@" * 300_000}
    begun = time.thread_time()
    assert await verifier.verify(unknown_key(), **asked) is None
    assert time.thread_time() - begun < 0.5  # several seconds if the whole text is redacted


@pytest.mark.parametrize("secret", ["https://u:hunter2@h", "own secret hunter2"])
@pytest.mark.parametrize("before", ["Ab1", "a "])
def test_no_secret_of_a_long_text_is_recorded(secret: str, before: str) -> None:
    """A mask is shorter than a secret, so the end of a redacted text can be shown."""
    add_known_secrets("own secret hunter2")
    for size in range(1_970, 2_002):
        text = f"{(before * size)[:size]} {secret} {'x' * 2_000}"
        request = AccessRequest(user_agent=text)
        event = request_event(request, None, None, action=AuditAction.API_KEY_DENY, details={})
        assert event.user_agent
        assert len(event.user_agent) <= 200
        assert "hun" not in event.user_agent
        assert "own" not in event.user_agent


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
async def test_denials_of_a_key_that_exists_are_single_up_to_a_budget(
    clone: Database, way: str
) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
        other, other_key = await factories.api_key(session)
    async with KeyVerifier(clone, memory=way == "memory") as verifier:
        verify = verify_by(way, clone, verifier)
        for _ in range(70):
            assert await verify(wrong_secret(raw_key), "10.0.0.1") is None
        assert await verify(wrong_secret(other_key), "10.0.0.1") is None
    events = await denials(clone)
    assert [count_of(event) for event in events] == [1] * 61 + [10]
    assert [event.api_key_id for event in events[60:]] == [other.id, key.id]


@pytest.mark.slow
async def test_denials_from_memory_are_counted(clone: Database) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
    async with KeyVerifier(clone, memory=True) as verifier:
        await verifier.authorize(raw_key)
        for _ in range(500):
            with pytest.raises(AccessDenied):
                await verifier.authorize(raw_key, scopes=[APIKeyScope.MCP_ADMIN])
    events = await denials(clone)
    assert [count_of(event) for event in events] == [1] * 60 + [440]
    assert {(event.error_code, event.api_key_id) for event in events} == {("ScopeMissing", key.id)}


async def test_the_events_of_an_interval_are_bounded(clone: Database) -> None:
    """An attacker who has many prefixes of keys, for example from a log, is bounded too."""
    counter = DenialCounter(clone.out_of_band.connection)
    single = 0
    for number in range(20_000):
        single += not counter.count("api_key", f"{number % 1000}", factories.new_event)
    assert single == 300
    assert len(counter._groups["api_key"]) == 101
    await counter.close()
    async with clone.session() as session:
        assert len(await audit_logs.search(session, limit=1000)) <= 101


async def test_a_flood_has_one_event_per_interval(
    clone: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several intervals pass within the test, and none ends at its end.
    monkeypatch.setattr(denial_counter, "WRITE_INTERVAL_SECONDS", 0.05)
    verifier = KeyVerifier(clone)
    counter = clone.out_of_band.denials

    async def counts() -> list[int]:
        async with clone.session() as session:
            return [count_of(e) for e in await audit_logs.search(session, action=DENY)][::-1]

    await verifier.verify(unknown_key())
    await verifier.verify(unknown_key())
    await until(lambda: _equals(counts, [1, 1]))
    await until(lambda: not counter._groups["address"])  # after an interval without denials
    await verifier.verify(unknown_key())
    assert await counts() == [1, 1, 1]  # at once
    monkeypatch.setattr(denial_counter, "WRITE_INTERVAL_SECONDS", 60)


async def _equals(counts: Callable[[], Awaitable[list[int]]], expected: list[int]) -> bool:
    return await counts() == expected


async def test_an_unavailable_database_loses_no_counts(clone: Database) -> None:
    counter = clone.out_of_band.denials
    for _ in range(4):
        counter.count("address", "10.0.0.1", factories.new_event)
    owner, observer = [await connect(clone.settings) for _ in range(2)]
    await owner.execute("BEGIN; LOCK TABLE audit_logs")
    writing = asyncio.create_task(counter._write())
    await until(lambda: observer.fetchval(f"SELECT count(*) > 0 FROM {BLOCKED}"))
    counter.count("address", "10.0.0.1", factories.new_event)
    await observer.execute(f"SELECT pg_terminate_backend(pid) FROM {BLOCKED}")
    with pytest.raises(DatabaseUnavailable):
        await writing
    for connection in (owner, observer):
        await connection.close()
    await counter.close()
    async with clone.session() as session:
        assert [count_of(e) for e in await audit_logs.search(session)] == [4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "limit"), [("verifier", None), ("verifier", 1_000_000), ("session", None)]
)
async def test_a_flood_slows_good_keys_by_less_than_half(
    clone: Database, way: str, limit: int | None
) -> None:
    async with clone.session() as session:
        _, raw_key = await factories.api_key(session, rate_limit_per_day=limit)
    verify = verify_by(way, clone, KeyVerifier(clone))
    tried = 0

    async def attack() -> None:
        nonlocal tried
        while True:
            await verify(unknown_key(), "10.0.0.1")
            tried += 1

    async def median(seconds: float) -> float:
        times = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            start = time.perf_counter()
            assert await verify(raw_key, None)
            times.append(time.perf_counter() - start)
            await asyncio.sleep(0.002)
        return statistics.median(times)

    alone = await median(0.5)
    attackers = [asyncio.create_task(attack()) for _ in range(300)]
    await until(lambda: tried > 500)
    beside = await median(1)
    for attacker in attackers:
        attacker.cancel()
    await asyncio.wait(attackers)
    print(f"alone {alone * 1e3:.2f} ms, beside {tried} unknown keys {beside * 1e3:.2f} ms")  # noqa: T201
    # On a machine whose cores are all busy, each step of the event loop can take milliseconds.
    assert beside < 2 * alone + 0.003
    assert len(await denials(clone)) == 2


async def test_a_key_is_still_accepted_for_the_first_time_in_a_flood(clone: Database) -> None:
    async with clone.session() as session:
        _, raw_key = await factories.api_key(session)
    verifier = KeyVerifier(clone)
    counter = clone.out_of_band.denials
    for _ in range(denial_counter.FLOOD_DENIALS):
        counter.count("address", "", factories.new_event)
    attackers = [asyncio.create_task(verifier.verify(unknown_key())) for _ in range(50)]
    async with asyncio.timeout(20):
        assert await verifier.verify(raw_key)
        async with clone.session() as session:
            assert await api_keys.verify_api_key(session, raw_key)
        assert set(await asyncio.gather(*attackers)) == {None}


async def test_a_session_with_a_connection_does_not_wait_in_a_flood(clone: Database) -> None:
    """Otherwise, the sessions that wait would keep the connections of the pool from all others."""
    async with clone.session() as session:
        _, raw_key = await factories.api_key(session)
    counter = clone.out_of_band.denials
    for _ in range(denial_counter.FLOOD_DENIALS):
        counter.count("address", "", factories.new_event)
    with suppress(AccessDenied):
        async with counter.admit(counter.digest(unknown_key()), wait=True), asyncio.timeout(20):
            async with clone.session() as session:
                await session.connection()
                assert await api_keys.verify_api_key(session, raw_key)
            waiting = asyncio.create_task(KeyVerifier(clone).verify(unknown_key()))
            await asyncio.sleep(0.05)
            assert not waiting.done()
    assert await waiting is None

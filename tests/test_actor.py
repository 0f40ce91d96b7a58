"""Audit events are attributed to the actor in force."""

import asyncio
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import pytest

from tests.support import factories
from tests.support.contexts import changed_context
from tests.support.encryption_keys import K1, K2
from tests.support.refresh_workers import at_once
from tiger_db import (
    AccountStatus,
    Actor,
    APIKeyScope,
    AuditAction,
    AuditLog,
    Database,
    KeyVerifier,
    RefreshTrigger,
    RefreshWorker,
    TigerAccount,
    acting_as,
    crud,
    encryption_key_rotation,
    get_session,
)
from tiger_db.actor import ACTOR_FIELDS
from tiger_db.crud import accounts, api_keys, audit_logs, token_status
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidValue, ScopeMissing

QUERY = AuditAction.DATA_QUERY
ALICE = Actor(
    user_id="alice",
    user_type="admin",
    ip_address="10.0.0.1",
    user_agent="browser/1",
    session_id="s1",
    request_id="r1",
    request_method="POST",
    request_path="/orders",
    api_key_id=UUID(int=1),
)
BOB = Actor(user_id="bob", user_type="trader")


def who(event: AuditLog) -> dict[str, Any]:
    return {name: getattr(event, name) for name in ACTOR_FIELDS}


NOBODY = dict.fromkeys(ACTOR_FIELDS) | {"user_type": "unattributed"}
IS_ALICE = {name: getattr(ALICE, name) for name in ACTOR_FIELDS}


def is_alice(event: AuditLog) -> dict[str, Any]:
    """Return the values of Alice's event, which has the id of the API key that it is about."""
    if event.resource_type != "api_key":
        return IS_ALICE
    return IS_ALICE | {"api_key_id": UUID(event.resource_id)}


async def trail(database: Database) -> list[AuditLog]:
    async with database.session() as session:
        return [*(await audit_logs.search(session, limit=1000))]


# Values


def test_an_actor_has_the_values_of_an_event() -> None:
    given: dict[str, Any] = {
        "user_id": 7,
        "user_type": "x" * 60,
        "ip_address": "[2001:db8::1]:443",
        "user_agent": "agent\0" + "y" * 600,
        "session_id": "tdb_live_0123456789ab_secret-of-nobody-0123456789",
    }
    event = AuditLog(action=QUERY, **given)
    assert who(event) == {name: getattr(Actor(**given), name) for name in ACTOR_FIELDS}
    assert Actor(user_id="a", ip_address="unknown").ip_address is None


def test_an_actor_is_frozen_and_compares_by_value() -> None:
    with pytest.raises(AttributeError):
        ALICE.user_id = "eve"  # type: ignore[misc]
    assert Actor(ip_address="10.0.0.1") == Actor(ip_address=ip_address("10.0.0.1"))


def test_an_actor_without_identity_is_unattributed() -> None:
    assert Actor().user_type == Actor(user_id="", request_id="r1").user_type == "unattributed"
    assert Actor(user_id="alice").user_type is None


async def test_only_an_actor_is_accepted(database: Database) -> None:
    wrong: Any = "alice"
    with pytest.raises(InvalidValue, match=r"actor\n.*not str"), acting_as(wrong):
        pass
    with pytest.raises(InvalidValue, match=r"actor\n.*not str"):
        async with database.session(actor=wrong):
            pass


# Precedence


async def test_the_actor_of_the_session_wins_over_acting_as(clone: Database) -> None:
    with acting_as(BOB):
        async with clone.session(actor=ALICE) as session:
            explicit = await audit_logs.log_event(session, action=QUERY)
        async with clone.session() as session:
            ambient = await audit_logs.log_event(session, action=QUERY)
    async with clone.session() as session:
        after = await audit_logs.log_event(session, action=QUERY)
    assert who(explicit) == IS_ALICE
    assert ambient.user_id == "bob"
    assert ambient.request_id is None  # nothing is mixed in from another actor
    assert who(after) == NOBODY
    assert [who(event) for event in reversed(await trail(clone))] == [
        who(explicit), who(ambient), who(after)
    ]  # fmt: skip


async def test_fields_of_an_event_win_over_the_actor(session: AsyncSession) -> None:
    with acting_as(ALICE):
        named = await audit_logs.log_event(
            session, action=QUERY, user_id="carol", ip_address="10.0.0.9"
        )
        typed = await audit_logs.log_event(session, action=QUERY, user_type="webhook")
    unknown = await audit_logs.log_event(session, action=QUERY, user_id="carol")
    assert who(named) == IS_ALICE | {
        "user_id": "carol", "user_type": None, "ip_address": ip_address("10.0.0.9"),
    }  # fmt: skip
    assert who(typed) == IS_ALICE | {"user_id": None, "user_type": "webhook"}
    assert unknown.user_type is None  # its user is known


async def test_acting_as_ends_with_its_block_and_can_be_nested(session: AsyncSession) -> None:
    seen = []
    with acting_as(ALICE):
        with pytest.raises(ZeroDivisionError), acting_as(BOB):
            seen.append((await audit_logs.log_event(session, action=QUERY)).user_id)
            _ = 1 / 0
        seen.append((await audit_logs.log_event(session, action=QUERY)).user_id)
    seen.append((await audit_logs.log_event(session, action=QUERY)).user_id)
    assert seen == ["bob", "alice", None]


async def test_get_session_takes_an_actor(clone: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clone.settings.database_url is not None
    monkeypatch.setenv("DATABASE_URL", clone.settings.database_url.get_secret_value())

    async def log() -> AuditLog:
        async with get_session(actor=ALICE) as session:
            return await audit_logs.log_event(session, action=QUERY)

    # In an event loop of its own, which closes its default Database.
    assert who(await asyncio.to_thread(asyncio.run, log())) == IS_ALICE


# Each way to write an event


@pytest.mark.slow
async def test_200_interleaved_tasks_are_recorded_as_their_own_actors(clone: Database) -> None:
    """Every fourth task has no actor, and each way to write an event takes part."""
    _, raw_key = await _key(clone)
    verifier = KeyVerifier(clone)

    async def log(number: int) -> None:
        async with clone.session() as session:
            await asyncio.sleep(0)
            await audit_logs.log_event(session, action=QUERY, resource_id=str(number))

    async def log_many(number: int) -> None:
        async with clone.session() as session:
            await asyncio.sleep(0)
            event = AuditLog(action=QUERY, resource_id=str(number))
            await audit_logs.log_events(session, [event])

    async def record(number: int) -> None:
        async with clone.session() as session:
            await asyncio.sleep(0)
            await audit_logs.record_event(session, action=QUERY, resource_id=str(number))

    async def deny(number: int) -> None:
        with pytest.raises(ScopeMissing):
            await verifier.authorize(
                raw_key, scopes=[APIKeyScope.TRADE_READ], user_agent=str(number)
            )

    ways = [log, log_many, record, deny]

    async def act(number: int) -> None:
        way = ways[number % 4]
        match number // 4 % 4:
            case 0:
                await way(number)
            case 1:
                with acting_as(Actor(user_id=f"user {number}")):
                    await way(number)
            case 2:  # a task that was started by another actor's task
                with acting_as(Actor(user_id=f"user {number}")):
                    await asyncio.create_task(way(number))
            case _:
                with acting_as(Actor(user_id="nobody of interest")):
                    await asyncio.sleep(0)
                    with acting_as(Actor(user_id=f"user {number}")):
                        await way(number)

    async with asyncio.timeout(60):
        await asyncio.gather(*(act(number) for number in range(200)))
    seen = {
        event.user_agent or event.resource_id: (event.user_id, event.user_type)
        for event in await trail(clone)
        if event.action in {QUERY, AuditAction.API_KEY_DENY}
    }
    assert seen == {
        str(number): (None, "unattributed") if number // 4 % 4 == 0 else (f"user {number}", None)
        for number in range(200)
    }


async def _key(database: Database, **values: Any) -> tuple[Any, str]:
    async with database.session() as session:
        return await factories.api_key(session, **values)


async def _authorize(session: AsyncSession) -> None:
    _, raw_key = await factories.api_key(session)
    with pytest.raises(ScopeMissing):
        await api_keys.authorize_api_key(session, raw_key, scopes=[APIKeyScope.TRADE_READ])


async def _change_accounts(session: AsyncSession) -> None:
    account = await factories.account_with_token(session)
    key, _ = await factories.api_key(session, tiger_account_id=account.id)
    await accounts.update(session, account.id, account_name="Other")
    await accounts.set_default_trading_account(session, account.id)
    await accounts.update_tokens(session, account.id, access_token="token-2")
    await accounts.record_error(session, account.id, message="down")
    await accounts.reset_errors(session, account.id)
    await accounts.update(session, account.id, status=AccountStatus.SUSPENDED)
    await api_keys.rotate(session, key.id)
    await token_status.create_refresh_operation(
        session, tiger_account_id=account.id, trigger=RefreshTrigger.MANUAL
    )
    await accounts.close(session, account.id)


async def _refresh(session: AsyncSession) -> None:
    for end in (_complete, _fail, token_status.fail_unknown):
        await end(session, await factories.claim(session))


async def _complete(session: AsyncSession, claim: Any) -> None:
    await token_status.complete(session, claim, access_token="token-2")


async def _fail(session: AsyncSession, claim: Any) -> None:
    await token_status.fail(session, claim, message="refused", credentials_refused=True)


async def _log_all_ways(session: AsyncSession) -> None:
    await audit_logs.log_event(session, action=QUERY)
    await audit_logs.log_events(session, [AuditLog(action=QUERY), AuditLog(action=QUERY)])
    await audit_logs.record_event(session, action=QUERY)
    session.add(AuditLog(action=QUERY))
    await session.flush()


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("out_of_band", [True, False])
@pytest.mark.parametrize("work", [_change_accounts, _refresh, _log_all_ways, _authorize])
async def test_every_event_that_is_written_in_a_session_has_its_actor(
    clone: Database, work: Any, out_of_band: bool, explicit: bool
) -> None:
    changes: dict[str, Any] = {"actor": ALICE if explicit else None}
    if not out_of_band:
        changes |= {"out_of_band": None, "count_use": None}
    with acting_as(BOB if explicit else ALICE):
        async with clone.sessions(info=changed_context(clone.info, **changes)) as session:
            await work(session)
            await session.commit()
    events = await trail(clone)
    assert len(events) > 1
    assert [who(event) for event in events] == [is_alice(event) for event in events]


@pytest.mark.slow
async def test_events_of_services_have_the_actor(clone: Database) -> None:
    """KeyVerifier, the export of an account, and the rotation of encryption keys open sessions."""
    with acting_as(ALICE):
        async with Database(clone.settings, key_provider=K1) as old:
            async with old.session() as session:
                await factories.account(session)
                _, raw_key = await factories.api_key(session)
            with pytest.raises(ScopeMissing):
                await KeyVerifier(old).authorize(raw_key, scopes=[APIKeyScope.TRADE_READ])
        async with Database(clone.settings, key_provider=K2) as both:
            await encryption_key_rotation.rotate(both)
    events = await trail(clone)
    actions = {event.action for event in events}
    assert {AuditAction.API_KEY_DENY, AuditAction.SYSTEM_ENCRYPTION_KEY_ROTATE} <= actions
    assert [who(event) for event in events] == [is_alice(event) for event in events]


async def test_a_request_that_is_denied_shows_its_own_address(clone: Database) -> None:
    _, raw_key = await _key(clone)
    with acting_as(ALICE), pytest.raises(ScopeMissing):
        await KeyVerifier(clone).authorize(
            raw_key, scopes=[APIKeyScope.TRADE_READ], ip_address="10.9.9.9"
        )
    denial = (await trail(clone))[0]
    assert (denial.user_id, denial.ip_address) == ("alice", ip_address("10.9.9.9"))
    assert (denial.user_agent, denial.request_id) == ("browser/1", "r1")


async def test_a_worker_acts_under_its_name(clone: Database) -> None:
    """So does the refresher, whoever has started the worker."""
    async with clone.session(actor=ALICE) as session:
        await factories.account_with_token(session)
        refresh = await factories.refresh(session)

    async def refresher(account: TigerAccount) -> Any:
        async with clone.session() as session:
            await audit_logs.log_event(session, action=QUERY)
        return await at_once(account)

    worker = RefreshWorker(clone, refresher, name="worker-7")
    with acting_as(ALICE):
        await worker.run_one(refresh.id)
        await worker.run(once=True)
    assert worker.counts["refreshed"] == 2
    by_worker = [event for event in await trail(clone) if event.user_id != "alice"]
    actions = [event.action for event in by_worker]
    assert actions.count(AuditAction.TOKEN_REFRESH) == actions.count(QUERY) == 2
    assert AuditAction.TOKEN_REFRESH_SCHEDULE in actions
    expected = dict.fromkeys(ACTOR_FIELDS) | {"user_id": "worker-7", "user_type": "worker"}
    assert [who(event) for event in by_worker] == [expected] * len(by_worker)


async def test_an_event_is_found_by_its_id(session: AsyncSession) -> None:
    event = await audit_logs.log_event(session, action=QUERY)
    session.expunge_all()
    found = await crud.audit_logs.get(session, event.id)
    assert found is not None
    assert found.model_dump() == event.model_dump()
    assert await crud.audit_logs.get(session, (await factories.account(session)).id) is None

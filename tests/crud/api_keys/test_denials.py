"""Each denial is recorded, even if the transaction of the caller rolls back."""

import asyncio
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.contexts import context_without_out_of_band
from tests.support.raw_keys import unknown_key, wrong_secret
from tests.support.signing import sign_rows
from tiger_db import APIKeyScope, AuditAction, AuditLog, AuditResult, Database, KeyVerifier
from tiger_db import errors as tiger_errors
from tiger_db.crud import api_keys
from tiger_db.errors import (
    AccessDenied,
    DatabaseUnavailable,
    InvalidAPIKey,
    RateLimited,
    ScopeMissing,
)
from tiger_db.models.api_keys import parse_address

ADDRESS = "10.0.0.1"
# How the key or its account is changed by SQL, what is asked of it, and why it is refused.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "wrong secret": ("", {}, "InvalidAPIKey"),
    "unknown": ("", {}, "InvalidAPIKey"),
    "inactive": ("UPDATE api_keys SET status = 'inactive'", {}, "APIKeyRevoked"),
    "revoked": ("UPDATE api_keys SET status = 'revoked'", {}, "APIKeyRevoked"),
    "expired": ("UPDATE api_keys SET status = 'expired'", {}, "APIKeyExpired"),
    "past": ("UPDATE api_keys SET expires_at = '2020-01-01'", {}, "APIKeyExpired"),
    "account": ("UPDATE tiger_accounts SET status = 'suspended'", {}, "AccountNotActive"),
    "address": ("UPDATE api_keys SET allowed_ips = '{11.0.0.0/8}'", {}, "AddressNotAllowed"),
    "client": ("UPDATE api_keys SET allowed_user_agents = '{b*}'", {}, "UserAgentNotAllowed"),
    "scope": ("", {"scopes": [APIKeyScope.TRADE_ADMIN]}, "ScopeMissing"),
    "other account": ("", {"account_id": UUID(int=1)}, "AccountNotAllowed"),
    "pause": (
        """WITH paused AS (INSERT INTO trading_pauses (reason) VALUES ('stop'))
        UPDATE api_keys SET scopes = '{trade:admin}'""",
        {"scopes": [APIKeyScope.TRADE_READ]},
        "TradingPaused",
    ),
    "hour": ("UPDATE api_keys SET rate_limit_per_hour = 1", {}, "RateLimited"),
    "day": ("UPDATE api_keys SET rate_limit_per_day = 1", {}, "RateLimited"),
}
REQUEST = {"ip_address": ADDRESS, "user_agent": "agent/1.0"}


async def denials(database: Database) -> list[AuditLog]:
    async with database.session() as session:
        events = await factories.events(session)
    return [event for event in events if event.action == AuditAction.API_KEY_DENY]


def test_every_reason_for_a_denial_is_tested() -> None:
    reasons = {
        name
        for name, value in vars(tiger_errors).items()
        if isinstance(value, type) and issubclass(value, AccessDenied) and value is not AccessDenied
    }
    assert reasons == {reason for _, _, reason in CASES.values()}


@pytest.mark.parametrize(
    ("case", "by"),
    [
        *((case, by) for case in CASES for by in ("session", "listening verifier")),
        *((case, "verifier") for case in ("wrong secret", "unknown", "scope", "hour")),
    ],
)
async def test_a_denial_is_recorded_even_if_the_caller_rolls_back(
    clone: Database, case: str, by: str
) -> None:
    change, asked, reason = CASES[case]
    async with clone.session() as session:
        account = await factories.account(session)
        key, raw_key = await factories.api_key(session, tiger_account_id=account.id)
        if change:
            await session.execute(text(change))
            await sign_rows(session)
    if reason == "RateLimited":
        async with clone.session() as session:
            await api_keys.authorize_api_key(session, raw_key)
    tried = {"wrong secret": wrong_secret(raw_key), "unknown": unknown_key()}.get(case, raw_key)
    with pytest.raises(ZeroDivisionError):
        async with clone.session() as session:
            await session.execute(text("UPDATE tiger_accounts SET account_name = 'x'"))
            with pytest.raises(AccessDenied) as refused:
                if by == "session":
                    await api_keys.authorize_api_key(session, tried, **REQUEST | asked)
                elif by == "verifier":
                    await KeyVerifier(clone).authorize(tried, **REQUEST | asked)
                else:
                    async with KeyVerifier(clone, memory=True) as verifier:
                        await verifier.verify(tried, **REQUEST)  # the key may be cached now
                        await verifier.authorize(tried, **REQUEST | asked)
            assert type(refused.value).__name__ == reason
            _ = 1 / 0
    await clone.out_of_band.denials.close()  # a second unknown key is counted
    events = await denials(clone)
    assert len(events) == (2 if by == "listening verifier" and not asked else 1)
    for event in events:
        assert (event.error_code, event.result) == (reason, AuditResult.FAILURE)
        assert (event.resource_type, event.user_agent) == ("api_key", "agent/1.0")
        assert event.ip_address == ip_address(ADDRESS)
        assert event.error_message == str(refused.value)
        assert event.details is not None
        assert event.details["key_prefix"] == tried.rpartition("_")[0]
        if case == "unknown":
            assert (event.api_key_id, event.tiger_account_id, event.resource_id) == (None,) * 3
        else:
            assert (event.api_key_id, event.tiger_account_id) == (key.id, account.id)
            assert event.resource_id == str(key.id)
    details = events[-1].details
    assert details is not None
    assert details.get("scopes") == (
        [str(s) for s in asked["scopes"]] if "scopes" in asked else None
    )
    assert details.get("account_id") == (
        str(asked["account_id"]) if "account_id" in asked else None
    )
    async with clone.session() as session:
        found = await session.scalar(text("SELECT account_name FROM tiger_accounts"))
    assert found == "Main"


async def test_a_malformed_key_is_not_recorded(clone: Database) -> None:
    async with clone.session() as session:
        for malformed in ("", "nonsense", unknown_key()[:-1]):
            assert await api_keys.verify_api_key(session, malformed) is None
    assert await denials(clone) == []


async def test_a_session_without_out_of_band_writer_records_in_its_transaction(
    clone: Database,
) -> None:
    async with clone.sessions(info=context_without_out_of_band(clone.info)) as session:
        with pytest.raises(InvalidAPIKey):
            await api_keys.authorize_api_key(session, unknown_key())
        assert [e.error_code for e in await factories.events(session)] == ["InvalidAPIKey"]
        await session.rollback()
    assert await denials(clone) == []


async def test_callers_cannot_tell_an_unknown_key_from_a_wrong_secret(clone: Database) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
        await api_keys.revoke(session, key.id)
    told = []
    for tried in (unknown_key(), wrong_secret(raw_key), "nonsense"):
        async with clone.session() as session:
            with pytest.raises(InvalidAPIKey) as refused:
                await api_keys.authorize_api_key(session, tried, scopes=[APIKeyScope.MCP_ADMIN])
            assert await api_keys.verify_api_key(session, tried) is None
        error = refused.value
        told.append((type(error), str(error), error.args, vars(error), error.__cause__))
    assert told[0] == told[1] == told[2]


# With one connection


@pytest.mark.slow
async def test_a_pool_of_one_connection_does_not_hang(clone: Database) -> None:
    pool = {"db_pool_size": 1, "db_max_overflow": 0, "db_pool_timeout": 1}
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)
        _, limited_key = await factories.api_key(session, rate_limit_per_hour=3)
    async with Database(clone.settings.model_copy(update=pool)) as database:
        async with asyncio.timeout(15):
            async with database.session() as session:
                await session.execute(
                    text("SELECT FROM api_keys WHERE id = :id FOR SHARE"), {"id": key.id}
                )
                with pytest.raises(DatabaseUnavailable):  # the only connection is in use
                    async with database.session() as second:
                        await second.execute(text("SELECT 1"))
                for _ in range(3):
                    assert await api_keys.verify_api_key(session, raw_key)
                    assert await api_keys.verify_api_key(session, limited_key)
                    for wrong in (unknown_key(), wrong_secret(raw_key)):
                        with pytest.raises(InvalidAPIKey):
                            await api_keys.authorize_api_key(session, wrong)
                with pytest.raises(RateLimited):
                    await api_keys.authorize_api_key(session, limited_key)
                verifier = KeyVerifier(database)
                refused = await asyncio.gather(
                    *(
                        verifier.authorize(raw_key, scopes=[APIKeyScope.TRADE_READ])
                        for _ in range(40)
                    ),
                    return_exceptions=True,
                )
                assert {type(error) for error in refused} == {ScopeMissing}
                accepted = await asyncio.gather(*(verifier.verify(raw_key) for _ in range(40)))
                assert {found.id for found in accepted if found} == {key.id}
                assert len(await factories.events(session)) == 2 + 4 + 1 + 40
            # Each task has its own session, which waits for the connection.
            wrong = wrong_secret(raw_key)
            answers = await asyncio.gather(*(_verify(database, wrong) for _ in range(20)))
            assert answers == [None] * 20
    # Two of the three unknown keys have one event together.
    assert len(await denials(clone)) == 5 + 1 + 40 + 20
    async with clone.session() as session:
        found = await api_keys.get(session, key.id)
        assert found is not None
        assert found.usage_count == 3 + 40


async def _verify(database: Database, raw_key: str) -> object:
    async with database.session() as session:
        return await api_keys.verify_api_key(session, raw_key)


# What callers say of themselves

ODD_TEXTS = [
    "", " ", "unknown", "a\0b", "\0", "\ud800", "a\udfffb\ud83d", "\ud83d\udc05", "🐅" * 3000,
    "x" * 10_000, "\0" * 10_000, "'; DROP TABLE api_keys; --", "\r\nX: y", "\u202e\ufeff", "%s {0}",
    "\\u0000", '{"a": 1}',
]  # fmt: skip
ODD_ADDRESSES = [
    *ODD_TEXTS, "10.0.0.1, 10.0.0.2", "10.0.0.1:443", "[::1]", "::1/128", "10.0.0.01", "0x7f.1",
    "fe80::1%eth0", "::ffff:10.0.0.1%eth0", "fe80::1%\0", "fe80::1%\ud800", "999.1.1.1",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("by", ["session", "own transaction", "verifier"])
async def test_texts_of_callers_are_stored_redacted(clone: Database, by: str) -> None:
    async with clone.session() as session:
        _, raw_key = await factories.api_key(session)
    callers = [{"user_agent": odd} for odd in ODD_TEXTS] + [
        {"ip_address": odd} for odd in ODD_ADDRESSES
    ]
    for who in callers:
        asked: dict[str, Any] = {"scopes": [APIKeyScope.TRADE_READ], **who}
        for tried, reason in ((raw_key, ScopeMissing), (wrong_secret(raw_key), InvalidAPIKey)):
            if by == "verifier":
                with pytest.raises(reason):
                    await KeyVerifier(clone).authorize(tried, **asked)
            else:
                own = by == "own transaction"
                info = context_without_out_of_band(clone.info) if own else clone.info
                async with clone.sessions(info=info) as session:
                    with pytest.raises(reason):
                        await api_keys.authorize_api_key(session, tried, **asked)
                    await session.commit()
        events = (await denials(clone))[-2:]
        assert [event.error_code for event in events] == ["ScopeMissing", "InvalidAPIKey"], who
        for event in events:
            assert_safe(event, who)
        async with clone.session() as session:
            assert await api_keys.verify_api_key(session, raw_key, **who)
    assert len(await denials(clone)) == 2 * len(callers)


def assert_safe(event: AuditLog, who: dict[str, str]) -> None:
    """Assert that the texts of the caller are stored, short and without unstorable characters."""
    assert event.details is not None
    name, said = next(iter(who.items()))
    if name == "user_agent":
        assert "ip_address" not in event.details
        shown: Any = event.user_agent or ""
    elif event.ip_address is not None:
        assert event.ip_address == parse_address(said.partition("%")[0])
        return
    else:
        shown = event.details["ip_address"]
    expected = said.replace("\0", "\ufffd")
    expected = "".join("?" if "\ud800" <= letter <= "\udfff" else letter for letter in expected)
    assert shown == expected[:200]


async def test_no_part_of_a_secret_is_stored(clone: Database) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session, rate_limit_per_hour=2)
        successor, rotated = await api_keys.rotate(session, key.id)
    wrong, unknown = wrong_secret(raw_key), unknown_key()
    verifier = KeyVerifier(clone)
    for tried in (raw_key, rotated, wrong, unknown, raw_key[:-1], f"{raw_key}x"):
        for _ in range(3):
            async with clone.session() as session:
                await api_keys.verify_api_key(
                    session, tried, ip_address=tried, user_agent=f"a {tried}"
                )
            await verifier.verify(tried, ip_address=f"[{tried}]", user_agent=tried)
    async with clone.session() as session:
        await api_keys.revoke(session, successor.id, reason="leaked")
        assert await api_keys.verify_api_key(session, rotated) is None
    await clone.close()  # writes the counts
    async with clone.session() as session:
        stored = await factories.everything(session)
    assert stored.count("RateLimited") >= 2
    assert stored.count("InvalidAPIKey") >= 2
    for secret in (key.rpartition("_")[2] for key in (raw_key, rotated, wrong, unknown)):
        for start in range(len(secret) - 7):
            part = secret[start : start + 8]
            for trace in (part, part.encode().hex()):
                assert trace not in stored

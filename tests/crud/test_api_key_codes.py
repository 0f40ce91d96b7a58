"""The authentication code of an API key: what it covers, and when it is renewed."""

import asyncio
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from ipaddress import ip_network
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from tests.models.examples import made
from tests.support import factories
from tests.support.contexts import change_context, changed_context
from tests.support.sql import sql
from tiger_db import (
    APIKey,
    APIKeyScope,
    APIKeyStatus,
    AsyncSession,
    AuditAction,
    Database,
    KeyVerifier,
    Settings,
    crud,
)
from tiger_db.crud.api_key_codes import (
    SIGNED_COLUMNS,
    CodeState,
    check_code,
    compute_code,
    encode_row,
    signed_values,
)
from tiger_db.crud.api_keys.authorize import FIND_KEY, KeyRow
from tiger_db.crud.api_keys.hashing import peppers_of
from tiger_db.crud.common import has_passed
from tiger_db.errors import ConfigurationError, InvalidAPIKey, InvalidState
from tiger_db.models.base import hydrate
from tiger_db.peppers import Peppers

PEPPERS = Peppers({"test": bytes(32), "old": bytes([1]) * 32})
TODAY = datetime.now(UTC).date()
OTHER_VALUES: dict[str, Any] = {
    "id": uuid4(), "root_id": uuid4(), "key_prefix": "tdb_test_other", "key_hash": "{SSHA256}x",
    "pepper_id": "old", "status": APIKeyStatus.INACTIVE, "scopes": [APIKeyScope.TRADE_READ],
    "tiger_account_id": uuid4(), "rate_limit_per_hour": 2, "rate_limit_per_day": 2,
    "allowed_ips": [ip_network("10.0.0.0/8")], "allowed_user_agents": ["claude/*"],
    "expires_at": datetime(2027, 1, 1, tzinfo=UTC),
}  # fmt: skip


def key_with(**values: Any) -> APIKey:
    return made(APIKey, pepper_id="test", **values)


async def state_of(session: AsyncSession, key_id: UUID) -> CodeState:
    key = await crud.api_keys.get(session, key_id)
    assert key is not None
    return check_code(peppers_of(session.info), signed_values(key), key.mac)


# What the code covers


def test_another_value_of_each_signed_column_has_another_code() -> None:
    values = signed_values(key_with())
    code = compute_code(PEPPERS, values)
    assert code.startswith("1:test:")
    assert check_code(PEPPERS, values, code) is CodeState.VALID
    assert OTHER_VALUES.keys() == {*SIGNED_COLUMNS}
    for name, other in OTHER_VALUES.items():
        assert check_code(PEPPERS, values | {name: other}, code) is CodeState.WRONG, name


def test_the_code_of_another_pepper_is_another_one() -> None:
    values = signed_values(key_with())
    code = compute_code(PEPPERS, values)
    others = Peppers({"test": bytes([2]) * 32})
    assert check_code(others, values, code) is CodeState.WRONG
    assert check_code(PEPPERS, values, code.replace(":test:", ":old:")) is CodeState.WRONG
    assert check_code(Peppers({"x": bytes(32)}), values, code) is CodeState.NO_PEPPER
    assert check_code(None, values, code) is CodeState.NO_PEPPER
    assert check_code(PEPPERS, values, None) is CodeState.MISSING
    for bad in ("", "1", "1:test", "2:test:" + code[7:], code[:-1], code + "0", code.upper()):
        assert check_code(PEPPERS, values, bad) in (CodeState.WRONG, CodeState.NO_PEPPER)


def test_a_code_is_no_hash_of_a_secret() -> None:
    """A code and the hash of a secret have different keys."""
    row = encode_row(signed_values(key_with()))
    assert PEPPERS.authenticate("test", row) != PEPPERS.apply("test", row.decode())


PARTS = st.none() | st.text(max_size=4) | st.lists(st.text(max_size=3), max_size=3)


@given(
    one=st.lists(PARTS, min_size=13, max_size=13), other=st.lists(PARTS, min_size=13, max_size=13)
)
def test_different_rows_have_different_encodings(one: list[Any], other: list[Any]) -> None:
    rows = [dict(zip(SIGNED_COLUMNS, values, strict=True)) for values in (one, other)]
    assert (encode_row(rows[0]) == encode_row(rows[1])) == (one == other)


def test_the_boundaries_of_values_are_covered() -> None:
    base = signed_values(key_with())
    for one, other in (
        ({"allowed_user_agents": ["a", "b"]}, {"allowed_user_agents": ["a1:b"]}),
        ({"allowed_user_agents": []}, {"allowed_user_agents": [""]}),
        ({"root_id": None, "key_prefix": "x"}, {"root_id": "x", "key_prefix": None}),
        ({"rate_limit_per_hour": 1, "rate_limit_per_day": None},
         {"rate_limit_per_hour": None, "rate_limit_per_day": 1}),
    ):  # fmt: skip
        assert encode_row(base | one) != encode_row(base | other)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"scopes": ["trade:admin", "mcp:read"], "allowed_user_agents": ["ä*", "", "a b, {}\\"]},
        {"allowed_ips": ["10.0.0.0/8", "::ffff:10.1.2.0/120", "2001:db8::/32", "::1", "::/0"]},
        {"allowed_ips": ["::10.1.2.3/128", "64:ff9b::1.2.3.4/128", "0.0.0.0/0"]},
        {"expires_at": datetime(2027, 1, 1, 1, 2, 3, 456789, tzinfo=timezone(timedelta(hours=5)))},
        {"expires_at": datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)},
        {"rate_limit_per_hour": 1, "rate_limit_per_day": 2**63 - 1},
    ],
)
async def test_the_code_is_the_same_for_an_object_and_for_a_row_however_it_was_read(
    session: AsyncSession, values: dict[str, Any]
) -> None:
    key, _ = await factories.api_key(session, **values)
    peppers, code = peppers_of(session.info), key.mac
    assert check_code(peppers, signed_values(key), code) is CodeState.VALID
    connection = await (await session.connection()).get_raw_connection()
    assert connection.driver_connection is not None
    await connection.driver_connection.execute("SET LOCAL timezone = 'Asia/Tokyo'")
    row = KeyRow.of(await connection.driver_connection.fetch(FIND_KEY, key.key_prefix))
    session.expunge(key)
    read = await crud.api_keys.get(session, key.id)
    assert read is not None
    for each in (read, hydrate(APIKey, row.values, None)):
        assert each.mac == code
        assert check_code(peppers, signed_values(each), code) is CodeState.VALID


async def test_an_infinite_expiry_has_one_code(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session)
    await session.execute(text("UPDATE api_keys SET expires_at = 'infinity'"))
    read = await crud.api_keys.get(session, key.id)
    assert read is not None
    values = signed_values(read)
    naive = values | {"expires_at": datetime.max}  # noqa: DTZ901  # as asyncpg returns it
    assert encode_row(values) == encode_row(naive)


# When a code is computed


async def test_each_function_keeps_the_code_valid(session: AsyncSession) -> None:
    account = await factories.account(session)
    key, _ = await factories.api_key(session, tiger_account_id=account.id)
    api_keys = crud.api_keys
    successor, _ = await api_keys.rotate(session, key.id)
    codes = {key.mac, successor.mac}
    assert successor.root_id == key.id
    for change in (
        api_keys.update(
            session, successor.id, scopes=[APIKeyScope.TRADE_READ], allowed_ips=["::1"]
        ),
        api_keys.update(session, successor.id, rate_limit_per_hour=1, allowed_user_agents=["a"]),
        api_keys.deactivate(session, successor.id),
        api_keys.activate(session, successor.id),
        api_keys.revoke(session, key.id),
        crud.accounts.close(session, account.id),
    ):
        await change
        for each in (key, successor):
            assert await state_of(session, each.id) is CodeState.VALID
        codes.add(successor.mac)
    assert len(codes) == 6  # activate restores the code of the row before
    assert successor.status == APIKeyStatus.REVOKED


async def test_each_change_by_the_orm_keeps_the_code_valid(session: AsyncSession) -> None:
    account = await factories.account(session)
    key = key_with(allowed_ips=["10.0.0.0/8"])
    session.add(key)
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: key.scopes.append(APIKeyScope.TRADE_READ),
        key.allowed_ips.clear,
        lambda: setattr(key, "tiger_account", account),
        lambda: setattr(key, "id", uuid4()),
        lambda: setattr(key, "expires_at", datetime.now(UTC) + timedelta(days=1)),
        lambda: key.sqlmodel_update({"mac": None, "status": "inactive"}),
    ]
    for change in changes:
        change()
        await session.flush()
        assert await state_of(session, key.id) is CodeState.VALID


async def test_a_use_and_other_columns_keep_the_code(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session)
    code = key.mac
    await crud.api_keys.authorize_api_key(session, raw_key)
    await crud.api_keys.update(session, key.id, name="x", description="y", tags={"a": 1})
    stored = await crud.api_keys.get(session, key.id)
    assert stored is not None
    assert (stored.mac, stored.usage_count) == (code, 1)


async def test_changes_of_different_columns_in_two_transactions_keep_the_code_valid(
    clone: Database,
) -> None:
    """The code covers the stored row, not the values that a session has read before."""
    async with clone.session() as session:
        key, _ = await factories.api_key(session)
    async with clone.session() as one:
        read = await crud.api_keys.get(one, key.id)
        assert read is not None
        async with clone.session() as other:
            await crud.api_keys.update(other, key.id, rate_limit_per_hour=7)
        read.rate_limit_per_day = 9
    async with clone.session() as session:
        assert await state_of(session, key.id) is CodeState.VALID
        stored = await crud.api_keys.get(session, key.id)
        assert stored is not None
        assert (stored.rate_limit_per_hour, stored.rate_limit_per_day) == (7, 9)


async def test_concurrent_changes_keep_the_code_valid(clone: Database) -> None:
    async with clone.session() as session:
        key, raw_key = await factories.api_key(session)

    async def change(number: int) -> None:
        async with clone.session() as session:
            stored = await crud.api_keys.get(session, key.id)
            assert stored is not None
            await asyncio.sleep(0)
            if number % 2:
                stored.rate_limit_per_hour = number + 1
            else:
                stored.allowed_user_agents = [f"agent/{number}", "*"]

    await asyncio.gather(*map(change, range(10)))
    await KeyVerifier(clone).authorize(raw_key, user_agent="x")
    async with clone.session() as session:
        assert await state_of(session, key.id) is CodeState.VALID


async def test_closing_an_account_keeps_codes_valid_and_signs_no_other_row(
    session: AsyncSession,
) -> None:
    account = await factories.account(session)
    keys = [(await factories.api_key(session, tiger_account_id=account.id))[0] for _ in range(3)]
    forged, unsigned, _ = [key.id for key in keys]
    change = text("UPDATE api_keys SET scopes = '{trade:admin}' WHERE id = :id")
    await session.execute(change, {"id": forged})
    await session.execute(text("UPDATE api_keys SET mac = NULL WHERE id = :id"), {"id": unsigned})
    await crud.accounts.close(session, account.id)
    states = [await state_of(session, key.id) for key in keys]
    assert states == [CodeState.WRONG, CodeState.MISSING, CodeState.VALID]
    await crud.accounts.delete(session, account.id)


async def test_without_peppers_a_row_has_no_code(session: AsyncSession) -> None:
    change_context(session, peppers=None)
    session.add(key := key_with())
    await session.flush()
    assert key.mac is None


@pytest.mark.parametrize("peppers", [None, Peppers({"new": bytes(32)})])
async def test_without_the_pepper_of_the_code_only_a_revocation_is_possible(
    session: AsyncSession, peppers: Peppers | None
) -> None:
    key_id = (await factories.api_key(session))[0].id
    change_context(session, peppers=peppers)
    for change in (crud.api_keys.deactivate, crud.api_keys.rotate):
        with pytest.raises(ConfigurationError, match="lacks the pepper 'test'"):
            async with session.begin_nested():
                await change(session, key_id)
    assert (await crud.api_keys.revoke(session, key_id)).status == APIKeyStatus.REVOKED


# Rows without a code


async def without_code(database: Database) -> tuple[APIKey, str]:
    """A key that an older release has created."""
    async with database.session() as session:
        key, raw_key = await factories.api_key(session)
        await session.execute(text("UPDATE api_keys SET mac = NULL"))
    return key, raw_key


def allowing(settings: Settings, until: date | None) -> Settings:
    return settings.model_copy(update={"api_keys_allow_unsigned_until": until})


async def in_a_session(database: Database, raw_key: str) -> object:
    async with database.session() as session:
        return await crud.api_keys.authorize_api_key(session, raw_key)


async def by_a_listening_verifier(database: Database, raw_key: str) -> object:
    async with KeyVerifier(database, memory=True) as verifier:
        await verifier.authorize(raw_key)
        assert not verifier._cache  # else the key would be accepted after the last day
        return await verifier.authorize(raw_key)


@pytest.mark.parametrize("check", [in_a_session, by_a_listening_verifier])
async def test_a_row_without_a_code_is_accepted_until_the_end_of_a_day(
    clone: Database, check: Callable[[Database, str], Any]
) -> None:
    key, raw_key = await without_code(clone)
    for until in (None, TODAY - timedelta(days=1)):
        async with Database(allowing(clone.settings, until)) as database:
            with pytest.raises(InvalidAPIKey):
                await check(database, raw_key)
            await sql(clone.settings, "UPDATE api_keys SET mac_denied_at = NULL")
    async with Database(allowing(clone.settings, TODAY)) as database:
        assert await check(database, raw_key)
        await sql(clone.settings, "UPDATE api_keys SET mac = '1:test:0'")  # a wrong code
        with pytest.raises(InvalidAPIKey):
            await check(database, raw_key)
    async with clone.session() as session:
        events = [e for e in await factories.events(session) if e.error_code]
    assert [e.error_code for e in events] == ["UnsignedRow", "UnsignedRow", "ForgedRow"]
    assert "API_KEYS_ALLOW_UNSIGNED_UNTIL is not set." in str(events[0].error_message)
    assert f"API_KEYS_ALLOW_UNSIGNED_UNTIL is {until}." in str(events[1].error_message)
    assert {e.api_key_id for e in events} == {key.id}


async def test_a_remembered_date_ends(clone: Database) -> None:
    _, raw_key = await without_code(clone)
    async with Database(allowing(clone.settings, TODAY)) as database:
        verifier = KeyVerifier(database)
        assert await verifier.authorize(raw_key)
        yesterday = TODAY - timedelta(days=1)
        database.info.update(changed_context(database.info, allow_unsigned_until=yesterday))
        with pytest.raises(InvalidAPIKey):
            await verifier.authorize(raw_key)


def test_the_day_ends_at_midnight_utc() -> None:
    last = datetime(2027, 1, 31, 23, 59, 59, 999999, tzinfo=UTC).timestamp()
    assert not has_passed(date(2027, 1, 31), last)
    assert has_passed(date(2027, 1, 31), last + 1)
    assert has_passed(None, 0)


async def test_a_change_of_a_row_without_a_code_adds_none(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session)
    await session.execute(text("UPDATE api_keys SET mac = NULL"))
    await crud.api_keys.update(session, key.id, scopes=[APIKeyScope.TRADE_READ])
    await crud.api_keys.deactivate(session, key.id)
    await crud.api_keys.activate(session, key.id)
    assert await state_of(session, key.id) is CodeState.MISSING
    with pytest.raises(InvalidState, match="run `tiger-db sign-api-keys`"):
        await crud.api_keys.rotate(session, key.id)
    assert [k.id for k in (await crud.api_keys.list_api_keys(session)).items] == [key.id]


async def test_a_new_pepper_adds_no_code_to_a_row_without_one(clone: Database) -> None:
    _, raw_key = await without_code(clone)
    async with Database(allowing(clone.settings, TODAY)) as database:
        old = peppers_of(database.info)
        both = Peppers({"new": bytes(32), "test": old._peppers["test"]})
        database.info.update(changed_context(database.info, peppers=both))
        assert await KeyVerifier(database).authorize(raw_key)
    stored = await sql(clone.settings, "SELECT coalesce(mac, 'none') || pepper_id FROM api_keys")
    assert stored == "nonenew"


@pytest.mark.parametrize("check", [in_a_session, by_a_listening_verifier])
async def test_a_new_pepper_renews_the_code_at_the_next_use(
    clone: Database, check: Callable[[Database, str], Any]
) -> None:
    async with clone.session() as session:
        _, raw_key = await factories.api_key(session)
    old = peppers_of(clone.info)
    async with Database(clone.settings) as database:
        both = Peppers({"new": bytes(32), "test": old._peppers["test"]})
        database.info.update(changed_context(database.info, peppers=both))
        await in_a_session(database, raw_key)
        only_new = Peppers({"new": bytes(32)})
        database.info.update(changed_context(database.info, peppers=only_new))
        assert await in_a_session(database, raw_key)
    assert str(await sql(clone.settings, "SELECT mac FROM api_keys")).startswith("1:new:")


# Signing


async def test_listed_rows_are_signed_on_record(session: AsyncSession) -> None:
    keys = [(await factories.api_key(session))[0] for _ in range(4)]
    await crud.api_keys.revoke(session, keys[0].id)
    await session.execute(
        text("UPDATE api_keys SET mac = NULL WHERE id <> :id"), {"id": keys[3].id}
    )
    listed = await crud.api_keys.list_unsigned(session)
    assert [key.id for key in listed] == [keys[1].id, keys[2].id]
    before = len(await factories.events(session))
    signed = await crud.api_keys.sign(session, listed)
    assert [key.id for key in signed] == [keys[1].id, keys[2].id]
    for key in keys[1:]:
        assert await state_of(session, key.id) is CodeState.VALID
    assert await state_of(session, keys[0].id) is CodeState.MISSING
    events = (await factories.events(session))[before:]
    assert [(e.action, e.api_key_id) for e in events] == [
        (AuditAction.API_KEY_SIGN, key.id) for key in signed
    ]
    assert events[0].new_values is not None
    assert events[0].new_values["scopes"] == ["mcp:read"]
    assert not {"key_hash", "pepper_id", "mac"} & events[0].new_values.keys()
    assert await crud.api_keys.sign(session, listed) == []  # signed already


async def test_a_row_that_was_changed_after_the_list_is_not_signed(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session)
    await session.execute(text("UPDATE api_keys SET mac = NULL"))
    (listed,) = await crud.api_keys.list_unsigned(session)
    session.expunge(listed)
    await session.execute(text("UPDATE api_keys SET scopes = '{trade:admin}'"))
    assert await crud.api_keys.sign(session, [listed]) == []
    assert await state_of(session, key.id) is CodeState.MISSING


async def test_a_wrong_code_is_neither_listed_nor_replaced(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session)
    await session.execute(text("UPDATE api_keys SET scopes = '{trade:admin}'"))
    assert await crud.api_keys.list_unsigned(session) == []
    stored = await crud.api_keys.get(session, key.id)
    assert stored is not None
    assert await crud.api_keys.sign(session, [stored]) == []
    assert await state_of(session, key.id) is CodeState.WRONG

"""SQL as the application's role makes no API key, and extends none: attack A3 of the red team."""

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from passlib.hash import bcrypt, ldap_salted_sha256
from sqlalchemy import event

from tests.support import factories
from tests.support.attackers import (
    DROP_READABLE_RULES,
    PATHS,
    Execute,
    Use,
    attacker,
    by_a_verifier,
    from_memory,
    in_sessions,
)
from tests.support.contexts import changed_context
from tests.support.raw_keys import unknown_key, wrong_secret
from tests.support.signing import sign_rows
from tests.support.sql import sql
from tiger_db import (
    APIKey,
    APIKeyScope,
    APIKeyStatus,
    AsyncSession,
    AuditAction,
    AuditLog,
    Database,
    KeyVerifier,
    Settings,
    crud,
)
from tiger_db.crud.api_key_codes import SIGNED_COLUMNS
from tiger_db.crud.api_keys.hashing import peppers_of
from tiger_db.crud.api_keys.signing import find_invalid_codes
from tiger_db.errors import APIKeyExpired, APIKeyRevoked, InvalidAPIKey, InvalidState
from tiger_db.models.secrets import CONTEXT

INSERT = """
INSERT INTO api_keys (id, name, key_prefix, key_hash, pepper_id, status, scopes, usage_count,
    allowed_ips, allowed_user_agents, tags, mac)
VALUES (gen_random_uuid(), 'minted', $1, $2, $3, 'active', '{system:admin,trade:admin}', 0,
    '{}', '{}', '{}', $4)
"""
CODES = {
    "no code": "NULL",
    "an empty code": "''",
    "a made-up code": "'1:test:' || repeat('0', 64)",
    "a code without a pepper": "'1::' || repeat('0', 64)",
    "a code of another format": "'0:test:' || repeat('0', 64)",
    "text beyond ASCII": "'1:test:ü'",
    "the code of another key": "(SELECT mac FROM api_keys WHERE name = 'other')",
}
# How a column of a stored key is changed in the attacker's favour.
CHANGES = {
    "id": "gen_random_uuid()",
    "root_id": "gen_random_uuid()",  # a new rotation chain has unused limits
    "pepper_id": "NULL",
    "status": "'active'",  # of a key that was deactivated
    "scopes": "'{system:admin,trade:admin}'",
    "tiger_account_id": "NULL",
    "rate_limit_per_hour": "NULL",
    "rate_limit_per_day": "1000000",
    "allowed_ips": "'{}'",
    "allowed_user_agents": "'{*}'",
    "expires_at": "now() + interval '10 years'",
}
# Values that are no list of scopes, networks or patterns.
MALFORMED = (
    "scopes = '{NULL}'", "scopes = '{{mcp:read}}'", "allowed_ips = '{NULL}'",
    "allowed_ips = '{{10.0.0.0/8}}'", "allowed_user_agents = '{NULL}'",
    "allowed_user_agents = '{{a}}'",
)  # fmt: skip
# The other signed columns belong to the secret: see test_a_taken_over_prefix_is_refused.
OF_THE_SECRET = {"key_prefix", "key_hash"}

ONE_PATH_AND_SLOW_OTHERS = [
    by_a_verifier,
    *(pytest.param(path, marks=pytest.mark.slow) for path in (in_sessions, from_memory)),
]


@pytest.fixture
async def execute(clone: Database) -> AsyncIterator[Execute]:
    async with attacker(clone.settings) as execute:
        yield execute


@pytest.fixture(params=PATHS)
async def use(request: pytest.FixtureRequest, clone: Database) -> AsyncIterator[Use]:
    """A way to use a key: in a session, by a verifier, and by a verifier with memory."""
    async with request.param(clone) as use:
        yield use


async def make_key(database: Database, **values: Any) -> tuple[APIKey, str]:
    async with database.session() as session:
        return await factories.api_key(session, **values)


async def limited_key(database: Database) -> tuple[APIKey, str]:
    async with database.session() as session:
        account = await factories.account(session)
        return await factories.api_key(
            session,
            tiger_account_id=account.id,
            rate_limit_per_hour=100,
            rate_limit_per_day=100,
            allowed_ips=["10.0.0.0/8"],
            allowed_user_agents=["claude/*"],
            expires_at=datetime.now(UTC) + timedelta(hours=1),
        )


async def denials(database: Database) -> list[AuditLog]:
    async with database.session() as session:
        events = await factories.events(session)
    return [event for event in events if event.action == AuditAction.API_KEY_DENY]


def test_a_change_of_each_signed_column_is_tried() -> None:
    assert CHANGES.keys() | OF_THE_SECRET == {*SIGNED_COLUMNS}


async def test_an_inserted_key_is_refused(
    clone: Database, execute: Execute, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash has no pepper, and the installation accepts such hashes until today."""
    await make_key(clone, name="other")
    today = datetime.now(UTC).date()
    allowing = changed_context(clone.info, allow_unpeppered_until=today)
    monkeypatch.setitem(clone.info, CONTEXT, allowing[CONTEXT])
    for code in CODES.values():
        raw_key = unknown_key()
        prefix, _, secret = raw_key.rpartition("_")
        own_hash = ldap_salted_sha256.hash(secret)
        await execute(INSERT.replace("$4", code), prefix, own_hash, None)
        with pytest.raises(InvalidAPIKey):
            await use(raw_key)


@pytest.mark.slow
async def test_an_extended_key_is_refused(clone: Database, execute: Execute, use: Use) -> None:
    for column, value in CHANGES.items():
        key, raw_key = await limited_key(clone)
        if column == "status":
            async with clone.session() as session:
                await crud.api_keys.deactivate(session, key.id)
        await execute(f"UPDATE api_keys SET {column} = {value} WHERE id = $1", key.id)
        with pytest.raises(InvalidAPIKey):
            await use(raw_key)
        await execute("DELETE FROM api_keys")


async def test_a_revoked_key_that_is_activated_again_is_refused(
    clone: Database, execute: Execute, use: Use
) -> None:
    for end in (crud.api_keys.revoke, crud.api_keys.deactivate):
        key, raw_key = await make_key(clone)
        async with clone.session() as session:
            await end(session, key.id)
        await execute("UPDATE api_keys SET status = 'active', revoked_at = NULL")
        with pytest.raises(InvalidAPIKey):
            await use(raw_key)
        await execute("DELETE FROM api_keys")


async def test_a_taken_over_prefix_is_refused(clone: Database, execute: Execute, use: Use) -> None:
    """The attacker has a key of his own, and moves its secret to a key with more rights."""
    own, own_raw = await make_key(clone)
    admin, _ = await make_key(clone, scopes=[APIKeyScope.SYSTEM_ADMIN])
    await execute("DELETE FROM api_keys WHERE id = $1", own.id)
    for change in ("key_prefix = $2", "key_hash = $3", "mac = $4"):  # one after the other
        await execute(
            f"UPDATE api_keys SET {change} WHERE id = $1"
            " AND coalesce($2::text, $3::text, $4::text) IS NOT NULL",
            admin.id, own.key_prefix, own.key_hash, own.mac,
        )  # fmt: skip
        with pytest.raises(InvalidAPIKey):
            await use(own_raw)


async def test_codes_of_two_keys_cannot_be_exchanged(
    clone: Database, execute: Execute, use: Use
) -> None:
    keys = [await make_key(clone, scopes=scopes) for scopes in (["mcp:read"], ["trade:admin"])]
    await execute(
        "UPDATE api_keys k SET mac = o.mac, scopes = o.scopes FROM api_keys o WHERE o.id <> k.id"
    )
    for _, raw_key in keys:
        with pytest.raises(InvalidAPIKey):
            await use(raw_key)


async def test_a_code_that_is_removed_or_replaced_is_refused(
    clone: Database, execute: Execute, use: Use
) -> None:
    _, raw_key = await make_key(clone)
    assert await use(raw_key)
    await make_key(clone, name="other")
    for code in CODES.values():
        await execute(f"UPDATE api_keys SET mac = {code} WHERE name <> 'other'")
        deadline = time.monotonic() + 10
        with pytest.raises(InvalidAPIKey):
            while time.monotonic() < deadline:  # the notification is on its way
                await use(raw_key)


async def test_a_key_that_is_in_use_is_refused_after_its_row_was_changed(
    clone: Database, execute: Execute, use: Use
) -> None:
    key, raw_key = await make_key(clone)
    for _ in range(3):
        assert await use(raw_key)
    await execute("UPDATE api_keys SET scopes = '{trade:admin}' WHERE id = $1", key.id)

    deadline = time.monotonic() + 10
    with pytest.raises(InvalidAPIKey):
        while time.monotonic() < deadline:
            # The notification is on its way, and the remembered key has its old scopes.
            found = await use(raw_key)
            assert isinstance(found, APIKey)
            assert found.scopes == ["mcp:read"]
    await execute("UPDATE api_keys SET scopes = '{mcp:read}' WHERE id = $1", key.id)
    assert await use(raw_key)  # the row is as the application has written it


@pytest.mark.parametrize("code", ["mac", "NULL"])
async def test_a_row_that_no_application_writes_is_refused(
    clone: Database, execute: Execute, use: Use, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """The installation accepts rows without a code until today."""
    today = datetime.now(UTC).date()
    allowing = changed_context(clone.info, allow_unsigned_until=today)
    monkeypatch.setitem(clone.info, CONTEXT, allowing[CONTEXT])
    await execute(DROP_READABLE_RULES)
    for change in MALFORMED:
        key, raw_key = await make_key(clone)
        await execute(f"UPDATE api_keys SET {change}, mac = {code} WHERE id = $1", key.id)
        with pytest.raises(InvalidAPIKey):
            await use(raw_key)
    recorded = [(denial.error_code, denial.api_key_id) for denial in await denials(clone)]
    assert len({*recorded}) == len(MALFORMED)
    assert {error for error, _ in recorded} == {"ForgedRow"}


async def test_a_malformed_row_hides_no_other_row(clone: Database, execute: Execute) -> None:
    forged, _ = await make_key(clone)
    await execute("UPDATE api_keys SET scopes = '{trade:admin}'")
    prefixes = {forged.key_prefix}
    await execute(DROP_READABLE_RULES)
    for change in MALFORMED:
        for code in ("mac", "NULL"):
            key, _ = await make_key(clone)
            await execute(f"UPDATE api_keys SET {change}, mac = {code} WHERE id = $1", key.id)
            prefixes.add(key.key_prefix)
    await make_key(clone)
    async with clone.session() as session:
        found = await find_invalid_codes(session, peppers_of(session.info))
    assert ({*found.wrong}, found.missing) == (prefixes, [])


async def test_a_malformed_row_is_never_signed(clone: Database, execute: Execute) -> None:
    await execute(DROP_READABLE_RULES)
    for change in MALFORMED:
        key, _ = await make_key(clone)
        await execute(f"UPDATE api_keys SET {change}, mac = NULL WHERE id = $1", key.id)
    async with clone.session() as session:
        assert (unsigned := await crud.api_keys.list_unsigned(session))
        assert await crud.api_keys.sign(session, unsigned) == []


async def test_sql_takes_a_key_out_of_force(clone: Database, execute: Execute, use: Use) -> None:
    for change, error in (
        ("UPDATE api_keys SET status = 'revoked'", APIKeyRevoked),
        ("UPDATE api_keys SET status = 'inactive'", APIKeyRevoked),
        ("UPDATE api_keys SET status = 'expired'", APIKeyExpired),
        ("UPDATE api_keys SET expires_at = now()", APIKeyExpired),
        ("DELETE FROM api_keys", InvalidAPIKey),
    ):
        _, raw_key = await make_key(clone)
        await execute(change)
        with pytest.raises(error) as refused:
            await use(raw_key)
        assert type(refused.value) is error
        await execute("DELETE FROM api_keys")


async def test_the_caller_cannot_tell_a_forged_row_from_an_unknown_key(
    clone: Database, execute: Execute, use: Use
) -> None:
    _, raw_key = await make_key(clone)
    told = []
    for code in ("mac", "NULL"):
        await execute(f"UPDATE api_keys SET scopes = '{{trade:admin}}', mac = {code}")
        for tried in (raw_key, wrong_secret(raw_key), unknown_key()):
            with pytest.raises(InvalidAPIKey) as refused:
                await use(tried)
            error = refused.value
            told.append((type(error), str(error), vars(error), error.__cause__))
    assert all(each == told[0] for each in told)


@pytest.mark.slow
@pytest.mark.parametrize("use", ONE_PATH_AND_SLOW_OTHERS, indirect=True)
async def test_the_denial_of_a_forged_row_is_recorded_once_an_hour(
    clone: Database, execute: Execute, use: Use
) -> None:
    """The hour is that of the database, for all processes; what SQL wrote hides no denial."""
    key, raw_key = await make_key(clone)
    await execute("UPDATE api_keys SET scopes = '{trade:admin}'")

    async def use_often() -> int:
        async with Database(clone.settings) as other, by_a_verifier(other) as use_elsewhere:
            uses = [use(raw_key) for _ in range(6)] + [use_elsewhere(raw_key) for _ in range(6)]
            refused = await asyncio.gather(*uses, return_exceptions=True)
        assert {type(error) for error in refused} == {InvalidAPIKey}
        return len(await denials(clone))

    assert await use_often() == 1
    assert await use_often() == 1
    await execute("UPDATE api_keys SET mac_denied_at = now() - interval '61 minutes'")
    assert await use_often() == 2
    await execute("UPDATE api_keys SET mac_denied_at = 'infinity'")
    assert await use_often() == 3
    for denial in await denials(clone):
        assert (denial.error_code, denial.api_key_id) == ("ForgedRow", key.id)
        assert denial.details == {"key_prefix": key.key_prefix}
        reason = "another program than tiger_db has created or changed the row"
        assert reason in str(denial.error_message)


async def test_a_held_lock_on_the_row_delays_no_denial(
    clone: Database, execute: Execute, use: Use
) -> None:
    _, raw_key = await make_key(clone)
    await execute("UPDATE api_keys SET scopes = '{trade:admin}'")
    await execute("BEGIN")
    await execute("SELECT FROM api_keys FOR UPDATE")
    async with asyncio.timeout(5):
        for _ in range(8):  # more than connections for writes out of band
            with pytest.raises(InvalidAPIKey):
                await use(raw_key)
    await execute("ROLLBACK")


# Changes of a forged row by the application


async def update(session: AsyncSession, key_id: UUID) -> None:
    await crud.api_keys.update(session, key_id, rate_limit_per_hour=5)


async def assign(session: AsyncSession, key_id: UUID) -> None:
    key = await crud.api_keys.get(session, key_id)
    assert key is not None
    key.allowed_user_agents.append("curl/*")


async def activate_again(session: AsyncSession, key_id: UUID) -> None:
    await crud.api_keys.deactivate(session, key_id)
    await crud.api_keys.activate(session, key_id)


async def rotate(session: AsyncSession, key_id: UUID) -> None:
    await crud.api_keys.rotate(session, key_id)


@pytest.mark.parametrize("change", [update, assign, activate_again, rotate])
async def test_a_change_by_the_application_signs_no_forged_row(
    clone: Database, execute: Execute, change: Callable[[AsyncSession, UUID], Awaitable[None]]
) -> None:
    key, raw_key = await make_key(clone)
    await execute("UPDATE api_keys SET scopes = '{trade:admin}'")
    with pytest.raises(InvalidState, match="does not match its authentication code"):
        async with clone.session() as session:
            await change(session, key.id)
    async with clone.session() as session:
        (stored,) = (await crud.api_keys.list_api_keys(session)).items
    assert (stored.mac, stored.status) == (key.mac, APIKeyStatus.ACTIVE)
    async with by_a_verifier(clone) as use:
        with pytest.raises(InvalidAPIKey):
            await use(raw_key)


async def test_an_object_that_was_loaded_before_the_attack_signs_no_forged_row(
    clone: Database, execute: Execute
) -> None:
    key, raw_key = await make_key(clone)
    with pytest.raises(InvalidState):
        async with clone.session() as session:
            loaded = await crud.api_keys.get(session, key.id)
            assert loaded is not None
            await execute("UPDATE api_keys SET scopes = '{trade:admin}'")
            loaded.rate_limit_per_hour = 5
    async with by_a_verifier(clone) as use:
        with pytest.raises(InvalidAPIKey):
            await use(raw_key)


async def test_other_columns_of_a_forged_row_can_be_changed_and_sign_nothing(
    clone: Database, execute: Execute
) -> None:
    key, raw_key = await make_key(clone)
    await execute("UPDATE api_keys SET scopes = '{trade:admin}'")
    async with clone.session() as session:
        await crud.api_keys.update(session, key.id, name="forged", tags={"a": 1})
    async with by_a_verifier(clone) as use:
        with pytest.raises(InvalidAPIKey):
            await use(raw_key)


async def test_a_forged_row_can_be_revoked_deactivated_and_deleted(
    clone: Database, execute: Execute
) -> None:
    for end in (crud.api_keys.deactivate, crud.api_keys.revoke, crud.api_keys.delete):
        key, raw_key = await make_key(clone)
        await execute("UPDATE api_keys SET scopes = '{trade:admin}'")
        async with clone.session() as session:
            await end(session, key.id)
        async with by_a_verifier(clone) as use:
            with pytest.raises((APIKeyRevoked, InvalidAPIKey)):
                await use(raw_key)
        await execute("UPDATE api_keys SET status = 'active'")
        async with by_a_verifier(clone) as use:
            with pytest.raises(InvalidAPIKey):
                await use(raw_key)
        await execute("DELETE FROM api_keys")


@pytest.mark.slow
async def test_the_new_hash_of_a_used_key_covers_no_later_change(clone: Database) -> None:
    """The attacker changes the row between the check of a key and the replacement of its hash."""
    _, raw_key = await make_key(clone)
    values = clone.settings.model_dump()
    old = clone.settings.api_key_peppers
    assert old is not None
    values["api_key_peppers"] = f"new:{b64encode(bytes(32)).decode()},{old.get_secret_value()}"
    async with Database(Settings(**values)) as database, attacker(clone.settings) as execute:
        engine = database.out_of_band.engine.sync_engine
        checked_in = asyncio.Event()
        event.listen(engine, "checkin", lambda *_: checked_in.set())
        await execute("UPDATE api_keys SET key_hash = $1", await slow_hash(database, raw_key))
        async with database.session() as session:
            await sign_rows(session)
        checked_in.clear()
        using = asyncio.create_task(KeyVerifier(database).authorize(raw_key))
        await checked_in.wait()  # the row was read, and its slow hash is verified in a thread
        await execute("UPDATE api_keys SET scopes = '{trade:admin}'")
        await using
        async with by_a_verifier(database) as use:
            with pytest.raises(InvalidAPIKey):
                await use(raw_key)


async def slow_hash(database: Database, raw_key: str) -> str:
    secret = peppers_of(database.info).apply("test", raw_key.rpartition("_")[2])
    hashed: str = await asyncio.to_thread(bcrypt.using(rounds=10).hash, secret)
    return hashed


# What remains: see SECURITY.md


async def test_a_whole_earlier_row_is_accepted(clone: Database, execute: Execute, use: Use) -> None:
    """A limit that SECURITY.md states: the code says that the application wrote this row once."""
    key, raw_key = await make_key(clone)
    kept = await sql(clone.settings, "SELECT to_jsonb(k)::text FROM api_keys AS k")
    async with clone.session() as session:
        await crud.api_keys.revoke(session, key.id)
    with pytest.raises(APIKeyRevoked):
        await use(raw_key)
    await execute("DELETE FROM api_keys")
    await execute("INSERT INTO api_keys SELECT (jsonb_populate_record(NULL::api_keys, $1)).*", kept)
    assert await use(raw_key)

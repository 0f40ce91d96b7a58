"""Encryption of secrets: only their key decrypts them, and only in their row and column."""

import base64
import copy
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Table, insert, select, text, update
from sqlalchemy.exc import StatementError

from tests.support import factories
from tests.support.contexts import changed_context
from tests.support.encryption_keys import (
    AAD,
    K1,
    K2,
    ONLY_K2,
    RING,
    SECRETS,
    secret_account,
    values_of,
)
from tests.support.factories import new_account, plain
from tiger_db import TigerAccount, crud
from tiger_db.database import AsyncSession
from tiger_db.encryption import (
    EncryptedSecret,
    EncryptedType,
    KeyRing,
    Secret,
    decrypt,
    encrypt,
    fingerprint,
    generate_key,
    key_id_of,
)
from tiger_db.errors import ConfigurationError, EncryptionError, InvalidValue
from tiger_db.redaction import MASK

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


@given(secret=UNICODE, aad=UNICODE)
@example(secret="x" * 100_000, aad=AAD)
def test_any_text_is_decrypted_unchanged(secret: str, aad: str) -> None:
    assert decrypt(RING, encrypt(RING, secret, aad), aad) == secret


def test_two_ciphertexts_of_a_text_are_never_equal() -> None:
    assert len({encrypt(RING, "text", AAD) for _ in range(100)}) == 100


def test_a_ciphertext_begins_with_version_and_key_id() -> None:
    ciphertext = encrypt(RING, "text", AAD)
    assert ciphertext[:4] == b"\x02\x02k1"
    assert key_id_of(ciphertext) == "k1"
    assert len(ciphertext) == 4 + 12 + len("text") + 16


@given(secret=UNICODE, position=st.integers(0), change=st.integers(1, 255))
def test_a_changed_byte_is_an_error_and_never_another_text(
    secret: str, position: int, change: int
) -> None:
    ciphertext = bytearray(encrypt(RING, secret, AAD))
    ciphertext[position % len(ciphertext)] ^= change
    with pytest.raises(EncryptionError):
        decrypt(RING, bytes(ciphertext), AAD)


def test_a_change_of_any_single_byte_is_an_error() -> None:
    ciphertext = encrypt(RING, "text", AAD)
    for position in range(len(ciphertext)):
        for changed in (
            ciphertext[:position] + bytes([ciphertext[position] ^ 1]) + ciphertext[position + 1 :],
            ciphertext[:position] + ciphertext[position + 1 :],
            ciphertext[:position],
        ):
            with pytest.raises(EncryptionError):
                decrypt(RING, changed, AAD)


@given(st.binary(max_size=80) | st.binary(max_size=60).map(lambda rest: b"\x01\x02k1" + rest))
def test_other_bytes_than_a_ciphertext_are_an_error(garbage: bytes) -> None:
    with pytest.raises(EncryptionError):
        decrypt(RING, garbage, AAD)


@given(one=UNICODE, other=UNICODE)
@example(one="t.a:1", other="t.a:12")
def test_a_ciphertext_does_not_decrypt_with_other_associated_data(one: str, other: str) -> None:
    assume(one != other)
    with pytest.raises(EncryptionError):
        decrypt(RING, encrypt(RING, "text", one), other)


def test_another_key_with_the_same_id_decrypts_nothing() -> None:
    other = KeyRing({"k1": bytes(32)})
    with pytest.raises(EncryptionError, match="a different key that has the same id 'k1'"):
        decrypt(other, encrypt(RING, "text", AAD), AAD)


def test_the_error_names_a_missing_key() -> None:
    with pytest.raises(EncryptionError, match="key 'k1' is not configured") as caught:
        decrypt(KeyRing({"k2": bytes(32)}), encrypt(RING, "text", AAD), AAD)
    assert AAD in str(caught.value)


def test_the_first_key_encrypts_and_every_key_decrypts() -> None:
    old = KeyRing({"k1": bytes(32)})
    both = KeyRing({"k2": bytes(range(32)), "k1": bytes(32)})
    assert both.key_ids == ("k2", "k1")
    assert decrypt(both, encrypt(old, "text", AAD), AAD) == "text"
    assert key_id_of(encrypt(both, "text", AAD)) == "k2"


def test_fingerprints_depend_on_text_column_and_key() -> None:
    other = KeyRing({"k1": bytes(32)})
    found = [
        fingerprint(RING, "k1", "a", "t.a"),
        fingerprint(RING, "k1", "b", "t.a"),
        fingerprint(RING, "k1", "a", "t.b"),
        fingerprint(RING, "k1", "", "t.aa"),
        fingerprint(other, "k1", "a", "t.a"),
    ]
    assert len({*found}) == len(found)
    assert fingerprint(RING, "k1", "a", "t.a") == found[0]


# The ring's text


def encoded(key: bytes) -> str:
    return base64.b64encode(key).decode()


KEY = encoded(bytes(range(100, 132)))


def test_a_key_ring_is_parsed_from_text() -> None:
    ring = KeyRing.parse(f" k1:{KEY} , old.key_2-x:{encoded(bytes(32))}\n")
    assert (ring.key_ids[0], ring.key_ids) == ("k1", ("k1", "old.key_2-x"))
    assert KeyRing.parse(generate_key("k9")).key_ids == ("k9",)
    assert generate_key() != generate_key()


@pytest.mark.parametrize("separator", [",", " , ", "\n", "\r\n", ",\n", "\n\n  ", " "], ids=repr)
@pytest.mark.parametrize("padding", ["=", ""])
@pytest.mark.parametrize("encode", [base64.standard_b64encode, base64.urlsafe_b64encode])
def test_keys_in_both_alphabets_are_separated_by_commas_or_lines(
    separator: str, padding: str, encode: Callable[[bytes], bytes]
) -> None:
    keys = {"k-1": b"\xff" * 32, "k_2": b"\xfb\xef\xbe" * 10 + b"xy"}
    items = [f"{name}:{encode(key).decode().rstrip('=')}{padding}" for name, key in keys.items()]
    expected = KeyRing(keys)
    ring = KeyRing.parse(separator.join([*items, ""]))
    assert ring.key_ids == expected.key_ids
    for name in keys:
        assert ring.decrypt(name, expected.encrypt(name, b"secret", b""), b"") == b"secret"


@pytest.mark.parametrize(
    "bad",
    [
        "",
        ",",
        KEY,
        f"{KEY}:k1",
        f":{KEY}",
        f"k 1:{KEY}",
        f"{'k' * 33}:{KEY}",
        f"ключ:{KEY}",
        f"k1:{KEY},k1:{KEY}",
        f"k1:{KEY};k2:{KEY}",
        f"k1:{KEY[:-4]}",
        f"k1:{KEY}{KEY}",
        f"k1:{KEY[:20]}\n{KEY[20:]}",
        f"k1:{KEY[:20]}é{KEY[20:]}",
        f"k1:{bytes(range(100, 132)).hex()}",
        f"k1:{encoded(bytes(range(100, 131)))}",
        f"k1:{encoded(bytes(range(100, 133)))}",
        "k1:",
    ],
)
def test_the_error_of_a_malformed_key_ring_shows_no_key(bad: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        KeyRing.parse(bad)
    shown = "".join(traceback.format_exception(caught.value))
    for part in bad.replace(",", ":").split(":"):
        assert len(part) < 8 or part[:8] not in shown
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_other_text_is_an_error(anything: str) -> None:
    with pytest.raises(ConfigurationError):
        KeyRing.parse(anything)


@pytest.mark.parametrize("bad", ["", "k 1", "k" * 33, "k:1", "ключ"])
def test_no_key_is_generated_with_an_invalid_id(bad: str) -> None:
    with pytest.raises(InvalidValue, match="a key id must be"):
        generate_key(bad)


def test_a_key_ring_shows_only_ids() -> None:
    ring = KeyRing.parse(f"k1:{KEY}")
    assert (repr(ring), str(ring)) == ("KeyRing(k1)", "KeyRing(k1)")


# In the database


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(secret=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example(secret="\0")
async def test_any_secret_is_stored_and_read(session: AsyncSession, secret: str) -> None:
    account = await secret_account(session, private_key=secret)
    session.expunge_all()
    read = await crud.accounts.get(session, account.id)
    assert read is not None
    assert values_of(read) == SECRETS | {"private_key": secret}


async def test_a_stored_row_has_no_plain_text(session: AsyncSession) -> None:
    account = await secret_account(session)
    row = (await session.execute(text("SELECT * FROM tiger_accounts"))).mappings().one()
    for name, secret in SECRETS.items():
        assert isinstance(row[name], bytes)
        assert key_id_of(row[name]) == "test"
        assert secret not in str(dict(row))
        assert secret.encode() not in b"".join(v for v in row.values() if isinstance(v, bytes))
    dump = await session.scalar(text("SELECT tiger_accounts::text FROM tiger_accounts"))
    for secret in SECRETS.values():
        assert secret.encode().hex() not in dump
    assert plain(account.private_key) == SECRETS["private_key"]


SWAPS = {
    "rows": "UPDATE tiger_accounts AS a SET private_key = b.private_key"
    " FROM tiger_accounts AS b WHERE a.id <> b.id",
    "columns": "UPDATE tiger_accounts SET private_key = secret_key, secret_key = private_key",
    "ids": "UPDATE tiger_accounts SET id = gen_random_uuid()",
    "a byte": "UPDATE tiger_accounts"
    " SET private_key = set_byte(private_key, 20, get_byte(private_key, 20) # 1)",
    "everything": "UPDATE tiger_accounts SET private_key = 'plain text'",
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
async def test_a_ciphertext_in_another_row_or_column_does_not_decrypt(
    session: AsyncSession, swap: str
) -> None:
    for _ in range(2):
        await secret_account(session)
    session.expunge_all()
    await session.execute(text(swap))
    for account in (await session.scalars(select(TigerAccount))).all():
        with pytest.raises(EncryptionError, match=f"tiger_accounts.private_key:{account.id}"):
            plain(account.private_key)
        assert account.model_dump(mode="json")["private_key"] == MASK  # shown without a key


async def test_a_row_with_a_new_id_keeps_its_secrets(session: AsyncSession) -> None:
    account = await secret_account(session)
    account.id = new_account().id
    await session.flush()
    session.expunge_all()
    assert values_of((await session.scalars(select(TigerAccount))).one()) == SECRETS


async def test_a_secret_of_another_row_is_encrypted_again(session: AsyncSession) -> None:
    one = await secret_account(session)
    other = await factories.account(session, secret_key=one.private_key)
    other.access_token = one.access_token
    await session.flush()
    session.expunge_all()
    read = await crud.accounts.get(session, other.id)
    assert read is not None
    assert read.secret_key is not None
    assert read.access_token is not None
    assert read.secret_key.get_secret_value() == SECRETS["private_key"]
    assert read.access_token.get_secret_value() == SECRETS["access_token"]


async def test_a_secret_loaded_without_its_row_does_not_decrypt(session: AsyncSession) -> None:
    await secret_account(session)
    secret = (await session.scalars(select(TigerAccount.__table__.c.private_key))).one()  # type: ignore[attr-defined]
    assert SECRETS["private_key"] not in repr(secret)
    with pytest.raises(EncryptionError, match="load the whole entity"):
        secret.get_secret_value()


@pytest.mark.parametrize("value", ["plain-secret", Secret("plain-secret"), b"plain-secret"])
@pytest.mark.parametrize("statement", [insert, update])
async def test_a_plain_text_is_refused_by_the_column(
    session: AsyncSession, statement: Callable[[Table], Any], value: object
) -> None:
    with pytest.raises(StatementError, match="stored only as part of an entity") as caught:
        table = TigerAccount.__table__  # type: ignore[attr-defined]
        await session.execute(statement(table).values(private_key=value))
    assert "plain-secret" not in "".join(traceback.format_exception(caught.value))


def test_the_column_type_shows_nothing_in_a_migration() -> None:
    assert repr(EncryptedType(fingerprint="x")) in {
        "EncryptedType()",
        "EncryptedType(fingerprint='x')",
    }


async def test_without_keys_nothing_is_stored(session: AsyncSession) -> None:
    session.info.update(changed_context(session.info, key_provider=None))
    with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS is not set"):
        await secret_account(session)
    with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS is not set"):
        await crud.accounts.list_by_tiger_id(session, "1")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
async def test_a_copy_of_a_stored_secret_is_readable(
    session: AsyncSession, copied: Callable[[Any], Any]
) -> None:
    values = copied((await secret_account(session)).model_dump())
    assert {name: values[name].get_secret_value() for name in SECRETS} == SECRETS


# Rotation


async def rotated(session: AsyncSession) -> tuple[TigerAccount, TigerAccount]:
    """Create two accounts with one tiger_id, before and after a key rotation."""
    session.info.update(changed_context(session.info, key_provider=K1))
    old = await secret_account(session)
    session.info.update(changed_context(session.info, key_provider=K2))
    new = await secret_account(session)
    session.expunge_all()
    return old, new


async def test_both_keys_decrypt_and_the_new_key_encrypts(session: AsyncSession) -> None:
    old, new = await rotated(session)
    for row, key_id in ((old, "k1"), (new, "k2")):
        read = await crud.accounts.get(session, row.id)
        assert read is not None
        assert isinstance(read.private_key, EncryptedSecret)
        assert read.private_key.key_id == key_id
        assert values_of(read) == SECRETS
    read = await crud.accounts.update(session, old.id, private_key="newer")
    assert isinstance(read.private_key, EncryptedSecret)
    assert isinstance(read.secret_key, EncryptedSecret)
    assert (read.private_key.key_id, read.secret_key.key_id) == ("k2", "k1")


async def test_an_account_is_found_by_tiger_id_under_either_key(session: AsyncSession) -> None:
    old, new = await rotated(session)
    found = await crud.accounts.list_by_tiger_id(session, SECRETS["tiger_id"])
    assert [account.id for account in found] == [old.id, new.id]
    assert await crud.accounts.list_by_tiger_id(session, "another") == []


async def test_a_changed_tiger_id_is_found_by_the_new_one_only(session: AsyncSession) -> None:
    account = await secret_account(session)
    await crud.accounts.update(session, account.id, tiger_id="another")
    assert await crud.accounts.list_by_tiger_id(session, SECRETS["tiger_id"]) == []
    (found,) = await crud.accounts.list_by_tiger_id(session, "another")
    assert found.id == account.id


async def test_a_missing_key_affects_only_its_own_secrets(session: AsyncSession) -> None:
    old, _ = await rotated(session)
    session.info.update(changed_context(session.info, key_provider=ONLY_K2))
    read = await crud.accounts.update(session, old.id, account_name="Other", access_token="new")
    with pytest.raises(EncryptionError, match="key 'k1' is not configured"):
        plain(read.private_key)
    assert read.access_token is not None
    assert read.access_token.get_secret_value() == "new"
    session.expunge_all()
    session.info.update(changed_context(session.info, key_provider=K2))
    again = await crud.accounts.get(session, old.id)
    assert again is not None
    assert values_of(again) == SECRETS | {"access_token": "new"}

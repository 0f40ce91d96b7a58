"""A key management service (KMS) as key provider, and the number of its calls."""

import hashlib
import hmac
import os
from collections import Counter

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from sqlalchemy import text

from tests.support import factories
from tests.support.encryption_keys import K1, SECRETS, values_of
from tests.support.factories import plain
from tiger_db import Database, Settings, crud, encryption_key_rotation
from tiger_db.encryption import EncryptedSecret, KeyProvider, KeyRing
from tiger_db.errors import EncryptionError


class KMS:
    """A key management service that returns no keys and counts its calls."""

    def __init__(self, *key_ids: str) -> None:
        self.key_ids = key_ids
        self.reachable = True
        self.calls: Counter[str] = Counter()

    def encrypt(self, key_id: str, data: bytes, aad: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + self._cipher(key_id, "encrypt").encrypt(nonce, data, aad)

    def decrypt(self, key_id: str, ciphertext: bytes, aad: bytes) -> bytes:
        try:
            return self._cipher(key_id, "decrypt").decrypt(ciphertext[:12], ciphertext[12:], aad)
        except (InvalidTag, ValueError):
            raise EncryptionError from None

    def fingerprint(self, key_id: str, data: bytes) -> bytes:
        self.calls["fingerprint"] += 1
        return hmac.digest(self._key(key_id, "fingerprint"), data, hashlib.sha256)

    def _cipher(self, key_id: str, call: str) -> ChaCha20Poly1305:
        self.calls[call] += 1
        if not self.reachable:
            raise ConnectionError("the KMS is out of reach")
        return ChaCha20Poly1305(self._key(key_id, "encryption"))

    def _key(self, key_id: str, purpose: str) -> bytes:
        return hashlib.sha256(f"{purpose} {key_id}".encode()).digest()


class Moving(KMS):
    """A KMS that can also decrypt with a key ring, for a migration."""

    def __init__(self, key_id: str, ring: KeyRing) -> None:
        super().__init__(key_id, *ring.key_ids)
        self.ring = ring

    def decrypt(self, key_id: str, ciphertext: bytes, aad: bytes) -> bytes:
        before: KeyProvider = self.ring if key_id in self.ring.key_ids else KMS(key_id)
        return before.decrypt(key_id, ciphertext, aad)

    def fingerprint(self, key_id: str, data: bytes) -> bytes:
        before: KeyProvider = self.ring if key_id in self.ring.key_ids else KMS(key_id)
        return before.fingerprint(key_id, data)


def with_keys(clone_settings: Settings, provider: KeyProvider) -> Database:
    without = clone_settings.model_copy(update={"encryption_keys": None})
    return Database(without, key_provider=provider)


async def test_a_kms_replaces_the_key_ring(clone_settings: Settings) -> None:
    kms = KMS("kms-2026")
    async with with_keys(clone_settings, kms) as database:
        async with database.session() as session:
            account = await factories.account(session, **SECRETS)
        async with database.session() as session:
            (found,) = await crud.accounts.list_by_tiger_id(session, SECRETS["tiger_id"])
            assert found.id == account.id
            assert values_of(found) == SECRETS
            assert isinstance(found.private_key, EncryptedSecret)
            assert found.private_key.key_id == "kms-2026"
            await session.execute(text("UPDATE tiger_accounts SET secret_key = private_key"))
        async with database.session() as session:
            swapped = await crud.accounts.get(session, account.id)
            assert swapped is not None
            with pytest.raises(EncryptionError, match=r"tiger_accounts\.secret_key"):
                plain(swapped.secret_key)


async def test_an_unreachable_kms_is_not_reported_as_a_wrong_key(clone_settings: Settings) -> None:
    kms = KMS("kms")
    async with with_keys(clone_settings, kms) as database:
        async with database.session() as session:
            account = await factories.account(session, **SECRETS)
        kms.reachable = False
        async with database.session() as session:
            found = await crud.accounts.get(session, account.id)
            assert found is not None
            with pytest.raises(ConnectionError):
                plain(found.private_key)


async def test_secrets_move_from_a_ring_to_a_kms(clone_settings: Settings) -> None:
    async with with_keys(clone_settings, K1) as database, database.session() as session:
        account = await factories.account(session, **SECRETS)
    async with with_keys(clone_settings, Moving("kms", K1)) as database:
        report = await encryption_key_rotation.rotate(database)
    assert (report.rotated, report.stuck, report.retirable) == (1, 0, ["k1"])
    async with with_keys(clone_settings, KMS("kms")) as database, database.session() as session:
        (found,) = await crud.accounts.list_by_tiger_id(session, SECRETS["tiger_id"])
        assert found.id == account.id
        assert values_of(found) == SECRETS


@pytest.mark.slow
async def test_listing_a_thousand_accounts_decrypts_nothing(clone_settings: Settings) -> None:
    kms = KMS("kms")
    async with with_keys(clone_settings, kms) as database:
        async with database.session() as session:
            session.add_all([factories.new_account(**SECRETS) for _ in range(1000)])
        kms.calls.clear()
        async with database.session() as session:
            page = await crud.accounts.list_accounts(session, limit=1000)
            shown = repr(page.items) + "".join(a.model_dump_json() for a in page)
        assert len(page) == 1000
        assert all(secret not in shown for secret in SECRETS.values())
        assert not kms.calls
        assert plain(page.items[0].private_key) == SECRETS["private_key"]
        assert kms.calls == {"decrypt": 1}

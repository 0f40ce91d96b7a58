"""Key rings, and an account whose secrets are known."""

import base64
from typing import Any

from pydantic import SecretStr
from sqlalchemy import text as sql_text

from tests.support import factories
from tiger_db import Settings, TigerAccount
from tiger_db.database import AsyncSession
from tiger_db.encryption import KeyProvider, KeyRing, ciphertext_header, encrypt, fingerprint
from tiger_db.models.secrets import bound_text, key_provider

AAD = "tiger_accounts.private_key:01890a5d-ac96-774b-bcce-b302099a8057"
RING = KeyRing({"k1": bytes(range(32))})
# Five secrets, none of which is a part of another.
SECRETS: dict[str, Any] = {
    name: f"plain-{name}-of-nobody"
    for name in ("tiger_id", "private_key", "secret_key", "access_token", "refresh_token")
}


async def secret_account(session: AsyncSession, **overrides: Any) -> TigerAccount:
    return await factories.account(session, **SECRETS | overrides)


async def store_old_tiger_id(session: AsyncSession, account: TigerAccount, text: str) -> None:
    """Store a Tiger id as an older release did: without normalization."""
    provider = key_provider(session.sync_session)
    assert provider is not None
    values = {
        "id": account.id,
        "tiger_id": encrypt(
            provider, text, f"tiger_accounts.tiger_id:{account.id}", bound_of(account)
        ),
        "mark": fingerprint(provider, provider.key_ids[0], text, "tiger_accounts.tiger_id"),
    }
    await session.execute(
        sql_text(
            "UPDATE tiger_accounts SET tiger_id = :tiger_id, tiger_id_fingerprint = :mark"
            " WHERE id = :id"
        ),
        values,
    )


def bound_of(account: TigerAccount) -> str:
    """Return the values to which the secrets of an account are bound."""
    bound = bound_text(TigerAccount, vars(account))
    assert bound is not None
    return bound


def without_mark(settings: Settings) -> Settings:
    """Return settings with which ciphertexts of version 1 can be read."""
    assert settings.encryption_keys is not None
    unmarked = settings.encryption_keys.get_secret_value().removesuffix(":v2")
    return settings.model_copy(update={"encryption_keys": SecretStr(unmarked)})


async def store_unbound(
    session: AsyncSession, account: TigerAccount, provider: KeyProvider | None
) -> None:
    """Store the secrets of an account as an earlier release did, with ciphertexts of version 1."""
    assert provider is not None
    for name, text in values_of(account).items():
        aad, header = (
            f"tiger_accounts.{name}:{account.id}",
            ciphertext_header(provider.key_ids[0], 1),
        )
        ciphertext = header + provider.encrypt(
            provider.key_ids[0], text.encode(), header + aad.encode()
        )
        statement = sql_text(f"UPDATE tiger_accounts SET {name} = :new WHERE id = :id")
        await session.execute(statement, {"new": ciphertext, "id": account.id})
    await session.refresh(account)


def values_of(account: TigerAccount) -> dict[str, str]:
    secrets = {name: getattr(account, name) for name in SECRETS}
    return {name: secret.get_secret_value() for name, secret in secrets.items() if secret}


K1, K2 = KeyRing({"k1": bytes(32)}), KeyRing({"k2": bytes(range(32)), "k1": bytes(32)})
ONLY_K2 = KeyRing({"k2": bytes(range(32))})
OTHER_KEY = f"other:{base64.b64encode(bytes(32)).decode()}"

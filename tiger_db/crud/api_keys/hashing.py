"""Salted hashes of the secrets of API keys, over an HMAC with a server-side pepper."""

import asyncio
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from passlib.context import CryptContext

from tiger_db.crud.common import context_of
from tiger_db.errors import ConfigurationError, InvalidAPIKey
from tiger_db.peppers import Peppers

# One salted SHA-256 is enough for 256 random bits: NIST SP 800-63B, 5.1.2.2, requires key
# stretching only for secrets of less than 112 bits. Imported keys may have a slow hash.
_FAST = "ldap_salted_sha256"
_hashes = CryptContext(schemes=[_FAST, "argon2", "bcrypt"], deprecated=["argon2", "bcrypt"])
_MAX_HASH_CHARACTERS = 512  # a longer hash could demand a costly Argon2


class UnpepperedHash(InvalidAPIKey):
    """The reason in the audit event. Callers get a plain `InvalidAPIKey`."""


def peppers_of(info: Mapping[Any, object]) -> Peppers:
    """Return the peppers in the `info` of a session or a Database.

    Raises:
        ConfigurationError: API_KEY_PEPPERS is not set, or the session has no Database.
    """
    peppers = context_of(info).peppers
    if peppers is None:
        raise ConfigurationError("API_KEY_PEPPERS is not set, so no API key can be made or checked")
    return peppers


def hash_secret(peppers: Peppers, secret: str) -> tuple[str, str]:
    """Return a hash with the first pepper, and the id of the pepper."""
    pepper_id = peppers.key_ids[0]
    hashed: str = _hashes.hash(peppers.apply(pepper_id, secret))
    return hashed, pepper_id


async def verify_secret(peppers: Peppers, secret: str, hashed: str, pepper_id: str | None) -> bool:
    """Return whether a hash belongs to a secret. Without a pepper id, no pepper is applied.

    If the hash is empty or malformed or its pepper is unknown, the secret is verified against a
    dummy hash, so that unknown keys take equal time. Slow hashes are verified in a thread.
    """
    known = pepper_id is None or pepper_id in peppers.key_ids
    scheme = _hashes.identify(hashed) if len(hashed) <= _MAX_HASH_CHARACTERS else None
    applied = peppers.apply(pepper_id if pepper_id and known else peppers.key_ids[0], secret)
    if scheme is None or not known:
        _verify(applied, _dummy_hash())
        return False
    text = secret if pepper_id is None else applied
    if scheme == _FAST:
        return _verify(text, hashed)
    return await asyncio.to_thread(_verify, text, hashed)


def refuse_unpeppered(info: Mapping[Any, object], pepper_id: str | None, now: float) -> None:
    """Refuse a hash without a pepper: anyone who can write to the database can make one.

    `info` is that of a session or a Database; `now` is the database's time in seconds since 1970.

    Raises:
        UnpepperedHash: API_KEYS_ALLOW_UNPEPPERED_UNTIL is not set, or that day (UTC) is over.
    """
    if pepper_id is not None:
        return
    until = context_of(info).allow_unpeppered_until
    if until is not None and datetime.fromtimestamp(now, UTC).date() <= until:
        return
    setting = f"is {until}" if until is not None else "is not set"
    raise UnpepperedHash(
        "the key is right, but its hash has no pepper, so anyone who can write to the database may"
        " have made it: rotate or revoke the key"
        f" (API_KEYS_ALLOW_UNPEPPERED_UNTIL {setting})"
    )


def outdated(peppers: Peppers, hashed: str, pepper_id: str | None) -> bool:
    """Return whether a verified hash should be replaced: a slow scheme, or not the first pepper."""
    return pepper_id != peppers.key_ids[0] or bool(_hashes.needs_update(hashed))


def _verify(text: str, hashed: str) -> bool:
    try:
        return bool(_hashes.verify(text, hashed))
    except (ValueError, TypeError):  # malformed
        return False


@cache
def _dummy_hash() -> str:
    hashed: str = _hashes.hash(secrets.token_hex(32))
    return hashed

"""Functions that hash the secrets of API keys with a pepper and a salt."""

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

# One salted SHA-256 is enough for a secret of 256 random bits. NIST SP 800-63B, section 5.1.2.2,
# requires key stretching only for secrets of less than 112 bits. Imported API keys can have a slow
# hash (Argon2 or bcrypt).
_FAST = "ldap_salted_sha256"
_hashes = CryptContext(schemes=[_FAST, "argon2", "bcrypt"], deprecated=["argon2", "bcrypt"])
_MAX_HASH_CHARACTERS = 512  # the verification of a longer Argon2 hash can take too long


class UnpepperedHash(InvalidAPIKey):
    """The hash of the API key has no pepper.

    Public functions raise `InvalidAPIKey` instead of `UnpepperedHash`.
    """


def peppers_of(info: Mapping[Any, object]) -> Peppers:
    """Return the peppers from the attribute `info` of a session or a Database.

    Raises:
        ConfigurationError: API_KEY_PEPPERS is not set, or `info` does not belong to a Database.
    """
    peppers = context_of(info).peppers
    if peppers is None:
        raise ConfigurationError("API_KEY_PEPPERS is not set, but API keys need a pepper")
    return peppers


def hash_secret(peppers: Peppers, secret: str) -> tuple[str, str]:
    """Hash a secret with the first pepper. Return the hash and the pepper's id."""
    pepper_id = peppers.key_ids[0]
    hashed: str = _hashes.hash(peppers.apply(pepper_id, secret))
    return hashed, pepper_id


async def verify_secret(peppers: Peppers, secret: str, hashed: str, pepper_id: str | None) -> bool:
    """Return whether a secret matches a hash. If `pepper_id` is None, the hash has no pepper.

    If the hash is empty or malformed, or the pepper is unknown, the secret is verified against a
    dummy hash. The dummy hash prevents that response times reveal which API keys exist. Slow hashes
    are verified in a thread, so that the event loop is not blocked.
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
    """Refuse a hash without a pepper after the date in API_KEYS_ALLOW_UNPEPPERED_UNTIL.

    A hash without a pepper is unsafe, because anyone who can write to the database can create one.
    `info` is `AsyncSession.info` or `Database.info`. `now` is the database's time in seconds since
    1970.

    Raises:
        UnpepperedHash: the hash of the API key has no pepper, and API_KEYS_ALLOW_UNPEPPERED_UNTIL
            is not set or is a past day (UTC).
    """
    if pepper_id is not None:
        return
    until = context_of(info).allow_unpeppered_until
    if until is not None and datetime.fromtimestamp(now, UTC).date() <= until:
        return
    setting = f"is {until}" if until is not None else "is not set"
    raise UnpepperedHash(
        "the hash of the API key has no pepper, and API_KEYS_ALLOW_UNPEPPERED_UNTIL"
        f" {setting}. Anyone who can write to the database may have created the API key. Rotate or"
        " revoke the API key"
    )


def outdated(peppers: Peppers, hashed: str, pepper_id: str | None) -> bool:
    """Return whether a hash uses a slow algorithm, or a pepper that is not the first pepper."""
    return pepper_id != peppers.key_ids[0] or bool(_hashes.needs_update(hashed))


def _verify(text: str, hashed: str) -> bool:
    try:
        return bool(_hashes.verify(text, hashed))
    except (ValueError, TypeError):  # the hash is malformed
        return False


@cache
def _dummy_hash() -> str:
    hashed: str = _hashes.hash(secrets.token_hex(32))
    return hashed

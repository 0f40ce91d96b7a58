"""How the secrets of keys are stored: a salted hash of what a server-side pepper makes of them."""

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

# One salted SHA-256 is enough for 256 random bits, which no dictionary holds: NIST SP 800-63B,
# 5.1.2.2, asks for stretching only where a secret has less than 112 bits. The slow schemes are
# those of keys that come from elsewhere.
_FAST = "ldap_salted_sha256"
_hashes = CryptContext(schemes=[_FAST, "argon2", "bcrypt"], deprecated=["argon2", "bcrypt"])
_LONGEST = 512  # characters of a hash; argon2 takes its cost, and so our time, from it


class UnpepperedHash(InvalidAPIKey):
    """The reason in the audit trail; the caller gets a plain `InvalidAPIKey`."""


def peppers_of(info: Mapping[Any, object]) -> Peppers:
    """Return the peppers in the `info` of a session or a Database.

    Raises:
        ConfigurationError: API_KEY_PEPPERS is not set, or the session was not made for a Database.
    """
    peppers = context_of(info).peppers
    if peppers is None:
        raise ConfigurationError("API_KEY_PEPPERS is not set, so no API key can be made or checked")
    return peppers


def hash_secret(peppers: Peppers, secret: str) -> tuple[str, str]:
    """A hash under the first pepper, and the pepper's id."""
    pepper_id = peppers.ids[0]
    hashed: str = _hashes.hash(peppers.apply(pepper_id, secret))
    return hashed, pepper_id


async def verify_secret(peppers: Peppers, secret: str, hashed: str, pepper_id: str | None) -> bool:
    """Whether a hash is that of the secret; an empty hash is nobody's, and takes as long.

    A hash without a pepper is of the secret itself. Slow ones do not keep the event loop waiting.
    """
    known = pepper_id is None or pepper_id in peppers.ids
    scheme = _hashes.identify(hashed) if len(hashed) <= _LONGEST else None
    applied = peppers.apply(pepper_id if pepper_id and known else peppers.ids[0], secret)
    if scheme is None or not known:
        _verify(applied, _no_hash())
        return False
    text = secret if pepper_id is None else applied
    if scheme == _FAST:
        return _verify(text, hashed)
    return await asyncio.to_thread(_verify, text, hashed)


def refuse_unpeppered(info: Mapping[Any, object], pepper_id: str | None, now: float) -> None:
    """Refuse a hash without a pepper, because whoever can write to the database can make one.

    `info` is a session's, `now` the database's time in seconds since 1970.

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
        "the key is right, but its hash has no pepper, so that anyone who can write to the database"
        " may have made it: rotate or revoke the key"
        f" (API_KEYS_ALLOW_UNPEPPERED_UNTIL {setting})"
    )


def outdated(peppers: Peppers, hashed: str, pepper_id: str | None) -> bool:
    """Whether a hash that verified should be made anew: by a slow scheme, or an older pepper."""
    return pepper_id != peppers.ids[0] or bool(_hashes.needs_update(hashed))


def _verify(text: str, hashed: str) -> bool:
    try:
        return bool(_hashes.verify(text, hashed))
    except (ValueError, TypeError):  # a damaged hash is nobody's
        return False


@cache
def _no_hash() -> str:
    hashed: str = _hashes.hash(secrets.token_hex(32))
    return hashed

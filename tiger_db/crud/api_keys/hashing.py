"""Functions that hash the secrets of API keys with a pepper and a salt."""

import asyncio
import secrets
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from tiger_db.crud.common import context_of, has_passed
from tiger_db.errors import ConfigurationError, InvalidAPIKey
from tiger_db.peppers import Peppers
from tiger_db.tracebacks import forgets_locals

if TYPE_CHECKING:
    from passlib.context import CryptContext

# One salted SHA-256 is enough for a secret of 256 random bits. NIST SP 800-63B, section 5.1.2.2,
# requires key stretching only for secrets of less than 112 bits. Imported API keys can have a slow
# hash (Argon2 or bcrypt).
_FAST = "ldap_salted_sha256"
# The stored hash determines the cost of its verification, so the cost is limited before the
# verification. The limits permit the parameters that OWASP and the common libraries recommend, and
# about half a second of work.
_MAX_HASH_CHARACTERS = 512
_MAX_ARGON2_MEMORY_KIB = 2**18  # m: 256 MiB
_MAX_ARGON2_ROUNDS = 16  # t
_MAX_ARGON2_LANES = 16  # p
_MAX_ARGON2_WORK_KIB = 2**19  # m times t
_MAX_BCRYPT_ROUNDS = 14


@cache
def hash_context() -> "CryptContext":
    """Return the object of passlib that hashes and verifies secrets."""
    from passlib.context import CryptContext  # noqa: PLC0415  # slow import

    return CryptContext(schemes=[_FAST, "argon2", "bcrypt"], deprecated=["argon2", "bcrypt"])


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
        raise ConfigurationError(
            "API_KEY_PEPPERS is not set: set it to the peppers of this database, or for a new one,"
            " make a pepper with `tiger-db generate-api-key-pepper`"
        )
    return peppers


@forgets_locals
def hash_secret(peppers: Peppers, secret: str) -> tuple[str, str]:
    """Hash a secret with the first pepper. Return the hash and the pepper's id."""
    pepper_id = peppers.key_ids[0]
    hashed: str = hash_context().hash(peppers.apply(pepper_id, secret))
    return hashed, pepper_id


@forgets_locals
async def verify_secret(peppers: Peppers, secret: str, hashed: str, pepper_id: str | None) -> bool:
    """Return whether a secret matches a hash. If `pepper_id` is None, the hash has no pepper.

    If the hash is empty, malformed or too costly, or the pepper is unknown, the secret is verified
    against a dummy hash. The dummy hash prevents that response times reveal which API keys exist.
    Slow hashes are verified in a thread, so that the event loop is not blocked.
    """
    known = pepper_id is None or pepper_id in peppers.key_ids
    scheme = _affordable_scheme(hashed)
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
    if not has_passed(until, now):
        return
    setting = f"is {until}" if until is not None else "is not set"
    raise UnpepperedHash(
        "the hash of the API key has no pepper, and API_KEYS_ALLOW_UNPEPPERED_UNTIL"
        f" {setting}. Anyone who can write to the database may have created the API key. Rotate or"
        " revoke the API key"
    )


def outdated(peppers: Peppers, hashed: str, pepper_id: str | None) -> bool:
    """Return whether a hash uses a slow algorithm, or a pepper that is not the first pepper."""
    return pepper_id != peppers.key_ids[0] or bool(hash_context().needs_update(hashed))


def _affordable_scheme(hashed: str) -> str | None:
    """Return the scheme of a hash, or None if the hash is malformed or costs too much to verify."""
    if len(hashed) > _MAX_HASH_CHARACTERS:
        return None
    scheme: str | None = hash_context().identify(hashed)
    try:
        if scheme == "argon2":
            from passlib.hash import argon2  # noqa: PLC0415  # slow import

            cost = argon2.from_string(hashed)
            affordable = (
                cost.memory_cost <= _MAX_ARGON2_MEMORY_KIB
                and cost.rounds <= _MAX_ARGON2_ROUNDS
                and cost.parallelism <= _MAX_ARGON2_LANES
                and cost.memory_cost * cost.rounds <= _MAX_ARGON2_WORK_KIB
            )
        elif scheme == "bcrypt":
            from passlib.hash import bcrypt  # noqa: PLC0415  # slow import

            affordable = bcrypt.from_string(hashed).rounds <= _MAX_BCRYPT_ROUNDS
        else:
            affordable = True
    except (ValueError, TypeError):  # the hash is malformed
        return None
    return scheme if affordable else None


def _verify(text: str, hashed: str) -> bool:
    try:
        return bool(hash_context().verify(text, hashed))
    except (ValueError, TypeError):  # the hash is malformed
        return False


@cache
def _dummy_hash() -> str:
    hashed: str = hash_context().hash(secrets.token_hex(32))
    return hashed

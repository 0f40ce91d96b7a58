"""The message authentication code (MAC) of an API key's row, in the column `mac`.

The code proves that a process with the pepper has written the row. Without the pepper, plain SQL
can neither create an API key nor extend the permissions of an API key. A code has the form
`format:pepper id:HMAC-SHA256 in hexadecimal`.
"""

import hmac
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any
from uuid import UUID

from tiger_db.crud.common import context_of, has_passed
from tiger_db.errors import ConfigurationError, InvalidAPIKey, InvalidState
from tiger_db.models import APIKey, APIKeyStatus
from tiger_db.models.secrets import CONTEXT
from tiger_db.peppers import Peppers

# The code covers these columns in this order. Other columns, such as the counts of uses, can change
# without a new code. A change of SIGNED_COLUMNS or `_encode` needs a new FORMAT.
SIGNED_COLUMNS = (
    "id", "root_id", "key_prefix", "key_hash", "pepper_id", "status", "scopes", "tiger_account_id",
    "rate_limit_per_hour", "rate_limit_per_day", "allowed_ips", "allowed_user_agents", "expires_at",
)  # fmt: skip
FORMAT = "1"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_ADVICE = "Revoke or delete the API key, and create a new one"


class UnsignedRow(InvalidAPIKey):
    """The row of the API key has no authentication code.

    Public functions raise `InvalidAPIKey` instead of `UnsignedRow`.
    """


class ForgedRow(InvalidAPIKey):
    """The row of the API key has a wrong authentication code.

    Public functions raise `InvalidAPIKey` instead of `ForgedRow`.
    """


class CodeState(Enum):
    """The result of the check of a row's authentication code."""

    VALID = auto()
    MISSING = auto()
    WRONG = auto()
    NO_PEPPER = auto()  # the pepper of the code is not configured


def signed_values(key: APIKey) -> dict[str, Any]:
    """Return the values of an API key that its code covers."""
    return {name: getattr(key, name) for name in SIGNED_COLUMNS}


def compute_code(peppers: Peppers, values: Mapping[str, Any]) -> str:
    """Compute the code of a row whose signed columns have the given values.

    The pepper of the code is the pepper of the hash, so that both are replaced together. If the
    hash has no pepper, or the hash's pepper is not configured, the code has the first pepper.
    """
    pepper_id = values["pepper_id"]
    if pepper_id not in peppers.key_ids:
        pepper_id = peppers.key_ids[0]
    return f"{FORMAT}:{pepper_id}:{peppers.authenticate(pepper_id, encode_row(values))}"


def check_code(peppers: Peppers | None, values: Mapping[str, Any], code: str | None) -> CodeState:
    """Compare the code of a row with the values of the row's signed columns.

    If a code cannot cover the values, every code of the row is wrong, and also a missing code.
    """
    try:
        encoded = encode_row(values)
    except ValueError:
        return CodeState.WRONG
    if code is None:
        return CodeState.MISSING
    format_, _, rest = code.partition(":")
    pepper_id, _, digest = rest.partition(":")
    if format_ != FORMAT:
        return CodeState.WRONG
    if peppers is None or pepper_id not in peppers.key_ids:
        return CodeState.NO_PEPPER
    expected = peppers.authenticate(pepper_id, encoded)
    equal = hmac.compare_digest(expected.encode(), digest.encode())
    return CodeState.VALID if equal else CodeState.WRONG


def check_stored_code(peppers: Peppers | None, columns: Mapping[str, Any]) -> CodeState:
    """Check the code of a row as it is stored, before the row is hydrated.

    `columns` contains the signed columns and `mac` as asyncpg returns them, with lists as text[].
    """
    try:
        networks = [ip_network(network) for network in columns["allowed_ips"]]
    except (TypeError, ValueError):  # TypeError: the column is null, without its NOT NULL
        return CodeState.WRONG
    return check_code(peppers, {**columns, "allowed_ips": networks}, columns["mac"])


def optional_peppers(info: Mapping[Any, object]) -> Peppers | None:
    """Return the peppers in the `info` of a session, or None if there are no peppers."""
    return context_of(info).peppers if CONTEXT in info else None


def renewed_code(
    peppers: Peppers | None, old: Mapping[str, Any], new: Mapping[str, Any]
) -> str | None:
    """Return the code of a row after a change of signed columns.

    `old` and `new` are the values of the signed columns and of `mac` before and after the change.
    A new code is computed only if the old code is valid, so that a change by tiger_db never makes a
    forged row valid. A row without a code stays without a code. A row with a wrong code keeps it,
    and can only be changed to a status in which the API key is refused.

    Raises:
        InvalidState: the old code is wrong, and the API key would be active.
        ConfigurationError: the pepper of the old code is not configured, and the API key would not
            be revoked.
    """
    code: str | None = old["mac"]
    state = check_code(peppers, old, code)
    if state is CodeState.VALID:
        assert peppers is not None
        return compute_code(peppers, new)
    if state is CodeState.WRONG and new["status"] == APIKeyStatus.ACTIVE:
        raise InvalidState(_problem(state, old))
    if state is CodeState.NO_PEPPER and new["status"] != APIKeyStatus.REVOKED:
        raise ConfigurationError(_problem(state, old))
    return code


def require_valid_code(info: Mapping[Any, object], key: APIKey) -> None:
    """Check that the code of an API key is valid, before its permissions are copied.

    Raises:
        InvalidState: the API key has a wrong code or no code.
        ConfigurationError: the pepper of the code is not configured.
    """
    state = check_code(context_of(info).peppers, signed_values(key), key.mac)
    if state is CodeState.NO_PEPPER:
        raise ConfigurationError(_problem(state, {"mac": key.mac}))
    if state is not CodeState.VALID:
        raise InvalidState(_problem(state, {"mac": key.mac}))


def refuse_unauthentic(info: Mapping[Any, object], state: CodeState, now: float) -> None:
    """Refuse a row without a valid code. `now` is the database's time in seconds since 1970.

    Raises:
        UnsignedRow: the row has no code, and API_KEYS_ALLOW_UNSIGNED_UNTIL is not set or is a past
            day (UTC).
        ForgedRow: the code is wrong, or its pepper is not configured.
    """
    if state is CodeState.NO_PEPPER:
        raise ForgedRow(
            "API_KEY_PEPPERS lacks the pepper of the authentication code of the API key"
        )
    if state is CodeState.WRONG:
        raise ForgedRow(
            "the row of the API key does not match its authentication code, because another program"
            f" than tiger_db has created or changed the row. {_ADVICE}"
        )
    until = context_of(info).allow_unsigned_until
    if state is CodeState.MISSING and has_passed(until, now):
        setting = f"is {until}" if until is not None else "is not set"
        raise UnsignedRow(
            "the row of the API key has no authentication code, and API_KEYS_ALLOW_UNSIGNED_UNTIL"
            f" {setting}. Anyone who can write to the database may have created the API key. Run"
            " `tiger-db sign-api-keys`, or revoke the API key"
        )


def _problem(state: CodeState, values: Mapping[str, Any]) -> str:
    match state:
        case CodeState.MISSING:
            return "the row of the API key has no authentication code: run `tiger-db sign-api-keys`"
        case CodeState.NO_PEPPER:
            pepper_id = str(values["mac"]).split(":")[1]
            return (
                "the authentication code of the API key cannot be checked, because API_KEY_PEPPERS"
                f" lacks the pepper {pepper_id!r}"
            )
    return (
        "the row of the API key does not match its authentication code, because another program"
        f" than tiger_db has changed the row. {_ADVICE}"
    )


def encode_row(values: Mapping[str, Any]) -> bytes:
    """Encode the signed columns of a row. Rows with different values have different encodings.

    Raises:
        ValueError: a list contains null or a list, which only another program can have stored.
    """
    return b"".join([_encode(values[name]) for name in SIGNED_COLUMNS])


def _encode(value: object) -> bytes:
    """Encode a value so that different values, or rows of values, never have equal encodings.

    The encoding is `-` for None, or else `length:text`, and for a list `[number of items:` and the
    items. The text does not depend on the version of Python, or on the source of the value.
    """
    match value:
        case None:
            return b"-"
        case list():
            if any(item is None or isinstance(item, list) for item in value):
                raise ValueError("a code cannot cover a list with null or with lists")
            return b"[%d:%b" % (len(value), b"".join(map(_encode, value)))
        case datetime():
            # asyncpg returns PostgreSQL's infinity as a naive datetime.
            aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            text = b"%d" % ((aware - _EPOCH) // _MICROSECOND)
        case IPv4Network() | IPv6Network():
            text = b"%b/%d" % (value.network_address.packed.hex().encode(), value.prefixlen)
        case str() | UUID() | int():
            text = (value if isinstance(value, str) else str(value)).encode()
        case _:
            raise TypeError(f"a code cannot cover a {type(value).__name__}")
    return b"%d:%b" % (len(text), text)

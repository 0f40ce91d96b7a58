"""The secret keys that a process uses, from the settings or the embedded server's folder."""

import os
import re
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from tiger_db.encryption import KeyRing, generate_encryption_key, generate_key
from tiger_db.errors import ConfigurationError
from tiger_db.peppers import Peppers
from tiger_db.redaction import add_known_secrets
from tiger_db.settings import Settings
from tiger_db.signing import generate_signing_key, parse_signing_key
from tiger_db.tracebacks import forgets_locals

T = TypeVar("T")


class KeySetting(NamedTuple, Generic[T]):
    """A setting that contains secret keys, and the file of the same name in the home folder."""

    field: str
    parse: Callable[[str], T]
    generate: Callable[[], str]
    command: str  # command that prints a new key

    @property
    def advice(self) -> str:
        """Advice for a user if no secret keys of this setting are configured."""
        return (
            f"set {self.field.upper()} to its earlier value, or, in a new installation, to the"
            f" output of `tiger-db {self.command}`"
        )


ENCRYPTION_KEYS = KeySetting(
    "encryption_keys", KeyRing.parse, generate_encryption_key, "generate-encryption-key"
)
API_KEY_PEPPERS = KeySetting(
    "api_key_peppers", Peppers.parse, generate_key, "generate-api-key-pepper"
)
AUDIT_SIGNING_KEY = KeySetting(
    "audit_signing_key", parse_signing_key, generate_signing_key, "generate-audit-signing-key"
)


@forgets_locals
def configured(settings: Settings, keys: KeySetting[T]) -> T | None:
    """Return the keys in a setting, or in the file that the setting `…_FILE` names, or None.

    Raises:
        ConfigurationError: the secret keys are malformed, unreadable, or missing in production.
    """
    name = keys.field.upper()
    value, file = getattr(settings, keys.field), getattr(settings, f"{keys.field}_file")
    if value is not None and file is not None:
        raise ConfigurationError(f"set {name} or {name}_FILE, but not both")
    if value is not None:
        return _parse(keys, value.get_secret_value(), f"{name}: %s")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "the file is not UTF-8 text"
            raise ConfigurationError(f"{name}_FILE cannot be read: {reason}") from None
        return _parse(keys, text, f"{name}_FILE: %s")
    if settings.production and keys is not AUDIT_SIGNING_KEY:  # the signing key is optional
        raise ConfigurationError(
            f"{name} or {name}_FILE is required when ENVIRONMENT=production: {keys.advice}"
        )
    return None


@forgets_locals
def in_force(settings: Settings, keys: KeySetting[T], *, generate: bool = True) -> T | None:
    """Return the configured keys, or else the keys in the embedded server's folder, or None.

    If `generate` is true, `in_force` generates missing keys of the embedded server. Call `in_force`
    in a thread, because `in_force` blocks the event loop.

    Raises:
        ConfigurationError: the embedded server's key file is malformed, or the configured keys are
            malformed, unreadable, or missing in production.
        EmbeddedError: the embedded server's key file cannot be read or written.
    """
    found = configured(settings, keys)
    if found is not None or not settings.embedded:
        return found
    from tiger_db import embedded  # noqa: PLC0415  # `embedded` needs POSIX and an extra

    path = embedded.home_folder(settings) / keys.field
    if not generate and not os.path.lexists(path):
        return None
    text = embedded.load_or_create_secret(settings, keys.field, keys.generate)
    return _parse(keys, text, f"{path}: %s: restore this file")


def required_key_ring(settings: Settings) -> KeyRing:
    """Return the encryption keys that this process uses.

    Call `required_key_ring` in a thread, because `required_key_ring` blocks the event loop.

    Raises:
        ConfigurationError: the encryption keys are missing, malformed or unreadable.
    """
    if ring := in_force(settings, ENCRYPTION_KEYS, generate=False):
        return ring
    raise ConfigurationError(
        "the embedded server has no encryption key yet: run `tiger-db init`"
        if settings.embedded
        else f"ENCRYPTION_KEYS is not set, so accounts cannot be stored: {ENCRYPTION_KEYS.advice}"
    )


def required_peppers(settings: Settings) -> Peppers | None:
    """Return the peppers that this process uses, or None if the embedded server has no pepper yet.

    Call `required_peppers` in a thread, because `required_peppers` blocks the event loop.

    Raises:
        ConfigurationError: the peppers are missing, malformed or unreadable.
    """
    peppers = in_force(settings, API_KEY_PEPPERS, generate=False)
    if peppers is None and not settings.embedded:
        raise ConfigurationError(
            "API_KEY_PEPPERS is not set, so API keys cannot be created or checked:"
            f" {API_KEY_PEPPERS.advice}"
        )
    return peppers


def _parse(keys: KeySetting[T], text: str, message: str) -> T:
    """Parse secret keys. Afterwards, `redact_known` masks the keys in every text."""
    add_known_secrets(
        *(re.sub("^[^:]*:|:v2$", "", item).rstrip("=") for item in re.split(r"[,\s]+", text))
    )
    try:
        return keys.parse(text)
    except ConfigurationError as error:
        raise ConfigurationError(message % error) from None

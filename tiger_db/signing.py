"""Ed25519 keys (RFC 8032) that sign the seals of the audit trail."""

import base64
import secrets

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tiger_db.encryption import decode_base64
from tiger_db.errors import ConfigurationError, InvalidValue
from tiger_db.tracebacks import forgets_locals

_SEED_BYTES = 32


def generate_signing_key() -> str:
    """Return a new random key in the format of `AUDIT_SIGNING_KEY`."""
    return base64.b64encode(secrets.token_bytes(_SEED_BYTES)).decode()


@forgets_locals
def parse_signing_key(text: str) -> Ed25519PrivateKey:
    """Parse the value of `AUDIT_SIGNING_KEY`, which is base64 of a 32-byte seed.

    Raises:
        ConfigurationError: the text is not base64 of 32 bytes.
    """
    try:
        return Ed25519PrivateKey.from_private_bytes(decode_base64(text.strip()))
    except ValueError:
        raise ConfigurationError("the signing key must be base64 of 32 bytes") from None


def public_text(key: Ed25519PublicKey) -> str:
    """Return an Ed25519 public key as base64 of the 32 key bytes."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def public_pem(key: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415  # slow import
        Encoding,
        PublicFormat,
    )

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def parse_public_key(text: str) -> Ed25519PublicKey:
    """Parse a public key in PEM format, or base64 of the 32 key bytes.

    Raises:
        InvalidValue: the text is not a public key in one of these formats, or the key is not an
            Ed25519 key.
    """
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415  # slow import
        load_pem_public_key,
    )

    try:
        if "-----BEGIN" not in text:
            raw = decode_base64(text.strip())
            return Ed25519PublicKey.from_public_bytes(raw)
        key = load_pem_public_key(text.encode())
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidValue("the text is not an Ed25519 public key in PEM or base64 of 32 bytes")
    return key

"""The key that signs the seals of the audit trail: Ed25519 (RFC 8032)."""

import base64
import secrets

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from tiger_db.errors import ConfigurationError, InvalidValue

_SEED = 32  # bytes


def generate_signing_key() -> str:
    """A new random key, as `AUDIT_SIGNING_KEY` takes it."""
    return base64.b64encode(secrets.token_bytes(_SEED)).decode()


def parse_signing_key(text: str) -> Ed25519PrivateKey:
    """The key in `AUDIT_SIGNING_KEY`: base64 of a seed of 32 bytes.

    Raises:
        ConfigurationError: it is something else.
    """
    try:
        return Ed25519PrivateKey.from_private_bytes(base64.b64decode(text, validate=True))
    except ValueError:
        raise ConfigurationError("must be base64 of 32 bytes") from None


def public_text(key: Ed25519PublicKey) -> str:
    """A public key as base64 of its 32 bytes."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def public_pem(key: Ed25519PublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def parse_public_key(text: str) -> Ed25519PublicKey:
    """A public key in PEM, or as base64 of its 32 bytes.

    Raises:
        InvalidValue: it is something else.
    """
    try:
        if "-----BEGIN" not in text:
            raw = base64.b64decode(text.strip(), validate=True)
            return Ed25519PublicKey.from_public_bytes(raw)
        key = load_pem_public_key(text.encode())
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidValue("not an Ed25519 public key, in PEM or as base64 of its 32 bytes")
    return key

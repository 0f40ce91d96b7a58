"""RSA private keys, in the forms that people and Tiger's SDKs have them."""

import base64
import re

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicNumbers
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tiger_db.errors import InvalidValue
from tiger_db.models import PrivateKeyFormat

_FORMATS = {
    PrivateKeyFormat.PK1: PrivateFormat.TraditionalOpenSSL,
    PrivateKeyFormat.PK8: PrivateFormat.PKCS8,
}
# PEM labels, of which each stands for one format only (RFC 7468, 10; RFC 8017, A.1.2).
_LABELS = {
    "PRIVATE KEY": PrivateKeyFormat.PK8,
    "RSA PRIVATE KEY": PrivateKeyFormat.PK1,
}
_PEM = re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----(.*?)-----END \1-----", re.DOTALL)


def parse_private_key(text: str) -> tuple[str, PrivateKeyFormat]:
    """Read an RSA private key as people have it: base64 DER or PEM, PKCS#1 or PKCS#8.

    Returns Tiger's form of it, base64 DER in one line, and the format, which is told by the content
    whatever the PEM label says.

    Raises:
        InvalidValue: it is anything else; the message shows nothing of it.
    """
    key, key_format = load_private_key(text)
    return base64_der(key, key_format), key_format


def load_private_key(text: str) -> tuple[RSAPrivateKey, PrivateKeyFormat]:
    """As `parse_private_key`, with the key itself."""
    pem = _PEM.search(text)
    body = "".join((pem[2] if pem else text).replace("\\n", "\n").split())
    if pem and ("ENCRYPTED" in pem[1] or ",ENCRYPTED" in body):
        raise InvalidValue("the private key is protected by a passphrase: remove it first")
    if not body:
        raise InvalidValue("the private key is empty")
    for label, key_format in _LABELS.items():
        try:
            key = load_pem_private_key(
                f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n".encode("ascii"), None
            )
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
        if not isinstance(key, RSAPrivateKey):
            raise InvalidValue("the private key is not an RSA key, which Tiger needs")
        return key, key_format
    raise InvalidValue("the private key is not RSA in PEM or base64 DER (PKCS#1 or PKCS#8)")


def base64_der(key: RSAPrivateKey, key_format: PrivateKeyFormat) -> str:
    """Tiger's form of a key: base64 DER in one line."""
    der = key.private_bytes(Encoding.DER, _FORMATS[key_format], NoEncryption())
    return base64.b64encode(der).decode("ascii")


def public_numbers(private_key: str) -> RSAPublicNumbers:
    """What a key has in all its forms, and no other key has.

    Raises:
        InvalidValue: it is not an RSA private key.
    """
    return load_private_key(private_key)[0].public_key().public_numbers()

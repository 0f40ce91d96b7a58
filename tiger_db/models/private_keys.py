"""Functions that parse and encode RSA private keys in the formats PKCS#1 and PKCS#8."""

import base64
import re
from enum import StrEnum
from typing import TYPE_CHECKING

from tiger_db.errors import InvalidValue
from tiger_db.public import public

if TYPE_CHECKING:  # slow import
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicNumbers


class PrivateKeyFormat(StrEnum):
    """The format of a private key. Tiger's name PK1 means PKCS#1, and PK8 means PKCS#8."""

    PK1 = "PK1"
    PK8 = "PK8"
    UNKNOWN = "unknown"


# The formats of private keys, by PEM label (RFC 7468, section 10; RFC 8017, appendix A.1.2).
_PEM_LABELS = {
    "PRIVATE KEY": PrivateKeyFormat.PK8,
    "RSA PRIVATE KEY": PrivateKeyFormat.PK1,
}
_PEM_BEGIN = "-----BEGIN ([A-Z ]*PRIVATE KEY)-----"
MAX_KEY_CHARACTERS = 20_000  # an RSA key of 16,384 bits in PEM has about 13,000 characters
TOO_LONG = f"a private key must have at most {MAX_KEY_CHARACTERS:,} characters"


@public
def parse_private_key(text: str) -> tuple[str, PrivateKeyFormat]:
    """Parse an RSA private key in PEM or base64 DER, PKCS#1 or PKCS#8.

    Return two values: the key as one line of base64 DER, as in Tiger's files, and the key's format.
    The format is detected from the content of the key, because PEM labels can be wrong.

    Raises:
        InvalidValue: the text is not an RSA private key, or has more than 20,000 characters. The
            error message does not show the text.
    """
    key, key_format = load_private_key(text)
    return base64_der(key, key_format), key_format


def load_private_key(
    text: str, *, check_numbers: bool = True
) -> "tuple[RSAPrivateKey, PrivateKeyFormat]":
    """Parse an RSA private key. Return the key as an object, and the format of the key.

    With `check_numbers`, parsing a key of 4,096 bits takes up to one second.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415  # slow import
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    if len(text) > MAX_KEY_CHARACTERS:
        raise InvalidValue(TOO_LONG)
    label, body = _pem_block(text) or ("", text)
    body = "".join(body.replace("\\n", "\n").split())
    if label and ("ENCRYPTED" in label or ",ENCRYPTED" in body):
        raise InvalidValue(
            "the private key is protected by a passphrase: remove the passphrase first"
        )
    if not body:
        raise InvalidValue("the private key is empty")
    for label, key_format in _PEM_LABELS.items():
        try:
            key = load_pem_private_key(
                f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n".encode("ascii"),
                None,
                unsafe_skip_rsa_key_validation=not check_numbers,
            )
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
        if not isinstance(key, RSAPrivateKey):
            raise InvalidValue("the private key is not an RSA key, but Tiger needs an RSA key")
        return key, key_format
    raise InvalidValue(
        "the private key is not an RSA key in PEM or base64 DER format (PKCS#1 or PKCS#8)"
    )


def _pem_block(text: str) -> tuple[str, str] | None:
    """Return the label and the content of the first private key in PEM, or None."""
    begin = re.search(_PEM_BEGIN, text)
    end = -1 if begin is None else text.find(f"-----END {begin[1]}-----", begin.end())
    return None if begin is None or end < 0 else (begin[1], text[begin.end() : end])


def key_bits(text: str) -> int | None:
    """Return the size of an RSA private key in bits, or None if the text is not an RSA key."""
    try:
        return load_private_key(text, check_numbers=False)[0].key_size
    except InvalidValue:
        return None


def base64_der(key: "RSAPrivateKey", key_format: PrivateKeyFormat) -> str:
    """Encode a private key as base64 DER in one line."""
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415  # slow import
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    formats = {
        PrivateKeyFormat.PK1: PrivateFormat.TraditionalOpenSSL,
        PrivateKeyFormat.PK8: PrivateFormat.PKCS8,
    }
    der = key.private_bytes(Encoding.DER, formats[key_format], NoEncryption())
    return base64.b64encode(der).decode("ascii")


def public_numbers(private_key: str) -> "RSAPublicNumbers":
    """Return the public numbers of a private key, for comparisons of keys in different formats.

    Raises:
        InvalidValue: the text is not an RSA private key.
    """
    return load_private_key(private_key)[0].public_key().public_numbers()

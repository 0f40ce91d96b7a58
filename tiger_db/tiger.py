"""What Tiger's Open API expects of the values that are stored here."""

import base64
import re

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from tiger_db.errors import InvalidValue
from tiger_db.models import PrivateKeyFormat

# By PEM label, of which each stands for one format only (RFC 7468, 10; RFC 8017, A.1.2).
_FORMATS = {
    "PRIVATE KEY": (PrivateKeyFormat.PK8, PrivateFormat.PKCS8),
    "RSA PRIVATE KEY": (PrivateKeyFormat.PK1, PrivateFormat.TraditionalOpenSSL),
}
_PEM = re.compile(r"-----BEGIN ([A-Z ]*PRIVATE KEY)-----(.*?)-----END \1-----", re.DOTALL)


def parse_private_key(text: str) -> tuple[str, PrivateKeyFormat]:
    """Read an RSA private key as people have it: base64 DER or PEM, PKCS#1 or PKCS#8.

    Returns Tiger's form of it, base64 DER in one line, and the format, which is told by the content
    whatever the PEM label says.

    Raises:
        InvalidValue: it is anything else; the message shows nothing of it.
    """
    pem = _PEM.search(text)
    body = "".join((pem[2] if pem else text).replace("\\n", "\n").split())
    if pem and ("ENCRYPTED" in pem[1] or ",ENCRYPTED" in body):
        raise InvalidValue("the private key is protected by a passphrase: remove it first")
    if not body:
        raise InvalidValue("the private key is empty")
    for label, (name, form) in _FORMATS.items():
        try:
            key = load_pem_private_key(
                f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n".encode("ascii"), None
            )
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
        if not isinstance(key, RSAPrivateKey):
            raise InvalidValue("the private key is not an RSA key, which Tiger needs")
        der = key.private_bytes(Encoding.DER, form, NoEncryption())
        return base64.b64encode(der).decode("ascii"), name
    raise InvalidValue("the private key is not RSA in PEM or base64 DER (PKCS#1 or PKCS#8)")

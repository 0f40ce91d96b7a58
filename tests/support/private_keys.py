"""RSA keys, made here, in the forms that people have."""

import base64
import subprocess

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from tiger_db import PrivateKeyFormat

SHORT_BITS = 1016
KEY = rsa.generate_private_key(65537, 1024)
FORMS = {
    PrivateKeyFormat.PK1: PrivateFormat.TraditionalOpenSSL,
    PrivateKeyFormat.PK8: PrivateFormat.PKCS8,
}
NO_PASSWORD = NoEncryption()


def der(form: PrivateKeyFormat) -> str:
    """Tiger's form: base64 DER in one line."""
    return base64.b64encode(KEY.private_bytes(Encoding.DER, FORMS[form], NO_PASSWORD)).decode()


def pem(form: PrivateKeyFormat, encryption: KeySerializationEncryption = NO_PASSWORD) -> str:
    return KEY.private_bytes(Encoding.PEM, FORMS[form], encryption).decode()


def short_pem(form: PrivateKeyFormat = PrivateKeyFormat.PK8) -> str:
    """Return a key of SHORT_BITS. The library `cryptography` makes no key of less than 1024."""
    flags = ["-traditional"] if form == PrivateKeyFormat.PK1 else []
    command = ["openssl", "genrsa", *flags, str(SHORT_BITS)]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout

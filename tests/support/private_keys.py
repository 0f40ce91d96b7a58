"""RSA keys, made here, in the forms that people have."""

import base64

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from tiger_db import PrivateKeyFormat

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

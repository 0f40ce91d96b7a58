"""Secrets of each kind, and the parts by which they would be recognized."""

import base64
import textwrap

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.support.raw_keys import with_checksum
from tests.support.tiger_tokens import SOON, tiger_token

KEY = rsa.generate_private_key(65537, 1024)
PEM = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
DER = "".join(PEM.splitlines()[1:-1])
SIGN = base64.b64encode(bytes(range(256))).decode()
TOKEN, NEW_TOKEN = tiger_token(), tiger_token(SOON)
SLASHED = f"{TOKEN[:40]}/a+b/{TOKEN[45:]}"
API_KEY = with_checksum("tdb_live_0123456789Ab_Wn3hZ0qTgYc7LrKx5PvE1mJsDu9oBiF8aVtRk2MyXwQ")
JWT = ".".join(
    base64.urlsafe_b64encode(part).decode().rstrip("=")
    for part in (b'{"alg":"HS256"}', b'{"sub":"20150001"}', bytes(range(60, 92)))
)


def parts(secret: str, size: int = 8) -> set[str]:
    """Everything of a secret that is as long as that."""
    return {secret[n : n + size] for n in range(max(len(secret) - size, 0) + 1)}


WRAPPED = "\n".join(textwrap.wrap(DER, 64))
HOSTILE = [
    "a", "-", "A", '"', "\\", "\\n", "\\/", "aA1/", "MDAw", "Aa", " ", "=",
    "-----BEGIN ", "-----BEGIN A-----", "-----END ", "eyJ", "eyJ-", "eyJaaaaaaaa.", "tdb_",
    "tdb_live_", "tdb_live_0123456789Ab_", API_KEY,
    "token", "token ", '"token":', "token:", "token='", "token\\", "token=\\", 'token:"\\',
    "Bearer ", "token: bearer ", "a" * 60 + "\n", "aA1" * 20 + "\\n", "a" * 60 + "\\r",
]  # fmt: skip

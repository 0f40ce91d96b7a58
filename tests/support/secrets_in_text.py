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

# Texts with the secret hunter2, which its name or its place reveals.
NAMED_SECRETS = [
    "postgresql://u:hunter2@h",
    "postgresql+asyncpg://u:hunter2@h:5432/db?sslmode=require",
    "https://u:hunter2@h",
    "redis://:hunter2@h",
    "amqp://u:p@hunter2@h/",
    "mongodb+srv://u:hun/hunter2@h/db",
    "postgresql://u:it'shunter2@h",
    "'https://u:hunter2@h:80/a'",
    '{"url":"https://u:hunter2@h"}',
    r"https:\/\/u:hunter2@h\/a",
    "redis://:hunter2@h1,redis://:hunter2@h2",
    "git clone https://oauth2:hunter2@h/a.git",
    "{'password': b'hunter2'}",
    'password=f"hunter2"',
    "password=rb'hunter2'",
    "password=u'hunter2'",
    "SET password = E'hunter2'",
    "password = N'hunter2'",
    "password='''hunter2'''",
    'password="""hunter2"""',
    "password=Secret('hunter2')",
    "password=bytearray(b'hunter2')",
    "password=SecretStr(hunter2)",
    r"{\"password\": b\"hunter2\"}",
    "private key: hunter2",
    "Private-Key: hunter2",
    "api key: hunter2",
    "API key = hunter2",
    "secret key: hunter2",
    "TOKEN\uff1dhunter2",
    "password \uff1d hunter2",
    "<password>hunter2</password>",
    "<ns:password>hunter2</ns:password>",
    '<Password type="text"> hunter2 </Password>',
    "<dbPass>hunter2</dbPass>",
    "<user.token>hunter2</user.token>",
    "<password><![CDATA[hunter2<&>hunter2]]></password>",
    "<password>hunter2",
    "&lt;password&gt;hunter2&lt;/password&gt;",
    "pass=hunter2",
    "db_pass: hunter2",
    "dbPass=hunter2",
    "auth: hunter2",
    "X-Auth: hunter2",
    "passcode=hunter2",
    "pin_code=hunter2",
    "pin code: hunter2",
    "cvv: hunter2",
    "jwt=hunter2",
    "otp=hunter2",
    "otp_code=hunter2",
    "totp: hunter2",
    "https://x/?sv=1&sig=hunter2&b=1",
    "dsn=hunter2",
    "SENTRY_DSN=hunter2",
    "DATABASE_URL=hunter2",
    "database_url: hunter2",
    "client_assertion=hunter2",
    "密码=hunter2",
    "登录密码\uff1ahunter2",
    "'密码': 'hunter2'",
    "password2=hunter2",
]
# Invented secrets in the forms of vendors. The texts are split, so that no scanner of repositories
# takes them for real secrets.
VENDOR_SECRETS = [
    start + rest
    for start, rest in (
        ("sk_live_", "4eC39HqLyjWDarjtT1zdp7dc"),
        ("rk_test_", "4eC39HqLyjWDarjtT1zdp7dc"),
        ("whsec_", "4eC39HqLyjWDarjtT1zdp7dcAbCd"),
        ("AKIA", "IOSFODNN7EXAMPLE"),
        ("ASIA", "IOSFODNN7EXAMPLE"),
        ("LTAI", "5tQ7Xv9Kp2mN4bRz"),
        ("AKID", "z8krbsJ5yKBZQpn74WFkmLPx3gnPhESA"),
        ("xoxb-", "123456789012-abcdefGHIJKL"),
        ("xapp-", "1-A01-1234567890-abcdef"),
        ("hooks.slack.com/services/", "T01234567/B01234567/abcdefGHIJKL"),
        ("AIza", "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q"),
        ("GOCSPX-", "a1B2c3D4e5F6g7H8i9J0k1L2m3N4"),
        ("ya29.", "a0AfH6SMBxyz-0123456789_abc"),
        ("ghp_", "0123456789abcdefABCDEF0123456789abcd"),
        ("github_pat_", "11ABCDEFG0abcdefghij_0123456789"),
        ("glpat-", "abcdef-0123456789XYZ"),
        ("sk-proj-", "abcdef0123456789ABCDEF-_0"),
        ("sk-ant-", "api03-abcdef0123456789ABCDEF"),
        ("sk-", "abcdef0123456789ABCDEFabcdef0123"),
        ("SG.", "abcdef0123456789ABCDEF.abcdef0123456789ABCDEF"),
        ("npm_", "abcdef0123456789ABCDEFabcdef0123456"),
        ("pypi-", "AgEIcHlwaS5vcmcCJDAwMDAwMDAwLTAw"),
        ("hf_", "abcdefghijABCDEFGHIJabcdefghijABCD"),
        ("hvs.", "CAESIabcdef0123456789ABCDEF"),
        ("dop_v1_", "0123456789abcdef0123456789abcdef"),
        ("shpat_", "0123456789abcdef0123456789ABCDEF"),
    )
]
ORDINARY_TEXTS = [
    "https://user@host/a?b=c",
    "https://host:8080/path?email=ann@example.com",
    "http://[::1]:8080/ann@example.com",
    "git+ssh://git@github.com:owner/name.git@v1.2",
    "postgresql://db.example.com:5432/tiger_db?application_name=a@b",
    "['http://a:80', 'ann@example.com']",
    "write to ann@example.com: 3 orders, at 10:15:00+08:00",
    "the author: Ann, authority: SEC, signal: buy, compass: north, passenger: Ann",
    "pass the order, then pass it on; authenticated: yes, passed: 3, oauth: yes",
    "signature_version=4 sign_type=RSA assign=3 order_sign=BUY",
    "key: value, base_url=https://openapi.tigerfintech.com, url: /orders",
    "requires_auth=true, password: null, token=None, auth: False",
    "AAPL 00700.HK BRK.B SPY 261218C00600000 ES2612 USD/HKD SG.SI",
    "order 31318851462234112, account 51230321, U12300123, paper 20191221901212121",
    "b3f1c2d4-0a1b-4c5d-8e9f-001122334455 01936f4e-7c2a-7b3a-9d2e-5f6a7b8c9d0e",
    "md5 d41d8cd98f00b204e9800998ecf8427e, git da39a3ee5e6b4b0d3255bfef95601890",
    "AKIA is a prefix of AWS, sk_live_ of Stripe, xoxb- of Slack, AIza of Google, ghp_ of GitHub",
    "ASIAN markets, AKIAS, risk-adjusted, task-list, SG.A, hf_rate, npm_config_cache, desk-top",
    "<passenger>Ann</passenger> <author>Ann</author> <token/> <tokens>3</tokens> <a href='b'>c</a>",
    "if a < b && b > c: passes <= 3",
    "订单\uff1a已提交\uff0c密码错误\uff0c请重试",
    "x\uff1d3\uff0c价格\uff1a12.5",
    "f(b'abc', f\"def\", r'x') and 'b', b''",
    "2026-11-29T09:42:27Z tiger_db.crud.accounts: 3 rows in 0.2 s",
]
HOSTILE += [
    "://", "://a:", "://a:b", "://a:b@", "://:@", ":\\/\\/", "@", "<", "<a", "<token ", "<token>",
    "&lt;token&gt;", "<token><![CDATA[", "token\uff1d", "token=b'", "token=a(", "pass", "pass_",
    "Pass", "x_auth", "密码", "sk_live_", "AKIA", "xoxb-", "AIza", "SG.", "SG.aaaaaaaaaaaaaaaa.",
    "pypi-AgE", "hooks.slack.com/services/", "sk-", "a.",
]  # fmt: skip

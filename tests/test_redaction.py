"""Secrets are masked, and other text is not."""

import base64
import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from time import process_time
from urllib.parse import quote

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tigeropen.common.consts import THREAD_LOCAL
from tigeropen.common.exceptions import RequestException, ResponseException
from tigeropen.common.util.web_utils import do_post

from tests.support.secrets_in_text import (
    API_KEY,
    DER,
    HOSTILE,
    JWT,
    NAMED_SECRETS,
    NEW_TOKEN,
    ORDINARY_TEXTS,
    PEM,
    SIGN,
    SLASHED,
    TOKEN,
    VENDOR_SECRETS,
    WRAPPED,
    parts,
)
from tiger_db import redaction
from tiger_db.redaction import (
    MASK,
    add_known_secrets,
    add_secret_names,
    is_plain_name,
    is_secret_name,
    mask_account_number,
    redact_aggressively,
    redact_known,
)


def leaked(text: str, *secrets: str) -> list[str]:
    shown = redact_aggressively(text)
    return [part for secret in secrets for part in parts(secret) if part in shown]


# What Tiger's SDK says


@contextmanager
def gateway(answer: bytes) -> Iterator[str]:
    """A server that refuses every request with this body; its URL."""

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(502)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/gateway"
        server.shutdown()
        thread.join()


def asked(url: str) -> str:
    """What the SDK's exception says when a request fails."""
    THREAD_LOCAL.uuid = "b3f1c2d4-0a1b-4c5d-8e9f-001122334455"
    params = {
        "method": "user_token_refresh",
        "tiger_id": "20150001",
        "biz_content": '{"account":"U12300123","secret_key":"institutional"}',
        "sign": SIGN,
    }
    headers = {"Authorization": TOKEN, "User-Agent": "openapi-python-sdk-3.8.0"}
    with pytest.raises((RequestException, ResponseException)) as caught:
        do_post(url, headers=headers, params=params)
    return str(caught.value)


def test_the_message_of_the_sdk_for_a_failed_request_is_masked() -> None:
    told = asked("http://127.0.0.1:1/gateway")
    assert leaked(told, TOKEN, SIGN, "institutional") == []
    shown = redact_aggressively(told)
    for word in (
        "[b3f1c2d4-0a1b-4c5d-8e9f-001122334455]POST request failed. url: http://127.0.0.1:1/gateway",
        f"'Authorization': '{MASK}', 'User-Agent': 'openapi-python-sdk-3.8.0'",
        "'method': 'user_token_refresh', 'tiger_id': '20150001'",
        f'{{"account":"U12300123","secret_key":"{MASK}"}}',
        f"'sign': '{MASK}'",
        "Connection refused",
    ):
        assert word in shown


@pytest.mark.slow
def test_the_message_of_the_sdk_for_a_malformed_answer_is_masked() -> None:
    data = json.dumps({"token": "short", "expires": 1}, separators=(",", ":"))
    answer = json.dumps({"code": 4, "message": "access forbidden", "data": data, "sign": SIGN})
    with gateway(answer.encode()) as url:
        told = asked(url)
    assert r"{\\\\" not in told
    assert r'\\"token\\":\\"short\\"' in told  # JSON in JSON in bytes
    assert leaked(told, TOKEN, SIGN, "institutional", '"short') == []
    shown = redact_aggressively(told)
    assert "invalid http status 502" in shown
    assert '"code": 4, "message": "access forbidden"' in shown
    assert rf'\\"token\\":\\"{MASK}\\",\\"expires\\":1' in shown


def test_the_log_of_the_sdk_for_a_refresh_is_masked() -> None:
    told = f"refresh token, old:{TOKEN}, new:{NEW_TOKEN}"
    assert redact_aggressively(told) == f"refresh token, old:{MASK}, new:{MASK}"
    told = f"load token from changed token file, old: {TOKEN}, new:{NEW_TOKEN}"
    assert (
        redact_aggressively(told) == f"load token from changed token file, old: {MASK}, new:{MASK}"
    )


# Secrets by their form

FORMS = {
    "PEM": (PEM, DER),
    "PEM, cut off at its end": (PEM[:-100], DER),
    "PEM, cut off at its beginning": (PEM[20:], DER),
    "PEM with escapes": (json.dumps({"k": PEM}), DER),
    "PEM in a repr of a repr": (repr(repr(PEM)), DER),
    "PEM in one line": (PEM.replace("\n", " "), DER),
    "DER": (f"bad key {DER} in line 1", DER),
    "DER, wrapped": (f"bad key:\n{WRAPPED}\nin file", DER),
    "DER, wrapped and indented": (textwrap.indent(WRAPPED, "    "), DER),
    "DER, wrapped by Windows": (WRAPPED.replace("\n", "\r\n"), DER),
    "DER, wrapped as MIME": ("\n".join(textwrap.wrap(DER, 76)), DER),
    "DER, wrapped with escapes": (repr(WRAPPED), DER),
    "DER, wrapped with more escapes": (repr(repr(WRAPPED.replace("\n", "\r\n"))), DER),
    "DER after a line of dashes": (f"{'-' * 64}\n{WRAPPED}", DER),
    "a key in properties": (f"private_key_pk8={DER}\nlicense=TBHK", DER),
    "a token": (f"wrong {TOKEN}", TOKEN),
    "a token without padding": (f"wrong {TOKEN.rstrip('=')}", TOKEN.rstrip("=")),
    "a token in a URL": (f"https://x/?a={quote(SLASHED, safe='')}&b=1", SLASHED[:40]),
    "a token of JSON that escapes slashes": (SLASHED.replace("/", r"\/"), TOKEN[45:]),
    "an API key": (f"used {API_KEY} twice", API_KEY[22:]),
    "an API key in a URL": (f"https://x/?k={API_KEY}&b=1", API_KEY[22:]),
    "an API key in JSON": (json.dumps({"a": [API_KEY]}), API_KEY[22:]),
    "an API key of a test": (API_KEY.replace("live", "test"), API_KEY[22:]),
    "an API key, mistyped": (f"used {API_KEY}x.", API_KEY[22:]),
    "an API key, cut off": (API_KEY[:40], API_KEY[22:40]),
    "a JWT": (f"expired: {JWT}", JWT),
    "a JWT without a signature": (f"{JWT.rsplit('.', 1)[0]}.", JWT.split(".")[1]),
    "a digest": (bytes(range(32)).hex(), bytes(range(32)).hex()),
    "capitals and digits": ("JBSWY3DPEHPK3PXP" * 3, "JBSWY3DPEHPK3PXP"),
    "letters only": ("qJzXwVtRkPmNbYcLdGhFsQjZ" * 2, "qJzXwVtRkPmNbYcLdGhFsQjZ"),
    **{
        f"{secret[:8]} of a vendor": (f"used {secret}, refused", secret)
        for secret in VENDOR_SECRETS
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_a_secret_is_recognized_by_its_form(name: str) -> None:
    text, secret = FORMS[name]
    assert leaked(text, secret) == []


NAMED = [
    "token=hunter2",
    "https://x/?a=1&token=hunter2&b=1",
    "Authorization: hunter2",
    "authorization: Token hunter2",
    "Authorization: Bearer hunter2",
    "'Authorization': 'Bearer hunter2'",
    "Bearer hunter2",
    "bearer  hunter2",
    '{"access_token":"hunter2","token_type":"Bearer"}',
    '{"refresh_token" : "hunter2"}',
    "{'refreshToken': 'hunter2'}",
    '"client_secret":"hunter2"',
    r"{\"token\":\"hunter2\"}",
    r"{\\\"token\\\":\\\"hunter2\\\"}",
    r'"password":"a\"hunter2"',
    r"{\"password\":\"a\\\"hunter2\"}",
    '"token":"hunter2',
    "password = hunter2",
    "passwd:hunter2",
    "DB_PASSWORD=hunter2",
    "password => hunter2",
    "pwd := hunter2",
    "api-key: hunter2",
    "x-api-key=hunter2",
    "secret_key=hunter2",
    "privateKey=hunter2",
    "private_key_pk1=hunter2",
    "sign=hunter2",
    "'signature': 'hunter2'",
    "token\uff1ahunter2",
    "TOKEN: hunter2",
    "token:\n  hunter2",
    "token=nonehunter2",
    *NAMED_SECRETS,
]


@pytest.mark.parametrize("text", NAMED)
def test_a_secret_is_recognized_by_its_name(text: str) -> None:
    shown = redact_aggressively(f"before {text} after")
    assert "hunter2" not in shown
    assert MASK in shown
    assert shown.startswith("before ")


ODD = st.text(st.sampled_from("AMacwz059+/=_-\"'\\nrtu:%{}[],. \n*")) | st.text()
MOMENTS = st.integers(10**12, 10**13 - 1)


@given(
    before=ODD,
    generated=MOMENTS,
    expires=MOMENTS,
    opaque=st.binary(min_size=16, max_size=16),
    after=ODD,
)
# One that could be words, by its form.
@example(before="", generated=6726726726720, expires=1672672672672, opaque=bytes(16), after="")
def test_a_token_in_any_text_is_masked(
    before: str, generated: int, expires: int, opaque: bytes, after: str
) -> None:
    token = base64.b64encode(f"{generated},{expires}".encode() + opaque).decode().rstrip("=")
    shown = redact_aggressively(before + token + after)
    assert not [p for p in parts(token) if p in shown and p not in before + "\0" + after]


@given(before=ODD, size=st.integers(1, 49), after=ODD)
def test_an_api_key_in_any_text_is_masked(before: str, size: int, after: str) -> None:
    """Also one that was cut off: what is left of its secret does not show."""
    assume(before[-1:] == "" or not (before[-1].isalnum() or before[-1] == "_"))
    raw_key = API_KEY[: 22 + size]
    shown = redact_aggressively(f"{before}{raw_key} {after}")
    assert raw_key not in shown
    assert not [p for p in parts(raw_key[22:]) if len(p) == 8 and p in shown]


# Known secrets

SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "JSON": json.dumps,
    "JSON with letters": lambda secret: json.dumps(secret, ensure_ascii=False),
    "repr": repr,
    "URL": lambda secret: quote(secret, safe=""),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "secret",
    ["1234", "a.*b(c[", r"\1\g<0>", "two words", "пароль🐅", "two\nlines", 'it\'s "so"', "+/=%&"],
)
def test_a_known_secret_of_any_form_is_masked(secret: str, spelling: str) -> None:
    spelled = SPELLINGS[spelling](secret)
    shown = redact_aggressively(f"before {spelled} after {spelled}", "other", secret)
    assert shown.count(MASK) == 2
    assert not [p for p in parts(secret, 4) if p in shown]
    assert (shown[:7], " after " in shown) == ("before ", True)


@given(before=ODD, secret=st.text(min_size=4), after=ODD)
def test_a_known_secret_in_any_text_is_masked(before: str, secret: str, after: str) -> None:
    assume("*" not in secret)
    assert secret not in redact_aggressively(before + secret + after, secret)


def test_the_longer_of_two_known_secrets_is_masked_completely() -> None:
    assert redact_aggressively("long-and-longer", "long", "long-and-longer", "and") == MASK


def test_a_known_secret_of_a_letter_does_not_mask_every_word() -> None:
    assert redact_aggressively("nothing to see", "n", "to ") == "nothing to see"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_secret_of_the_process_is_masked_in_every_text(spelling: str) -> None:
    add_known_secrets("pä/ss-1234", "password", "short1")
    shown = redact_known(f"see {SPELLINGS[spelling]('pä/ss-1234')} there")
    assert (shown[:4], shown.count(MASK), shown[-6:]) == ("see ", 1, " there")
    assert redact_known("the password is short1") == "the password is short1"


def test_a_name_is_plain_until_it_is_a_secret_of_the_process() -> None:
    assert is_plain_name("order_zq81kk20")
    add_known_secrets("zq81kk20")
    assert not is_plain_name("order_zq81kk20")


@pytest.mark.parametrize("name", ["é", "a\0b", "password", "a=b password=x", "sk_live_4242424242"])
def test_names_with_secrets_or_other_characters_are_not_plain(name: str) -> None:
    assert not is_plain_name(name)


def test_the_last_secrets_of_the_process_are_kept() -> None:
    add_known_secrets("secret-0", *(f"secret-{n}" for n in range(100)), "secret-0", "secret-100")
    assert redact_known("secret-0 secret-1 secret-2") == f"{MASK} secret-1 {MASK}"


# What stays


@pytest.mark.parametrize(
    "text",
    [
        "",
        "code=4 msg=rate limit error(current limiting interface: 120/min)",
        "code=1010 msg=biz param error(field 'account' is required)",
        "invalid http status 502",
        "[b3f1c2d4-0a1b-4c5d-8e9f-001122334455]POST request failed.",
        "b3f1c2d4-0a1b-4c5d-8e9f-001122334455_b3f1c2d4-0a1b-4c5d-8e9f-001122334455",
        "com.tigerbrokers.stock.openapi.client.https.client.TigerHttpClient.execute(312)",
        "com/tigerbrokers/stock/openapi/client/https/request/TradeOrderRequestV2",
        "AbstractTigerOpenApiClientRequestFactoryBeanPostProcessor2",
        "https://openapi.tigerfintech.com/hkg/gateway",
        "/usr/local/lib/python3.11/site-packages/tigeropen/common/util/web_utils.py",
        "/Users/Shared/projects/trading/lib/python3/packages/tigeropen/Main",
        "design: ok, assigned: 3, sign_type=RSA, signed: yes",
        "order 31318851462234112 of U12300123 was rejected",
        "token request failed: invalid_grant the refresh token has expired",
        "no token, no secret; 3 tokens: 2 old",
        'token: null, "token": None, token_expires_at=2027-01-01T00:00:00Z',
        "TBHK: basic quotes only; usQuoteBasic is missing",
        "response sign verify failed. Max retries exceeded",
        "超时\uff1a请稍后再试 🐅",
        f"{'-' * 60}\n{'=' * 60}\n{'a' * 60}",
        f"ends with {MASK}",
        *ORDINARY_TEXTS,
    ],
)
def test_an_ordinary_text_is_unchanged(text: str) -> None:
    assert redact_aggressively(text) == text


def test_the_text_around_a_secret_is_unchanged() -> None:
    assert redact_aggressively(f"key\n{PEM}of account 1") == f"key\n{MASK}\nof account 1"
    assert (
        redact_aggressively(f"{API_KEY} was denied") == f"tdb_live_0123456789Ab_{MASK} was denied"
    )
    assert redact_aggressively('{"token":"a","code":4}') == f'{{"token":"{MASK}","code":4}}'
    assert redact_aggressively("x?token=a&code=4") == f"x?token={MASK}&code=4"
    assert redact_aggressively(f"old {TOKEN}\nRetrying") == f"old {MASK}\nRetrying"


@pytest.mark.parametrize(
    ("number", "shown"), [("51230321", "****0321"), ("12345", "*2345"), ("1234", "****"), ("", "")]
)
def test_a_masked_account_number_shows_at_most_four_characters(number: str, shown: str) -> None:
    assert mask_account_number(number) == shown


# Long texts

HOSTILE += ["MII", "MII/", "MII" + "A" * 27 + " ", "MII" + "A" * 27 + "\\\\", "cookie", "access_"]


def seconds(text: str) -> float:
    """Return the processor time that masking of a text takes."""
    begun = process_time()
    redact_aggressively(text, "known")
    return process_time() - begun


def growth(start: str, text: str) -> float:
    """Return how many times longer the masking of a text takes that is ten times as long."""
    short, long = (start + text * (length // len(text)) for length in (4_000, 40_000))
    return seconds(long) / max(seconds(short), 0.0005)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["", "token:", "token", "a" * 60, "-----BEGIN A-----"])
def test_a_long_text_is_masked_in_linear_time(start: str) -> None:
    limit = 40  # ten times in linear time, and a hundred times in quadratic time
    slow = [text for text in HOSTILE if growth(start, text) > limit]
    assert [text for text in slow if min(growth(start, text) for _ in range(5)) > limit] == []


# Secrets beyond doubt


@pytest.mark.parametrize(
    "name",
    [
        "token", "accessToken", "ACCESS_TOKEN", "refresh token", "tokens", "client-secret",
        "password_hash", "passwd", "userPwd", "passphrase", "Authorization", "x-api-key",
        "APIKey", "api key", "aws_access_key", "signingKey", "ENCRYPTION_KEYS", "Set-Cookie",
        "private_key", "private_key_pk1", "private_key_pk8", "tiger.private_key_pk8", "credentials",
        "sign", "Signature", "PIN", "otp", "pepper", "x" * 999 + "_token", "pass", "dbPass", "auth",
        "X-Auth", "passcode", "pin_code", "pinCode", "trade_pin", "cvv", "card_cvv", "jwt",
        "otp_code", "totp", "sig", "dsn", "SENTRY_DSN", "database_url", "DATABASE_URL",
        "client_assertion", "clientAssertion", "密码", "登录密码", "pass2",
    ],
)  # fmt: skip
def test_a_name_of_a_secret_is_recognized(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "?", "user", "key", "api_key_id", "apiKeyIds", "key_prefix", "token_prefix",
        "tokenType", "token_expires_at", "tokenExpiry", "new_token_hash", "secretFingerprint",
        "token_count", "private_key_format", "token_status", "cookie_name", "token_url",
        "token scopes", "token_id2", "token_refresh_id", "passwordLength",
        "encryption_key_version", "design", "spin", "shipping", "author", "authority", "compass",
        "passenger", "signal", "passed", "oauth", "pinned", "authenticated", "auth_type", "url",
        "base_url", "order_sign", "opinion",
    ],
)  # fmt: skip
def test_a_name_of_no_secret_is_recognized(name: str) -> None:
    assert not is_secret_name(name)


def test_names_of_secrets_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_SECRET_WORDS", set(redaction._SECRET_WORDS))
    try:
        assert not is_secret_name("my_trade_key_2")
        assert is_plain_name("my_trade_key_2")
        add_secret_names("tradeKey")
        assert is_secret_name("my_trade_key_2")
        assert not is_plain_name("my_trade_key_2")
        assert redact_known("trade_key=1234") == f"trade_key={MASK}"
        assert redact_known("Trade key: 1234") == f"Trade key: {MASK}"
        with pytest.raises(ValueError, match="letter"):
            add_secret_names("mother", "--")
        assert not is_secret_name("mother")
    finally:
        redaction._clear_caches()


@pytest.mark.parametrize("name", [n for n in FORMS if "digest" not in n and "only" not in n])
def test_redact_known_masks_a_secret_by_its_form(name: str) -> None:
    text, secret = FORMS[name]
    if name in {
        "PEM, cut off at its beginning",
        "DER after a line of dashes",
        "capitals and digits",
    }:
        return
    assert not [part for part in parts(secret) if part in redact_known(text)]


@pytest.mark.parametrize("text", [*NAMED, "pin=hunter2", "accessKey: hunter2", "cookie=hunter2"])
def test_redact_known_masks_a_secret_by_its_name(text: str) -> None:
    shown = redact_known(f"before {text} after")
    assert "hunter2" not in shown
    assert shown.startswith("before ")


@pytest.mark.parametrize(
    "text", [bytes(range(32)).hex(), "MIIxyz", f"MII{'A' * 96}", SIGN, "a" * 100, "shipping: 1"]
)
def test_redact_known_keeps_other_random_text(text: str) -> None:
    assert redact_known(text) == text
    assert redact_known(f"see {text}, 2") == f"see {text}, 2"

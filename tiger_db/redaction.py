"""Masking of secrets in texts such as error messages, log lines and audit events."""

import itertools
import json
import re
from collections.abc import Callable
from functools import cache, lru_cache
from urllib.parse import quote

from pydantic import SecretStr

MASK = "**********"
# `redact_start` returns at most _SHOWN_CHARACTERS characters. Redaction takes microseconds per
# character, so only the first _REDACTED_CHARACTERS of a long text are redacted. If they end inside
# a secret of at most _MAX_SECRET_LENGTH characters, redaction does not recognize the secret, so
# that many characters are left out after redaction.
_SHOWN_CHARACTERS, _REDACTED_CHARACTERS, _MAX_SECRET_LENGTH = 200, 2_000, 1_000
# Secrets of fewer than four characters are not masked, because such secrets match parts of common
# words.
_MIN_SECRET_CHARACTERS = 4

_PEM = r"(?s)-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)"
# Tiger's tokens are base64 of a text that begins with two times in epoch milliseconds, such as
# `1700000000000,1…`.
_TIGER_TOKEN = re.compile(
    r"(?:[M-O][DTjz][AEIMQUYcgk][w-z0-5]){4}[M-O][CSiy]w(?:[A-Za-z0-9+/_%-]|\\/)*={0,2}"
)
_JWT = r"(?<![\w-])eyJ[\w-]{8,}(?:\.[\w-]+)+"
_API_KEY = r"\b(tdb_(?:live|test)_[0-9A-Za-z]{12})_[0-9A-Za-z]+"
_BEARER = r"(?i)\b(Bearer)\s+[^\s'\",;\\]+"
# `_RANDOM` matches 40 or more characters of base64, such as keys, tokens and digests. The slashes
# can be escaped as in JSON or URLs. `_LINES` matches base64 text of several lines.
_RANDOM = r"(?:[A-Za-z0-9+_-]|\\?/|%2[BbFf]){40,}={0,2}"
_LINES = (
    r"(?<![A-Za-z0-9+/])(?:[A-Za-z0-9+/]{60,}+(?:\r?\n|(?:\\+r)?\\+n)[ \t]*)+[A-Za-z0-9+/]*={0,2}"
)
_SEPARATORS = re.compile(r"(?:[/_-]|\\/|%2[Ff])+")
# `_WORDS` matches several words without separators, as in `aWordLIKEThis2`.
_WORDS = re.compile(r"[a-z]*+(?:[A-Z]++[a-z]{2,}+)*+[A-Z]*+[0-9]{0,19}+")
# `_NAME` matches a name with a secret value. `_secret_values` replaces the placeholders WORDS,
# ENDINGS and NAMES by the names of secrets.
_NAME = r"""
    (?P<name> [\w-]* (?: WORDS
      | (?: (?<![\w-]) | (?<=[_-]) | (?-i: (?<=[a-z0-9]) (?=[A-Z]) ) ) (?: ENDINGS )
      | (?<![\w-]) (?: NAMES )
    ) (?: _?pk[18] | [_-]?\d{1,3} )? )
    """
# `_ASSIGNMENT` matches a name and its value, such as `token=value`. The value of a Python literal
# can have a prefix, such as `b'value'`, and can be an argument, such as `Secret('value')`. The
# first lookahead makes the search faster: it skips words that no value can follow.
_ASSIGNMENT = rf"""
    (?<![\w-]) (?= [\w-]++ [\s\\"'=:\uff1a\uff1d] ) {_NAME}
    (?P<between> \\*+["']? \s*+ (?: =>? | :=? | [\uff1a\uff1d] ) \s*+ )
    (?: (?: [\w.]{{1,40}} \( \s* )? (?: [bruf]{{1,2}} | [eln@$] )?
        (?P<quote> \\* (?: ""\" | ''' | ["'] ) ) .*? (?: (?<!\\)(?P=quote) | (?=\n) | \Z )
      | (?! (?: null | None | true | false ) (?: [\s,&}})\]] | \Z ) )
        (?: (?: bearer | basic | digest | token ) \s+ | [\w.]{{1,40}} \( )? [^\s"',;&{{}}()\[\]]+ )
    """
# `_ELEMENT` matches an element of XML with its value, such as `<token>value</token>`.
_ELEMENT = rf"""
    (?P<open> (?: < | &lt; ) (?: [\w.-]+ : )? (?: [\w.-]*\. )? {_NAME}
      (?: \s [^<>&]* )? (?<!/) (?: > | &gt; ) )
    \s*+ (?: <!\[CDATA\[ .*? (?: \]\]> | \Z ) | (?! < | &lt; ) (?: (?! < | &lt; ) . )+ )
    """
# `_URL` matches a URL without its scheme, up to its end. `_URL_PASSWORD` matches the password in a
# well-formed URL. `_RAW_URL_PASSWORD` matches the start of a password that is not percent-encoded.
_URL = r""":(?:\\*/){2}(?:[^\s"'<>]|'(?=\w))+"""
_URL_PASSWORD = re.compile(r"(:(?:\\*/){2}[^\s/?#@:\[\]]*:)[^\s/?#]+@")
_RAW_URL_PASSWORD = re.compile(r":(?:\\*/){2}[^\s/?#@:\[\]]*:(?!\d*(?:[\\/?#,;&)]|\Z)|\*{10}@)")
# Well-known forms of vendors' secrets: the first characters, and a pattern for the others. The
# minimum lengths are lower than those of the vendors, because a text can be cut off. Sources:
# https://docs.github.com/en/code-security/reference/secret-security/supported-secret-scanning-patterns
# https://github.com/gitleaks/gitleaks/blob/master/config/gitleaks.toml (rules by vendor)
_VENDOR_FORMS = {
    "AKIA ASIA ABIA ACCA": "[A-Z2-7]{16}(?![A-Za-z0-9])",  # AWS
    "LTAI": "[A-Za-z0-9]{16,}",  # Alibaba Cloud
    "AKID": "[A-Za-z0-9]{32,}",  # Tencent Cloud
    "AIza": r"[\w-]{30,}",  # Google API keys
    "GOCSPX-": r"[\w-]{20,}",  # Google OAuth client secrets
    "ya29.": r"[\w-]{20,}",  # Google OAuth access tokens
    "ghp_ gho_ ghu_ ghs_ ghr_": r"\w{20,}",  # GitHub
    "github_pat_": r"\w{20,}",  # GitHub
    "glpat-": r"[\w-]{16,}",  # GitLab
    "sk_live_ sk_test_ rk_live_ rk_test_": "[A-Za-z0-9]{10,}",  # Stripe
    "whsec_": "[A-Za-z0-9+/]{16,}={0,2}",  # Stripe webhooks
    "xoxb- xoxp- xoxa- xoxr- xoxs- xoxe- xoxe. xapp-": "[A-Za-z0-9.-]{10,}",  # Slack
    "hooks.slack.com/services/": "[A-Za-z0-9+/]{20,}",  # Slack webhooks
    "sk-ant- sk-proj- sk-svcacct- sk-admin-": r"[\w-]{20,}",  # Anthropic, OpenAI
    "sk-": "[A-Za-z0-9]{32,}",  # OpenAI
    "SG.": r"[\w-]{16,}\.[\w-]{16,}",  # SendGrid
    "npm_": "[A-Za-z0-9]{30,}",  # npm
    "pypi-": r"AgE[\w-]{20,}",  # PyPI
    "hf_": "[A-Za-z0-9]{30,}",  # Hugging Face
    "hvs. hvb.": r"[\w-]{24,}",  # HashiCorp Vault
    "dop_v1_ doo_v1_ dor_v1_": "[a-f0-9]{32,}",  # DigitalOcean
    "shpat_ shpca_ shppa_ shpss_": "[A-Fa-f0-9]{32}",  # Shopify
}
_MAX_KNOWN_SECRETS = 100
_MIN_KNOWN_CHARACTERS = 8  # minimum length of a known secret
_MIN_KNOWN_LETTERS = 16  # minimum length of a known secret that contains only letters
# The spellings of each known secret. The newest secret is the last item.
_known_secrets: dict[str, tuple[SecretStr, ...]] = {}


def mask_account_number(account_number: str) -> str:
    """Mask an account number except its last four characters.

    An account number of at most four characters is masked completely.
    """
    shown = account_number[-4:] if len(account_number) > 4 else ""  # noqa: PLR2004  # 4 characters stay visible
    return "*" * (len(account_number) - len(shown)) + shown


def redact_aggressively(text: str, *known: str) -> str:
    """Mask everything in a text that is or resembles a token, a key or a password.

    `redact_aggressively` masks all secrets that `redact_known` masks, and the texts in `known` that
    have at least four characters. In addition, `redact_aggressively` masks sequences of 40 or more
    letters and digits that are not words.
    """
    forms = [
        form
        for secret in known
        if len(secret) >= _MIN_SECRET_CHARACTERS
        for form in _spellings(secret)
    ]
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form.get_secret_value(), MASK)
    text = re.sub(_LINES, _without_random, redact_known(text))
    return re.sub(_RANDOM, _without_random, text)


def redact_start(text: str) -> str:
    """Return the first 200 characters of a text, masked as by `redact_aggressively`."""
    shown = redact_aggressively(text[:_REDACTED_CHARACTERS])
    if len(text) > _REDACTED_CHARACTERS:
        shown = shown[:-_MAX_SECRET_LENGTH] or MASK
    return shown[:_SHOWN_CHARACTERS]


def _without_value(match: re.Match[str]) -> str:
    mark = match["quote"] or ""
    return f"{match['name']}{match['between']}{mark}{MASK}{mark}"


def _without_random(match: re.Match[str]) -> str:
    """Mask a matched text that looks random. Paths, class names and UUIDs are not masked."""
    run = match[0]
    parts = _SEPARATORS.split(run)
    if all(map(_WORDS.fullmatch, parts)):
        return run
    mixed = re.search("[a-z]", run) and re.search("[A-Z]", run)
    return MASK if mixed or len(parts) == 1 else run


# A name that contains one of these words is the name of a secret. The parts of a word such as
# "api key" can also be separated by an underscore or a hyphen, or not be separated.
_SECRET_WORDS = {
    "token", "secret", "password", "passwd", "pwd", "passphrase", "passcode", "authorization",
    "credential", "private key", "api key", "access key", "secret key", "signing key",
    "encryption key", "cookie", "client assertion", "密码", "密碼", "口令", "密钥", "密鑰", "私钥",
    "私鑰",
}  # fmt: skip
# A name that ends with one of these words is the name of a secret, as in `dbPass` or `x-auth`.
# Other names can contain the letters of these words, as in `author` or `signal`.
_SECRET_ENDINGS = {
    "pass", "auth", "pin", "pin code", "cvv", "cvc", "jwt", "otp", "otp code", "totp", "totp code",
    "sig", "dsn", "database url", "db url", "connection string",
}  # fmt: skip
# These words are the names of secrets only on their own.
_SECRET_NAMES = {"sign", "signature", "pepper"}
_HARMLESS = {
    "id", "ids", "prefix", "hash", "fingerprint", "expiresat", "expiry", "expiration", "expires",
    "type", "count", "name", "status", "format", "at", "url", "scope", "scopes", "version",
    "refreshid", "length",
}  # fmt: skip
# The hash of a password is secret too, because an attacker can guess the password from the hash.
_PASSWORDS = re.compile("passw|pwd|passphrase")
_NAME_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+")
_MAX_CACHED_NAME_CHARACTERS = 100

_BASE64 = r"(?:[A-Za-z0-9+/]|\\/)"
# `_DER` matches a private key in DER format, as base64 text in one or several lines.
_DER = (
    rf"(?<![A-Za-z0-9+])MII{_BASE64}{{27,}}+(?:(?:\s|\\+[rnt])+{_BASE64}{{30,}}+)*+"
    rf"(?:(?:\r?\n|(?:\\+r)?\\+n)[ \t]*{_BASE64}+)?={{0,2}}"
)
_MIN_DER_CHARACTERS = 100  # Minimum length of base64 text that `_without_der` masks.
_MIN_TIGER_TOKEN_CHARACTERS = 19  # Length of the shortest match of `_TIGER_TOKEN`.


def is_secret_name(name: str) -> bool:
    """Return whether a field with this name contains a secret.

    Case and separators of the name do not matter. For example, fields named `accessToken` or
    `X-API-Key` contain a secret. Fields named `token_expires_at` or `api_key_id` only describe a
    secret.
    """
    return (
        _is_secret(name)
        if len(name) <= _MAX_CACHED_NAME_CHARACTERS
        else _is_secret.__wrapped__(name)
    )


@lru_cache(maxsize=4096)
def is_plain_name(name: str) -> bool:
    """Return whether a name of at most 100 characters is ASCII, no secret, and names no secret."""
    return (
        name.isascii()
        and "\0" not in name
        and not is_secret_name(name)
        and redact_known(name) == name
    )


def add_secret_names(*names: str) -> None:
    """Add names of secrets for this process. Fields whose name contains an added name are masked.

    Case and separators of an added name do not matter: `tradePin` and `TRADE-PIN` are one name.

    Raises:
        ValueError: an added name contains no letter and no digit.
    """
    added = [_words(name) for name in names]
    if [] in added:
        raise ValueError("the name of a secret must contain a letter or a digit")
    _SECRET_WORDS.update(map(" ".join, added))
    _clear_caches()


def _clear_caches() -> None:
    for cached in (_is_secret, _joined, _secret_values, is_plain_name):
        cached.cache_clear()


def add_known_secrets(*secrets: str) -> None:
    """Add secrets of this process, such as its keys, which `redact_known` masks in every text.

    A secret of fewer than 8 characters, or of fewer than 16 letters without other characters, is
    ignored, because such secrets can match common words. The last 100 secrets are kept.
    """
    for secret in secrets:
        _known_secrets.pop(secret, None)
        least = _MIN_KNOWN_LETTERS if secret.isalpha() else _MIN_KNOWN_CHARACTERS
        if len(secret) >= least:
            _known_secrets[secret] = tuple(_spellings(secret))
    while len(_known_secrets) > _MAX_KNOWN_SECRETS:
        del _known_secrets[next(iter(_known_secrets))]
    is_plain_name.cache_clear()


def redact_known(text: str) -> str:
    """Mask the parts of a text that are certainly secrets.

    `redact_known` masks PEM blocks, private keys in base64, Tiger's tokens, JWTs, Bearer
    credentials, API keys of tiger_db, passwords in URLs, the common forms of other vendors' keys,
    and the secrets of `add_known_secrets`. `redact_known` also masks the value after the name of a
    secret, as in `password=…` or `<password>…`. Random text that is not certainly a secret, such as
    a digest, is not masked.
    """
    if len(text) < _MIN_KNOWN_CHARACTERS and text.isalnum():
        return text  # no form of a secret is so short
    for form in itertools.chain.from_iterable([*_known_secrets.values()]):
        text = text.replace(form.get_secret_value(), MASK)
    # Most texts contain no secret. Fast checks for substrings avoid slow pattern searches.
    for start, pattern, replacement in _FORMS:
        if start in text:
            text = re.sub(pattern, replacement, text)
    if len(text) >= _MIN_TIGER_TOKEN_CHARACTERS:
        text = _TIGER_TOKEN.sub(MASK, text)
    if "bearer" in text.lower():
        text = re.sub(_BEARER, rf"\1 {MASK}", text)
    if "<" in text or "&lt;" in text:
        text = _secret_values()[1].sub(rf"\g<open>{MASK}", text)
    if "=" in text or ":" in text or "\uff1a" in text or "\uff1d" in text:
        text = _secret_values()[0].sub(_without_value, text)
    return text


@lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    words = _words(name)
    while words and words[-1].isdigit():
        words.pop()
    joined = "".join(_words(name))
    if joined in _SECRET_NAMES or not _joined()[1].isdisjoint(("".join(words[-2:]), *words[-1:])):
        return True
    if not any(word in joined for word in _joined()[0]):
        return False
    if words[-1:] == ["hash"] and _PASSWORDS.search(joined):
        return True
    return not _HARMLESS.intersection(words[-1:])


def _words(name: str) -> list[str]:
    """Return the lower-case words of a name, such as `APIKeyId` or `api-key id`."""
    return [word.lower() for word in _NAME_WORDS.findall(name)]


@cache
def _joined() -> tuple[frozenset[str], frozenset[str]]:
    """Return `_SECRET_WORDS` and `_SECRET_ENDINGS` without separators."""
    first, second = (
        frozenset(word.replace(" ", "") for word in words)
        for words in (_SECRET_WORDS, _SECRET_ENDINGS)
    )
    return first, second


@cache
def _secret_values() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the patterns for assignments and XML elements with the names of secrets."""
    names = {"WORDS": _SECRET_WORDS, "ENDINGS": _SECRET_ENDINGS, "NAMES": _SECRET_NAMES}
    pattern, element = _ASSIGNMENT, _ELEMENT
    for placeholder, words in names.items():
        listed = " | ".join(sorted(word.replace(" ", "[ _-]?") for word in words))
        pattern, element = (text.replace(placeholder, listed) for text in (pattern, element))
    flags = re.IGNORECASE | re.VERBOSE
    return re.compile(pattern, flags), re.compile(element, flags | re.DOTALL)


def _spellings(secret: str) -> list[SecretStr]:
    """Return the spellings of a secret: in plain text, in JSON, in a Python `repr` and in a URL."""
    forms = (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe=""))
    return [SecretStr(form) for form in sorted({*forms}, key=len, reverse=True)]


def _without_url_password(match: re.Match[str]) -> str:
    # In Python 3.11, a function is faster than a replacement text with a group.
    url = _URL_PASSWORD.sub(lambda found: f"{found[1]}{MASK}@", match[0])
    raw, end = _RAW_URL_PASSWORD.search(url), url.rfind("@")
    # In a URL with a password that contains a slash, the password ends at the last "@".
    return url[: raw.end()] + MASK + url[end:] if raw and raw.end() < end else url


def _without_der(match: re.Match[str]) -> str:
    return MASK if len(re.sub(r"\s|\\+[rnt]?", "", match[0])) >= _MIN_DER_CHARACTERS else match[0]


# The secrets that `redact_known` recognizes by their forms: the first characters of a secret, the
# pattern of the secret, and the replacement. The patterns are texts, which `re` compiles when they
# are first used, because few processes use them.
_FORMS: tuple[tuple[str, str, str | Callable[[re.Match[str]], str]], ...] = (
    ("-----BEGIN", _PEM, MASK),
    ("eyJ", _JWT, MASK),
    ("tdb_", _API_KEY, rf"\1_{MASK}"),
    ("MII", _DER, _without_der),
    *(
        (start, rf"(?<![A-Za-z0-9]){re.escape(start)}{rest}", MASK)
        for starts, rest in _VENDOR_FORMS.items()
        for start in starts.split()
    ),
    ("@", _URL, _without_url_password),
)

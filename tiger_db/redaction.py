"""Masking of secrets in texts such as error messages, log lines and audit events."""

import json
import re
from functools import cache, lru_cache
from urllib.parse import quote

MASK = "**********"
# Secrets of fewer than four characters are not masked, because such secrets match parts of common
# words.
_MIN_SECRET_CHARACTERS = 4

_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL)
# Tiger's tokens are base64 of a text that begins with two times in epoch milliseconds, such as
# `1700000000000,1…`.
_TIGER_TOKEN = re.compile(
    r"(?:[M-O][DTjz][AEIMQUYcgk][w-z0-5]){4}[M-O][CSiy]w(?:[A-Za-z0-9+/_%-]|\\/)*={0,2}"
)
_JWT = re.compile(r"(?<![\w-])eyJ[\w-]{8,}(?:\.[\w-]+)+")
_API_KEY = re.compile(r"\b(tdb_(?:live|test)_[0-9A-Za-z]{12})_[0-9A-Za-z]+")
_BEARER = re.compile(r"\b(Bearer)\s+[^\s'\",;\\]+", re.IGNORECASE)
# `_RANDOM` matches 40 or more characters of base64, such as keys, tokens and digests. The slashes
# can be escaped as in JSON or URLs. `_LINES` matches base64 text of several lines.
_RANDOM = re.compile(r"(?:[A-Za-z0-9+_-]|\\?/|%2[BbFf]){40,}={0,2}")
_LINES = re.compile(
    r"(?<![A-Za-z0-9+/])(?:[A-Za-z0-9+/]{60,}+(?:\r?\n|(?:\\+r)?\\+n)[ \t]*)+[A-Za-z0-9+/]*={0,2}"
)
_SEPARATORS = re.compile(r"(?:[/_-]|\\/|%2[Ff])+")
# `_WORDS` matches several words without separators, as in `aWordLIKEThis2`.
_WORDS = re.compile(r"[a-z]*+(?:[A-Z]++[a-z]{2,}+)*+[A-Z]*+[0-9]{0,19}+")
# `_ASSIGNMENT` matches a name with a secret value, such as `token=value`. The function
# `_assignments` replaces the placeholders WORDS and NAMES by the names of secrets.
_ASSIGNMENT = r"""
    (?<![\w-])
    (?P<name> [\w-]* (?: WORDS ) | NAMES )
    (?P<between> \\*["']? \s* (?: =>? | :=? | \uff1a ) \s* )
    (?: (?P<quote> \\*["'] ) .*? (?: (?<!\\)(?P=quote) | (?=\n) | \Z )
      | (?! (?: null | None ) (?: [\s,&})\]] | \Z ) )
        (?: (?: bearer | basic | digest | token ) \s+ )? [^\s"',;&{}()\[\]]+ )
    """


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
    forms = {
        form  # a secret in plain text, in JSON, in a Python `repr` or in a URL
        for secret in known
        if len(secret) >= _MIN_SECRET_CHARACTERS
        for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe=""))
    }
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, MASK)
    text = _LINES.sub(_without_random, redact_known(text))
    return _RANDOM.sub(_without_random, text)


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


_SECRET_WORDS = {
    "token", "secret", "password", "passwd", "pwd", "passphrase", "authorization", "credential",
    "privatekey", "apikey", "accesskey", "signingkey", "encryptionkey", "cookie",
}  # fmt: skip
_SECRET_NAMES = {"sign", "signature", "pin", "otp", "pepper"}
# These patterns match names that precede a secret in a text, as in `password=…`.
_WORD_PATTERNS = {
    "token", "secret", "passw(?:or)?d", "pwd", "passphrase", "authorization", "credential",
    "private_?key (?: _?pk[18] )?", "api[_-]?key", "secret_?key", "access[_-]?key",
    "signing[_-]?key", "encryption[_-]?key", "cookie",
}  # fmt: skip
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
_DER = re.compile(
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


def add_secret_names(*names: str) -> None:
    """Add names of secrets for this process. Fields whose name contains an added name are masked.

    Case and separators of an added name do not matter: `tradePin` and `TRADE-PIN` are one name.

    Raises:
        ValueError: an added name contains no letter and no digit.
    """
    added = [_words(name) for name in names]
    if [] in added:
        raise ValueError("the name of a secret must contain a letter or a digit")
    _SECRET_WORDS.update(map("".join, added))
    _WORD_PATTERNS.update(map("[_-]?".join, added))
    _is_secret.cache_clear()
    _assignments.cache_clear()


def redact_known(text: str) -> str:
    """Mask the parts of a text that are certainly secrets.

    `redact_known` masks PEM blocks, private keys in base64, Tiger's tokens, JWTs, Bearer
    credentials and API keys of tiger_db. `redact_known` also masks the value after the name of a
    secret, as in `password=…`. Random text that is not certainly a secret, such as a
    digest, is not masked.
    """
    # Most texts contain no secret. Fast checks for substrings avoid slow pattern searches.
    if "-----BEGIN" in text:
        text = _PEM.sub(MASK, text)
    if len(text) >= _MIN_TIGER_TOKEN_CHARACTERS:
        text = _TIGER_TOKEN.sub(MASK, text)
    if "eyJ" in text:
        text = _JWT.sub(MASK, text)
    if "tdb_" in text:
        text = _API_KEY.sub(rf"\1_{MASK}", text)
    if "MII" in text:
        text = _DER.sub(_without_der, text)
    if "bearer" in text.lower():
        text = _BEARER.sub(rf"\1 {MASK}", text)
    if "=" in text or ":" in text or "\uff1a" in text:
        text = _assignments().sub(_without_value, text)
    return text


@lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    words = _words(name)
    while words and words[-1].isdigit():
        words.pop()
    joined = "".join(_words(name))
    if joined in _SECRET_NAMES:
        return True
    if not any(word in joined for word in _SECRET_WORDS):
        return False
    if words[-1:] == ["hash"] and _PASSWORDS.search(joined):
        return True
    return not _HARMLESS.intersection(words[-1:])


def _words(name: str) -> list[str]:
    """Return the lower-case words of a name, such as `APIKeyId` or `api-key id`."""
    return [word.lower() for word in _NAME_WORDS.findall(name)]


@cache
def _assignments() -> re.Pattern[str]:
    pattern = _ASSIGNMENT.replace("WORDS", " | ".join(sorted(_WORD_PATTERNS)))
    pattern = pattern.replace("NAMES", " | ".join(sorted(_SECRET_NAMES)))
    return re.compile(pattern, re.IGNORECASE | re.VERBOSE)


def _without_der(match: re.Match[str]) -> str:
    return MASK if len(re.sub(r"\s|\\+[rnt]?", "", match[0])) >= _MIN_DER_CHARACTERS else match[0]

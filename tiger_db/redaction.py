"""What others may see of texts that can hold secrets: errors, logs, account numbers."""

import json
import re
from functools import cache, lru_cache
from urllib.parse import quote

MASK = "**********"
_SHORTEST = 4  # characters of a known secret; a shorter one would mask parts of common words

_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL)
# The base64 of `1700000000000,1…`, with which Tiger's tokens begin wherever they stand.
_TIGER_TOKEN = re.compile(
    r"(?:[M-O][DTjz][AEIMQUYcgk][w-z0-5]){4}[M-O][CSiy]w(?:[A-Za-z0-9+/_%-]|\\/)*={0,2}"
)
_JWT = re.compile(r"(?<![\w-])eyJ[\w-]{8,}(?:\.[\w-]+)+")
_API_KEY = re.compile(r"\b(tdb_(?:live|test)_[0-9A-Za-z]{12})_[0-9A-Za-z]+")
_BEARER = re.compile(r"\b(Bearer)\s+[^\s'\",;\\]+", re.IGNORECASE)
# As long as Tiger's tokens, which are 60 characters of base64, keys, signatures and digests; also
# with a slash as JSON may have it and as a URL has it, and in lines of which the last is shorter.
_RANDOM = re.compile(r"(?:[A-Za-z0-9+_-]|\\?/|%2[BbFf]){40,}={0,2}")
_LINES = re.compile(
    r"(?<![A-Za-z0-9+/])(?:[A-Za-z0-9+/]{60,}+(?:\r?\n|(?:\\+r)?\\+n)[ \t]*)+[A-Za-z0-9+/]*={0,2}"
)
_SEPARATORS = re.compile(r"(?:[/_-]|\\/|%2[Ff])+")
_WORDS = re.compile(r"[a-z]*+(?:[A-Z]++[a-z]{2,}+)*+[A-Z]*+[0-9]{0,19}+")  # aWordLIKEThis2
# `name=value`, `"name": "value"` and the like, where the name tells that the value is a secret.
_NAMED = re.compile(
    r"""
    (?<![\w-])
    (?P<name> [\w-]* (?: token | secret | passw(?:or)?d | pwd | passphrase | authorization
                       | credential | private_?key (?: _?pk[18] )? | api[_-]?key | secret_?key )
            | sign (?: ature )? )
    (?P<between> \\*["']? \s* (?: =>? | :=? | \uff1a ) \s* )
    (?: (?P<quote> \\*["'] ) .*? (?: (?<!\\)(?P=quote) | (?=\n) | \Z )
      | (?! (?: null | None ) (?: [\s,&})\]] | \Z ) )
        (?: (?: bearer | basic | digest | token ) \s+ )? [^\s"',;&{}()\[\]]+ )
    """,
    re.IGNORECASE | re.VERBOSE,
)


def mask_account_number(account_number: str) -> str:
    """An account number for places that others may see: its last four characters at most."""
    shown = account_number[-4:] if len(account_number) > 4 else ""  # noqa: PLR2004  # the usual
    return "*" * (len(account_number) - len(shown)) + shown


def redact_aggressively(text: str, *known: str) -> str:
    """The text with everything masked that is, or looks like, a token, a key or a password.

    `known` are secrets that are masked wherever they stand, if they have four characters or more.
    The rest is told by its form: PEM blocks, tokens of Tiger's and JWTs, Bearer credentials, values
    under names such as `token` or `Authorization`, API keys of ours, and runs of 40 or more letters
    and digits that are no words.
    """
    forms = {form for secret in known if len(secret) >= _SHORTEST for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, MASK)
    for secret in (_PEM, _TIGER_TOKEN, _JWT):
        text = secret.sub(MASK, text)
    text = _API_KEY.sub(rf"\1_{MASK}", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _LINES.sub(_without_random, text)
    text = _RANDOM.sub(_without_random, text)
    return _NAMED.sub(_without_value, text)


def _forms(secret: str) -> set[str]:
    """A secret as it is, in JSON, in Python's `repr`, and in a URL."""
    return {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe="")}


def _without_value(match: re.Match[str]) -> str:
    mark = match["quote"] or ""
    return f"{match['name']}{match['between']}{mark}{MASK}{mark}"


def _without_random(match: re.Match[str]) -> str:
    """Paths, class names and UUIDs stay; what has neither words nor separators does not."""
    run = match[0]
    parts = _SEPARATORS.split(run)
    if all(map(_WORDS.fullmatch, parts)):
        return run
    mixed = re.search("[a-z]", run) and re.search("[A-Z]", run)
    return MASK if mixed or len(parts) == 1 else run


# Secrets by name

_SECRET_WORDS = {
    "token", "secret", "password", "passwd", "pwd", "passphrase", "authorization", "credential",
    "privatekey", "apikey", "accesskey", "signingkey", "encryptionkey", "cookie",
}  # fmt: skip
_SECRET_NAMES = {"sign", "signature", "pin", "otp", "pepper"}
# Those that `_NAMED` lacks, as they may stand in a text.
_ASSIGNED = {"cookie", "access[_-]?key", "signing[_-]?key", "encryption[_-]?key"}
_HARMLESS = {
    "id", "ids", "prefix", "hash", "fingerprint", "expiresat", "expiry", "expiration", "expires",
    "type", "count", "name", "status", "format", "at", "url", "scope", "scopes", "version",
    "refreshid", "length",
}  # fmt: skip
_PASSWORDS = re.compile("passw|pwd|passphrase")  # whose hashes can be guessed from
_NAME_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+|\d+")
_LONGEST_NAME = 100  # characters of one that is remembered

_BASE64 = r"(?:[A-Za-z0-9+/]|\\/)"
# Also in lines; the last one of these may be short.
_DER = re.compile(
    rf"(?<![A-Za-z0-9+])MII{_BASE64}{{27,}}+(?:(?:\s|\\+[rnt])+{_BASE64}{{30,}}+)*+"
    rf"(?:(?:\r?\n|(?:\\+r)?\\+n)[ \t]*{_BASE64}+)?={{0,2}}"
)
_SHORTEST_DER = 100  # characters of base64
_SHORTEST_TIGER_TOKEN = 19  # characters that tell one


def is_secret_name(name: str) -> bool:
    """Whether what bears this name, in any spelling of it, is a secret.

    `accessToken` and `X-API-Key` are such names; `token_expires_at` and `api_key_id`, which tell
    about a secret, are not.
    """
    return _is_secret(name) if len(name) <= _LONGEST_NAME else _is_secret.__wrapped__(name)


def add_secret_names(*names: str) -> None:
    """Have what bears a name that contains one of these masked, in this process, from now on.

    Spelling does not matter: `tradePin`, `trade_pin` and `TRADE-PIN` are one name.

    Raises:
        ValueError: a name has no letter or digit.
    """
    added = [_words(name) for name in names]
    if [] in added:
        raise ValueError("a secret's name must have a letter or a digit")
    _SECRET_WORDS.update(map("".join, added))
    _ASSIGNED.update(map("[_-]?".join, added))
    _is_secret.cache_clear()
    _assignments.cache_clear()


def redact_known(text: str) -> str:
    """The text without what is a secret beyond doubt; long random text, as digests are, stays.

    Masked are PEM blocks and bare base64 of private keys, tokens of Tiger's, JWTs, Bearer
    credentials, API keys of ours, and values after a secret's name: `password=…`.
    """
    # Most texts hold nothing: what is cheap to see comes first.
    if "-----BEGIN" in text:
        text = _PEM.sub(MASK, text)
    if len(text) >= _SHORTEST_TIGER_TOKEN:
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
    """The words of a name in any style: `APIKeyId` as well as `api-key id`."""
    return [word.lower() for word in _NAME_WORDS.findall(name)]


@cache
def _assignments() -> re.Pattern[str]:
    """As `_NAMED`, with all names of secrets."""
    names = " | ".join(["| credential", *sorted(_ASSIGNED)])
    exact = " | ".join(["| sign (?: ature )?", *sorted(_SECRET_NAMES)])
    pattern = _NAMED.pattern.replace("| credential", names)
    return re.compile(pattern.replace("| sign (?: ature )?", exact), _NAMED.flags)


def _without_der(match: re.Match[str]) -> str:
    return MASK if len(re.sub(r"\s|\\+[rnt]?", "", match[0])) >= _SHORTEST_DER else match[0]

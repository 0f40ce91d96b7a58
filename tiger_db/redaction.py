"""What others may see of texts that can hold secrets: errors, logs, account numbers."""

import json
import re
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


def masked(account_number: str) -> str:
    """An account number for places that others may see: its last four characters at most."""
    shown = account_number[-4:] if len(account_number) > 4 else ""  # noqa: PLR2004  # the usual
    return "*" * (len(account_number) - len(shown)) + shown


def redact(text: str, *known: str) -> str:
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

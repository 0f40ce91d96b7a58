"""What others may see of texts that can hold secrets: errors, logs, account numbers."""

import re

MASK = "**********"
_SHORTEST = 4  # characters of a known secret; a shorter one would mask parts of common words

_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[^\s'\",;]+", re.IGNORECASE)
# `name=value`, `"name": "value"` and the like, where the name tells that the value is a secret.
_NAMED = re.compile(
    r"""
    (?<![\w-])
    (?P<name> [\w-]* (?: token | secret | passw(?:or)?d | passphrase | authorization | credential
                       | private_?key(?:_pk[18])? | api[_-]?key | secret_?key )
            | sign (?: ature )? )
    (?P<between> \\?["']? \s* [:=] \s* )
    (?: (?P<quote> \\?["'] ) .*? (?: (?P=quote) | (?=\n) | \Z ) | [^\s"',;&{}()\[\]]+ )
    """,
    re.IGNORECASE | re.VERBOSE,
)
_API_KEY = re.compile(r"\b(tdb_[0-9a-f]{16})_[0-9A-Za-z]+")
# As long as Tiger's tokens, which are 60 characters of base64, keys, signatures and digests.
_RANDOM = re.compile(r"[A-Za-z0-9+/_-]{40,}={0,2}")


def masked(account_number: str) -> str:
    """An account number for places that others may see: its last four characters at most."""
    shown = account_number[-4:] if len(account_number) > 4 else ""  # noqa: PLR2004  # the usual
    return "*" * (len(account_number) - len(shown)) + shown


def redact(text: str, *known: str) -> str:
    """The text with everything masked that is, or looks like, a token, a key or a password.

    `known` are secrets that are masked wherever they stand. The rest is told by its form: PEM
    blocks, Bearer credentials, values under names such as `token` or `Authorization`, API keys of
    ours, and runs of 40 or more random-looking letters and digits (Tiger's tokens have 60).
    """
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, MASK)
    text = _PEM.sub(MASK, text)
    text = _API_KEY.sub(rf"\1_{MASK}", text)
    text = _BEARER.sub(rf"\1 {MASK}", text)
    text = _RANDOM.sub(_without_random, text)
    return _NAMED.sub(_without_value, text)


def _without_value(match: re.Match[str]) -> str:
    quote = match["quote"] or ""
    return f"{match['name']}{match['between']}{quote}{MASK}{quote}"


def _without_random(match: re.Match[str]) -> str:
    """Paths and words have no digits and capitals among them; digests are all hexadecimal."""
    run = match[0]
    mixed = re.search("[a-z]", run) and re.search("[A-Z]", run) and re.search("[0-9]", run)
    return MASK if mixed or re.fullmatch("[0-9a-fA-F]+", run) else run

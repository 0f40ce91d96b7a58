"""Functions that read and format the properties files of Tiger's SDKs."""

import re
from collections.abc import Mapping
from pathlib import Path

import javaproperties

from tiger_db.encryption import Secret
from tiger_db.errors import InvalidValue
from tiger_db.models import TigerAccount

CONFIG_FILE = "tiger_openapi_config.properties"
TOKEN_FILE = "tiger_openapi_token.properties"  # noqa: S105  # a file name
# The SDK reads the private key from the first non-empty property in PRIVATE_KEY_PROPERTIES.
PRIVATE_KEY_PROPERTIES = ("private_key", "private_key_pk8", "private_key_pk1")
# FIELD_PROPERTIES maps each field of TigerAccount to the property that has the field's value.
FIELD_PROPERTIES = {
    "tiger_id": "tiger_id",
    "account_number": "account",
    "license": "license",
    "environment": "env",
    "secret_key": "secret_key",
    "server_url": "server_url",
    "access_token": "token",
}
# Properties whose values are stored unchanged in `TigerAccount.client_options`.
CLIENT_OPTIONS = (
    "timeout", "token_refresh_duration", "socket_host_port", "timezone", "language",
    "use_full_tick",
)  # fmt: skip

_MAX_FILE_BYTES = 1_000_000
_BLANKS = " \t\f"  # white space at the start of a line, in properties files
_PEM_BEGIN = re.compile("-----BEGIN [A-Z ]+-----")
# `_MUST_ESCAPE` matches the characters that must be escaped in the value of a property. `=` and `:`
# are not escaped, because some parsers of Tiger's files do not decode escapes of `=` and `:`.
_MUST_ESCAPE = re.compile(r"\A |[\x00-\x1f\x7f-\x9f\u2028\u2029\\]")


def read_properties(path: Path) -> dict[str, str]:
    """Read a properties file. Strip whitespace from values, and omit properties without a value.

    A value can be a PEM block of several lines. The file can begin with a byte order mark.

    Raises:
        InvalidValue: the file is unreadable, too large, not UTF-8 or not a properties file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise InvalidValue(f"{path}: the file is too large for a properties file of Tiger")
        text = content.decode("utf-8-sig")
        values = javaproperties.loads(_join_lines(_escape_line_ends(text)))
    except OSError as error:
        raise InvalidValue(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidValue(f"{path}: the file is not UTF-8 text") from None
    except javaproperties.InvalidUEscapeError:
        raise InvalidValue(f"{path}: the file has a malformed \\u escape") from None
    return {key: value.strip() for key, value in values.items() if value.strip()}


def format_properties(values: Mapping[str, str | None]) -> str:
    """Format the text of a properties file. Omit properties without a value."""
    return "".join(
        f"{key}={_MUST_ESCAPE.sub(lambda found: javaproperties.escape(found[0]), value)}\n"
        for key, value in values.items()
        if value and value.strip()
    )


def client_option(account: TigerAccount, name: str) -> str:
    """Return an option of the account's `client_options` as text, or "" for an unset option."""
    value = account.client_options.get(name)
    return "" if value is None else str(value).strip()


def plaintext(secret: Secret | None) -> str:
    """Return the text of a secret, or an empty string for None."""
    return "" if secret is None else secret.get_secret_value()


def _escape_line_ends(text: str) -> str:
    """Escape the line ends in PEM blocks, so that each block is the value of one property."""
    parts, position = [], 0
    while begin := _PEM_BEGIN.search(text, position):
        end = text.find("-----END ", begin.end())
        if end < 0:
            break
        block = text[begin.start() : end].replace("\r", "").replace("\n", "\\n")
        parts += [text[position : begin.start()], block]
        position = end
    return "".join([*parts, text[position:]])


def _join_lines(text: str) -> str:
    """Join each line that ends with a backslash to the next line, and omit comments.

    javaproperties joins lines too, but the time that javaproperties takes grows with the square of
    the number of lines.
    """
    joined: list[str] = []
    parts: list[str] = []
    for line in re.split("\r\n|\r|\n", text):
        if not parts and line.lstrip(_BLANKS).startswith(("#", "!")):
            continue
        continued = (len(line) - len(line.rstrip("\\"))) % 2 == 1
        start = line.lstrip(_BLANKS)
        parts.append(start[:-1] if continued else start)
        if not continued:
            joined.append(_unless_comment("".join(parts)))
            parts = []
    return "\n".join([*joined, _unless_comment("".join(parts))])


def _unless_comment(line: str) -> str:
    """Escape the first character of a property that would otherwise be a comment."""
    return f"\\{line}" if line.startswith(("#", "!")) else line

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
_PEM_BLOCK = re.compile(r"-----BEGIN [A-Z ]+-----.*?-----END ", re.DOTALL)
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
        values = javaproperties.loads(_PEM_BLOCK.sub(_escape_line_ends, text))
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


def _escape_line_ends(block: re.Match[str]) -> str:
    return block[0].replace("\r", "").replace("\n", "\\n")

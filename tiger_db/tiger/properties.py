"""Tiger's properties files: what their lines are called, and how they are read and written."""

import re
from collections.abc import Mapping
from pathlib import Path

import javaproperties

from tiger_db.encryption import Secret
from tiger_db.errors import InvalidValue
from tiger_db.models import TigerAccount

CONFIG_FILE = "tiger_openapi_config.properties"
TOKEN_FILE = "tiger_openapi_token.properties"  # noqa: S105  # a name
# The private key's lines, in the order in which the SDK prefers them.
KEY_LINES = ("private_key", "private_key_pk8", "private_key_pk1")
# An account's fields, and their lines.
LINES = {
    "tiger_id": "tiger_id",
    "account_number": "account",
    "license": "license",
    "environment": "env",
    "secret_key": "secret_key",
    "server_url": "server_url",
    "access_token": "token",
}
# Lines that are kept as they stand, in `client_options`.
OPTIONS = (
    "timeout", "token_refresh_duration", "socket_host_port", "timezone", "language",
    "use_full_tick",
)  # fmt: skip

_LIMIT = 1_000_000  # bytes of a file
# Pasted as it is, although only its first line would belong to the key before it.
_PEM = re.compile(r"-----BEGIN [A-Z ]+-----.*?-----END ", re.DOTALL)
# What a reader would take for something else. `=` and `:` in a value are not: Tiger's own files
# have them as they are, and simple readers stumble over escaped ones.
_MISREAD = re.compile(r"\A |[\x00-\x1f\x7f-\x9f\u2028\u2029\\]")


def read_properties(path: Path) -> dict[str, str]:
    """The values in a file by their keys, without the spaces around them and without empty ones.

    A PEM block may stand there in lines of its own, and a byte order mark before everything.

    Raises:
        InvalidValue: it cannot be read, is no UTF-8 text or no properties; names the file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LIMIT + 1)
        if len(content) > _LIMIT:
            raise InvalidValue(f"{path}: is too large to be one of Tiger's files")
        text = content.decode("utf-8-sig")
        values = javaproperties.loads(_PEM.sub(_in_one_line, text))
    except OSError as error:
        raise InvalidValue(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidValue(f"{path}: is not UTF-8 text") from None
    except javaproperties.InvalidUEscapeError:
        raise InvalidValue(f"{path}: has a malformed \\u escape") from None
    return {key: value.strip() for key, value in values.items() if value.strip()}


def properties(values: Mapping[str, str | None]) -> str:
    """The text of a file with these values, a line each; empty ones are left out."""
    return "".join(
        f"{key}={_MISREAD.sub(lambda found: javaproperties.escape(found[0]), value)}\n"
        for key, value in values.items()
        if value and value.strip()
    )


def option(account: TigerAccount, name: str) -> str:
    """One of the `client_options` as a file has it; empty: there is none."""
    value = account.client_options.get(name)
    return "" if value is None else str(value).strip()


def plain(secret: Secret | None) -> str:
    return "" if secret is None else secret.get_secret_value()


def _in_one_line(block: re.Match[str]) -> str:
    return block[0].replace("\r", "").replace("\n", "\\n")

"""Files of passwords in the format of libpq's ~/.pgpass, which a `DATABASE_URL` can name.

asyncpg's own reader is not used, because asyncpg would prefer the variable PGPASSWORD to the file.
https://www.postgresql.org/docs/current/libpq-pgpass.html
"""

import os
import re
import stat
from pathlib import Path

from tiger_db.errors import ConfigurationError
from tiger_db.files import HAS_FILE_MODES
from tiger_db.redaction import add_known_secrets
from tiger_db.tracebacks import forgets_locals

_FIELD = r"((?:\\.|[^\\:])*)"  # a backslash escapes a colon or a backslash
_LINE = f"{_FIELD}:{_FIELD}:{_FIELD}:{_FIELD}:(.*)"


@forgets_locals
def find_password(file: Path, host: str, port: int, database: str, user: str) -> str:
    """Return the password of the first line that matches, or an empty text.

    As in libpq, a socket folder matches the host `localhost`.

    Raises:
        ConfigurationError: the file cannot be read, or other users can access the file.
    """
    wanted = ("localhost" if host.startswith("/") else host, str(port), database, user)
    try:
        with file.open(encoding="utf-8") as lines:
            mode = os.fstat(lines.fileno()).st_mode
            if HAS_FILE_MODES and stat.S_IMODE(mode) & 0o077:
                raise ConfigurationError(
                    "DATABASE_URL: passfile can be accessed by other users: run `chmod 600` on the"
                    " file"
                )
            for line in lines:
                found = None if line.startswith("#") else re.fullmatch(_LINE, line.rstrip("\r\n"))
                if found is None:
                    continue
                *fields, password = (re.sub(r"\\(.)", r"\1", text) for text in found.groups())
                if all(text in (value, "*") for text, value in zip(fields, wanted, strict=True)):
                    add_known_secrets(password)
                    return password
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the file is not UTF-8 text"
        raise ConfigurationError(f"DATABASE_URL: passfile cannot be read: {reason}") from None
    return ""

"""Properties files with test keys and tokens."""

import base64
import stat
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat

from tests.support import factories
from tests.support.private_keys import NO_PASSWORD, der
from tiger_db import PrivateKeyFormat
from tiger_db.database import AsyncSession
from tiger_db.tiger import CONFIG_FILE

PK1, PK8 = der(PrivateKeyFormat.PK1), der(PrivateKeyFormat.PK8)
OTHER = base64.b64encode(
    rsa.generate_private_key(65537, 1024).private_bytes(
        Encoding.DER, PrivateFormat.PKCS8, NO_PASSWORD
    )
).decode()
NUMBER = "51230321"
REQUIRED = {"tiger_id": "20150001", "account": NUMBER, "private_key_pk8": PK8}
EVERYTHING = {
    "private_key_pk1": PK1,
    "private_key_pk8": PK8,
    "tiger_id": "20150001",
    "account": NUMBER,
    "license": "TBHK",
    "env": "PROD",
    "secret_key": "s3cret=:#!",
    "server_url": "https://openapi.example.com:8443/gateway",
    "timeout": "20",
    "token_refresh_duration": "86400",
    "socket_host_port": "ssl,openapi.example.com,9883",
    "timezone": "Asia/Hong_Kong",
    "language": "zh_CN",
    "use_full_tick": "true",
}
OPTIONS = [*EVERYTHING][-6:]


def token(made: datetime, good_for: timedelta = timedelta(days=15)) -> str:
    """Make a token in Tiger's format."""
    stamps = ",".join(str(int(time.timestamp() * 1000)) for time in (made, made + good_for))
    return base64.b64encode(stamps.encode() + b"0123456789abcdef").decode()


OLD, NEW = token(datetime(2026, 1, 1, tzinfo=UTC)), token(datetime(2026, 2, 1, tzinfo=UTC))


def config(folder: Path, lines: Mapping[str, str | None], name: str = CONFIG_FILE) -> Path:
    """Write a file with these lines, without those that are None."""
    path = folder / name
    given = [f"{key}={value}\n" for key, value in lines.items() if value is not None]
    path.write_text("".join(given), encoding="utf-8", newline="")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


async def actions(session: AsyncSession) -> list[str]:
    return [event.action for event in await factories.events(session)]

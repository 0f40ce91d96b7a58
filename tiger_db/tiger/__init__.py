"""Tiger's Open API: import and export of accounts, configuration of the SDK, token refreshes."""

from tiger_db.models.private_keys import parse_private_key
from tiger_db.tiger.exporting import export_account
from tiger_db.tiger.importing import Imported, import_account
from tiger_db.tiger.properties import CONFIG_FILE, TOKEN_FILE
from tiger_db.tiger.refreshing import refresh_token
from tiger_db.tiger.sdk import client_config

__all__ = [
    "CONFIG_FILE",
    "TOKEN_FILE",
    "Imported",
    "client_config",
    "export_account",
    "import_account",
    "parse_private_key",
    "refresh_token",
]

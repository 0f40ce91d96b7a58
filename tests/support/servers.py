"""Settings of databases on the server of the run, with keys that are the same in each run."""

from tiger_db import Settings
from tiger_db.testing import databases, servers

# What makes settings of that server those of production: it may be on another machine.
PRODUCTION = {"environment": "production", "db_allow_unverified_tls": True}
OPTIONS: dict[str, object] = {
    "encryption_keys": "test:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=:v2",
    "api_key_peppers": "test:ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=",
    "db_pool_size": 5,
    "db_max_overflow": 40,
}


def settings_for(url: str, database: str) -> Settings:
    """Settings of one database of the server."""
    return servers.settings_for(url, database, **OPTIONS)


async def create_database(url: str, name: str, template: str | None = None) -> Settings:
    await databases.create(url, name, template)
    return settings_for(url, name)

"""A server for one test module, and databases on it."""

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.servers import settings_for
from tiger_db import Settings, embedded
from tiger_db.connections import connect
from tiger_db.testing import servers


@contextmanager
def server() -> Iterator[Settings]:
    """A server of these tests' own, which a `Database` does not start by itself."""
    home = servers.short_folder()
    settings = Settings(tiger_db_home=home / "home")
    place = embedded.start(settings).folder
    try:
        yield settings
    finally:
        embedded.stop(settings)
        for folder in (home, place):
            shutil.rmtree(folder, ignore_errors=True)


async def new_database(server: Settings) -> Settings:
    started = embedded.start(server)
    name = f"private_{random.randrange(10**9)}"
    connection = await connect(server, database="postgres")
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    password = started.connect_args(server)["password"].get_secret_value()
    url = f"postgresql://tiger_db:{password}@/?host={started.socket_folder}"
    return settings_for(url, name)

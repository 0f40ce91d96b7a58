"""Accounts for tests of the command line."""

import asyncio

from tests.support.command_line import CommandLine, Result
from tiger_db import Database, Settings, TigerAccount, crud

NUMBER = "51230321"
PAPER = "20191106192858300"
REQUIRED = ("--account-name", "Main", "--tiger-id", "20150001")


def create(cli: CommandLine, number: str = NUMBER, *options: str, **more: str) -> Result:
    options = (*REQUIRED, "--account-number", number, *options)
    if not any(option.startswith("--private-key") for option in options):
        options = (*options, "--private-key", "test_key")
    return cli.ok("create-account", *options, **more)


def stored(cli: CommandLine, number: str = NUMBER) -> TigerAccount:
    """Read an account with the library."""

    async def read() -> TigerAccount:
        settings = Settings(
            database_url=cli.env["DATABASE_URL"], encryption_keys=cli.env["ENCRYPTION_KEYS"]
        )
        async with Database(settings) as database, database.session() as session:
            account = await crud.accounts.get_by_account_number(session, number)
            assert account is not None
            return account

    return asyncio.run(read())

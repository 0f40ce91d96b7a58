"""Functions that run commands: settings, event loop, sessions, look-ups and error messages."""

import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import tiger_db
from tiger_db.cli import options
from tiger_db.errors import NotFound

if TYPE_CHECKING:
    from tiger_db.database import AsyncSession

T = TypeVar("T")
SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)
# `actor_name` is the value of --actor, or None if the actor is the operating system's user.
actor_name: ContextVar[str | None] = ContextVar("actor_name", default=None)


def settings() -> "tiger_db.Settings":
    """Read the settings from the environment. If DB_DEBUG is set, log SQL statements to stderr."""
    found = tiger_db.Settings()
    logger = logging.getLogger("sqlalchemy.engine.Engine")
    # If the logger sqlalchemy.engine.Engine has no handler, SQLAlchemy adds a handler that writes
    # to stdout.
    if found.db_debug and not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    return found


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop, and return the result of the coroutine.

    SIGTERM cancels the coroutine, so that the coroutine can close its connections.
    """
    import asyncio  # noqa: PLC0415  # slow import, not needed by `--help`

    async def run() -> T:
        task = asyncio.current_task()
        assert task is not None
        if threading.current_thread() is threading.main_thread():  # Python refuses other threads
            on_signal(signal.SIGTERM, task.cancel)
        return await coroutine

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        raise SystemExit(SIGTERM_EXIT_CODE) from None
    finally:
        exit_on_sigterm()  # the end of the event loop has removed the handler


def on_signal(number: int, callback: Callable[[], object]) -> None:
    """Call a function in the running event loop when the process receives a signal."""
    import asyncio  # noqa: PLC0415  # slow import, not needed by `--help`

    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(number, callback)
    except NotImplementedError:  # the event loops of Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(callback))


def exit_on_sigterm() -> None:
    """Exit the process after SIGTERM, even with the process id 1, such as in a container.

    Without a handler, a process with the id 1 ignores SIGTERM.
    """

    def end(_number: int, _frame: object) -> None:
        raise SystemExit(SIGTERM_EXIT_CODE)

    if threading.current_thread() is threading.main_thread():  # Python refuses other threads
        signal.signal(signal.SIGTERM, end)


def with_database(work: "Callable[[tiger_db.Database], Awaitable[T]]") -> T:
    """Run an async function with an open Database, and with the actor that --actor names."""

    async def run() -> T:
        actor = tiger_db.Actor(user_id=actor_name.get() or _system_user(), user_type="cli")
        with tiger_db.acting_as(actor):
            async with tiger_db.Database(settings()) as database:
                return await work(database)

    return run_async(run())


def _system_user() -> str:
    """Return the name or the number of the operating system's user who runs this process.

    Environment variables are not read, because the user can change environment variables.
    """
    try:
        import pwd  # noqa: PLC0415  # missing on Windows
    except ModuleNotFoundError:
        return os.getlogin()  # unlike on other systems, Windows needs no terminal for this
    number = os.getuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # in a container, the user may have a number but no name
        return str(number)


def in_transaction(work: "Callable[[AsyncSession], Awaitable[T]]") -> T:
    """Run an async function in a database session, and commit the session's transaction."""

    async def run(database: "tiger_db.Database") -> T:
        async with database.session() as session:
            return await work(session)

    return with_database(run)


async def find_account(session: "AsyncSession", number_or_id: str) -> "tiger_db.TigerAccount":
    if account_id := parse_uuid(number_or_id):
        account = await tiger_db.crud.accounts.get(session, account_id)
    else:
        account = await tiger_db.crud.accounts.get_by_account_number(session, number_or_id)
    if account is None:
        raise NotFound("there is no account with this number or id")
    return account


async def find_accounts(
    session: "AsyncSession", numbers_or_ids: str | None
) -> "list[tiger_db.TigerAccount]":
    """Return the accounts with the given numbers or ids, which commas separate."""
    return [await find_account(session, text) for text in options.split_words(numbers_or_ids)]


async def find_api_key(session: "AsyncSession", prefix_or_id: str) -> "tiger_db.APIKey":
    if key_id := parse_uuid(prefix_or_id):
        key = await tiger_db.crud.api_keys.get(session, key_id)
    else:
        key = await tiger_db.crud.api_keys.get_by_prefix(session, prefix_or_id)
    if key is None:
        # The message omits `prefix_or_id`, because the user may have passed a whole API key.
        message = "there is no API key with this prefix or id"
        if re.fullmatch(tiger_db.crud.api_keys.KEY_PATTERN, prefix_or_id.strip(), re.ASCII):
            message += (
                ": you gave a whole API key. Give only the prefix: the part of the API key before"
                " the last underscore. To revoke a leaked API key by the whole key, use"
                " `tiger-db revoke-api-key --raw`"
            )
        raise NotFound(message)
    return key


async def account_numbers(
    session: "AsyncSession", ids: Iterable[UUID | None]
) -> dict[UUID | None, str]:
    """Map account ids to account numbers, or to the ids as text if the accounts were deleted."""
    from sqlalchemy import ARRAY, Uuid, any_, literal, select  # noqa: PLC0415  # slow import, not needed by `--help`
    from sqlmodel import col  # noqa: PLC0415  # slow import, not needed by `--help`

    numbers: dict[UUID | None, str] = {
        account_id: str(account_id) for account_id in ids if account_id is not None
    }
    rows = await session.execute(
        select(col(tiger_db.TigerAccount.id), col(tiger_db.TigerAccount.account_number)).where(
            # Each item of IN would be a parameter, of which a statement can have at most 32,767.
            col(tiger_db.TigerAccount.id) == any_(literal([*numbers], ARRAY(Uuid)))
        )
    )
    return {**numbers, **{row.id: row.account_number for row in rows}}


def parse_uuid(text: str) -> UUID | None:
    """Return the UUID in a text, or None if the text is not a UUID with four hyphens.

    A text without hyphens may be an account number, because account numbers can have 32 digits.
    """
    return UUID(text) if _UUID.fullmatch(text) else None


def describe_error(error: Exception) -> str:
    """Describe an error in one line.

    For an unexpected error, omit the error's message, because the message may contain secrets.
    """
    from pydantic import ValidationError  # noqa: PLC0415  # slow import, not needed by `--help`

    from tiger_db.connections.error_advice import explain  # noqa: PLC0415  # slow import, not needed by `--help`

    if isinstance(error, ValidationError):  # the message of InvalidFields has several lines
        return "; ".join(
            f"--{str(problem['loc'][0]).replace('_', '-')}: " * bool(problem["loc"])
            + problem["msg"].removeprefix("Value error, ")
            for problem in error.errors(include_url=False, include_input=False)
        )
    if explanation := explain(error):
        return explanation
    if os.environ.get("DB_DEBUG", "").lower() in ("1", "true", "yes", "on"):
        sys.stderr.writelines(
            traceback.format_tb(error.__traceback__)
        )  # a traceback has source lines, but no values of variables
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"unexpected {type(error).__name__} in {os.path.basename(frame.filename)}:{frame.lineno}:"  # noqa: PTH119  # a file name
        " run the command again with DB_DEBUG=1, and report this error with the output"
    )

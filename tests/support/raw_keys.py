"""Raw API keys: with a wrong secret, or unknown."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import event

from tests.support.recording import recorded
from tiger_db import Database
from tiger_db.crud.api_keys import key_format


def with_checksum(head: str) -> str:
    """Return a text with the checksum of an API key."""
    return head + key_format.checksum(head)


def wrong_secret(raw_key: str) -> str:
    """Return a well-formed key with the same public id and another secret."""
    head = raw_key[:-6]
    return with_checksum(head[:-1] + ("0" if head[-1] != "0" else "1"))


def unknown_key() -> str:
    """Return a well-formed key that is not stored."""
    return key_format.new_key("test").raw_key


@contextmanager
def sent_statements(database: Database) -> Iterator[list[str]]:
    """Record the statements of sessions, and the statements and checkouts out of band.

    Events are stored without SQLAlchemy: of them, only the checkout is recorded.
    """
    sent: list[str] = []

    def record(connection: object, cursor: object, statement: str, *rest: object) -> None:
        sent.append(statement)

    def take(*rest: object) -> None:
        sent.append("a connection")

    out_of_band = database.out_of_band.engine.sync_engine
    event.listen(out_of_band, "before_cursor_execute", record)
    event.listen(out_of_band, "checkout", take)
    try:
        with recorded(database) as statements:
            yield sent
        sent += statements
    finally:
        event.remove(out_of_band, "before_cursor_execute", record)
        event.remove(out_of_band, "checkout", take)

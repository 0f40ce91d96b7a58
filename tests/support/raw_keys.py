"""API keys as text: good ones, wrong ones, unknown ones."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import event

from tests.support.recording import recorded
from tiger_db import Database
from tiger_db.crud.api_keys import key_format


def sealed(head: str) -> str:
    """A key of anybody's making: what is before the checksum, and the right checksum."""
    return head + key_format.checksum(head)


def wrong_secret(raw_key: str) -> str:
    """Well-formed, of the same id, and one character beside the key."""
    head = raw_key[:-6]
    return sealed(head[:-1] + ("0" if head[-1] != "0" else "1"))


def unknown_key() -> str:
    """Well-formed, and nobody's."""
    return key_format.new_key("test").raw_key


@contextmanager
def asked(database: Database) -> Iterator[list[str]]:
    """The statements of sessions and what is sent out of band; there, connections taken.

    Events go past SQLAlchemy: of them, only the connection shows.
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

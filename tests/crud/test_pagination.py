"""Pages, cursors and limits of all lists."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import factories
from tests.support.lists import ACCOUNT, LEAK, LISTS, cursor_of, one_row_for
from tests.support.recording import recorded
from tiger_db import AuditLog, Database, Page, crud
from tiger_db.crud.pagination import decode_cursor, encode_cursor
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidCursor, InvalidValue

LIMITED: dict[str, Callable[..., Awaitable[object]]] = {
    **LISTS,
    "get_accounts_needing_token_refresh": crud.accounts.get_accounts_needing_token_refresh,
    "schedule_due": crud.token_status.schedule_due,
    "claim_due": lambda s, **p: crud.token_status.claim_due(s, worker="w", **p),
}


async def all_pages(session: AsyncSession, name: str, limit: int) -> list[Page[Any]]:
    pages = [await LISTS[name](session, limit=limit)]
    while (cursor := pages[-1].next_cursor) is not None and len(pages) < 10:
        pages.append(await LISTS[name](session, after=cursor, limit=limit))
    return pages


@pytest.mark.parametrize("name", LISTS)
async def test_pages_contain_every_row_once_newest_first(session: AsyncSession, name: str) -> None:
    assert (await LISTS[name](session)).items == []
    if "account" in name and name != "list_accounts":
        await factories.account_with_token(session, id=ACCOUNT)
    rows = [(await one_row_for(name, session)).id for _ in range(7)]
    for limit in (1, 3, 7, 8):
        pages = await all_pages(session, name, limit)
        sizes = [len(page) for page in pages]
        assert sizes == [limit] * (7 // limit) + ([7 % limit] if 7 % limit else [])
        assert [row.id for page in pages for row in page] == rows[::-1]


async def test_concurrent_inserts_neither_repeat_nor_skip_rows(clone: Database) -> None:
    async with clone.session() as session:
        await crud.audit_logs.log_events(session, (AuditLog(action=LEAK) for _ in range(300)))
    written = asyncio.Semaphore(0)

    async def write() -> None:
        while True:
            async with clone.session() as session:
                await crud.audit_logs.log_event(session, action=LEAK)
            written.release()

    seen: list[UUID] = []
    async with clone.session() as session:
        before = {event.id for event in await factories.events(session)}
    writers = [asyncio.create_task(write()) for _ in range(3)]
    cursor = None
    while True:
        await written.acquire()  # at least one insert before each page
        async with clone.session() as session:
            page = await crud.audit_logs.get_recent_events(session, after=cursor, limit=20)
        seen += [event.id for event in page]
        if (cursor := page.next_cursor) is None or len(seen) > 1000:
            break
    for writer in writers:
        writer.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    assert seen == sorted(set(seen), reverse=True)
    assert before <= set(seen)


# Cursors


NAMES = ["tiger_accounts", "api_keys", "audit_logs", "token_statuses", "expiring_api_keys"]


@given(name=st.sampled_from(NAMES), row_id=st.uuids())
@example(name="api_keys", row_id=UUID(int=0))
@example(name="api_keys", row_id=UUID(int=2**128 - 1))
def test_a_cursor_decodes_to_its_row_id_in_its_list_only(name: str, row_id: UUID) -> None:
    cursor = encode_cursor(name, row_id)
    assert decode_cursor(name, cursor) == row_id
    assert cursor.isascii()
    assert str(row_id) not in cursor
    for other in NAMES:
        if other != name:
            with pytest.raises(InvalidCursor):
                decode_cursor(other, cursor)


@pytest.mark.parametrize("name", LISTS)
async def test_a_list_refuses_the_cursor_of_another_list(session: AsyncSession, name: str) -> None:
    own = cursor_of(name, ACCOUNT)
    await LISTS[name](session, after=own)
    for cursor in {cursor_of(other, ACCOUNT) for other in LISTS} - {own}:
        with pytest.raises(InvalidCursor):
            await LISTS[name](session, after=cursor)


def malformed(cursor: object) -> bool:
    if not isinstance(cursor, str):
        return True
    try:
        content = base64.urlsafe_b64decode(f"{cursor}==".encode())
    except ValueError:
        return True
    named = any(
        len(content) == len(name) + 16 and content.startswith(name.encode()) for name in NAMES
    )
    return not named or base64.urlsafe_b64encode(content).decode().rstrip("=") != cursor


nearly = st.builds(encode_cursor, st.sampled_from(NAMES), st.uuids())
cursors: st.SearchStrategy[object] = (
    st.text()
    | st.from_regex(r"[\w-]{20,24}={0,2}", fullmatch=True)
    | st.builds(lambda c, n, x: c[:n] + x + c[n + 1 :], nearly, st.integers(0, 22), st.characters())
    | nearly.map(lambda cursor: f"{cursor}==")
    | nearly.map(str.encode)
    | st.uuids()
    | st.integers()
)


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cursor=cursors.filter(malformed))
@example(cursor="")
@example(cursor="A" * 21 + "B")  # unused bits of the last character are set
@example(cursor=encode_cursor("api_keys", uuid4()) + "\n")
@example(cursor="' OR true --")
async def test_a_malformed_cursor_raises_invalid_cursor_without_a_query(
    database: Database, cursor: Any
) -> None:
    with recorded(database) as sent:
        async with database.session() as session:
            for list_ in LISTS.values():
                with pytest.raises(InvalidCursor, match="pass the next_cursor of a page"):
                    await list_(session, after=cursor)
    assert sent == []


@pytest.mark.parametrize("name", LISTS)
async def test_the_cursor_of_a_deleted_row_is_valid(session: AsyncSession, name: str) -> None:
    assert (await LISTS[name](session, after=cursor_of(name, uuid4()))).items == []


@pytest.mark.parametrize("name", LIMITED)
async def test_a_limit_is_from_1_to_1000(session: AsyncSession, name: str) -> None:
    for limit in (1, 1000):
        await LIMITED[name](session, limit=limit)
    for wrong in (0, -1, 1001, True, 1.5, "5", None):
        with pytest.raises(InvalidValue, match="limit"):
            await LIMITED[name](session, limit=wrong)

"""Pages, cursors and limits of all lists."""

import asyncio
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import factories
from tests.support.lists import ACCOUNT, LEAK, LISTS, cursor_of, one_row_for
from tests.support.recording import recorded
from tiger_db import AccountStatus, AuditLog, Database, Page, crud
from tiger_db.crud.accounts.queries import ACCOUNTS
from tiger_db.crud.api_keys.queries import API_KEYS, EXPIRING_API_KEYS
from tiger_db.crud.audit_logs.queries import EVENTS
from tiger_db.crud.pagination import EntityList, decode_cursor, encode_cursor
from tiger_db.crud.token_status.queries import REFRESHES
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


@pytest.mark.slow
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


SCOPES: list[tuple[EntityList[Any], str, dict[str, object]]] = [
    (ACCOUNTS, "newest", {}),
    (ACCOUNTS, "name", {}),
    (ACCOUNTS, "name", {"status": ["active", "closed"]}),
    (API_KEYS, "name", {}),
    (EXPIRING_API_KEYS, "expiry", {}),
    (EVENTS, "newest", {}),
    (EVENTS, "newest", {"since": datetime(2026, 1, 1, tzinfo=UTC)}),
    (EVENTS, "newest", {"details": {"a": 1}}),
    (EVENTS, "newest", {"tags": {"a": 1}}),
    (EVENTS, "newest", {"tags": '{"a": 1}'}),
    (REFRESHES, "newest", {}),
    (REFRESHES, "schedule", {}),
    (REFRESHES, "schedule", {"status": "pending"}),
]


def key_for(order_by: str, text: str, at: datetime) -> str | datetime | None:
    return {"newest": None, "name": text}.get(order_by, at)


@given(
    scope=st.sampled_from(range(len(SCOPES))),
    row_id=st.uuids(),
    text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    at=st.datetimes(timezones=st.just(UTC)),
)
@example(scope=3, row_id=UUID(int=0), text="", at=datetime.max.replace(tzinfo=UTC))
@example(scope=1, row_id=UUID(int=2**128 - 1), text="🐅", at=datetime.min.replace(tzinfo=UTC))
def test_a_cursor_decodes_in_its_list_order_and_filters_only(
    scope: int, row_id: UUID, text: str, at: datetime
) -> None:
    listed, order_by, filters = SCOPES[scope]
    key = key_for(order_by, text, at)
    cursor = encode_cursor(listed, row_id, key, order_by=order_by, filters=filters)
    assert decode_cursor(listed, cursor, order_by=order_by, filters=filters) == (key, row_id)
    assert cursor.isascii()
    for number, (other, other_order, other_filters) in enumerate(SCOPES):
        if number != scope:
            with pytest.raises(InvalidCursor):
                decode_cursor(other, cursor, order_by=other_order, filters=other_filters)


@pytest.mark.parametrize(
    ("one", "equal"),
    [
        ({"status": "active"}, {"status": [AccountStatus.ACTIVE]}),
        ({"status": ["active", "closed"]}, {"status": ("closed", "active", "closed")}),
        ({"status": None}, {}),
        ({"tags": {"a": 1, "b": 2}}, {"tags": [{"b": 2, "a": 1}]}),
    ],
)
def test_equal_filters_share_their_cursors(one: dict[str, Any], equal: dict[str, Any]) -> None:
    row_id = uuid4()
    assert encode_cursor(ACCOUNTS, row_id, filters=one) == encode_cursor(
        ACCOUNTS, row_id, filters=equal
    )


@pytest.mark.parametrize("name", LISTS)
async def test_a_list_refuses_the_cursor_of_another_list(session: AsyncSession, name: str) -> None:
    own = cursor_of(name, ACCOUNT)
    await LISTS[name](session, after=own)
    for cursor in {cursor_of(other, ACCOUNT) for other in LISTS} - {own}:
        with pytest.raises(InvalidCursor):
            await LISTS[name](session, after=cursor)


DIGEST_BYTES, ID_BYTES = 16, 16
DIGESTS = {urlsafe_b64decode(f"{cursor_of(name, uuid4())}==")[:DIGEST_BYTES] for name in LISTS}


def malformed(cursor: object) -> bool:
    """Whether the text is no cursor of a list. A cursor of any id is valid."""
    if not isinstance(cursor, str) or not re.fullmatch(r"[\w-]+", cursor, re.ASCII):
        return True
    content = urlsafe_b64decode(f"{cursor}==")
    return (
        content[:DIGEST_BYTES] not in DIGESTS
        or len(content) < DIGEST_BYTES + ID_BYTES
        or urlsafe_b64encode(content).decode().rstrip("=") != cursor
    )


USED_IDS = [uuid4() for _ in range(3)]
nearly = st.builds(cursor_of, st.sampled_from(list(LISTS)), st.sampled_from(USED_IDS))
cursors: st.SearchStrategy[object] = (
    st.text()
    | st.from_regex(r"[\w-]{20,60}={0,2}", fullmatch=True)
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
@example(cursor=encode_cursor(API_KEYS, uuid4()) + "\n")
@example(cursor="' OR true --")
async def test_a_malformed_cursor_raises_invalid_cursor_without_a_query(
    database: Database, cursor: Any
) -> None:
    with recorded(database) as sent:
        async with database.session() as session:
            for list_ in LISTS.values():
                with pytest.raises(InvalidCursor, match="pass a cursor of a page"):
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


async def test_a_filter_refuses_too_many_values_and_mappings(session: AsyncSession) -> None:
    many = [uuid4() for _ in range(1001)]
    await crud.audit_logs.search(session, account_id=many[:1000])
    await crud.audit_logs.search(session, ip_address=[f"10.0.{n % 256}.1" for n in range(1000)])
    await crud.accounts.list_accounts(session, tags=[f"tag {n}" for n in range(1000)])
    too_many = "at most 1,000 values, not 1,001"
    with pytest.raises(InvalidValue, match=too_many):
        await crud.audit_logs.search(session, account_id=many)
    with pytest.raises(InvalidValue, match=too_many):
        await crud.accounts.find_for_operation(session, exclude=many)
    with pytest.raises(InvalidValue, match="search must not contain a NUL character"):
        await crud.accounts.list_accounts(session, search="a\0")
    await crud.accounts.list_accounts(session)  # the transaction goes on
    mapping: Any = {"active": 1}
    for wrong in (
        crud.api_keys.list_api_keys(session, status=mapping),
        crud.accounts.list_accounts(session, status=mapping),
        crud.audit_logs.search(session, action=mapping),
        crud.audit_logs.statistics(session, by=mapping, since=datetime.now(UTC)),
    ):
        with pytest.raises(InvalidValue):
            await wrong

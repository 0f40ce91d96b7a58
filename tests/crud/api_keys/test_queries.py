"""Queries of API keys and their usage."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.raw_keys import unknown_key, with_checksum, wrong_secret
from tests.support.recording import recorded
from tiger_db import APIKey, APIKeyScope, APIKeyStatus, AuditAction, Database
from tiger_db.crud import api_keys
from tiger_db.database import AsyncSession
from tiger_db.errors import InvalidCursor, InvalidValue, NotFound

HOUR = timedelta(hours=1)


async def test_keys_are_found_by_status_account_id_and_prefix(session: AsyncSession) -> None:
    account = await factories.account(session)
    bound, _ = await factories.api_key(session, tiger_account_id=account.id)
    free, _ = await factories.api_key(session)
    await api_keys.revoke(session, free.id)
    assert (await api_keys.list_api_keys(session)).items == [free, bound]
    assert (await api_keys.list_api_keys(session, status=APIKeyStatus.ACTIVE)).items == [bound]
    assert (await api_keys.get_keys_for_account(session, account.id)).items == [bound]
    assert (await api_keys.get_keys_for_account(session, uuid4())).items == []
    assert await api_keys.get(session, uuid4()) is None
    assert await api_keys.get_by_prefix(session, "tdb_none") is None


async def test_an_expired_key_is_listed_as_expired_and_not_as_active(session: AsyncSession) -> None:
    now = datetime.now(UTC)
    expired, _ = await factories.api_key(session, expires_at=now - HOUR)
    lasting, _ = await factories.api_key(session, expires_at=now + HOUR)
    endless, _ = await factories.api_key(session)
    revoked, _ = await factories.api_key(session, expires_at=now - HOUR)
    await api_keys.revoke(session, revoked.id)
    by_status = {
        status: (await api_keys.list_api_keys(session, status=status)).items
        for status in (*APIKeyStatus, "expired")
    }
    assert by_status == {
        APIKeyStatus.ACTIVE: [endless, lasting],
        APIKeyStatus.EXPIRED: [expired],
        APIKeyStatus.REVOKED: [revoked],
        APIKeyStatus.INACTIVE: [],
    }


# Expiring


@pytest.mark.slow
async def test_expiring_keys_come_soonest_first_page_by_page(session: AsyncSession) -> None:
    now = datetime.now(UTC)
    hours = [5, 2, 2, 9, 2, 2, 1, 5, 2, 7, 5, 23]  # equal expiries within a page and across its end
    keys = [(await factories.api_key(session, expires_at=now + h * HOUR))[0] for h in hours]
    for other in (None, now - HOUR, now + 25 * HOUR):
        await factories.api_key(session, expires_at=other)
    revoked, _ = await factories.api_key(session, expires_at=now + HOUR)
    await api_keys.revoke(session, revoked.id)
    expected = sorted(keys, key=lambda key: (key.expires_at, key.id))
    for limit in (1, 2, 3, 4, 12, 13):
        listed, after = [], None
        for _ in range(20):
            page = await api_keys.list_expiring(
                session, within=timedelta(days=1), after=after, limit=limit
            )
            listed += page.items
            assert len(page.items) == limit or page.next_cursor is None
            after = page.next_cursor
            if after is None:
                break
        assert listed == expected


async def test_the_default_period_of_expiring_keys_is_a_week(session: AsyncSession) -> None:
    now = datetime.now(UTC)
    days = (1, 6, 8, 400)
    keys = [(await factories.api_key(session, expires_at=now + timedelta(days=n)))[0] for n in days]
    assert (await api_keys.list_expiring(session)).items == keys[:2]
    century = timedelta(days=36525)
    assert (await api_keys.list_expiring(session, within=century)).items == keys


@pytest.mark.parametrize(
    "within", [timedelta(0), timedelta(-1), timedelta(days=36525, seconds=1), timedelta.max]
)
async def test_a_period_out_of_range_is_refused(session: AsyncSession, within: timedelta) -> None:
    with pytest.raises(InvalidValue, match="within"):
        await api_keys.list_expiring(session, within=within)


async def test_an_unknown_cursor_is_refused(session: AsyncSession) -> None:
    with pytest.raises(InvalidCursor):
        await api_keys.list_expiring(session, after="nonsense")


# Found by its text


async def test_a_key_is_found_by_its_raw_key_whatever_its_status(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session)
    other, _ = await factories.api_key(session)
    for wrong in (
        wrong_secret(raw_key),
        with_checksum(f"{other.key_prefix}_{raw_key.rpartition('_')[2][:43]}"),
        unknown_key(),
        raw_key[:-1],
        key.key_prefix,
    ):
        assert await api_keys.find_by_raw_key(session, wrong) is None
    assert await api_keys.find_by_raw_key(session, raw_key) is key
    await api_keys.revoke(session, key.id)
    assert await api_keys.find_by_raw_key(session, raw_key) is key
    key.sqlmodel_update({"status": "active", "expires_at": datetime(2020, 1, 1, tzinfo=UTC)})
    assert await api_keys.find_by_raw_key(session, raw_key) is key
    await session.refresh(key)
    assert (key.usage_count, key.last_used_at) == (0, None)
    actions = {event.action for event in await factories.events(session)}
    # The event api_key:update records the assignment above: a look-up records no event.
    assert actions == {
        AuditAction.API_KEY_CREATE,
        AuditAction.API_KEY_REVOKE,
        AuditAction.API_KEY_UPDATE,
    }


async def count_uses(session: AsyncSession, key_id: UUID, count: int, hours_ago: int = 0) -> None:
    await session.execute(
        text(
            "INSERT INTO api_key_usage VALUES (:key, date_trunc('hour', clock_timestamp(), 'UTC')"
            " - make_interval(hours => :ago), :count)"
        ),
        {"key": key_id, "ago": hours_ago, "count": count},
    )


async def test_usage_lists_the_uses_by_the_hour(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session)
    for hours_ago, count in ((30, 7), (2, 4)):
        await count_uses(session, key.id, count, hours_ago)
    await api_keys.verify_api_key(session, raw_key)
    now = datetime.now(UTC)
    first, last = await api_keys.usage(session, key.id, since=now - 2 * HOUR)
    assert (first.count, last.count) == (4, 1)
    assert first.start is not None
    assert first.start + 2 * HOUR == last.start
    assert (first.start.minute, first.start.utcoffset()) == (0, timedelta(0))
    assert len(await api_keys.usage(session, key.id, since=now - 31 * HOUR)) == 3
    assert await api_keys.usage(session, uuid4(), since=now - HOUR) == []
    with pytest.raises(InvalidValue, match="since"):
        await api_keys.usage(session, key.id, since=datetime(2026, 1, 1))  # noqa: DTZ001


async def test_usage_of_all_keys_is_counted_by_time_key_and_account(session: AsyncSession) -> None:
    account = await factories.account(session)
    busy, _ = await factories.api_key(session, name="busy", tiger_account_id=account.id)
    quiet, _ = await factories.api_key(session, tiger_account_id=account.id)
    unbound, _ = await factories.api_key(session)
    uses = [(busy, 50, 9), (busy, 0, 30), (quiet, 50, 1), (quiet, 49, 2), (unbound, 0, 20)]
    for key, hours_ago, count in uses:
        await count_uses(session, key.id, count, hours_ago)
    since = datetime.now(UTC) - 100 * HOUR

    async def counted(
        by: Any, key_id: UUID | None = None, **more: Any
    ) -> list[tuple[int, UUID | None, UUID | None]]:
        found = await api_keys.usage(session, key_id, by=by, since=since, **more)
        return [(group.count, group.api_key_id, group.account_id) for group in found]

    top = [(39, busy.id, None), (20, unbound.id, None), (3, quiet.id, None)]
    assert await counted("api_key_id") == top
    assert await counted(["api_key_id"], limit=2) == top[:2]
    groups = await api_keys.usage(session, by="api_key_id", since=since)
    assert [group.api_key_name for group in groups] == ["busy", "assistant", "assistant"]
    assert await counted("account_id") == [(42, None, account.id), (20, None, None)]
    assert await counted({"account_id", "api_key_id"}, quiet.id) == [(3, quiet.id, account.id)]
    days = await api_keys.usage(session, by=("day", "api_key_id"), since=since)
    assert sum(group.count for group in days) == 62
    assert {group.start.hour for group in days if group.start is not None} == {0}
    starts = [group.start for group in days if group.start is not None]
    assert starts == sorted(starts)
    assert len(days) in {4, 5}  # midnight may lie between the two hours of the key `quiet`
    assert await counted("day", uuid4()) == []
    for wrong in ((), ("hour", "day")):
        with pytest.raises(InvalidValue, match="`by` must name"):
            await counted(wrong)


@pytest.mark.slow
async def test_keys_are_filtered_by_one_or_several_values(session: AsyncSession) -> None:
    now = datetime.now(UTC)
    account = await factories.account(session, account_name="Zürich")
    reader, _ = await factories.api_key(session, name="reader", created_by="alice")
    trader, _ = await factories.api_key(
        session,
        name="Trader_1",
        scopes=[APIKeyScope.TRADE_ADMIN],
        tiger_account_id=account.id,
        created_by="bob",
        description="100% of trades",
    )
    expired, _ = await factories.api_key(session, name="Old", expires_at=now - HOUR)
    used = text("UPDATE api_keys SET last_used_at = :at, created_at = :at WHERE id = :id")
    await session.execute(used, {"at": now - 48 * HOUR, "id": reader.id})

    async def found(**filters: Any) -> list[APIKey]:
        page = await api_keys.list_api_keys(session, **filters, count=True)
        assert page.total == len(page)
        return page.items

    assert await found() == [expired, trader, reader]
    assert await found(status=["active", "revoked"]) == [trader, reader]
    assert await found(status=list(APIKeyStatus)) == [expired, trader, reader]
    assert await found(status=[]) == []
    assert await found(account_id=account.id) == [trader]
    assert await found(account_id=[uuid4(), account.id]) == [trader]
    assert await found(scope=APIKeyScope.TRADE_READ) == [trader]
    assert await found(scope=["trade:write", "mcp:read"]) == [expired, trader, reader]
    assert await found(scope=[]) == []
    assert await found(created_by=("alice", "carol")) == [reader]
    assert await found(expired=True) == [expired]
    assert await found(expired=False) == [trader, reader]
    assert await found(unused_since=now - 24 * HOUR) == [reader]
    assert await found(search="ER") == [trader, reader]
    for literal, matching in (("r_1", [trader]), ("0%", [trader]), ("t%r", []), ("R_A", [])):
        assert await found(search=literal) == matching
    assert await found(search=reader.key_prefix[-9:].upper()) == [reader]
    assert await found(search="e", status="active", created_by="bob") == [trader]
    with pytest.raises(InvalidValue, match="unknown filters: colour"):
        await found(colour="red")


async def test_keys_sorted_by_name_are_paged_in_both_directions(
    database: Database, session: AsyncSession
) -> None:
    account = await factories.account(session)
    names = ["b", "a", "B", "ä", "a", "Z"]
    made = [
        (await factories.api_key(session, name=name, tiger_account_id=account.id))[0]
        for name in names
    ]
    expected = sorted(made, key=lambda key: (key.name, key.id))
    for limit in (1, 2, 4, 6):
        page = await api_keys.list_api_keys(session, order_by="name", limit=limit)
        listed, pages = [*page], [page]
        while page.next_cursor is not None:
            page = await api_keys.list_api_keys(
                session, order_by="name", limit=limit, after=page.next_cursor
            )
            listed += page
            pages.append(page)
        assert listed == expected
        for earlier in reversed(pages[:-1]):
            assert page.previous_cursor is not None
            page = await api_keys.list_api_keys(
                session, order_by="name", limit=limit, before=page.previous_cursor
            )
            assert (page.items, page.next_cursor) == (earlier.items, earlier.next_cursor)
            assert page.previous_cursor == earlier.previous_cursor
    with recorded(database) as sent:
        page = await api_keys.list_api_keys(session, load=["tiger_account"], limit=5, count=True)
    assert len(sent) == 3
    assert all(key.tiger_account is account for key in page)
    assert page.total == 6
    first = await api_keys.list_api_keys(session, limit=1)
    for arguments in ({"order_by": "name"}, {"status": "active"}, {"account_id": account.id}):
        with pytest.raises(InvalidCursor):
            await api_keys.list_api_keys(session, after=first.next_cursor, **arguments)
    with pytest.raises(InvalidValue, match="cannot be combined"):
        await api_keys.list_api_keys(session, after=first.next_cursor, before=first.next_cursor)
    with pytest.raises(InvalidValue, match="no relationship 'owner'"):
        await api_keys.list_api_keys(session, load=["owner"])


# What is left of a limit


async def test_the_limits_of_a_key_tell_what_is_left(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session, rate_limit_per_hour=3)
    for _ in range(2):
        await api_keys.authorize_api_key(session, raw_key)
    limits = await api_keys.limits(session, key.id)
    assert limits.day is None
    assert limits.hour is not None
    assert (limits.hour.limit, limits.hour.used, limits.hour.remaining) == (3, 2, 1)
    now = datetime.now(UTC)
    assert now < limits.hour.resets_at <= now + HOUR
    assert (limits.hour.resets_at.minute, limits.hour.resets_at.utcoffset()) == (0, timedelta(0))

    successor, _ = await api_keys.rotate(session, key.id)
    await api_keys.update(session, successor.id, rate_limit_per_day=1)
    limits = await api_keys.limits(session, successor.id)
    assert limits.hour is not None
    assert limits.day is not None
    assert (limits.hour.used, limits.day.used, limits.day.remaining) == (2, 2, 0)
    past = text(
        "UPDATE api_key_limits SET hour = hour - interval '1 h', day = day - interval '1 d'"
    )
    await session.execute(past)
    limits = await api_keys.limits(session, successor.id)
    assert limits.hour is not None
    assert (limits.hour.used, limits.hour.remaining) == (0, 3)
    with pytest.raises(NotFound):
        await api_keys.limits(session, uuid4())

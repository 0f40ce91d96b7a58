"""Queries of API keys and their usage."""

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.raw_keys import unknown_key, with_checksum, wrong_secret
from tiger_db import APIKeyStatus, AuditAction
from tiger_db.crud import api_keys
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    InvalidCursor,
    InvalidValue,
)

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
    told = await api_keys.usage(session, key.id, since=now - 2 * HOUR)
    assert [hourly.count for hourly in told] == [4, 1]
    assert told[0].hour == (told[1].hour - 2 * HOUR)
    assert (told[1].hour.minute, told[1].hour.utcoffset()) == (0, timedelta(0))
    assert len(await api_keys.usage(session, key.id, since=now - 31 * HOUR)) == 3
    assert await api_keys.usage(session, uuid4(), since=now - HOUR) == []
    with pytest.raises(InvalidValue, match="since"):
        await api_keys.usage(session, key.id, since=datetime(2026, 1, 1))  # noqa: DTZ001

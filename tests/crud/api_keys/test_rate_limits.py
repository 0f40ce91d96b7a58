"""Rate limits of API keys are exact."""

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import text

from tests.support import factories
from tiger_db import Database, KeyVerifier
from tiger_db.crud import api_keys
from tiger_db.database import AsyncSession
from tiger_db.errors import (
    RateLimited,
)

HOUR = timedelta(hours=1)


# Limits and usage


@pytest.mark.parametrize(("limit", "longest"), [("hour", HOUR), ("day", 24 * HOUR)])
async def test_a_limit_allows_exactly_its_number_of_uses(
    session: AsyncSession, limit: str, longest: timedelta
) -> None:
    key, raw_key = await factories.api_key(session, **{f"rate_limit_per_{limit}": 3})
    for _ in range(3):
        await api_keys.authorize_api_key(session, raw_key)
    for _ in range(2):
        with pytest.raises(RateLimited) as refused:
            await api_keys.authorize_api_key(session, raw_key)
    until = datetime.now(UTC) + refused.value.retry_after
    assert timedelta(0) < refused.value.retry_after <= longest
    assert abs((until + HOUR / 2).minute - 30) <= 1  # the window ends with the clock hour
    assert (refused.value.remaining, key.usage_count) == (0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["hour", "day"])
async def test_a_rotation_does_not_renew_a_limit(session: AsyncSession, limit: str) -> None:
    """A limit of 5, with 4 rotations and 20 uses."""
    key, raw_key = await factories.api_key(session, **{f"rate_limit_per_{limit}": 5})
    keys = [raw_key]
    for _ in range(4):
        await api_keys.authorize_api_key(session, keys[-1])
        key, raw_key = await api_keys.rotate(session, key.id)
        keys.append(raw_key)
    await api_keys.authorize_api_key(
        session, keys[0]
    )  # the old key is in its grace, and counts for the same line
    for each in keys:
        with pytest.raises(RateLimited) as refused:
            await api_keys.authorize_api_key(session, each)
        assert refused.value.retry_after <= 24 * HOUR
    used = [row.usage_count for row in (await api_keys.list_api_keys(session)).items[::-1]]
    assert used == [2, 1, 1, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["session", "verifier"])
async def test_concurrent_uses_of_a_line_are_counted_exactly(clone: Database, how: str) -> None:
    async with clone.session() as session:
        key, first = await factories.api_key(session, rate_limit_per_day=10)
        successor, second = await api_keys.rotate(session, key.id)
        _, third = await api_keys.rotate(session, successor.id)
        _, other = await factories.api_key(session, rate_limit_per_day=10)

    async def use(raw_key: str) -> bool:
        if how == "verifier":
            return await KeyVerifier(clone).verify(raw_key) is not None
        async with clone.session() as session:
            return await api_keys.verify_api_key(session, raw_key) is not None

    used = await asyncio.gather(*(use(key) for key in (first, second, third) * 8))
    assert sum(used) == 10
    assert await use(other)


async def test_the_counts_of_a_line_outlive_its_first_key(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session, rate_limit_per_day=2)
    _, raw_key = await api_keys.rotate(session, key.id)
    await api_keys.authorize_api_key(session, raw_key)
    await session.execute(text("DELETE FROM api_keys WHERE id = :id"), {"id": key.id})
    await api_keys.authorize_api_key(session, raw_key)
    with pytest.raises(RateLimited):
        await api_keys.authorize_api_key(session, raw_key)


async def count_limits(
    session: AsyncSession, key_id: UUID, count: int, hours_ago: int = 0, days_ago: int = 0
) -> None:
    """Store counts as if the uses had been in an earlier hour and day."""
    await session.execute(
        text(
            "INSERT INTO api_key_limits (api_key_id, hour, hour_count, day, day_count)"
            " VALUES (:key, date_trunc('hour', clock_timestamp(), 'UTC')"
            " - make_interval(hours => :hours), :count, date_trunc('day', clock_timestamp(), 'UTC')"
            " - make_interval(days => :days), :count)"
        ),
        {"key": key_id, "hours": hours_ago, "days": days_ago, "count": count},
    )


@pytest.mark.parametrize(
    ("limit", "hours_ago", "days_ago"), [("hour", 1, 0), ("hour", 24, 1), ("day", 24, 1)]
)
async def test_uses_of_an_earlier_window_do_not_count(
    session: AsyncSession, limit: str, hours_ago: int, days_ago: int
) -> None:
    key, raw_key = await factories.api_key(session, **{f"rate_limit_per_{limit}": 2})
    await count_limits(session, key.id, 2, hours_ago, days_ago)
    await api_keys.authorize_api_key(session, raw_key)
    await api_keys.authorize_api_key(session, raw_key)
    with pytest.raises(RateLimited):
        await api_keys.authorize_api_key(session, raw_key)


async def test_uses_of_an_earlier_hour_count_for_the_day(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session, rate_limit_per_hour=2, rate_limit_per_day=3)
    await count_limits(session, key.id, 2, hours_ago=1)
    await api_keys.authorize_api_key(session, raw_key)
    with pytest.raises(RateLimited) as refused:
        await api_keys.authorize_api_key(session, raw_key)
    assert refused.value.retry_after <= 24 * HOUR


async def test_a_clock_that_steps_back_opens_no_window(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session, rate_limit_per_hour=2)
    await count_limits(session, key.id, 1, hours_ago=-1)
    await api_keys.authorize_api_key(session, raw_key)
    with pytest.raises(RateLimited) as refused:
        await api_keys.authorize_api_key(session, raw_key)
    assert HOUR < refused.value.retry_after <= 2 * HOUR


async def test_a_use_that_is_denied_by_a_limit_is_not_counted(session: AsyncSession) -> None:
    key, raw_key = await factories.api_key(session, rate_limit_per_hour=1, rate_limit_per_day=9)
    await api_keys.authorize_api_key(session, raw_key)
    with pytest.raises(RateLimited):
        await api_keys.authorize_api_key(session, raw_key)
    counted = await session.execute(text("SELECT hour_count, day_count FROM api_key_limits"))
    assert tuple(counted.one()) == (1, 1)
    assert key.usage_count == 1

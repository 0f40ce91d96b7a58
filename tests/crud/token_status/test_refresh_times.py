"""The time at which a token is due for a refresh."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text, update
from sqlmodel import col

from tests.support import factories
from tests.support.tiger_files import EVERYTHING, config
from tests.support.tiger_tokens import tiger_token
from tiger_db import AccountStatus, Database, RefreshTrigger, TigerAccount, TokenStatus
from tiger_db.checks.accounts import DUE_TOKENS
from tiger_db.crud import accounts, token_status
from tiger_db.crud.change_events import RECORDED
from tiger_db.database import AsyncSession
from tiger_db.models.accounts import refresh_time
from tiger_db.tiger import import_account

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
MS = timedelta(milliseconds=1)
START = datetime(2026, 11, 25, tzinfo=UTC)
LIFE = 15 * DAY  # of Tiger's tokens
Change = Callable[[AsyncSession, TigerAccount, str], Awaitable[object]]

# What the time is


@pytest.mark.parametrize(
    ("life", "ahead"),
    [
        (15 * DAY, 3 * DAY),
        (30 * DAY, 6 * DAY),
        (5 * HOUR, HOUR),
        (25 * MINUTE, 5 * MINUTE),
        (20 * MINUTE, 5 * MINUTE),  # not 4
        (10 * MINUTE, 5 * MINUTE),
        (4 * MINUTE, 2 * MINUTE),  # not 5: half of it
        (2 * MS, MS),
    ],
)
def test_a_fifth_of_a_token_s_life_is_left(life: timedelta, ahead: timedelta) -> None:
    expires = START + life
    assert refresh_time(tiger_token(START, life), expires) == expires - ahead
    before = datetime.now(UTC)
    of_another_form = refresh_time("opaque", before + life)
    assert of_another_form is not None
    assert timedelta(0) <= of_another_form - (before + life - ahead) < 10 * timedelta(seconds=1)


@given(
    born=st.datetimes(datetime(2001, 9, 10), datetime(2250, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    life=st.timedeltas(MS, timedelta(days=10_000)),
)
@example(born=START, life=MS)
@example(born=START, life=25 * MINUTE)
@example(born=START, life=10 * MINUTE)
def test_the_refresh_time_is_in_the_second_half_of_the_life(
    born: datetime, life: timedelta
) -> None:
    born -= born.microsecond % 1000 * timedelta(microseconds=1)
    life -= life % MS
    expires = born + life
    at = refresh_time(tiger_token(born, life), expires)
    assert at is not None
    assert born + life / 2 <= at < expires
    if life >= 25 * MINUTE:
        assert expires - at == life / 5 >= 5 * MINUTE
    elif life >= 10 * MINUTE:
        assert expires - at == 5 * MINUTE


@given(left=st.timedeltas(timedelta(milliseconds=100), timedelta(days=10_000)))
def test_the_life_of_a_token_in_another_format_begins_now(left: timedelta) -> None:
    before = datetime.now(UTC)
    expires = before + left
    at = refresh_time("opaque", expires)
    assert at is not None
    assert before + left / 2 <= at <= expires


@pytest.mark.parametrize("token", ["opaque", tiger_token(START, LIFE)])
def test_a_token_that_never_expires_has_no_refresh_time(token: str) -> None:
    assert refresh_time(token, None) is None


@pytest.mark.parametrize("token", ["opaque", tiger_token(START + DAY, LIFE)])
def test_a_token_that_expires_before_it_is_generated_is_due_at_its_expiry(token: str) -> None:
    assert refresh_time(token, START) == START


# That it follows the token


async def to_update(session: AsyncSession, account: TigerAccount, token: str) -> None:
    await accounts.update(session, account.id, access_token=token)


async def to_update_tokens(session: AsyncSession, account: TigerAccount, token: str) -> None:
    await accounts.update_tokens(session, account.id, access_token=token)


async def to_complete(session: AsyncSession, account: TigerAccount, token: str) -> None:
    await factories.refresh(session, account)
    (claim,) = await token_status.claim_due(session, worker="w")
    done = await token_status.complete(session, claim, access_token=token)
    assert done.next_refresh_at == account.token_refresh_at


async def to_assign(session: AsyncSession, account: TigerAccount, token: str) -> None:
    account.sqlmodel_update(
        {"access_token": token, "token_expires_at": datetime.now(UTC).replace(microsecond=0) + LIFE}
    )
    await session.flush()


@pytest.mark.parametrize("change", [to_update, to_update_tokens, to_complete, to_assign])
@pytest.mark.parametrize("before", [{}, {"access_token": "old", "token_expires_at": START}])
async def test_token_refresh_at_follows_the_token(
    session: AsyncSession, change: Change, before: Any
) -> None:
    account = await factories.account(session, **before)
    assert (account.token_refresh_at is None) == (before == {})
    now = datetime.now(UTC).replace(microsecond=0)
    await change(session, account, tiger_token(now, LIFE))
    await session.refresh(account)
    assert account.token_refresh_at is not None
    assert account.token_expires_at is not None
    assert abs(account.token_expires_at - now - LIFE) <= timedelta(seconds=5)
    ahead = account.token_expires_at - account.token_refresh_at
    assert abs(ahead - LIFE / 5) <= timedelta(seconds=5)


async def test_a_new_account_has_a_token_refresh_at(session: AsyncSession) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    account = await factories.account(session, access_token=tiger_token(now, LIFE))
    await session.refresh(account)
    assert account.token_refresh_at == now + LIFE * 4 / 5
    plain = factories.new_account(access_token="opaque", token_expires_at=now + LIFE)
    session.add(plain)
    await session.flush()
    assert plain.token_refresh_at is not None
    assert abs(plain.token_refresh_at - now - LIFE * 4 / 5) < 10 * timedelta(seconds=1)


async def test_an_imported_account_has_a_token_refresh_at(
    session: AsyncSession, tmp_path: Path
) -> None:
    old, new = (tiger_token(START + n * DAY, LIFE) for n in range(2))
    for n, token in enumerate((old, new)):
        file = config(tmp_path, EVERYTHING | {"token": token})
        account = (await import_account(session, file, name="Main")).account
        await session.refresh(account)
        assert account.token_refresh_at == START + n * DAY + LIFE * 4 / 5


async def test_token_refresh_at_is_removed_with_the_token(session: AsyncSession) -> None:
    account = await factories.account(session, access_token=tiger_token(START, LIFE))
    await accounts.close(session, account.id)
    await session.refresh(account)
    assert account.token_refresh_at is None
    await accounts.reopen(session, account.id, private_key="new")
    await accounts.update_tokens(session, account.id, access_token=tiger_token(START, LIFE))
    assert account.token_refresh_at == START + LIFE * 4 / 5
    account.access_token = None
    await session.flush()
    await session.refresh(account)
    assert account.token_refresh_at is None


async def test_a_token_without_expiry_has_no_refresh_time(session: AsyncSession) -> None:
    account = await factories.account(session, access_token=tiger_token(START, LIFE))
    await accounts.update_tokens(session, account.id, access_token="opaque")
    await session.refresh(account)
    assert (account.token_expires_at, account.token_refresh_at) == (None, None)
    account.token_expires_at = START  # an expiry alone, too
    await session.flush()
    await session.refresh(account)
    assert account.token_refresh_at == START


async def test_other_changes_keep_token_refresh_at(session: AsyncSession) -> None:
    account = await factories.account_with_token(session)
    at = account.token_refresh_at
    await accounts.update(session, account.id, description="new", status=AccountStatus.INACTIVE)
    await accounts.record_error(session, account.id, message="no answer")
    account.account_name = "Other"
    await session.flush()
    await session.refresh(account)
    assert account.token_refresh_at == at


# Whom scheduling finds


async def test_a_token_of_fifteen_days_is_due_when_three_are_left(session: AsyncSession) -> None:
    now = datetime.now(UTC)

    async def with_left(left: timedelta) -> TigerAccount:
        return await factories.account(session, access_token=tiger_token(now + left - LIFE, LIFE))

    due = await with_left(2.9 * DAY)
    later = await with_left(3.1 * DAY)
    (opened,) = await token_status.schedule_due(session)
    assert (opened.tiger_account_id, opened.trigger) == (due.id, RefreshTrigger.SCHEDULED)
    assert await token_status.schedule_due(session, within=0.05 * DAY) == []
    (opened,) = await token_status.schedule_due(session, within=0.2 * DAY)
    assert opened.tiger_account_id == later.id


async def transaction_time(session: AsyncSession) -> datetime:
    now: datetime | None = await session.scalar(select(func.now()))
    assert now is not None
    return now


async def set_times(session: AsyncSession, account: TigerAccount, **times: datetime | None) -> None:
    await session.execute(
        update(TigerAccount)
        .where(col(TigerAccount.id) == account.id)
        .values(**times)
        .execution_options(**RECORDED)
    )
    await session.refresh(account)


@pytest.mark.slow
@pytest.mark.parametrize("within", [timedelta(0), HOUR, 30 * DAY, -DAY])
async def test_python_and_postgresql_find_the_same_tokens_due(
    session: AsyncSession, monkeypatch: pytest.MonkeyPatch, within: timedelta
) -> None:
    now = await transaction_time(session)
    times = [None, *(n * timedelta(microseconds=1) for n in (-1, 0, 1))]
    made = [
        (factories.new_account(access_token=token, status=status), refresh_at, expires_at)
        for token in (None, "token")
        for status in ("active", "inactive", "suspended")
        for refresh_at in times
        for expires_at in times
    ]
    session.add_all([account for account, _, _ in made])
    await session.flush()
    changes = [
        {
            "id": account.id,
            "token_refresh_at": None if refresh_at is None else now + within + refresh_at,
            "token_expires_at": None if expires_at is None else now + within + expires_at,
        }
        for account, refresh_at, expires_at in made
    ]
    await session.execute(update(TigerAccount), changes, execution_options=RECORDED)
    await session.scalars(select(TigerAccount).execution_options(populate_existing=True))
    due = {account.id for account, _, _ in made if account.is_token_due(now, within=within)}
    assert len(due) == 8
    needing = accounts.get_accounts_needing_token_refresh
    assert {account.id for account in await needing(session, within=within)} == due
    if within == HOUR:
        assert {account.id for account in await needing(session)} == due
        monkeypatch.setattr("tiger_db.models.accounts.datetime", clock_at(now))
        assert {account.id for account, _, _ in made if account.needs_token_refresh} == due
    if within == timedelta(0):
        assert (await session.execute(DUE_TOKENS)).one().accounts == len(due)
    opened = await token_status.schedule_due(session, within=within)
    assert {refresh.tiger_account_id for refresh in opened} == due


def clock_at(now: datetime) -> type[datetime]:
    """Return the class `datetime` with a local clock that stands still."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls.combine(now.date(), now.time(), tz)

    return Clock


@pytest.mark.parametrize("microseconds", [-1, 0, 1])
async def test_a_token_is_either_due_or_next_due(session: AsyncSession, microseconds: int) -> None:
    now = await transaction_time(session)
    account = await factories.account(session, access_token="token")
    await set_times(session, account, token_refresh_at=now + timedelta(microseconds=microseconds))
    due = account.is_token_due(now)
    assert due == (microseconds <= 0)
    assert await token_status.next_due(session) == (None if due else timedelta(0))
    assert bool(await token_status.schedule_due(session)) == due


@pytest.mark.slow
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    life=st.timedeltas(MINUTE, 100 * DAY),
    before=st.none() | st.just(tiger_token(START, LIFE)),
    now=st.datetimes(datetime(2026, 11, 1), datetime(2027, 4, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
async def test_a_token_is_due_in_memory_as_after_the_flush(
    session: AsyncSession, life: timedelta, before: str | None, now: datetime
) -> None:
    life -= life % MS
    account = await factories.account(session, access_token=before)
    account.sqlmodel_update(
        {"access_token": tiger_token(START, life), "token_expires_at": START + life}
    )
    in_memory = account.is_token_due(now)
    await session.flush()
    await session.refresh(account)
    assert account.is_token_due(now) == in_memory


@pytest.mark.slow
async def test_any_number_of_schedulers_open_one_each(clone: Database) -> None:
    async with clone.session() as session:
        for _ in range(50):
            await factories.account_with_token(session)
    gate = asyncio.Barrier(8)

    async def schedule() -> list[TokenStatus]:
        async with clone.session() as session:
            await session.execute(text("SELECT"))  # it is connected
            await gate.wait()
            return await token_status.schedule_due(session)

    opened = await asyncio.gather(*(schedule() for _ in range(8)))
    assert len({refresh.tiger_account_id for refreshes in opened for refresh in refreshes}) == 50
    assert sum(map(len, opened)) == 50
    async with clone.session() as session:
        assert await token_status.schedule_due(session) == []
        assert len(await token_status.history(session, limit=1000)) == 50


# How long until then


async def test_next_due_is_none_if_nothing_becomes_due(session: AsyncSession) -> None:
    assert await token_status.next_due(session) is None
    await factories.account(session)
    await factories.account(session, access_token="opaque")
    ahead = datetime.now(UTC) + HOUR
    for status in ("inactive", "suspended"):
        await factories.account(
            session, access_token="opaque", token_expires_at=ahead, status=status
        )
    assert await token_status.next_due(session) is None


async def test_next_due_ignores_what_is_due_already(session: AsyncSession) -> None:
    await factories.account_with_token(session)
    await factories.refresh(session)
    assert await token_status.next_due(session) is None
    await token_status.claim_due(session, worker="w", lease=timedelta(seconds=50))
    lease = await token_status.next_due(session)
    assert lease is not None
    assert timedelta(seconds=40) < lease < timedelta(seconds=50)


async def test_next_due_is_the_first_of_refreshes_and_tokens(session: AsyncSession) -> None:
    async def wait() -> timedelta:
        found = await token_status.next_due(session)
        assert found is not None
        return found

    now = datetime.now(UTC)
    await factories.refresh(session, scheduled_at=now + 4 * HOUR)
    assert timedelta(0) <= 4 * HOUR - await wait() < MINUTE
    token = tiger_token(now + 3 * HOUR - LIFE * 4 / 5, LIFE)
    await factories.account(session, access_token=token)
    assert abs(3 * HOUR - await wait()) < MINUTE
    await factories.refresh(session, scheduled_at=now + 2 * HOUR)
    assert abs(2 * HOUR - await wait()) < MINUTE
    cancelled = await factories.refresh(session, scheduled_at=now + HOUR)
    await token_status.cancel(session, cancelled.id)
    assert abs(2 * HOUR - await wait()) < MINUTE

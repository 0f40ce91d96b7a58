"""No month is retired because of a forged `now()`, or while clocks disagree."""

from datetime import UTC, datetime, timedelta, timezone, tzinfo

import pytest
from pydantic import SecretStr

from tests.support import factories
from tests.support.sql import months, sql
from tiger_db import Database, Settings, audit, crud
from tiger_db.audit.retention import first_kept_month
from tiger_db.connections import connect
from tiger_db.errors import InvalidState
from tiger_db.migrations import MONTHS_AHEAD
from tiger_db.signing import generate_signing_key

FORGED = "now() RETURNS timestamptz LANGUAGE sql AS $$ SELECT pg_catalog.now() + '10 years' $$"


@pytest.mark.slow
async def test_a_now_in_another_schema_retires_nothing(clone_settings: Settings) -> None:
    """The attack A1: a role's search path that leads to a forged clock."""
    settings = clone_settings.model_copy(
        update={
            "audit_signing_key": SecretStr(generate_signing_key()),
            "audit_retention_months": 12,
        }
    )
    async with Database(settings) as database:
        async with database.session() as session:
            await crud.audit_logs.log_events(session, [factories.new_event() for _ in range(12)])
        await audit.seal(database)
    await sql(
        settings,
        "CREATE SCHEMA evil",
        f"CREATE FUNCTION evil.{FORGED}",
        f'ALTER ROLE CURRENT_USER IN DATABASE "{settings.database}"'
        " SET search_path = evil, pg_catalog, public",
    )
    async with Database(settings) as database:
        assert await audit.maintain(database) == audit.Maintenance()
    connection = await connect(settings)
    try:
        assert await connection.fetchval("SELECT count(*) FROM audit_logs") == 12
        now = await connection.fetchval("SELECT now()")
    finally:
        await connection.close()
    assert abs(now - datetime.now(UTC)) < timedelta(minutes=1)


NOW = datetime(2026, 11, 15, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@pytest.mark.parametrize("apart", [61 * SECOND, -61 * SECOND, timedelta(days=3650)])
def test_clocks_more_than_a_minute_apart_retire_nothing(apart: timedelta) -> None:
    with pytest.raises(InvalidState) as refused:
        first_kept_month(NOW + apart, NOW, 12)
    side = "ahead of" if apart > timedelta() else "behind"
    assert str(refused.value) == (
        f"the database's clock is {abs(apart).total_seconds():.0f} s {side} this machine's clock:"
        " no month can be retired until both clocks are correct"
    )


@pytest.mark.parametrize(
    ("retention", "first"),
    [
        (1, datetime(2026, 10, 1, tzinfo=UTC)),
        (10, datetime(2026, 1, 1, tzinfo=UTC)),
        (11, datetime(2025, 12, 1, tzinfo=UTC)),
        (12, datetime(2025, 11, 1, tzinfo=UTC)),
        (0, datetime(2026, 11, 1, tzinfo=UTC)),  # neither of which Settings accepts
        (-3, datetime(2026, 11, 1, tzinfo=UTC)),
    ],
)
def test_the_months_before_the_current_one_stay(retention: int, first: datetime) -> None:
    assert first_kept_month(NOW, NOW + 60 * SECOND, retention) == first
    assert first_kept_month(NOW.astimezone(timezone(timedelta(hours=14))), NOW, retention) == first


def test_the_earlier_clock_decides_which_month_is_the_current_one() -> None:
    new_year = datetime(2027, 1, 1, tzinfo=UTC)
    for clocks in ((new_year, new_year - SECOND), (new_year - SECOND, new_year)):
        assert first_kept_month(*clocks, 1) == datetime(2026, 11, 1, tzinfo=UTC)
    assert first_kept_month(new_year, new_year, 1) == datetime(2026, 12, 1, tzinfo=UTC)


@pytest.mark.parametrize("seconds", [90, -90])
async def test_a_machine_with_a_wrong_clock_retires_nothing(
    clone_settings: Settings, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's clock is another one for `maintain` alone; the server's is right."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=seconds)

    monkeypatch.setattr("tiger_db.audit.retention.datetime", Wrong)
    kept = clone_settings.model_copy(update={"audit_retention_months": 12})
    async with Database(kept) as database:
        with pytest.raises(InvalidState, match="no month can be retired until"):
            await audit.maintain(database)
    async with Database(clone_settings) as database:  # in which months never leave
        assert await audit.maintain(database) == audit.Maintenance()


@pytest.mark.slow
@pytest.mark.parametrize("retention", [0, -3])
async def test_the_current_month_and_later_ones_never_leave(
    clone_settings: Settings, retention: int
) -> None:
    """Whatever the retention: `model_copy` sets one that `Settings` does not accept."""
    settings = clone_settings.model_copy(
        update={
            "audit_signing_key": SecretStr(generate_signing_key()),
            "audit_retention_months": retention,
        }
    )
    await sql(
        settings,
        "SELECT make_audit_partition(date_trunc('month', now() AT TIME ZONE 'UTC')"
        " - interval '1 month')",
    )
    async with Database(settings) as database:
        async with database.session() as session:
            await crud.audit_logs.log_events(session, [factories.new_event() for _ in range(3)])
        await audit.seal(database)
        (last_month,) = months(-1, -1)
        expected = last_month.removeprefix("audit_logs_").replace("_", "-")
        assert await audit.maintain(database) == audit.Maintenance(retired=[expected])
    for month in months(0, MONTHS_AHEAD):
        assert await sql(settings, f"SELECT to_regclass('{month}') IS NOT NULL")

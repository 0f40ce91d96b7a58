"""Events are recorded out of band: each is committed, or its caller gets an error."""

import asyncio
from collections.abc import AsyncIterator
from typing import TypeAlias

import asyncpg
import pytest
from sqlalchemy import event

from tests.support import factories
from tiger_db import Database, Settings
from tiger_db.connections import connect
from tiger_db.errors import AlreadyExists

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@pytest.fixture
async def other(clone_settings: Settings) -> AsyncIterator[Connection]:
    connection = await connect(clone_settings)
    yield connection
    await connection.close()


@pytest.mark.slow
async def test_events_that_are_recorded_concurrently_are_all_stored(
    clone_settings: Settings, other: Connection
) -> None:
    async with Database(clone_settings) as database:
        commits = 0

        def committed(_: object) -> None:
            nonlocal commits
            commits += 1

        event.listen(database.out_of_band.engine.sync_engine, "commit", committed)

        async def record(number: int) -> None:
            event_ = factories.new_event(error_message=str(number))
            await database.out_of_band.record(event_)
            found = "SELECT count(*) FROM audit_logs WHERE error_message = $1"
            async with database.out_of_band.connection() as connection:
                assert await connection.fetchval(found, str(number)) == 1

        async with asyncio.timeout(20):
            await asyncio.gather(*(record(number) for number in range(500)))
    rows = await other.fetch("SELECT error_message FROM audit_logs")
    assert sorted(int(row[0]) for row in rows) == [*range(500)]
    print(f"{commits} commits for 500 events")  # noqa: T201
    assert commits < 100


async def test_a_cancelled_caller_does_not_affect_the_events_of_others(
    clone_settings: Settings, other: Connection
) -> None:
    async with Database(clone_settings) as database:
        tasks = [
            asyncio.create_task(
                database.out_of_band.record(factories.new_event(error_message=str(number)))
            )
            for number in range(20)
        ]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert outcomes[1::2] == [None] * 10
    rows = await other.fetch("SELECT error_message FROM audit_logs")
    assert {str(number) for number in range(1, 20, 2)} <= {row[0] for row in rows}
    assert len(rows) == len({row[0] for row in rows})


async def test_a_refused_event_does_not_affect_other_events(
    clone_settings: Settings, other: Connection
) -> None:
    """Events are stored together, or one by one if one of them is refused."""
    async with Database(clone_settings) as database:
        first = factories.new_event()
        await database.out_of_band.record(first)
        outcomes = await asyncio.gather(
            *(
                database.out_of_band.record(factories.new_event(error_message=str(number)))
                for number in range(5)
            ),
            database.out_of_band.record(factories.new_event(id=first.id)),
            *(
                database.out_of_band.record(factories.new_event(error_message=str(number)))
                for number in range(5, 9)
            ),
            return_exceptions=True,
        )
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert len(refused) == 1
    assert isinstance(refused[0], AlreadyExists)
    rows = await other.fetch("SELECT error_message FROM audit_logs WHERE error_message IS NOT NULL")
    assert sorted(int(row[0]) for row in rows) == [*range(9)]


async def test_an_exhausted_pool_is_an_error_of_the_caller(clone_settings: Settings) -> None:
    pool = {"db_pool_size": 1, "db_max_overflow": 0, "db_pool_timeout": 0.05}
    async with Database(clone_settings.model_copy(update=pool)) as database:
        async with database.out_of_band.connection():
            with pytest.raises(Exception, match=r"QueuePool|in use|lost"):
                await database.out_of_band.record(factories.new_event())
        await database.out_of_band.record(factories.new_event())

"""Archives in an object store, whose API is spoken over HTTP, and which fails in all ways."""

import os
from collections.abc import AsyncIterator, Iterator
from random import Random

import pytest

from tests.support.archives import archive_settings, put_old_months
from tests.support.months import month, partition
from tests.support.object_stores import Store, object_store, silent_store
from tests.support.trail import events_of, exported
from tiger_db import Database, Settings, audit
from tiger_db.audit.archive_files import open_archive
from tiger_db.audit.storage import Connection
from tiger_db.connections import connect
from tiger_db.errors import FileError

pytestmark = pytest.mark.slow
CASES = None if os.environ.get("TIGER_DB_SOAK") else 1  # requests that fail, in each way
WAYS = ("error", "unanswered", "cut", "other")


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch, object_store() as store:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield store
        store.fails(0, "")


@pytest.fixture
async def database(clone_settings: Settings, store: Store) -> AsyncIterator[Database]:
    store.fails(0, "")
    settings = archive_settings(clone_settings, store.url(clone_settings.database))
    async with Database(settings) as database:
        yield database


@pytest.fixture
async def other(database: Database) -> AsyncIterator[Connection]:
    connection = await connect(database.settings)
    yield connection
    await connection.close()


async def test_months_leave_for_an_object_store(
    database: Database, other: Connection, store: Store
) -> None:
    await put_old_months(database, other)
    lines = await exported(database)
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    location = database.settings.audit_archive
    assert location is not None
    names = open_archive(location).names()
    assert [name.partition("-000")[0] for name in names] == [
        f"month={ago}/{kind}" for ago in (month(14), month(13)) for kind in ("_seals", "events")
    ]
    found = await audit.verify(database, archive=True)
    assert (found.findings, found.archived) == ([], 6)
    exported_now = await exported(database, archive=True)
    assert exported_now[: len(lines)] == lines
    assert len(events_of(exported_now)) == 8
    open_archive(location).delete(names[1])
    (finding,) = (await audit.verify(database, archive=True)).findings
    assert finding.message == f"{names[1]}: the file is missing"


async def test_a_store_that_fails_loses_nothing(
    database: Database, other: Connection, store: Store
) -> None:
    """Each request of an archive fails in turn. Nothing leaves unproved, and the next run ends."""
    await put_old_months(database, other)
    location = database.settings.audit_archive
    assert location is not None
    failures = 0

    def with_prefix(prefix: str) -> Settings:
        return database.settings.model_copy(update={"audit_archive": store.url(prefix)})

    async with Database(with_prefix(f"{database.settings.database}-0")) as first:
        store.fails(0, "")
        complete = await audit.archive(first, month(14))
        count = store.requests
    cases = [(how, number) for how in WAYS for number in range(1, count + 1)]
    if CASES is not None:
        chance = Random(count)
        cases = [(how, n) for how in WAYS for n in chance.sample(range(1, count + 1), CASES)]
    for how, number in cases:
        prefix = f"{database.settings.database}-{how}-{number}"
        async with Database(with_prefix(prefix)) as failing:
            store.fails(number, how)
            try:
                assert await audit.archive(failing, month(14)) == complete
            except FileError as error:
                failures += 1
                message = str(error)
                assert message.startswith("the archive: ")
                assert "\n" not in message
            store.fails(0, "")
            assert await audit.archive(failing, month(14)) == complete
            found = await audit.verify(failing, archive=True)
            assert found.findings == [], (how, number)
            assert found.basis[-1].endswith("3 events that are not retired yet")
    assert failures or CASES  # the client repeats most requests itself


async def test_a_store_that_is_down_keeps_the_months(
    database: Database, other: Connection, store: Store
) -> None:
    await put_old_months(database, other)
    for number in (12,) if CASES else range(1, 30):
        store.fails(number, "down")
        with pytest.raises(FileError, match="the archive: "):
            await audit.maintain(database)
        tables = await other.fetch("SELECT relname FROM pg_class WHERE relkind = 'r'")
        assert {partition(14), partition(13)} <= {name for (name,) in tables}
        assert await other.fetchval("SELECT count(*) FROM audit_logs") == 6
    store.fails(0, "")
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    assert (await audit.verify(database, archive=True)).archived == 6


async def test_a_store_that_keeps_other_bytes_keeps_the_month(
    database: Database, other: Connection, store: Store
) -> None:
    """The store answers that all is well. The file is read back before the month is removed."""
    await put_old_months(database, other)
    store.fails(1, "changed")
    name = rf"month={month(14)}/\.tiger_db-unfinished-\w+"
    with pytest.raises(FileError, match=f"{name}: the file is not the one that was written"):
        await audit.maintain(database)
    assert await other.fetchval(f"SELECT count(*) FROM {partition(14)}") == 3
    store.fails(0, "")
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    assert (await audit.verify(database, archive=True)).archived == 6


async def test_a_store_that_never_answers_is_given_up(
    database: Database, other: Connection
) -> None:
    await put_old_months(database, other)
    with silent_store() as url:
        async with Database(database.settings.model_copy(update={"audit_archive": url})) as silent:
            with pytest.raises(FileError, match=r"^the archive: .*: the store does not answer$"):
                await audit.maintain(silent)
    assert (await audit.maintain(database)).retired == [month(14), month(13)]
    assert (await audit.verify(database, archive=True)).archived == 6


async def test_a_store_that_cannot_be_read_accuses_nobody(
    database: Database, other: Connection, store: Store
) -> None:
    await put_old_months(database, other)
    settings = database.settings.model_copy(update={"audit_retention_months": 13})
    async with Database(settings) as archiving:
        assert (await audit.maintain(archiving)).retired == [month(14)]
        await audit.archive(archiving, month(13))
        store.fails(0, "")
        assert (await audit.verify(archiving, archive=True)).sound
        count = store.requests
        for number in (2, count) if CASES else range(1, count + 1):
            store.fails(number, "repeated")
            with pytest.raises(FileError, match="the archive: "):
                await audit.verify(archiving, archive=True)
        store.fails(0, "")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("color=red", "there is no option color"),
        ("request_timeout=0", "request_timeout must be a number of seconds"),
        ("connect_timeout=soon", "connect_timeout must be a number of seconds"),
    ],
)
def test_options_of_the_url_are_checked(options: str, problem: str) -> None:
    with pytest.raises(FileError, match=problem):
        open_archive(f"s3://bucket/prefix?{options}")

"""Re-encryption with another key while others write: no secret is lost or left behind."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from tests.support import factories
from tests.support.encryption_keys import (
    K1,
    K2,
    ONLY_K2,
    SECRETS,
    store_old_tiger_id,
    values_of,
)
from tests.support.factories import plain
from tests.support.forks import FORKS
from tests.support.passed_settings import Passed
from tests.support.recording import recorded
from tiger_db import AuditAction, Database, Settings, TigerAccount, crud, encryption_key_rotation
from tiger_db.crud import accounts
from tiger_db.database import AsyncSession
from tiger_db.encryption import KeyProvider, KeyRing
from tiger_db.encryption_key_rotation import (
    DAMAGED,
    EncryptionKeyUsage,
    encrypted_entities,
    list_encryption_key_usage,
)
from tiger_db.errors import ConfigurationError, EncryptionError
from tiger_db.models.secrets import secrets_of

TABLE = "tiger_accounts"
K3 = KeyRing({"k3": bytes(range(1, 33))})
WAITING = text(
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


@pytest.fixture
def using(clone_settings: Settings) -> Callable[[KeyProvider], Database]:
    """Open the same database with other keys."""
    return lambda keys: Database(clone_settings, key_provider=keys)


Using = Callable[[KeyProvider], Database]


async def store(database: Database, count: int = 1, **values: Any) -> list[TigerAccount]:
    async with database.session() as session:
        return [await factories.account(session, **SECRETS | values) for _ in range(count)]


async def read(database: Database) -> list[TigerAccount]:
    """Oldest first."""
    async with database.session() as session:
        return (await accounts.list_accounts(session, limit=1000)).items[::-1]


async def uses(database: Database) -> list[EncryptionKeyUsage]:
    async with database.session() as session:
        return await list_encryption_key_usage(session)


@pytest.mark.slow
async def test_every_secret_is_encrypted_with_the_first_key(using: Using) -> None:
    async with using(K1) as old:
        before = await store(old, 3) + await store(old, secret_key=None, access_token=None)
        closed = await store(old)
        async with old.session() as session:
            await accounts.close(session, closed[0].id)
    async with using(K2) as both:
        await store(both)
        assert await uses(both) == [
            EncryptionKeyUsage(TABLE, "k1", 5),
            EncryptionKeyUsage(TABLE, "k2", 1),
        ]
        steps: list[int] = []
        report = await encryption_key_rotation.rotate(
            both, progress=lambda done, _: steps.append(done)
        )
        assert (report.key_id, report.rotated, steps[-1], report.stuck) == ("k2", 5, 5, 0)
        assert (report.uses, report.retirable) == ([EncryptionKeyUsage(TABLE, "k2", 6)], ["k1"])
    async with using(ONLY_K2) as new:
        moved = await read(new)
        assert [values_of(account) for account in moved[:3]] == [SECRETS] * 3
        assert (moved[3].secret_key, moved[3].access_token) == (None, None)
        async with new.session() as session:
            found = await accounts.list_by_tiger_id(session, SECRETS["tiger_id"])
        assert [account.id for account in found] == [account.id for account in moved]
        assert {account.id for account in before} <= {account.id for account in found}


async def test_each_batch_writes_its_event(using: Using, monkeypatch: pytest.MonkeyPatch) -> None:
    async with using(K1) as old:
        ids = [account.id for account in await store(old, 5)]
    monkeypatch.setattr(encryption_key_rotation, "BATCH_ROWS", 2)
    async with using(K2) as both:
        await encryption_key_rotation.rotate(both)
        async with both.session() as session:
            events = (await factories.events(session))[5:]
    assert {event.action for event in events} == {AuditAction.SYSTEM_ENCRYPTION_KEY_ROTATE}
    assert {event.resource_id for event in events} == {"k2"}
    assert [event.details for event in events] == [
        {"table": TABLE, "rows": len(batch), "from": str(batch[0]), "to": str(batch[-1])}
        for batch in (ids[:2], ids[2:4], ids[4:])
    ]


async def test_rows_with_the_first_key_are_not_written_again(using: Using) -> None:
    async with using(K2) as both:
        await store(both, 3)
        await encryption_key_rotation.rotate(both)
        with recorded(both) as sent:
            report = await encryption_key_rotation.rotate(both)
    assert report.rotated == 0
    assert not [statement for statement in sent if not statement.startswith("SELECT")]


async def test_a_dry_run_reads_everything_and_writes_nothing(using: Using) -> None:
    async with using(K1) as old:
        await store(old, 2)
    async with using(K3) as other:
        await store(other)
    async with using(K2) as both:
        async with both.session() as session:
            before = await factories.everything(session)
        report = await encryption_key_rotation.rotate(both, dry_run=True)
        assert (report.rotated, report.stuck, report.retirable) == (2, 1, [])
        assert "'k3' is not configured" in report.problems[0]
        async with both.session() as session:
            assert await factories.everything(session) == before


@pytest.mark.slow
async def test_a_key_removed_too_early_costs_only_its_rows_until_it_is_back(using: Using) -> None:
    async with using(K3) as other:
        (needy,) = await store(other, account_number="U12300123")
    async with using(K1) as old:
        await store(old)
    async with using(K2) as both:
        report = await encryption_key_rotation.rotate(both)
        assert (report.rotated, report.stuck, report.retirable) == (1, 1, ["k1"])
        (problem,) = report.problems
        assert "'k3' is not configured" in problem
        assert "(account *****0123)" in problem
        assert "U12300123" not in problem
        unreadable, readable = await read(both)
        assert values_of(readable) == SECRETS
        with pytest.raises(EncryptionError, match="'k3' is not configured"):
            plain(unreadable.private_key)
    back = KeyRing({"k2": bytes(range(32)), "k3": bytes(range(1, 33))})
    async with using(back) as database:
        report = await encryption_key_rotation.rotate(database)
        assert (report.rotated, report.stuck, report.retirable) == (1, 0, ["k3"])
    async with using(ONLY_K2) as database:
        assert [values_of(account) for account in await read(database)] == [SECRETS] * 2
        assert (await read(database))[0].id == needy.id


async def test_a_key_is_not_retirable_while_one_row_needs_it(using: Using) -> None:
    async with using(K1) as old:
        first, second = await store(old, 2)
    async with using(K2) as both:
        async with both.session() as session:
            await session.execute(  # one secret of one row is damaged
                text(
                    "UPDATE tiger_accounts SET secret_key ="
                    " set_byte(secret_key, 30, get_byte(secret_key, 30) # 1) WHERE id = :id"
                ),
                {"id": second.id},
            )
        report = await encryption_key_rotation.rotate(both)
        assert (report.rotated, report.stuck, report.retirable) == (1, 1, [])
        assert f"tiger_accounts.secret_key:{second.id}" in report.problems[0]
        assert values_of((await read(both))[0]) == SECRETS
        assert (await read(both))[0].id == first.id


@pytest.mark.parametrize("garbage", ["''", "'x'", r"'\x0120'", r"'\x03026b31'", r"'\xff'"])
async def test_a_value_that_is_not_a_ciphertext_is_reported(using: Using, garbage: str) -> None:
    async with using(K2) as both:
        await store(both)
        async with both.session() as session:
            await session.execute(text(f"UPDATE tiger_accounts SET secret_key = {garbage}"))
        report = await encryption_key_rotation.rotate(both)
        assert (report.rotated, report.stuck) == (0, 1)
        assert report.uses == [
            EncryptionKeyUsage(TABLE, DAMAGED, 1),
            EncryptionKeyUsage(TABLE, "k2", 1),
        ]


async def test_another_key_under_an_id_that_is_in_use_is_refused(using: Using) -> None:
    async with using(K1) as old, using(ONLY_K2) as new:
        await store(old, 2)
        await store(new, refresh_token=None)
    impostor = KeyRing({"k2": bytes(32), "k1": bytes(32)})
    async with using(impostor) as database:
        with pytest.raises(EncryptionError, match="a different key that has the same id 'k2'"):
            await encryption_key_rotation.rotate(database)
        assert await uses(database) == [
            EncryptionKeyUsage(TABLE, "k1", 2),
            EncryptionKeyUsage(TABLE, "k2", 1),
        ]


async def test_without_keys_there_is_nothing_to_rotate_to(clone_settings: Settings) -> None:
    settings = clone_settings.model_copy(update={"encryption_keys": None})
    async with Database(settings) as database:
        with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS is not set"):
            await encryption_key_rotation.rotate(database)


async def with_tiger_id(session: AsyncSession, tiger_id: str) -> list[UUID]:
    return [account.id for account in await accounts.list_by_tiger_id(session, tiger_id)]


@pytest.mark.slow
async def test_old_tiger_ids_are_normalized(using: Using) -> None:
    old_ids = " 2015\N{ZERO WIDTH SPACE}0001", "\N{FULLWIDTH DIGIT TWO}2015", "2015 0001"
    async with using(K1) as old:
        outdated, invalid = await store(old, 2, tiger_id="20150001")
        async with old.session() as session:
            await store_old_tiger_id(session, outdated, old_ids[1])
    async with using(K2) as both:
        current, fine = await store(both, 2, tiger_id="20150001")
        async with both.session() as session:
            await store_old_tiger_id(session, current, old_ids[0])
            await store_old_tiger_id(session, invalid, old_ids[2])
            assert await with_tiger_id(session, "20150001") == [fine.id]
            assert await with_tiger_id(session, "22015") == []
            for tiger_id, account in zip(old_ids, (current, outdated, invalid), strict=True):
                assert account.id in await with_tiger_id(session, tiger_id)
        report = await encryption_key_rotation.rotate(both, dry_run=True)
        assert (report.rotated, report.stuck) == (3, 0)
        report = await encryption_key_rotation.rotate(both)
        assert (report.rotated, report.stuck) == (3, 0)
        assert (await encryption_key_rotation.rotate(both)).rotated == 0
        async with both.session() as session:
            assert await with_tiger_id(session, "20150001") == [current.id, fine.id]
            assert await with_tiger_id(session, "22015") == [outdated.id]
            assert await with_tiger_id(session, "2015 0001") == [invalid.id]
            (event,) = (
                await crud.audit_logs.search(
                    session, action=AuditAction.SYSTEM_ENCRYPTION_KEY_ROTATE
                )
            ).items
        assert event.details is not None
        assert event.details["normalized"] == sorted([str(outdated.id), str(current.id)])
    async with using(ONLY_K2) as new:
        texts = [plain(account.tiger_id) for account in await read(new)]
        assert texts == ["22015", "2015 0001", "20150001", "20150001"]
        assert [values_of(account)["private_key"] for account in await read(new)] == [
            SECRETS["private_key"]
        ] * 4


# Beside others who write


async def test_a_concurrent_change_wins(using: Using) -> None:
    async with using(K1) as old, using(K2) as both:
        (account,) = await store(old)
        (mapper,) = encrypted_entities()
        async with both.session() as session:
            (row,) = await encryption_key_rotation._outdated_rows(
                session, mapper, [], UUID(int=0), 10
            )
            change = encryption_key_rotation._reencrypt(K2, mapper, row, set())
            assert change is not None
        async with old.session() as session:
            await accounts.update(session, account.id, refresh_token="newer")
        async with both.session() as session:
            assert await encryption_key_rotation._write(session, mapper, [change], wait=False) == 0
        report = await encryption_key_rotation.rotate(both)
        assert report.rotated == 1
        (moved,) = await read(both)
        assert values_of(moved) == SECRETS | {"refresh_token": "newer"}


@asynccontextmanager
async def locked(database: Database, account: TigerAccount) -> AsyncIterator[Any]:
    """Lock a row until another transaction waits for it."""
    async with database.session() as session:
        await accounts.update(session, account.id, access_token="changed meanwhile")
        yield session
        async with asyncio.timeout(30):
            while not await session.scalar(WAITING):
                await session.execute(text("SELECT pg_stat_clear_snapshot()"))
                await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_a_locked_row_delays_no_other_row(using: Using) -> None:
    async with using(K1) as old, using(K2) as both:
        busy, *free = await store(old, 4)
        moved_first = asyncio.Event()
        async with asyncio.TaskGroup() as group, locked(old, busy):
            task = group.create_task(
                encryption_key_rotation.rotate(both, progress=lambda *_: moved_first.set())
            )
            await asyncio.wait_for(moved_first.wait(), 30)
            async with both.session() as session:  # the others were not waiting behind it
                for account in free:
                    await accounts.update(session, account.id, description="free")
        report = task.result()
        assert (report.rotated, report.stuck, report.retirable) == (4, 0, ["k1"])
        first, *others = await read(both)
        assert values_of(first) == SECRETS | {"access_token": "changed meanwhile"}
        assert [values_of(account) for account in others] == [SECRETS] * 3


@pytest.mark.slow
async def test_a_locked_row_is_normalized_after_the_others(using: Using) -> None:
    async with using(K1) as database, using(K1) as rotating:
        busy, free = await store(database, 2)
        async with database.session() as session:
            for account in (busy, free):
                await store_old_tiger_id(session, account, " 2015")
        async with asyncio.TaskGroup() as group, locked(database, busy):
            task = group.create_task(encryption_key_rotation.rotate(rotating))
        assert (task.result().rotated, task.result().stuck) == (2, 0)
        assert [plain(account.tiger_id) for account in await read(database)] == ["2015"] * 2


RINGS = [
    KeyRing({f"k{n}": bytes([n]) * 32 for n in [first, *({*range(6)} - {first})]})
    for first in range(6)
]


def write_until_told(settings: Settings, ids: list[UUID], told: Connection) -> None:
    """Change accounts in another process, and send their last values at the end."""

    async def run() -> dict[UUID, str]:
        last: dict[UUID, str] = {}
        async with Database(settings, key_provider=RINGS[0]) as database:
            number = 0
            while not told.poll():
                account_id = ids[number % len(ids)]
                async with database.session() as session:
                    await accounts.update(
                        session, account_id, refresh_token=f"{number}", private_key=f"key {number}"
                    )
                last[account_id] = f"{number}"
                number += 1
                if number == len(ids):
                    told.send("at it")
        return last

    told.send(asyncio.run(run()))


@pytest.mark.slow
async def test_eight_writers_lose_no_update(clone_settings: Settings) -> None:
    async with Database(clone_settings, key_provider=RINGS[0]) as database:
        ids = [account.id for account in await store(database, 80)]
        pipes, writers = [], []
        for mine in (ids[start::8] for start in range(8)):
            ours, theirs = FORKS.Pipe()
            writer = FORKS.Process(
                target=write_until_told, args=(Passed(clone_settings), mine, theirs)
            )
            writer.start()
            pipes.append(ours)
            writers.append(writer)
        for pipe in pipes:
            assert await asyncio.to_thread(pipe.recv) == "at it"
        for ring in RINGS[1:]:
            async with Database(clone_settings, key_provider=ring) as other:
                report = await encryption_key_rotation.rotate(other)
                assert report.stuck == 0
                assert report.rotated >= 80
        last: dict[UUID, str] = {}
        for pipe in pipes:
            pipe.send("stop")
            last |= await asyncio.to_thread(pipe.recv)
        for writer in writers:
            writer.join(30)
        stored = {
            a.id: (plain(a.refresh_token), plain(a.private_key)) for a in await read(database)
        }
    assert stored == {id_: (number, f"key {number}") for id_, number in last.items()}


def rotate_and_tell(settings: Settings, told: Connection) -> None:
    """Rotate in another process, and send the number of rows after each batch."""
    encryption_key_rotation.BATCH_ROWS = 20

    async def run() -> None:
        async with Database(settings, key_provider=K2) as database:
            await encryption_key_rotation.rotate(database, progress=lambda done, _: told.send(done))

    asyncio.run(run())


def start_rotating(settings: Settings) -> tuple[BaseProcess, Connection]:
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=rotate_and_tell, args=(Passed(settings), theirs))
    process.start()
    theirs.close()
    return process, ours


@pytest.mark.slow
async def test_a_killed_rotation_can_be_continued(clone_settings: Settings) -> None:
    async with Database(clone_settings, key_provider=K1) as database:
        await store(database, 400)
    async with Database(clone_settings, key_provider=K2) as database:
        for killed in range(1, 4):
            process, pipe = start_rotating(clone_settings)
            for batch in range(1, killed + 1):
                assert await asyncio.to_thread(pipe.recv) == 20 * batch
            process.kill()
            process.join(30)
            left = {use.key_id: use.rows for use in await uses(database)}
            assert left["k1"] + left["k2"] == 400
            assert 0 < left["k1"] <= 400 - 20 * killed
        report = await encryption_key_rotation.rotate(database)
        assert (report.rotated, report.stuck, report.retirable) == (left["k1"], 0, ["k1"])
        async with database.session() as session:
            events = await crud.audit_logs.search(
                session, action=AuditAction.SYSTEM_ENCRYPTION_KEY_ROTATE, limit=1000
            )
        assert sum(event.details["rows"] for event in events if event.details) == 400  # type: ignore[misc]  # JSON
    async with Database(clone_settings, key_provider=ONLY_K2) as database:
        assert all(values_of(account) == SECRETS for account in await read(database))


@pytest.mark.slow
async def test_concurrent_rotations_write_each_row_once(using: Using) -> None:
    async with using(K1) as old:
        await store(old, 60)
    async with using(K2) as one, using(K2) as other:
        reports = await asyncio.gather(
            encryption_key_rotation.rotate(one), encryption_key_rotation.rotate(other)
        )
        assert sum(report.rotated for report in reports) == 60
        assert all(report.retirable == ["k1"] for report in reports)
        assert all(len(secrets_of(account)) == 5 for account in await read(one))

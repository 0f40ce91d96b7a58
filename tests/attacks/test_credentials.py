"""An attacker with SQL as the application's role changes accounts and their ciphertexts (A18)."""

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import load_only

from tests.support import factories
from tests.support.encryption_keys import (
    K1,
    K2,
    SECRETS,
    secret_account,
    store_unbound,
    values_of,
)
from tests.support.private_keys import der
from tests.support.tiger_tokens import tiger_token
from tiger_db import Database, PrivateKeyFormat, RefreshTrigger, Settings, TigerAccount, crud
from tiger_db.database import AsyncSession
from tiger_db.encryption import KeyRing, Secret
from tiger_db.encryption_key_rotation import list_encryption_key_usage, rotate
from tiger_db.errors import EncryptionError, InvalidState
from tiger_db.models import TigerEnvironment
from tiger_db.tiger import client_config

NEW_TOKEN = tiger_token()
# What an attacker can change beside good credentials.
CHANGES = {
    "server_url": "server_url = 'https://evil.example/gateway'",
    "environment": "environment = 'SANDBOX'",
    "account_number": "account_number = '99999999'",
    "push host": """client_options = '{"socket_host_port": "ssl,evil.example,9883"}'""",
}
COLUMNS = (*SECRETS, "tiger_id_fingerprint")


@pytest.fixture
async def account(session: AsyncSession) -> TigerAccount:
    return await secret_account(session, private_key=der(PrivateKeyFormat.PK8))


async def attack(session: AsyncSession, statement: str, **values: Any) -> None:
    await session.flush()
    await session.execute(text(statement), values)


def assert_unreadable(account: TigerAccount, *names: str) -> None:
    for name in names or SECRETS:
        with pytest.raises(EncryptionError, match=f"tiger_accounts.{name}:{account.id}"):
            getattr(account, name).get_secret_value()


@pytest.mark.parametrize("change", CHANGES)
async def test_credentials_cannot_be_read_beside_a_changed_column(
    session: AsyncSession, account: TigerAccount, change: str
) -> None:
    await attack(session, f"UPDATE tiger_accounts SET {CHANGES[change]}")
    session.expunge_all()
    for found in (
        await crud.accounts.get(session, account.id),
        await session.get(TigerAccount, account.id, populate_existing=True),
        (await crud.accounts.list_accounts(session)).items[0],
        (await crud.accounts.list_by_tiger_id(session, SECRETS["tiger_id"]))[0],
    ):
        assert found is not None
        assert_unreadable(found)
        with pytest.raises(EncryptionError):
            client_config(found)  # nothing can be signed or sent


async def test_a_claimed_account_cannot_be_read_either(
    session: AsyncSession, account: TigerAccount
) -> None:
    await crud.token_status.create_refresh_operation(
        session, tiger_account_id=account.id, trigger=RefreshTrigger.MANUAL
    )
    await attack(session, f"UPDATE tiger_accounts SET {CHANGES['server_url']}")
    (claim,) = await crud.token_status.claim_due(session, worker="w")
    assert claim.tiger_account is not None
    assert_unreadable(claim.tiger_account)
    with pytest.raises(EncryptionError):  # a token is not stored beside the attacker's URL
        await crud.token_status.complete(session, claim, access_token=NEW_TOKEN)


async def test_no_new_secret_is_stored_beside_a_changed_column(
    session: AsyncSession, account: TigerAccount
) -> None:
    await attack(session, f"UPDATE tiger_accounts SET {CHANGES['server_url']}")
    accounts = crud.accounts
    changes: list[Callable[[], Awaitable[object]]] = [
        lambda: accounts.update_tokens(session, account.id, access_token=NEW_TOKEN),
        lambda: accounts.update(session, account.id, secret_key="new"),
        lambda: accounts.update(session, account.id, server_url="https://good.example"),
        lambda: accounts.update(session, account.id, account_number="77777777"),
    ]
    for change in changes:
        with pytest.raises(EncryptionError):
            async with session.begin_nested():
                await change()
        await session.refresh(account)
    # New credentials, or the old URL, make the account usable again.
    await crud.accounts.update(session, account.id, server_url=None, **SECRETS)
    assert values_of(account) == SECRETS


async def test_ciphertexts_cannot_be_swapped(session: AsyncSession, account: TigerAccount) -> None:
    other = await secret_account(session, server_url="https://other.example")
    await attack(
        session,
        f"UPDATE tiger_accounts SET {', '.join(f'{c} = o.{c}' for c in COLUMNS)}"
        " FROM tiger_accounts AS o WHERE o.id = :other AND tiger_accounts.id = :id",
        other=other.id,
        id=account.id,
    )
    await session.refresh(account)
    assert_unreadable(account)
    await attack(session, "UPDATE tiger_accounts SET secret_key = access_token WHERE id = :id",
                 id=other.id)  # fmt: skip
    await session.refresh(other)
    assert_unreadable(other, "secret_key")


async def test_an_earlier_ciphertext_does_not_fit_to_a_later_url(
    session: AsyncSession, account: TigerAccount
) -> None:
    """The attacker puts back what the account had before an honest change of its URL."""
    stored = text(f"SELECT {', '.join(COLUMNS)}, server_url FROM tiger_accounts WHERE id = :id")
    earlier = dict((await session.execute(stored, {"id": account.id})).one()._mapping)
    await crud.accounts.update(session, account.id, server_url="https://new.example")
    later = dict((await session.execute(stored, {"id": account.id})).one()._mapping)
    put_back = ", ".join(f"{column} = :{column}" for column in COLUMNS)
    await attack(
        session, f"UPDATE tiger_accounts SET {put_back}", **{c: earlier[c] for c in COLUMNS}
    )
    await session.refresh(account)
    assert_unreadable(account)
    await attack(
        session, f"UPDATE tiger_accounts SET {put_back}, server_url = :server_url", **later
    )
    await session.refresh(account)
    assert account.access_token is not None
    assert account.access_token.get_secret_value() == SECRETS["access_token"]


async def test_a_ciphertext_cannot_be_downgraded(
    session: AsyncSession, account: TigerAccount
) -> None:
    """Another version number, or a real ciphertext of version 1 from an old dump, is refused."""
    await attack(session, "UPDATE tiger_accounts SET private_key = set_byte(private_key, 0, 1)")
    await session.refresh(account)
    with pytest.raises(EncryptionError, match="version 1 are refused"):
        assert account.private_key.get_secret_value()
    await attack(session, "UPDATE tiger_accounts SET private_key = set_byte(private_key, 0, 2)")
    await session.refresh(account)
    assert account.private_key.get_secret_value() == der(PrivateKeyFormat.PK8)
    keys = KeyRing({"test": bytes(range(32))})
    await store_unbound(session, account, keys)
    assert_unreadable(account)


async def test_statements_on_the_table_cannot_change_bound_columns(
    session: AsyncSession, account: TigerAccount
) -> None:
    table: Any = TigerAccount.__table__  # type: ignore[attr-defined]
    for statement, values in (
        (update(table).values(server_url="https://evil.example"), None),
        (update(table).values({table.c.environment: "SANDBOX"}), None),
        (update(table), {"account_number": "99999999"}),
        (update(table).where(table.c.id == account.id), [{"server_url": "https://evil.example"}]),
        (update(TigerAccount).values(server_url="x").returning(TigerAccount), None),
    ):
        with pytest.raises(InvalidState, match=r"use crud\.accounts\.update"):
            await session.execute(statement, values)
    await session.execute(update(table).values(description="x"))
    await session.refresh(account)
    assert values_of(account)["secret_key"] == SECRETS["secret_key"]


# Honest changes


@pytest.mark.parametrize(
    "changes",
    [
        {"server_url": "https://new.example"},
        {"environment": TigerEnvironment.SANDBOX},
        {"account_number": "u77"},
        {"client_options": {"socket_host_port": "ssl,new.example,9883"}},
        {"server_url": "https://new.example", "secret_key": "new", "access_token": None},
    ],
)
async def test_an_honest_change_encrypts_the_secrets_again(
    session: AsyncSession, account: TigerAccount, changes: dict[str, Any]
) -> None:
    secrets = values_of(account)
    await crud.accounts.update(session, account.id, **changes)
    await session.refresh(account)
    new = {name: value for name, value in changes.items() if name in SECRETS}
    assert values_of(account) == {n: s for n, s in (secrets | new).items() if s is not None}
    event = next(iter(await crud.audit_logs.get_recent_events(session)))
    assert event.new_values is not None
    assert event.new_values.keys() == changes.keys()  # unchanged secrets are not listed


async def test_a_changed_url_keeps_the_time_of_the_next_refresh(session: AsyncSession) -> None:
    expires_at = datetime.now(UTC) + timedelta(days=20)
    account = await secret_account(session, token_expires_at=expires_at)
    due = account.token_refresh_at
    assert due is not None
    await session.execute(text("SELECT pg_sleep(0.01)"))
    await crud.accounts.update(session, account.id, server_url="https://new.example")
    await session.refresh(account)
    assert account.token_refresh_at == due


async def test_an_assignment_encrypts_secrets_that_are_not_loaded(
    session: AsyncSession, account: TigerAccount
) -> None:
    secrets = values_of(account)
    session.expunge_all()
    columns: list[Any] = [TigerAccount.server_url, TigerAccount.tiger_id]
    partial = select(TigerAccount).options(load_only(*columns))
    found = (await session.scalars(partial)).one()
    with pytest.raises(EncryptionError, match="load the whole entity"):
        found.tiger_id.get_secret_value()
    found.server_url = "https://new.example"
    await session.flush()
    session.expunge_all()
    again = await crud.accounts.get(session, account.id)
    assert again is not None
    assert (again.server_url, values_of(again)) == ("https://new.example", secrets)


async def test_a_changed_list_in_place_encrypts_again(
    session: AsyncSession, account: TigerAccount
) -> None:
    secrets = values_of(account)
    account.client_options["socket_host_port"] = "ssl,new.example,9883"
    await session.flush()
    await session.refresh(account)
    assert values_of(account) == secrets


async def test_an_old_number_in_another_spelling_is_the_same_number(
    session: AsyncSession, account: TigerAccount
) -> None:
    account.account_number = "U77"
    await session.flush()
    await session.execute(
        text("ALTER TABLE tiger_accounts DROP CONSTRAINT ck_tiger_accounts_account_number_form")
    )
    await attack(session, "UPDATE tiger_accounts SET account_number = ' u77'")
    await session.refresh(account)
    assert values_of(account)["secret_key"] == SECRETS["secret_key"]


@pytest.fixture
async def unmarked(clone_settings: Settings) -> AsyncIterator[Database]:
    async with Database(clone_settings, key_provider=K1) as database:
        yield database


async def test_a_token_and_a_url_that_are_written_at_once_fit_together(clone: Database) -> None:
    """Each of two sessions loads the account before the other changes it."""
    async with clone.session() as session:
        account = await secret_account(session)
    async with clone.session() as one, clone.session() as two:
        first, second = [await crud.accounts.get(s, account.id) for s in (one, two)]
        assert first is not None
        assert second is not None
        first.server_url, second.access_token = "https://new.example", "new-token"
        await one.flush()
        waiting = asyncio.create_task(two.commit())
        await asyncio.sleep(0)
        await one.commit()
        await waiting
    async with clone.session() as session:
        found = await crud.accounts.get(session, account.id)
    assert found is not None
    assert (found.server_url, values_of(found)) == (
        "https://new.example",
        SECRETS | {"access_token": "new-token"},
    )


async def test_a_refresh_ends_although_the_url_was_changed_meanwhile(clone: Database) -> None:
    async with clone.session() as session:
        account = await secret_account(session, access_token=None, refresh_token=None)
        await crud.token_status.create_refresh_operation(
            session, tiger_account_id=account.id, trigger=RefreshTrigger.MANUAL
        )
    async with clone.session() as session:
        (claim,) = await crud.token_status.claim_due(session, worker="w")
    async with clone.session() as session:
        await crud.accounts.update(session, account.id, server_url="https://new.example")
    async with clone.session() as session:
        await crud.token_status.complete(session, claim, access_token=NEW_TOKEN)
    async with clone.session() as session:
        found = await crud.accounts.get(session, account.id)
    assert found is not None
    assert values_of(found)["access_token"] == NEW_TOKEN


@pytest.mark.slow
async def test_a_rotation_binds_old_ciphertexts_and_the_mark_refuses_them(
    unmarked: Database, clone_settings: Settings
) -> None:
    async with unmarked.session() as session:
        account = await secret_account(session)
        await store_unbound(session, account, K1)
        assert values_of(account) == SECRETS
        (usage,) = await list_encryption_key_usage(session)
    assert (usage.rows, usage.unbound) == (1, 1)
    marked = KeyRing({"k1": bytes(32)}, bound_key_ids=["k1"])
    async with (
        Database(clone_settings, key_provider=marked) as database,
        database.session() as session,
    ):
        found = await crud.accounts.get(session, account.id)
        assert found is not None
        assert_unreadable(found)
    assert (await rotate(unmarked)).rotated == 1
    async with (
        Database(clone_settings, key_provider=marked) as database,
        database.session() as session,
    ):
        found = await crud.accounts.get(session, account.id)
        assert found is not None
        assert values_of(found) == SECRETS
        (usage,) = await list_encryption_key_usage(session)
    assert (usage.rows, usage.unbound) == (1, 0)


async def test_an_old_ciphertext_is_bound_when_a_column_changes(unmarked: Database) -> None:
    async with unmarked.session() as session:
        account = await secret_account(session)
        await store_unbound(session, account, K1)
        await crud.accounts.update(session, account.id, server_url="https://new.example")
        (usage,) = await list_encryption_key_usage(session)
        assert usage.unbound == 0
        await session.refresh(account)
        assert values_of(account) == SECRETS


async def test_a_rotation_leaves_a_row_with_a_changed_column_and_names_it(
    unmarked: Database, clone_settings: Settings
) -> None:
    async with unmarked.session() as session:
        account = await secret_account(session)
        await attack(session, f"UPDATE tiger_accounts SET {CHANGES['server_url']}")
    async with Database(clone_settings, key_provider=K2) as database:
        report = await rotate(database)
    assert (report.rotated, report.stuck) == (0, 1)
    assert str(account.id) in report.problems[0]


# Pickles and representations (attack A26)


def test_plain_secrets_and_settings_cannot_be_pickled() -> None:
    account, settings = factories.new_account(**SECRETS), Settings(db_host="h", db_password="pw")
    for value in (account, Secret("plain"), {"nested": [account]}, settings, Settings()):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(value, protocol)
    for copied in (copy.copy, copy.deepcopy):
        assert values_of(copied(account)) == SECRETS
        assert copied(settings) == settings
        assert copied(Secret("plain")) == Secret("plain")


async def test_a_stored_account_is_pickled_without_plain_secrets(account: TigerAccount) -> None:
    pickled = pickle.dumps(account)
    assert not [secret for secret in SECRETS.values() if secret.encode() in pickled]
    with pytest.raises(EncryptionError):
        pickle.loads(pickled).access_token.get_secret_value()


def test_the_representation_of_connect_arguments_shows_no_password() -> None:
    url = "postgresql://u:hunter2-hunter2@localhost/d"
    by_parts = Settings(db_host="localhost", db_user="u", db_password="hunter2-hunter2")
    for settings in (by_parts, Settings(database_url=url)):
        arguments = settings.connect_args()
        assert arguments["password"]() == "hunter2-hunter2"
        for told in (repr(arguments), str(arguments), repr(settings), repr(settings.url)):
            assert "hunter2" not in told

"""Code of a user: type checkers infer the asserted types, and report no error."""

from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, IPv6Network
from typing import Any, assert_type
from uuid import UUID

from sqlalchemy import select
from sqlmodel import col

from tiger_db import (
    AccountStatus,
    AccountView,
    Actor,
    APIKey,
    APIKeyScope,
    APIKeyStatus,
    APIKeyView,
    AsyncSession,
    AuditAction,
    AuditLog,
    AuditResult,
    Database,
    KeyVerifier,
    NewToken,
    Page,
    RefreshTrigger,
    RefreshWorker,
    Secret,
    Settings,
    TigerAccount,
    TokenStatus,
    acting_as,
    crud,
    errors,
    get_database,
    get_session,
    run_blocking,
    wait_for_refresh,
)

account = TigerAccount(
    account_name="Main", account_number="U1234567", tiger_id="20150001", private_key="..."
)
with_secrets = TigerAccount(
    account_name="Main",
    account_number="U1234567",
    tiger_id=Secret("20150001"),
    private_key=Secret("..."),
    secret_key=None,
    access_token="...",
)
account.private_key = "new"
account.access_token = "new"
account.access_token = None


async def accounts(session: AsyncSession) -> None:
    created = await crud.accounts.create(session, account)
    assert_type(created, TigerAccount)
    assert_type(created.id, UUID)
    assert_type(created.created_at, datetime)
    assert_type(created.updated_at, datetime)
    assert_type(created.account_name, str)
    assert_type(created.tiger_id, Secret)
    assert_type(created.tiger_id.get_secret_value(), str)
    assert_type(created.private_key, Secret | Any)
    assert_type(created.private_key.get_secret_value(), str | Any)
    if created.private_key is None:  # a closed account
        print(created.status)
    assert_type(created.access_token, Secret | None)
    assert_type(created.token_expires_at, datetime | None)
    assert_type(created.api_keys, list[APIKey])

    assert_type(
        await crud.accounts.get(session, created.id, load=["api_keys"]), TigerAccount | None
    )
    page = await crud.accounts.list_accounts(session, status=AccountStatus.ACTIVE, count=True)
    assert_type(page, Page[TigerAccount])
    assert_type(page.items, list[TigerAccount])
    assert_type(page.next_cursor, str | None)
    assert_type(page.total, int | None)
    for each in page:
        assert_type(each, TigerAccount)
    filters: crud.accounts.AccountFilters = {"status": [AccountStatus.ACTIVE]}
    await crud.accounts.list_accounts(session, **filters)

    changes: crud.accounts.AccountChanges = {"description": "new"}
    updated = await crud.accounts.update(
        session, created.id, reason="...", private_key="new", tags={"desk": "A"}
    )
    assert_type(updated, TigerAccount)
    await crud.accounts.update(session, created.id, **changes)

    newer = col(TigerAccount.created_at) > datetime.now(UTC)
    rows = await session.scalars(select(TigerAccount).where(newer))
    assert_type(rows.all(), Sequence[TigerAccount])


async def keys(session: AsyncSession) -> None:
    key, raw_key = await crud.api_keys.create_api_key(
        session, name="assistant", scopes=[APIKeyScope.MCP_READ], allowed_ips=["10.0.0.0/8"]
    )
    assert_type(key, APIKey)
    assert_type(raw_key, str)
    assert_type(key.created_at, datetime)
    assert_type(key.allowed_ips, list[IPv4Network | IPv6Network])
    assert_type(key.tiger_account, TigerAccount | None)
    changes: crud.api_keys.KeyChanges = {"name": "new"}
    assert_type(await crud.api_keys.update(session, key.id, **changes), APIKey)
    assert_type(await crud.api_keys.get(session, key.id), APIKey | None)
    assert_type(await crud.api_keys.list_api_keys(session, status=key.status), Page[APIKey])
    assert_type(key.status, APIKeyStatus)
    assert_type(await crud.api_keys.verify_api_key(session, raw_key), APIKey | None)
    assert_type(await crud.api_keys.authorize_api_key(session, raw_key), APIKey)


async def events(session: AsyncSession, database: Database) -> None:
    event = await crud.audit_logs.log_event(
        session, action=AuditAction.DATA_QUERY, details={"symbol": "AAPL"}, ip_address="10.0.0.1"
    )
    assert_type(event, AuditLog)
    assert_type(event.created_at, datetime)
    assert_type(event.position, int)
    assert_type(event.result, AuditResult | str)
    assert_type(await crud.audit_logs.search(session, user_id="alice"), Page[AuditLog])
    assert_type(await crud.audit_logs.get(session, event.id), AuditLog | None)
    async with crud.audit_logs.recorded(database, action="app:report") as recorded:
        assert_type(recorded, AuditLog)


async def refreshes(session: AsyncSession, database: Database) -> None:
    refresh = await crud.token_status.create_refresh_operation(
        session, tiger_account_id=account.id, trigger=RefreshTrigger.MANUAL
    )
    assert_type(refresh, TokenStatus)
    assert_type(refresh.scheduled_at, datetime)
    assert_type(refresh.tiger_account, TigerAccount)
    assert_type(await crud.token_status.history(session, account_id=account.id), Page[TokenStatus])
    claim = await crud.token_status.claim(session, refresh.id, worker="w")
    done = await crud.token_status.complete(session, claim, access_token="...")
    assert_type(done, TokenStatus)
    ended = await wait_for_refresh(database, refresh.id, timeout=timedelta(seconds=30))
    assert_type(ended, TokenStatus)


async def new_token(refreshed: TigerAccount) -> NewToken:
    return NewToken(access_token=f"{refreshed.private_key.get_secret_value()}...")


async def worker(database: Database) -> None:
    await RefreshWorker(database, new_token).run()


def views(page: Page[TigerAccount], key: APIKey) -> tuple[Page[AccountView], APIKeyView]:
    view = AccountView.model_validate(page.items[0])
    assert_type(view, AccountView)
    assert_type(view.id, UUID)
    assert_type(view.created_at, datetime)
    return page, key


async def session_of_a_request() -> AsyncGenerator[AsyncSession]:
    async with get_session(actor=Actor(user_id="alice")) as session:
        yield session


async def authorized(raw_key: str) -> APIKey | None:
    async with Database(Settings()) as database, KeyVerifier(database) as verifier:
        try:
            key = await verifier.authorize(raw_key, scopes=[APIKeyScope.MCP_READ])
        except errors.RateLimited as error:
            assert_type(error.retry_after, timedelta)
        except errors.TigerDBError as error:
            assert_type(error.code, str)
        else:
            assert_type(key, APIKey)
            return key
    return None


async def count() -> int:
    async with get_session() as session, get_database().session() as other:
        assert_type(session, AsyncSession)
        assert_type(other, AsyncSession)
        return len(await crud.accounts.list_accounts(session))


def blocking() -> int:
    with acting_as(Actor(user_id="alice")):
        counted = run_blocking(count)
    assert_type(counted, int)
    return counted

"""Mistakes of a user, which type checkers report.

Each comment names the expected error. The checkers also report a comment without an error.
"""

from tiger_db import (
    AccountView,
    APIKey,
    APIKeyScope,
    AsyncSession,
    AuditLog,
    Database,
    KeyVerifier,
    Page,
    Secret,
    TigerAccount,
    TokenStatus,
    crud,
    get_session,
    run_blocking,
)

TigerAccount(  # type: ignore[call-arg]
    acount_name="Main",  # pyright: ignore[reportCallIssue]
    account_name="Main",
    account_number="U1234567",
    tiger_id="20150001",
    private_key="...",
)
TigerAccount(account_name="Main", account_number="U1")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
TigerAccount(
    account_name="Main",
    account_number="U1234567",
    tiger_id=20150001,  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    private_key=None,  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
)
APIKey(name="k", key_prefix="p", key_hash="h", scopes="mcp:read")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
AuditLog(acton="app:report")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
TokenStatus(trigger="manual")  # type: ignore[call-arg, arg-type] # pyright: ignore[reportCallIssue]


async def accounts(session: AsyncSession, account: TigerAccount) -> None:
    account.private_key = 1  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    account.private_key.get_secret()  # type: ignore[union-attr] # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    account.access_token.get_secret_value()  # type: ignore[union-attr] # pyright: ignore[reportOptionalMemberAccess]
    await crud.accounts.update(session, account.id, acount_name="x")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await crud.accounts.update(session, account.id, is_default_data="yes")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await crud.accounts.update(session, account.id, private_key=None)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await crud.accounts.update(session, account.id, created_at=account.created_at)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await crud.accounts.list_accounts(session, stauts=account.status)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await crud.accounts.get(session, str(account.id))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    (await crud.accounts.get(session, account.id)).account_name  # type: ignore[union-attr] # pyright: ignore[reportOptionalMemberAccess]


async def keys(session: AsyncSession, key: APIKey) -> None:
    await crud.api_keys.update(session, key.id, scope=[APIKeyScope.MCP_READ])  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await crud.api_keys.update(session, key.id, name=1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await crud.api_keys.create_api_key(session, name="k", scopes="mcp:read")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def events(session: AsyncSession) -> None:
    await crud.audit_logs.log_event(session, acton="app:report")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await crud.audit_logs.search(session, user="alice")  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


async def refreshes(session: AsyncSession, refresh: TokenStatus) -> None:
    await crud.token_status.history(session, account=refresh.tiger_account_id)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await crud.token_status.claim(session, refresh.id)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


def views(view: AccountView, page: Page[TigerAccount]) -> Page[APIKey]:
    view.private_key  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    return page  # type: ignore[return-value] # pyright: ignore[reportReturnType]


async def count() -> int:
    async with get_session(actor="alice") as session:  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        return len(await crud.accounts.list_accounts(session))


async def verify(verifier: KeyVerifier, database: Database) -> str:
    await verifier.authorize(Secret("..."))  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await crud.accounts.list_accounts(database)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    return run_blocking(count)  # type: ignore[return-value] # pyright: ignore[reportReturnType]

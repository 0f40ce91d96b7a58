"""A demo of tiger_db on the database of the settings: by default, the embedded PostgreSQL."""

import asyncio
import base64
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tiger_db import (
    Actor,
    APIKey,
    APIKeyScope,
    AuditAction,
    Settings,
    TigerAccount,
    acting_as,
    crud,
    get_session,
)

NUMBER = "20191106192858300"  # 17 digits: a paper account
TIGER_DB = str(Path(sys.executable).with_name("tiger-db"))


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def tiger_db(*arguments: str) -> None:
    say(f"$ tiger-db {' '.join(arguments)}")
    if subprocess.run([TIGER_DB, *arguments], check=False).returncode:
        sys.exit(1)  # the command has printed the reason


def tiger_token(lifetime: timedelta) -> str:
    """Return a token in Tiger's format, issued now."""
    now = datetime.now(UTC)
    stamps = (f"{round(at.timestamp() * 1000)}" for at in (now, now + lifetime))
    return base64.b64encode(",".join(stamps).encode() + os.urandom(16)).decode()


async def create() -> tuple[TigerAccount, APIKey, str]:
    async with get_session() as session:
        account = await crud.accounts.get_by_account_number(session, NUMBER)
        if account is None:
            account = await crud.accounts.create(
                session,
                TigerAccount(
                    account_name="Demo",
                    account_number=NUMBER,
                    tiger_id="20150001",
                    private_key="demo",
                    access_token=tiger_token(timedelta(minutes=30)),
                ),
            )
        key, raw_key = await crud.api_keys.create_api_key(
            session,
            name="Demo assistant",
            scopes=[APIKeyScope.TRADE_WRITE],
            tiger_account_id=account.id,
            expires_at=datetime.now(UTC) + timedelta(days=30),
        )
    say(f"account {account.account_number} ({account.account_type}), token {account.access_token}")
    say(f"API key {key.key_prefix}, which is shown only once: {raw_key}")
    return account, key, raw_key


async def trade(account: TigerAccount, raw_key: str) -> None:
    async with get_session() as session:
        key = await crud.api_keys.authorize_api_key(
            session, raw_key, scopes=[APIKeyScope.TRADE_READ], account_id=account.id
        )
        await crud.audit_logs.log_event(
            session,
            action=AuditAction.TRADE_PLACE_ORDER,
            tiger_account_id=account.id,
            api_key_id=key.id,
            resource_type="order",
            resource_id="31318009878020096",
            details={"symbol": "AAPL", "side": "BUY", "quantity": 100, "limit_price": "187.50"},
            duration_ms=42,
        )
    say("the API key is accepted, and the trade is recorded as an audit event")


async def refresh(account: TigerAccount) -> None:
    async with get_session() as session:
        opened = await crud.token_status.refresh_now(session, account.id)
    async with get_session() as session:
        claim = await crud.token_status.claim(session, opened.id, worker="demo")
    # A worker asks Tiger here, while no transaction is open.
    async with get_session() as session:
        done = await crud.token_status.complete(
            session, claim, access_token=tiger_token(timedelta(days=15))
        )
    say(f"token refreshed; the next refresh is due on {done.next_refresh_at:%Y-%m-%d}")


async def demo() -> None:
    account, _, raw_key = await create()
    await trade(account, raw_key)
    await refresh(account)


def main() -> None:
    if Settings().production:
        raise SystemExit("the demo stores a made-up account, so it needs another ENVIRONMENT")
    tiger_db("init")
    with acting_as(Actor(user_id="demo", user_type="script")):
        asyncio.run(demo())
    tiger_db("list-accounts")
    tiger_db("list-api-keys", "--limit", "5")
    tiger_db("list-events", "--limit", "8")
    tiger_db("seal-audit")
    tiger_db("verify-audit")
    tiger_db("list-refreshes", "--limit", "5")
    tiger_db("health-check")
    say("`.venv/bin/tiger-db --help` lists all commands.")
    print("`.venv/bin/tiger-db stop-embedded` stops the embedded PostgreSQL.")


if __name__ == "__main__":
    main()

"""Benchmarks of sessions, compared with bare SQLModel: what a user of SQLModel writes by hand.

The classes `Account`, `Key` and `Event` have the columns of `TigerAccount`, `APIKey` and `AuditLog`
on the same tables, without validation, decryption, change tracking and audit events.
"""

import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, ClassVar, cast
from uuid import UUID

from sqlalchemy import ARRAY, BigInteger, DateTime, Enum, LargeBinary, Text, insert
from sqlalchemy.dialects.postgresql import CIDR, INET, JSONB
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.types import TypeEngine
from sqlmodel import Field, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession
from uuid_utils.compat import uuid7

from benchmarks.audit import EVENT, PAGE, ROWS
from benchmarks.work import Work
from tiger_db import (
    AccountStatus,
    AccountType,
    APIKeyScope,
    APIKeyStatus,
    AuditResult,
    AuditSeverity,
    Database,
    MarketPermission,
    PrivateKeyFormat,
    TigerEnvironment,
    TigerLicense,
    crud,
)
from tiger_db.connections import connect_args

ACCOUNTS = 1000
SESSION = "a session of one statement"
CHECK_KEY = "check a key in a session"
LOG_EVENT = "log one event in a session"
FIRST_PAGE = f"first page of {PAGE} of {ROWS:,} events"
LIST_ACCOUNTS = f"list {ACCOUNTS:,} accounts"


def enum(kind: type[StrEnum], name: str) -> type[Enum]:
    """Return a native enum of PostgreSQL. SQLModel's stubs want a class."""
    values = Enum(kind, name=name, values_callable=lambda members: [m.value for m in members])
    return cast("type[Enum]", values)


def array(item: TypeEngine[Any] | type[TypeEngine[Any]]) -> type[ARRAY[Any]]:
    return cast("type[ARRAY[Any]]", ARRAY(item))


MARKETS = enum(MarketPermission, "market_permission")
SCOPES = enum(APIKeyScope, "api_key_scope")
TIME = cast("type[DateTime]", DateTime(timezone=True))


class Row(SQLModel):
    id: UUID = Field(default_factory=uuid7, primary_key=True)
    created_at: datetime = Field(default=None, sa_type=TIME)


class MutableRow(Row):
    updated_at: datetime = Field(default=None, sa_type=TIME)


class Account(MutableRow, table=True):
    __tablename__: ClassVar[Any] = "tiger_accounts"

    account_name: str
    account_number: str
    account_type: AccountType = Field(sa_type=enum(AccountType, "account_type"))
    status: AccountStatus = Field(sa_type=enum(AccountStatus, "account_status"))
    license: TigerLicense | None = Field(sa_type=enum(TigerLicense, "tiger_license"))
    environment: TigerEnvironment = Field(sa_type=enum(TigerEnvironment, "tiger_environment"))
    server_url: str | None
    token_expires_at: datetime | None = Field(default=None, sa_type=TIME)
    token_refresh_at: datetime | None = Field(default=None, sa_type=TIME)
    is_default_trading: bool
    is_default_data: bool
    market_permissions: list[MarketPermission] = Field(sa_type=array(MARKETS))
    quote_permissions: list[dict[str, Any]] = Field(default=None, sa_type=JSONB)
    client_options: dict[str, Any] = Field(default=None, sa_type=JSONB)
    auto_suspended: bool
    error_count: int = Field(default=None, sa_type=BigInteger)
    last_error: str | None
    last_error_at: datetime | None = Field(default=None, sa_type=TIME)
    failing_until: datetime | None = Field(default=None, sa_type=TIME)
    description: str | None
    tags: dict[str, Any] = Field(default=None, sa_type=JSONB)
    tiger_id: bytes = Field(sa_type=LargeBinary)
    tiger_id_fingerprint: bytes = Field(sa_type=LargeBinary)
    private_key: bytes | None = Field(sa_type=LargeBinary)
    private_key_format: PrivateKeyFormat = Field(
        sa_type=enum(PrivateKeyFormat, "private_key_format")
    )
    secret_key: bytes | None = Field(sa_type=LargeBinary)
    access_token: bytes | None = Field(sa_type=LargeBinary)
    refresh_token: bytes | None = Field(sa_type=LargeBinary)


class Key(MutableRow, table=True):
    __tablename__: ClassVar[Any] = "api_keys"

    name: str
    key_prefix: str
    root_id: UUID | None
    successor_id: UUID | None
    status: APIKeyStatus = Field(sa_type=enum(APIKeyStatus, "api_key_status"))
    scopes: list[APIKeyScope] = Field(sa_type=array(SCOPES))
    tiger_account_id: UUID | None
    expires_at: datetime | None = Field(default=None, sa_type=TIME)
    last_used_at: datetime | None = Field(default=None, sa_type=TIME)
    usage_count: int = Field(default=None, sa_type=BigInteger)
    rate_limit_per_hour: int | None = Field(default=None, sa_type=BigInteger)
    rate_limit_per_day: int | None = Field(default=None, sa_type=BigInteger)
    allowed_ips: list[IPv4Network | IPv6Network] = Field(sa_type=array(CIDR))
    allowed_user_agents: list[str] = Field(sa_type=array(Text))
    created_by: str | None
    revoked_at: datetime | None = Field(default=None, sa_type=TIME)
    revocation_reason: str | None
    description: str | None
    tags: dict[str, Any] = Field(default=None, sa_type=JSONB)
    key_hash: str
    pepper_id: str | None
    mac: str | None
    mac_denied_at: datetime | None = Field(default=None, sa_type=TIME)


class Event(Row, table=True):
    __tablename__: ClassVar[Any] = "audit_logs"

    action: str
    result: AuditResult = Field(
        default=AuditResult.SUCCESS, sa_type=enum(AuditResult, "audit_result")
    )
    severity: AuditSeverity = Field(
        default=AuditSeverity.MEDIUM, sa_type=enum(AuditSeverity, "audit_severity")
    )
    resource_type: str | None
    resource_id: str | None
    user_id: str | None
    user_type: str | None
    session_id: str | None
    ip_address: IPv4Address | IPv6Address | None = Field(sa_type=INET)
    user_agent: str | None
    request_method: str | None
    request_path: str | None
    request_id: str | None
    tiger_account_id: UUID | None
    api_key_id: UUID | None
    details: dict[str, Any] | None = Field(default=None, sa_type=JSONB)
    old_values: dict[str, Any] | None = Field(default=None, sa_type=JSONB)
    new_values: dict[str, Any] | None = Field(default=None, sa_type=JSONB)
    error_code: str | None
    error_message: str | None
    duration_ms: int | None = Field(default=None, sa_type=BigInteger)
    tags: dict[str, Any] | None = Field(default=None, sa_type=JSONB)
    position: int = Field(default=None, sa_type=BigInteger)


@asynccontextmanager
async def sessions(database: Database) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """Yield a function that opens a bare session on the same server, in a pool of the same size."""
    settings = database.settings
    engine = create_async_engine(
        "postgresql+asyncpg://",
        connect_args=dict(await connect_args(settings)),
        pool_size=settings.db_pool_size,
        max_overflow=settings.db_max_overflow,
        pool_timeout=settings.db_pool_timeout,
        pool_recycle=settings.db_pool_recycle,
    )
    yield async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)
    await engine.dispose()


Bare = async_sessionmaker[AsyncSession]


@asynccontextmanager
async def works(database: Database) -> AsyncIterator[list[Work]]:
    """Yield the benchmarks on a database with at least 1,000 accounts and 50 events."""
    async with sessions(database) as bare:
        yield [
            session_work(database, bare),
            await key_work(database, bare),
            event_work(database, bare),
            page_work(database, bare),
            accounts_work(database, bare),
        ]


def session_work(database: Database, bare: Bare) -> Work:
    statement = select(1)

    async def ours() -> None:
        async with database.session() as session:
            await session.exec(statement)

    async def theirs() -> None:
        async with bare() as session:
            await session.exec(statement)
            await session.commit()

    return Work(SESSION, ours, theirs, times=300)


async def key_work(database: Database, bare: Bare) -> Work:
    async with database.session() as session:
        _, raw_key = await crud.api_keys.create_api_key(
            session, name="bare", scopes=[APIKeyScope.MCP_READ]
        )
    prefix, _, secret = raw_key.rpartition("_")
    digest = hashlib.sha256(secret.encode()).hexdigest()

    async def ours() -> None:
        async with database.session() as session:
            assert await crud.api_keys.verify_api_key(session, raw_key)

    async def theirs() -> None:
        async with bare() as session:
            key = (await session.exec(select(Key).where(col(Key.key_prefix) == prefix))).one()
            # The comparison of a stored SHA-256.
            assert hmac.compare_digest(hashlib.sha256(secret.encode()).hexdigest(), digest)
            assert key.status is APIKeyStatus.ACTIVE
            await session.commit()

    return Work(CHECK_KEY, ours, theirs, times=100)


def event_work(database: Database, bare: Bare) -> Work:
    table = SQLModel.metadata.tables["audit_logs"]

    async def ours() -> None:
        async with database.session() as session:
            await crud.audit_logs.log_event(session, **EVENT)

    async def theirs() -> None:
        async with bare() as session:
            await session.exec(insert(table), params={"id": uuid7(), "severity": "medium", **EVENT})
            await session.commit()

    return Work(LOG_EVENT, ours, theirs, times=100)


def page_work(database: Database, bare: Bare) -> Work:
    async def ours() -> None:
        async with database.session() as session:
            assert len(await crud.audit_logs.search(session, limit=PAGE)) == PAGE

    async def theirs() -> None:
        async with bare() as session:
            statement = select(Event).order_by(col(Event.id).desc()).limit(PAGE + 1)
            assert len((await session.exec(statement)).all()) > PAGE
            await session.commit()

    return Work(FIRST_PAGE, ours, theirs, times=20)


def accounts_work(database: Database, bare: Bare) -> Work:
    async def ours() -> None:
        async with database.session() as session:
            page = await crud.accounts.list_accounts(session, limit=ACCOUNTS)
            assert len(page) == ACCOUNTS

    async def theirs() -> None:
        async with bare() as session:
            statement = select(Account).order_by(col(Account.id).desc()).limit(ACCOUNTS + 1)
            assert len((await session.exec(statement)).all()) >= ACCOUNTS
            await session.commit()

    return Work(LIST_ACCOUNTS, ours, theirs, times=2)

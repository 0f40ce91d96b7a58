"""Query parameters of the lists: names and types of the arguments of tiger_db's functions."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

from tiger_db import (
    AccountStatus,
    AccountType,
    APIKeyScope,
    APIKeyStatus,
    AuditResult,
    AuditSeverity,
    MarketPermission,
    RefreshTrigger,
    TigerEnvironment,
    TigerLicense,
    TokenRefreshStatus,
)


def _in_utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


Time = Annotated[datetime, AfterValidator(_in_utc)]


class Query(BaseModel):
    """Query parameters. An empty parameter, which an empty field of a form submits, is ignored."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _without_empty(cls, value: object) -> object:
        if isinstance(value, list):
            return [item for item in value if item != ""] or None
        return None if value == "" else value


class Cursors(Query):
    after: str | None = None
    before: str | None = None


class AccountQuery(Cursors):
    status: list[AccountStatus] | None = None
    account_type: list[AccountType] | None = None
    environment: list[TigerEnvironment] | None = None
    license: list[TigerLicense] | None = None
    market_permission: list[MarketPermission] | None = None
    tags: list[str] | None = None
    with_errors: bool | None = None
    token_expires_within: timedelta | None = None
    search: str | None = None
    order_by: Literal["newest", "name"] = "newest"


class KeyQuery(Cursors):
    status: list[APIKeyStatus] | None = None
    account_id: list[UUID] | None = None
    scope: list[APIKeyScope] | None = None
    created_by: list[str] | None = None
    expired: bool | None = None
    unused_since: Time | None = None
    search: str | None = None
    order_by: Literal["newest", "name"] = "newest"


class EventQuery(Cursors):
    action: list[str] | None = None
    result: list[AuditResult] | None = None
    severity: list[AuditSeverity] | None = None
    account_id: list[UUID] | None = None
    api_key_id: list[UUID] | None = None
    user_id: list[str] | None = None
    user_type: list[str] | None = None
    ip_address: list[str] | None = None
    session_id: list[str] | None = None
    request_id: list[str] | None = None
    resource: list[str] | None = None
    error_code: list[str] | None = None
    tags: list[str] | None = None
    since: Time | None = None
    until: Time | None = None


class RefreshQuery(Cursors):
    status: list[TokenRefreshStatus] | None = None
    account_id: list[UUID] | None = None
    trigger: list[RefreshTrigger] | None = None
    since: Time | None = None
    until: Time | None = None
    search: str | None = None
    order_by: Literal["newest", "schedule"] = "newest"


class RoutingQuery(Query):
    permission: list[MarketPermission] | None = None
    trading: bool = False
    account_type: AccountType | None = None
    environment: list[TigerEnvironment] | None = None

"""The entity `AuditLog`, functions that insert audit events, and the table of seals."""

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Annotated, Any, Optional, Self
from uuid import UUID

from annotated_types import MaxLen
from pydantic import (
    AfterValidator,
    ModelWrapValidatorHandler,
    StringConstraints,
    model_validator,
)
from sqlalchemy import BigInteger, CheckConstraint, Column, Index, LargeBinary, Table, func, text
from sqlalchemy import Text as SQLText
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, Relationship

from tiger_db.models.api_keys import parse_address
from tiger_db.models.base import Entity
from tiger_db.models.columns import (
    Int64,
    JsonObject,
    OpenEnum,
    Text,
    UTCDateTime,
    enum_type,
    metadata,
    open_enum,
)
from tiger_db.models.event_sanitizer import sanitize_event
from tiger_db.models.tracking import Tracked
from tiger_db.models.views import SetByDatabase

if TYPE_CHECKING:
    import asyncpg

    from tiger_db.models.accounts import TigerAccount
    from tiger_db.models.api_keys import APIKey


class AuditAction(StrEnum):
    """The known actions of audit events, written as `family:verb`.

    The verbs of trading actions are the names of methods in Tiger's API. An application can also
    record other actions of the form `family:verb`.
    """

    ACCOUNT_CREATE = "account:create"
    ACCOUNT_UPDATE = "account:update"
    ACCOUNT_STATUS_CHANGE = "account:status_change"
    ACCOUNT_SET_DEFAULT = "account:set_default"
    ACCOUNT_ERROR = "account:error"
    ACCOUNT_RESET_ERRORS = "account:reset_errors"
    ACCOUNT_CLOSE = "account:close"
    ACCOUNT_REOPEN = "account:reopen"
    ACCOUNT_DELETE = "account:delete"
    ACCOUNT_IMPORT = "account:import"
    ACCOUNT_EXPORT = "account:export"

    API_KEY_CREATE = "api_key:create"
    API_KEY_UPDATE = "api_key:update"
    API_KEY_ACTIVATE = "api_key:activate"
    API_KEY_DEACTIVATE = "api_key:deactivate"
    API_KEY_ROTATE = "api_key:rotate"
    API_KEY_REVOKE = "api_key:revoke"
    API_KEY_DELETE = "api_key:delete"
    API_KEY_USE = "api_key:use"
    API_KEY_DENY = "api_key:deny"
    API_KEY_SIGN = "api_key:sign"

    TOKEN_UPDATE = "token:update"
    TOKEN_REFRESH_SCHEDULE = "token:refresh_schedule"
    TOKEN_REFRESH_START = "token:refresh_start"
    TOKEN_REFRESH = "token:refresh"
    TOKEN_REFRESH_CANCEL = "token:refresh_cancel"
    OAUTH_LOGIN = "token:oauth_login"
    OAUTH_REFRESH = "token:oauth_refresh"
    OAUTH_LOGOUT = "token:oauth_logout"

    TRADE_CREATE_ORDER = "trade:create_order"
    TRADE_PREVIEW_ORDER = "trade:preview_order"
    TRADE_PLACE_ORDER = "trade:place_order"
    TRADE_MODIFY_ORDER = "trade:modify_order"
    TRADE_CANCEL_ORDER = "trade:cancel_order"
    TRADE_PLACE_FOREX_ORDER = "trade:place_forex_order"
    TRADE_CHECK_OPTION_EXERCISE = "trade:check_option_exercise"
    TRADE_SUBMIT_OPTION_EXERCISE = "trade:submit_option_exercise"
    TRADE_CANCEL_OPTION_EXERCISE = "trade:cancel_option_exercise"
    TRANSFER_SEGMENT_FUND = "trade:transfer_segment_fund"
    CANCEL_SEGMENT_FUND = "trade:cancel_segment_fund"
    TRANSFER_POSITION = "trade:transfer_position"

    TRADING_PAUSE = "trading:pause"
    TRADING_RESUME = "trading:resume"

    DATA_QUERY = "data:query"
    DATA_GRAB_QUOTE_PERMISSION = "data:grab_quote_permission"

    MCP_CONNECT = "mcp:connect"
    MCP_DISCONNECT = "mcp:disconnect"
    MCP_TOOL_CALL = "mcp:tool_call"

    DASHBOARD_LOGIN = "dashboard:login"
    DASHBOARD_LOGOUT = "dashboard:logout"
    DASHBOARD_VIEW = "dashboard:view"
    DASHBOARD_CHANGE = "dashboard:change"

    SYSTEM_START = "system:start"
    SYSTEM_STOP = "system:stop"
    SYSTEM_CONFIG_CHANGE = "system:config_change"
    SYSTEM_MIGRATE = "system:migrate"
    SYSTEM_ENCRYPTION_KEY_ROTATE = "system:encryption_key_rotate"
    SYSTEM_AUDIT_SEAL = "system:audit_seal"
    SYSTEM_AUDIT_RETIRE = "system:audit_retire"
    SYSTEM_AUDIT_CHANGE_KEY = "system:audit_change_key"
    SYSTEM_AUDIT_REPAIR_SEQUENCE = "system:audit_repair_sequence"
    SYSTEM_AUDIT_RESTORE = "system:audit_restore"
    SYSTEM_ERROR = "system:error"

    SECURITY_LOGIN_FAILURE = "security:login_failure"
    SECURITY_ACCESS_DENIED = "security:access_denied"
    SECURITY_RATE_LIMIT = "security:rate_limit"
    SECURITY_SUSPICIOUS_ACTIVITY = "security:suspicious_activity"
    SECURITY_KEY_LEAK = "security:key_leak"
    SECURITY_TAMPERING = "security:tampering"

    @property
    def family(self) -> str:
        return family_of(self)


def family_of(action: str) -> str:
    """Return the family of an action, which is the part before the colon."""
    return action.partition(":")[0]


class AuditResult(StrEnum):
    """The outcome of an action. `PENDING` means that the outcome is not yet known."""

    SUCCESS = "success"
    FAILURE = "failure"
    PARTIAL = "partial"
    ERROR = "error"
    PENDING = "pending"


class AuditSeverity(StrEnum):
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


# Events of the families in _MEDIUM_FAMILIES have at least the severity medium by default, because
# their actions change money, credentials or permissions.
_MEDIUM_FAMILIES = {"account", "api_key", "token", "trade", "system"}


def severity_of(action: str, result: str) -> AuditSeverity:
    """Return the default severity of an audit event with the given action and result."""
    failed = result not in {AuditResult.SUCCESS, AuditResult.PENDING}
    family = family_of(action)
    if family == "security":
        return AuditSeverity.HIGH
    if family in _MEDIUM_FAMILIES:
        return AuditSeverity.HIGH if failed else AuditSeverity.MEDIUM
    return AuditSeverity.MEDIUM if failed else AuditSeverity.LOW


ACTION_FORM = "^[a-z][a-z0-9_]*:[a-z][a-z0-9_]*$"
_ACTIONS: dict[str, AuditAction] = {action.value: action for action in AuditAction}


Action = Annotated[
    str,
    StringConstraints(pattern=ACTION_FORM, strict=True),
    AfterValidator(lambda action: _ACTIONS.get(action, action)),
]


def _referenced(entity: str, column: str) -> dict[str, Any]:
    """Return the options of a view-only relationship to the entity whose id is in a column.

    The column has no foreign key, so the related object is None if its row has been deleted.
    """
    return {
        "lazy": "raise",
        "viewonly": True,
        "primaryjoin": f"foreign(AuditLog.{column}) == {entity}.id",
    }


_BRIN: dict[str, Any] = {"postgresql_with": {"pages_per_range": 32, "autosummarize": True}}


class AuditLog(Entity, table=True):
    """One audit event. Events are append-only.

    The table audit_logs has no foreign keys, so that events remain when an account or API key is
    deleted. The relationships `tiger_account` and `api_key` are view-only. They are None if the
    account or API key is deleted. Secrets are masked. Values that PostgreSQL cannot store are
    converted, and the field `details` contains notes on the conversions.

    The attribute `action` is a plain text if the action is not a member of `AuditAction`. An
    unknown `result` or `severity`, which a newer release of tiger_db recorded, is read as a plain
    text.
    """

    __tablename__ = "audit_logs"
    __table_args__ = (
        # The second column of each index is `id`, because pages are in the order of `id`.
        # Therefore, the query for a page reads only the events of the page.
        *(
            Index(
                f"ix_audit_logs_{name}_id",
                name,
                "id",
                postgresql_where=text(f"{name} IS NOT NULL"),
            )
            for name in ("tiger_account_id", "api_key_id", "user_id", "request_id")
        ),
        # BRIN indexes are small, and a search with a BRIN index reads few pages of the table.
        Index("ix_audit_logs_position", "position", postgresql_using="brin", **_BRIN),
        Index(
            "ix_audit_logs_session_id",
            "session_id",
            postgresql_using="brin",
            postgresql_ops={"session_id": "text_bloom_ops"},
            **_BRIN,
        ),
        CheckConstraint(f"action ~ '{ACTION_FORM}'", name="action_form"),
        {"postgresql_partition_by": "RANGE (id)"},
    )

    created_at: SetByDatabase[UTCDateTime] = Field(
        default=None,
        nullable=False,
        sa_column_kwargs={"server_default": func.clock_timestamp()},
        description="Time of the insert, by the database's clock",
    )
    action: Action = Field(
        max_length=60,
        sa_type=OpenEnum(AuditAction, SQLText()),
        description="Action of the event, as family:verb",
    )
    result: Annotated[AuditResult | str, open_enum(AuditResult)] = Field(
        default=AuditResult.SUCCESS,
        sa_type=OpenEnum(AuditResult, enum_type(AuditResult)),
        description="Outcome of the action",
    )
    severity: Annotated[AuditSeverity | str, open_enum(AuditSeverity)] = Field(
        default_factory=lambda data: severity_of(data.get("action", ""), data.get("result", "")),  # type: ignore[misc, arg-type]  # see accounts.py
        sa_type=OpenEnum(AuditSeverity, enum_type(AuditSeverity)),
        sa_column_kwargs={"default": None},
        description="Severity; derived from action and result by default",
    )
    resource_type: Text | None = Field(
        default=None, max_length=50, description="Type of the affected resource, e.g. order"
    )
    resource_id: Text | None = Field(
        default=None,
        max_length=100,
        description="Identifier of the affected resource, e.g. an order id",
    )
    user_id: Text | None = Field(
        default=None, max_length=100, description="User or service that performed the action"
    )
    user_type: Text | None = Field(
        default=None, max_length=50, description="Type of the user, e.g. admin"
    )
    session_id: Text | None = Field(
        default=None, max_length=100, description="Id of the user's session"
    )
    ip_address: Annotated[IPv4Address | IPv6Address, AfterValidator(parse_address)] | None = Field(
        default=None, description="IP address of the client"
    )
    user_agent: Text | None = Field(
        default=None, max_length=500, description="User-Agent of the client"
    )
    request_method: Text | None = Field(default=None, max_length=10, description="HTTP method")
    request_path: Text | None = Field(default=None, max_length=500, description="HTTP path")
    request_id: Text | None = Field(
        default=None,
        max_length=100,
        description="Id of the request; all events of one request have the same id",
    )
    tiger_account_id: UUID | None = Field(
        default=None,
        description="Used or changed account; no foreign key, because accounts can be deleted",
    )
    api_key_id: UUID | None = Field(
        default=None,
        description="Used or changed API key; no foreign key, because API keys can be deleted",
    )
    details: JsonObject | None = Field(default=None, description="Other details of the event")
    old_values: JsonObject | None = Field(
        default=None,
        description="Values of the changed fields before the change, with masked secrets",
    )
    new_values: JsonObject | None = Field(
        default=None,
        description="Values of the changed fields after the change, with masked secrets",
    )
    error_code: Text | None = Field(default=None, max_length=50, description="Code of the error")
    error_message: Text | None = Field(default=None, description="Message of the error")
    duration_ms: Int64 | None = Field(
        default=None, ge=0, description="Duration of the action in milliseconds"
    )
    tags: JsonObject | None = Field(default=None, description="Free-form object")
    position: SetByDatabase[Int64] = Field(
        default=None,
        nullable=False,
        sa_column_kwargs={"server_default": text("nextval('audit_logs_position_seq'::regclass)")},
        description="Position in the order of the inserts; rolled-back transactions leave gaps",
    )

    # The annotations use Optional, because SQLModel cannot resolve a relationship type with `|`.
    tiger_account: Optional["TigerAccount"] = Relationship(
        sa_relationship_kwargs=_referenced("TigerAccount", "tiger_account_id")
    )
    api_key: Optional["APIKey"] = Relationship(
        sa_relationship_kwargs=_referenced("APIKey", "api_key_id")
    )

    # With mode="before", the assignment of one field would pass all values of the event to
    # _sanitized().
    @model_validator(mode="wrap")
    @classmethod
    def _sanitized(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:  # noqa: ANN401  # pydantic's signature
        return handler(sanitize(data) if isinstance(data, Mapping) else data)

    def validate_changes(self, changes: Mapping[str, object]) -> dict[str, Any]:
        sanitized = sanitize(changes)
        # sanitize() adds notes on converted values to `details`. If the caller assigns no value to
        # `details`, the notes are dropped: the assignment of another field must not change
        # `details`.
        return super().validate_changes(
            {name: sanitized.get(name, value) for name, value in changes.items()}
        )


def sanitize(values: Mapping[str, object]) -> dict[str, Any]:
    """Return the values of an audit event's fields in a form that PostgreSQL can store."""
    return sanitize_event(values, _text_limits(), frozenset(AuditSeverity))


@cache
def _text_limits() -> dict[str, int]:
    """Return the maximum length of each text field in characters, by field name."""
    return {
        name: rule.max_length
        for name, field in AuditLog.model_fields.items()
        for rule in field.metadata
        # A text that is too long is shortened, except for an action, which is refused.
        if isinstance(rule, MaxLen) and name != "action"
    }


# Statements and functions that insert audit events without the ORM

SERVER_COLUMNS = ("created_at", "position")  # columns whose values the database sets
_TABLE = AuditLog.metadata.tables["audit_logs"]
_COLUMNS = [column.name for column in _TABLE.columns if column.name not in SERVER_COLUMNS]
_JSON_COLUMNS = [
    (index, name) for index, name in enumerate(_COLUMNS) if isinstance(_TABLE.c[name].type, JSONB)
]
INSERT = (
    f"INSERT INTO audit_logs ({', '.join(_COLUMNS)})"  # noqa: S608  # only column names
    f" VALUES ({', '.join(f'${n}' for n, _ in enumerate(_COLUMNS, start=1))})"
)


def insert_values(event: AuditLog) -> tuple[Any, ...]:
    """Return the parameters of the `INSERT` statement for an audit event."""
    values = [*map(event.__dict__.get, _COLUMNS)]
    for index, name in _JSON_COLUMNS:
        value: Any = values[index]
        if value is None:
            continue
        if isinstance(value, Tracked) and value.modified:
            value = event.validate_changes({name: value})[name]
        values[index] = json.dumps(value)
    return tuple(values)


async def insert_events(
    connection: "asyncpg.Connection[asyncpg.Record]", events: Sequence[AuditLog]
) -> None:
    """Insert audit events with one SQL statement, which inserts all events or none."""
    if len(events) == 1:
        await connection.execute(INSERT, *insert_values(events[0]))
    else:
        rows = map(insert_values, events)
        await connection.copy_records_to_table("audit_logs", columns=_COLUMNS, records=rows)


# The table audit_seals has no entity class, because seals are read and written as raw rows.
audit_seals = Table(
    "audit_seals",
    metadata,
    Column(
        "number",
        BigInteger,
        primary_key=True,
        autoincrement=False,
        comment="Consecutive number of the seal, starting at 1",
    ),
    Column(
        "statement",
        SQLText,
        nullable=False,
        comment="Signed JSON: positions of the sealed events,"
        " root of the Merkle tree of the events, digest of the previous seal",
    ),
    Column(
        "signature",
        LargeBinary,
        nullable=False,
        comment="Ed25519 signature of the bytes in the column `statement`",
    ),
    Column(
        "digests",
        LargeBinary,
        nullable=False,
        comment="SHA-256 digests of the sealed events, in the order of the event positions",
    ),
    CheckConstraint("number >= 1", name="number"),
    comment="Seals: signed proofs of the contents of the audit trail",
)

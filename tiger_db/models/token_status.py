"""Token refreshes: what is due, who is at it, and how each one ended."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Index, event, func, text
from sqlalchemy import Text as SQLText
from sqlalchemy.dialects.postgresql import UUID as SQLUUID
from sqlmodel import Field, Relationship

from tiger_db.errors import InvalidState
from tiger_db.models.accounts import TigerEnvironment
from tiger_db.models.base import (
    Int64,
    JsonObject,
    MutableEntity,
    Text,
    Timestamp,
    UTCDateTime,
    enum_type,
    tracked_json,
)

if TYPE_CHECKING:
    from tiger_db.models.accounts import TigerAccount


class TokenRefreshStatus(StrEnum):
    PENDING = "pending"
    IN_PROGRESS = "in_progress"
    SUCCESS = "success"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class RefreshTrigger(StrEnum):
    SCHEDULED = "scheduled"
    MANUAL = "manual"
    ON_DEMAND = "on_demand"
    EXPIRY_SOON = "expiry_soon"
    EXPIRED = "expired"
    ERROR = "error"


OPEN_STATUSES = (TokenRefreshStatus.PENDING, TokenRefreshStatus.IN_PROGRESS)
_IS_OPEN = text("status IN ('pending', 'in_progress')")


class TokenStatus(MutableEntity, table=True):
    """One refresh of an account's access token. An account has at most one open at a time."""

    __tablename__ = "token_statuses"
    __table_args__ = (
        # Else nobody could ever claim it, and none other of its account could be opened.
        CheckConstraint(
            "status <> 'in_progress' OR num_nulls(worker, lease_expires_at) = 0",
            name="in_progress_is_leased",
        ),
        Index(
            "uq_token_statuses_tiger_account_id_open",
            "tiger_account_id",
            unique=True,
            postgresql_where=_IS_OPEN,
        ),
        Index("ix_token_statuses_due", "scheduled_at", postgresql_where=_IS_OPEN),
        Index("ix_token_statuses_tiger_account_id_id", "tiger_account_id", "id"),
        Index("ix_token_statuses_failed", "id", postgresql_where=text("status = 'failed'")),
    )

    tiger_account_id: UUID = Field(
        foreign_key="tiger_accounts.id",
        ondelete="CASCADE",
        sa_type=SQLUUID,
        description="The account whose token is refreshed",
    )
    status: TokenRefreshStatus = Field(
        default=TokenRefreshStatus.PENDING,
        sa_type=enum_type(TokenRefreshStatus),
        description="Pending and in progress are open; the others are final",
    )
    trigger: RefreshTrigger = Field(
        default=RefreshTrigger.SCHEDULED,
        sa_type=enum_type(RefreshTrigger),
        description="Why it was asked for",
    )
    old_token_expires_at: UTCDateTime | None = Field(
        default=None, sa_type=Timestamp, description="Expiry of the token it replaces"
    )
    new_token_expires_at: UTCDateTime | None = Field(
        default=None, sa_type=Timestamp, description="Expiry of the token it brought"
    )
    old_token_hash: Text | None = Field(
        default=None,
        max_length=128,
        sa_type=SQLText,
        description="SHA-256 of the token it replaces",
    )
    new_token_hash: Text | None = Field(
        default=None, max_length=128, sa_type=SQLText, description="SHA-256 of the token it brought"
    )
    scheduled_at: UTCDateTime | None = Field(
        default=None,
        sa_type=Timestamp,
        nullable=False,
        sa_column_kwargs={"server_default": func.now()},
        description="From when on it may be claimed",
    )
    started_at: UTCDateTime | None = Field(
        default=None, sa_type=Timestamp, description="When the last attempt started"
    )
    completed_at: UTCDateTime | None = Field(
        default=None, sa_type=Timestamp, description="When it ended for good"
    )
    duration_ms: Int64 | None = Field(
        default=None, ge=0, sa_type=BigInteger, description="Length of the last attempt, in ms"
    )
    next_refresh_at: UTCDateTime | None = Field(
        default=None, sa_type=Timestamp, description="When the new token should be refreshed"
    )
    error_code: Text | None = Field(
        default=None, max_length=50, sa_type=SQLText, description="Code of the last error"
    )
    error_message: Text | None = Field(
        default=None, sa_type=SQLText, description="Message of the last error"
    )
    retry_count: Int64 = Field(
        default=0, ge=0, sa_type=BigInteger, description="How many attempts failed"
    )
    max_retries: Int64 = Field(
        default=3,
        ge=0,
        sa_type=BigInteger,
        description="After how many failed attempts it is given up",
    )
    api_response_code: Int64 | None = Field(
        default=None, sa_type=BigInteger, description="Tiger's code in the last answer"
    )
    api_response_time_ms: Int64 | None = Field(
        default=None, ge=0, sa_type=BigInteger, description="How long Tiger took to answer, in ms"
    )
    details: JsonObject | None = Field(
        default=None, sa_type=tracked_json(), description="Whatever else is worth knowing"
    )
    environment: TigerEnvironment | None = Field(
        default=None, sa_type=enum_type(TigerEnvironment), description="Tiger's environment asked"
    )
    server_version: Text | None = Field(
        default=None, max_length=50, sa_type=SQLText, description="Version of Tiger's gateway"
    )
    worker: Text | None = Field(
        default=None, max_length=100, sa_type=SQLText, description="Who holds the claim"
    )
    lease_expires_at: UTCDateTime | None = Field(
        default=None, sa_type=Timestamp, description="When the claim ends unless it is renewed"
    )
    fencing_token: Int64 = Field(
        default=0, ge=0, sa_type=BigInteger, description="Number of the claim: an older one is void"
    )

    tiger_account: "TigerAccount" = Relationship(
        back_populates="token_statuses", sa_relationship_kwargs={"lazy": "raise"}
    )

    @property
    def is_open(self) -> bool:
        return self.status in OPEN_STATUSES

    @property
    def can_retry(self) -> bool:
        """Whether it failed and another attempt is allowed."""
        return self.status == TokenRefreshStatus.FAILED and self.retry_count < self.max_retries

    def start_refresh(self) -> None:
        """Go from pending to in progress, in memory.

        For a refresh that is stored once it has ended. It has no lease, so a flush before
        `complete_refresh` raises InvalidState. `crud.token_status.claim` claims a stored refresh.

        Raises:
            InvalidState: it is not pending.
        """
        if self.status != TokenRefreshStatus.PENDING:
            raise InvalidState(f"a {self.status.value} refresh cannot be started")
        self.sqlmodel_update(
            {"status": TokenRefreshStatus.IN_PROGRESS, "started_at": datetime.now(UTC)}
        )

    def complete_refresh(
        self,
        *,
        success: bool,
        new_token_expires_at: datetime | None = None,
        new_token_hash: str | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
    ) -> None:
        """Go from in progress to success or failed; a failure counts as one attempt.

        Raises:
            InvalidState: it is not in progress.
            ValidationError: a value is refused; nothing has changed.
        """
        if self.status != TokenRefreshStatus.IN_PROGRESS or self.started_at is None:
            raise InvalidState(f"a {self.status.value} refresh cannot be completed")
        now = datetime.now(UTC)
        changes: dict[str, object] = {
            "completed_at": now,
            "duration_ms": max(0, round((now - self.started_at).total_seconds() * 1000)),
        }
        if success:
            changes |= {
                "status": TokenRefreshStatus.SUCCESS,
                "new_token_expires_at": new_token_expires_at,
                "new_token_hash": new_token_hash,
                "error_code": None,
                "error_message": None,
            }
        else:
            changes |= {
                "status": TokenRefreshStatus.FAILED,
                "error_code": error_code,
                "error_message": error_message,
                "retry_count": self.retry_count + 1,
            }
        self.sqlmodel_update(changes)


@event.listens_for(TokenStatus, "before_insert")
@event.listens_for(TokenStatus, "before_update")
def _require_lease(_mapper: object, _connection: object, refresh: TokenStatus) -> None:
    """Name what `ck_token_statuses_in_progress_is_leased` would refuse.

    Raises:
        InvalidState: the refresh is in progress without a lease.
    """
    values = refresh.__dict__  # what is not loaded has not changed
    if values.get("status") == TokenRefreshStatus.IN_PROGRESS and None in (
        values.get("worker", ""),
        values.get("lease_expires_at", ""),
    ):
        raise InvalidState(
            "a refresh in progress needs a worker and a lease: claim it with"
            " crud.token_status.claim, or complete it before it is stored"
        )

"""The entity `TokenStatus`: the state, lease and outcome of a refresh of an access token."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import CheckConstraint, Index, event, func, text
from sqlalchemy.orm.attributes import instance_state
from sqlmodel import Field, Relationship

from tiger_db.errors import InvalidState
from tiger_db.models.accounts import TigerEnvironment
from tiger_db.models.base import MutableEntity
from tiger_db.models.columns import Int64, JsonObject, Text, UTCDateTime
from tiger_db.models.views import SetByDatabase
from tiger_db.public import public

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


@dataclass(frozen=True, slots=True)
class NewToken:
    """The tokens that the broker returned for a refresh.

    `expires_at` is timezone-aware. If `expires_at` is None and the access token has Tiger's format,
    the expiry is read from the access token.
    """

    access_token: str = field(repr=False)
    expires_at: datetime | None = None
    refresh_token: str | None = field(default=None, repr=False)
    code: int | None = None  # code in Tiger's response


OPEN_STATUSES = (TokenRefreshStatus.PENDING, TokenRefreshStatus.IN_PROGRESS)
# InstanceState.info stores the value of the property `TokenStatus.found` under the key FOUND.
CHANNEL = "tiger_db_refreshes"  # NOTIFY channel of pending and ended refreshes
FOUND = "found"
_IS_OPEN = text("status IN ('pending', 'in_progress')")


class TokenStatus(MutableEntity, table=True):
    """A refresh of an account's access token. An account has at most one open refresh."""

    __tablename__ = "token_statuses"
    __table_args__ = (
        # A refresh in progress without a lease could never be claimed, and would block further
        # refreshes of the account.
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
        ondelete="RESTRICT",
        description="Account whose token is refreshed",
    )
    status: TokenRefreshStatus = Field(
        default=TokenRefreshStatus.PENDING,
        description="Status: pending and in_progress are open, all other statuses are final",
    )
    trigger: RefreshTrigger = Field(
        default=RefreshTrigger.SCHEDULED, description="Reason for the refresh"
    )
    old_token_expires_at: UTCDateTime | None = Field(
        default=None, description="Expiry of the replaced access token"
    )
    new_token_expires_at: UTCDateTime | None = Field(
        default=None, description="Expiry of the new access token"
    )
    old_token_hash: Text | None = Field(
        default=None, max_length=128, description="SHA-256 of the replaced access token"
    )
    new_token_hash: Text | None = Field(
        default=None, max_length=128, description="SHA-256 of the new access token"
    )
    scheduled_at: SetByDatabase[UTCDateTime] = Field(
        default=None,
        nullable=False,
        sa_column_kwargs={"server_default": func.now()},
        description="Earliest time at which a worker can claim the refresh",
    )
    started_at: UTCDateTime | None = Field(default=None, description="Start of the last attempt")
    completed_at: UTCDateTime | None = Field(
        default=None, description="Time at which the refresh got a final status"
    )
    duration_ms: Int64 | None = Field(
        default=None, ge=0, description="Duration of the last attempt, in ms"
    )
    next_refresh_at: UTCDateTime | None = Field(
        default=None, description="Time at which the new access token should be refreshed"
    )
    error_code: Text | None = Field(
        default=None, max_length=50, description="Code of the last error"
    )
    error_message: Text | None = Field(default=None, description="Message of the last error")
    retry_count: Int64 = Field(default=0, ge=0, description="Number of failed attempts")
    max_retries: Int64 = Field(default=3, ge=0, description="Maximum number of failed attempts")
    api_response_code: Int64 | None = Field(
        default=None, description="Code in Tiger's last response"
    )
    api_response_time_ms: Int64 | None = Field(
        default=None, ge=0, description="Response time of the last request to Tiger, in ms"
    )
    details: JsonObject | None = Field(default=None, description="Other details of the refresh")
    environment: TigerEnvironment | None = Field(default=None, description="Environment at Tiger")
    server_version: Text | None = Field(
        default=None, max_length=50, description="Version of Tiger's gateway"
    )
    worker: Text | None = Field(
        default=None, max_length=100, description="Name of the worker that claimed the refresh"
    )
    lease_expires_at: UTCDateTime | None = Field(
        default=None, description="Expiry of the worker's lease, unless the worker renews the lease"
    )
    fencing_token: Int64 = Field(
        default=0,
        ge=0,
        description="Number of the latest claim; earlier claims of the refresh are void",
    )

    tiger_account: "TigerAccount" = Relationship(
        back_populates="token_statuses", sa_relationship_kwargs={"lazy": "raise"}
    )

    @property
    def is_open(self) -> bool:
        return self.status in OPEN_STATUSES

    @property
    def found(self) -> bool:
        """Return whether `create_refresh_operation` or `refresh_now` found an open refresh.

        The property `found` is not stored in the database. `found` is false for a TokenStatus that
        neither `create_refresh_operation` nor `refresh_now` returned.
        """
        return bool(instance_state(self).info.get(FOUND))

    @property
    def can_retry(self) -> bool:
        """Return whether the refresh failed and can be attempted again."""
        return self.status == TokenRefreshStatus.FAILED and self.retry_count < self.max_retries

    def start_refresh(self) -> None:
        """Change the status of the refresh from pending to in progress, without a lease.

        Call `complete_refresh` before the first flush, because a refresh in progress without a
        lease cannot be flushed. For a stored refresh, use `crud.token_status.claim` instead.

        Raises:
            InvalidState: the refresh is not pending.
        """
        if self.status != TokenRefreshStatus.PENDING:
            raise InvalidState(f"a refresh with the status {self.status} cannot be started")
        self.sqlmodel_update(
            {"status": TokenRefreshStatus.IN_PROGRESS, "started_at": datetime.now(UTC)}
        )

    @public
    def complete_refresh(
        self,
        *,
        success: bool,
        new_token_expires_at: datetime | None = None,
        new_token_hash: str | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
    ) -> None:
        """Change the status of the refresh from in progress to success or failed.

        If the new status is failed, `retry_count` increases by 1.

        Raises:
            InvalidState: the refresh is not in progress.
            InvalidFields: an argument is invalid, and the status of the refresh is unchanged.
        """
        if self.status != TokenRefreshStatus.IN_PROGRESS or self.started_at is None:
            raise InvalidState(f"a refresh with the status {self.status} cannot be completed")
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
    """Check before the flush that a refresh in progress has a worker and a lease.

    Raises:
        InvalidState: the refresh is in progress without a worker or a lease.
    """
    values = refresh.__dict__  # a column that is not loaded is unchanged and needs no check
    if values.get("status") == TokenRefreshStatus.IN_PROGRESS and None in (
        values.get("worker", ""),
        values.get("lease_expires_at", ""),
    ):
        raise InvalidState(
            "a refresh in progress needs a worker and a lease: claim the refresh with"
            " crud.token_status.claim, or complete the refresh before the first flush"
        )

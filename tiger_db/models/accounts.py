"""Broker accounts, their credentials, and the life of access tokens."""

import base64
import binascii
import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, ValidationInfo
from sqlalchemy import (
    CheckConstraint,
    Column,
    ColumnElement,
    FetchedValue,
    Index,
    LargeBinary,
    and_,
    event,
    false,
    func,
    text,
)
from sqlalchemy.orm import Mapped
from sqlalchemy.orm.attributes import instance_state, set_attribute
from sqlmodel import Field, Relationship, col
from typing_extensions import TypedDict  # pydantic: the standard one from Python 3.12 on

from tiger_db.encryption import EncryptedType, Secret
from tiger_db.errors import EncryptionError, InvalidValue, StaleToken
from tiger_db.models.base import MutableEntity
from tiger_db.models.columns import Int64, JsonObject, Text, UTCDateTime, require_storable_json
from tiger_db.redaction import mask_account_number

if TYPE_CHECKING:
    from tiger_db.models.api_keys import APIKey
    from tiger_db.models.token_status import TokenStatus

REFRESH_AHEAD = timedelta(hours=1)
# Tiger's tokens live for weeks: a fifth of their life leaves days for retries.
_SHARE_OF_LIFE_LEFT = 0.2
_MAX_CLOCK_SKEW = timedelta(minutes=5)  # of Tiger's clock ahead of the database's


class AccountType(StrEnum):
    STANDARD = "standard"
    PRIME = "prime"
    GLOBAL = "global"
    PAPER = "paper"


class AccountStatus(StrEnum):
    ACTIVE = "active"
    INACTIVE = "inactive"
    SUSPENDED = "suspended"
    PENDING_VERIFICATION = "pending_verification"
    CLOSED = "closed"


class MarketPermission(StrEnum):
    US = "US"
    HK = "HK"
    CN = "CN"
    SG = "SG"


class TigerLicense(StrEnum):
    TBNZ = "TBNZ"
    TBSG = "TBSG"
    TBHK = "TBHK"
    TBAU = "TBAU"
    TBUS = "TBUS"


# Licenses whose requests need an access token, by Tiger's documentation.
LICENSES_WITH_TOKEN = (TigerLicense.TBHK,)


class TigerEnvironment(StrEnum):
    PROD = "PROD"
    SANDBOX = "SANDBOX"


class PrivateKeyFormat(StrEnum):
    """PK1 is PKCS#1, PK8 is PKCS#8: Tiger's names."""

    PK1 = "PK1"
    PK8 = "PK8"
    UNKNOWN = "unknown"


class QuotePermission(TypedDict):
    """One of Tiger's quote permissions."""

    name: str
    expire_at: int  # epoch milliseconds; -1: permanent


def account_type_of(account_number: str) -> AccountType:
    """Return the account type by Tiger's numbering: `U…` global, 17 digits paper, else standard."""
    if re.fullmatch(r"U\d+", account_number, re.ASCII):
        return AccountType.GLOBAL
    if re.fullmatch(r"\d{17}", account_number, re.ASCII):
        return AccountType.PAPER
    return AccountType.STANDARD


def _unless_closed(value: Secret | None, info: ValidationInfo) -> Secret | None:
    if value is None and info.data.get("status", AccountStatus.CLOSED) != AccountStatus.CLOSED:
        raise ValueError("is required unless the account is closed")
    return value


class TigerAccount(MutableEntity, table=True):
    """A broker account. Its secrets are ciphertext in the database and masked everywhere else."""

    __tablename__ = "tiger_accounts"
    __table_args__ = (
        *(
            Index(f"uq_tiger_accounts_{name}", name, unique=True, postgresql_where=text(name))
            for name in ("is_default_trading", "is_default_data")
        ),
        *(
            Index(
                f"ix_tiger_accounts_{name}",
                name,
                postgresql_where=text("status = 'active' AND access_token IS NOT NULL"),
            )
            for name in ("token_expires_at", "token_refresh_at")
        ),
        *(
            CheckConstraint(f"jsonb_typeof({name}) = '{kind}'", name=f"{name}_{kind}")
            for name, kind in (
                ("tags", "object"),
                ("client_options", "object"),
                ("quote_permissions", "array"),
            )
        ),
        CheckConstraint(
            "status = 'suspended' OR NOT auto_suspended", name="auto_suspended_is_suspended"
        ),
        CheckConstraint(
            "CASE WHEN status = 'closed' THEN"
            " num_nonnulls(private_key, secret_key, access_token, refresh_token) = 0"
            " AND NOT is_default_trading AND NOT is_default_data"
            " ELSE private_key IS NOT NULL END",
            name="credentials_unless_closed",
        ),
    )

    account_name: Text = Field(
        min_length=1, max_length=100, description="Display name of the account"
    )
    account_number: Text = Field(
        min_length=1, max_length=50, unique=True, description="Account number at Tiger"
    )
    account_type: AccountType = Field(
        default_factory=lambda data: account_type_of(data["account_number"]),  # type: ignore[misc, arg-type]  # SQLModel's stub knows only pydantic's older form
        sa_column_kwargs={"default": None},
        description="Type; by default, it follows from the account number",
    )
    status: AccountStatus = Field(
        default=AccountStatus.ACTIVE, description="Only an active account serves requests"
    )
    tiger_id: Secret = Field(
        sa_type=EncryptedType(fingerprint="tiger_id_fingerprint"),
        description="Developer id at Tiger, encrypted; several accounts can share it",
    )
    # Not a field: the flush derives it from tiger_id.
    tiger_id_fingerprint: ClassVar[Any] = Column(
        LargeBinary,
        nullable=False,
        index=True,
        comment="Blind index of tiger_id: HMAC-SHA256 under a derived key",
    )
    private_key: Annotated[Secret | None, AfterValidator(_unless_closed)] = Field(
        nullable=True,
        description="RSA private key (base64 DER), encrypted; null if the account is closed",
    )
    private_key_format: PrivateKeyFormat = Field(
        default=PrivateKeyFormat.UNKNOWN, description="PK1 (PKCS#1), PK8 (PKCS#8) or unknown"
    )
    secret_key: Secret | None = Field(
        default=None, description="Secret key of institutional traders, encrypted"
    )
    license: TigerLicense | None = Field(
        default=None, description="License of the account at Tiger"
    )
    environment: TigerEnvironment = Field(
        default=TigerEnvironment.PROD,
        description="Environment at Tiger; the account number determines paper trading",
    )
    server_url: Text | None = Field(
        default=None, max_length=500, description="URL of the gateway, if it is not the default"
    )
    access_token: Secret | None = Field(default=None, description="Access token, encrypted")
    refresh_token: Secret | None = Field(default=None, description="OAuth refresh token, encrypted")
    token_expires_at: UTCDateTime | None = Field(
        default=None, description="Expiry of the access token"
    )
    token_refresh_at: UTCDateTime | None = Field(
        default=None, description="Time at which the access token should be refreshed"
    )
    is_default_trading: bool = Field(
        default=False, description="Default account for trades; at most one"
    )
    is_default_data: bool = Field(
        default=False, description="Default account for market data; at most one"
    )
    market_permissions: list[MarketPermission] = Field(
        default_factory=list, description="Markets in which the account may trade"
    )
    quote_permissions: Annotated[list[QuotePermission], AfterValidator(require_storable_json)] = (
        Field(
            default_factory=list,
            description="Quote permissions at Tiger: name and expire_at (epoch ms, -1: permanent)",
        )
    )
    client_options: JsonObject = Field(
        default_factory=dict,
        sa_column_kwargs={"server_default": text("'{}'")},
        description="Other settings of Tiger's configuration file, such as timeout and language",
    )
    auto_suspended: bool = Field(
        default=False,
        sa_column_kwargs={"server_default": false(), "server_onupdate": FetchedValue()},
        description="Suspended after too many errors, not by a person; reset with the suspension",
    )
    error_count: Int64 = Field(
        default=0, ge=0, description="Consecutive errors since the last success"
    )
    last_error: Text | None = Field(default=None, description="Message of the last error")
    last_error_at: UTCDateTime | None = Field(default=None, description="Time of the last error")
    description: Text | None = Field(default=None, max_length=500, description="Notes")
    tags: JsonObject = Field(default_factory=dict, description="Free-form object")

    api_keys: list["APIKey"] = Relationship(
        back_populates="tiger_account",
        passive_deletes="all",
        sa_relationship_kwargs={"lazy": "raise"},
    )
    token_statuses: list["TokenStatus"] = Relationship(
        back_populates="tiger_account",
        passive_deletes="all",
        sa_relationship_kwargs={"lazy": "raise"},
    )

    @property
    def is_active(self) -> bool:
        return self.status == AccountStatus.ACTIVE

    @property
    def has_valid_token(self) -> bool:
        """Whether the account has an access token that has not expired, by the local clock."""
        if self.access_token is None:
            return False
        return self.token_expires_at is None or self.token_expires_at > datetime.now(UTC)

    @property
    def needs_token_refresh(self) -> bool:
        """Whether the access token expires within an hour, by the local clock."""
        return self.is_token_due(datetime.now(UTC), within=REFRESH_AHEAD)

    def is_token_due(self, now: datetime, *, within: timedelta | None = None) -> bool:
        """Return whether the access token is due for a refresh at `now`, an aware datetime.

        A token is due from `token_refresh_at` on or, if `within` is given, that long before it
        expires. `due_tokens` is the same rule in SQL.
        """
        at, until = (
            (self.token_refresh_at, now)
            if within is None
            else (self.token_expires_at, now + within)
        )
        return self.access_token is not None and at is not None and at <= until

    def check_not_stale(
        self, access_token: str, expires_at: datetime | None = None
    ) -> datetime | None:
        """Return the expiry of a replacement for the access token, or None if it is unknown.

        Without `expires_at`, the expiry is read from a token in Tiger's format. Of two tokens in
        this format, the one generated later is newer; otherwise, the one that expires later. The
        current token is not stale.

        Raises:
            StaleToken: the current token is newer.
        """
        current = self.readable_token()
        new, old = token_times(access_token), token_times(current)
        if expires_at is None and new is not None:
            expires_at = new.expires_at
        if access_token == current:
            stale = False
        elif new is not None and old is not None:
            stale = new.generated_at < old.generated_at
        else:
            until = self.token_expires_at if self.access_token is not None else None
            stale = until is not None and expires_at is not None and expires_at < until
        if stale:
            raise StaleToken
        return expires_at

    def readable_token(self) -> str:
        """Return the access token, or an empty text if there is none or its key is missing."""
        try:
            return self.access_token.get_secret_value() if self.access_token is not None else ""
        except EncryptionError:
            return ""

    def label(self) -> str:
        return f"account {mask_account_number(self.__dict__.get('account_number') or '')}"

    def has_market_permission(self, permission: MarketPermission) -> bool:
        return permission in self.market_permissions


# The predicate of the two partial indexes on token times.
ACTIVE_WITH_TOKEN = text(
    "tiger_accounts.status = 'active' AND tiger_accounts.access_token IS NOT NULL"
)


def due_tokens(
    within: timedelta | None = None,
) -> tuple[ColumnElement[bool], Mapped[datetime | None]]:
    """Return the criterion of active accounts whose token is due, and the column to order them by.

    The criterion is the rule of `TigerAccount.is_token_due` at the start of the transaction.

    Raises:
        InvalidValue: `within` is longer than a century.
    """
    if within is not None and abs(within) > timedelta(days=36525):
        raise InvalidValue("within must be a century at most")
    at, until = (
        (col(TigerAccount.token_refresh_at), func.now())
        if within is None
        else (col(TigerAccount.token_expires_at), func.now() + within)
    )
    return and_(ACTIVE_WITH_TOKEN, at <= until), at


def refresh_time(access_token: str, expires_at: datetime | None) -> datetime | None:
    """Compute the `token_refresh_at` of a token; None if its expiry is unknown.

    A token is refreshed when a fifth of its life is left, at least five minutes before it expires,
    and not before half of its life has passed. The life of a token that is not in Tiger's format
    begins now.
    """
    if expires_at is None:
        return None
    times = token_times(access_token)
    life = max(expires_at - (times.generated_at if times else datetime.now(UTC)), timedelta(0))
    return expires_at - min(max(life * _SHARE_OF_LIFE_LEFT, _MAX_CLOCK_SKEW), life / 2)


class TokenTimes(NamedTuple):
    """Generation and expiry of an access token, by Tiger's clock (UTC)."""

    generated_at: datetime
    expires_at: datetime


def token_times(token: str) -> TokenTimes | None:
    """Return the times in a token, or None if it is not in Tiger's format, as OAuth tokens.

    A token of Tiger is the base64 form of `<generated>,<expires>`, two times in epoch milliseconds
    of 13 digits, and 16 opaque bytes (tigeropen 3.8.0, `should_token_refresh`). The opaque bytes
    and the padding are not checked.
    """
    try:
        content = base64.b64decode(token.strip()[:_TIMES_LENGTH], validate=True)
    except (binascii.Error, ValueError):
        return None
    times = _TIMES.fullmatch(content)
    if times is None:
        return None
    generated, expires = (_EPOCH + timedelta(milliseconds=int(time)) for time in times.groups())
    return TokenTimes(generated, expires) if generated < expires else None


_TIMES = re.compile(rb"(\d{13}),(\d{13})")
_TIMES_LENGTH = 36  # characters of base64 for these 27 bytes
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@event.listens_for(TigerAccount, "before_insert")
@event.listens_for(TigerAccount, "before_update")
def _set_refresh_time(_mapper: object, _connection: object, account: TigerAccount) -> None:
    """Set `token_refresh_at` if the token or its expiry was changed."""
    changed = instance_state(account).committed_state.keys()
    if changed & {"access_token", "token_expires_at"} and "token_expires_at" in vars(account):
        token = account.readable_token()
        at = refresh_time(token, account.token_expires_at) if account.access_token else None
        set_attribute(account, "token_refresh_at", at)

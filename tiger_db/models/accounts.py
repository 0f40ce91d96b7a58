"""The entity `TigerAccount`, and the rules for when to refresh an access token."""

import base64
import binascii
import re
import unicodedata
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import AfterValidator, BeforeValidator, SecretStr, ValidationInfo
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
from sqlalchemy.orm.attributes import instance_state, set_attribute
from sqlmodel import Field, Relationship, col
from typing_extensions import TypedDict  # pydantic refuses typing.TypedDict before Python 3.12

from tiger_db.encryption import EncryptedSecret, EncryptedType, Secret
from tiger_db.errors import EncryptionError, StaleToken
from tiger_db.models.base import MutableEntity
from tiger_db.models.columns import (
    UNIQUE_TEXT,
    Int64,
    JsonObject,
    Text,
    UTCDateTime,
    require_storable_json,
)
from tiger_db.models.private_keys import MAX_KEY_CHARACTERS, TOO_LONG, PrivateKeyFormat, key_bits
from tiger_db.models.views import (
    MutableEntityView,
    OptionalSecretField,
    SecretField,
    SecretUnlessClosed,
)
from tiger_db.public import public
from tiger_db.redaction import mask_account_number
from tiger_db.tracebacks import forgets_locals

if TYPE_CHECKING:
    from tiger_db.models.api_keys import APIKey
    from tiger_db.models.token_status import TokenStatus

REFRESH_AHEAD = timedelta(hours=1)
# Access tokens of Tiger are valid for weeks, so a fifth of the validity leaves days for retries.
_REMAINING_FRACTION_AT_REFRESH = 0.2
_MAX_CLOCK_SKEW = timedelta(minutes=5)  # maximum lead of Tiger's clock over the database's clock


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
    """The licenses of Tiger. Texts in upper or lower case are accepted."""

    TBNZ = "TBNZ"
    TBSG = "TBSG"
    TBHK = "TBHK"
    TBAU = "TBAU"
    TBUS = "TBUS"

    @classmethod
    def _missing_(cls, value: object) -> "TigerLicense | None":
        return cls.__members__.get(value.upper()) if isinstance(value, str) else None


# According to Tiger's documentation, requests of accounts with these licenses need an access token.
LICENSES_WITH_TOKEN = (TigerLicense.TBHK,)


class TigerEnvironment(StrEnum):
    PROD = "PROD"
    SANDBOX = "SANDBOX"


class QuotePermission(TypedDict):
    """Permission of an account to receive market data (quotes) from Tiger."""

    name: str
    expire_at: int  # expiry in epoch milliseconds, or -1 for no expiry


# The three alternatives of ACCOUNT_NUMBER match the numbers of global accounts, of standard and
# prime accounts, and of paper accounts. Paper account numbers have 17 digits at Tiger, but Tiger's
# SDK also accepts longer numbers.
ACCOUNT_NUMBER = "U[0-9]{1,49}|[0-9]{5,10}|[0-9]{17,50}"
_NORMAL_NUMBER = re.compile(ACCOUNT_NUMBER)
_MIN_PAPER_DIGITS = 17
_MIN_KEY_BITS = 1024  # minimum size of an RSA key in bits

# _IGNORABLE matches the invisible characters: all code points with the Unicode property
# Default_Ignorable_Code_Point, and U+FFF9 to U+FFFB.
_IGNORABLE = (
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
# _BLANKS contains control characters, and the white space that NFKC does not convert to spaces.
_BLANKS = "".join(map(chr, [*range(0x21), *range(0x7F, 0xA1)])) + "\u1680\u2028\u2029\u2800"


def normalize_account_number(text: str) -> str:
    """Return the normalized form of an account number, in which account numbers are stored.

    Raises:
        ValueError: `text` does not have the form of a Tiger account number.
    """
    number = _normalize(text).upper()
    if not re.fullmatch(ACCOUNT_NUMBER, number):
        raise ValueError(
            "an account number must be U and digits, 5 to 10 digits, or 17 or more digits (paper)"
        )
    return number


def normalize_tiger_id(text: str) -> str:
    """Return the normalized form of a Tiger id, in which Tiger ids are stored.

    Raises:
        ValueError: the Tiger id contains a space, or a character that is not printable ASCII.
    """
    tiger_id = _normalize(text)
    if not re.fullmatch("[!-~]+", tiger_id):
        raise ValueError("a Tiger id must be printable ASCII without spaces")
    return tiger_id


def _normalize(text: str) -> str:
    """Remove invisible characters and surrounding blanks, and convert a text to Unicode's NFKC."""
    return unicodedata.normalize("NFKC", re.sub(_IGNORABLE, "", text)).strip(_BLANKS)


def account_type_of(account_number: str) -> AccountType:
    """Return the account type that a normalized Tiger account number implies.

    The account type is global for `U` and digits, paper for 17 or more digits, and standard for all
    other account numbers.
    """
    if account_number.startswith("U"):
        return AccountType.GLOBAL
    if len(account_number) >= _MIN_PAPER_DIGITS:
        return AccountType.PAPER
    return AccountType.STANDARD


def _normalize_secret(value: object) -> object:
    """Return the normalized form of a Tiger id that is given as a text or a `Secret`.

    An empty text, a `Secret` that cannot be decrypted, and a value of a wrong type are returned
    unchanged.
    """
    try:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
    except EncryptionError:
        return value
    if not isinstance(text, str) or not text:
        return value  # the validator of `Secret` refuses empty texts and wrong types
    normal = normalize_tiger_id(text)
    return value if normal == text else normal


def _unless_closed(value: Secret | None, info: ValidationInfo) -> Secret | None:
    if value is None and info.data.get("status", AccountStatus.CLOSED) != AccountStatus.CLOSED:
        raise ValueError("a private key is required unless the account is closed")
    return value


def _require_key_size(value: Secret | None) -> Secret | None:
    """Refuse an RSA key of less than `_MIN_KEY_BITS` bits, and a text that is too long for a key.

    Texts that are not RSA keys are accepted as private keys, because tests use such texts.
    """
    if value is not None and not isinstance(value, EncryptedSecret):
        if len(value) > MAX_KEY_CHARACTERS:
            raise ValueError(TOO_LONG)
        bits = key_bits(value.get_secret_value())
        if bits is not None and bits < _MIN_KEY_BITS:
            raise ValueError(f"an RSA key must have {_MIN_KEY_BITS} bits or more, but has {bits}")
    return value


def _bound_account_number(text: str) -> str:
    """Return the normalized account number. A number of an older release can be malformed."""
    if _NORMAL_NUMBER.fullmatch(text):
        return text
    try:
        return normalize_account_number(text)
    except ValueError:
        return text


def _bound_socket(options: Mapping[str, object]) -> str | None:
    """Return the host of Tiger's push service, which is one of the `client_options`."""
    value = options.get("socket_host_port")
    return None if value is None else str(value)


# The columns that a response may show. Columns that contain or describe a secret belong to
# `TigerAccount`. OpenAPI shows the docstring of a view to users of the API.
class AccountView(MutableEntityView):
    """A broker account without its secrets."""

    account_name: Text = Field(
        min_length=1, max_length=100, description="Display name of the account"
    )
    account_number: Annotated[str, AfterValidator(normalize_account_number)] = Field(
        unique=True, sa_type=UNIQUE_TEXT, description="Account number at Tiger"
    )
    account_type: AccountType = Field(
        # Before pydantic 2.14, an invalid field is missing in `data`.
        default_factory=lambda data: account_type_of(data.get("account_number", "")),  # type: ignore[misc, arg-type]  # SQLModel's stub allows no argument
        sa_column_kwargs={"default": None},
        description="Account type; derived from the account number by default",
    )
    status: AccountStatus = Field(
        default=AccountStatus.ACTIVE,
        description="Status of the account; only active accounts serve requests",
    )
    license: TigerLicense | None = Field(
        default=None, description="License of the account at Tiger, such as TBHK"
    )
    environment: TigerEnvironment = Field(
        default=TigerEnvironment.PROD,
        description="Environment at Tiger; only account_type says whether trades are on paper",
    )
    server_url: Text | None = Field(
        default=None,
        max_length=500,
        description="URL of Tiger's gateway; null: default URL of the environment",
    )
    token_expires_at: UTCDateTime | None = Field(
        default=None, description="Expiry of the access token"
    )
    token_refresh_at: UTCDateTime | None = Field(
        default=None, description="Time at which the access token should be refreshed"
    )
    is_default_trading: bool = Field(
        default=False,
        description="Default account for trading: true for at most one account",
    )
    is_default_data: bool = Field(
        default=False,
        description="Default account for market data: true for at most one account",
    )
    market_permissions: list[MarketPermission] = Field(
        default_factory=list, description="Markets in which the account may trade"
    )
    quote_permissions: Annotated[list[QuotePermission], AfterValidator(require_storable_json)] = (
        Field(
            default_factory=list,
            description="Market data permissions: name and expire_at (epoch ms; -1: no expiry)",
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
        description="Whether the account is suspended because of too many errors, not by a person",
    )
    error_count: Int64 = Field(
        default=0, ge=0, description="Number of consecutive errors since the last success"
    )
    last_error: Text | None = Field(default=None, description="Message of the last error")
    last_error_at: UTCDateTime | None = Field(default=None, description="Time of the last error")
    failing_until: UTCDateTime | None = Field(
        default=None,
        description="Time until which the account serves no requests because of its errors",
    )
    description: Text | None = Field(default=None, max_length=500, description="Notes")
    tags: JsonObject = Field(default_factory=dict, description="Free-form object")


class TigerAccount(AccountView, MutableEntity, table=True):
    """A broker account. The secrets of an account are encrypted in the database."""

    __tablename__ = "tiger_accounts"
    # Requests are signed with the secrets, and are sent to these hosts for this account.
    secrets_bound_to: ClassVar[Mapping[str, Callable[[Any], str | None]]] = {
        "account_number": _bound_account_number,
        "environment": str,
        "server_url": str,
        "client_options": _bound_socket,
    }
    __table_args__ = (
        *(
            Index(f"uq_tiger_accounts_{name}", name, unique=True, postgresql_where=text(name))
            for name in ("is_default_trading", "is_default_data")
        ),
        Index(
            "ix_tiger_accounts_token_refresh_at",
            "token_refresh_at",
            postgresql_where=text("status = 'active' AND access_token IS NOT NULL"),
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
        CheckConstraint(f"account_number ~ '^({ACCOUNT_NUMBER})$'", name="account_number_form"),
    )

    tiger_id: Annotated[SecretField, BeforeValidator(_normalize_secret)] = Field(
        sa_type=EncryptedType(fingerprint="tiger_id_fingerprint", normalize=normalize_tiger_id),
        description="Developer id at Tiger, encrypted; several accounts can share an id",
    )
    # tiger_id_fingerprint is a column without a pydantic field, because the flush computes the
    # value of the column from tiger_id.
    tiger_id_fingerprint: ClassVar[Any] = Column(
        LargeBinary,
        nullable=False,
        index=True,
        comment="Blind index of tiger_id: keyed hash (HMAC-SHA256) for equality search",
    )
    private_key: Annotated[
        SecretUnlessClosed, AfterValidator(_unless_closed), AfterValidator(_require_key_size)
    ] = Field(
        nullable=True,
        description="RSA private key (base64 DER), encrypted; null if the account is closed",
    )
    private_key_format: PrivateKeyFormat = Field(
        default=PrivateKeyFormat.UNKNOWN,
        description="Format of the private key: one of PK1 (PKCS#1), PK8 (PKCS#8) and unknown",
    )
    secret_key: OptionalSecretField = Field(
        default=None, description="Secret key of institutional traders, encrypted"
    )
    access_token: OptionalSecretField = Field(default=None, description="Access token, encrypted")
    refresh_token: OptionalSecretField = Field(
        default=None, description="OAuth refresh token, encrypted"
    )

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
    def is_failing(self) -> bool:
        """Return whether the account is failing, according to this machine's clock.

        `crud.accounts.find_for_operation` compares `failing_until` with the database's clock.
        """
        return self.failing_until is not None and self.failing_until > datetime.now(UTC)

    @property
    def has_valid_token(self) -> bool:
        """Return whether the account has an unexpired access token, by the local clock."""
        if self.access_token is None:
            return False
        return self.token_expires_at is None or self.token_expires_at > datetime.now(UTC)

    @property
    def needs_token_refresh(self) -> bool:
        """Return whether the access token is due now or within the next hour (local clock)."""
        return self.is_token_due(datetime.now(UTC), within=REFRESH_AHEAD)

    def is_token_due(self, now: datetime, *, within: timedelta = timedelta(0)) -> bool:
        """Return whether the access token is due for a refresh at the aware datetime `now`.

        The token of an active account is due from `token_refresh_at` on. `within` looks ahead: the
        token is also due if `token_refresh_at` is at most `within` after `now`. `due_tokens`
        applies the rule of `is_token_due` in SQL.
        """
        if not self.is_active or self.access_token is None:
            return False
        at = _refresh_time(self) if _is_token_changed(self) else self.token_refresh_at
        return at is not None and at <= now + within

    def check_not_stale(
        self, access_token: str, expires_at: datetime | None = None
    ) -> datetime | None:
        """Check that a new access token is not stale, and return the expiry of the new token.

        If `expires_at` is None, the expiry is read from the new token, and is None if the new token
        is not in Tiger's format. If the new and the current token have Tiger's format, the token
        that was generated later is newer. If one of the two tokens is not in Tiger's format, the
        token that expires later is newer. A new token that equals the current token is not stale.

        Raises:
            StaleToken: the current token is newer than the new token.
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
        """Return the access token, or an empty string if no token is stored or can be decrypted."""
        try:
            return self.access_token.get_secret_value() if self.access_token is not None else ""
        except EncryptionError:
            return ""

    @classmethod
    def label_of(cls, values: Mapping[str, Any]) -> str:
        return f"account {mask_account_number(values.get('account_number') or '')}"

    @public
    def has_market_permission(self, permission: MarketPermission) -> bool:
        return permission in self.market_permissions


# The partial index on token_refresh_at has the predicate ACTIVE_WITH_TOKEN.
ACTIVE_WITH_TOKEN = text(
    "tiger_accounts.status = 'active' AND tiger_accounts.access_token IS NOT NULL"
)


def due_tokens(within: timedelta = timedelta(0)) -> ColumnElement[bool]:
    """Return an SQL condition for active accounts whose access token is due for a refresh.

    The SQL condition applies the rule of `TigerAccount.is_token_due` at the time at which the
    transaction started.
    """
    until = func.now() + within if within else func.now()
    return and_(ACTIVE_WITH_TOKEN, col(TigerAccount.token_refresh_at) <= until)


def refresh_time(access_token: str, expires_at: datetime | None) -> datetime | None:
    """Return the time at which to refresh an access token, or None if `expires_at` is None.

    A refresh is due when a fifth of the token's validity remains, but at least five minutes before
    the expiry. A refresh is never due in the first half of the token's validity. If a token is not
    in Tiger's format, `refresh_time` assumes that the validity of the token begins now.
    """
    if expires_at is None:
        return None
    times = token_times(access_token)
    start = times.generated_at if times else datetime.now(UTC)
    validity = max(expires_at - start, timedelta(0))
    return expires_at - min(
        max(validity * _REMAINING_FRACTION_AT_REFRESH, _MAX_CLOCK_SKEW), validity / 2
    )


class TokenTimes(NamedTuple):
    """Generation time and expiry of an access token, by Tiger's clock (UTC)."""

    generated_at: datetime
    expires_at: datetime


def token_times(token: str) -> TokenTimes | None:
    """Return the times in an access token, or None if the token is not in Tiger's format.

    A token in Tiger's format is base64 of `<generated>,<expires>` and 16 opaque bytes. The
    generation time and the expiry are 13-digit numbers of epoch milliseconds (see
    `should_token_refresh` in tigeropen 3.8.0). `token_times` does not check the opaque bytes and
    the base64 padding of a token. OAuth tokens are not in Tiger's format.
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
_TIMES_LENGTH = 36  # number of base64 characters for the 27 bytes `<generated>,<expires>`
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@event.listens_for(TigerAccount, "before_insert")
@event.listens_for(TigerAccount, "before_update")
@forgets_locals
def _set_refresh_time(_mapper: object, _connection: object, account: TigerAccount) -> None:
    """Set `token_refresh_at` of an account if the access token or its expiry was changed."""
    if _is_token_changed(account):
        set_attribute(account, "token_refresh_at", _refresh_time(account))


def _is_token_changed(account: TigerAccount) -> bool:
    """Return whether the access token or its expiry was changed since the last flush."""
    changed = set(instance_state(account).committed_state)
    token = vars(account).get("access_token")
    if isinstance(token, EncryptedSecret) and token.same_text:
        changed.discard("access_token")
    return bool(changed & {"access_token", "token_expires_at"}) and (
        "token_expires_at" in vars(account)
    )


def _refresh_time(account: TigerAccount) -> datetime | None:
    """Return the time at which to refresh the access token that the account has in memory."""
    if account.access_token is None:
        return None
    return refresh_time(account.readable_token(), account.token_expires_at)

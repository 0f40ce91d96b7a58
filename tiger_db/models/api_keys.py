"""The entity `APIKey`, and the tables for usage counts, rate limits and pauses of trading."""

import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import TYPE_CHECKING, Annotated, Optional
from uuid import UUID

from pydantic import AfterValidator, BeforeValidator
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Table,
    func,
    true,
)
from sqlalchemy import Text as SQLText
from sqlalchemy.dialects.postgresql import UUID as SQLUUID
from sqlmodel import Field, Relationship

from tiger_db.models.base import MutableEntity
from tiger_db.models.columns import (
    UNIQUE_TEXT,
    Int64,
    JsonObject,
    Text,
    UTCDateTime,
    metadata,
)
from tiger_db.models.views import MutableEntityView
from tiger_db.public import public

if TYPE_CHECKING:
    from tiger_db.models.accounts import TigerAccount


class APIKeyStatus(StrEnum):
    ACTIVE = "active"
    INACTIVE = "inactive"
    REVOKED = "revoked"
    EXPIRED = "expired"


class APIKeyScope(StrEnum):
    """A permission of an API key, written as `family:level`.

    In each family, the level `admin` includes the level `write`, and `write` includes `read`.
    """

    MCP_READ = "mcp:read"
    MCP_WRITE = "mcp:write"
    MCP_ADMIN = "mcp:admin"
    DASHBOARD_READ = "dashboard:read"
    DASHBOARD_WRITE = "dashboard:write"
    DASHBOARD_ADMIN = "dashboard:admin"
    ACCOUNT_READ = "account:read"
    ACCOUNT_WRITE = "account:write"
    ACCOUNT_ADMIN = "account:admin"
    TRADE_READ = "trade:read"
    TRADE_WRITE = "trade:write"
    TRADE_ADMIN = "trade:admin"
    SYSTEM_READ = "system:read"
    SYSTEM_WRITE = "system:write"
    SYSTEM_ADMIN = "system:admin"

    @property
    def family(self) -> str:
        return self.partition(":")[0]

    def implies(self, other: "APIKeyScope") -> bool:
        """Return whether this scope includes all permissions of the scope `other`."""
        family, level = self.split(":")
        other_family, other_level = other.split(":")
        return family == other_family and _LEVELS.index(level) >= _LEVELS.index(other_level)


_LEVELS = ("read", "write", "admin")


def parse_address(address: str | IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Parse an IP address. An IPv4-mapped IPv6 address is converted to IPv4.

    Raises:
        ValueError: `address` is not an IP address.
    """
    parsed = ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return mapped or parsed


def parse_network(
    network: str | IPv4Address | IPv6Address | IPv4Network | IPv6Network,
) -> IPv4Network | IPv6Network:
    """Parse an IP network or address. An IPv4-mapped IPv6 network is converted to IPv4.

    Raises:
        ValueError: `network` is neither an IP network nor an IP address. If the address of
            a network has host bits, the error message shows what to write instead.
    """
    try:
        parsed = ip_network(network)
    except (ValueError, TypeError, IndexError):
        raise ValueError(_network_problem(network)) from None
    mapped = parsed.network_address.ipv4_mapped if isinstance(parsed, IPv6Network) else None
    if mapped is None or parsed.prefixlen < _IPV4_MAPPED_BITS:
        return parsed
    return IPv4Network((mapped, parsed.prefixlen - _IPV4_MAPPED_BITS))


def _network_problem(network: object) -> str:
    with suppress(ValueError, TypeError, IndexError):
        written = ip_interface(network)  # type: ignore[arg-type]  # any value of a caller
        return (
            f"the address of the network {written} has host bits: write {written.network} for"
            f" the whole network, or {written.ip} for this address only"
        )
    return "the value must be an IP address or network, such as 10.0.0.0/8"


_IPV4_MAPPED_BITS = 96  # prefix length of ::ffff:0:0/96 (RFC 4291, 2.5.5.2)


def _matches(pattern: str, text: str) -> bool:
    """Return whether a text matches a pattern, in which `*` matches any number of characters."""
    start, *middle = map(re.escape, pattern.split("*"))
    if not middle:
        return pattern == text
    # Atomic groups prevent catastrophic backtracking in patterns with many `*`.
    groups = "".join(f"(?>.*?{part})" for part in middle[:-1])
    return re.fullmatch(f"{start}{groups}.*{middle[-1]}", text, re.DOTALL) is not None


def address_allowed(
    networks: Iterable[IPv4Network | IPv6Network], address: str | IPv4Address | IPv6Address | None
) -> bool:
    """Return whether an IP address is in one of the networks, or False if the address is None."""
    if address is None:
        return False
    try:
        parsed = parse_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def user_agent_allowed(patterns: Iterable[str], user_agent: str | None) -> bool:
    """Return whether a User-Agent matches a pattern, or False if the User-Agent is None."""
    return user_agent is not None and any(_matches(pattern, user_agent) for pattern in patterns)


def _distinct(scopes: list[APIKeyScope]) -> list[APIKeyScope]:
    return list(dict.fromkeys(scopes))


# The columns that a response may show: see `AccountView`.
class APIKeyView(MutableEntityView):
    """An API key without its hash and its authentication code."""

    name: Text = Field(min_length=1, max_length=100, description="Display name of the key")
    key_prefix: Text = Field(
        min_length=1,
        max_length=50,
        unique=True,
        sa_type=UNIQUE_TEXT,
        description="Public part of the key, by which the key is found",
    )
    root_id: UUID | None = Field(
        default=None,
        description="First key of the rotation chain (may be deleted); null: this key is first",
    )
    successor_id: UUID | None = Field(
        default=None,
        description="Key that replaced this key in a rotation; that key may be deleted",
    )
    status: APIKeyStatus = Field(
        default=APIKeyStatus.ACTIVE,
        description="Status of the key; only active keys are accepted",
    )
    scopes: Annotated[list[APIKeyScope], AfterValidator(_distinct)] = Field(
        min_length=1, description="Scopes (permissions) of the key"
    )
    tiger_account_id: UUID | None = Field(
        default=None,
        foreign_key="tiger_accounts.id",
        ondelete="RESTRICT",
        description="The only account that the key can access; null: all accounts",
    )
    expires_at: UTCDateTime | None = Field(
        default=None, description="Expiry of the key; from this time on, the key is refused"
    )
    last_used_at: UTCDateTime | None = Field(
        default=None, description="Time of the last accepted use of the key"
    )
    usage_count: Int64 = Field(default=0, ge=0, description="Number of accepted uses of the key")
    rate_limit_per_hour: Int64 | None = Field(
        default=None,
        ge=1,
        description="Maximum number of uses per clock hour (UTC); null: no limit",
    )
    rate_limit_per_day: Int64 | None = Field(
        default=None,
        ge=1,
        description="Maximum number of uses per calendar day (UTC); null: no limit",
    )
    allowed_ips: list[Annotated[IPv4Network | IPv6Network, BeforeValidator(parse_network)]] = Field(
        default_factory=list,
        description="Networks from which the key is accepted; empty: all networks",
    )
    allowed_user_agents: list[Text] = Field(
        default_factory=list,
        description="Patterns of accepted User-Agents (* is a wildcard); empty: all User-Agents",
    )
    created_by: Text | None = Field(
        default=None, max_length=100, description="User or service that created the key"
    )
    revoked_at: UTCDateTime | None = Field(default=None, description="Time of the revocation")
    revocation_reason: Text | None = Field(
        default=None, max_length=500, description="Reason for the revocation"
    )
    description: Text | None = Field(default=None, max_length=500, description="Notes")
    tags: JsonObject = Field(default_factory=dict, description="Free-form object")


class APIKey(APIKeyView, MutableEntity, table=True):
    """An API key. The secret part of the key is stored only as a hash."""

    __tablename__ = "api_keys"
    __table_args__ = (
        Index("ix_api_keys_tiger_account_id_id", "tiger_account_id", "id"),
        Index(
            "ix_api_keys_expires_at_id",
            "expires_at",
            "id",
            postgresql_where="status = 'active' AND expires_at IS NOT NULL",
        ),
    )

    key_hash: Text = Field(
        min_length=1,
        exclude=True,
        repr=False,
        description="passlib hash of the pepper and the secret part of the key",
    )
    pepper_id: Text | None = Field(
        default=None,
        min_length=1,
        max_length=32,
        exclude=True,
        repr=False,
        description="Id of the pepper in key_hash; null: no pepper",
    )
    mac: Text | None = Field(
        default=None,
        exclude=True,
        repr=False,
        description="Authentication code of the row as format:pepper id:code; null: unsigned",
    )
    mac_denied_at: UTCDateTime | None = Field(
        default=None,
        exclude=True,
        repr=False,
        description="Time of the last recorded denial because of a wrong or missing mac",
    )

    # The annotation uses Optional, because SQLModel cannot resolve a relationship type with `|`.
    tiger_account: Optional["TigerAccount"] = Relationship(
        back_populates="api_keys", sa_relationship_kwargs={"lazy": "raise"}
    )

    @property
    def is_expired(self) -> bool:
        """Return whether the key has expired, by the local clock."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)

    @property
    def is_active(self) -> bool:
        return self.status == APIKeyStatus.ACTIVE and not self.is_expired

    @public
    def has_scope(self, scope: APIKeyScope) -> bool:
        """Return whether a scope of the key equals or implies the given scope.

        A pause of trading (`crud.api_keys.pause`) does not change the result of `has_scope`. To
        deny trades during a pause, authorize each request with the scopes that the request needs.
        """
        wanted = APIKeyScope(scope)
        return any(held.implies(wanted) for held in self.scopes)

    @public
    def has_any_scope(self, scopes: Iterable[APIKeyScope]) -> bool:
        return any(self.has_scope(scope) for scope in scopes)

    @public
    def has_all_scopes(self, scopes: Iterable[APIKeyScope]) -> bool:
        return all(self.has_scope(scope) for scope in scopes)

    @public
    def is_ip_allowed(self, ip_address: str | IPv4Address | IPv6Address | None) -> bool:
        """Return whether the key is accepted in requests from the given IP address."""
        return not self.allowed_ips or address_allowed(self.allowed_ips, ip_address)

    @public
    def is_user_agent_allowed(self, user_agent: str | None) -> bool:
        """Return whether the key is accepted in requests with the given User-Agent."""
        return not self.allowed_user_agents or user_agent_allowed(
            self.allowed_user_agents, user_agent
        )

    @public
    def can_access_account(self, account_id: UUID) -> bool:
        return self.tiger_account_id is None or self.tiger_account_id == account_id


# The table api_key_usage has no entity class, because usage counts are written as raw rows.
api_key_usage = Table(
    "api_key_usage",
    metadata,
    Column(
        "api_key_id",
        SQLUUID,
        ForeignKey("api_keys.id", ondelete="CASCADE"),
        primary_key=True,
        comment="API key",
    ),
    Column(
        "hour",
        DateTime(timezone=True),
        primary_key=True,
        comment="Start (UTC) of an hour in which the API key was used",
    ),
    Column(
        "count",
        BigInteger,
        nullable=False,
        comment="Number of accepted uses of the API key in the hour",
    ),
    CheckConstraint("count >= 1", name="count_ge_1"),
    comment="Number of accepted uses per API key and hour",
)


# The counts for rate limits are not in the table api_keys, so that a use of an API key does not
# lock the row of the key. The table api_key_limits has no foreign key, because the counts of a
# rotation chain must remain when the first key of the chain is deleted.
api_key_limits = Table(
    "api_key_limits",
    metadata,
    Column(
        "api_key_id",
        SQLUUID,
        primary_key=True,
        comment="First key of the rotation chain (a key and its replacements)",
    ),
    Column(
        "hour",
        DateTime(timezone=True),
        nullable=False,
        comment="Start (UTC) of the latest hour in which the rotation chain was used",
    ),
    Column(
        "hour_count",
        BigInteger,
        nullable=False,
        comment="Number of uses of the rotation chain in the hour in the column `hour`",
    ),
    Column(
        "day",
        DateTime(timezone=True),
        nullable=False,
        comment="Start (UTC) of the latest day on which the rotation chain was used",
    ),
    Column(
        "day_count",
        BigInteger,
        nullable=False,
        comment="Number of uses of the rotation chain on the day in the column `day`",
    ),
    comment="Usage counts in the latest hour and day, for the rate limits of API keys",
)


# The table trading_pauses has one row while trading is paused, and is empty otherwise. The
# audit trail records all pauses of trading.
trading_pauses = Table(
    "trading_pauses",
    metadata,
    Column(
        "singleton",
        Boolean,
        primary_key=True,
        server_default=true(),
        comment="Primary key whose only value is true, so that there is at most one pause",
    ),
    Column("reason", SQLText, nullable=False, comment="Reason of the pause"),
    Column(
        "paused_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=func.clock_timestamp(),
        comment="Start of the pause",
    ),
    Column("paused_by", SQLText, comment="User or service that started the pause"),
    CheckConstraint("singleton", name="singleton"),
    CheckConstraint("char_length(reason) BETWEEN 1 AND 500", name="reason_length"),
    comment="The pause of trading that is in force; no row: trading is not paused",
)

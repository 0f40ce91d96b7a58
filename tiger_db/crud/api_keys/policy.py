"""The access policy of API keys, which decides whether a key allows a request."""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from types import NoneType
from typing import Any, NamedTuple, Self
from uuid import UUID

from tiger_db.errors import (
    AccountNotActive,
    AccountNotAllowed,
    AddressNotAllowed,
    APIKeyExpired,
    APIKeyRevoked,
    ScopeMissing,
    TradingPaused,
    UserAgentNotAllowed,
)
from tiger_db.models import AccountStatus, APIKey, APIKeyScope, APIKeyStatus
from tiger_db.models.api_keys import address_allowed, user_agent_allowed
from tiger_db.public import Types

_TRADE_SCOPES = frozenset(scope for scope in APIKeyScope if scope.family == "trade")


class AccessRequest(NamedTuple):
    """The access that a client requests with an API key, and the client's IP and user agent."""

    scopes: tuple[APIKeyScope, ...] = ()
    account_id: UUID | None = None
    ip_address: str | IPv4Address | IPv6Address | None = None
    user_agent: str | None = None

    @property
    def trades(self) -> bool:
        """Return whether the request requires a scope of the family `trade`."""
        return not _TRADE_SCOPES.isdisjoint(self.scopes)


_TYPES = Types(
    "authorize",
    {
        "scopes": Iterable[APIKeyScope],
        "account_id": UUID | None,
        "ip_address": str | IPv4Address | IPv6Address | None,
        "user_agent": str | None,
        "count_use": bool,
    },
)
_SCOPE, _TEXT = {APIKeyScope}, {str, NoneType}


def access_request(
    scopes: Iterable[APIKeyScope],
    account_id: UUID | None,
    ip_address: str | IPv4Address | IPv6Address | None,
    user_agent: str | None,
    *,
    count_use: bool,
) -> AccessRequest:
    """Build an AccessRequest from the arguments of `KeyVerifier.authorize`.

    Raises:
        InvalidFields: an argument has a wrong type.
    """
    # Comparisons of exact types accept the usual arguments, and are faster than `Types.check`.
    # Without a fast check, KeyVerifier could not authorize cached keys in a few microseconds.
    if not (
        type(scopes) in (tuple, list)
        and _SCOPE.issuperset(map(type, scopes))
        and (account_id is None or type(account_id) is UUID)
        and type(ip_address) in _TEXT
        and type(user_agent) in _TEXT
        and type(count_use) is bool
    ):
        given: dict[str, Any] = {
            "scopes": scopes, "account_id": account_id, "ip_address": ip_address,
            "user_agent": user_agent, "count_use": count_use,
        }  # fmt: skip
        _TYPES.check(given)
        scopes = given["scopes"]
    return AccessRequest(tuple(scopes), account_id, ip_address, user_agent)


class KeyPermissions(NamedTuple):
    """The columns of an API key that the access policy depends on."""

    key_id: UUID
    limits_key_id: UUID  # id of the first key in the rotation chain
    status: APIKeyStatus
    expires_at: float | None  # expiry in seconds since 1970, or None for no expiry
    account_id: UUID | None
    account_status: AccountStatus | None
    networks: tuple[IPv4Network | IPv6Network, ...]
    user_agents: tuple[str, ...]
    scopes: frozenset[APIKeyScope]  # scopes of the key, and the scopes that they imply
    per_hour: int | None
    per_day: int | None

    @classmethod
    def of(cls, key: APIKey, account_status: str | None) -> Self:
        """Build the permissions of an API key, whose account has the status `account_status`."""
        return cls(
            key_id=key.id,
            limits_key_id=key.root_id or key.id,
            status=key.status,
            expires_at=key.expires_at.timestamp() if key.expires_at is not None else None,
            account_id=key.tiger_account_id,
            account_status=AccountStatus(account_status) if account_status is not None else None,
            networks=tuple(key.allowed_ips),
            user_agents=tuple(key.allowed_user_agents),
            scopes=frozenset(
                scope for scope in APIKeyScope if any(held.implies(scope) for held in key.scopes)
            ),
            per_hour=key.rate_limit_per_hour,
            per_day=key.rate_limit_per_day,
        )

    @property
    def limited(self) -> bool:
        return self.per_hour is not None or self.per_day is not None


def check_in_force(status: APIKeyStatus, expires_at: float | None, now: float) -> None:
    """Check the status and the expiry of an API key. The times are in seconds since 1970.

    Raises:
        APIKeyExpired: the API key has expired.
        APIKeyRevoked: the API key is revoked or not active.
    """
    if status is APIKeyStatus.EXPIRED:
        raise APIKeyExpired
    if status is not APIKeyStatus.ACTIVE:
        raise APIKeyRevoked
    if expires_at is not None and expires_at <= now:
        raise APIKeyExpired


def check_access(
    permissions: KeyPermissions, now: float, request: AccessRequest, pause_reason: str | None
) -> None:
    """Check that an API key allows a request, except for rate limits.

    `now` is the time in seconds since 1970. `pause_reason` is the reason of the current pause of
    trading, or None if trading is not paused. The pause is checked last, so that only a client
    whose key allows the request sees `pause_reason`.

    Raises:
        AccessDenied: the API key is denied. Each check raises its own subclass of AccessDenied.
    """
    check_in_force(permissions.status, permissions.expires_at, now)
    if (
        permissions.account_id is not None
        and permissions.account_status is not AccountStatus.ACTIVE
    ):
        raise AccountNotActive
    if permissions.networks and not address_allowed(permissions.networks, request.ip_address):
        raise AddressNotAllowed
    if permissions.user_agents and not user_agent_allowed(
        permissions.user_agents, request.user_agent
    ):
        raise UserAgentNotAllowed
    if missing := [scope for scope in request.scopes if scope not in permissions.scopes]:
        raise ScopeMissing(f"the API key lacks the scope {', '.join(missing)}")
    if request.account_id is not None and permissions.account_id not in (None, request.account_id):
        raise AccountNotAllowed
    if pause_reason is not None and request.trades:
        raise TradingPaused(reason=pause_reason)

"""What a key may do: decided in one order, whether it was read just now or is remembered."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Self
from uuid import UUID

from pydantic import JsonValue

from tiger_db.crud.common import storable
from tiger_db.errors import (
    AccessDenied,
    AccountNotActive,
    AccountNotAllowed,
    AddressNotAllowed,
    APIKeyExpired,
    APIKeyRevoked,
    ScopeMissing,
    UserAgentNotAllowed,
)
from tiger_db.models import (
    AccountStatus,
    APIKeyScope,
    APIKeyStatus,
    AuditAction,
    AuditLog,
    AuditResult,
    AuditSeverity,
)
from tiger_db.models.api_keys import address_allowed, parse_address, user_agent_allowed
from tiger_db.redaction import redact

_SHOWN = 200  # characters of what a caller said of itself


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """What is asked of a key, from where, by whom."""

    scopes: tuple[APIKeyScope, ...] = ()
    account_id: UUID | None = None
    ip_address: str | IPv4Address | IPv6Address | None = None
    user_agent: str | None = None


@dataclass(frozen=True, slots=True)
class KeyPermissions:
    """What a key may do, as it was when it was read."""

    key_id: UUID
    line_id: UUID  # of the first key of its line, whose uses the limits count together
    status: APIKeyStatus
    expires_at: float | None  # seconds since 1970
    account_id: UUID | None
    account_status: AccountStatus | None
    networks: tuple[IPv4Network | IPv6Network, ...]
    user_agents: tuple[str, ...]
    scopes: frozenset[APIKeyScope]
    per_hour: int | None
    per_day: int | None

    @classmethod
    def of(cls, row: Mapping[str, Any], account_status: str | None) -> Self:
        """Of the columns of a key, and the status of the account that it is bound to."""
        expires_at: datetime | None = row["expires_at"]
        held = [APIKeyScope(scope) for scope in row["scopes"]]
        return cls(
            key_id=row["id"],
            line_id=row["root_id"] or row["id"],
            status=APIKeyStatus(row["status"]),
            expires_at=expires_at.timestamp() if expires_at is not None else None,
            account_id=row["tiger_account_id"],
            account_status=AccountStatus(account_status) if account_status is not None else None,
            networks=tuple(row["allowed_ips"]),
            user_agents=tuple(row["allowed_user_agents"]),
            scopes=frozenset(s for s in APIKeyScope if any(h.implies(s) for h in held)),
            per_hour=row["rate_limit_per_hour"],
            per_day=row["rate_limit_per_day"],
        )

    @property
    def limited(self) -> bool:
        return self.per_hour is not None or self.per_day is not None


def check_access(
    permissions: KeyPermissions, now: float, request: AccessRequest
) -> None:  # a list of reasons
    """Raise the first reason to refuse; limits come after this. `now` is in seconds since 1970.

    Raises:
        AccessDenied: one of its subclasses, by the reason.
    """
    if permissions.status is APIKeyStatus.EXPIRED:
        raise APIKeyExpired
    if permissions.status is not APIKeyStatus.ACTIVE:
        raise APIKeyRevoked
    if permissions.expires_at is not None and permissions.expires_at <= now:
        raise APIKeyExpired
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
    if request.scopes and (missing := _missing(request.scopes, permissions.scopes)):
        raise ScopeMissing(f"the API key lacks the scope {', '.join(missing)}")
    if request.account_id is not None and permissions.account_id not in (None, request.account_id):
        raise AccountNotAllowed


def _missing(asked: Iterable[APIKeyScope], held: frozenset[APIKeyScope]) -> list[str]:
    return [scope for scope in asked if scope not in held]


def _shown(text: str) -> str:
    """What a caller said, without what looks like a key, and short."""
    return redact(storable(text))[:_SHOWN]


def denial_event(
    reason: AccessDenied,
    prefix: str,
    request: AccessRequest,
    key_id: UUID | None = None,
    account_id: UUID | None = None,
) -> AuditLog:
    """The event of a refusal."""
    return AuditLog(
        action=AuditAction.API_KEY_DENY,
        result=AuditResult.FAILURE,
        error_code=type(reason).__name__,
        error_message=str(reason),
        **_fields(request, {"key_prefix": prefix}, key_id, account_id),
    )


def unpeppered_use(
    prefix: str, request: AccessRequest, key_id: UUID, account_id: UUID | None
) -> AuditLog:
    """The event of an accepted key whose hash has no pepper."""
    details = {"key_prefix": prefix, "accepted_by": "API_KEYS_ALLOW_UNPEPPERED_UNTIL"}
    return AuditLog(
        action=AuditAction.API_KEY_USE,
        severity=AuditSeverity.HIGH,
        **_fields(request, details, key_id, account_id),
    )


def _fields(
    request: AccessRequest, told: Mapping[str, str], key_id: UUID | None, account_id: UUID | None
) -> dict[str, Any]:
    """The fields of an event that a request has; what the caller said is made fit to be stored."""
    details: dict[str, JsonValue] = {**told}
    if request.scopes:
        details["scopes"] = [str(scope) for scope in request.scopes]
    if request.account_id is not None:
        details["account_id"] = str(request.account_id)
    address = None
    if request.ip_address is not None:
        try:
            address = parse_address(request.ip_address)
        except ValueError:
            details["ip_address"] = _shown(str(request.ip_address))
    return {
        "resource_type": "api_key",
        "resource_id": str(key_id) if key_id is not None else None,
        "api_key_id": key_id,
        "tiger_account_id": account_id,
        "ip_address": address,
        "user_agent": _shown(request.user_agent) if request.user_agent else None,
        "details": details,
    }

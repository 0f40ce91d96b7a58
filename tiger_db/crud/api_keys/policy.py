"""The access policy of API keys: one pure function, for rows just read and for remembered keys."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Self
from uuid import UUID

from pydantic import JsonValue

from tiger_db.crud.audit_logs import api_key_event
from tiger_db.crud.common import replace_unstorable
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
    APIKey,
    APIKeyScope,
    APIKeyStatus,
    AuditAction,
    AuditLog,
    AuditResult,
    AuditSeverity,
)
from tiger_db.models.api_keys import address_allowed, parse_address, user_agent_allowed
from tiger_db.redaction import redact_aggressively

_RECORDED_LENGTH = 200  # characters of a caller's address or user agent in an event


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """The access that a caller requests with a key, and where the request comes from."""

    scopes: tuple[APIKeyScope, ...] = ()
    account_id: UUID | None = None
    ip_address: str | IPv4Address | IPv6Address | None = None
    user_agent: str | None = None


@dataclass(frozen=True, slots=True)
class KeyPermissions:
    """The columns of a key that decide on a request, as they were read."""

    key_id: UUID
    line_id: UUID  # the first key of the line of rotated keys, whose uses are limited together
    status: APIKeyStatus
    expires_at: float | None  # seconds since 1970
    account_id: UUID | None
    account_status: AccountStatus | None
    networks: tuple[IPv4Network | IPv6Network, ...]
    user_agents: tuple[str, ...]
    scopes: frozenset[APIKeyScope]  # with the scopes that they imply
    per_hour: int | None
    per_day: int | None

    @classmethod
    def of(cls, key: APIKey, account_status: str | None) -> Self:
        """Return the permissions of a key, given the status of the account that it is bound to."""
        return cls(
            key_id=key.id,
            line_id=key.root_id or key.id,
            status=key.status,
            expires_at=key.expires_at.timestamp() if key.expires_at is not None else None,
            account_id=key.tiger_account_id,
            account_status=AccountStatus(account_status) if account_status is not None else None,
            networks=tuple(key.allowed_ips),
            user_agents=tuple(key.allowed_user_agents),
            scopes=frozenset(filter(key.has_scope, APIKeyScope)),
            per_hour=key.rate_limit_per_hour,
            per_day=key.rate_limit_per_day,
        )

    @property
    def limited(self) -> bool:
        return self.per_hour is not None or self.per_day is not None


def check_access(permissions: KeyPermissions, now: float, request: AccessRequest) -> None:
    """Check a request against everything but the rate limits, at `now` in seconds since 1970.

    Raises:
        AccessDenied: a subclass of it, by the first check that failed.
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


def _missing(requested: Iterable[APIKeyScope], held: frozenset[APIKeyScope]) -> list[str]:
    return [scope for scope in requested if scope not in held]


def denial_event(
    reason: AccessDenied,
    prefix: str,
    request: AccessRequest,
    key_id: UUID | None = None,
    account_id: UUID | None = None,
) -> AuditLog:
    """Build the event of a denied request."""
    return api_key_event(
        key_id,
        account_id,
        action=AuditAction.API_KEY_DENY,
        result=AuditResult.FAILURE,
        error_code=type(reason).__name__,
        error_message=str(reason),
        **_request_fields(request, {"key_prefix": prefix}),
    )


def unpeppered_use_event(
    prefix: str, request: AccessRequest, key_id: UUID, account_id: UUID | None
) -> AuditLog:
    """Build the event of a use of a key whose hash has no pepper."""
    details = {"key_prefix": prefix, "accepted_by": "API_KEYS_ALLOW_UNPEPPERED_UNTIL"}
    return api_key_event(
        key_id,
        account_id,
        action=AuditAction.API_KEY_USE,
        severity=AuditSeverity.HIGH,
        **_request_fields(request, details),
    )


def replaced_hash_event(
    old_pepper_id: str | None, new_pepper_id: str, key_id: UUID, account_id: UUID | None
) -> AuditLog:
    """Build the event of a hash that was replaced by one with another pepper."""
    return api_key_event(
        key_id,
        account_id,
        action=AuditAction.API_KEY_UPDATE,
        old_values={"pepper_id": old_pepper_id},
        new_values={"pepper_id": new_pepper_id},
    )


def _request_fields(request: AccessRequest, more: Mapping[str, JsonValue]) -> dict[str, Any]:
    """Return the fields of an event that come from a request, sanitized."""
    details: dict[str, JsonValue] = {**more}
    if request.scopes:
        details["scopes"] = [str(scope) for scope in request.scopes]
    if request.account_id is not None:
        details["account_id"] = str(request.account_id)
    address = None
    if request.ip_address is not None:
        try:
            address = parse_address(request.ip_address)
        except ValueError:
            details["ip_address"] = _sanitize(str(request.ip_address))
    return {
        "ip_address": address,
        "user_agent": _sanitize(request.user_agent) if request.user_agent else None,
        "details": details,
    }


def _sanitize(text: str) -> str:
    """Return a text of the caller that is short, and in which keys are masked."""
    return redact_aggressively(replace_unstorable(text))[:_RECORDED_LENGTH]

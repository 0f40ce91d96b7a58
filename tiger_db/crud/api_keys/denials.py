"""The audit events of denied API keys."""

from contextlib import AbstractAsyncContextManager
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Protocol, Unpack
from uuid import UUID

from tiger_db.actor import Actor, actor_in_force, attribute
from tiger_db.crud.api_key_codes import ForgedRow, UnsignedRow
from tiger_db.crud.api_keys.policy import AccessRequest
from tiger_db.crud.audit_logs.recording import EventFields, api_key_event
from tiger_db.crud.common import replace_unstorable
from tiger_db.denial_counter import DenialCounter
from tiger_db.errors import AccessDenied
from tiger_db.models import AuditAction, AuditLog, AuditResult
from tiger_db.models.api_keys import parse_address
from tiger_db.models.audit_logs import insert_events
from tiger_db.redaction import redact_start

if TYPE_CHECKING:
    import asyncpg

# One customer of a provider usually has a network of this size, and can use all its addresses.
_IPV6_PREFIX = 64
# _CLAIM_DENIAL returns true at most once per hour and API key, in whichever process. A time in the
# future, which plain SQL may have written, does not count. With SKIP LOCKED, a session that holds
# the row's lock blocks no out-of-band connection.
_CLAIM_DENIAL = """
UPDATE api_keys SET mac_denied_at = clock_timestamp() WHERE id IN (
    SELECT id FROM api_keys WHERE id = $1 AND coalesce(
        mac_denied_at NOT BETWEEN clock_timestamp() - interval '1 hour' AND clock_timestamp(), true)
    FOR NO KEY UPDATE SKIP LOCKED)
RETURNING true
"""


class Writer(Protocol):
    """An OutOfBandWriter, or an object that writes in the transaction of a session."""

    @property
    def denials(self) -> DenialCounter | None: ...

    def connection(
        self,
    ) -> AbstractAsyncContextManager["asyncpg.Connection[asyncpg.Record]"]: ...

    async def record(self, event: AuditLog, actor: Actor | None) -> None: ...


async def record_denial(
    writer: Writer,
    reason: AccessDenied,
    key_prefix: str,
    request: AccessRequest,
    *,
    ids: tuple[UUID | None, UUID | None],
    actor: Actor | None,
) -> None:
    """Record a denial, or count the denial if there were many denials in the last minute.

    `ids` are the ids of the API key and of its account, or None if there is no such API key. A row
    without a valid code is recorded once per hour and API key at most.
    """
    key_id, _ = ids
    build = partial(denial_event, reason, key_prefix, request, *ids)
    if isinstance(reason, UnsignedRow | ForgedRow):
        async with writer.connection() as connection, connection.transaction():
            if await connection.fetchval(_CLAIM_DENIAL, key_id):
                await insert_events(connection, [attribute(build(), actor)])
        return
    if writer.denials is not None:
        counted = writer.denials.count(
            "address" if key_id is None else "api_key",
            _network(request, actor) if key_id is None else f"{key_id} {type(reason).__name__}",
            lambda: attribute(build(), actor),
        )
        if counted:
            return
    await writer.record(build(), actor)


def _network(request: AccessRequest, actor: Actor | None) -> str:
    """Return the network of a request's IP address, or an empty text if there is no address."""
    given = request.ip_address or actor_in_force(actor).ip_address
    try:
        address: IPv4Address | IPv6Address = parse_address(given or "")
    except ValueError:
        return ""
    if isinstance(address, IPv4Address):
        return str(address)
    return str(IPv6Network((int(address), _IPV6_PREFIX), strict=False))


def denial_event(
    reason: AccessDenied,
    key_prefix: str,
    request: AccessRequest,
    key_id: UUID | None,
    account_id: UUID | None,
) -> AuditLog:
    """Build the audit event of a denied request."""
    return request_event(
        request,
        key_id,
        account_id,
        action=AuditAction.API_KEY_DENY,
        result=AuditResult.FAILURE,
        error_code=type(reason).__name__,
        error_message=str(reason),
        details={"key_prefix": key_prefix},
    )


def request_event(
    request: AccessRequest,
    key_id: UUID | None,
    account_id: UUID | None,
    **fields: Unpack[EventFields],
) -> AuditLog:
    """Build the audit event of a request.

    The user agent and an invalid IP address are redacted and shortened.
    """
    details = dict(fields["details"] or {})
    if request.scopes:
        details["scopes"] = [str(scope) for scope in request.scopes]
    if request.account_id is not None:
        details["account_id"] = str(request.account_id)
    if request.ip_address is not None:
        try:
            fields["ip_address"] = parse_address(request.ip_address)
        except ValueError:
            details["ip_address"] = redact_start(replace_unstorable(str(request.ip_address)))
    if request.user_agent:
        fields["user_agent"] = redact_start(replace_unstorable(request.user_agent))
    fields["details"] = details
    return api_key_event(key_id, account_id, **fields)

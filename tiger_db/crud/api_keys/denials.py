"""The audit events of denied API keys."""

from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol, Unpack
from uuid import UUID

from tiger_db.actor import Actor, attribute
from tiger_db.crud.api_key_codes import ForgedRow, UnsignedRow
from tiger_db.crud.api_keys.policy import AccessRequest
from tiger_db.crud.audit_logs.recording import EventFields, api_key_event
from tiger_db.crud.common import replace_unstorable
from tiger_db.errors import AccessDenied
from tiger_db.models import AuditAction, AuditLog, AuditResult
from tiger_db.models.api_keys import parse_address
from tiger_db.models.audit_logs import insert_events
from tiger_db.redaction import redact_aggressively

if TYPE_CHECKING:
    import asyncpg

# An IP address or user agent in an audit event has at most _RECORDED_CHARACTERS characters.
_RECORDED_CHARACTERS = 200
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

    def connection(
        self,
    ) -> AbstractAsyncContextManager["asyncpg.Connection[asyncpg.Record]"]: ...

    async def record(self, event: AuditLog, actor: Actor | None) -> None: ...


async def record_denial(
    writer: Writer, reason: AccessDenied, event: AuditLog, actor: Actor | None
) -> None:
    """Record a denial. A row without a valid code is recorded once per hour and API key at most."""
    if not isinstance(reason, UnsignedRow | ForgedRow):
        await writer.record(event, actor)
        return
    async with writer.connection() as connection, connection.transaction():
        if await connection.fetchval(_CLAIM_DENIAL, event.api_key_id):
            await insert_events(connection, [attribute(event, actor)])


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
            details["ip_address"] = _shorten(str(request.ip_address))
    if request.user_agent:
        fields["user_agent"] = _shorten(request.user_agent)
    fields["details"] = details
    return api_key_event(key_id, account_id, **fields)


def _shorten(text: str) -> str:
    return redact_aggressively(replace_unstorable(text))[:_RECORDED_CHARACTERS]

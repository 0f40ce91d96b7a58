"""Functions that find API keys without a valid authentication code, and sign API keys."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import Table, Text, and_, any_, cast, func, literal, select, text
from sqlalchemy.dialects.postgresql import ARRAY, UUID
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import class_mapper
from sqlmodel import col

from tiger_db.crud.api_key_codes import (
    SIGNED_COLUMNS,
    CodeState,
    check_code,
    check_stored_code,
    compute_code,
    encode_row,
    signed_values,
)
from tiger_db.crud.api_keys.hashing import peppers_of
from tiger_db.crud.audit_logs.recording import api_key_event, log_events
from tiger_db.crud.common import fetch_all, fetch_rows
from tiger_db.models import APIKey, APIKeyStatus, AuditAction
from tiger_db.models.base import readable_rules
from tiger_db.peppers import Peppers
from tiger_db.public import public

_WRITE_CODES = """
UPDATE api_keys AS k SET mac = c.mac FROM unnest($1::uuid[], $2::text[]) AS c (id, mac)
WHERE k.id = c.id RETURNING k.id
"""
_IN_FORCE = and_(
    col(APIKey.status) == APIKeyStatus.ACTIVE,
    func.coalesce(col(APIKey.expires_at) > func.now(), True),
)


@public
async def list_unsigned(session: AsyncSession) -> list[APIKey]:
    """Return the API keys without an authentication code, except revoked API keys.

    An earlier release of tiger_db or another program has created these API keys.
    """
    unrevoked = col(APIKey.status) != APIKeyStatus.REVOKED
    statement = select(APIKey).where(col(APIKey.mac).is_(None), unrevoked).order_by(col(APIKey.id))
    return await fetch_all(session, statement)


@public
async def sign(session: AsyncSession, keys: Iterable[APIKey]) -> list[APIKey]:
    """Sign API keys that `list_unsigned` has returned, and return the signed API keys.

    An API key is signed only if its row has no authentication code, and still has the values that
    the given APIKey object shows. For each signed API key, an audit event records these values.

    Raises:
        ConfigurationError: API_KEY_PEPPERS is not set, or the session does not belong to a
            Database.
    """
    peppers = peppers_of(session.info)
    confirmed = {
        key.id: encode_row(signed_values(key)) for key in keys if _is_unsigned(peppers, key)
    }
    # Each item of IN would be a parameter, of which a statement can have at most 32,767.
    is_confirmed = col(APIKey.id) == any_(literal([*confirmed], ARRAY(UUID)))
    table = class_mapper(APIKey).local_table
    assert isinstance(table, Table)
    # A row with other values than its APIKey object shows is never signed.
    is_readable = [text(f"({rule}) IS NOT FALSE") for rule in readable_rules(table).values()]
    statement = select(APIKey).where(is_confirmed, *is_readable).order_by(col(APIKey.id))
    rows = await fetch_all(session, statement.with_for_update(key_share=True))
    signed = [
        row
        for row in rows
        if _is_unsigned(peppers, row) and encode_row(signed_values(row)) == confirmed[row.id]
    ]
    codes = [compute_code(peppers, signed_values(row)) for row in signed]
    await fetch_rows(session, _WRITE_CODES, [row.id for row in signed], codes)
    events = [
        api_key_event(
            row.id,
            row.tiger_account_id,
            action=AuditAction.API_KEY_SIGN,
            new_values=row.model_dump(mode="json", include={*SIGNED_COLUMNS}),
        )
        for row in signed
    ]
    await log_events(session, events)
    await fetch_all(session, statement)  # the objects get the new codes
    return signed


def _is_unsigned(peppers: Peppers, key: APIKey) -> bool:
    return check_code(peppers, signed_values(key), key.mac) is CodeState.MISSING


class InvalidCodes(NamedTuple):
    """The prefixes of the API keys in force that have no code or a wrong code."""

    missing: list[str]
    wrong: list[str]


async def find_invalid_codes(session: AsyncSession, peppers: Peppers) -> InvalidCodes:
    """Check the authentication codes of all active API keys that have not expired.

    A code whose pepper is not configured is neither missing nor wrong.
    """
    table = class_mapper(APIKey).local_table
    # SQLAlchemy cannot convert each list that plain SQL can store, so lists become text[].
    columns = [
        cast(table.c[name], ARRAY(Text)).label(name)
        if isinstance(table.c[name].type, ARRAY)
        else table.c[name]
        for name in (*SIGNED_COLUMNS, "mac")
    ]
    prefixes: dict[CodeState, list[str]] = {state: [] for state in CodeState}
    for row in await session.execute(select(*columns).where(_IN_FORCE).order_by(table.c.id)):
        values: dict[str, Any] = dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's public name
        prefixes[check_stored_code(peppers, values)].append(row.key_prefix)
    return InvalidCodes(prefixes[CodeState.MISSING], prefixes[CodeState.WRONG])

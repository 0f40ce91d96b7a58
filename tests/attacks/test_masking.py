"""A reader of the audit trail looks for secrets in texts that are kept for ever (attack A22)."""

from pathlib import Path

import pytest
from sqlalchemy import text

from tests.support.secrets_in_text import NAMED_SECRETS, ORDINARY_TEXTS, VENDOR_SECRETS
from tiger_db import AuditAction, AuditLog, Settings, crud
from tiger_db.connections.passfile import find_password
from tiger_db.database import AsyncSession
from tiger_db.encryption import generate_key
from tiger_db.keys_in_force import API_KEY_PEPPERS, AUDIT_SIGNING_KEY, ENCRYPTION_KEYS, configured
from tiger_db.redaction import redact_known
from tiger_db.signing import generate_signing_key

STORED = text("SELECT row_to_json(audit_logs)::text FROM audit_logs WHERE id = :id")


def event_of(told: str) -> AuditLog:
    """Return an event with a text in each kind of field."""
    return AuditLog(
        action=AuditAction.MCP_TOOL_CALL,
        user_agent=told,
        error_message=told,
        details={"said": told, "list": [told], "nested": {"told": told}, told: 1},
        new_values={"note": told},
    )


@pytest.mark.slow
async def test_the_trail_contains_no_secret(session: AsyncSession) -> None:
    for told, secret in [
        *((f"before {told} after", "hunter2") for told in NAMED_SECRETS),
        *((f"used {secret}, refused", secret) for secret in VENDOR_SECRETS),
    ]:
        event = event_of(told)
        session.add(event)
        await session.flush()
        assert secret not in str(await session.scalar(STORED, {"id": event.id})), told


async def test_the_trail_keeps_ordinary_texts(session: AsyncSession) -> None:
    for told in ORDINARY_TEXTS:
        event = await crud.audit_logs.log_event(
            session, action=AuditAction.SYSTEM_START, details={"said": told}, error_message=told
        )
        assert (event.details, event.error_message) == ({"said": told}, told)


def test_the_own_secrets_of_the_process_are_masked(tmp_path: Path) -> None:
    keys, peppers, seed = (
        f"{generate_key()},{generate_key('k0')}",
        generate_key(),
        tmp_path / "seed",
    )
    seed.write_text(generate_signing_key(), encoding="utf-8")
    settings = Settings(
        db_host="localhost", db_password="pass w/ord1", encryption_keys=keys,
        api_key_peppers=peppers, audit_signing_key_file=seed,
    )  # fmt: skip
    Settings(database_url="postgresql://u:other%20w%2Ford2@localhost/db")
    configured(settings, ENCRYPTION_KEYS)
    configured(settings, API_KEY_PEPPERS)
    configured(settings, AUDIT_SIGNING_KEY)
    passfile = tmp_path / "passfile"
    passfile.write_text(r"*:*:*:*:third\:word3", encoding="utf-8")
    passfile.chmod(0o600)
    find_password(passfile, "localhost", 5432, "db", "u")
    for secret in (
        "pass w/ord1", "other w/ord2", "other%20w%2Ford2", "third:word3",
        *(key.partition(":")[2].rstrip("=") for key in [*keys.split(","), peppers]),
        seed.read_text(encoding="utf-8").rstrip("="),
    ):  # fmt: skip
        assert secret not in redact_known(f"the server said: {secret} is wrong"), secret

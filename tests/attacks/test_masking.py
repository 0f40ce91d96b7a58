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
from tiger_db.models.event_sanitizer import _Sanitizer, bounded_json
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


@pytest.mark.slow
def test_a_secret_at_the_place_where_a_text_is_cut_is_masked() -> None:
    """A text is cut before it is masked, and a mask is shorter than a secret."""
    limit, secret = 3_000, "https://u:hunter2hunter2hunter2@h"
    shrinking = f"https://u:{'p' * 300}@h " * 22  # 6,886 characters, much fewer when masked
    for size in range(60, 120):  # the first 7,000 characters are masked
        for told in (shrinking + "y" * size, "y" * (limit - size), "y" * (limit + 4_000 - size)):
            shown = _Sanitizer().fit(f"{told} {secret} {'z' * 9_000}", None, limit)
            assert len(shown) <= limit
            assert "u:h" not in shown


@pytest.mark.parametrize("texts", [1, 4, 40])
def test_masking_looks_at_few_characters_of_a_large_tool_call(
    texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masking of all arguments of a body of 4 MiB stops the event loop for seconds."""
    looked_at = 0

    def counted(said: str) -> str:
        nonlocal looked_at
        looked_at += len(said)
        return redact_known(said)

    # Counting needs no timed assertion.
    monkeypatch.setattr(_Sanitizer.fit, "__defaults__", (counted,))
    arguments = {f"a{n}": "http://a:b@h " * (300_000 // texts) for n in range(texts)}
    details = bounded_json(arguments, "arguments", 50_000)
    assert looked_at < 150_000
    assert len(str(details)) < 60_000
    assert "a:b" not in str(details)
    notes = details["_made_safe"]
    assert isinstance(notes, dict)
    assert "cut from" in str(notes)


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

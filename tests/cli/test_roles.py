"""Every command under the role of each kind, as docs/roles.md says."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import factories
from tests.support.command_line import COMMANDS, SECRETS, CommandLine
from tests.support.roles import connected_as, documented, granted
from tests.support.sql import months, run_sql, write
from tests.support.tiger_files import PK8, REQUIRED, config
from tiger_db import Settings
from tiger_db.database import AsyncSession
from tiger_db.models import RoleKind
from tiger_db.signing import generate_signing_key
from tiger_db.sqlstates import PRIVILEGE_ADVICE
from tiger_db.testing.factories import event

WITHOUT_DATABASE = {
    "revision", "history", "start-embedded", "stop-embedded", "print-api-key-pattern",
    "generate-api-key-pepper", "generate-audit-signing-key", "print-audit-public-key",
    "generate-encryption-key",
}  # fmt: skip
EVENT_OF_AN_ENDED_MONTH = """
INSERT INTO audit_logs (id, action, result, severity)
VALUES (uuid7_floor('2025-02-02Z'), 'data:query', 'success', 'low')
"""
OF_THE_OWNER = ("--repair-sequence", "--after-restore")
# The arguments of each command, in an order in which all commands succeed for a role that may use
# all of them.
CALLS = [
    "current", "check", "doctor", "health-check",
    "list-accounts", "count-accounts", "show-account U1", "explain-routing",
    "create-account --account-name x --account-number U9 --tiger-id 3 --private-key-file {pem}",
    "set-default-account U1 --data", "set-account-status U1 active",
    "add-market-permission U1 US", "remove-market-permission U1 US", "reset-account-errors U1",
    "export-account U1 --out {folder}", "import-account {config}",
    "list-api-keys", "show-api-key {prefix}", "list-expiring-api-keys",
    "create-api-key --name x --scopes mcp:read", "verify-api-key --key-file {raw}",
    "update-api-key {prefix} --name y", "deactivate-api-key {prefix}", "activate-api-key {prefix}",
    "sign-api-keys --yes", "rotate-api-key {prefix}", "revoke-api-key {prefix}",
    "delete-api-key {prefix} --yes", "pause --reason x", "resume",
    "list-events", "count-events", "export-events", "verify-audit", "export-checkpoint",
    "seal-audit", "seal-audit --repair-sequence", "seal-audit --after-restore",
    "archive-audit --month 2025-02", "change-audit-signing-key --new-key {signing}",
    "list-refreshes", "watch-refreshes", "prune-refreshes", "run-refresh-worker --once",
    "refresh-token U2", "list-encryption-keys", "rotate-encryption-key",
    "close-account U1 --yes", "reopen-account U1 --private-key-file {pem}",
    "delete-account U3 --yes",
    "init", "migrate", "maintain-audit", "grant {role} --as app", "revoke-grants {role}",
    "downgrade -1 --yes",
]  # fmt: skip


async def store(session: AsyncSession) -> str:
    """Store three accounts and an API key, and return the raw key."""
    await factories.account(session, account_number="U1", private_key=PK8)
    for number in ("U2", "U3"):
        await factories.account(session, account_number=number)
    _, raw_key = await factories.api_key(session)
    return raw_key


@contextmanager
def role_of(settings: Settings, kind: RoleKind) -> Iterator[str]:
    manager = granted(settings, kind)
    with asyncio.Runner() as runner:
        yield runner.run(manager.__aenter__())
        runner.run(manager.__aexit__(None, None, None))


def test_each_command_is_in_the_table() -> None:
    named = {name.partition(" ")[0] for name in documented("Commands")}
    assert named.isdisjoint(WITHOUT_DATABASE)
    assert (
        named | WITHOUT_DATABASE == {*COMMANDS} == {c.split()[0] for c in CALLS} | WITHOUT_DATABASE
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", RoleKind)
def test_a_role_may_use_the_commands_of_the_table(
    bare: CommandLine, clone_settings: Settings, tmp_path: Path, kind: RoleKind
) -> None:
    raw_key = write(clone_settings, store)
    values: dict[str, object] = {"prefix": raw_key.rpartition("_")[0], "folder": tmp_path / "out"}
    texts = {"raw": raw_key, "pem": PK8, "signing": generate_signing_key()}
    for name, text in texts.items():
        values[name] = tmp_path / name
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    values["config"] = config(tmp_path, {**REQUIRED, "account": "U7"})
    folders = {name: str(tmp_path / name) for name in ("AUDIT_ARCHIVE", "AUDIT_CHECKPOINTS")}
    for folder in folders.values():
        Path(folder).mkdir()
    bare.env = {**SECRETS, **folders, "AUDIT_SIGNING_KEY": generate_signing_key()}
    run_sql(clone_settings, EVENT_OF_AN_ENDED_MONTH)
    run_sql(clone_settings, "SELECT make_audit_months(0)")
    assert clone_settings.database_url is not None
    bare.ok("seal-audit", DATABASE_URL=clone_settings.database_url.get_secret_value())
    # A command that has nothing to do succeeds without privileges.
    write(clone_settings, event)
    run_sql(clone_settings, f"DROP TABLE {months(12, 12)[0]}")
    allowed = {}
    with role_of(clone_settings, kind) as role:
        url = connected_as(clone_settings, role).database_url
        assert url is not None
        for call in CALLS:
            words = call.format(**values, role=role).split()
            result = bare(*words, DATABASE_URL=url.get_secret_value())
            name = " ".join(word for word in words if word in {words[0], *OF_THE_OWNER})
            allowed[name] = result.code == 0
            if name == "refresh-token" and result.code:  # the key of U2 is none
                allowed[name] = "the private key is not an RSA key" in result.err
            if not allowed[name]:
                assert result.code == 1
                assert PRIVILEGE_ADVICE in result.err.splitlines()[-1], (call, result)
    assert allowed == {name: kinds[kind] for name, kinds in documented("Commands").items()}

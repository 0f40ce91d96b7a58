"""The checks of `doctor` on healthy databases, and with each problem made for real."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote, urlsplit
from uuid import uuid4

import asyncpg
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from tests.support import factories
from tests.support.encryption_keys import (
    OTHER_KEY,
    store_old_tiger_id,
    store_unbound,
    without_mark,
)
from tests.support.roles import connected_as, granted
from tests.support.sql import CITUS_CATALOG, months, sql
from tiger_db import AuditAction, Database, Settings, crud, doctor, encryption_key_rotation
from tiger_db.audit import seal
from tiger_db.checks import trail
from tiger_db.doctor import CheckResult
from tiger_db.models import RoleKind
from tiger_db.models.secrets import key_provider
from tiger_db.signing import generate_signing_key

NOW = datetime.now(UTC)


async def found(settings: Settings, check: str) -> CheckResult:
    (result,) = [result for result in await doctor.run(settings) if result.check == check]
    assert "\n" not in result.seen + (result.advice or "")
    return result


@pytest.fixture
async def other(clone_settings: Settings) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A session of another application."""
    arguments = {"server_settings": {"application_name": "report"}}
    connection = await asyncpg.connect(**{**clone_settings.connect_args(), **arguments})
    yield connection
    await connection.close()


async def test_a_healthy_database_has_no_problem(clone: Database, clone_settings: Settings) -> None:
    async with clone.session() as session:
        await factories.account(session)
        await factories.api_key(session)
    results = await doctor.run(clone_settings)
    assert len({result.check for result in results}) == len(results) == 22
    assert {result.status for result in results} == {"ok"}, results
    assert all(result.advice is None for result in results if result.status == "ok")
    by_check = {result.check: result.seen for result in results}
    assert by_check["encryption keys"] == "test: 1 row of tiger_accounts"


@pytest.mark.slow
async def test_active_keys_with_unpeppered_hashes_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        keys = [(await factories.api_key(session))[0] for _ in range(5)]
    check = "API key hashes"
    assert (await found(clone_settings, check)).status == "ok"
    await sql(
        clone_settings,
        "UPDATE api_keys SET pepper_id = NULL",
        f"UPDATE api_keys SET status = 'revoked' WHERE id = '{keys[0].id}'",
        f"UPDATE api_keys SET expires_at = now() WHERE id = '{keys[1].id}'",
        f"UPDATE api_keys SET pepper_id = 'test' WHERE id = '{keys[2].id}'",
    )
    today = datetime.now(UTC).date()
    days = {None: "problem", today - timedelta(days=1): "problem", today: "warning"}
    for day, status in days.items():
        allowing = clone_settings.model_copy(update={"api_keys_allow_unpeppered_until": day})
        result = await found(allowing, check)
        assert result.status == status
        assert result.seen.startswith(
            "active API keys whose hash has no pepper: 2"
            f" ({keys[3].key_prefix}; {keys[4].key_prefix}); these API keys are "
        )
        end = f"accepted until the end of {today} (UTC)" if status == "warning" else "refused"
        assert result.seen.endswith(end)
        assert result.advice is not None
        assert "revoke the keys that you did not create, and rotate the other keys" in result.advice


@pytest.mark.slow
async def test_missing_peppers_are_reported(clone: Database, clone_settings: Settings) -> None:
    async with clone.session() as session:
        keys = [(await factories.api_key(session))[0] for _ in range(4)]
    check = "API key peppers"
    assert await found(clone_settings, check) == CheckResult(check, "ok", "test: 4 active keys")
    await sql(
        clone_settings,
        f"UPDATE api_keys SET pepper_id = 'old' WHERE id IN ('{keys[0].id}', '{keys[1].id}')",
        f"UPDATE api_keys SET pepper_id = 'gone', status = 'revoked' WHERE id = '{keys[2].id}'",
    )
    seen = "active API keys whose pepper is missing: 2; these API keys are refused"
    advice = "put old back into API_KEY_PEPPERS"
    assert await found(clone_settings, check) == CheckResult(check, "problem", seen, advice)
    for environment, seen in (
        ("development", "API_KEY_PEPPERS is not set, so API keys cannot be created or checked"),
        ("production", "API_KEY_PEPPERS or API_KEY_PEPPERS_FILE is required"),
    ):
        changes = {"api_key_peppers": None, "environment": environment}
        result = await found(clone_settings.model_copy(update=changes), check)
        assert (result.status, result.seen.partition(" when ")[0]) == ("problem", seen)
        assert result.advice is not None
        assert "its earlier value" in result.advice
        assert "`tiger-db generate-api-key-pepper`" in result.advice


@pytest.mark.slow
async def test_missing_and_wrong_codes_of_active_keys_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        keys = [(await factories.api_key(session))[0] for _ in range(4)]
    check = "API key codes"
    assert (await found(clone_settings, check)).status == "ok"
    unsigned, wrong, revoked, _ = (key.id for key in keys)
    await sql(
        clone_settings,
        f"UPDATE api_keys SET mac = NULL WHERE id IN ('{unsigned}', '{revoked}')",
        f"UPDATE api_keys SET status = 'revoked' WHERE id = '{revoked}'",
    )
    today = datetime.now(UTC).date()
    days = {None: "problem", today - timedelta(days=1): "problem", today: "warning"}
    for day, status in days.items():
        allowing = clone_settings.model_copy(update={"api_keys_allow_unsigned_until": day})
        result = await found(allowing, check)
        end = f"accepted until the end of {today} (UTC)" if status == "warning" else "refused"
        seen = f"active API keys without an authentication code: 1 ({keys[0].key_prefix})"
        assert (result.status, result.seen) == (status, f"{seen}; these API keys are {end}")
        assert "run `tiger-db sign-api-keys`" in str(result.advice)
    await sql(
        clone_settings, f"UPDATE api_keys SET scopes = '{{trade:admin}}' WHERE id = '{wrong}'"
    )
    result = await found(clone_settings, check)
    assert result.status == "problem"
    assert f"another program than tiger_db: 1 ({keys[1].key_prefix})" in result.seen
    without = clone_settings.model_copy(update={"api_key_peppers": None})
    assert "API_KEY_PEPPERS is not set" in (await found(without, check)).seen


@pytest.mark.slow
async def test_a_locked_table_delays_no_other_check(
    clone_settings: Settings, other: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    async with other.transaction():
        await other.execute("LOCK TABLE api_keys")
        results = {result.check: result for result in await doctor.run(clone_settings)}
    assert results["API keys"].status == "warning"
    assert "lock timeout" in results["API keys"].seen
    assert results["encryption keys"].status == "ok"


@pytest.mark.slow
async def test_unsealed_events_are_reported(
    clone: Database, clone_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with clone.session() as session:
        for _ in range(3):
            await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
    result = await found(clone_settings, "unsealed events")
    assert result.status == "ok"
    assert result.seen.startswith("unsealed events: at most 3, ")
    monkeypatch.setattr(trail, "UNSEALED_SECONDS", (0, 0))
    result = await found(clone_settings, "unsealed events")
    assert (result.status, result.advice) == ("warning", "run `tiger-db seal-audit` every minute")
    key = SecretStr(generate_signing_key())
    async with Database(clone_settings.model_copy(update={"audit_signing_key": key})) as signing:
        await seal(signing)
        assert (await found(clone_settings, "unsealed events")).seen == "none"
        async with clone.session() as session:
            await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
    result = await found(clone_settings, "unsealed events")
    assert result.status == "problem", "after the first seal, sealing should go on"
    assert result.seen.startswith("unsealed events: at most 1, ")


@pytest.mark.slow
async def test_overdue_refreshes_and_expired_leases_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        await factories.claim(session)
        await factories.refresh(session)
        await factories.refresh(session)
    assert (await found(clone_settings, "refreshes")).status == "ok"
    await sql(
        clone_settings,
        "UPDATE token_statuses SET scheduled_at = scheduled_at - interval '10 min',"
        " lease_expires_at = lease_expires_at - interval '10 min'",
    )
    result = await found(clone_settings, "refreshes")
    assert result.status == "warning"
    assert (
        result.seen
        == "due refreshes: 2; refreshes with an expired lease: 1; longest wait of a refresh: 10 min"
    )
    await sql(clone_settings, "UPDATE token_statuses SET scheduled_at = now() - interval '3 h'")
    result = await found(clone_settings, "refreshes")
    assert (result.status, result.seen[-3:]) == ("problem", "3 h")
    assert result.advice is not None
    await sql(clone_settings, "UPDATE tiger_accounts SET status = 'suspended'")
    assert (await found(clone_settings, "refreshes")).seen == "no refresh is overdue"


@pytest.mark.slow
async def test_tokens_without_a_worker_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        await factories.account_with_token(session)
    assert (await found(clone_settings, "tokens")).status == "ok"
    stale = "UPDATE tiger_accounts SET token_refresh_at = now() - interval '2 h'"
    await sql(clone_settings, stale)
    result = await found(clone_settings, "tokens")
    seen = (
        "tokens that are due for a refresh: 1; expired tokens: 0;"
        " the first token became due 2 h ago"
    )
    assert (result.status, result.seen) == ("warning", seen)
    await sql(clone_settings, "UPDATE tiger_accounts SET token_expires_at = now()")
    assert (await found(clone_settings, "tokens")).status == "problem"


async def test_keys_that_expire_soon_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        key, _ = await factories.api_key(session, expires_at=NOW + timedelta(days=3, hours=1))
        await factories.api_key(session, expires_at=NOW + timedelta(days=6))
        await factories.api_key(session, expires_at=NOW + timedelta(days=9))
    result = await found(clone_settings, "API keys")
    assert result.status == "warning"
    assert (
        result.seen == f"API keys that expire within 7 days: 2, the first ({key.key_prefix}) in 3 d"
    )


@pytest.mark.parametrize(("dropped", "status"), [(1, "problem"), (2, "warning"), (3, "ok")])
async def test_missing_partitions_are_reported(
    clone_settings: Settings, dropped: int, status: str
) -> None:
    await sql(clone_settings, f"DROP TABLE {', '.join(months(dropped, 12))}")
    result = await found(clone_settings, "audit partitions")
    assert result.status == status
    assert result.seen == f"future months with an audit partition: {dropped - 1}"


@pytest.mark.slow
async def test_an_invalid_index_is_reported(clone: Database, clone_settings: Settings) -> None:
    async with clone.session() as session:
        await factories.account(session)
        await factories.account(session)
    with pytest.raises(asyncpg.UniqueViolationError):
        await sql(
            clone_settings,
            "CREATE UNIQUE INDEX CONCURRENTLY twice ON tiger_accounts (account_name)",
        )
    result = await found(clone_settings, "invalid indexes")
    assert (result.status, result.seen) == ("problem", "twice (unique)")
    assert result.advice is not None
    assert "REINDEX INDEX CONCURRENTLY twice" in result.advice
    await sql(clone_settings, "DROP INDEX twice")
    assert (await found(clone_settings, "invalid indexes")).status == "ok"


@pytest.mark.slow
async def test_changed_versions_of_collations_are_reported(clone_settings: Settings) -> None:
    healthy = await found(clone_settings, "collations")
    assert healthy.status == "ok"
    versioned = await sql(
        clone_settings,
        "SELECT oid::regcollation::text FROM pg_collation"
        " WHERE pg_collation_actual_version(oid) IS NOT NULL AND collname <> 'default' LIMIT 1",
    )
    actual = await sql(
        clone_settings,
        "CREATE SCHEMA other",
        f'CREATE COLLATION other."of names" FROM {versioned}',
        f"CREATE COLLATION other.unused FROM {versioned}",
        'CREATE INDEX mine ON api_keys (name COLLATE other."of names")',
        "UPDATE pg_collation SET collversion = '0.1' WHERE collnamespace = 'other'::regnamespace",
        "UPDATE pg_database SET datcollversion = '0.2' WHERE datname = current_database()"
        " AND datcollversion IS NOT NULL",
        "SELECT pg_database_collation_actual_version(oid) FROM pg_database"
        " WHERE datname = current_database()",
    )
    result = await found(clone_settings, "collations")
    assert result.status == "problem"
    assert 'the collation other."of names" was recorded with the version 0.1' in result.seen
    assert "unused" not in result.seen
    name = clone_settings.database
    wanted = [
        f"REINDEX DATABASE CONCURRENTLY {name}",
        'ALTER COLLATION other."of names" REFRESH VERSION',
    ]
    if actual is not None:  # else the database has the locale C
        wanted.insert(1, f"ALTER DATABASE {name} REFRESH COLLATION VERSION")
        assert result.seen.startswith(
            "the default collation of the database was recorded with the version 0.2, and the"
            f" server has the version {actual}; "
        )
    assert result.advice is not None
    commands = result.advice.removeprefix("run ").split(", then ")
    assert commands == wanted
    for command in commands:
        await sql(clone_settings, command)
    assert await found(clone_settings, "collations") == healthy


@pytest.mark.slow
async def test_a_collation_without_a_version_on_this_server_is_reported(
    clone_settings: Settings,
) -> None:
    """The data of a server with glibc are moved to one with musl, which has no versions."""
    await sql(
        clone_settings,
        'CREATE COLLATION moved FROM "C"',
        "ALTER TABLE tiger_accounts ALTER description TYPE text COLLATE moved",
        "UPDATE pg_collation SET collversion = '2.36' WHERE collname = 'moved'",
    )
    result = await found(clone_settings, "collations")
    assert result.status == "problem"
    assert result.seen == (
        "the collation moved was recorded with the version 2.36, and the server has no version of"
        " it: indexes of texts may not find all rows"
    )
    assert str(result.advice).startswith("use an operating system with the recorded version, or ")


@pytest.mark.slow
async def test_tables_that_citus_distributes_are_reported(clone_settings: Settings) -> None:
    assert (await found(clone_settings, "Citus")).seen == "no table is distributed"
    await sql(clone_settings, *CITUS_CATALOG, "CREATE TABLE mine ()")
    await sql(clone_settings, "INSERT INTO pg_dist_partition VALUES ('mine', 'h', 'id')")
    assert (await found(clone_settings, "Citus")).status == "ok"
    await sql(
        clone_settings,
        "INSERT INTO pg_dist_partition VALUES ('api_keys', 'n', NULL),"
        " ('audit_logs', 'h', 'id'), ('audit_logs_default', 'h', 'id')",
    )
    result = await found(clone_settings, "Citus")
    assert result.status == "problem"
    assert "Citus distributes tables of tiger_db (api_keys, audit_logs): " in result.seen
    assert result.advice is not None
    assert "SELECT undistribute_table('api_keys', cascade_via_foreign_keys => true)" in (
        result.advice
    )


@pytest.mark.slow
async def test_active_accounts_that_cannot_serve_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        for changes in ({"license": "TBNZ"}, {"license": "TBHK", "status": "inactive"}):
            await factories.account(session, **changes)
        failing = await factories.account(session, failing_until=NOW + timedelta(hours=1))
    result = await found(clone_settings, "accounts")
    assert result.status == "warning"
    assert result.seen == (
        "active accounts that cannot serve requests: 1:"
        f" {failing.id} (it is failing after several errors)"
    )
    async with clone.session() as session:
        tokenless = await factories.account(session, license="TBHK")
        await factories.account(session, license="TBHK", access_token="opaque")
        expired = await factories.account(
            session, license="TBHK", access_token="opaque", token_expires_at=NOW
        )
    result = await found(clone_settings, "accounts")
    assert result.status == "problem"
    assert result.seen.startswith("active accounts that cannot serve requests: 3: ")
    why = "its license needs an access token, and the account has no valid token"
    assert f"{tokenless.id} ({why})" in result.seen
    assert f"{expired.id} ({why})" in result.seen
    assert str(result.advice).startswith("store an access token with `tiger-db import-account`; ")


async def test_missing_and_old_encryption_keys_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    def keyed(keys: str) -> Settings:
        return clone_settings.model_copy(update={"encryption_keys": SecretStr(keys)})

    async with clone.session() as session:
        await factories.account(session)
    keys = clone_settings.encryption_keys
    assert keys is not None
    result = await found(keyed(f"{OTHER_KEY},{keys.get_secret_value()}"), "encryption keys")
    assert result.status == "warning"
    assert result.advice is not None
    assert "rotate-encryption-key" in result.advice
    result = await found(keyed(OTHER_KEY), "encryption keys")
    assert (result.status, result.seen) == ("problem", "test: 1 row of tiger_accounts")
    assert result.advice is not None
    assert "put test back" in result.advice


async def test_an_account_with_a_url_that_was_changed_by_sql_is_named(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        account, _ = [await factories.account(session) for _ in range(2)]
        await session.execute(
            text("UPDATE tiger_accounts SET server_url = 'https://evil.example' WHERE id = :id"),
            {"id": account.id},
        )
    result = await found(clone_settings, "Tiger ids")
    assert result.status == "problem"
    assert result.seen == f"accounts whose secrets do not belong to their row: {account.id}"
    assert str(result.advice).startswith("undo changes of account_number, environment, server_url")


@pytest.mark.slow
async def test_ciphertexts_of_version_1_and_keys_without_mark_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    unmarked = without_mark(clone_settings)
    result = await found(unmarked, "encryption keys")
    assert (result.status, result.seen) == ("warning", "no encryption key is in use")
    assert str(result.advice).startswith("append :v2 to test in ENCRYPTION_KEYS, when no process")
    async with clone.session() as session:
        account = await factories.account(session)
        await store_unbound(session, account, key_provider(session.sync_session))
    result = await found(unmarked, "encryption keys")
    assert result.status == "warning"
    assert result.seen.endswith("rows with ciphertexts of version 1: 1")
    assert str(result.advice).endswith("run `tiger-db rotate-encryption-key`")
    async with Database(unmarked) as database:
        await encryption_key_rotation.rotate(database)
    assert (await found(clone_settings, "encryption keys")).status == "ok"


EXEMPT = """
ALTER TABLE tiger_accounts DROP CONSTRAINT ck_tiger_accounts_account_number_form,
    ADD CONSTRAINT ck_tiger_accounts_account_number_form
    CHECK (account_number ~ '^U[0-9]+$' OR account_name = 'Main') NOT VALID
"""


@pytest.mark.slow
async def test_account_numbers_of_older_releases_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    ids = []
    async with clone.session() as session:
        for _ in range(4):
            account = await factories.account(session)
            await store_unbound(session, account, key_provider(session.sync_session))
            ids.append(account.id)
    update = "UPDATE tiger_accounts SET account_number = '{}' WHERE id = '{}'"
    numbers = ("u1", "U1\N{ZERO WIDTH SPACE}", "DEMO", "51230321")
    statements = [update.format(*pair) for pair in zip(numbers, ids, strict=True)]
    await sql(clone_settings, EXEMPT, *statements)

    result = await found(clone_settings, "account numbers")
    assert (result.status, result.seen) == (
        "problem", f"accounts {ids[0]} and {ids[1]} are the same account at Tiger"
    )  # fmt: skip
    assert result.advice is not None
    assert result.advice.startswith("close all but one")
    async with Database(without_mark(clone_settings)) as older, older.session() as session:
        await crud.accounts.close(session, ids[1])

    result = await found(clone_settings, "account numbers")
    assert (result.status, result.seen.partition(": ")[2]) == ("warning", f"{ids[0]}; {ids[2]}")
    assert result.advice is not None
    assert "crud.accounts.update" in result.advice
    async with Database(without_mark(clone_settings)) as older, older.session() as session:
        await crud.accounts.update(session, ids[0], account_number="u1")
        await crud.accounts.update(session, ids[2], account_number="U2")
    assert (await found(clone_settings, "account numbers")).status == "ok", "a closed one may stay"

    await sql(clone_settings, f"DELETE FROM tiger_accounts WHERE id = '{ids[1]}'")
    result = await found(clone_settings, "account numbers")
    assert (result.status, result.seen[-18:]) == ("warning", "still exempts accounts"[-18:])
    assert result.advice is not None
    await sql(clone_settings, result.advice.removeprefix("run "))
    assert (await found(clone_settings, "account numbers")).status == "ok"
    with pytest.raises(asyncpg.CheckViolationError):
        await sql(clone_settings, update.format("u3", ids[0]))


@pytest.mark.slow
async def test_tiger_ids_of_older_releases_are_reported(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        first, second, _ = [await factories.account(session) for _ in range(3)]
        await store_old_tiger_id(session, first, "20150001 ")
        await store_old_tiger_id(session, second, "2015 0001")
    result = await found(clone_settings, "Tiger ids")
    assert (result.status, result.seen, result.advice) == (
        "warning",
        f"accounts whose Tiger ids are not normalized: {first.id}",
        "run `tiger-db rotate-encryption-key`",
    )  # fmt: skip
    await encryption_key_rotation.rotate(clone)
    result = await found(clone_settings, "Tiger ids")
    assert (result.status, result.seen) == (
        "warning", f"accounts whose Tiger ids are not printable ASCII: {second.id}"
    )  # fmt: skip
    async with clone.session() as session:
        await crud.accounts.update(session, second.id, tiger_id=" 20150001")
    assert (await found(clone_settings, "Tiger ids")).status == "ok"


@pytest.mark.slow
async def test_tiger_ids_cannot_be_checked_without_the_keys(
    clone: Database, clone_settings: Settings
) -> None:
    async with clone.session() as session:
        await factories.account(session)
    without = clone_settings.model_copy(update={"encryption_keys": None})
    result = await found(without, "Tiger ids")
    assert result.status == "warning"
    assert result.seen.startswith("not checked: ")
    assert (
        result.advice
        == "to check the encrypted Tiger ids, run `tiger-db doctor` with ENCRYPTION_KEYS set"
    )
    other = clone_settings.model_copy(update={"encryption_keys": SecretStr(OTHER_KEY)})
    result = await found(other, "Tiger ids")
    assert (result.status, result.seen) == (
        "warning", "Tiger ids that cannot be decrypted, and were not checked: 1"
    )  # fmt: skip


@pytest.fixture
async def guest(clone_settings: Settings) -> AsyncIterator[Settings]:
    """Settings of a role that may read only the version of the schema."""
    role = f"guest_{uuid4().hex[:12]}"
    await sql(
        clone_settings, f"CREATE ROLE {role}", f"GRANT SELECT ON tiger_db_alembic_version TO {role}"
    )
    assert clone_settings.database_url is not None
    url = urlsplit(clone_settings.database_url.get_secret_value())
    query = "&".join(filter(None, (url.query, f"options={quote(f'-crole={role}')}")))
    yield clone_settings.model_copy(
        update={"database_url": SecretStr(url._replace(query=query).geturl())}
    )
    await sql(clone_settings, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_missing_privileges_are_reported(clone: Database, guest: Settings) -> None:
    async with clone.session() as session:
        await session.execute(text("SELECT 1"))  # in a transaction of another role
        results = {result.check: result for result in await doctor.run(guest)}
    assert len(results) == 22
    assert {f.status for f in results.values()} == {"ok", "warning"}, results
    for check in (
        "unsealed events",
        "refreshes",
        "tokens",
        "accounts",
        "trading",
        "API keys",
    ):
        assert results[check].status == "warning"
        assert "permission denied" in results[check].seen
    assert "partition: 12" in results["audit partitions"].seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", RoleKind)
async def test_a_role_that_reads_no_secrets_needs_no_keys(
    clone: Database, clone_settings: Settings, kind: RoleKind
) -> None:
    async with clone.session() as session:
        await factories.account(session)
        await factories.api_key(session)
    without = clone_settings.model_copy(update={"encryption_keys": None, "api_key_peppers": None})
    needing = ["API key peppers", "API key codes", "encryption keys"]
    async with granted(clone_settings, kind) as role:
        results = await doctor.run(connected_as(without, role))
    problems = [result.check for result in results if result.status == "problem"]
    assert problems == (needing if kind == RoleKind.APP else [])
    notes = [result for result in results if result.seen.startswith("not needed: this role may")]
    expected = [] if kind == RoleKind.APP else [*needing, "Tiger ids"]
    assert [result.check for result in notes] == expected


async def test_a_missing_schema_is_reported(empty_database: Settings) -> None:
    results = await doctor.run(empty_database)
    assert results[-1] == CheckResult(
        "schema", "problem", "the database has no tiger_db schema", "run `tiger-db init`"
    )
    assert [f.check for f in results if f.status == "problem"] == ["schema"]


async def test_an_unreachable_server_is_reported() -> None:
    settings = Settings(database_url="postgresql://u:hunter2@localhost:1/x")
    (result,) = await doctor.run(settings)
    assert (result.check, result.status) == ("server", "problem")
    assert "localhost:1/x" in result.seen
    assert "hunter2" not in str(result)


@pytest.mark.slow
async def test_a_sealer_without_memory_is_reported(
    clone_settings: Settings, tmp_path: Path
) -> None:
    check = "audit checkpoints"
    assert (await found(clone_settings, check)).status == "ok"
    key = SecretStr(generate_signing_key())
    settings = clone_settings.model_copy(update={"audit_signing_key": key})
    result = await found(settings, check)
    assert result.status == "warning"
    assert "set AUDIT_CHECKPOINTS to a folder" in str(result.advice)
    settings = settings.model_copy(update={"audit_checkpoints": tmp_path})
    async with Database(settings) as database:
        async with database.session() as session:
            await crud.audit_logs.log_event(session, action=AuditAction.DATA_QUERY)
        await seal(database)
    seen = "the newest checkpoint is of seal 1, the newest seal is 1"
    assert await found(settings, check) == CheckResult(check, "ok", seen)
    await sql(settings, "SELECT setval('audit_logs_position_seq', 1, false)")
    behind = await found(settings, "unsealed events")
    assert (behind.status, behind.advice) == (
        "problem", "run `tiger-db seal-audit --repair-sequence`",
    )  # fmt: skip
    await sql(settings, "SET session_replication_role = replica", "DELETE FROM audit_seals")
    result = await found(settings, check)
    assert (result.status, result.advice) == ("problem", "run `tiger-db verify-audit`")
    missing = settings.model_copy(update={"audit_checkpoints": tmp_path / "none"})
    assert (await found(missing, check)).status == "problem"


@pytest.mark.slow
async def test_roles_are_compared(clone_settings: Settings) -> None:
    check = "database roles"
    production = clone_settings.model_copy(update={"environment": "production"})
    assert await found(clone_settings, check) == CheckResult(check, "ok", "no role is granted")
    warning = await found(production, check)
    assert warning.status == "warning"
    assert "an application that connects with it can change the audit trail" in warning.seen
    assert "run `tiger-db grant` for the role of the application" in str(warning.advice)
    async with granted(clone_settings, RoleKind.APP) as role:
        assert await found(production, check) == CheckResult(check, "ok", f"app: {role}")
        as_app = connected_as(production, role)
        assert await found(as_app, check) == CheckResult(check, "ok", f"app: {role}")
        await sql(clone_settings, f"GRANT TRUNCATE ON audit_logs TO {role}", "SELECT 1")
        problem = await found(as_app, check)
        assert (problem.status, problem.advice) == (
            "problem", f"run `tiger-db grant {role} --as app`",
        )  # fmt: skip
        assert problem.seen == f"the app role {role} has TRUNCATE on the table audit_logs"

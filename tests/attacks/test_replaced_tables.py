"""Tables, columns, sessions and sequences that an owner of the database has replaced or changed.

The attacker hides or changes an event that is sealed, or makes the sealer seal something else.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from json.encoder import encode_basestring
from pathlib import Path

import pytest

from tests.support import factories
from tests.support.roles import connected_as, granted
from tests.support.trail import (
    DROP_CHECKS,
    exported,
    fetch_seals,
    log,
    log_seals,
    with_signing_key,
)
from tiger_db import Database, Settings, audit, crud
from tiger_db.audit import FindingKind
from tiger_db.audit.event_content import _MEMBERS, CONTENT_COLUMNS
from tiger_db.audit.storage import Connection
from tiger_db.errors import InvalidState, SchemaMismatch
from tiger_db.migrations import drift
from tiger_db.models import RoleKind

VICTIM = 4
HIDE = f"position <> {VICTIM}"
PARTITION = """
SELECT inhrelid::regclass::text FROM pg_inherits JOIN audit_logs ON audit_logs.tableoid = inhrelid
WHERE inhparent = 'audit_logs'::regclass LIMIT 1
"""
BOUNDS = "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE oid = $1::text::regclass"


@pytest.fixture
def settings(clone_settings: Settings) -> Settings:
    return with_signing_key(clone_settings)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    """Nine sealed events in three seals."""
    async with Database(settings) as database:
        await log_seals(database, 3, 3, 3)
        yield database


async def partition_in_use(owner: Connection) -> tuple[str, str]:
    name = await owner.fetchval(PARTITION)
    return name, await owner.fetchval(BOUNDS, name)


# Partitions


async def foreign_table(owner: Connection) -> None:
    """A foreign table, which reads from the same server and leaves out the event."""
    name, bounds = await partition_in_use(owner)
    await owner.execute(
        f"""
        CREATE EXTENSION postgres_fdw;
        ALTER TABLE audit_logs DROP CONSTRAINT pk_audit_logs;
        CREATE SERVER same FOREIGN DATA WRAPPER postgres_fdw;
        ALTER TABLE audit_logs DETACH PARTITION {name};
        CREATE FOREIGN TABLE swapped PARTITION OF audit_logs {bounds} SERVER same
            OPTIONS (table_name 'kept')
        """
    )


async def partitioned_partition(owner: Connection) -> None:
    name, bounds = await partition_in_use(owner)
    await owner.execute(
        f"""
        ALTER TABLE audit_logs DETACH PARTITION {name};
        CREATE TABLE swapped PARTITION OF audit_logs {bounds} PARTITION BY HASH (id);
        CREATE TABLE swapped_0 PARTITION OF swapped FOR VALUES WITH (MODULUS 1, REMAINDER 0);
        INSERT INTO audit_logs SELECT * FROM {name} WHERE {HIDE}
        """
    )


@pytest.mark.parametrize("replace", [foreign_table, partitioned_partition])
async def test_another_relation_in_place_of_a_partition_is_refused(
    database: Database, owner: Connection, replace: Callable[[Connection], Awaitable[None]]
) -> None:
    await replace(owner)
    for use in (audit.verify, audit.seal, audit.maintain, audit.export_checkpoint):
        with pytest.raises(SchemaMismatch, match="swapped is not a table of tiger_db"):
            await use(database)


@pytest.mark.slow
async def test_a_partition_that_is_swapped_hides_nothing(
    database: Database, owner: Connection
) -> None:
    """An honest copy of the partition verifies, and a copy without the event does not."""
    name, bounds = await partition_in_use(owner)
    await owner.execute(
        f"""
        ALTER TABLE audit_logs DETACH PARTITION {name};
        CREATE TABLE swapped PARTITION OF audit_logs {bounds};
        INSERT INTO swapped SELECT * FROM {name}
        """
    )
    changed = [one for one in (await audit.verify(database)).findings if one.position]
    assert changed == []
    await owner.execute(f"DELETE FROM swapped WHERE NOT ({HIDE})")
    deleted = [one for one in (await audit.verify(database)).findings if one.position]
    assert [(one.kind, one.position) for one in deleted] == [(FindingKind.DELETED, VICTIM)]
    await owner.execute("ALTER TABLE audit_logs DETACH PARTITION swapped")
    assert (await audit.verify(database)).count >= 9


async def test_a_table_that_inherits_from_the_seals_is_a_finding(
    database: Database, owner: Connection
) -> None:
    """Seals in such a table would be outside of the triggers that refuse changes."""
    await owner.execute(
        """
        CREATE TABLE more_seals () INHERITS (audit_seals);
        WITH moved AS (DELETE FROM ONLY audit_seals WHERE number = 3 RETURNING *)
        INSERT INTO more_seals TABLE moved
        """
    )
    for use in (audit.verify, audit.seal):
        with pytest.raises(SchemaMismatch, match="more_seals"):
            await use(database)


# Columns

COLUMNS = {
    "generated from another column": (
        (
            "ALTER TABLE audit_logs ADD shown text; UPDATE audit_logs SET shown = user_id;"
            "ALTER TABLE audit_logs DROP user_id CASCADE;"
            "ALTER TABLE audit_logs ADD user_id text GENERATED ALWAYS AS (shown) STORED"
        ),
        "UPDATE audit_logs SET shown = 'eve' WHERE position = 4",
    ),
    "a domain": (
        "CREATE DOMAIN word AS text; ALTER TABLE audit_logs ALTER user_id TYPE word",
        "UPDATE audit_logs SET user_id = 'eve' WHERE position = 4",
    ),
    "a collation": (
        'ALTER TABLE audit_logs ALTER action TYPE text COLLATE "POSIX"',
        "UPDATE audit_logs SET action = upper(action) WHERE position = 4",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COLUMNS)
async def test_a_column_of_another_kind_hides_no_change(
    database: Database, owner: Connection, name: str
) -> None:
    replace, change = COLUMNS[name]
    await owner.execute(DROP_CHECKS)
    await owner.execute(replace)
    before = [one for one in (await audit.verify(database)).findings if one.position]
    assert before == []
    if name.startswith("generated"):
        lines = await drift(database.engine)
        assert "modify_default audit_logs user_id shown" in "\n".join(lines)
        assert any(line.startswith("column user_id of audit_logs has the") for line in lines)
    await owner.execute(change)
    after = [one for one in (await audit.verify(database)).findings if one.position]
    assert [(one.kind, one.position) for one in after] == [(FindingKind.CHANGED, VICTIM)]


JOIN_MEMBERS = """
ALTER TABLE audit_logs ALTER {first} TYPE text;
UPDATE audit_logs SET {first} = {first} || ',"{second}":' || {second}::text, {second} = NULL
"""
OTHER_TYPES = [
    JOIN_MEMBERS.format(first="details", second="old_values"),
    JOIN_MEMBERS.format(first="old_values", second="new_values"),
    JOIN_MEMBERS.format(first="duration_ms", second="tags"),
    "ALTER TABLE audit_logs ALTER new_values TYPE json",
    "CREATE DOMAIN map AS jsonb; ALTER TABLE audit_logs ALTER tags TYPE map",
    "ALTER TABLE audit_logs DISABLE TRIGGER USER, ALTER created_at TYPE text",
    """
    ALTER TABLE audit_logs ALTER position DROP NOT NULL;
    UPDATE audit_logs SET position = NULL WHERE position = 5
    """,
    """
    ALTER TABLE audit_logs ALTER position DROP NOT NULL;
    UPDATE audit_logs SET position = NULL WHERE position = 5;
    ALTER TABLE audit_logs ADD CONSTRAINT positions NOT NULL position NOT VALID
    """,
    """
    ALTER TABLE audit_logs ALTER position DROP DEFAULT, ALTER position TYPE numeric;
    UPDATE audit_logs SET position = 'NaN' WHERE position = 5
    """,
]


@pytest.mark.slow
@pytest.mark.parametrize("change", OTHER_TYPES)
async def test_a_column_whose_values_look_like_those_of_other_columns_is_refused(
    database: Database, owner: Connection, change: str
) -> None:
    """Readers see other columns or further events, and the contents would still be the same."""
    values = {"details": {"a": 1}, "old_values": {"b": 2}, "new_values": {"c": 3}, "tags": {}}
    async with database.session() as session:
        await crud.audit_logs.log_events(session, [factories.new_event(duration_ms=5, **values)])
    await audit.seal(database)
    await owner.execute(DROP_CHECKS)
    if "NOT VALID" in change and owner.get_server_version().major < 18:
        pytest.skip("this server has no such constraints")
    await owner.execute(change)
    for use in (audit.verify, audit.seal, audit.maintain, exported):
        with pytest.raises(SchemaMismatch, match="of audit_logs was changed to another type"):
            await use(database)


def test_each_column_that_is_rendered_without_quotes_is_tried() -> None:
    raw = [
        name
        for name, (_, render) in zip(CONTENT_COLUMNS, _MEMBERS, strict=True)
        if render is not encode_basestring
    ]
    for name in ["position", *raw]:
        assert any(f"ALTER {name} TYPE" in change for change in OTHER_TYPES), name


# Sessions of the sealer

SESSIONS = {
    "search path": (
        "PERFORM set_config('search_path', 'evil, public', false);"
        "CREATE SCHEMA IF NOT EXISTS evil;"
        "CREATE TABLE IF NOT EXISTS evil.audit_logs AS SELECT * FROM public.audit_logs"
        " WHERE position < 11;"
    ),
    "temporary table": (
        "CREATE TEMP TABLE IF NOT EXISTS audit_logs AS SELECT * FROM public.audit_logs"
        " WHERE position < 11;"
    ),
    "time zone": "PERFORM set_config('TimeZone', 'Asia/Kathmandu', false);",
    "date style": "PERFORM set_config('DateStyle', 'SQL, DMY', false);",
    "encoding": "PERFORM set_config('client_encoding', 'LATIN1', false);",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SESSIONS)
async def test_a_trigger_that_changes_the_session_misleads_no_sealer(
    database: Database,
    owner: Connection,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Either the events are sealed as they are, or the sealer stops."""
    await owner.execute(
        "CREATE FUNCTION mislead() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$BEGIN {SESSIONS[name]} RETURN NEW; END$$;"
        "CREATE TRIGGER mislead BEFORE INSERT ON audit_seals FOR EACH ROW"
        " EXECUTE FUNCTION mislead()"
    )
    # Several seals in one session, so that the trigger changes the session between them.
    monkeypatch.setattr("tiger_db.audit.sealing.EVENTS_PER_SEAL", 2)
    await log(database, 6)
    with suppress(InvalidState):
        assert (await audit.seal(database)).rows == 6
    await owner.execute("DROP TRIGGER mislead ON audit_seals")
    await audit.seal(database)
    found = await audit.verify(database)
    assert (found.findings, found.rows, found.unsealed) == ([], 15, 0)


# What an owner of the database can set for other roles.
ROLE_SETTINGS = [
    "TimeZone = 'Asia/Kathmandu'", "DateStyle = 'SQL, DMY'", "bytea_output = escape",
    "extra_float_digits = -15", "standard_conforming_strings = off", "transform_null_equals = on",
    "quote_all_identifiers = on", "default_transaction_isolation = serializable",
    "default_transaction_deferrable = on", "statement_timeout = '1ms'", "lock_timeout = '1ms'",
    "client_encoding = LATIN1", "search_path = pg_temp, evil", "constraint_exclusion = on",
    "plan_cache_mode = force_generic_plan", "xmloption = document", "array_nulls = off",
    "enable_seqscan = off", "enable_partition_pruning = off", "check_function_bodies = off",
]  # fmt: skip


@pytest.mark.slow
async def test_settings_of_roles_change_no_proof(
    database: Database, settings: Settings, owner: Connection
) -> None:
    async with (
        granted(settings, RoleKind.SEALER) as sealer,
        granted(settings, RoleKind.AUDITOR) as auditor,
    ):
        for setting in ROLE_SETTINGS:
            await owner.execute(f"ALTER ROLE {sealer} SET {setting}")
            await owner.execute(f"ALTER ROLE {auditor} SET {setting}")
        before = await exported(database)
        await log(database, 2)
        async with Database(connected_as(settings, sealer)) as other:
            assert (await audit.seal(other)).rows == 2
        async with Database(connected_as(settings, auditor)) as other:
            found = await audit.verify(other)
            assert (found.findings, found.warnings, found.rows) == ([], [], 11)
            assert (await exported(other))[: len(before)] == before


# Sequences


@pytest.mark.parametrize("change", ["CACHE 10", "INCREMENT -1", "MAXVALUE 12 CYCLE"])
@pytest.mark.slow
async def test_a_changed_sequence_accuses_no_honest_writer(
    database: Database, owner: Connection, change: str
) -> None:
    await owner.execute(f"ALTER SEQUENCE audit_logs_position_seq {change}")
    await log(database, 1)
    with pytest.raises(InvalidState, match="sequence of positions"):
        await audit.seal(database)
    messages = [one.message for one in (await audit.verify(database)).findings]
    assert any("audit_logs_position_seq" in message for message in messages)


DEFAULTS = {
    "a fixed position": "ALTER TABLE audit_logs ALTER position SET DEFAULT 2",
    "positions that are never sealed": (
        "CREATE SEQUENCE far START 1000000000000;"
        "ALTER TABLE audit_logs ALTER position SET DEFAULT nextval('far')"
    ),
    "a sequence of another name": (
        "ALTER SEQUENCE audit_logs_position_seq RENAME TO kept;"
        "CREATE SEQUENCE audit_logs_position_seq OWNED BY audit_logs.position;"
        "SELECT setval('audit_logs_position_seq', 9)"
    ),
    "a sequence of another schema": (
        "CREATE SCHEMA evil; CREATE SEQUENCE evil.audit_logs_position_seq START 1000000;"
        "ALTER TABLE audit_logs ALTER position"
        " SET DEFAULT nextval('evil.audit_logs_position_seq')"
    ),
}


@pytest.mark.parametrize("change", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.slow
async def test_positions_of_another_source_are_noticed(
    database: Database, owner: Connection, change: str
) -> None:
    """Events at these positions would never be sealed, and could be changed for ever."""
    await owner.execute(change)
    await log(database, 1)
    expected = "column position of audit_logs has the default"
    with pytest.raises(InvalidState, match=f"sequence of positions was changed: {expected}"):
        await audit.seal(database)
    messages = [one.message for one in (await audit.verify(database)).findings]
    assert any(message.startswith(expected) for message in messages)
    (difference,) = [line for line in await drift(database.engine) if line.startswith(expected)]
    await owner.execute(difference.rpartition(": ")[2])
    await audit.seal(database)
    assert not any(line.startswith("column") for line in await drift(database.engine))


# Forks


@pytest.mark.slow
async def test_a_fork_of_the_trail_is_found_by_the_other_folder(
    settings: Settings, owner: Connection, tmp_path: Path
) -> None:
    """Two sealers with a folder each, to which the attacker shows two pasts."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    changed = [settings.model_copy(update={"audit_checkpoints": folder}) for folder in folders]
    async with Database(changed[0]) as first, Database(changed[1]) as second:
        await log(first, 3)
        await audit.seal(first)
        assert (await audit.seal(second)).verified == 1
        await log(first, 3)
        await audit.seal(first)
        await owner.execute("DELETE FROM audit_seals WHERE number = 2")
        await owner.execute("UPDATE audit_logs SET user_id = 'eve' WHERE position = 4")
        await audit.seal(second)  # has not seen the first seal 2
        assert len(await fetch_seals(owner, 0, 9)) == 2
        await log(first, 1)
        with pytest.raises(InvalidState, match="seal 2 is not the seal that was verified"):
            await audit.seal(first)
        found = (await audit.verify(first)).findings
        assert {one.kind for one in found} >= {FindingKind.CHECKPOINT}
        # A folder that both share does not fork.
        async with Database(changed[0]) as third:
            with pytest.raises(InvalidState):
                await audit.seal(third)

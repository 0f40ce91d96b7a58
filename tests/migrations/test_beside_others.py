"""Objects of others in the schema of tiger_db are no difference, and are never dropped."""

import sys

import asyncpg
import pytest

from tests.support.checkouts import ROOT, Checkout
from tests.support.sql import sql
from tiger_db import APIKeyScope, Settings, crud
from tiger_db.connections import maintenance_engine
from tiger_db.database import Database
from tiger_db.errors import MissingReference
from tiger_db.migrations import drift, scripts

HEAD = scripts().get_current_head()
# Statements of an application, in the schema of tiger_db. PostGIS has a table spatial_ref_sys.
OTHERS = {
    "a table": "CREATE TABLE users (name text PRIMARY KEY, note text)",
    "a table with the name of a dropped table": "CREATE TABLE api_key_batches ()",
    "a partitioned table": "CREATE TABLE audit_logs_archive (n int) PARTITION BY RANGE (n);"
    " CREATE TABLE audit_logs_archive_1 PARTITION OF audit_logs_archive DEFAULT",
    "a table with the trigger of tiger_db": "CREATE TABLE stamped (updated_at timestamptz);"
    " CREATE TRIGGER set_updated_at BEFORE UPDATE ON stamped"
    " FOR EACH ROW EXECUTE FUNCTION set_updated_at()",
    "an enum": "CREATE TYPE mood AS ENUM ('good', 'bad')",
    "a domain, a view and a sequence": "CREATE DOMAIN audit_text AS text; CREATE SEQUENCE ids;"
    " CREATE VIEW accounts AS SELECT id, account_name FROM tiger_accounts",
    "a function": "CREATE FUNCTION api_key_owner(text) RETURNS text LANGUAGE sql RETURN $1",
    "a reference to a table of tiger_db":
    "CREATE TABLE notes (account uuid REFERENCES tiger_accounts, api_key uuid REFERENCES api_keys)",
    "an index on a table of tiger_db": "CREATE INDEX notes_by_name ON api_keys (created_by)",
    "a reference from a table of tiger_db": "CREATE TABLE people (name text PRIMARY KEY);"
    " ALTER TABLE api_keys ADD FOREIGN KEY (created_by) REFERENCES people",
    "a reference to another schema": "CREATE SCHEMA app; CREATE TABLE app.api_keys (n text UNIQUE);"
    " ALTER TABLE api_keys ADD FOREIGN KEY (created_by) REFERENCES app.api_keys (n)",
    "a version table": "CREATE TABLE alembic_version (version_num text);"
    " INSERT INTO alembic_version VALUES ('0005')",
}  # fmt: skip


@pytest.mark.slow
async def test_objects_of_others_are_no_difference(clone_settings: Settings) -> None:
    await sql(clone_settings, *OTHERS.values(), "SELECT 1")
    async with maintenance_engine(clone_settings) as engine:
        assert await drift(engine) == []


@pytest.mark.slow
async def test_tables_types_and_functions_of_extensions_are_no_difference(
    clone_settings: Settings,
) -> None:
    """Each extension of the server is installed into the schema of tiger_db."""
    names = await sql(
        clone_settings, "SELECT array_agg(name::text ORDER BY name) FROM pg_available_extensions"
    )
    assert isinstance(names, list)
    installed = 0
    for name in names:
        try:
            await sql(
                clone_settings, f'CREATE EXTENSION IF NOT EXISTS "{name}" CASCADE', "SELECT 1"
            )
            installed += 1
        except asyncpg.PostgresError:  # it needs a program or a setting that the server lacks
            continue
    async with maintenance_engine(clone_settings) as engine:
        assert await drift(engine) == []


MADE = '''"""Creates a table, an enum and an index, as a migration for a model that was removed."""

from alembic import op

revision = "made"
down_revision = "%s"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE TYPE mood AS ENUM ('good')")
    op.execute("CREATE TABLE moods (mood mood)")
    op.execute("CREATE INDEX api_keys_by_creator ON api_keys (created_by)")


def downgrade() -> None:
    pass
'''


@pytest.mark.slow
async def test_a_generated_migration_has_the_objects_of_tiger_db_only(checkout: Checkout) -> None:
    await sql(checkout.settings, *OTHERS.values(), "DROP TYPE mood")
    versions = checkout.folder / "alembic" / "versions"
    (versions / "made.py").write_text(MADE % HEAD)
    await checkout.alembic("upgrade", "head")
    await checkout.alembic("revision", "--autogenerate", "-m", "removed")
    (written,) = versions.glob("*_removed.py")
    upgrade = written.read_text().partition("def upgrade")[2].partition("def downgrade")[0]
    lines = [line.strip() for line in upgrade.splitlines() if "op." in line]
    assert lines == [
        'op.drop_table("moods")',
        'op.drop_index(op.f("api_keys_by_creator"), table_name="api_keys")',
        'op.execute("DROP TYPE mood")',
    ]
    await checkout.alembic("upgrade", "head")
    assert "No new upgrade" in await checkout.alembic("check")


# Alembic in the process of an application

COMPARATORS = """
import asyncio
from alembic.autogenerate import comparators
from alembic.operations.ops import MigrateOperation
from alembic.runtime.plugins import Plugin
from alembic.util.langhelpers import PriorityDispatcher, PriorityDispatchResult
import tiger_db
from tiger_db import Settings, migrations
from tiger_db.connections import maintenance_engine

class Theirs(MigrateOperation):
    def to_diff_tuple(self):
        return ("their_operation",)
    def reverse(self):
        return self

def registered():
    found = comparators.branch()
    Plugin.populate_autogenerate_priority_dispatch(found, ["alembic.autogenerate.*"])
    return [f.__module__ for entries in found._registry.values() for f, _ in entries]

async def main():
    async with maintenance_engine(Settings()) as engine:
        await migrations.upgrade(engine)
        assert await migrations.drift(engine) == []
        assert registered() == before, registered()

        @comparators.dispatch_for("schema")
        def compare(context, ops, schemas):
            ops.ops.append(Theirs())
            return PriorityDispatchResult.CONTINUE

        assert await migrations.drift(engine) == []

before = registered()
assert all(name.startswith("alembic.autogenerate.") for name in before), before
asyncio.run(main())
"""


@pytest.mark.slow
async def test_comparisons_of_tiger_db_and_of_the_application_stay_apart(
    clone_settings: Settings,
) -> None:
    """Importing tiger_db, migrating and comparing register nothing for other uses of Alembic."""
    done = await Checkout(ROOT, clone_settings).run(sys.executable, "-c", COMPARATORS)
    assert (done.returncode, done.stderr) == (0, "")


async def test_a_foreign_key_that_the_application_adds_is_enforced_with_a_typed_error(
    clone: Database,
) -> None:
    await sql(clone.settings, OTHERS["a reference from a table of tiger_db"], "SELECT 1")
    async with clone.session() as session:
        with pytest.raises(MissingReference, match="created_by"):
            await crud.api_keys.create_api_key(
                session, name="a", scopes=[APIKeyScope.MCP_READ], created_by="nobody"
            )

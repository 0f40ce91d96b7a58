"""The `alembic` command, in this checkout and in a copy with changed models."""

import re
import shutil
import sys
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
import pytest_asyncio

from tests.support.checkouts import MODELS, ROOT, Checkout, copied
from tests.support.servers import create_database
from tiger_db import Settings
from tiger_db.connections import connect, maintenance_engine
from tiger_db.migrations import drift, scripts, upgrade
from tiger_db.testing import databases

HEAD = scripts().get_current_head()
NICKNAME = "nickname: Text | None = Field(default=None, max_length=7)"
# A file of models, a text in it, and the replacement.
CHANGES = [
    ("accounts.py", '    PAPER = "paper"', '    PAPER = "paper"\n    MARGIN = "margin"'),
    ("accounts.py", "    account_name: Text", f"    {NICKNAME}\n    account_name: Text"),
    (
        "accounts.py",
        "error_count: Int64 = Field(",
        "error_count: Int64 = Field(\n        sa_type=__import__('sqlalchemy').Integer,",
    ),
    ("api_keys.py", '500, description="Reason', '501, description="Reason'),
    ("api_keys.py", "args__ = (", "args__ = (\n        Index('ix_api_keys_name', 'name'),"),
    ("api_keys.py", '"User or service that created the key"', '"Who made it"'),
    (
        "token_status.py",
        "retry_count: Int64 = Field(",
        "retry_count: Int64 = Field(\n        le=99,",
    ),
    ("__init__.py", "\n# The names", "from tiger_db.models.webhooks import Webhook\n\n# The names"),
]
# The output of `alembic check` for these changes, as regular expressions.
FOUND = {
    "an added column": r"'add_column', None, 'tiger_accounts', Column\('nickname'",
    "its rule": r"'add_constraint', CheckConstraint\(.*'ck_tiger_accounts_nickname_max_7'",
    "a new rule": r"'add_constraint', CheckConstraint\(.*'ck_token_statuses_retry_count_le_99'",
    "a new limit": r"'add_constraint', .*'ck_api_keys_revocation_reason_max_501'",
    "the old limit": r"'remove_constraint', .*'ck_api_keys_revocation_reason_max_500'",
    "a changed type": r"'modify_type', None, 'tiger_accounts', 'error_count'",
    "an added index": r"'add_index', Index\('ix_api_keys_name'",
    "an added enum member": r"'add_enum_value', .*'margin'",
    "a changed comment": r"'modify_comment', None, 'api_keys', 'created_by'.*'Who made it'",
    "a new model": r"'add_table', Table\('webhooks'",
    "its enum": r"'create_enum', 'webhook_kind'",
    "its index": r"'add_index', Index\('ix_webhooks_tiger_account_id'",
    "its trigger": r"'add_trigger', 'set_updated_at on webhooks'",
}
WEBHOOKS = '''
from enum import StrEnum
from uuid import UUID

from sqlmodel import Field

from tiger_db.encryption import Secret
from tiger_db.models.base import MutableEntity
from tiger_db.models.columns import JsonObject, Text


class WebhookKind(StrEnum):
    ORDER = "order:new"
    TOKEN = "token"


class Webhook(MutableEntity, table=True):
    """The receiver of notifications."""

    __tablename__ = "webhooks"

    url: Text = Field(min_length=8, max_length=500, unique=True)
    kind: WebhookKind = Field(description="Its kind")
    kinds: list[WebhookKind] = Field()
    secret: Secret = Field(description="To sign with")
    tags: JsonObject = Field(default_factory=dict)
    tiger_account_id: UUID = Field(foreign_key="tiger_accounts.id", ondelete="RESTRICT", index=True)
'''


CYCLE = """
import sys
from alembic.config import main
for command in sys.argv[1:]:
    main(command.split())
"""


# In this checkout


@pytest.mark.slow
async def test_the_plain_command_works_with_the_same_settings(empty_database: Settings) -> None:
    here = Checkout(ROOT, empty_database)
    await here.alembic("upgrade", "head")
    done = await here.run(sys.executable, "-c", CYCLE, "current", "check")
    assert done.stdout.splitlines() == [f"{HEAD} (head)", "No new upgrade operations detected."]
    async with maintenance_engine(empty_database) as engine:
        assert (await upgrade(engine)).problem is None
        assert await drift(engine) == []


@pytest.mark.slow
async def test_offline_sql_creates_the_schema(server_url: str, empty_database: Settings) -> None:
    sql = await Checkout(ROOT, empty_database).alembic("upgrade", "head", "--sql")
    connection = await connect(empty_database)
    await connection.execute(sql)
    await connection.close()
    async with maintenance_engine(empty_database) as engine:
        assert await drift(engine) == []


@pytest.mark.slow
async def test_the_error_of_an_unreachable_server_has_no_credential(
    empty_database: Settings,
) -> None:
    url = "postgresql://tiger_db:s3cret@127.0.0.1:1/tiger_db"
    settings = Settings(database_url=url, encryption_keys=empty_database.encryption_keys)
    done = await Checkout(ROOT, settings).run(sys.executable, "-m", "alembic", "current")
    assert done.returncode == 1
    assert "DatabaseUnavailable: cannot connect to 127.0.0.1:1/tiger_db" in done.stderr
    assert "s3cret" not in done.stderr + done.stdout


# In a copy whose models have changed


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def changed(
    server_url: str, template: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Checkout]:
    """A copy with all changes, with a migrated database."""
    name = f"tiger_db_changed_{uuid4().hex[:12]}"
    settings = await create_database(server_url, name, template)
    checkout = copied(tmp_path_factory.mktemp("changed"), settings)
    (checkout.folder / MODELS / "webhooks.py").write_text(WEBHOOKS)
    for change in CHANGES:
        checkout.change(*change)
    yield checkout
    await databases.drop(server_url, name)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def checked(changed: Checkout) -> str:
    """The output of `alembic check` in the changed copy."""
    done = await changed.run(sys.executable, "-m", "alembic", "check")
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize("change", FOUND)
@pytest.mark.slow
def test_check_finds(checked: str, change: str) -> None:
    assert re.search(FOUND[change], checked), checked


@pytest.mark.slow
async def test_a_generated_migration_runs_as_it_is(server_url: str, changed: Checkout) -> None:
    """It runs up, down and up again; afterwards `check` finds nothing. It has no key."""
    await changed.alembic("revision", "--autogenerate", "-m", "webhooks and more")
    (written,) = (changed.folder / "alembic" / "versions").glob("*_webhooks_and_more.py")
    generated = written.read_text()
    assert 'sa.Column("secret", sa.LargeBinary()' in generated
    assert changed.settings.encryption_keys
    key_id, key, _ = changed.settings.encryption_keys.get_secret_value().split(":")
    assert key not in generated
    assert f'"{key_id}"' not in generated
    assert "postgresql://" not in generated
    assert "tiger_db" not in generated.replace("tiger_db_changed", "")

    behind = await changed.run(sys.executable, "-c", USE)
    assert f"SchemaMismatch: the schema (revision {HEAD}) is older" in behind.stderr
    assert "run `tiger-db migrate`" in behind.stderr
    cycle = ["upgrade head", f"downgrade {HEAD}", "upgrade head", "check"]
    done = await changed.run(sys.executable, "-c", CYCLE, *cycle)
    assert (done.returncode, done.stdout) == (0, "No new upgrade operations detected.\n")
    ahead = await Checkout(ROOT, changed.settings).run(sys.executable, "-c", USE)
    assert f"is newer than this tiger_db (revision {HEAD}): upgrade tiger_db" in ahead.stderr


USE = """
import asyncio
from tiger_db import get_session

async def main():
    async with get_session():
        pass

asyncio.run(main())
"""
BROKEN = '''"""Fails in its second statement."""

from alembic import op

revision = "later"
down_revision = "next"


def upgrade():
    op.execute("CREATE TABLE half_done ()")
    op.execute("SELECT 1 / 0")


def downgrade():
    pass
'''


@pytest.mark.slow
async def test_a_failed_migration_leaves_nothing_half_done(checkout: Checkout) -> None:
    versions = checkout.folder / "alembic" / "versions"
    (versions / "later.py").write_text(BROKEN)
    good = BROKEN.replace("half_done", "done").replace('op.execute("SELECT 1 / 0")', "pass")
    good = good.replace('"next"', f'"{HEAD}"').replace('"later"', '"next"')
    (versions / "next.py").write_text(good)
    done = await checkout.run(sys.executable, "-m", "alembic", "upgrade", "head")
    assert "division by zero" in done.stderr
    connection = await connect(checkout.settings)
    assert await connection.fetchval("SELECT version_num FROM tiger_db_alembic_version") == "next"
    assert await connection.fetchval("SELECT to_regclass('done')::text") == "done"
    assert await connection.fetchval("SELECT to_regclass('half_done')::text") is None
    await connection.close()


@pytest.mark.slow
async def test_an_installed_package_writes_no_migration(
    clone_settings: Settings, checkout: Checkout
) -> None:
    shutil.move(checkout.folder / "alembic", checkout.folder / "tiger_db" / "alembic")
    script = (
        "import asyncio\n"
        "from tiger_db import Database, migrations\n"
        "async def main():\n"
        "    async with Database() as database:\n"
        "        await database.check()\n"
        "        await migrations.revision(database.engine, 'lost')\n"
        "asyncio.run(main())\n"
    )
    done = await checkout.run(sys.executable, "-c", script)
    assert "MigrationError: an installed package cannot write migrations" in done.stderr

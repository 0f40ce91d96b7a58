"""The half of docs/adding-an-entity.md for applications, followed to the letter.

The types of its code are tested in tests/types/test_user_project.py.
"""

import asyncio
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.pages import IN_AN_APPLICATION, NAMED_BLOCK, ROOT
from tests.support.forks import run_line
from tests.support.sql import sql
from tiger_db.settings import Settings

BLOCKS = NAMED_BLOCK.findall(IN_AN_APPLICATION)
FILES = {file: text for file, _, text in BLOCKS if file}
COMMANDS = [text.splitlines() for _, language, text in BLOCKS if language == "sh"]
(USE,) = [text for file, language, text in BLOCKS if language == "python" and not file]
# What the page says about an application in a schema of its own.
SECTION = IN_AN_APPLICATION.partition("### In another schema")[2].partition("###")[0]
PARAMETERS = re.findall(r"^- `(.*)`$", SECTION, re.MULTILINE)
(SET_SCHEMA,) = re.findall(r"`(__table_args__ = [^`]+)`", SECTION)
(TRIGGER,) = re.findall(r"`(op\.execute\(\"CREATE TRIGGER[^`]*)`", IN_AN_APPLICATION)
# Tables of the application with the names of tables of tiger_db, in another schema.
SAME_NAMES = """

class APIKey(SQLModel, table=True):
    __tablename__ = "api_keys"

    id: int | None = Field(default=None, primary_key=True)


class AuditLog(SQLModel, table=True):
    __tablename__ = "audit_logs"

    id: int | None = Field(default=None, primary_key=True)
    account_id: UUID = Field(sa_column_args=[ForeignKey(col(TigerAccount.id))])
"""
OBJECTS = """
SELECT array_agg(relname::text ORDER BY relname) FROM pg_class
WHERE relnamespace = to_regnamespace('{}') AND relkind = 'r' AND relname !~ '^audit_logs_'
"""


@dataclass(frozen=True)
class Application:
    """A folder with an application, and the settings of its database."""

    folder: Path
    settings: Settings

    def run(self, command: str) -> str:
        """Run a command that must succeed, and return its output."""
        url, keys = self.settings.database_url, self.settings.encryption_keys
        assert url is not None
        assert keys is not None
        environ = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}",
            "DATABASE_URL": url.get_secret_value(),
            "DB_SCHEMA": self.settings.db_schema,
            "ENCRYPTION_KEYS": keys.get_secret_value(),
        }
        done = run_line(command, env=environ, cwd=self.folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def write(self, file: str, text: str) -> None:
        path = self.folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def make(self, files: dict[str, str]) -> None:
        """Make the application, up to its first migration."""
        before, _ = COMMANDS
        for command in before:
            self.run(command)
        for file, text in files.items():
            self.write(file, text)
        self.write("use.py", USE)

    def migrate(self) -> str:
        """Run the commands that make the migration, and return the migration."""
        _, after = COMMANDS
        for command in after:
            self.run(command)
        (migration,) = (self.folder / "migrations" / "versions").glob("*_notes.py")
        return migration.read_text()

    def use(self) -> None:
        expected = ["Call the broker Main", "['Call the broker']", "['AAPL']"]
        assert self.run(f"'{sys.executable}' -W error use.py").splitlines() == expected


def created(migration: str) -> list[str]:
    upgrade = migration.partition("def upgrade")[2].partition("def downgrade")[0]
    calls = re.findall(r"op\.(\w+)\(\s*(?:op\.f\()?'(\w+)'", upgrade)
    return sorted(" ".join(call) for call in calls if call[0] != "f")


CREATED = ["create_index ix_notes_account_id", "create_table notes", "create_table watchlists"]


@pytest.mark.slow
@pytest.mark.parametrize("schema", ["public", "Tiger"])
async def test_an_application_has_its_tables_in_the_schema_of_tiger_db(
    clone_settings: Settings, tmp_path: Path, schema: str
) -> None:
    settings = clone_settings.model_copy(update={"db_schema": schema})
    application = Application(tmp_path, settings)
    await asyncio.to_thread(application.make, FILES)
    migration = await asyncio.to_thread(application.migrate)
    assert created(migration) == CREATED
    assert "tiger_db" not in migration
    assert "sqlmodel" not in migration
    await asyncio.to_thread(application.use)
    found = await sql(settings, OBJECTS.format(f'"{schema}"'))
    assert isinstance(found, list)
    assert {"alembic_version", "tiger_db_alembic_version", "notes", "watchlists"} <= {*found}
    for command in ("alembic downgrade base", "tiger-db check", "alembic upgrade head"):
        await asyncio.to_thread(application.run, command)


@pytest.mark.slow
async def test_an_application_has_its_tables_in_another_schema(
    clone_settings: Settings, tmp_path: Path
) -> None:
    """Some have the names of tiger_db's tables."""
    await sql(clone_settings, "CREATE SCHEMA app", "SELECT 1")
    assert len(PARAMETERS) == 3
    parameters = "".join(f"        {parameter},\n" for parameter in PARAMETERS)
    last = "        render_item=render_item,\n"
    env = FILES["migrations/env.py"].replace(last, last + parameters)
    models = re.sub(
        '(__tablename__ = "(notes|api_keys|audit_logs)")',
        rf"\1\n    {SET_SCHEMA}",
        FILES["app/models.py"] + SAME_NAMES,
    )
    application = Application(tmp_path, clone_settings)
    await asyncio.to_thread(application.make, {"app/models.py": models, "migrations/env.py": env})
    migration = await asyncio.to_thread(application.migrate)
    same_names = ["create_table api_keys", "create_table audit_logs"]
    indexed = ["create_index ix_app_notes_account_id", *CREATED[1:]]
    assert created(migration) == sorted([*indexed, *same_names])
    await asyncio.to_thread(application.use)
    assert await sql(clone_settings, OBJECTS.format("app")) == [
        "alembic_version", "api_keys", "audit_logs", "notes",
    ]  # fmt: skip


@pytest.mark.slow
async def test_a_mutable_entity_of_an_application_has_the_trigger_that_the_page_shows(
    clone_settings: Settings, tmp_path: Path
) -> None:
    application = Application(tmp_path, clone_settings)
    models = FILES["app/models.py"].replace("Entity", "MutableEntity")
    await asyncio.to_thread(application.make, FILES | {"app/models.py": models})
    await asyncio.to_thread(application.run, "alembic revision --autogenerate -m notes")
    (path,) = (tmp_path / "migrations" / "versions").glob("*_notes.py")
    statement = " ".join(TRIGGER.split())
    text = path.read_text().replace("\n\n\ndef downgrade", f"\n    {statement}\n\n\ndef downgrade")
    path.write_text(text)
    for command in ("alembic upgrade head", "alembic check", "tiger-db check"):
        await asyncio.to_thread(application.run, command)
    await asyncio.to_thread(application.use)
    changed = await sql(
        clone_settings,
        "UPDATE watchlists SET symbols = '{TSLA}'",
        "SELECT updated_at > created_at FROM watchlists",
    )
    assert changed is True


@pytest.mark.slow
async def test_without_include_object_the_tables_of_tiger_db_would_be_dropped(
    clone_settings: Settings, tmp_path: Path
) -> None:
    """The test of an application whose own MetaData lacks them."""
    application = Application(tmp_path, clone_settings)
    env = FILES["migrations/env.py"].replace("[SQLModel.metadata, metadata]", "SQLModel.metadata")
    without = env.replace("        include_object=include_object,\n", "")
    await asyncio.to_thread(application.make, FILES | {"migrations/env.py": without})
    await asyncio.to_thread(application.run, "alembic revision --autogenerate -m without")
    (path,) = (tmp_path / "migrations" / "versions").glob("*_without.py")
    assert "drop_table('tiger_accounts')" in path.read_text()
    path.unlink()
    application.write("migrations/env.py", env)
    await asyncio.to_thread(application.run, "alembic revision --autogenerate -m with")
    (path,) = (tmp_path / "migrations" / "versions").glob("*_with.py")
    assert "drop_" not in path.read_text().partition("def downgrade")[0]

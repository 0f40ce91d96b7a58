"""The revisions of a release are read from the files of the migrations, without Alembic."""

import subprocess
import sys
from pathlib import Path

import pytest

from tiger_db.errors import MigrationError
from tiger_db.migrations import alembic_scripts, history, scripts
from tiger_db.migrations.alembic_scripts import head_revision, known_revisions


def test_the_revisions_in_the_files_are_those_of_alembic() -> None:
    """A Database reads the files, because the import of Alembic takes long."""
    found = {script.revision: script.down_revision for script in history()}
    assert {name: {before} - {None} for name, before in found.items()} == known_revisions()
    assert head_revision() == scripts().get_current_head()


@pytest.mark.parametrize(
    "text",
    [
        'revision = "b2"\ndown_revision = ("a1", "a2")\n',
        "revision: str = 'b2'\ndown_revision: tuple[str, ...] = ('a1', 'a2')\n",
    ],
)
def test_a_merge_of_migrations_follows_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "versions").mkdir()
    monkeypatch.setattr(alembic_scripts, "script_location", lambda: tmp_path)
    for name in ("a1", "a2"):
        file = tmp_path / "versions" / f"{name}.py"
        file.write_text(f'revision = "{name}"\ndown_revision = None\n')
    with pytest.raises(MigrationError, match=r"2 heads \(a1, a2\)"):
        head_revision()
    (tmp_path / "versions" / "b2.py").write_text(text)
    assert head_revision() == "b2"
    assert known_revisions()["b2"] == {"a1", "a2"}


@pytest.mark.slow
def test_importing_all_names_imports_no_slow_library_that_few_functions_need() -> None:
    slow = {
        "alembic",
        "anyio.from_thread",
        "cryptography.hazmat.primitives.serialization",
        "mako",
        "passlib",
        "rich",
    }
    code = f"from tiger_db import *; import sys; print({slow} & {{*sys.modules}})"
    program = [sys.executable, "-c", code]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

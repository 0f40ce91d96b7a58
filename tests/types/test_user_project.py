"""The code of the pages, the examples and a user's code pass mypy --strict and pyright.

The code is checked in a project outside the package, as a user has it.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.pages import IN_AN_APPLICATION, NAMED_BLOCK, ROOT, code

USER_FILES = ("user_code.py", "user_mistakes.py")
MYPY = """
[mypy]
strict = true
{plugins}

[mypy-pygal.*]
ignore_missing_imports = true
"""
PYRIGHT = {
    "enableTypeIgnoreComments": False,  # the comments `type: ignore` are for mypy
    "reportUnnecessaryTypeIgnoreComment": "error",
    "strict": list(USER_FILES),
}
# SQLModel declares `__tablename__` with a type that pyright refuses for a text. In subclasses of
# `Entity`, tiger_db declares another type.
SQLMODEL_BUG = 'Type "Literal[\'notes\']" is not assignable to declared type "declared_attr'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in USER_FILES:
        shutil.copy(Path(__file__).parent / name, tmp_path)
    shutil.copytree(
        ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, text in code("python"):
        module = name.removeprefix("docs/").replace(".md:", "_").replace("-", "_")
        (tmp_path / f"page_{module}.py").write_text(text, encoding="utf-8")
    for name, language, text in NAMED_BLOCK.findall(IN_AN_APPLICATION):
        if language == "python":
            path = tmp_path / (name or "page_adding_an_entity.py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return tmp_path


def mypy(project: Path, plugins: str) -> list[str]:
    (project / "mypy.ini").write_text(MYPY.format(plugins=plugins))
    command = [sys.executable, "-m", "mypy", "--explicit-package-bases", "--no-pretty", "."]
    return output(project, command).splitlines()[:-1]  # without the summary


def with_plugin(project: Path) -> list[str]:
    # The cache of `make lint` has the types of other packages, and halves the time of this check.
    if (ROOT / ".mypy_cache").exists():
        shutil.copytree(ROOT / ".mypy_cache", project / ".mypy_cache")
    return mypy(project, "plugins = pydantic.mypy")


def without_plugin(project: Path) -> list[str]:
    return mypy(project, "")


def pyright(project: Path) -> list[str]:
    (project / "pyrightconfig.json").write_text(json.dumps(PYRIGHT))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    report = json.loads(output(project, command))
    assert report["summary"]["filesAnalyzed"] == len([*project.rglob("*.py")])
    return [
        f"{Path(found['file']).relative_to(project)}:{found['range']['start']['line'] + 1}"
        f" {found['message']}"
        for found in report["generalDiagnostics"]
        if SQLMODEL_BUG not in found["message"]
    ]


def output(project: Path, command: list[str]) -> str:
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("check", [with_plugin, without_plugin, pyright])
def test_the_code_of_users_has_the_types_that_it_says(
    project: Path, check: Callable[[Path], list[str]]
) -> None:
    assert check(project) == []


def test_no_page_suppresses_a_type_error() -> None:
    assert not [name for name, text in code("python") if re.search("(type|pyright): ignore", text)]

"""Every code block and command of README.md and docs/ runs."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, blocks, code
from tests.support.forks import run_line, run_python
from tests.support.sql import run_sql
from tiger_db.settings import Settings
from tiger_db.signing import generate_signing_key
from tiger_db.testing import environment_of

PYTHON = code("python")
# `make demo` and `make test`: .ci/run runs them on a fresh clone.
SHELL = [(name, text) for name, text in code("sh") if text != "make demo\nmake test\n"]


@pytest.fixture
def environ(clone_settings: Settings) -> dict[str, str]:
    return (
        os.environ
        | environment_of(clone_settings)
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "AUDIT_SIGNING_KEY": generate_signing_key(),
        }
    )


def test_no_page_has_code_in_a_language_that_is_not_run() -> None:
    found = {language for page in PAGES for language, _ in blocks(page)}
    assert found == {"python", "sh", "diff", "mermaid"}
    assert {page for page in PAGES for language, _ in blocks(page) if language == "diff"} == {
        "docs/adding-an-entity.md"
    }
    assert PAGES["docs/schema.md"].count("```mermaid") == 1


def test_every_fence_opens_or_closes_a_block_that_is_found() -> None:
    for page, text in PAGES.items():
        fences = [line for line in text.splitlines() if line.lstrip().startswith(("```", "~~~"))]
        assert len(fences) == 2 * len(blocks(page)), page


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for _, text in PYTHON], ids=[name for name, _ in PYTHON])
def test_python_prints_what_its_comments_say(text: str, environ: dict[str, str]) -> None:
    result = run_python("-c", text, env=environ)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    said = re.findall(r"print\(.*\)  # (.*)", text)
    assert [line for line in result.stdout.splitlines() if line in said] == said


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for _, text in SHELL], ids=[name for name, _ in SHELL])
def test_commands_succeed(
    text: str, environ: dict[str, str], tmp_path: Path, clone_settings: Settings
) -> None:
    with roles(clone_settings, {*re.findall(r"tiger-db grant (\w+)", text)}):
        run(text, environ, tmp_path)


@contextmanager
def roles(settings: Settings, names: set[str]) -> Iterator[None]:
    """Create the roles that a page creates with psql."""
    run_sql(settings, *(f"CREATE ROLE {name} LOGIN" for name in names))
    yield
    run_sql(settings, *(f"DROP OWNED BY {name}; DROP ROLE {name}" for name in names))


def run(text: str, environ: dict[str, str], tmp_path: Path) -> None:
    for command in text.splitlines():
        # Without `-o`, make would replace the virtual environment of this test.
        line = command.replace("make ", "make -o .venv/.ready ", 1)
        folder = ROOT if command.startswith("make ") else tmp_path
        result = run_line(line, env=environ, cwd=folder)
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"

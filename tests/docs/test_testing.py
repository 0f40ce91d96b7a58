"""The code of docs/testing.md: a user's project whose tests pass."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, first_column
from tests.support.user_project import OPTIONS, TESTS, write_project
from tests.support.worker_processes import ROOT
from tiger_db import testing
from tiger_db.testing import factories, plugin
from tiger_db.testing.servers import GIVEN

PAGE = "docs/testing.md"


@pytest.mark.slow
def test_the_tests_of_the_page_pass(tmp_path: Path, server_url: str) -> None:
    write_project(tmp_path)
    mine = {name for name in os.environ if name.startswith("PYTEST_")}
    environ = {name: value for name, value in os.environ.items() if name not in mine}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS],
        cwd=tmp_path, env=environ | {GIVEN: server_url, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{TESTS} passed" in done.stdout


def test_the_page_has_every_fixture_and_every_public_name() -> None:
    source = Path(plugin.__file__).read_text(encoding="utf-8")
    fixtures = set(re.findall(r"^def (tiger_\w+)\(", source, re.MULTILINE)) - {"tiger_server_url"}
    assert {span for span in first_column(PAGE) if span.startswith("tiger_")} == fixtures
    for name in testing.__all__:
        assert re.search(rf"\b{name}\b", PAGES[PAGE]), name
    made = {name for name, found in vars(factories).items() if getattr(
        found, "__module__", "") == factories.__name__}  # fmt: skip
    for name in made:
        assert f"`{name}`" in PAGES[PAGE], name

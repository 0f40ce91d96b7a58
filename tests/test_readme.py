"""Every code block and command of the README runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiger_db.settings import Settings
from tiger_db.signing import generate_signing_key

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "sh"]
ON_A_FRESH_CLONE = ["make demo", "make test"]


@pytest.fixture
def environ(clone_settings: Settings) -> dict[str, str]:
    assert clone_settings.database_url is not None
    assert clone_settings.encryption_keys is not None
    assert clone_settings.api_key_peppers is not None
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DATABASE_URL": clone_settings.database_url.get_secret_value(),
        "ENCRYPTION_KEYS": clone_settings.encryption_keys.get_secret_value(),
        "API_KEY_PEPPERS": clone_settings.api_key_peppers.get_secret_value(),
        "AUDIT_SIGNING_KEY": generate_signing_key(),
    }


def test_the_first_thing_it_shows_are_the_two_commands_that_ci_runs_on_a_fresh_clone() -> None:
    assert README.split("\n\n")[1] == "```sh\nmake demo\nmake test\n```"
    run = [line.strip() for line in (REPOSITORY / ".ci/run").read_text().splitlines()]
    assert set(ON_A_FRESH_CLONE) <= set(run)


def test_it_has_no_code_in_a_language_that_is_not_run() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh"}


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON)
def test_python_prints_what_its_comments_say(code: str, environ: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    said = re.findall(r"print\(.*\)  # (.*)", code)
    assert [line for line in result.stdout.splitlines() if line in said] == said


@pytest.mark.slow
@pytest.mark.schema_changes  # one installs tiger_db in another schema
@pytest.mark.parametrize("code", SHELL[1:])
def test_commands_succeed(code: str, environ: dict[str, str], tmp_path: Path) -> None:
    for command in code.splitlines():
        result = subprocess.run(
            command,
            shell=True,
            env=environ,
            cwd=REPOSITORY if command.startswith("make ") else tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) - {"are"} <= targets

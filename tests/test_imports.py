"""Imports point downwards only."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tiger_db

PACKAGE = Path(tiger_db.__file__).parent
# What the parts at the bottom may import; design.md: cli -> database, migrations, crud -> models ->
# encryption, errors. The parts above them have their order, too: no two import each other.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "redaction": set(),
    "tokens": set(),
    "encryption": {"errors", "redaction"},
    "models": {"encryption", "errors", "redaction", "tokens"},
    "peppers": {"encryption", "errors"},
    "signing": {"errors"},
    "sqlstates": {"errors"},
    "write_behind": {"models", "errors", "sqlstates"},
    "crud": {
        "models",
        "encryption",
        "errors",
        "redaction",
        "peppers",
        "sqlstates",
        "write_behind",
    },
    "statements": {"redaction"},
    "places": set(),
    "files": {"errors"},
    "settings": {"errors", "places"},
    "keys_in_force": {"embedded", "encryption", "errors", "peppers", "settings", "signing"},
    "tls": {"settings", "errors"},
    "migration_locks": {"errors"},
    "declared": {"models", "settings"},
    "migrations": {"models", "errors", "declared", "migration_locks", "settings"},
}


def modules() -> dict[str, Path]:
    """Every module of the package, by its name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(source: str) -> Iterator[str]:
    """The modules of ours that a source imports, at any depth of it, under any condition."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                imported = [alias.name for alias in names]
            case ast.ImportFrom(level=0, module=str(module), names=names):
                named = [f"{module}.{alias.name}" for alias in names]
                imported = [name if name in MODULES else module for name in named]
            case ast.ImportFrom():
                pytest.fail("a relative import")
            case _:
                continue
        yield from (name for name in imported if name.split(".")[0] == "tiger_db")


@cache
def of(module: str) -> set[str]:
    return set(imports(MODULES[module].read_text(encoding="utf-8"))) - {module}


def test_imports_are_seen_wherever_they_are() -> None:
    source = """
import os, tiger_db.database
if True:
    from tiger_db import crud, Database
def later():
    from tiger_db.models.base import Entity
"""
    seen = {"tiger_db", "tiger_db.database", "tiger_db.crud", "tiger_db.models.base"}
    assert set(imports(source)) == seen
    assert {"tiger_db.crud.audit_logs", "tiger_db.models"} <= of("tiger_db.crud.accounts.closing")


def part_of(module: str) -> str:
    return [*module.split("."), ""][1]


@cache
def parts() -> dict[str, set[str]]:
    """Which parts of the package each part imports; "" is the package itself."""
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        imported = {part_of(name) for name in of(module)} - {part_of(module)}
        graph.setdefault(part_of(module), set()).update(imported)
    # It loads what it names when asked for; only the top may ask.
    graph.pop("")
    return graph


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_at_the_bottom_imports_only_what_is_below(part: str) -> None:
    assert parts()[part] <= ALLOWED[part]


def test_no_part_imports_what_imports_it() -> None:
    TopologicalSorter(parts()).prepare()  # raises CycleError, which names the circle


def test_only_the_top_imports_the_command_line_and_the_package() -> None:
    users = {part for part, imported in parts().items() if imported & {"", "cli"}}
    assert users <= {"cli", "__main__"}


@pytest.mark.parametrize("module", [n for n in MODULES if n.startswith("tiger_db.crud.")])
def test_a_crud_module_imports_another_only_to_write_an_event(module: str) -> None:
    entity = ".".join(module.split(".")[:3])
    inside = {
        name
        for name in of(module)
        if name.startswith("tiger_db.crud") and name != entity and entity + "." not in name
    }
    shared = {"tiger_db.crud.common"}
    if module == "tiger_db.crud.common":
        assert inside == set()
    elif module == "tiger_db.crud.audit_logs":
        assert inside <= shared
    else:
        assert inside <= shared | {"tiger_db.crud.audit_logs"}


def test_the_folder_of_migrations_hides_no_library() -> None:
    folder = PACKAGE.parent / "alembic"
    assert (folder / "env.py").exists()
    assert not [*folder.rglob("__init__.py")]

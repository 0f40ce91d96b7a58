"""Imports point downwards only."""

from graphlib import TopologicalSorter

import pytest

from tests.support.imports import MODULES, PACKAGE, imports, of, parts

# What the parts at the bottom may import; design.md: cli -> database, migrations, crud -> models ->
# encryption, errors. The parts above them have their order, too: no two import each other.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "redaction": set(),
    "encryption": {"errors", "redaction"},
    "models": {"encryption", "errors", "redaction"},
    "peppers": {"encryption", "errors"},
    "signing": {"errors"},
    "sqlstates": {"errors"},
    "out_of_band": {"models", "errors", "sqlstates"},
    "crud": {
        "models",
        "encryption",
        "errors",
        "redaction",
        "peppers",
        "sqlstates",
        "out_of_band",
    },
    "database_urls": set(),
    "files": {"errors"},
    "settings": {"errors", "database_urls"},
    "keys_in_force": {"embedded", "encryption", "errors", "peppers", "settings", "signing"},
    "migrations": {"models", "errors", "settings"},
}


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
    shared = {"tiger_db.crud.common", "tiger_db.crud.pagination"}
    if module == "tiger_db.crud.common":
        assert inside == set()
    elif module == "tiger_db.crud.pagination":
        assert inside == {"tiger_db.crud.common"}
    elif module == "tiger_db.crud.audit_logs":
        assert inside <= shared
    else:
        assert inside <= shared | {"tiger_db.crud.audit_logs"}


def test_the_folder_of_migrations_hides_no_library() -> None:
    folder = PACKAGE.parent / "alembic"
    assert (folder / "env.py").exists()
    assert not [*folder.rglob("__init__.py")]

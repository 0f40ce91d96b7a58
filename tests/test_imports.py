"""Imports point downwards only."""

import re
from graphlib import TopologicalSorter
from itertools import chain

import pytest

from tests.support.imports import MODULES, PACKAGE, imports, of, parts

# The parts of the package, from the top to the bottom. A part imports only parts of lower layers.
LAYERS = [
    ["__main__"],
    ["cli", "testing"],
    ["health"],
    ["doctor", "integrations"],
    ["checks"],
    [
        "audit",
        "encryption_key_rotation",
        "key_verifier",
        "refresh_waiting",
        "refresh_worker",
        "tiger",
    ],
    ["refresh_outcomes"],
    ["database"],
    ["connections", "migrations"],
    ["keys_in_force"],
    ["embedded"],
    ["settings"],
    ["crud"],
    ["out_of_band"],
    ["denial_counter"],
    ["actor"],
    ["models", "peppers"],
    ["public"],
    ["files", "setting_values", "signing", "sqlstates"],
    ["blocking", "encryption"],
    ["database_urls", "decoding", "errors", "redaction"],
    ["driver_sql", "tracebacks", "url_parameters"],
]
# These entities refer to each other in the types of their relationships.
ENTITIES = {f"tiger_db.models.{name}" for name in ("accounts", "api_keys", "token_status")}


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
    assert {"tiger_db.crud.audit_logs.recording", "tiger_db.models"} <= of(
        "tiger_db.crud.accounts.closing"
    )


@pytest.mark.slow
def test_each_part_is_in_one_layer() -> None:
    assert sorted(chain(*LAYERS)) == sorted(parts())


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_a_part_imports_only_lower_layers(layer: int) -> None:
    lower = {*chain(*LAYERS[layer + 1 :])}
    for part in LAYERS[layer]:
        assert parts()[part] - {""} <= lower, part


@pytest.mark.parametrize("module", MODULES)
def test_no_file_imports_private_modules_of_sqlmodel(module: str) -> None:
    """Private modules of SQLModel change in any release."""
    assert not re.search(r"\bsqlmodel\._", MODULES[module].read_text())


def test_only_the_command_line_imports_names_of_the_package() -> None:
    assert {part for part, imported in parts().items() if "" in imported} == {"cli"}


def test_no_files_import_each_other_but_the_entities() -> None:
    graph = {name: of(name) - {"tiger_db"} for name in MODULES if name != "tiger_db"}
    for name in ENTITIES:
        graph[name] -= ENTITIES
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


@pytest.mark.parametrize("module", [n for n in MODULES if n.startswith("tiger_db.crud.")])
def test_a_crud_module_imports_another_only_to_write_an_event(module: str) -> None:
    entity = ".".join(module.split(".")[:3])
    inside = {
        name
        for name in of(module)
        if name.startswith("tiger_db.crud") and name != entity and entity + "." not in name
    }
    shared = {
        f"tiger_db.crud.{name}"
        for name in ("api_key_codes", "common", "filters", "grouping", "pagination")
    }
    if module in {"tiger_db.crud.common", "tiger_db.crud.filters"}:
        assert inside == set()
    elif module in {"tiger_db.crud.pagination", "tiger_db.crud.grouping"}:
        assert inside < shared
    elif entity == "tiger_db.crud.audit_logs":
        assert inside <= shared
    else:
        recording = "tiger_db.crud.audit_logs.recording"
        assert inside <= shared | {recording, "tiger_db.crud.change_events"}


def test_the_folder_of_migrations_hides_no_library() -> None:
    folder = PACKAGE.parent / "alembic"
    assert (folder / "env.py").exists()
    assert not [*folder.rglob("__init__.py")]

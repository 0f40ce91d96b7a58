"""What the modules of the package import."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import tiger_db

PACKAGE = Path(tiger_db.__file__).parent


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

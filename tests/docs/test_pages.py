"""What README.md and docs/ name exists, and what must be named is."""

import ast
import inspect
import re
import tomllib
from typing import get_args, get_type_hints

import pytest
import typer

from tests.docs.pages import (
    ERRORS,
    PAGES,
    README,
    ROOT,
    code,
    first_column,
    prose,
    public_names,
    resolve,
    section,
    spans,
)
from tests.support.imports import parts
from tiger_db import TigerAccount, crud
from tiger_db.cli import app
from tiger_db.settings import Settings

# Modules all of whose names in `__all__` are public.
NAMESPACES = [
    "tiger_db",
    "tiger_db.audit",
    "tiger_db.testing",
    "tiger_db.tiger",
    "tiger_db.integrations.fastapi",
    "tiger_db.integrations.mcp",
] + [f"tiger_db.crud.{name}" for name in crud.__all__ if name != "Page"]
COMMANDS = set(getattr(typer.main.get_command(app), "commands", {}))
PACKAGE = ROOT / "tiger_db"


def test_the_readme_names_each_place_of_public_names() -> None:
    text = section("README.md", "What is public")
    assert set(re.findall(r"`([\w.]+)\.__all__`", text)) == set(NAMESPACES)
    assert "`tiger_db.errors`" in text
    assert "`tiger-db`" in text


def test_every_public_name_exists_and_is_no_private_one() -> None:
    for name in public_names():
        assert resolve(name) is not None
        assert not any(part.startswith("_") for part in name.split(".")), name


def imported(source: str) -> set[str]:
    """Return the dotted names of tiger_db that a source imports or takes of `crud` and `errors`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), names=names):
                found |= {f"{module}.{alias.name}" for alias in names}
    for dotted in re.findall(r"\b(?:crud\.\w+|errors)\.\w+", source):
        found.add(f"tiger_db.{dotted}")
    return {name for name in found if name.split(".")[0] == "tiger_db"}


@pytest.mark.parametrize("source", [text for _, text in code("python")])
def test_code_of_the_pages_uses_public_names_only(source: str) -> None:
    assert imported(source) <= public_names()


@pytest.mark.parametrize(
    "path", [path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.py")]
)
def test_an_example_uses_public_names_only(path: str) -> None:
    assert imported((ROOT / path).read_text(encoding="utf-8")) <= public_names()


def test_the_templates_of_the_dashboard_use_public_names_only() -> None:
    for path in (ROOT / "examples/dashboard/templates").glob("*.html"):
        named = set(re.findall(r"\bdb\.(\w+)", path.read_text(encoding="utf-8")))
        assert {f"tiger_db.{name}" for name in named} <= public_names()


def test_every_call_in_the_table_of_operations_exists_and_has_the_arguments() -> None:
    text = section("docs/dashboard.md", "Operations of a dashboard and an MCP server")
    calls = re.findall(
        r"`(accounts|api_keys|audit_logs|token_status|audit|tiger)\.(\w+)(.*?)`", text
    )
    assert len(calls) > 80
    for module, name, arguments in calls:
        place = f"tiger_db.{module}" if module in {"audit", "tiger"} else f"tiger_db.crud.{module}"
        assert f"{place}.{name}" in public_names(), name
        parameters = inspect.signature(resolve(f"{place}.{name}")).parameters
        names = set(parameters)
        for parameter in parameters.values():
            if parameter.kind == parameter.VAR_KEYWORD:
                unpacked = get_args(parameter.annotation)  # empty: takes any field of an account
                fields = get_type_hints(*unpacked) if unpacked else TigerAccount.model_fields
                names |= fields.keys()
        assert set(re.findall(r"(\w+)=", arguments)) <= names, name


@pytest.mark.parametrize(
    "page", sorted(PAGES.keys() - {"docs/adding-an-entity.md", "docs/schema.md"})
)
def test_every_name_of_the_package_that_a_page_has_is_public(page: str) -> None:
    named = [re.match(r"(?:await )?((?:tiger_db|crud)\.[\w.]*\w)", span) for span in spans(page)]
    for found in filter(None, named):
        name = found[1] if found[1].startswith("tiger_db.") else f"tiger_db.{found[1]}"
        assert name.endswith("__all__") or name in {*public_names(), "tiger_db.crud",
                                                     "tiger_db.errors"}, name  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"tiger-db ([a-z][a-z-]*)", PAGES[page]))
    assert named <= COMMANDS


def test_every_command_is_in_docs() -> None:
    pages = "".join(text for page, text in PAGES.items() if page != "README.md")
    named = set(re.findall(r"(?:`|tiger-db )([a-z][a-z-]*)", pages))
    assert named >= COMMANDS


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_a_page_names_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [span for span in spans(page) if span.startswith("make ")]
    lines = [line for _, text in code("sh") for line in text.splitlines() if line[:5] == "make "]
    named = {
        word
        for command in commands + lines
        for word in re.sub(r'\w+="[^"]*"', "", command).split()[1:]
    }
    assert named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (folder / path).resolve() if path else ROOT / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
            assert anchor in slugs, target


def test_the_readme_links_every_page_of_docs() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES[README.name]))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


def test_every_extra_that_the_readme_names_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = section("README.md", "Install it into an application")
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(
        project["optional-dependencies"]
    )


def test_the_page_of_settings_has_every_variable_once() -> None:
    named = [span for span in first_column("docs/settings.md") if span.isupper()]
    assert sorted(named) == sorted(name.upper() for name in Settings.model_fields)


def test_the_page_of_errors_has_every_error_once() -> None:
    assert sorted(first_column("docs/errors.md")) == sorted(ERRORS - {"TigerDBError"})


@pytest.mark.slow
def test_the_page_of_architecture_names_what_is_in_the_files() -> None:
    page = PAGES["docs/architecture.md"]
    for path in re.findall(r"`([\w/]+(?:\.py|/))`", page):
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path
    for name, _, path in re.findall(r"`([\w.]+)`( of `\w+`)? in `([\w/]+\.py)`", page):
        source = (PACKAGE / path).read_text(encoding="utf-8")
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), f"{name} in {path}"
    package = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    for name in spans("docs/architecture.md"):
        if name.startswith("_"):
            assert re.search(rf"\b{name}\b", package), name


def test_no_layer_imports_one_above_it() -> None:
    rows = re.findall(
        r"^\| \w.*? \| (.*?) \|", section("docs/architecture.md", "Layers"), re.MULTILINE
    )
    layers = [set(re.findall(r"`(\w+)", row)) for row in rows[1:]]
    for number, layer in enumerate(layers):
        imported = set().union(*(parts()[name] for name in layer))
        assert imported.isdisjoint(set().union(*layers[:number])), layer


def test_the_package_has_every_module_in_a_layer() -> None:
    named = set(re.findall(r"`(\w+(?:\.py|/))`", section("docs/architecture.md", "Layers")))
    entries = [p for p in PACKAGE.iterdir() if not p.name.startswith("__") and p.name != "py.typed"]
    assert named - {"tiger_db/"} == {p.name + "/" * p.is_dir() for p in entries}

"""The pages of the documentation: README.md and docs/, and what is in them."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from tiger_db import errors

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
# Pages whose code blocks are tested or made elsewhere: see their own tests.
_OWN_TESTS = {"adding-an-entity.md", "archive.md", "backup.md", "schema.md", "testing.md"}
PATHS = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The halves of docs/adding-an-entity.md, and a block with the file that the line before it names.
IN_AN_APPLICATION, _, IN_THIS_PACKAGE = PAGES["docs/adding-an-entity.md"].partition(
    "\n## In this package\n"
)
NAMED_BLOCK = re.compile(r"(?:`([\w./]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")

ERRORS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.TigerDBError)
}


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the language and the text of each code block of a page, in their order."""
    return _BLOCK.findall(PAGES[page])


def code(language: str) -> list[tuple[str, str]]:
    """Return an id and the text of each code block of all pages in a language."""
    return [
        (f"{page}:{number}", text)
        for page in PAGES
        if Path(page).name not in _OWN_TESTS
        for number, (found, text) in enumerate(blocks(page), start=1)
        if found == language
    ]


def prose(page: str) -> str:
    """Return a page without its code blocks."""
    return _BLOCK.sub("", PAGES[page])


def spans(page: str) -> list[str]:
    """Return the text between single backticks, outside of code blocks."""
    return _SPAN.findall(prose(page))


def section(page: str, heading: str) -> str:
    """Return the text under a heading of the second level."""
    _, _, rest = PAGES[page].partition(f"\n## {heading}\n")
    assert rest, f"{page} has no section {heading!r}"
    return rest.partition("\n## ")[0]


def first_column(page: str) -> list[str]:
    """Return the code spans in the first column of all tables of a page."""
    rows = re.findall(r"^\| (.*?) \|", PAGES[page], re.MULTILINE)
    return [span for row in rows for span in _SPAN.findall(row)]


def resolve(name: str) -> Any:
    """Return what a dotted name stands for, also within a class."""
    parts = name.split(".")
    found: Any = import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = import_module(".".join(parts[:number]))
    return found


def public_names() -> set[str]:
    """Return the dotted names that the README calls public."""
    named = set(re.findall(r"`(tiger_db[\w.]*)`", section("README.md", "What is public")))
    spaces = {name.removesuffix(".__all__") for name in named if name.endswith(".__all__")}
    names = {f"{space}.{name}" for space in spaces for name in resolve(space).__all__}
    single = {name for name in named if not name.endswith(".__all__")} - {"tiger_db.errors"}
    return names | single | spaces | {f"tiger_db.errors.{name}" for name in ERRORS}

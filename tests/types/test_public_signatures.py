"""Each type of tiger_db in a public signature has a public name."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, TypeVar, get_origin

import pytest
from pydantic import BaseModel

from tests.docs.pages import public_names, resolve
from tests.support.imports import MODULES

PUBLIC = {name: resolve(name) for name in public_names()}
# Models of pydantic are not checked: users see the types of their fields without the validators.
CHECKED = sorted(
    name
    for name, item in PUBLIC.items()
    if (inspect.isclass(item) and not issubclass(item, BaseModel)) or inspect.isfunction(item)
    if item.__module__.startswith("tiger_db")
)


def signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.expr | None]:
    given = function.args
    for argument in (*given.args, *given.kwonlyargs, given.vararg, given.kwarg):
        yield argument.annotation if argument else None
    yield function.returns


def annotations(source: str) -> Iterator[ast.expr | None]:
    """Yield the annotations of a function, or of the public methods and fields of a class."""
    (top,) = ast.parse(textwrap.dedent(source)).body
    for node in top.body if isinstance(top, ast.ClassDef) else [top]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name == "__init__" or not node.name.startswith("_"):
                yield from signature(node)
        elif isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            yield node.annotation


def names(annotation: ast.expr) -> Iterator[str]:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            with suppress(SyntaxError):  # a text that is no annotation, such as a pattern
                yield from names(ast.parse(node.value, mode="eval").body)


def defined() -> Iterator[str]:
    """Yield the names of the types and aliases that the modules of tiger_db define."""
    for path in MODULES.values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.ClassDef(name=name):
                    yield name
                case ast.Assign(targets=[ast.Name(id=name)]):
                    yield name
                case ast.AnnAssign(target=ast.Name(id=name)):
                    yield name


OURS = set(defined())


def types_of(item: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each type of tiger_db in the signature of a function or class."""
    item = inspect.unwrap(item)
    scope = vars(sys.modules[item.__module__])
    for annotation in filter(None, annotations(inspect.getsource(item))):
        for name in names(annotation):
            value = scope.get(name)
            ours = getattr(value, "__module__", None) if inspect.isclass(value) else "tiger_db"
            # Users see `Annotated` types without the validators.
            internal = type(value) is TypeVar or get_origin(value) is Annotated
            if name in OURS and str(ours).startswith("tiger_db") and not internal:
                yield name, value


@pytest.mark.parametrize("name", CHECKED)
def test_each_type_in_a_signature_has_a_public_name(name: str) -> None:
    for type_name, value in types_of(PUBLIC[name]):
        found = [item for public, item in PUBLIC.items() if public.endswith(f".{type_name}")]
        # A name that is imported only for type checkers has no value.
        assert any(item is value or value is None for item in found), type_name


@pytest.mark.slow
def test_types_and_aliases_are_found() -> None:
    found = {name for item in CHECKED for name, _ in types_of(PUBLIC[item])}
    assert {"AsyncSession", "AccountFilters", "OneOrMore", "Progress", "Page"} <= found

"""The parameters of all public functions have the names and types that the package agreed on."""

import inspect
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import pytest

import tiger_db
from tiger_db import Page, audit, crud, tiger
from tiger_db.encryption_key_rotation import rotate
from tiger_db.public import Progress

MODULES = (
    tiger_db, crud.accounts, crud.api_keys, crud.audit_logs, crud.token_status, audit, tiger,
)  # fmt: skip
# The agreed name, or the agreed type, for each name that must not be used.
FORBIDDEN = {
    **dict.fromkeys(("address", "addr", "ip", "ip_addr", "client_ip"), "ip_address"),
    **dict.fromkeys(("error", "error_text", "msg", "text_of_error"), "message"),
    **dict.fromkeys(("expiry", "expires", "expiration", "expire_at", "valid_until"), "expires_at"),
    **dict.fromkeys(("advance", "begun", "callback", "on_progress", "report"), "progress"),
    **dict.fromkeys(("days", "hours", "minutes", "seconds", "milliseconds"), "a timedelta"),
    **dict.fromkeys(("criteria", "wanted", "where"), "filters"),
    **dict.fromkeys(("api_key", "api_key_id"), "key_id"),
    **dict.fromkeys(("actions", "results", "severities", "statuses"), "the singular"),
}
SPANS = ("grace", "lease", "older_than", "patience", "retry_after", "timeout", "wait", "within")
TIMES = ("since", "until", "unused_since")
# Functions that create rows take the names of columns.
CREATING = {"crud.api_keys.create_api_key", "crud.token_status.create_refresh_operation"}
ENTITIES = (tiger_db.TigerAccount, tiger_db.APIKey, tiger_db.AuditLog, tiger_db.TokenStatus)
COLUMNS = {column for entity in ENTITIES for column in entity.model_fields}


def functions_of(module: ModuleType) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the public functions of a module, and the public methods of its classes, by name."""
    for name in module.__all__:
        item = getattr(module, name)
        path = f"{module.__name__}.{name}".removeprefix("tiger_db.")
        if inspect.isfunction(item):
            yield path, item
        elif inspect.isclass(item) and not is_typeddict(item):
            for method, function in vars(item).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{path}.{method}", function


FUNCTIONS = {name: f for module in MODULES for name, f in functions_of(module)} | {"rotate": rotate}


def parameters_of(function: Callable[..., Any]) -> Iterator[tuple[str, Any, bool]]:
    """Yield name, type, and whether the parameter is a filter or field that `**` collects."""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            yield name, parameter.annotation, False
        elif (fields := get_args(parameter.annotation)) and is_typeddict(fields[0]):
            for field, hint in get_type_hints(fields[0]).items():
                yield field, hint, True


def parts_of(hint: Any) -> list[Any]:
    """Return a type and all types in it. The types of a function's parameters are a list."""
    inner = hint if isinstance(hint, list) else get_args(hint)
    return [hint, *(part for item in inner for part in parts_of(item))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_have_the_agreed_names_and_types(name: str) -> None:
    for parameter, hint, collected in parameters_of(FUNCTIONS[name]):
        parts = parts_of(hint)
        assert collected or parameter not in FORBIDDEN, f"use {FORBIDDEN.get(parameter)}"
        if float in parts:
            assert timedelta in parts, f"{parameter}: a time span is a timedelta"
            assert parameter in COLUMNS
        if parameter in SPANS or parameter.endswith(("_lag", "_within", "_timeout")):
            assert timedelta in parts, parameter
        if parameter in TIMES or parameter.endswith(("_at", "_since")):
            assert datetime in parts, parameter
        if parameter == "progress":
            assert hint == Progress
        if get_origin(hint) is get_origin(Progress) and get_args(hint)[1] is type(None):
            assert parameter == "progress"
        if parameter == "tiger_account_id":
            assert collected or name in CREATING, "use account_id"


def test_a_list_takes_cursors_a_limit_a_count_and_relationships() -> None:
    lists = {
        name: {parameter for parameter, _, _ in parameters_of(function)}
        for name, function in FUNCTIONS.items()
        if get_origin(inspect.signature(function).return_annotation) is Page
    }
    assert len(lists) >= 9
    for name, parameters in lists.items():
        assert {"after", "before", "limit", "count", "load"} <= parameters, name

"""The TypedDicts of changes name the columns of the models, with the types that callers give."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import reduce
from ipaddress import IPv4Network
from operator import or_
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic import AwareDatetime

from tiger_db import APIKey, AuditLog, Secret, TigerAccount
from tiger_db.crud.accounts import AccountChanges
from tiger_db.crud.accounts.changes import FIXED_FIELDS
from tiger_db.crud.api_keys import KeyChanges
from tiger_db.crud.audit_logs.recording import EventFields
from tiger_db.models.audit_logs import SERVER_COLUMNS

GIVEN_AS_TEXT = (Secret, IPv4Network)  # callers can give a text for these types


def given(annotation: Any) -> Any:
    """Return the type that callers give for a field of a model."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return given(parts[0])
    if origin in (Union, UnionType):
        return reduce(or_, map(given, parts))
    if origin is list:
        return Iterable[given(parts[0])]  # type: ignore[misc]  # the type is known at run time
    if origin is dict:
        return Mapping[parts[0], parts[1]]  # type: ignore[valid-type]  # as above
    if annotation is AwareDatetime:
        return datetime
    return str | annotation if annotation in GIVEN_AS_TEXT else annotation


def test_the_changes_of_an_account_are_its_columns() -> None:
    hints = get_type_hints(AccountChanges)
    assert hints.keys() == TigerAccount.model_fields.keys() - FIXED_FIELDS
    # The private key of an account that is not closed cannot be removed.
    assert hints.pop("private_key") == str | Secret
    assert hints == {name: given(TigerAccount.model_fields[name].annotation) for name in hints}


def test_the_changes_of_an_api_key_have_the_types_of_its_columns() -> None:
    hints = get_type_hints(KeyChanges)  # test_lifecycle.py compares the names
    assert hints == {name: given(APIKey.model_fields[name].annotation) for name in hints}


def test_the_fields_of_an_event_are_its_columns() -> None:
    assert get_type_hints(EventFields).keys() == AuditLog.model_fields.keys() - {
        "id", *SERVER_COLUMNS,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (Secret | None, str | Secret | None),
        (list[Annotated[int, "x"]], Iterable[int]),
        (dict[str, int], Mapping[str, int]),
    ],
)
def test_types_of_fields_are_converted(annotation: Any, expected: Any) -> None:
    assert given(annotation) == expected

import copy
import inspect
import json
import pickle
import re
from collections.abc import Callable

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import ValidationError

from tests.docs.pages import PAGES
from tests.support import factories
from tiger_db import APIKey, TigerAccount, errors
from tiger_db.errors import InvalidFields, InvalidValue, TigerDBError

CLASSES = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, TigerDBError)
]
SECRET = "a-secret-of-the-account"


def test_each_class_of_errors_has_a_code_of_its_own() -> None:
    assert all("code" in vars(kind) for kind in CLASSES)
    assert len({kind.code for kind in CLASSES}) == len(CLASSES)


def test_the_page_of_errors_has_the_code_of_each_class() -> None:
    documented = dict(
        re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGES["docs/errors.md"], re.MULTILINE)
    )
    assert documented == {kind.__name__: kind.code for kind in CLASSES if kind is not TigerDBError}


def assign() -> None:
    factories.new_account().account_name = 5  # type: ignore[assignment]


@pytest.mark.parametrize(
    "refused",
    [
        lambda: factories.new_account(account_name=5, private_key=SECRET),
        lambda: TigerAccount.model_validate({"account_name": 5, "private_key": SECRET}),
        lambda: TigerAccount.model_validate_json(
            json.dumps({"account_name": 5, "private_key": SECRET})
        ),
        lambda: factories.new_account().model_copy(update={"account_name": 5}),
        assign,
    ],
)
def test_a_refused_field_is_an_invalid_value_and_a_validation_error(
    refused: Callable[[], object],
) -> None:
    with pytest.raises(InvalidFields) as caught:
        refused()
    error = caught.value
    assert isinstance(error, InvalidValue)
    assert isinstance(error, ValidationError)
    assert error.code == "invalid_fields"
    assert ("account_name",) in [problem["loc"] for problem in error.errors()]
    shown = str(error) + repr(error) + str(error.errors()) + error.json() + str(error.args)
    assert SECRET not in shown
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(twin), twin.title) == (InvalidFields, error.title)
        assert twin.errors(include_url=False) == error.errors(include_url=False)
        assert SECRET not in str(twin)


def test_an_entity_inside_of_a_request_body_is_refused_by_the_names_of_its_fields() -> None:
    app = FastAPI()

    @app.post("/")
    def take(keys: list[APIKey]) -> int:
        return len(keys)

    answer = TestClient(app).post("/", json=[{"name": "", "key_hash": SECRET}])
    assert answer.status_code == 422
    assert ["body", 0, "name"] in [problem["loc"] for problem in answer.json()["detail"]]
    assert SECRET not in answer.text

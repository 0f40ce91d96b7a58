"""Every public function names an argument of a wrong type: one test over all signatures."""

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta, timezone
from enum import Enum
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession

from tests.support import factories
from tests.support.recording import recorded
from tiger_db import (
    Actor,
    APIKey,
    APIKeyScope,
    Database,
    KeyVerifier,
    RefreshTrigger,
    RefreshWorker,
    TigerAccount,
    TokenStatus,
    acting_as,
    audit,
    crud,
    get_session,
    tiger,
    wait_for_refresh,
)
from tiger_db.errors import TigerDBError

KEY = APIKey(name="x", key_prefix="x", key_hash="x", scopes=[APIKeyScope.MCP_READ])


def new_refresh() -> TokenStatus:
    return TokenStatus(tiger_account_id=uuid4(), trigger=RefreshTrigger.MANUAL)


METHODS: dict[str, Callable[[Database], Callable[..., object]]] = {
    "Database": lambda _: Database,
    "Database.session": lambda database: database.session,
    "Database.transaction": lambda database: database.transaction,
    "KeyVerifier": lambda _: KeyVerifier,
    "KeyVerifier.authorize": lambda database: KeyVerifier(database).authorize,
    "KeyVerifier.verify": lambda database: KeyVerifier(database).verify,
    "RefreshWorker": lambda _: RefreshWorker,
    "RefreshWorker.run": lambda database: RefreshWorker(database, tiger.refresh_token).run,
    "RefreshWorker.run_one": lambda database: RefreshWorker(database, tiger.refresh_token).run_one,
    "APIKey.can_access_account": lambda _: KEY.can_access_account,
    "APIKey.has_all_scopes": lambda _: KEY.has_all_scopes,
    "APIKey.has_any_scope": lambda _: KEY.has_any_scope,
    "APIKey.has_scope": lambda _: KEY.has_scope,
    "APIKey.is_ip_allowed": lambda _: KEY.is_ip_allowed,
    "APIKey.is_user_agent_allowed": lambda _: KEY.is_user_agent_allowed,
    "TigerAccount.has_market_permission": lambda _: factories.new_account().has_market_permission,
    "TokenStatus.complete_refresh": lambda _: new_refresh().complete_refresh,
    "acting_as": lambda _: acting_as,
    "wait_for_refresh": lambda _: wait_for_refresh,
    "get_session": lambda _: get_session,
}


def _of(function: Callable[..., object], _: Database) -> Callable[..., object]:
    return function


FUNCTIONS: dict[str, Callable[[Database], Callable[..., object]]] = METHODS | {
    f"{module.__name__.removeprefix('tiger_db.')}.{name}": partial(_of, getattr(module, name))
    for module in (
        crud.accounts, crud.api_keys, crud.audit_logs, crud.token_status, audit, tiger,
    )
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
}  # fmt: skip
# Every kind of values that at least one parameter refuses.
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "none": st.none(),
    "bool": st.booleans(),
    "int": st.integers(-(2**63), 2**63 - 1),
    "huge int": st.integers(min_value=2**63) | st.integers(max_value=-(2**63) - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "infinite float": st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    "text": st.text(),
    "bytes": st.binary(),
    "uuid": st.uuids(),
    "naive datetime": st.datetimes(),
    "datetime out of range": st.just(datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))),
    "datetime": st.datetimes(timezones=st.just(UTC)),
    "long duration": st.sampled_from([timedelta.max, timedelta.min, timedelta(days=36526)]),
    "texts": st.lists(st.text(), min_size=1),
    "numbers": st.lists(st.integers(), min_size=1),
    "nones": st.lists(st.none(), min_size=1),
    "mapping of numbers": st.dictionaries(st.integers(), st.integers(), min_size=1),
    "object": st.builds(object),
    "entity": st.builds(factories.new_event),
}
ACCEPTED: dict[Any, set[str]] = {
    NoneType: {"none"},
    bool: {"bool"},
    int: {"int"},
    float: {"int", "float"},
    str: {"text"},
    UUID: {"uuid"},
    datetime: {"datetime"},
}


def accepted(hint: Any) -> set[str]:
    """Return the kinds of which at least one value has the type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return set().union(*map(accepted, parts))
    if inspect.isclass(origin) and issubclass(origin, Iterable) and not issubclass(origin, Mapping):
        return {"texts"} if "text" in accepted(parts[0]) else set()
    return ACCEPTED.get(hint, set())


def parameters_of(function: Callable[..., object]) -> dict[str, Any]:
    """Return the types of the parameters that the function itself checks."""
    hints = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            hints[name] = parameter.annotation
        elif (fields := get_args(parameter.annotation)) and (
            fields[0].__name__.endswith(("Filters", "Query"))
        ):
            hints |= get_type_hints(fields[0])
    # A wrong raw key is an InvalidAPIKey.
    return {name: hint for name, hint in hints.items() if name != "raw_key"}


def right(hint: Any, session: AsyncSession, database: Database) -> Any:
    """Return a value of the type."""
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return next(iter(hint))
    values: dict[Any, Any] = {
        AsyncSession: session,
        Database: database,
        TigerAccount: factories.new_account(),
        TokenStatus: new_refresh(),
        Actor: Actor(),
        UUID: uuid4(),
        str: "text",
        datetime: datetime.now(UTC),
        timedelta: timedelta(hours=1),
        Path: Path("nowhere"),
    }
    if hint in values:
        return values[hint]
    for part in get_args(hint):
        if get_origin(part) is Literal:
            return get_args(part)[0]
    return print if get_origin(hint) is Callable else []


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
async def test_an_argument_of_a_wrong_type_is_named_before_any_sql(
    database: Database, session: AsyncSession, name: str, data: st.DataObject
) -> None:
    function = FUNCTIONS[name](database)
    hints = parameters_of(function)
    wrong = data.draw(st.sampled_from(sorted(hints)), label="parameter")
    kinds = sorted(KINDS.keys() - accepted(hints[wrong]))
    value = data.draw(st.sampled_from(kinds).flatmap(KINDS.__getitem__), label="value")
    arguments = {
        parameter.name: right(parameter.annotation, session, database)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    with recorded(database) as sent, pytest.raises(TigerDBError) as caught:
        result = function(**{**arguments, wrong: value})
        if isinstance(result, Awaitable):
            await result
    assert ("cursor" if wrong in {"after", "before"} else wrong) in str(caught.value)
    assert sent == []

"""Tracked JSON and lists: changes in place, at any depth, are saved; copies belong to no row."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy.dialects import postgresql

from tests.models.examples import made
from tests.support import factories
from tests.support.factories import plain
from tests.support.recording import recorded
from tiger_db import APIKey, APIKeyScope, Database, MarketPermission, TigerAccount, crud
from tiger_db.database import AsyncSession
from tiger_db.encryption import Secret
from tiger_db.errors import EncryptionError
from tiger_db.models import QuotePermission
from tiger_db.models.columns import (
    Int64,
    JsonObject,
    Text,
    UTCDateTime,
    sql_type,
)
from tiger_db.models.tracking import TrackedDict, TrackedList


def half_of(items: list[Any]) -> Iterator[Any]:
    yield from items
    raise ZeroDivisionError


def failing(change: Callable[..., object], *arguments: object) -> None:
    with pytest.raises((ZeroDivisionError, TypeError)):
        change(*arguments)


# Each changes {"a": 1, "b": {"c": [1]}}.
DICT_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "__setitem__": lambda d: d.__setitem__("new", {"n": [1]}),
    "__delitem__": lambda d: d.__delitem__("a"),
    "__ior__": lambda d: d.__ior__({"a": 2, "new": []}),
    "clear": lambda d: d.clear(),
    "pop": lambda d: d.pop("b"),
    "popitem": lambda d: d.popitem(),
    "setdefault": lambda d: d.setdefault("new", {}),
    "setdefault()[]": lambda d: d.setdefault("new", {}).__setitem__("n", 1),
    "setdefault() of what is there": lambda d: d.setdefault("b", {}).clear(),
    "update": lambda d: d.update({"a": 2}, new={}),
    "half an update": lambda d: failing(d.update, half_of([("new", {})])),
    "[][]": lambda d: d["b"]["c"].append({"deeper": []}),
    "a part moved": lambda d: d.__setitem__("new", d.pop("b")),
    "an iterated part": lambda d: next(part for part in d.values() if part != 1).clear(),
}
# Each changes ["c", "a", "b"].
LIST_CHANGES: dict[str, Callable[[list[Any]], object]] = {
    "__setitem__": lambda x: x.__setitem__(0, "z"),
    "[:]=": lambda x: x.__setitem__(slice(1, 3), ["x", "y", "z"]),
    "__delitem__": lambda x: x.__delitem__(0),
    "del [:]": lambda x: x.__delitem__(slice(0, 2)),
    "__iadd__": lambda x: x.__iadd__(["d"]),
    "__imul__": lambda x: x.__imul__(2),
    "append": lambda x: x.append("d"),
    "clear": lambda x: x.clear(),
    "extend": lambda x: x.extend(["d", "e"]),
    "half an extend": lambda x: failing(x.extend, half_of(["d"])),
    "insert": lambda x: x.insert(1, "d"),
    "pop": lambda x: x.pop(),
    "remove": lambda x: x.remove("a"),
    "reverse": lambda x: x.reverse(),
    "sort": lambda x: x.sort(),
}


async def reloaded(session: AsyncSession, row: TigerAccount | APIKey) -> Any:
    """Flush the row and reload its values from the database."""
    await session.flush()
    await session.refresh(row)
    return row


@pytest.mark.parametrize("change", DICT_CHANGES.values(), ids=DICT_CHANGES)
@pytest.mark.parametrize("depth", [0, 1, 3])
async def test_a_change_of_a_dict_is_saved(
    session: AsyncSession, change: Callable[[Any], object], depth: int
) -> None:
    plain: Any = {"a": 1, "b": {"c": [1]}}
    path: list[Any] = []
    for _ in range(depth):
        plain = {"list": [0, plain]}
        path += ["list", 1]
    account = await reloaded(session, await factories.account(session, tags=plain))
    for root in (plain, account.tags):
        part = root
        for step in path:
            part = part[step]
        change(part)
    assert (await reloaded(session, account)).tags == plain


@pytest.mark.parametrize("change", LIST_CHANGES.values(), ids=LIST_CHANGES)
async def test_a_change_of_a_list_is_saved(
    session: AsyncSession, change: Callable[[Any], object]
) -> None:
    plain = ["c", "a", "b"]
    account = await factories.account(session, tags={"deep": {"list": plain}})
    key, _ = await factories.api_key(session, allowed_user_agents=plain)
    for each in (plain, account.tags["deep"]["list"], key.allowed_user_agents):  # type: ignore[index, call-overload]  # it is a dict
        change(each)
    assert (await reloaded(session, key)).allowed_user_agents == plain
    assert (await reloaded(session, account)).tags == {"deep": {"list": plain}}


async def test_a_half_sorted_list_is_saved_as_it_is(session: AsyncSession) -> None:
    account = await factories.account(session, tags={"list": [3, 1, 2, None, 0]})
    failing(account.tags["list"].sort)  # type: ignore[union-attr]  # it is a list
    in_memory = copy.copy(account.tags)
    assert (await reloaded(session, account)).tags == in_memory


@pytest.mark.parametrize(("tracked", "plain"), [(TrackedDict, dict), (TrackedList, list)])
def test_every_method_that_changes_is_overridden(tracked: type, plain: type) -> None:
    readers = {
        "__class_getitem__", "__contains__", "__eq__", "__ge__", "__getattribute__", "__getitem__",
        "__gt__", "__iter__", "__le__", "__len__", "__lt__", "__ne__", "__or__", "__repr__",
        "__reversed__", "__ror__", "__sizeof__", "__add__", "__mul__", "__rmul__", "copy", "count",
        "fromkeys", "get", "index", "items", "keys", "values",
        # of a new object, or of any object
        "__init__", "__new__", "__hash__", "__doc__",
    }  # fmt: skip
    changes = set(vars(plain)) - readers
    assert changes
    assert not [name for name in changes if getattr(tracked, name) is getattr(plain, name)]


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)


json_values = st.recursive(
    st.none() | st.integers(-9, 9) | st.sampled_from(["", "a", "é\\u0000"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=6,
)
# Which container, which method, and what with.
steps = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), json_values), max_size=8)
DICT_STEPS: list[Callable[[dict[str, Any], Any], object]] = [
    lambda d, v: d.__setitem__("a", v),
    lambda d, v: d.update(b=v, c=v),
    lambda d, v: d.setdefault("c", v),
    lambda d, _: d.popitem() if d else None,
    lambda d, _: d.pop("a", None),
    lambda d, _: d.clear(),
]
LIST_STEPS: list[Callable[[list[Any], Any], object]] = [
    lambda x, v: x.append(v),
    lambda x, v: x.extend([v, v]),
    lambda x, v: x.insert(0, v),
    lambda x, v: x.__setitem__(slice(0, 1), [v]),
    lambda x, _: x.pop() if x else None,
    lambda x, _: x.reverse(),
    lambda x, _: x.sort(key=json.dumps),
    lambda x, _: x.clear(),
]


def change(root: Any, which: int, how: int, value: Any) -> None:
    parts = list(containers(root))
    part = parts[which % len(parts)]
    methods: list[Any] = DICT_STEPS if isinstance(part, dict) else LIST_STEPS
    methods[how % len(methods)](part, value)


@pytest.mark.slow
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    start=st.dictionaries(st.sampled_from("abc"), json_values),
    transactions=st.lists(steps, min_size=1, max_size=3),
)
async def test_any_changes_are_saved_as_of_a_plain_value(
    session: AsyncSession, start: dict[str, Any], transactions: list[list[tuple[int, int, Any]]]
) -> None:
    plain: Any = copy.deepcopy(start)
    account = await factories.account(session, tags=start)
    for changes in transactions:
        for which, how, value in changes:
            # As tracked values do, so that no two parts are one.
            change(plain, which, how, json.loads(json.dumps(value)))
            plain = json.loads(json.dumps(plain))
            change(account.tags, which, how, value)
            assert account.tags == plain
        assert (await reloaded(session, account)).tags == plain
        plain = json.loads(json.dumps(account.tags))  # with the keys in PostgreSQL's order


async def test_reading_writes_nothing(clone: Database) -> None:
    async with clone.session() as session:
        account = await factories.account(session, tags={"a": [{"b": 1}]})
    async with clone.session() as session:
        read = await crud.accounts.get(session, account.id)
        assert read is not None
        with recorded(clone) as statements:
            assert json.dumps(read.tags) == '{"a": [{"b": 1}]}'
            assert [*containers(read.tags)]
            read.model_dump()
            repr(read)
            await session.flush()
        assert statements == []


async def test_a_value_is_plain_until_it_is_read(session: AsyncSession) -> None:
    account = await factories.account(session, tags={"a": [1]}, market_permissions=["US"])
    await reloaded(session, account)
    assert (type(vars(account)["tags"]), type(vars(account)["market_permissions"])) == (dict, list)
    assert type(account.tags) is TrackedDict
    assert account.tags is vars(account)["tags"]
    assert type(vars(account)["market_permissions"]) is list
    assert account not in session.dirty


async def test_a_merged_row_has_its_own_value(session: AsyncSession, database: Database) -> None:
    account = await factories.account(session, tags={"a": [1]})
    await session.flush()
    session.expunge(account)
    for read in (False, True):
        if read:
            assert account.tags == {"a": [1]}
        twin = await session.merge(account, load=False)
        twin.tags["a"].append(2)  # type: ignore[union-attr]  # it is a list
        assert account.tags == {"a": [1]}
        assert twin in session.dirty
        session.expunge(twin)


async def test_a_value_that_was_replaced_changes_its_row_no_more(
    session: AsyncSession, database: Database
) -> None:
    account = await factories.account(session, tags={"a": [1]})
    old = account.tags
    await reloaded(session, account)
    assigned = account.tags
    account.tags = {"b": 2}
    await session.flush()
    session.expire(account, ["description"])
    with recorded(database) as statements:
        old["c"] = assigned["c"] = 3
        session.expire(account, ["tags"])
        old["d"] = 4
        await session.flush()
    assert statements == []
    assert (await reloaded(session, account)).tags == {"b": 2}


async def test_a_value_is_tracked_after_a_commit_and_replaced_after_a_rollback(
    clone: Database,
) -> None:
    async with clone.session() as session:
        account = await factories.account(session, tags={"a": [1]})
        tags = account.tags
        for number in (2, 3):
            tags["a"].append(number)  # type: ignore[union-attr]  # it is a list
            await session.commit()
            assert account.tags is tags
        tags["a"].append(4)  # type: ignore[union-attr]  # it is a list
        await session.rollback()
        await session.refresh(account)
        tags["a"].append(5)  # type: ignore[union-attr]  # it is a list
        assert account not in session.dirty
        account.tags["a"].append(6)  # type: ignore[union-attr]  # it is a list
    async with clone.session() as session:
        stored = await session.get(TigerAccount, account.id)
        assert stored is not None
        assert stored.tags == {"a": [1, 2, 3, 6]}


async def test_json_shows_the_fields_of_a_loaded_row_in_order(session: AsyncSession) -> None:
    account = await factories.account(session, tags={"a": 1})
    session.expunge_all()
    loaded = await session.get(TigerAccount, account.id)
    assert loaded is not None
    names = list(TigerAccount.model_fields)
    assert list(loaded.model_dump()) == list(json.loads(loaded.model_dump_json())) == names
    session.expire(loaded, ["account_name"])
    await session.refresh(loaded, ["account_name"])
    assert [name for name, _ in loaded if name in names] == names
    assert repr(loaded) == repr(account)


@pytest.mark.parametrize("take", [lambda old: old["part"], lambda old: old.pop("part")])
async def test_a_part_of_another_row_becomes_a_part_of_this_one(
    session: AsyncSession, take: Callable[[Any], Any]
) -> None:
    one = await factories.account(session, tags={"part": {"n": 1}})
    other = await factories.account(session)
    other.tags["part"] = take(one.tags)
    await session.flush()
    other.tags["part"]["n"] = 2  # type: ignore[index, call-overload]  # it is a dict
    assert (await reloaded(session, other)).tags == {"part": {"n": 2}}
    assert (await reloaded(session, one)).tags in ({}, {"part": {"n": 1}})


async def test_a_part_of_a_replaced_value_becomes_a_part_of_the_new_one(
    session: AsyncSession,
) -> None:
    account = await factories.account(session, tags={"part": {"n": 1}})
    part = account.tags["part"]
    account.tags = {}
    account.tags["part"] = part
    await session.flush()
    account.tags["part"]["n"] = 2  # type: ignore[index, call-overload]  # it is a dict
    assert (await reloaded(session, account)).tags == {"part": {"n": 2}}


BAD_CHANGES: dict[str, Callable[[TigerAccount], object]] = {
    "tags: NaN": lambda account: account.tags["a"].append(float("nan")),  # type: ignore[union-attr]
    "tags: NUL": lambda account: account.tags.update(self="\0"),
    "tags: a circle": lambda account: account.tags.update(self=account.tags),
    "market_permissions: unknown": lambda account: account.market_permissions.append("JP"),  # type: ignore[arg-type]
    "quote_permissions: missing": lambda account: account.quote_permissions[0].pop("name"),  # type: ignore[misc]
    "quote_permissions: extra": lambda account: account.quote_permissions.append({"nome": 1}),  # type: ignore[typeddict-item]
}


@pytest.mark.parametrize("change", BAD_CHANGES)
async def test_a_change_in_place_is_validated_before_it_is_saved(
    session: AsyncSession, change: str
) -> None:
    account = await factories.account(
        session, tags={"a": [1]}, quote_permissions=[{"name": "usQuoteBasic", "expire_at": -1}]
    )
    before = account.model_dump()
    async with session.begin_nested() as savepoint:
        BAD_CHANGES[change](account)
        with pytest.raises(ValidationError) as caught:
            await session.flush()
        await savepoint.rollback()
    assert {problem["loc"][0] for problem in caught.value.errors()} == {change.partition(":")[0]}
    await session.refresh(account)
    assert account.model_dump() == before


async def test_texts_in_a_list_become_enum_members(session: AsyncSession) -> None:
    key, _ = await factories.api_key(session)
    scopes = key.scopes
    scopes.append("trade:admin")  # type: ignore[arg-type]  # the test is about it
    await session.flush()
    assert scopes is key.scopes
    assert scopes == [APIKeyScope.MCP_READ, APIKeyScope.TRADE_ADMIN]
    assert key.has_scope(APIKeyScope.TRADE_READ)


async def test_a_list_changed_by_validation_is_still_tracked(
    session: AsyncSession,
) -> None:
    key, _ = await factories.api_key(session)
    networks, scopes = key.allowed_ips, key.scopes
    for number in range(3):
        networks.append(f"10.{number}.0.0/16")  # type: ignore[arg-type]  # the test is about it
        scopes.append(APIKeyScope.MCP_READ)  # which it has
        await session.flush()
        assert key.is_ip_allowed(f"10.{number}.0.1")
    await reloaded(session, key)
    assert (len(key.allowed_ips), key.scopes) == (3, [APIKeyScope.MCP_READ])


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES = [copy.copy, copy.deepcopy, through_pickle]


@pytest.mark.parametrize("copied", COPIES)
async def test_a_copy_of_json_belongs_to_no_row(
    session: AsyncSession, database: Database, copied: Callable[[Any], Any]
) -> None:
    account = await factories.account(session, tags={"a": [{"b": 1}]})
    twin = copied(account.tags)
    assert twin == account.tags
    with recorded(database) as statements:
        twin["a"][0]["b"] = 2
        twin["c"] = 3
        await session.flush()
    assert statements == []
    assert account.tags == {"a": [{"b": 1}]}


@pytest.mark.parametrize("copied", [*COPIES[:2], TigerAccount.model_copy])
async def test_a_copy_of_a_row_is_independent(
    session: AsyncSession, copied: Callable[[TigerAccount], TigerAccount]
) -> None:
    account = await factories.account(session, tags={"a": [1]}, market_permissions=["US"])
    twin = copied(account)
    assert twin.model_dump() == account.model_dump()
    twin.tags["a"].append(2)  # type: ignore[union-attr]  # it is a list
    twin.market_permissions.append(MarketPermission.HK)
    twin.sqlmodel_update({"id": made(TigerAccount).id, "account_number": "77777"})
    session.add(twin)
    await reloaded(session, account)
    assert (account.tags, account.market_permissions) == ({"a": [1]}, ["US"])
    await reloaded(session, twin)
    assert (twin.tags, twin.market_permissions) == ({"a": [1, 2]}, ["US", "HK"])
    assert plain(twin.private_key) == plain(account.private_key)


def test_a_copy_with_changes_is_validated() -> None:
    account = factories.new_account()
    assert account.model_copy(update={"account_name": "Other"}).account_name == "Other"
    with pytest.raises(ValidationError, match="account_name"):
        account.model_copy(update={"account_name": ""})


async def test_a_pickled_row_comes_back_without_the_keys(session: AsyncSession) -> None:
    account = await factories.account(session, tags={"a": [1]})
    pickled = pickle.dumps(account)
    assert b"test_key" not in pickled
    twin = pickle.loads(pickled)
    assert twin.model_dump(mode="json") == account.model_dump(mode="json")
    with pytest.raises(EncryptionError, match="'test' is not configured"):
        plain(twin.private_key)
    session.expunge(account)
    session.add(twin)  # it is the same row
    twin.tags["a"].append(2)
    assert (await reloaded(session, twin)).tags == {"a": [1, 2]}
    assert plain(twin.private_key) == "test_key"


@pytest.mark.parametrize(
    ("annotation", "sql"),
    [
        (bool, "BOOLEAN"), (int, "BIGINT"), (Int64 | None, "BIGINT"), (Text, "TEXT"),
        (Text | None, "TEXT"), (UTCDateTime | None, "TIMESTAMP WITH TIME ZONE"), (UUID, "UUID"),
        (Secret | None, "BYTEA"), (IPv4Address | IPv6Address | None, "INET"),
        (list[IPv4Network | IPv6Network], "CIDR[]"), (list[Text], "TEXT[]"), (JsonObject, "JSONB"),
        (JsonObject | None, "JSONB"), (list[QuotePermission], "JSONB"),
        (MarketPermission | None, "market_permission"),
        (list[MarketPermission], "market_permission[]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_sql_type_follows_from_the_annotation(annotation: object, sql: str) -> None:
    assert sql_type(annotation).compile(dialect=postgresql.dialect()) == sql  # type: ignore[no-untyped-call]

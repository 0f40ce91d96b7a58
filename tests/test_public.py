from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Literal
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.support import factories
from tests.support.recording import recorded
from tiger_db import (
    AccountStatus,
    APIKeyScope,
    APIKeyStatus,
    AuditAction,
    Database,
    KeyVerifier,
    crud,
)
from tiger_db.database import AsyncSession as DatabaseSession
from tiger_db.errors import (
    InvalidFields,
    InvalidState,
    InvalidValue,
    ScopeMissing,
    StatementRefused,
)
from tiger_db.public import public

ID = uuid4()
functions: Any = crud  # wrong types for mypy as well
REFUSED: dict[str, tuple[str, Callable[[Any], Awaitable[object]]]] = {
    "list with a wrong status": (
        "status",
        lambda s: functions.accounts.list_accounts(s, status=["active", "gone"]),
    ),
    "member of another enum": (
        "status",
        lambda s: functions.accounts.list_accounts(s, status=APIKeyStatus.ACTIVE),
    ),
    "unknown value": ("status", lambda s: functions.accounts.list_accounts(s, status="asleep")),
    "text as scopes": (
        "scopes",
        lambda s: functions.api_keys.authorize_api_key(s, "", scopes="mcp:read"),
    ),
    "None as a scope": (
        "scopes",
        lambda s: functions.api_keys.authorize_api_key(s, "", scopes=[None]),
    ),
    "text as scopes of a new key": (
        "scopes",
        lambda s: functions.api_keys.create_api_key(s, name="x", scopes="mcp:read"),
    ),
    "negative limit": ("limit", lambda s: functions.accounts.list_accounts(s, limit=-1)),
    "negative limit of a deletion": (
        "limit",
        lambda s: functions.token_status.prune(s, older_than=timedelta(days=1), limit=-1),
    ),
    "text as limit": ("limit", lambda s: functions.accounts.list_accounts(s, limit="5")),
    "number as id": ("account_id", lambda s: functions.accounts.get(s, 1)),
    "text as id": ("account_id", lambda s: functions.accounts.get(s, str(ID))),
    "text as the id of a filter": (
        "account_id",
        lambda s: functions.audit_logs.search(s, account_id=str(ID)),
    ),
    "bytes as user agent": (
        "user_agent",
        lambda s: functions.api_keys.verify_api_key(s, "", user_agent=b"x"),
    ),
    "number as IP address": (
        "ip_address",
        lambda s: functions.api_keys.verify_api_key(s, "", ip_address=167772161),
    ),
    "longest duration": (
        "older_than",
        lambda s: functions.token_status.prune(s, older_than=timedelta.max),
    ),
    "time without a zone": (
        "since",
        lambda s: functions.token_status.statistics(s, since=datetime.max),  # noqa: DTZ901
    ),
    "time that is out of range in UTC": (
        "since",
        lambda s: functions.token_status.statistics(
            s, since=datetime.max.replace(tzinfo=timezone(timedelta(hours=-5)))
        ),
    ),
    "number as action": ("action", lambda s: functions.audit_logs.search(s, action=5)),
    "mapping as results": ("result", lambda s: functions.audit_logs.search(s, result={"error": 1})),
    "session of another kind": ("session", lambda s: functions.accounts.get(s.sync_session, ID)),
    "dict as events": ("events", lambda s: functions.audit_logs.log_events(s, [{}])),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_an_argument_of_a_wrong_type_is_named_before_any_sql(
    database: Database, case: str
) -> None:
    name, call = REFUSED[case]
    async with database.session() as session:
        with recorded(database) as sent, pytest.raises(InvalidValue, match=rf"\b{name}\b"):
            await call(session)
        assert sent == []


async def test_a_session_is_no_source_of_sessions(session: AsyncSession) -> None:
    wrong: Any = session
    with pytest.raises(InvalidFields, match="source"):
        async with crud.audit_logs.recorded(wrong, action=AuditAction.TRADE_PLACE_ORDER):
            pytest.fail("the action ran")


@public
async def take(
    texts: Iterable[str] = (),
    *,
    status: AccountStatus | None = None,
    names: Sequence[str] = (),
    number: int = 0,
    ratio: float = 0,
    at: datetime | None = None,
    tags: Mapping[str, object] | None = None,
    form: Literal["jsonl", "csv"] = "csv",
    **more: object,
) -> list[str]:
    """Return the texts."""
    return [*texts]


async def test_an_iterator_is_checked_and_passed_on() -> None:
    assert await take(name for name in "ab") == ["a", "b"]
    wrong: Any = (item for item in ("a", None))
    with pytest.raises(InvalidFields, match="texts"):
        await take(texts=wrong)


@pytest.mark.parametrize(
    "values",
    [
        {"status": "active", "names": ["a"], "number": 2**63 - 1, "ratio": 1, "form": "jsonl"},
        {"status": AccountStatus.ACTIVE, "names": ("a",), "ratio": 0.5, "tags": {"a": None}},
        {"status": None, "at": datetime.max.replace(tzinfo=UTC), "anything": object()},
    ],
)
async def test_values_of_the_right_types_are_passed_on(values: dict[str, Any]) -> None:
    assert await take(["a"], **values) == ["a"]


async def test_all_wrong_arguments_are_named_at_once() -> None:
    wrong: dict[str, Any] = {
        "status": 1, "names": "a", "number": True, "ratio": float("nan"), "at": "2026-01-01",
        "tags": {1: 2}, "form": "xml", "texts": b"",
    }  # fmt: skip
    with pytest.raises(InvalidFields) as caught:
        await take(**wrong)
    assert {problem["loc"] for problem in caught.value.errors()} == {(name,) for name in wrong}


async def test_the_type_of_a_wrong_item_is_named() -> None:
    with pytest.raises(InvalidFields, match=r"not list with NoneType"):
        await functions.api_keys.authorize_api_key(None, "", scopes=["mcp:read", None])
    with pytest.raises(InvalidFields, match=r"not list with str") as caught:
        await functions.api_keys.authorize_api_key(None, "", scopes=["secret text"])
    assert "secret text" not in str(caught.value)


async def test_python_refuses_a_call_that_does_not_match_the_signature() -> None:
    call: Any = take
    for arguments, keywords in (((1, 2), {}), ((["a"],), {"texts": ["a"]})):
        with pytest.raises(TypeError):
            await call(*arguments, **keywords)


async def test_an_error_of_sqlalchemy_becomes_one_of_tiger_db(session: AsyncSession) -> None:
    @public
    async def fail() -> None:
        await session.execute(text("SELECT 1 FROM no_such_table"))

    with pytest.raises(StatementRefused):
        await fail()
    with pytest.raises(InvalidState, match="roll back"):
        await crud.accounts.get(session, ID)


def test_any_text_has_a_hash() -> None:
    assert len(crud.token_status.token_hash("\ud800")) == 64


class Once:
    """An iterable that can be read once, and is not an iterator."""

    def __init__(self, *items: object) -> None:
        self.items = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self.items


async def test_an_iterable_that_can_be_read_once_keeps_its_items(clone: Database) -> None:
    write, read = APIKeyScope.MCP_WRITE, APIKeyScope.MCP_READ
    async with clone.session() as session:
        _, raw_key = await crud.api_keys.create_api_key(session, name="n", scopes=Once(read))
        with pytest.raises(ScopeMissing):
            await crud.api_keys.authorize_api_key(session, raw_key, scopes=Once(write))
    with pytest.raises(ScopeMissing):
        await KeyVerifier(clone).authorize(raw_key, scopes=Once(write))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rate_limit_per_hour", True),
        ("rate_limit_per_day", "5"),
        ("allowed_ips", [167772161]),
        ("allowed_user_agents", [b"x"]),
        ("name", b"x"),
        ("expires_at", 4102444800),
        ("scopes", [None]),
        ("tags", [("a", 1)]),
    ],
)
async def test_a_change_of_a_key_with_a_wrong_type_is_refused(
    session: DatabaseSession, field: str, value: object
) -> None:
    key, _ = await factories.api_key(session)
    with pytest.raises(InvalidFields) as refused:
        await functions.api_keys.update(session, key.id, **{field: value})
    assert refused.value.errors()[0]["loc"][0] == field

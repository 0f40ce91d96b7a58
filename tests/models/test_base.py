"""Validation of all entities: rows are always valid, and errors show no input."""

import itertools
import json
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, TypeAdapter, ValidationError
from sqlalchemy import func, select
from sqlalchemy.exc import InvalidRequestError

from tests.models.examples import (
    ENTITIES,
    INTEGERS,
    JSONS,
    LIMITS,
    SECRET,
    SECRETS,
    STRICT,
    TEXTS,
    TIMESTAMPS,
    label,
    made,
    minimal,
)
from tests.support import factories
from tests.support.recording import recorded
from tiger_db import APIKey, AuditLog, Database, TigerAccount, TokenStatus, crud
from tiger_db.database import AsyncSession
from tiger_db.encryption import Secret
from tiger_db.models import Entity
from tiger_db.redaction import MASK

STORABLE = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
in_database = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def assign(entity: type[Entity], values: dict[str, Any]) -> object:
    row = made(entity)
    for name, value in values.items():
        setattr(row, name, value)
    return row


def as_json(entity: type[Entity], values: dict[str, Any]) -> object:
    return entity.model_validate_json(json.dumps(minimal(entity, **values), default=str))


# Each makes a row that differs from a minimal one in these values.
WAYS: dict[str, Callable[[type[Entity], dict[str, Any]], object]] = {
    "construct": lambda entity, values: entity(**minimal(entity, **values)),
    "assign": assign,
    "sqlmodel_update": lambda entity, values: made(entity).sqlmodel_update(values),
    "model_copy": lambda entity, values: made(entity).model_copy(update=values),
    "model_validate": lambda entity, values: entity.model_validate(minimal(entity, **values)),
    "model_validate_json": as_json,
    "TypeAdapter": lambda entity, values: TypeAdapter(entity).validate_python(
        minimal(entity, **values)
    ),
}


def refused(make: Callable[..., object], *arguments: object, **values: object) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        make(*arguments, **values)
    return caught.value


def names_of(error: ValidationError) -> set[object]:
    return {problem["loc"][0] for problem in error.errors()}


def shown(error: ValidationError) -> str:
    """Return everything that a log or a response could show of an error."""
    trace = "".join(traceback.format_exception(error))
    return f"{trace} {error!r} {error.errors()} {error.json()}"


every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_entity = pytest.mark.parametrize("entity", ENTITIES, ids=label)
STRICT_TEXTS = [field for field in TEXTS if field in STRICT]


@every_entity
def test_the_required_values_are_enough(entity: type[Entity]) -> None:
    row = made(entity)
    assert row.id.version == 7
    assert row.created_at is None  # the database's clock sets it


@every_entity
def test_missing_fields_are_named(entity: type[Entity]) -> None:
    assert names_of(refused(entity)) == minimal(entity).keys()


@every_way
@every_entity
def test_an_unknown_field_is_named(entity: type[Entity], way: Callable[..., object]) -> None:
    assert names_of(refused(way, entity, {"nickname": SECRET})) == {"nickname"}


@every_way
@every_entity
def test_a_mistyped_field_is_named(entity: type[Entity], way: Callable[..., object]) -> None:
    assert names_of(refused(way, entity, {"id": SECRET})) == {"id"}


@pytest.mark.parametrize(("entity", "name"), STRICT, ids=label)
def test_a_field_refuses_an_arbitrary_object(entity: type[Entity], name: str) -> None:
    assert names_of(refused(setattr, made(entity), name, object())) == {name}


@pytest.mark.parametrize(
    ("entity", "name", "rule", "within", "beyond"),
    [limit for limit in LIMITS if limit[:2] in STRICT],
    ids=label,
)
def test_a_limit_is_validated(
    entity: type[Entity], name: str, rule: str, within: object, beyond: object
) -> None:
    row = made(entity, **{name: within})
    assert getattr(row, name) == within
    assert names_of(refused(setattr, row, name, beyond)) == {name}
    assert getattr(row, name) == within


@pytest.mark.parametrize(("entity", "name"), [n for n in INTEGERS if n in STRICT], ids=label)
def test_an_integer_fits_into_64_bits(entity: type[Entity], name: str) -> None:
    assert getattr(made(entity, **{name: 2**63 - 1}), name) == 2**63 - 1
    for value in (2**63, -(2**63) - 1):
        assert names_of(refused(made, entity, **{name: value})) == {name}


@pytest.mark.parametrize(("entity", "name"), STRICT_TEXTS, ids=label)
def test_a_text_that_postgres_cannot_store_is_refused(entity: type[Entity], name: str) -> None:
    for bad in ("\0", "a\0b", "\ud800", "a\udfff"):
        assert names_of(refused(made, entity, **{name: bad})) == {name}


@pytest.mark.slow
@in_database
@given(text=st.text(STORABLE, min_size=1, max_size=100))
@example(text="'; DROP TABLE tiger_accounts; --")
@example(text='"\\u0000" \N{TIGER} e\N{COMBINING ACUTE ACCENT}\r\n\t\x01\ufffe')
async def test_any_other_text_is_stored_and_read_unchanged(
    session: AsyncSession, text: str
) -> None:
    account = await factories.account(session, account_name=text)
    await session.refresh(account)
    assert account.account_name == text


@every_way
@pytest.mark.parametrize("bad", ["2026-11-23T12:00:00", "2026-11-23", datetime(2026, 11, 23, 12)])  # noqa: DTZ001
def test_a_naive_datetime_is_refused(way: Callable[..., object], bad: object) -> None:
    value = bad.isoformat() if way is as_json and isinstance(bad, datetime) else bad
    assert names_of(refused(way, APIKey, {"expires_at": value})) == {"expires_at"}


@pytest.mark.parametrize(("entity", "name"), TIMESTAMPS, ids=label)
@settings(max_examples=5)
@given(
    moment=st.datetimes(
        min_value=datetime(2, 1, 1),  # noqa: DTZ001
        max_value=datetime(9998, 12, 31),  # noqa: DTZ001
        timezones=st.timezones()
        | st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone),
    )
)
def test_a_datetime_of_any_zone_becomes_utc(
    entity: type[Entity], name: str, moment: datetime
) -> None:
    kept = getattr(made(entity, **{name: moment}), name)
    assert kept.tzinfo is UTC
    assert kept == moment.astimezone(UTC)


@pytest.mark.parametrize(
    "moment",
    [
        datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-2))),
        datetime(1, 1, 1, 1, tzinfo=timezone(timedelta(hours=2))),
    ],
)
def test_a_datetime_outside_the_range_of_utc_is_refused(moment: datetime) -> None:
    assert names_of(refused(made, APIKey, expires_at=moment)) == {"expires_at"}


@pytest.mark.parametrize("end", ["max", "min"])
async def test_the_first_and_last_datetime_are_read_with_a_time_zone(
    session: AsyncSession, end: str
) -> None:
    # asyncpg stores these two as infinity, and reads infinity without a time zone.
    moment = getattr(datetime, end).replace(tzinfo=UTC)
    key, raw_key = await factories.api_key(session, expires_at=moment)
    await session.refresh(key)
    assert key.expires_at == moment
    accepted = await crud.api_keys.verify_api_key(session, raw_key)
    assert (accepted is not None) == key.is_active == (end == "max")


BAD_LEAVES = [float("nan"), float("inf"), -float("inf"), "\0", "a\\\0", "\ud800", {"\0": 1}]
BAD_LEAVES += [{"\udfff": 1}, object(), {1, 2}, b"bytes", {1: "a number as a key"}, 10**5000]


@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("leaf", BAD_LEAVES, ids=lambda leaf: type(leaf).__name__)
def test_json_that_postgres_cannot_store_is_refused(leaf: object, depth: int) -> None:
    value: object = {"leaf": leaf}
    for level in range(depth):
        value = {"deeper": [level, value]}
    for entity, name in [field for field in JSONS if field in STRICT]:
        wrapped = [{"name": "x", "expire_at": value}] if name == "quote_permissions" else value
        assert names_of(refused(made, entity, **{name: wrapped})) == {name}


@pytest.mark.parametrize("name", ["\0", "\ud800", "a\0b"])
def test_the_name_of_a_quote_permission_is_storable(name: str) -> None:
    permissions = [{"name": name, "expire_at": -1}]
    error = refused(made, TigerAccount, quote_permissions=permissions)
    assert names_of(error) == {"quote_permissions"}


@pytest.mark.slow
def test_json_of_any_depth_does_not_crash_validation() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"deeper": deep}
    assert names_of(refused(made, APIKey, tags=deep)) == {"tags"}
    assert made(AuditLog, details=deep).details


@given(key=st.text(alphabet="\\u0a\0"), text=st.text(alphabet="\\u0a\0"))
@example(key="\\u0000", text="\\\\u0000")
def test_only_a_real_nul_is_refused(key: str, text: str) -> None:
    tags = {"list": [{key: text}]}
    if "\0" in key + text:
        assert names_of(refused(made, APIKey, tags=tags)) == {"tags"}
    else:
        assert made(APIKey, tags=tags).tags == tags


@every_way
@pytest.mark.parametrize(("entity", "name"), SECRETS, ids=label)
def test_a_secret_is_a_text_and_not_its_mask(
    entity: type[Entity], name: str, way: Callable[..., object]
) -> None:
    for bad in ("", MASK, 5, ["text"]):
        assert names_of(refused(way, entity, {name: bad})) == {name}


@pytest.mark.parametrize("bad", [Secret(""), SecretStr(MASK), SecretStr("\ud800"), "\ud800"])
def test_a_wrapped_secret_is_validated_too(bad: object) -> None:
    assert names_of(refused(made, TigerAccount, private_key=bad)) == {"private_key"}


@every_way
@every_entity
def test_a_validation_error_shows_no_input(
    entity: type[Entity], way: Callable[..., object]
) -> None:
    values = ([SECRET + "\0"], {"key": SECRET + "\0"}, SECRET + "\0" * 501, [{"name": SECRET}])
    for name, value in itertools.product(entity.model_fields, values):
        if (entity, name) not in STRICT or ((entity, name) in SECRETS and isinstance(value, str)):
            continue  # these take it
        error = shown(refused(way, entity, {name: value}))
        assert name in error
        assert SECRET not in error


@pytest.mark.parametrize(
    ("entity", "name"),
    [*STRICT_TEXTS, *SECRETS, (AuditLog, "action"), (AuditLog, "result")],
    ids=label,
)
def test_an_error_about_invalid_unicode_shows_no_input(entity: type[Entity], name: str) -> None:
    # Python's own error about it would have the whole text.
    error = refused(made, entity, **{name: SECRET + "\ud800"})
    assert names_of(error) == {name}
    assert SECRET not in shown(error)


@pytest.mark.parametrize("body", [f'"{SECRET}"', f'["{SECRET}"]', f'{{"tiger_id": "{SECRET}', "5"])
def test_an_error_about_malformed_json_shows_no_input(body: str) -> None:
    assert SECRET not in shown(refused(TigerAccount.model_validate_json, body))


def test_an_update_is_all_or_nothing() -> None:
    account = factories.new_account(tags={"team": "a"})
    before = account.model_dump()
    changes = {"account_name": "Other", "tags": {"team": "b"}, "error_count": -1}
    assert names_of(refused(account.sqlmodel_update, changes)) == {"error_count"}
    assert account.model_dump() == before


async def test_an_invalid_assignment_leaves_nothing_to_flush(database: Database) -> None:
    async with database.session() as session:
        account = await factories.account(session)
        refused(setattr, account, "account_name", "")
        refused(account.sqlmodel_update, {"account_name": "Other", "status": "open"})
        with recorded(database) as statements:
            await session.flush()
        assert statements == []
        await session.rollback()


@every_entity
def test_the_json_schema_describes_every_field(entity: type[Entity]) -> None:
    schema = entity.model_json_schema()
    assert schema["properties"].keys() == entity.model_fields.keys()
    assert set(schema["required"]) == minimal(entity).keys()
    assert schema["additionalProperties"] is False
    assert all(field["description"] for field in schema["properties"].values())


def test_the_json_schema_marks_secrets() -> None:
    for entity, name in SECRETS:
        field = entity.model_json_schema()["properties"][name]
        (kind, *_) = field.get("anyOf", [field])
        assert (kind["format"], kind["writeOnly"]) == ("password", True)


def test_a_row_is_equal_after_a_round_trip_through_json() -> None:
    event = made(AuditLog, ip_address="10.0.0.1", details={"n": [1, {"x": None}]})
    assert AuditLog.model_validate_json(event.model_dump_json()) == event
    assert AuditLog.model_validate(event.model_dump(mode="json")) == event


RELATIONSHIPS = [
    (TigerAccount, "api_keys"),
    (TigerAccount, "token_statuses"),
    (APIKey, "tiger_account"),
    (TokenStatus, "tiger_account"),
]


@pytest.mark.parametrize(("entity", "name"), RELATIONSHIPS, ids=label)
async def test_a_relationship_raises_instead_of_loading(
    session: AsyncSession, entity: type[Entity], name: str
) -> None:
    account = await factories.account_with_token(session)
    await factories.api_key(session, tiger_account_id=account.id)
    await factories.refresh(session, account)
    session.expunge_all()
    row = (await session.scalars(select(entity))).one()
    with pytest.raises(InvalidRequestError, match="lazy='raise'"):
        getattr(row, name)


@pytest.mark.parametrize("bad", [SECRET, {"id": 1}, [SECRET], 5])
@pytest.mark.parametrize(("entity", "name"), RELATIONSHIPS, ids=label)
def test_a_relationship_takes_only_entities(entity: type[Entity], name: str, bad: object) -> None:
    for error in (
        refused(made, entity, **{name: bad}),
        refused(setattr, made(entity), name, bad),
    ):
        assert names_of(error) == {name}
        assert SECRET not in shown(error)


async def test_relating_rows_sets_the_foreign_key(session: AsyncSession) -> None:
    account = await factories.account(session)
    key = made(APIKey, tiger_account=account)
    session.add(key)
    await session.flush()
    assert key.tiger_account_id == account.id


async def test_rows_are_usable_after_the_session_has_closed(clone: Database) -> None:
    async with clone.session() as session:
        stored = await factories.account(session, tags={"team": {"name": "a"}})
    async with clone.session() as session:
        read = await crud.accounts.get(session, stored.id)
    assert read is not None
    for row in (stored, read):
        assert row.tiger_id.get_secret_value() == "20150001"
        assert row.created_at == row.updated_at is not None
        assert row.is_active
        row.tags["team"].update(name="b")  # type: ignore[union-attr]  # it is a dict
        row.account_name = "Other"
        assert row.model_dump()["tags"] == {"team": {"name": "b"}}
        assert json.loads(row.model_dump_json())["account_name"] == "Other"
    async with clone.session() as session:
        session.add(read)  # what was changed meanwhile is saved
    async with clone.session() as session:
        saved = await crud.accounts.get(session, stored.id)
        assert saved is not None
        assert (saved.account_name, saved.tags) == ("Other", {"team": {"name": "b"}})


async def test_created_at_is_the_time_of_the_database(session: AsyncSession) -> None:
    account = await factories.account(session)
    assert account.created_at == await session.scalar(select(func.now()))


async def test_a_loaded_row_has_its_fields_in_the_order_of_the_class(session: AsyncSession) -> None:
    account = await factories.account(session)
    session.expunge_all()
    loaded = await crud.accounts.get(session, account.id)
    assert loaded is not None
    assert list(loaded.model_dump()) == list(TigerAccount.model_fields)
    assert [name for name, _ in loaded.__repr_args__()] == list(TigerAccount.model_fields)

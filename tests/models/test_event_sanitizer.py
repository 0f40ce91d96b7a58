"""The sanitizer: an event with any values is stored, and contains no secret."""

import base64
import json
import subprocess
import sys
import uuid
from array import array
from collections import OrderedDict, UserDict, UserList, UserString, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import SecretBytes, SecretStr, ValidationError, create_model

from tests.models.examples import made
from tests.support.secrets_in_text import API_KEY, DER, JWT, PEM, TOKEN, WRAPPED, parts
from tiger_db import AuditLog
from tiger_db.encryption import Secret
from tiger_db.models.event_sanitizer import NOTES
from tiger_db.redaction import MASK

ID = uuid.UUID("b3f1c2d4-0a1b-4c5d-8e9f-001122334455")
DIGEST = bytes(range(32)).hex()
HIDDEN = "hunter2-hunter2"
Side = StrEnum("Side", {"BUY": "buy"})
Mixed = Enum("Mixed", {"BUY": "buy"}, type=str)
Lots = IntEnum("Lots", {"ONE": 1})
Order = create_model("Order", quantity=Decimal, password=(str, HIDDEN))
Kind = Enum("Kind", {"PRICED": Decimal("1.5")})


@dataclass(frozen=True)
class Leg:
    symbol: str
    token: str = HIDDEN


class Rude:
    def __str__(self) -> str:
        raise ZeroDivisionError

    def __repr__(self) -> str:
        return HIDDEN


RudeError = type("RudeError", (Exception,), {"__str__": Rude.__str__})
Ruder = type("Ruder", (), {"__class__": property(Rude.__str__)})


def notes(event: AuditLog) -> dict[str, Any]:
    return cast("dict[str, Any]", (event.details or {}).get(NOTES, {}))


def told(event: AuditLog) -> str:
    """Return all text of an event; assert that it can be stored."""
    text = json.dumps(event.model_dump(mode="json"), allow_nan=False, ensure_ascii=False)
    assert b"\\u0000" not in text.replace("\\\\", "").encode()
    return text + repr(event)


def assert_unchanged(event: AuditLog) -> None:
    values = {name: getattr(event, name) for name in event.model_fields_set}
    assert AuditLog(**values | {"id": event.id}).model_dump() == event.model_dump()
    told(event)


CUT = object()
KEPT = {"digest": DIGEST, "id": str(ID), "note": "no token, no secret", "blob": "QUJD" * 40}
FIELDS: dict[str, list[tuple[object, object, str | dict[str, str] | None]]] = {
    "ip_address": [
        ("unknown", None, "not an IP address: unknown"), ("", None, "not an IP address: "),
        ("10.0.0.0/8", None, "not an IP address: 10.0.0.0/8"), (5, None, "not an IP address: 5"),
        ("x" * 999, None, f"not an IP address: {'x' * 199}…"),
        ("?, ::1, 1.2.3.4", IPv6Address("::1"), "taken from: ?, ::1, 1.2.3.4"),
        ("1.2.3.4:5678", IPv4Address("1.2.3.4"), "taken from: 1.2.3.4:5678"),
        ("[::1]:80", IPv6Address("::1"), "taken from: [::1]:80"),
        ("fe80::1%eth0", IPv6Address("fe80::1"), "taken from: fe80::1%eth0"),
        (IPv6Address("fe80::1%1"), IPv6Address("fe80::1"), "taken from: fe80::1%1"),
        ("::ffff:1.2.3.4", IPv4Address("1.2.3.4"), None),
    ],
    "user_agent": [
        ("x" * 812, "x" * 499 + "…", "cut from 812 characters"), ("x" * 500, "x" * 500, None),
        (b"curl/8", "curl/8", "bytes"),
    ],
    "request_method": [("x" * 11, "x" * 9 + "…", "cut from 11 characters")],
    "user_id": [
        ("a\0b\ud800", "a\ufffdb\ufffd", "unstorable characters"), (7, "7", "int"),
        (True, "True", "bool"), (ID, str(ID), "UUID"), (Lots.ONE, "1", "Lots"),
        (Side.BUY, "buy", None), (Decimal("1.50"), "1.50", "Decimal"),
        (["a", 1], '["a", 1]', "list"), (Rude(), "Rude", "Rude"), (Mixed.BUY, "buy", None),
    ],
    "error_code": [(datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00+00:00", "datetime")],
    "error_message": [
        (ValueError("no"), "ValueError: no", "ValueError"),
        ("x y" * 40_000, CUT, "cut from 120000 characters"), (DIGEST, MASK, None),
    ],
    "tiger_account_id": [(str(ID), ID, None), ("main", None, "not a UUID: main")],
    "api_key_id": [
        (5, None, "not a UUID: 5"), (API_KEY, None, f"not a UUID: {API_KEY[:21]}_{MASK}"),
    ],
    "duration_ms": [
        (2**63 - 1, 2**63 - 1, None), (12.6, 13, None), (Decimal("12.4"), 12, "Decimal"),
        (timedelta(seconds=1.5), 1500, None), (" 12.4", 12, "str"),
        (np.int64(12), 12, None), (np.float32(12.5), 12, None), (Fraction(25, 2), 12, None),
        (np.float64("nan"), None, "not a duration: NaN"),
        (np.bool_(True), None, "not a duration: True"),  # noqa: FBT003  # NumPy's
        (-1, None, "not a duration: -1"), (2**63, None, f"not a duration: {2**63}"),
        (float("nan"), None, "not a duration: NaN"),
        (Decimal("sNaN"), None, "not a duration: sNaN"),
        (Decimal("1e999999"), None, "not a duration: 1E+999999"),
        ("soon", None, "not a duration: soon"),
        (True, None, "not a duration: True"),
        (2**63 - Decimal("0.4"), None, f"not a duration: {2**63 - 1}.6"),
    ],
    "severity": [
        ("worst", "low", "not a severity: worst"), (["high"], "low", 'not a severity: ["high"]'),
        ("high", "high", None),
    ],
    "tags": [
        (["a"], {"value": ["a"]}, "list"), ("a", {"value": "a"}, "str"),
        (Decimal(1), {"value": "1"}, "Decimal"),
        (Leg("AAPL"), {"symbol": "AAPL", "token": MASK}, "Leg"),
        (MappingProxyType({"a": 1}), {"a": 1}, None), ({}, {}, None), (None, None, None),
        ({"1": 0, 1: 1}, {"1": 0, "1 (2)": 1}, {"tags.1 (2)": "key: int"}),
        ({True: 0}, {"True": 0}, {"tags.True": "key: bool"}), ({Side.BUY: 0}, {"buy": 0}, None),
        ({b"a": 0}, {"a": 0}, {"tags.a": "key: bytes"}),
        ({("a", Lots.ONE): 0}, {'["a", 1]': 0}, {'tags.["a", 1]': "key: tuple"}),
        ({"a\0": 0}, {"a\ufffd": 0}, {"tags.a\ufffd": "unstorable characters"}),
        ({b"password": "x"}, {"password": MASK}, {"tags.password": "key: bytes"}),
        ({"Bearer password": "x"}, {f"Bearer {MASK}": MASK}, None),
        ({"a": "x y" * 40_000}, CUT, {"tags.a": "cut from 120000 characters"}),
        ({"a": [*range(10_001)]}, {"a": [*range(9_999)]}, {"tags": "cut to 10000 values"}),
        ({"a": ["x " * 49_999] * 11}, CUT, {"tags.a.10": "cut from 99998 characters"}),
        ({f"{n:2000}": 0 for n in range(600)}, CUT, {"tags": "cut to 1000000 characters"}),
        ({"a": [1j] * 60}, {"a": ["complex"] * 60},
         {f"tags.a.{n}": "complex" for n in range(50)} | {"…": "and 10 more"}),
        (KEPT, KEPT, None),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "given_", "kept", "note"),
    [
        pytest.param(name, *case, marks=pytest.mark.slow if case[1] is CUT else ())
        for name in FIELDS
        for case in FIELDS[name]
    ],
)
def test_an_invalid_field_is_converted_and_noted(
    field: str, given_: object, kept: object, note: str | dict[str, str] | None
) -> None:
    event = made(AuditLog, **{field: given_})
    if kept is CUT:
        assert len(json.dumps(getattr(event, field))) < 1_100_000
    else:
        assert getattr(event, field) == kept
    assert notes(event) == ({field: note} if isinstance(note, str) else note or {})
    assert_unchanged(event)


def test_an_invalid_action_or_result_is_refused() -> None:
    for field in ("action", "result", "id", "created_at", "colour"):
        with pytest.raises(ValidationError, match=field):
            made(AuditLog, **{field: "?"})


@pytest.mark.parametrize(
    ("given_", "kept", "note"),
    [
        (Decimal("1.50"), "1.50", "Decimal"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00+00:00", "datetime"),
        (date(2026, 1, 2), "2026-01-02", "date"), (time(1, 2), "01:02:00", "time"),
        (timedelta(minutes=1), "0:01:00", "timedelta"), (ID, str(ID), "UUID"),
        (Mixed.BUY, "buy", None), (Lots.ONE, 1, "Lots"), (Kind.PRICED, "1.5", "Kind; Decimal"),
        (b"\xff\0", "/wA=", "bytes"), (memoryview(b"ab"), "YWI=", "memoryview"),
        (float("nan"), "NaN", "float"), (float("inf"), "Infinity", "float"),
        (float("-inf"), "-Infinity", "float"), (1e300, 1e300, None),
        (2**1000 - 1, 2**1000 - 1, None), (2**1000, hex(2**1000), "int of 1001 bits"),
        ({1}, [1], "set"), (frozenset({1}), [1], "frozenset"), ((1, "a"), [1, "a"], None),
        (SecretStr("a"), MASK, None), (SecretBytes(b"a"), MASK, None), (Secret("a"), MASK, None),
        (Order(quantity=Decimal(1)), {"quantity": "1", "password": MASK}, "Order"),
        (Leg("AAPL"), {"symbol": "AAPL", "token": MASK}, "Leg"),
        (ip_address("::1"), "::1", "IPv6Address"),
        (ip_network("10.0.0.0/8"), "10.0.0.0/8", "IPv4Network"),
        (PurePosixPath("/a"), "/a", "PurePosixPath"), (RudeError(), "RudeError", "RudeError"),
        (ValueError(DIGEST), f"ValueError: {MASK}", "ValueError"), (Rude(), "Rude", "Rude"),
        (Rude, "type", "type"), ("a\0\udfff", "a\ufffd\ufffd", "unstorable characters"),
        (Fraction(1, 3), "1/3", "Fraction"), (Fraction(2), "2", "Fraction"),
        (range(3), [0, 1, 2], None), (array("d", [0.5]), [0.5], None),
        (deque([1, "a"]), [1, "a"], None), (UserList([1]), [1], None), (UserString("a"), "a", None),
        (UserDict(a=1), {"a": 1}, None), ({"a": 1}.keys(), ["a"], None),
        ({"a": 1}.values(), [1], None), ({"a": 1}.items(), [["a", 1]], None),
        (deque([SecretStr("a"), TOKEN]), [MASK, MASK], None),
        (np.int64(-5), -5, None), (np.uint64(2**64 - 1), 2**64 - 1, None),
        (np.bool_(True), True, None), (np.bool_(False), False, None),  # noqa: FBT003
        (np.float64(0.1), 0.1, None), (np.float32(0.5), 0.5, None),
        (np.float16(0.5), 0.5, None), (np.float32("inf"), "Infinity", "float"),
        (np.longdouble("1.5"), 1.5, None), (np.str_("a"), "a", None),
        (np.datetime64("2026-01-02T00:00", "ns"), "2026-01-02T00:00:00.000000000", "datetime64"),
        (np.timedelta64(5, "s"), "5 seconds", "timedelta64"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]], None),
        (np.array([True, False]), [True, False], None), (np.array(7), 7, None),
        (np.array([0.5, 1]), [0.5, 1.0], None), (np.array([]), [], None),
        (np.array([{"password": HIDDEN}, None]), [{"password": MASK}, None], None),
    ],
)  # fmt: skip
def test_any_value_becomes_json(given_: object, kept: object, note: str | None) -> None:
    event = made(AuditLog, tags={"t": given_, "a": [given_]})
    assert event.tags == {"t": kept, "a": [kept]}
    assert json.dumps(event.tags) == json.dumps({"t": kept, "a": [kept]})  # 1 is not true or 1.0
    assert notes(event) == ({} if note is None else {"tags.t": note, "tags.a.0": note})


def test_an_item_without_a_length_keeps_the_other_items() -> None:
    class Unsized(UserList[int]):
        """As an array of NumPy without dimensions."""

        def __len__(self) -> int:
            raise TypeError("len() of unsized object")

    tags: Any = made(AuditLog, tags={"a": [1, Unsized([2]), ("password", HIDDEN)]}).tags
    first, _, last = tags["a"]
    assert (first, last) == (1, ["password", MASK])


def test_an_array_is_cut_like_a_list() -> None:
    for given_ in (np.arange(10_001), deque(range(10_001)), range(10**12)):
        event = made(AuditLog, tags={"a": given_})
        assert event.tags == {"a": [*range(9_999)]}
        assert notes(event) == {"tags": "cut to 10000 values"}


def test_numbers_of_numpy_are_kept_where_a_name_suggests_a_secret() -> None:
    given_ = {"max_tokens": np.int64(5), "has_token": np.bool_(True), "pin": np.int64(5)}  # noqa: FBT003
    assert made(AuditLog, tags=given_).tags == {"max_tokens": 5, "has_token": True, "pin": MASK}


@pytest.mark.slow
def test_numpy_is_not_imported() -> None:
    code = "import sys, tiger_db.models; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recursive_values_are_cut() -> None:
    loop: list[Any] = [1]
    loop += [loop, {"a": loop}]
    assert "cut to 10000 values" in told(made(AuditLog, tags={"loop": loop}))
    deep = json.loads('{"a":' * 33 + "1" + "}" * 33)
    event = made(AuditLog, tags=deep)
    assert notes(event) == {".".join(["tags", *"a" * 32]): "deeper than 32 levels"}
    assert made(AuditLog, tags=deep["a"]).tags == deep["a"]


def test_an_object_whose_methods_raise_is_noted() -> None:
    for name in (*OTHER_FIELDS, *JSON_FIELDS):
        assert list(notes(made(AuditLog, **{name: Ruder()}))) == [name]


def test_earlier_notes_are_kept() -> None:
    event = made(AuditLog, details={NOTES: {"a": "b", "c": 1j}, "n": Decimal(1)})
    assert notes(event) == {"a": "b", "c": "complex", "details.n": "Decimal"}
    assert made(AuditLog, details={NOTES: "mine"}).details == {NOTES: "mine"}
    assert notes(made(AuditLog, details={NOTES: "mine"}, user_id=1)) == {"user_id": "int"}


SHAPES = {
    "API key": (API_KEY, API_KEY[22:]), "PEM": (PEM, DER[40:80]), "token": (TOKEN, TOKEN[20:]),
    "JWT": (JWT, JWT.split(".")[2]), "Bearer": (f"Bearer {HIDDEN}", HIDDEN),
    "DER": (DER, DER[40:80]), "DER in lines": (WRAPPED, DER[-40:-4]),
    "named": (f"https://x/?a=1&accessKey={HIDDEN}", HIDDEN), "short": (f"pin={HIDDEN}", HIDDEN),
}  # fmt: skip
JSON_FIELDS = ["details", "old_values", "new_values", "tags"]
STRICT = {"id", "created_at", "action", "result", "position", *JSON_FIELDS}
OTHER_FIELDS = [name for name in AuditLog.model_fields if name not in STRICT]


def places(text: str) -> Iterator[dict[str, Any]]:
    yield from ({name: text} for name in OTHER_FIELDS)
    yield from (
        {name: f"{'x' * n} {text} {'y ' * 300}"} for name in OTHER_FIELDS for n in (5, 40, 85, 470)
    )
    for name in JSON_FIELDS:
        yield {name: text}
        for value in (text, text.encode(), ValueError(text), PurePosixPath(text), {"b": (text,)}):
            yield {name: {"a": [value]}}
        yield {name: {text: Decimal(1)}}
        yield {name: {NOTES: {text: text, "n": [text]}}}


@pytest.mark.parametrize(("text", "secret"), SHAPES.values(), ids=SHAPES)
def test_a_secret_is_masked_by_its_form_in_any_field(text: str, secret: str) -> None:
    for values in places(text):
        event = made(AuditLog, **values)
        text_of_event = told(event)
        assert not [part for part in parts(secret) if part in text_of_event], values
        assert_unchanged(event)


@pytest.mark.parametrize("value", ["x", HIDDEN, 5, [HIDDEN], {"a": {"b": HIDDEN}}, b"x", Leg("A")])
def test_a_secret_is_masked_by_its_name_at_any_depth(value: object) -> None:
    inner = {"refreshToken": value, "api_key_id": "k", "token": None, "has_token": True}
    kept = inner | {"refreshToken": MASK}
    for name in JSON_FIELDS:
        event = made(AuditLog, **{name: {"a": [{"b": inner}]} | inner})
        assert getattr(event, name) == {"a": [{"b": kept}]} | kept
        assert HIDDEN not in told(event)
    kept = {"max_tokens": 5, "revoked_api_keys": [API_KEY[:21]], "api_keys": []}
    assert made(AuditLog, tags=kept).tags == kept
    not_kept = {"max_tokens": "5", "revoked_api_keys": [API_KEY[:21], "x"], "api_keys": [[]]}
    assert made(AuditLog, tags=not_kept).tags == dict.fromkeys(not_kept, MASK)


def test_assigned_and_changed_values_are_sanitized_too() -> None:
    event = made(AuditLog)
    event.user_agent = "x" * 501
    assert event.user_agent == "x" * 499 + "…"
    event.details = {"n": Decimal(1), "password": HIDDEN}  # type: ignore[dict-item]  # the test is about it
    assert event.details == {"n": "1", "password": MASK, NOTES: {"details.n": "Decimal"}}
    event.details["when"] = date(2026, 1, 2)  # type: ignore[assignment]  # the test is about it
    changed = event.validate_changes({"details": event.details, "tags": event.tags})
    assert changed.keys() == {"details", "tags"}
    assert changed["details"]["when"] == "2026-01-02"
    with pytest.raises(ValidationError, match="severity"):
        event.severity = "worst"


def test_values_from_json_are_sanitized_too() -> None:
    told_ = '{"action": "data:query", "details": {"pwd": "x"}, "user_id": 5}'
    for event in (AuditLog.model_validate(json.loads(told_)), AuditLog.model_validate_json(told_)):
        assert event.details == {"pwd": MASK, NOTES: {"user_id": "int"}}


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.decimals() | st.datetimes() | st.dates() | st.times() | st.timedeltas() | st.uuids()
    | st.ip_addresses() | st.text(st.sampled_from("\0\ud800aé=: \"'\\"))
    | st.sampled_from([Side.BUY, Lots.ONE, Kind.PRICED, Rude(), RudeError(), Leg("A"), 2**1001,
                       Order(quantity=Decimal(1)), SecretStr(HIDDEN), Secret(HIDDEN),
                       ValueError("token=" + HIDDEN), API_KEY, JWT, PEM, PEM.encode(), object()])
)  # fmt: skip
KEYS = st.text() | st.none() | st.integers() | st.binary() | st.sampled_from(["sign", NOTES])
ANYTHING = st.recursive(
    LEAVES, lambda x: st.lists(x) | st.tuples(x) | st.dictionaries(KEYS, x), max_leaves=12
)


@pytest.mark.slow
@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*OTHER_FIELDS, "details", "tags"]), ANYTHING))
@example(
    {"details": {"sign": []}, "severity": None}
)  # which the stored event has in a tracked list
def test_an_event_of_any_values_is_valid(values: dict[str, Any]) -> None:
    event = made(AuditLog, **values)
    secrets = (HIDDEN, API_KEY, JWT, DER[:40], base64.b64encode(PEM.encode())[:40].decode())
    assert not [secret for secret in secrets if secret in told(event)]
    assert_unchanged(event)


class _Login(NamedTuple):
    user: str
    password: str


@pytest.mark.parametrize(
    "value",
    [
        {"password": "hunter2hunter2", "user": "ann"}.items(),
        OrderedDict(password="hunter2hunter2").items(),
        UserDict(password="hunter2hunter2").items(),
        [("password", "hunter2hunter2")],
        [["api_secret", "hunter2hunter2"]],
        _Login("ann", "hunter2hunter2"),
    ],
)
def test_secrets_in_pairs_and_named_tuples_are_masked(value: object) -> None:
    for details in ({"items": value}, value):
        event = AuditLog(action="trade:place_order", **cast("Any", {"details": details}))
        assert "hunter2hunter2" not in event.model_dump_json()

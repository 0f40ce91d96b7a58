"""Peppers of API keys: parsing, representation, HMAC, settings."""

import base64
import hashlib
import hmac
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.servers import PRODUCTION, settings_for
from tiger_db import Database, Settings
from tiger_db.encryption import generate_key
from tiger_db.errors import ConfigurationError
from tiger_db.keys_in_force import API_KEY_PEPPERS, configured
from tiger_db.peppers import Peppers

FIRST, SECOND = bytes(range(100, 132)), bytes(range(200, 232))


def encoded(pepper: bytes) -> str:
    return base64.b64encode(pepper).decode()


TEXT = f"p2:{encoded(FIRST)},p1:{encoded(SECOND)}"


def by_hand(key: bytes, message: bytes) -> str:
    """Return the HMAC-SHA256 for a key of up to 64 bytes by RFC 2104."""
    padded = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in padded) + message).digest()
    return hashlib.sha256(bytes(b ^ 0x5C for b in padded) + inner).hexdigest()


def test_the_reference_hmac_follows_rfc_4231() -> None:
    assert by_hand(b"\x0b" * 20, b"Hi There") == (
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
    )
    assert by_hand(b"Jefe", b"what do ya want for nothing?") == (
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    )


@given(
    pepper=st.binary(min_size=32, max_size=32),
    secret=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_the_hashed_value_is_the_hmac_sha256(pepper: bytes, secret: str) -> None:
    applied = Peppers({"a": pepper, "b": bytes(32)}).apply("a", secret)
    assert applied == by_hand(pepper, secret.encode())
    assert applied == hmac.new(pepper, secret.encode(), hashlib.sha256).hexdigest()


def test_peppers_are_parsed_in_their_order() -> None:
    peppers = Peppers.parse(f" p2:{encoded(FIRST)} , p1:{encoded(SECOND)}\n")
    assert peppers.key_ids == ("p2", "p1")
    assert peppers.apply("p2", "secret") == by_hand(FIRST, b"secret")
    assert peppers.apply("p1", "secret") == by_hand(SECOND, b"secret")
    assert Peppers.parse(generate_key("p9")).key_ids == ("p9",)
    with pytest.raises(KeyError):
        peppers.apply("p3", "secret")


MALFORMED = [
    "",
    " ",
    ",",
    encoded(FIRST),
    f"{encoded(FIRST)}:p1",
    f":{encoded(FIRST)}",
    f"p 1:{encoded(FIRST)}",
    f"p1 {encoded(FIRST)}",
    f"{'p' * 33}:{encoded(FIRST)}",
    f"p1:{encoded(FIRST)},p1:{encoded(SECOND)}",
    f"p1:{encoded(FIRST)}:p2:{encoded(SECOND)}",
    f"p1:{encoded(FIRST[:-1])}",
    f"p1:{encoded(FIRST + b'!')}",
    f"p1:{encoded(FIRST)[:-2]}\u00e9=",
    f"p1:{FIRST.hex()}",
    "p1:",
]


@pytest.mark.parametrize("bad", MALFORMED)
def test_the_error_of_malformed_peppers_shows_none(bad: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Peppers.parse(bad)
    assert "\n" not in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    for part in bad.replace(",", ":").replace(" ", ":").split(":"):
        assert len(part) < 8 or part[:8] not in shown


@given(st.text(max_size=60))
def test_any_text_is_refused_as_peppers(anything: str) -> None:
    with pytest.raises(ConfigurationError):
        Peppers.parse(anything)


def test_the_constructor_validates_peppers() -> None:
    for bad in ({}, {"p1": FIRST[:-1]}, {"p 1": FIRST}, {"": FIRST}):
        with pytest.raises(ConfigurationError):
            Peppers(bad)


def test_a_later_change_of_the_mapping_has_no_effect() -> None:
    given_ = {"p1": FIRST}
    peppers = Peppers(given_)
    given_["p1"] = SECOND
    assert peppers.apply("p1", "secret") == by_hand(FIRST, b"secret")


def test_the_representation_shows_only_ids() -> None:
    peppers = Peppers.parse(TEXT)
    assert (repr(peppers), str(peppers), f"{[peppers]}") == (
        "Peppers(p2, p1)",
        "Peppers(p2, p1)",
        "[Peppers(p2, p1)]",
    )
    settings = Settings(api_key_peppers=TEXT)
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert encoded(FIRST) not in shown
        assert encoded(SECOND) not in shown


# In the settings


def test_peppers_are_read_from_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured(Settings(), API_KEY_PEPPERS) is None
    file = tmp_path / "peppers"
    file.write_text(f"{TEXT}\n")
    monkeypatch.setenv("API_KEY_PEPPERS_FILE", str(file))
    from_file = configured(Settings(), API_KEY_PEPPERS)
    monkeypatch.setenv("API_KEY_PEPPERS", TEXT)
    with pytest.raises(ConfigurationError, match="not both"):
        configured(Settings(), API_KEY_PEPPERS)
    monkeypatch.delenv("API_KEY_PEPPERS_FILE")
    from_text = configured(Settings(), API_KEY_PEPPERS)
    assert from_file is not None
    assert from_text is not None
    assert from_file.key_ids == from_text.key_ids == ("p2", "p1")
    assert from_file.apply("p1", "x") == from_text.apply("p1", "x") == by_hand(SECOND, b"x")


@pytest.mark.parametrize("bad", [text for text in MALFORMED if text])
def test_the_error_of_a_malformed_setting_names_it_and_shows_no_value(
    server_url: str, bad: str
) -> None:
    good = settings_for(server_url, "postgres").model_dump() | {"api_key_peppers": bad}
    with pytest.raises(ConfigurationError, match=r"^API_KEY_PEPPERS: ") as caught:
        Database(Settings(**good))
    shown = "".join(traceback.format_exception(caught.value))
    for part in bad.replace(",", ":").replace(" ", ":").split(":"):
        assert len(part) < 8 or part[:8] not in shown


@pytest.mark.parametrize("bad", MALFORMED)
def test_the_error_of_a_malformed_file_names_it_and_shows_no_value(
    server_url: str, tmp_path: Path, bad: str
) -> None:
    file = tmp_path / "peppers"
    file.write_text(bad, encoding="utf-8")
    good = settings_for(server_url, "postgres").model_dump()
    good |= {"api_key_peppers": None, "api_key_peppers_file": file}
    with pytest.raises(ConfigurationError, match=r"^API_KEY_PEPPERS_FILE: ") as caught:
        Database(Settings(**good))
    assert encoded(FIRST)[:8] not in "".join(traceback.format_exception(caught.value))


def test_production_requires_peppers(server_url: str) -> None:
    values = settings_for(server_url, "postgres").model_dump() | PRODUCTION
    with pytest.raises(ConfigurationError, match="API_KEY_PEPPERS"):
        Database(Settings(**values | {"api_key_peppers": None}))
    with pytest.raises(ConfigurationError, match="API_KEY_PEPPERS"):
        Database(Settings(**values | {"api_key_peppers": ""}))
    Database(Settings(**values))

"""The format of API keys: new keys are parsed, and other text is refused."""

import json
import re
import string
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.support import factories
from tests.support.raw_keys import sent_statements, with_checksum, wrong_secret
from tests.support.servers import PRODUCTION
from tiger_db import AuditAction, Database, KeyVerifier, Settings
from tiger_db.crud import api_keys
from tiger_db.crud.api_keys import KEY_PATTERN, key_format
from tiger_db.errors import InvalidAPIKey

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
KEYS = st.sampled_from(["live", "test"]).map(
    lambda environment: key_format.new_key(environment).raw_key
)


def number(secret: str) -> int:
    value = 0
    for digit in secret:
        value = value * 62 + ALPHABET.index(digit)
    return value


@pytest.mark.parametrize("environment", ["live", "test"])
def test_a_new_key_is_parsed(environment: str) -> None:
    for _ in range(200):
        made = key_format.new_key(environment)
        assert key_format.parse_key(made.raw_key) == made
        form = re.fullmatch(
            rf"(tdb_{environment}_[0-9A-Za-z]{{12}})_([0-9A-Za-z]{{43}})([0-9A-Za-z]{{6}})",
            made.raw_key,
        )
        assert form is not None
        assert (form[1], form[2] + form[3]) == (made.prefix, made.secret)
        assert form[3] == key_format.checksum(f"{form[1]}_{form[2]}")
        assert made.secret not in repr(made)


def test_the_checksum_is_crc_32_in_base62() -> None:
    assert (
        number(key_format.checksum("123456789")) == 0xCBF43926
    )  # the check value of the CRC catalogue
    assert key_format.checksum("") == "000000"


def test_a_key_is_256_random_bits() -> None:
    made = [key_format.new_key("test") for _ in range(64)]
    secrets = [number(key.secret[:43]) for key in made]
    ones, zeros = 0, 0
    for secret in secrets:
        assert secret < 2**256
        ones |= secret
        zeros |= ~secret
    assert (
        ones == zeros & (2**256 - 1) == 2**256 - 1
    )  # each bit is set in some keys, and unset in others
    quarters = {secret >> shift & (2**64 - 1) for secret in secrets for shift in (0, 64, 128, 192)}
    assert len(quarters) == 4 * 64  # no part is repeated
    ids = [key.prefix[-12:] for key in made]
    assert len(set(ids)) == 64
    assert {letter for public_id in ids for letter in public_id} == set(ALPHABET)


@pytest.mark.slow
async def test_the_prefix_names_the_environment(clone_settings: Settings) -> None:
    for environment, word in (("production", "live"), ("staging", "test"), ("development", "test")):
        settings = clone_settings.model_copy(update=PRODUCTION | {"environment": environment})
        async with Database(settings) as database, database.session() as session:
            key, raw_key = await factories.api_key(session)
            _, rotated = await api_keys.rotate(session, key.id)
            assert await api_keys.verify_api_key(session, rotated)
        assert re.match(rf"tdb_{word}_", key.key_prefix)
        assert raw_key.startswith(f"{key.key_prefix}_")
        assert rotated.startswith(f"tdb_{word}_")
        other = "test" if word == "live" else "live"
        assert key_format.parse_key(raw_key.replace(f"tdb_{word}", f"tdb_{other}")) is None


# Typos


@given(
    raw_key=KEYS, at=st.integers(0, 70), letter=st.sampled_from(ALPHABET + "_-") | st.characters()
)
@example(raw_key=key_format.new_key("test").raw_key, at=40, letter="٣")  # a digit that is not ASCII
@example(raw_key=key_format.new_key("live").raw_key, at=15, letter="３")  # noqa: RUF001  # a wide digit
@example(raw_key=key_format.new_key("live").raw_key, at=70, letter="\n")
def test_a_mistyped_character_is_detected(raw_key: str, at: int, letter: str) -> None:
    assert len(raw_key) == 71
    assume(raw_key[at] != letter)
    assert key_format.parse_key(raw_key[:at] + letter + raw_key[at + 1 :]) is None


@given(raw_key=KEYS, at=st.integers(0, 69))
def test_swapped_neighbours_are_detected(raw_key: str, at: int) -> None:
    assume(raw_key[at] != raw_key[at + 1])
    swapped = raw_key[:at] + raw_key[at + 1] + raw_key[at] + raw_key[at + 2 :]
    assert key_format.parse_key(swapped) is None


@given(raw_key=KEYS, at=st.integers(0, 70), more=st.text(min_size=1, max_size=3))
@example(raw_key=key_format.new_key("test").raw_key, at=0, more="\n")
def test_a_key_that_is_too_short_or_too_long_is_refused(raw_key: str, at: int, more: str) -> None:
    cut = [raw_key[:at], raw_key[at + 1 :], raw_key[:at] + raw_key[at + 1 :]]
    extended = [raw_key + more, more + raw_key, raw_key[:at] + more + raw_key[at:]]
    around = [f" {raw_key}", f"{raw_key}\n", f"\t{raw_key} ", f"{raw_key}\0", f"\ufeff{raw_key}"]
    resealed = [
        with_checksum(raw_key + "0"),
        with_checksum(f"{raw_key}_"),
        with_checksum(raw_key[:-7]),
    ]
    for wrong in (*cut, *extended, *around, *resealed):
        assert key_format.parse_key(wrong) is None


@given(anything=st.text() | st.binary() | st.none() | st.integers())
def test_other_values_are_refused(anything: Any) -> None:
    assert key_format.parse_key(anything) is None


def test_bytes_and_another_case_are_refused() -> None:
    raw_key: Any = key_format.new_key("test").raw_key
    wrongs: list[Any] = [raw_key.encode(), bytearray(raw_key.encode()), [raw_key], raw_key.upper()]
    for wrong in wrongs:
        assert key_format.parse_key(wrong) is None
    assert key_format.parse_key(with_checksum("tdb_prod_" + "0" * 12 + "_" + "0" * 43)) is None
    assert key_format.parse_key(with_checksum("tdb_test_" + "0" * 12 + "_" + "0" * 43)) is not None


async def test_a_malformed_key_is_refused_without_a_statement(clone: Database) -> None:
    async with clone.session() as session:
        _, good = await factories.api_key(session)
    wrongs: list[Any] = [
        "", "nonsense", None, good.encode(), good[:-1], good + "0", f"{good}\n", f" {good}",
        f"Bearer {good}", good.swapcase(), good[:-1] + ("0" if good[-1] != "0" else "1"),
        good[:30] + ("0" if good[30] != "0" else "1") + good[31:], good[:-1] + "٣", "\ud800" * 71,
    ]  # fmt: skip
    verifier = KeyVerifier(clone)
    for wrong in wrongs:
        with sent_statements(clone) as sent:
            async with clone.session() as session:
                assert await api_keys.verify_api_key(session, wrong) is None
                assert await api_keys.find_by_raw_key(session, wrong) is None
                with pytest.raises(InvalidAPIKey):
                    await api_keys.authorize_api_key(session, wrong)
            with pytest.raises(InvalidAPIKey):
                await verifier.authorize(wrong)
        assert sent == [], wrong
    with sent_statements(clone) as sent:  # the recording works
        async with clone.session() as session:
            assert await api_keys.verify_api_key(session, wrong_secret(good)) is None
    assert "a connection" in sent
    assert any("api_keys" in statement for statement in sent)
    async with clone.session() as session:
        assert (await factories.events(session))[-1].action == AuditAction.API_KEY_DENY


# The pattern for scanners


@given(
    raw_key=KEYS,
    before=st.text(
        st.characters(exclude_characters="_", exclude_categories=["L", "N", "Mn", "Cs"])
    ),
    after=st.text(st.characters(exclude_characters="_", exclude_categories=["L", "N", "Mn", "Cs"])),
)
def test_the_pattern_finds_a_key_in_a_text(raw_key: str, before: str, after: str) -> None:
    for found_in in (
        f"{before}{raw_key}{after}",
        f"a word {before} {raw_key} {after} 12 words",
        json.dumps({"key": raw_key, before: after}),
        f"https://x/?key={raw_key}&b=1",
        f"API_KEY='{raw_key}'",
    ):
        assert re.findall(KEY_PATTERN, found_in) == [raw_key]


@given(raw_key=KEYS, at=st.integers(0, 70))
def test_the_pattern_finds_nothing_shorter_or_longer(raw_key: str, at: int) -> None:
    for other in (raw_key[:at], raw_key[:at] + raw_key[at + 1 :], raw_key[at + 1 :]):
        assert re.search(KEY_PATTERN, other) is None
    for longer in (
        f"{raw_key}0",
        f"x{raw_key}",
        f"{raw_key}_",
        raw_key.replace("tdb_test", "tdb_prod"),
    ):
        assert longer == raw_key or re.search(KEY_PATTERN, longer) is None

"""Seal format: Merkle root, ranges of positions, and seals as JSON."""

import hashlib
import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

from tiger_db.audit.seal_format import (
    DIGEST_BYTES,
    SealPayload,
    digest_of,
    make_seal,
    merkle_root,
    positions_in,
    ranges_of,
    seal_from_json,
    seal_to_json,
)
from tiger_db.errors import InvalidValue
from tiger_db.signing import generate_signing_key, parse_signing_key

any_digest = st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)
positions_or_none = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=70, unique=True).map(sorted)


def root_of(leaves: list[bytes]) -> bytes:
    """Compute the root as defined in RFC 6962, section 2.1."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + root_of(leaves[:k]) + root_of(leaves[k:])).digest()


@profile(deadline=None)
@given(positions=positions_or_none, seed=st.binary())
def test_the_root_is_that_of_rfc_6962(positions: list[int], seed: bytes) -> None:
    leaves = [
        (position, hashlib.sha256(seed + b"%d" % position).digest()) for position in positions
    ]
    assert merkle_root(leaves) == root_of(
        [position.to_bytes(8, "big", signed=True) + digest for position, digest in leaves]
    )


def test_the_root_for_every_number_of_leaves() -> None:
    for count in range(71):
        leaves = [(position, digest_of(str(position))) for position in range(1, count + 1)]
        expected = root_of([position.to_bytes(8, "big") + digest for position, digest in leaves])
        assert merkle_root(leaves) == expected, count


@given(positions=st.lists(st.integers(0, 90), unique=True).map(sorted))
def test_ranges_contain_their_positions(positions: list[int]) -> None:
    runs = ranges_of(positions)
    assert [*positions_in(runs)] == positions
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(runs))
    assert a_payload(positions=runs).event_count == len(positions)


def a_payload(**values: Any) -> SealPayload:
    some: dict[str, Any] = {
        "number": 7, "previous": "0" * 64, "after": 3, "upto": 9, "positions": ((4, 5), (8, 9)),
        "root": "f" * 64, "sealed_at": "2026-01-01T00:00:00.000000Z", "key": "k",
    }  # fmt: skip
    return SealPayload(**some | values)


any_position = st.integers(-(2**63) + 2, 2**63 - 2)
any_payload = st.builds(
    SealPayload,
    number=st.integers(1, 2**63 - 2), previous=st.text(), after=any_position, upto=any_position,
    positions=st.lists(st.tuples(any_position, any_position)).map(tuple), root=st.text(),
    sealed_at=st.text(), key=st.text(), closed_at=st.none() | st.text(),
    retired=st.none() | st.text(), version=st.just(2),
    origin=st.from_regex(r"\A[0-9a-f]{32}\Z"), next_key=st.none() | st.text(),
)  # fmt: skip


@pytest.mark.slow
@given(payload=any_payload, digests=st.lists(any_digest, max_size=3).map(b"".join))
def test_a_seal_is_read_as_it_was_written(payload: SealPayload, digests: bytes) -> None:
    key = parse_signing_key(generate_signing_key())
    seal = make_seal(key, payload, digests)
    assert seal.payload() == payload
    assert seal.payload().to_json() == seal.payload_json == payload.to_json()
    again = seal_from_json(json.loads(json.dumps(seal_to_json(seal))))
    assert again == seal
    assert again.is_signed_by([parse_signing_key(generate_signing_key()).public_key()]) is False
    assert again.is_signed_by([key.public_key()]) is True
    without = {name: value for name, value in seal_to_json(seal).items() if name != "digests"}
    assert seal_from_json(without) == replace(seal, digests=b"")


BAD_VALUES: list[dict[str, Any]] = [
    {"version": 2},  # without an origin
    {"origin": "0" * 32},  # in version 1
    {"next_key": "k"},
    {"version": 2, "origin": "0" * 31},
    {"version": 2, "origin": "G" * 32},
    {"version": 2, "origin": "0" * 32 + "\n"},
    {"version": 3, "origin": "0" * 32},
]


def test_malformed_seals_are_refused() -> None:
    key = parse_signing_key(generate_signing_key())
    good = seal_to_json(make_seal(key, a_payload(), b""))
    bads: list[object] = [
        None, [], "", {}, {**good, "statement": 1}, {**good, "statement": "{}"},
        {**good, "statement": good["statement"] + " "}, {**good, "signature": "*"},
        {**good, "signature": None}, {**good, "digests": "-"},
        {**good, "statement": good["statement"].replace('"version":1', '"version":2')},
        {**good, "statement": good["statement"].replace('"key"', '"lock"')},
        *(seal_to_json(make_seal(key, a_payload(**values), b"")) for values in BAD_VALUES),
    ]  # fmt: skip
    for bad in bads:
        with pytest.raises(InvalidValue):
            seal_from_json(bad)

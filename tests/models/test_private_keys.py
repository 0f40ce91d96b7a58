"""Private keys in all formats. The keys are generated: the repository contains none."""

import base64
import subprocess
import textwrap
from time import process_time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support import factories
from tests.support.private_keys import FORMS, KEY, NO_PASSWORD, der, pem
from tiger_db import PrivateKeyFormat
from tiger_db.errors import InvalidValue
from tiger_db.models import private_keys
from tiger_db.tiger import parse_private_key

formats = pytest.mark.parametrize("form", FORMS)


def refused(text: str) -> str:
    with pytest.raises(InvalidValue) as caught:
        parse_private_key(text)
    return str(caught.value)


@formats
def test_every_spelling_gives_tigers_form(form: PrivateKeyFormat) -> None:
    bare, full = der(form), pem(form)
    spellings = [
        bare,
        f"  {bare}\r\n",
        "\n".join(textwrap.wrap(bare, 64)),
        "\t".join(textwrap.wrap(bare, 7)),
        full,
        full.replace("\n", "\r\n"),
        full.replace("\n", " "),
        full.replace("\n", ""),
        full.replace("\n", "\\n"),
        f"Some Header: x\n\n{full}\ntrailing words",
    ]
    for spelling in spellings:
        assert parse_private_key(spelling) == (bare, form)


@formats
def test_content_decides_the_format_not_the_label(form: PrivateKeyFormat) -> None:
    for label in ("PRIVATE KEY", "RSA PRIVATE KEY"):
        text = f"-----BEGIN {label}-----\n{der(form)}\n-----END {label}-----"
        assert parse_private_key(text) == (der(form), form)


@pytest.mark.parametrize("traditional", [True, False])
def test_keys_of_openssl(traditional: bool) -> None:
    command = ["openssl", "genrsa", *(["-traditional"] if traditional else []), "1024"]
    made = subprocess.run(command, capture_output=True, check=True, text=True)
    wanted = PrivateKeyFormat.PK1 if traditional else PrivateKeyFormat.PK8
    assert parse_private_key(made.stdout)[1] == wanted


@formats
def test_passphrase(form: PrivateKeyFormat) -> None:
    assert "passphrase" in refused(pem(form, BestAvailableEncryption(b"hunter22")))


def test_other_keys() -> None:
    public = KEY.public_key()
    elliptic = ec.generate_private_key(ec.SECP256R1())
    pkcs8 = elliptic.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NO_PASSWORD).decode()
    assert "not an RSA key" in refused(pkcs8)
    for text in (
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(),
        base64.b64encode(public.public_bytes(Encoding.DER, PublicFormat.PKCS1)).decode(),
        elliptic.private_bytes(
            Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NO_PASSWORD
        ).decode(),
        KEY.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NO_PASSWORD).decode(),
    ):
        assert "not an RSA key in PEM" in refused(text)


@formats
def test_damaged_keys_are_refused_and_not_shown(form: PrivateKeyFormat) -> None:
    bare = der(form)
    middle = len(bare) // 2
    other = "A" if bare[middle] != "A" else "B"
    for text in (
        bare[:-8],
        bare[8:],
        bare[:middle] + other + bare[middle + 1 :],
        bare[:middle] + "!" + bare[middle:],
        bare + base64.b64encode(b"more").decode(),
        bare + bare,
        pem(form).replace("-----END", ""),
        pem(form).replace("M", "\N{GRINNING FACE}", 1),
    ):
        message = refused(text)
        assert "\n" not in message
        assert not any(bare[start : start + 8] in message for start in range(0, len(bare), 8))


def test_a_text_that_is_too_long_for_a_key_is_refused() -> None:
    for text in ("-----BEGIN PRIVATE KEY-----" * 741, "A" * 20_001):
        assert refused(text) == "a private key must have at most 20,000 characters"
        with pytest.raises(ValidationError, match="private key must have at most 20,000"):
            factories.new_account(private_key=text)
    assert "not an RSA key" in refused("A" * 20_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["-----BEGIN PRIVATE KEY-----", "-----BEGIN ", "-----BEGIN A ", "-"]
)
def test_a_long_text_is_parsed_in_linear_time(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_keys, "MAX_KEY_CHARACTERS", 10**6)

    def seconds(characters: int) -> float:
        begun = process_time()
        refused(text * (characters // len(text)))
        return process_time() - begun

    # Ten times in linear time, and a hundred times in quadratic time.
    assert min(seconds(1_000_000) for _ in range(3)) < 40 * max(seconds(100_000), 0.001)


@pytest.mark.slow
@given(
    st.one_of(
        st.text(),
        st.binary().map(lambda some: base64.b64encode(some).decode()),
        st.text().map(lambda some: f"-----BEGIN PRIVATE KEY-----{some}-----END PRIVATE KEY-----"),
    )
)
def test_garbage(text: str) -> None:
    message = refused(text)
    assert len(message) < 100
    assert len(text.strip()) < 8 or text not in message


@given(st.data())
def test_one_changed_character_never_passes_for_another_key(data: st.DataObject) -> None:
    bare = der(PrivateKeyFormat.PK8)
    place = data.draw(st.integers(0, len(bare) - 1))
    letter = data.draw(st.characters(codec="utf-8"))
    text = bare[:place] + letter + bare[place + 1 :]
    try:
        stored, form = parse_private_key(text)
    except InvalidValue:
        return
    # What is left are spellings of the very same key.
    assert (stored, form) == (bare, PrivateKeyFormat.PK8)

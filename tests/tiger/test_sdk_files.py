"""Exported files, read by Tiger's real SDK."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tigeropen.common.util.signature_utils import load_private_key, sign_with_rsa

from tests.support.factories import account as stored_account
from tests.support.private_keys import FORMS, KEY, der, pem
from tests.support.sdk_gateway import loaded, signed
from tests.support.tiger_files import EVERYTHING, NEW, PK1, PK8, REQUIRED, config
from tiger_db import Database, PrivateKeyFormat
from tiger_db.tiger import CONFIG_FILE, client_config, export_account, import_account
from tiger_db.tiger.properties import format_properties


def said(config: Any) -> dict[str, Any]:
    """Return all values of a configuration of the SDK."""
    return {name: value for name, value in vars(config).items() if name != "props_path"}


OF_BOTH = {"private_key_pk1": PK1, "private_key_pk8": PK8}


@pytest.mark.parametrize(
    "lines",
    [
        {"private_key_pk1": PK1},
        {"private_key_pk8": PK8},
        {"private_key": PK1},
        {"private_key": PK8},
        OF_BOTH,
        OF_BOTH | {"license": "TBUS", "server_url": "https://example.com/a=b:c"},
        OF_BOTH
        | {"license": "TBHK", "secret_key": "é=:#!", "token": NEW, "timeout": "x", "language": "y"},
        {name: EVERYTHING[name] for name in EVERYTHING if not name.startswith("private_key")}
        | OF_BOTH,
        {"private_key_pk1": PK1, "env": "TEST"},
    ],
)
async def test_our_files_say_what_those_imported_said(
    clone: Database, tmp_path: Path, lines: dict[str, str]
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    path = config(theirs, {"tiger_id": "20150001", "account": "2" * 17, **lines})
    async with clone.session() as session:
        account = (await import_account(session, path)).account
    await export_account(clone, account.id, folder=ours)
    before, after = loaded(theirs), loaded(ours)
    # The same key, although the SDK may find another format of it first.
    numbers = [load_private_key(each.private_key).private_numbers() for each in (before, after)]
    assert numbers == [KEY.private_numbers()] * 2
    if "private_key_pk8" in lines:
        assert after.private_key == before.private_key
    assert said(after) | {"_private_key": ""} == said(before) | {"_private_key": ""}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spelling", [der, pem])
async def test_the_sdk_signs_with_the_key_that_was_imported(
    clone: Database, tmp_path: Path, form: PrivateKeyFormat, spelling: Any
) -> None:
    path = config(tmp_path, REQUIRED | {"private_key_pk8": spelling(form)}, "given")
    async with clone.session() as session:
        account = (await import_account(session, path)).account
    await export_account(clone, account.id, folder=tmp_path)
    for ready in (loaded(tmp_path), client_config(account)):
        assert signed(sign_with_rsa(ready.private_key, "a=b&c=é", "UTF-8"), "a=b&c=é")
        assert not signed(sign_with_rsa(ready.private_key, "a=b&c=é", "UTF-8"), "a=b&c=e")


async def test_the_sdk_reads_either_line_of_our_files(clone: Database, tmp_path: Path) -> None:
    async with clone.session() as session:
        account = await stored_account(session, private_key=PK1)
    (path,) = await export_account(clone, account.id, folder=tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    for number in (0, 1):
        path.write_text("".join(lines[:number] + lines[number + 1 :]))
        assert loaded(tmp_path).private_key == (PK8, PK1)[number]
        assert signed(sign_with_rsa(loaded(tmp_path).private_key, "text", "UTF-8"), "text")


@given(value=st.text(st.characters(codec="utf-8"), min_size=1))
def test_the_sdk_reads_every_value_back(
    tmp_path_factory: pytest.TempPathFactory, value: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    lines = {"secret_key": value, "tiger_id": "1", "token": f"a{value}"}
    (folder / CONFIG_FILE).write_text(format_properties(lines), encoding="utf-8", newline="")
    read = loaded(folder)
    assert (read.secret_key, read.tiger_id) == (value if value.strip() else "", "1")
    assert read.token == f"a{value}"

"""Commands for encryption keys."""

import re

import pytest

from tests.support.cli_accounts import NUMBER, create, stored
from tests.support.command_line import KEYS, CommandLine
from tests.support.factories import plain
from tiger_db.encryption import KeyRing

TABLE = "tiger_accounts"


@pytest.fixture
def new_key(cli: CommandLine) -> str:
    return cli.ok("generate-encryption-key", "--id", "new").out.strip()


def test_each_generated_key_is_one_line_and_unique(bare: CommandLine) -> None:
    made = [bare.ok("generate-encryption-key") for _ in range(2)]
    assert made[0].out != made[1].out
    for result in made:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d-[0-9a-f]{4}:[A-Za-z0-9+/]{43}=:v2\n", result.out)
        assert len(KeyRing.parse(result.out).key_ids) == 1
        assert "add the new key at the end of ENCRYPTION_KEYS" in result.err
        assert result.out.split(":")[1] not in result.err
    assert "key id" in bare.fails("generate-encryption-key", "--id", "a b")


@pytest.mark.slow
def test_keys_are_listed_with_the_number_of_rows_that_need_them(
    cli: CommandLine, new_key: str
) -> None:
    create(cli)
    keys = f"{new_key},{KEYS}"
    listed = cli.ok("list-encryption-keys", "--json", ENCRYPTION_KEYS=keys).json
    assert listed == {
        "items": [
            {"key_id": "new", "role": "encrypts", "table": None, "rows": 0},
            {"key_id": "test", "role": "decrypts", "table": TABLE, "rows": 1},
        ],
        "next_cursor": None,
    }
    alone = cli.ok("list-encryption-keys", ENCRYPTION_KEYS=new_key)
    assert [line.split() for line in alone.out.splitlines()] == [
        ["Key", "Role", "Table", "Rows"],
        ["new", "encrypts", "0"],
        ["test", "missing", TABLE, "1"],
    ]
    assert new_key.split(":")[1] not in alone.out + alone.err


@pytest.mark.slow
def test_rotation_reports_the_key_that_can_be_removed(cli: CommandLine, new_key: str) -> None:
    create(cli)
    both = {"ENCRYPTION_KEYS": f"{new_key},{KEYS}"}
    tried = cli.ok("rotate-encryption-key", "--dry-run", **both)
    assert (
        "rows that can be re-encrypted with 'new': 1; rows that cannot be re-encrypted: 0\n"
        in tried.err
    )
    assert "no row needs" not in tried.err
    assert cli.ok("list-encryption-keys", "--json").json["items"][0]["rows"] == 1
    done = cli.ok("rotate-encryption-key", **both)
    assert (
        "rows that were re-encrypted with 'new': 1; rows that cannot be re-encrypted: 0\n"
        in done.err
    )
    assert "no row needs the encryption key 'test'. When 'new' is the first key of" in done.err
    again = cli.ok("rotate-encryption-key", "--json", **both)
    assert again.json == {
        "key_id": "new", "rotated": 0, "stuck": 0, "problems": [],
        "uses": [{"table": TABLE, "key_id": "new", "rows": 1, "unbound": 0}],
        "retirable": ["test"],
    }  # fmt: skip
    cli.env["ENCRYPTION_KEYS"] = new_key
    assert plain(stored(cli).private_key) == "test_key"


@pytest.mark.slow
def test_rotation_fails_while_a_row_needs_a_missing_key(cli: CommandLine, new_key: str) -> None:
    create(cli)
    for option in ("--dry-run", "--json"):
        result = cli("rotate-encryption-key", option, ENCRYPTION_KEYS=new_key)
        assert result.code == 1
        assert "'test' is not configured" in result.err
        assert "(account ****0321)" in result.err
        assert NUMBER not in result.out + result.err
        assert "error: some rows still need other encryption keys: keep test" in result.err
    assert plain(stored(cli).private_key) == "test_key"


def test_rotation_without_keys_fails(cli: CommandLine) -> None:
    del cli.env["ENCRYPTION_KEYS"]
    assert "ENCRYPTION_KEYS is not set" in cli.fails("rotate-encryption-key")

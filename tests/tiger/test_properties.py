"""Properties files: reading, formatting and file modes."""

import subprocess
import sys
from pathlib import Path
from time import process_time

import javaproperties
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiger_files import mode, names
from tiger_db.errors import AlreadyExists, InvalidValue
from tiger_db.files import write_private
from tiger_db.tiger.properties import format_properties, read_properties

# Writes two files twice; at every system call says the modes of what is in the folder.
LOOKING = """
import os, sys
from pathlib import Path
from time import process_time
from tiger_db.files import write_private
os.umask(0)
folder = Path(sys.argv[1])
def look(event, arguments):
    if event in ("os.link", "os.rename", "os.remove"):
        print(*(oct(path.stat().st_mode & 0o777) for path in folder.iterdir()))
sys.addaudithook(look)
for overwrite in (False, True):
    write_private(folder, {"a": "1", "b": "2"}, overwrite=overwrite)
"""
# Writes two files, and dies before the one that is named gets its name.
DYING = """
import os, sys
from pathlib import Path
from time import process_time
from tiger_db.files import write_private
folder, name = sys.argv[1:]
def die(event, arguments):
    if event in ("os.link", "os.rename") and str(arguments[1]).endswith(name):
        os._exit(9)
sys.addaudithook(die)
write_private(Path(folder), {"a": "new" * 100, "b": "new" * 100}, overwrite=True)
"""


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5))
def test_every_value_is_read_back(values: list[str]) -> None:
    lines = {f"key_{number}": value for number, value in enumerate(values)}
    written = format_properties(lines)
    assert javaproperties.loads(written) == {k: v for k, v in lines.items() if v.strip()}
    assert written.count("\n") == len(written.splitlines())


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="\\ ")))
def test_plain_values_are_written_as_they_are(value: str) -> None:
    assert format_properties({"key": value}) == (f"key={value}\n" if value else "")


@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_whatever_is_read_is_text_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(content)
    try:
        values = read_properties(path)
    except InvalidValue:
        return
    assert all(value and value == value.strip() for value in values.values())


@given(text=st.text(st.sampled_from("ab=:#! \\\r\n\f\tn")) | st.text(st.characters(codec="utf-8")))
def test_a_file_without_pem_is_read_like_javaproperties(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(text.encode())
    try:
        wanted = javaproperties.loads(text.removeprefix("\ufeff"))
    except javaproperties.InvalidUEscapeError:
        return
    found = {key: value.strip() for key, value in wanted.items() if value.strip()}
    assert read_properties(path) == found


@pytest.mark.parametrize(
    "line",
    ["-----BEGIN A-----\n", "a=-----BEGIN A-----\\\n", "-----BEGIN ", "a\\\n", "\\ =", "a=\\"],
)
@pytest.mark.slow
def test_a_long_file_is_read_in_linear_time(tmp_path: Path, line: str) -> None:
    def seconds(characters: int) -> float:
        (tmp_path / "long").write_text(line * (characters // len(line)))
        begun = process_time()
        read_properties(tmp_path / "long")
        return process_time() - begun

    # Ten times in linear time, and a hundred times in quadratic time.
    assert min(seconds(200_000) for _ in range(3)) < 40 * max(seconds(20_000), 0.001)


def test_a_file_is_read_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "large"
    value = "é" * 499_999
    path.write_bytes(f"a={value}".encode())  # 1,000,000 bytes
    assert read_properties(path) == {"a": value}
    for more in ("x", "é"):  # of the latter, the limit takes the half
        path.write_bytes(f"a={value}{more}".encode())
        with pytest.raises(InvalidValue, match="large: the file is too large"):
            read_properties(path)


@pytest.mark.slow
def test_no_file_is_ever_open_to_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOOKING, str(tmp_path)]
    seen = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert len(seen) > 10
    assert {*seen} == {"0o600"}


def test_a_file_that_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("mine")
    with pytest.raises(AlreadyExists, match=str(tmp_path / "b")):
        write_private(tmp_path, {"a": "1", "b": "2"}, overwrite=False)
    assert names(tmp_path) == ["b"]
    assert (tmp_path / "b").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize(("dies_at", "left"), [("/a", (None, "old")), ("/b", ("new" * 100, "old"))])
def test_a_crash_leaves_whole_files(
    tmp_path: Path, dies_at: str, left: tuple[str | None, str]
) -> None:
    (tmp_path / "b").write_text("old")
    command = [sys.executable, "-c", DYING, str(tmp_path), dies_at]
    assert subprocess.run(command, check=False).returncode == 9
    found = [
        path.read_text() if path.exists() else None for path in (tmp_path / "a", tmp_path / "b")
    ]
    assert tuple(found) == left
    assert {mode(path) for path in tmp_path.iterdir() if path.name != "b"} == {0o600}

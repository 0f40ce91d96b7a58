"""The project of a user that docs/testing.md describes, with ten tests."""

import re
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs/testing.md"
TESTS = 10
OPTIONS = ("-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "-o", "pythonpath=.")


def write_project(folder: Path) -> None:
    """Write each code block of the page to the file that the line before the block names."""
    page = _PAGE.read_text(encoding="utf-8")
    files = re.findall(r"^`([\w/]+\.py)`:\n\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(files) == page.count("```python")
    for name, text in files:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")

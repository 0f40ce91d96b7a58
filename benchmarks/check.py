"""Compare the ratios of the most important paths with those in RESULTS.md: `make bench-check`."""

import asyncio
import re
import sys
from pathlib import Path

from benchmarks.__main__ import compared_with_bare
from tiger_db.testing import servers

TOLERANCE = 1.25  # a ratio is worse if it is more than a quarter above the ratio in RESULTS.md
_ROW = re.compile(
    r"^\| (?P<name>[^|]+) \| [\d.,]+ \| [\d.,]+ \| (?P<ratio>[\d.]+) \|$", re.MULTILINE
)


def committed_ratios() -> dict[str, float]:
    text = Path(__file__).with_name("RESULTS.md").read_text(encoding="utf-8")
    return {row["name"]: float(row["ratio"]) for row in _ROW.finditer(text)}


def main() -> None:
    committed = committed_ratios()
    server = servers.choose(in_memory=False)
    try:
        results = asyncio.run(compared_with_bare(server))
    finally:
        server.stop()
    if missing := [result.name for result in results if result.name not in committed]:
        sys.exit(f"RESULTS.md lacks {', '.join(missing)}: run `make bench`")
    worse = [result for result in results if result.ratio > committed[result.name] * TOLERANCE]
    for result in worse:
        before = committed[result.name]
        change = result.ratio / before - 1
        print(f"worse by {change:.0%}: {result.name}: {before:.2f} before, {result.ratio:.2f} now")
    if not worse:
        print(f"none of {len(results)} ratios is worse by a quarter than in RESULTS.md")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()

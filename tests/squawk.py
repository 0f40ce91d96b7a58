"""Check the SQL of every migration with squawk; `make lint` runs this."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tiger_db.migrations import history, migration_sql

SQUAWK = Path(sys.executable).with_name("squawk")
CONFIGURATION = Path(__file__).parents[1] / ".squawk.toml"


def main() -> int:
    """Run squawk and return its exit code.

    `squawk_ignore` of a migration has the rules that are ignored, each with a reason.
    """
    with TemporaryDirectory() as folder:
        for script in history():
            ignored: dict[str, str] = getattr(script.module, "squawk_ignore", {})
            assert all(ignored.values()), f"{script.path}: squawk_ignore lacks a reason"
            header = f"-- squawk-ignore-file {', '.join(ignored)}\n" if ignored else ""
            follows = script.down_revision
            if not (follows is None or isinstance(follows, str)):
                continue  # a merge of branches has no SQL
            written = header + migration_sql(follows, script.revision)
            Path(folder, f"{Path(script.path).stem}.sql").write_text(written, encoding="utf-8")
        files = sorted(Path(folder).iterdir())
        return subprocess.run([SQUAWK, "--config", CONFIGURATION, *files], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

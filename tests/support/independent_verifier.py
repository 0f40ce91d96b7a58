"""The verifier of exports in examples/, which does not use tiger_db."""

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples" / "verify_export.py"


def run(lines: list[str], key: str, folder: Path, checkpoint: str | None = None) -> str:
    """Return the output, or the message of the refusal after `refused: `."""
    file, head = folder / "trail.jsonl", folder / "checkpoint.json"
    file.write_text("".join(lines), encoding="utf-8")
    arguments = [str(file), key]
    if checkpoint is not None:
        head.write_text(checkpoint, encoding="utf-8")
        arguments.append(str(head))
    done = subprocess.run(
        [sys.executable, "-I", str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return done.stdout.strip()
    return f"refused: {done.stderr.strip().splitlines()[-1]}"

"""The code of docs/archive.md, beside an archive of two months."""

import asyncio
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.docs.pages import blocks
from tests.support.archives import archive_settings
from tiger_db import Database, Settings, audit
from tiger_db.connections import connect
from tiger_db.testing import environment_of

PAGE = "docs/archive.md"
# Three orders and an error of each of two users a day, on the first two days of two months.
PUT = """
INSERT INTO audit_logs
    (id, created_at, action, result, severity, user_id, tiger_account_id, details)
SELECT (left(uuid7_floor(at)::text, 24) || lpad(to_hex(n), 12, '0'))::uuid, at,
    'trade:place_order', CASE WHEN n % 5 < 3 THEN 'success' ELSE 'error' END::audit_result, 'low',
    CASE WHEN n % 5 = 3 THEN 'alice' ELSE 'bob' END,
    CASE WHEN n % 5 < 3 THEN '00000000-0000-4000-8000-000000000001'::uuid END,
    '{"symbol": "AAPL"}'
FROM (SELECT n, start + n / 5 * interval '1 day' + n % 5 * interval '1 hour' AS at
    FROM generate_series(0, 9) AS n,
    unnest(ARRAY[timestamptz '2025-02-01Z', timestamptz '2025-03-01Z']) AS start) AS t
"""


async def _archive(settings: Settings) -> None:
    connection = await connect(settings)
    await connection.execute(PUT)
    await connection.fetchval("SELECT make_audit_months(0)")
    await connection.close()
    async with Database(settings) as database:
        await audit.seal(database)
        assert (await audit.maintain(database)).retired == ["2025-02", "2025-03"]


@pytest.mark.slow
def test_the_code_of_the_page_runs(clone_settings: Settings, tmp_path: Path) -> None:
    assert datetime.now(UTC).year > 2025
    (tmp_path / "archive").mkdir()
    settings = archive_settings(clone_settings, str(tmp_path / "archive"))
    asyncio.run(_archive(settings))
    environ = os.environ | environment_of(settings)
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, text in blocks(PAGE):
        program = [sys.executable, "-c", text] if language == "python" else ["sh", "-ec", text]
        done = subprocess.run(
            program, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said = re.findall(r"print\(.*\)  # (.*)", text) + re.findall(
            r"^# (\[.*)", text, re.MULTILINE
        )
        assert [line for line in done.stdout.splitlines() if line in said] == said, done.stdout
        if language == "python":
            assert "2025-02" in done.stdout

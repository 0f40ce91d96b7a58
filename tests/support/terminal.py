"""A terminal in which programs run."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.support.command_line import COMMAND, CommandLine


class Terminal:
    """A terminal of 80 columns, in which programs run."""

    def __init__(self) -> None:
        self.screen, self.device = pty.openpty()
        fcntl.ioctl(self.device, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.seen = ""

    @contextmanager
    def program(
        self, cli: CommandLine, *arguments: str, start: Sequence[str] = COMMAND
    ) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen(
            [*start, *arguments],
            stdin=self.device,
            stdout=self.device,
            stderr=self.device,
            env=cli.environment(TERM="xterm"),
            start_new_session=True,
        ) as program:
            try:
                yield program
            finally:
                program.kill()

    def wait_for(self, text: str) -> None:
        """Read until the programs have shown a text.

        Raises:
            TimeoutError: they did not, in a minute; with what they have shown.
        """
        deadline = time.monotonic() + 60
        while text not in self.seen:
            if not select.select([self.screen], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(self.seen)
            self.read()

    def read(self) -> None:
        self.seen += os.read(self.screen, 65536).decode()

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def end(self, program: subprocess.Popen[bytes]) -> int:
        """Read on until the program ends; its exit code."""
        os.set_blocking(self.screen, False)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            ended = program.poll()
            try:
                self.read()
            except BlockingIOError:
                if ended is not None:
                    return ended
                time.sleep(0.01)
        raise TimeoutError(self.seen)

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.device)[3] & termios.ECHO)

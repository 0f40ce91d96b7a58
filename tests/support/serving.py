"""Examples that are served by uvicorn."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

Serve = Callable[[str], AbstractAsyncContextManager[str]]

"""Help for tests of applications: a pytest plugin, factories and a fake broker.

pytest loads the plugin in every run. Therefore, each name is imported at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiger_db.testing import factories as factories
    from tiger_db.testing.broker import FakeBroker
    from tiger_db.testing.clock import let_time_pass
    from tiger_db.testing.servers import environment_of

__all__ = ["FakeBroker", "environment_of", "factories", "let_time_pass"]
_SUBMODULES = {
    "FakeBroker": "broker",
    "environment_of": "servers",
    "let_time_pass": "clock",
}

if not TYPE_CHECKING:  # a type checker that sees `__getattr__` accepts any name

    def __getattr__(name: str) -> object:
        if name == "factories":
            return import_module("tiger_db.testing.factories")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_SUBMODULES[name]}"), name)

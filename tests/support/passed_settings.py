"""Settings for a child process, although `Settings` cannot be pickled."""

from pydantic import SecretStr

from tiger_db import Settings


class Passed:
    """An argument of a child process, which receives equal `Settings`."""

    def __init__(self, settings: Settings) -> None:
        self.values = {
            name: value.get_secret_value() if isinstance(value, SecretStr) else value
            for name in settings.model_fields_set
            for value in [getattr(settings, name)]
        }

    def __reduce__(self) -> tuple[object, ...]:
        return _settings, (self.values,)


def _settings(values: dict[str, object]) -> Settings:
    return Settings(**values)

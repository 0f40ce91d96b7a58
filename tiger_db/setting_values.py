"""The types of settings: how the text of an environment variable becomes a value."""

import re
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from tiger_db.database_urls import DEFAULT_PORT

StrOrPath = TypeVar("StrOrPath", str, Path)
_MAX_IDENTIFIER_BYTES = 63


def _without_nul(value: StrOrPath) -> StrOrPath:
    if "\0" in str(value):
        raise ValueError("the value must not contain a NUL character")
    return value


def _utf8_secret(value: SecretStr) -> SecretStr:
    try:
        _without_nul(value.get_secret_value()).encode()
    except UnicodeEncodeError:
        raise ValueError("the value must be UTF-8 text") from None
    return value


def _iso_date(value: object) -> object:
    """Convert a text such as 2027-01-31 to a date. Return a date unchanged.

    Raises:
        ValueError: the value is neither a date nor a text of the form YYYY-MM-DD.
    """
    if type(value) is date:
        return value
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII):
        with suppress(ValueError):
            return date.fromisoformat(value)
    raise ValueError("the value must be a date such as 2027-01-31")


def _port(value: object) -> object:
    """Return the default port for a text such as tcp://10.96.0.1:5432, and other values unchanged.

    For a Service named `db`, Kubernetes sets DB_PORT to such a text in each container.
    """
    service = isinstance(value, str) and re.fullmatch(r"(?:tcp|udp|sctp)://\S+:\d+", value)
    return DEFAULT_PORT if service else value


def _schema_name(value: str) -> str:
    if len(value.encode()) > _MAX_IDENTIFIER_BYTES:
        raise ValueError(f"the name of a schema must have at most {_MAX_IDENTIFIER_BYTES} bytes")
    if value.startswith("pg_") or value in ("information_schema", "$user"):
        raise ValueError("PostgreSQL reserves this name: choose another name for the schema")
    return value


def _archive(value: str) -> str:
    """Check the location of the archive: a folder, or `s3://bucket/prefix`."""
    scheme, separator, rest = value.partition("://")
    if separator and (scheme != "s3" or not re.match(r"[^/?#@]", rest)):
        raise ValueError("the value must be a folder, or a URL such as s3://bucket/prefix")
    if "@" in rest.partition("/")[0]:
        raise ValueError("the URL must not contain credentials: set the variables of AWS")
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
File = Annotated[Path, AfterValidator(_without_nul)]
Port = Annotated[int, BeforeValidator(_port), Field(ge=1, le=65535)]
SecretText = Annotated[SecretStr, AfterValidator(_utf8_secret)]
Date = Annotated[date, BeforeValidator(_iso_date)]
SchemaName = Annotated[Text, AfterValidator(_schema_name)]
Archive = Annotated[Text, AfterValidator(_archive)]

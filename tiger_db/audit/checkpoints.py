"""Checkpoints: seals without digests, as JSON, and the folder in which a sealer keeps them."""

import json
import os
import re
from pathlib import Path

from tiger_db.audit.seal_format import Seal, seal_from_json, seal_to_json
from tiger_db.errors import AlreadyExists, FileError, InvalidState, InvalidValue
from tiger_db.files import file_errors, write_private
from tiger_db.public import public

_NAME = re.compile(r"(\d{19})\.json", re.ASCII)


def checkpoint_text(seal: Seal) -> str:
    """Return a seal without the digests of its events, as JSON."""
    fields = seal_to_json(seal)
    del fields["digests"]
    return json.dumps(fields, indent=2) + "\n"


@public
def read_checkpoint(text: str) -> Seal:
    """Return the seal in a checkpoint, which is the output of `export_checkpoint`.

    Raises:
        InvalidValue: The text is not an output of `export_checkpoint`.
    """
    try:
        return seal_from_json(json.loads(text))
    except (ValueError, RecursionError, InvalidValue):
        raise InvalidValue(
            "the text is not a checkpoint from `tiger-db export-checkpoint`"
        ) from None


@public
def newest_checkpoint(folder: Path) -> Seal | None:
    """Return the newest checkpoint in the folder `AUDIT_CHECKPOINTS`, or None.

    Raises:
        FileError: The folder or the file of the checkpoint cannot be read.
        InvalidState: The file of the newest checkpoint is damaged.
    """
    numbers = checkpoint_numbers(folder)
    return load_checkpoint(folder, max(numbers)) if numbers else None


def checkpoint_numbers(folder: Path) -> list[int]:
    """Return the numbers of the seals whose checkpoints the folder has.

    Raises:
        FileError: The folder cannot be read.
    """
    try:
        names = map(_NAME.fullmatch, os.listdir(folder))  # noqa: PTH208  # names are enough
        return [int(name[1]) for name in names if name]
    except OSError as error:
        raise FileError(f"AUDIT_CHECKPOINTS: {folder}: {error.strerror}") from None


def load_checkpoint(folder: Path, number: int) -> Seal:
    """Return the checkpoint of a seal.

    Raises:
        FileError: The file of the checkpoint cannot be read.
        InvalidState: The file of the checkpoint is damaged.
    """
    path = _path(folder, number)
    with file_errors():
        data = path.read_bytes()
    try:
        return read_checkpoint(data.decode())
    except (UnicodeDecodeError, InvalidValue):
        raise InvalidState(
            f"{path} is not a checkpoint: restore the file, and find out who changed it"
        ) from None


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:019}.json"


def save_checkpoint(folder: Path, seal: Seal) -> None:
    """Write a checkpoint to a new file in the folder. A killed process leaves no incomplete file.

    Raises:
        FileError: The file cannot be written.
        InvalidState: The folder has another checkpoint with the same number.
    """
    number, text = seal.payload().number, checkpoint_text(seal)
    path = _path(folder, number)
    with file_errors():
        try:
            write_private(folder, {path.name: text}, overwrite=False)
        except AlreadyExists:  # another sealer that uses the same folder has saved the seal
            if path.read_bytes() != text.encode():
                raise InvalidState(
                    f"{path} has another seal {number}: see `verify-audit`"
                ) from None

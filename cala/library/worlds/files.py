"""A drawn world lies in a folder of its own. A note in `drawn/` says which world it is, so that it is drawn once."""

import json
import os
from collections.abc import Callable
from operator import index
from pathlib import Path
from typing import Any

from ...errors import CalaError
from ..files import check_output_folder, lock_folder

FINISHED = "drawn/world.json"
UNFINISHED = "drawn/unfinished.json"


def draw_once(
    folder: Path,  # of the world
    record: dict,  # which world: its kind, version and all arguments
    draw: Callable[[Path, dict], None],  # draws the world of `record` in `folder`
) -> Path:  # the folder
    """Draw a world, unless it is there already; `CalaError` if the folder holds anything else.

    A drawing that was killed is not taken for a finished one, and can be started again."""
    if is_drawn(folder, record):  # no lock is needed: many processes may read at once
        return folder
    with lock_folder(folder):
        try:
            check_world_folder(folder, record)
            if not is_drawn(folder, record):
                write_json(folder / UNFINISHED, record)
                draw(folder, record)
                os.replace(folder / UNFINISHED, folder / FINISHED)
        except (OSError, ValueError) as error:
            raise CalaError(f"cannot draw in {folder} ({error}); name another folder") from error
    return folder


def is_drawn(
    folder: Path,  # of the world
    record: dict,  # which world
) -> bool:
    "True if the finished world of `record` is in the folder."
    try:
        return json.loads((folder / FINISHED).read_text(encoding="utf-8")) == record
    except (OSError, ValueError):
        return False


def check_world_folder(
    folder: Path,  # of the world
    record: dict,  # which world
):
    "`CalaError` if the folder holds anything but the world of `record` or a part of it."
    notes = [folder / note for note in (FINISHED, UNFINISHED) if (folder / note).exists()]
    if not notes:
        check_output_folder(folder, advice="cala did not draw it; name another folder")
        return
    other = json.loads(notes[0].read_text(encoding="utf-8"))
    if other == record:
        return
    if not isinstance(other, dict):
        raise CalaError(f"{notes[0]} is damaged; name another folder or delete this one")
    differences = [f"{key} {other.get(key)} not {value}" for key, value in record.items() if other.get(key) != value]
    raise CalaError(f"{folder} holds another world ({', '.join(differences)}); name another folder or delete this one")


def write_json(
    path: Path,  # its folder is made if need be
    content: Any,  # lists, dicts, texts and numbers
    indent: int | None = None,  # None: everything on one line
):
    "Write a file of JSON."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")


def check_numbers(
    record: dict,  # of a world; changed in place: its numbers become ints
    **limits: tuple[int, int],  # name of a number -> the smallest and the largest value
):
    "`CalaError` for the first number of a world that cannot be drawn."
    for name, (low, high) in dict(limits, size=(24, 512), seed=(-(2**63), 2**63)).items():
        record[name] = check_number(name, record[name], low, high)


def check_number(
    name: str,  # of the argument, for the error message
    value: Any,  # what the caller passed
    low: int,  # the smallest allowed value
    high: int,  # the largest allowed value
) -> int:
    "The value as an int; `CalaError` if it is not a whole number within the bounds."
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise CalaError(f"{name}={value!r} cannot be drawn; give a whole number from {low} to {high}")
    return number

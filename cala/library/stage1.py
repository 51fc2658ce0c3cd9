"""Stage 1 on a drawn world, for `cala-demo` and `cala-ablation`: pictures with captions, and notes of what was made.

A step of these commands writes a file or folder and then a note next to it, `NAME.made.json`, with the settings that it
was made with. A later run with the same settings finds the note and uses the file again.
"""

import json
from collections.abc import Callable
from pathlib import Path

from ..data import Triplets, open_dataset
from .files import write_atomically

NAMES = {"cirr": "CIRR", "fashioniq": "FashionIQ"}  # world -> data set


def captioned_split(
    world: str,  # cirr or fashioniq
    root: str | Path,  # of the drawn world
    transform: Callable | None = None,  # PIL image -> tensor
) -> tuple[Triplets, dict[str, list[str]]]:  # data set; name of a picture -> its shortest caption, in a list
    "The training triplets of a drawn world and the captions of their pictures."
    data = open_dataset(NAMES[world], root, "train", transform, keep=transform is not None)
    scenes = json.loads(next(Path(root).rglob("drawn/scenes.train.json")).read_text(encoding="utf-8"))
    # The shortest caption has the fewest tokens, and so a step takes the least time.
    captions = {name: [min(scene["captions"], key=len)] for name, scene in scenes.items()}
    return data, captions


def made_with(
    path: str | Path,  # a file or folder that a step makes
    settings: dict,  # what it should be made with
) -> bool:
    "True if `path` exists and its note has the same settings."
    try:
        return Path(path).exists() and json.loads(Path(f"{path}.made.json").read_text(encoding="utf-8")) == settings
    except (OSError, ValueError):
        return False


def note_made(
    path: str | Path,  # a file or folder that is complete
    settings: dict,  # what it was made with
):
    "Write the note of a file or folder."
    write_atomically(f"{path}.made.json", json.dumps(settings).encode())

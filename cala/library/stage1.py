"""From nothing to a trained CaLa: draw a world, train twice, print a table, write a report."""
import json
from pathlib import Path



from ..data import open_dataset
from .files import write_atomically


def made_with(
    path: Path,      # file or folder that a step makes
    settings: dict,  # what it was made from
) -> bool:
    "True if `path` is there and its note says that it was made with `settings`."
    note = path.with_name(path.name + ".made.json")
    try: return path.exists() and json.loads(note.read_text()) == settings
    except (OSError, ValueError): return False

def note_made(
    path: Path,      # what is made by now
    settings: dict,  # from what
):
    "Write the note, last of all."
    write_atomically(path.with_name(path.name + ".made.json"), json.dumps(settings).encode())

NAMES = dict(cirr="CIRR", fashioniq="FashionIQ")

def captioned_split(
    world: str,       # cirr or fashioniq
    root: Path,       # of the drawn world
    transform=None,   # PIL -> tensor
) -> tuple:           # data set, {picture: [its shortest caption]}
    "Training triplets and the captions of their pictures."
    data = open_dataset(NAMES[world], root, "train", transform, keep=True)
    scenes = json.loads(next(Path(root).rglob("drawn/scenes.train.json")).read_text())
    return data, {name: [min(scene["captions"], key=len)] for name, scene in scenes.items()}  # the shortest: fewer words to read a step

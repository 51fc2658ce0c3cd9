"Real annotations with a small drawn picture for each name, because the real pictures may not be passed on."

import hashlib
import shutil
from pathlib import Path

import pytest
from PIL import Image

from cala.data import open_dataset

REAL = Path(__file__).parents[2] / "shared/data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real annotations are not here")

FOLDERS = {"CIRR": "cirr_dataset", "FashionIQ": "fashionIQ_dataset"}


def stand_in_root(real, root, name, split):
    "Copy annotations from `real`, and draw an 8 x 8 picture, coloured by its name, for all of a split; the data root."
    folder = Path(root) / FOLDERS[name]
    shutil.copytree(Path(real) / FOLDERS[name], folder)
    gallery = open_dataset(name, root, split).gallery
    for picture, path in zip(gallery.names, gallery.paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (8, 8), hashlib.shake_128(picture.encode()).digest(192)).save(path)
    return Path(root)

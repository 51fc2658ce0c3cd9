"""The files of a cache.

A cache is a folder that holds one row of numbers for every picture of a gallery. Its name is a fingerprint of all that
decides these rows: the weights of the module that computes them, the transform, the number format and the names of the
pictures. Another trunk therefore has another folder, and nothing has to be deleted by hand. The folder holds
`about.json`, which lists these properties for people, and shards `00000.safetensors`, `00001.safetensors`, ... of 64
pictures each. A shard carries a mark for each of its pictures (size, time and fingerprint of the picture's file) and a
checksum of each of its rows.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from ...data import Gallery
from ...errors import CalaError, count_things, is_or_are
from ..files import FileMark, fingerprint_bytes, fingerprint_tensors, is_unchanged, make_output_folder, write_atomically

DTYPES = ("float16", "float32")
SHARD = 64  # pictures in one file
OTHER_FOLDER = "name another folder with --cache-dir"
DAY = 86_400  # seconds

# What a cache is made from


def fingerprint(
    module: nn.Module,  # such as a trunk
) -> str:
    "Fingerprint of a module: of the text that it prints about itself, and of all its weights."
    return fingerprint_tensors(module.state_dict(), remove_addresses(repr(module)))


def remove_addresses(
    text: str,  # the `repr` of some object
) -> str:
    "The text without addresses in memory, which differ in every process."
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def describe_transform(
    transform: Callable,  # PIL picture -> tensor
) -> str:
    "The `repr` of a transform; `CalaError` if it does not tell this transform from others."
    text = repr(transform)
    if " object at 0x" in text or "<lambda>" in text:
        advice = "use cala.data.image_transform, or give it a __repr__"
        raise CalaError(f"the transform {text} does not say what it does, so its tokens cannot be kept; {advice}")
    return remove_addresses(text)


def describe_cache(
    weights: str,  # fingerprint of the module that computes the rows
    gallery: Gallery,  # pictures with their transform
    dtype: str,  # float16 or float32
) -> dict[str, str | int]:
    "All that decides the rows of a cache; the name of its folder is a fingerprint of this, so it must not change."
    if dtype not in DTYPES:
        raise CalaError(f"no cache in {dtype!r}; choose {' or '.join(DTYPES)}")
    return dict(
        version=2,
        weights=weights,
        transform=describe_transform(gallery.transform),
        dtype=dtype,
        names=fingerprint_bytes("\0".join(map(str, gallery.names)).encode()),
        pictures=len(gallery),
        shard=SHARD,
    )


def cache_place(
    folder: str | Path,  # holds all caches
    about: dict,  # from `describe_cache`
) -> Path:
    "The folder of one cache."
    return Path(folder, fingerprint_bytes(json.dumps(about).encode(), size=8))


def write_description(
    place: Path,  # the folder of one cache; made if need be
    about: dict,  # from `describe_cache`
):
    "Write about.json, and remove parts of files that killed processes left more than a day ago."
    make_output_folder(place, OTHER_FOLDER)
    for part in place.glob("*.part"):
        if time.time() - part.stat().st_mtime > DAY:
            part.unlink(missing_ok=True)
    text = json.dumps(about, indent=1)
    write_atomically(place / "about.json", text.encode(), concurrent=True, advice=OTHER_FOLDER)


def explain_absence(
    folder: str | Path,  # holds all caches
    about: dict,  # of the cache that is not there
) -> str:
    "What `folder` holds instead of the cache."
    meanings = dict(
        weights="another trunk", transform="another transform", dtype="another number format", names="other pictures"
    )
    for path in sorted(Path(folder).glob("*/about.json")):
        try:
            other = json.loads(path.read_text())
            differences = [meaning for key, meaning in meanings.items() if other.get(key) != about[key]]
        except (ValueError, RecursionError, AttributeError):  # no JSON, or no object
            continue
        if 0 < len(differences) < len(meanings):
            return f"{folder} holds tokens of {' and '.join(differences)}"
    return f"{folder} holds no tokens of these pictures"


# Shards


def shard_number(
    row: int,  # position of a picture in its gallery
) -> int:
    "The number of the shard that holds a row."
    return int(row) // SHARD


def shard_rows(
    number: int,  # of a shard
    count: int,  # pictures of the gallery
) -> range:
    "The rows that a shard holds."
    return range(number * SHARD, min((number + 1) * SHARD, count))


def shard_path(
    place: Path,  # the folder of one cache
    number: int,  # of a shard
) -> Path:
    "The file of a shard."
    return place / f"{number:05}.safetensors"


def shard_paths(
    place: Path,  # the folder of one cache
) -> list[Path]:
    "The files of all shards that are there, in order."
    return sorted(place.glob("[0-9]*.safetensors"))


class Shard:
    "One file of a cache: rows of shape (N, w), read from disk when asked for, with their marks and checksums."

    def __init__(self, path: Path):
        self.path = path
        try:
            file = safe_open(path, "pt")
            header = file.metadata()
            self.values = file.get_slice("tokens")
            self.shape = tuple(self.values.get_shape())  # (pictures, N, w)
            self.first_row = int(path.stem) * SHARD
            self.marks, self.checksums = {}, {}  # by row
            for row, (*mark, checksum) in enumerate(json.loads(header["marks"]), self.first_row):
                self.marks[row] = FileMark(*mark)
                self.checksums[row] = checksum
            if header["place"] != path.parent.name or len(self.shape) != 3 or len(self.marks) != self.shape[0]:
                raise ValueError("it belongs to another cache")
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise CalaError(f"{path} is damaged ({error}); delete it and build again") from None

    def __reduce__(self):  # a worker process opens the file itself
        return Shard, (self.path,)

    def read_row(self, row: int) -> torch.Tensor:
        return self.values[row - self.first_row].clone()  # a copy, because the slice is the file itself


def save_shard(
    path: Path,  # from `shard_path`
    values: torch.Tensor,  # (n, N, w)
    marks: Sequence[FileMark],  # n, of the pictures' files
):
    "Write a shard as a whole."
    lines = [[*mark, crc32(row.numpy().tobytes())] for mark, row in zip(marks, values, strict=True)]
    header = dict(marks=json.dumps(lines), place=path.parent.name)
    advice = f"what is done is kept; make room and start again, or {OTHER_FOLDER}"
    write_atomically(path, to_safetensors({"tokens": values}, header), concurrent=True, advice=advice)


def finished_rows(
    place: Path,  # the folder of one cache
) -> tuple[dict[int, FileMark], list[CalaError]]:  # and an error for each damaged shard
    "The rows that are on disk, with the marks of their pictures."
    finished, errors = {}, []
    for path in shard_paths(place):
        try:
            finished |= Shard(path).marks
        except CalaError as error:
            errors.append(error)
    return finished, errors


def unfinished_rows(
    gallery: Gallery,
    finished: dict[int, FileMark],  # from `finished_rows`
    thorough: bool = False,  # compare the content of every picture, not only size and time
) -> list[int]:
    "The rows to compute: those that are not on disk, and those whose picture has changed since."
    return [
        row
        for row, path in enumerate(gallery.paths)
        if row not in finished or not is_unchanged(path, finished[row], thorough)
    ]


def find_cache(
    gallery: Gallery,
    folder: str | Path,  # holds all caches
    about: dict,  # from `describe_cache`
    thorough: bool = False,  # compare the content of every picture, not only size and time
) -> Path:
    "The folder of a complete cache; `CalaError` says what is missing."
    place = cache_place(folder, about)
    if not shard_paths(place):
        raise CalaError(f"{explain_absence(folder, about)}; build these with cala-cache")
    finished, errors = finished_rows(place)
    if errors:
        raise errors[0]
    unfinished = unfinished_rows(gallery, finished, thorough)
    changed = [gallery.paths[row] for row in unfinished if row in finished]
    if changed:
        count = count_things(len(changed), "picture has", "pictures have")
        text = f"{count} changed since the tokens were made, the first is {changed[0]}"
        raise CalaError(f"{text}; build them again with cala-cache")
    if unfinished:
        count = f"{len(unfinished):,} of {len(gallery):,} pictures {is_or_are(len(unfinished))}"
        text = f"{place} is not finished, {count} to do"
        raise CalaError(f"{text}; go on with cala-cache (several machines need one folder that all of them see)")
    return place

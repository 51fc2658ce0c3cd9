"""From a folder that somebody put together by hand to a batch of triplets, and an audit that names every hole."""
import json
import os
from dataclasses import dataclass
from dataclasses import field
from functools import lru_cache
from pathlib import Path
from pathlib import PurePosixPath
from reprlib import repr as brief



from .errors import CalaError


@lru_cache(maxsize=4096)
def _real(folder):
    return Path(os.path.realpath(folder))

def _leaves(path, root):
    "True if `path`, its links followed, is not under `root` nor under the top folder of `root` that it is in."
    path, root = Path(path), Path(root)
    parts = path.relative_to(root).parts
    real = Path(os.path.realpath(path)) if path.is_symlink() else _real(path.parent.absolute()) / path.name
    return not any(real.is_relative_to(_real(home.absolute())) for home in (root, *([root / parts[0]] if len(parts) > 1 else [])))

@dataclass(frozen=True)
class Triplet:
    "One query and, where labels are published, its target; pictures by name."
    reference: str       # name of the reference picture
    captions: tuple      # one sentence (CIRR) or two (FashionIQ)
    target: str | None   # name of the target picture; None in test splits
    pair_id: str         # CIRR's pairid; FashionIQ has none, so "<category>-<row>"
    group: tuple = ()    # CIRR: six near neighbours, reference and target among them
    category: str = ""   # FashionIQ: dress, shirt or toptee

@dataclass
class Annotations:
    "What the files of one split say, and what is wrong with them."
    names: list = field(default_factory=list)     # of the gallery, in the order of the split file
    paths: dict = field(default_factory=dict)     # name -> path in the data set's folder, or None if only the name is published
    triplets: list = field(default_factory=list)  # of `Triplet`
    faults: list = field(default_factory=list)    # file, entry and why it cannot be used
    notes: list = field(default_factory=list)     # file, entry and what is odd, yet usable

    def usable(self):
        "Itself if it has no fault, or a `CalaError` with the first."
        if not self.faults: return self
        more = f" (and {len(self.faults) - 1:,} more; cala-check lists them)" if len(self.faults) > 1 else ""
        raise CalaError(f"{self.faults[0]}{more}")

def _once(pairs):
    "The dict of `pairs`, or an error if a key is there twice."
    if len(found := dict(pairs)) == len(pairs): return found
    keys = [key for key, _ in pairs]
    raise ValueError(f"the key {brief(next(k for k in keys if keys.count(k) > 1))} is there twice")

def read_json(
    path: Path,  # an annotation file
    kind: type,  # list or dict: what must be at the top
):               # its content
    "Read an annotation file; whatever is wrong with it is one line that names it."
    try: content = json.loads(Path(path).read_text("utf-8-sig"), object_pairs_hook=_once)
    except FileNotFoundError: raise CalaError(f"no annotation file {path}; the data set's own repository has it") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CalaError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if isinstance(content, kind) and content: return content
    raise CalaError(f"{path} must hold a JSON {kind.__name__} with something in it; fetch it again")

def _is_text(value):
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value

def _is_name(value):
    return _is_text(value) and value.isprintable() and value not in ("", ".", "..") and not set(value) & set('/\\:')

def _is_inner_path(value):
    return _is_text(value) and not value.startswith("/") and PurePosixPath(value).name != "" and all(map(_is_name, PurePosixPath(value).parts))

def _entries(file, kind, found):
    "The content of `file`; if it cannot be read, that is a fault and there is none."
    try: return read_json(file, kind)
    except CalaError as error: found.faults.append(str(error))
    return kind()

def _name_faults(entry, keys, names):
    "Which of the pictures that an entry names is not in the split file."
    for key in keys:
        name = entry.get(key)
        if not isinstance(name, str): yield f"has no {key}"
        elif name not in names: yield f"{key} {brief(name)} is not in the split file"

def _members(entry):
    "The names of an entry's group, or None if it has none."
    group = entry.get("img_set")
    members = group.get("members") if isinstance(group, dict) else None
    return members if isinstance(members, list) and all(isinstance(m, str) for m in members) else None

def _cirr_faults(entry, names, labelled):
    "Why one entry of CIRR cannot become a triplet."
    if not isinstance(entry, dict): yield "is not an object"; return
    yield from _name_faults(entry, ("reference", "target_hard") if labelled or "target_hard" in entry else ("reference",), names)
    if not _is_text(entry.get("caption")): yield "has no caption"
    if type(entry.get("pairid")) not in (int, str): yield "has no pairid"
    if _members(entry) is None: yield "has no img_set with members"

def _cirr_triplet(i, entry):
    return Triplet(entry["reference"], (entry["caption"],), entry.get("target_hard"), str(entry["pairid"]), tuple(_members(entry)))

def _group_faults(triplet, names):
    "Why subset recall cannot be computed for a triplet of CIRR."
    group = triplet.group
    if len(group) != 6 or len(set(group)) != 6: yield f"has a group of {len(group)} ({len(set(group))} different), not six"
    for member in sorted(set(group) - names): yield f"group member {brief(member)} is not in the split file"
    for name in (triplet.reference, triplet.target):
        if name is not None and name not in group: yield f"{brief(name)} is not in its own group"

def _oddities(triplet):
    "What is strange about a triplet, yet usable."
    if triplet.reference == triplet.target: yield f"has {brief(triplet.target)} as reference and as target"
    if not all(caption.strip(".?, ") for caption in triplet.captions): yield "has an empty caption"

def _read_triplets(file, found, faults_of, triplet_of):
    "Fill `found` with the entries of a caption file; yield (position in the file, triplet) of each that is well formed."
    for i, entry in enumerate(_entries(file, list, found)):
        faults = list(faults_of(entry))
        found.faults += [f"{file} entry {i}: {fault}" for fault in faults]
        if faults: continue
        found.triplets.append(triplet_of(i, entry))
        found.notes += [f"{file} entry {i}: {odd}" for odd in _oddities(found.triplets[-1])]
        yield i, found.triplets[-1]

def _same_labels(file, found):
    "Either every triplet has a target or none."
    if len({t.target is None for t in found.triplets}) > 1: found.faults.append(f"{file}: some entries have a target and some have none")
    return found

def _read_cirr_names(file, found):
    "The split file of CIRR: {name: path}."
    for i, (name, path) in enumerate(_entries(file, dict, found).items()):
        if _is_name(name) and _is_inner_path(path): found.names.append(name); found.paths[name] = str(PurePosixPath(path))
        else: found.faults.append(f"{file} entry {i}: {brief(name)} has the path {brief(path)}, which is none within the data set's folder")

def read_cirr(
    folder: Path,    # the folder that holds `cirr/captions` and `cirr/image_splits`
    split: str,      # train, val or test1
) -> Annotations:    # whatever is wrong is in its faults
    "Read and check the two files of a split of CIRR."
    found, seen = Annotations(), set()
    _read_cirr_names(Path(folder, "cirr", "image_splits", f"split.rc2.{split}.json"), found)
    file, names = Path(folder, "cirr", "captions", f"cap.rc2.{split}.json"), set(found.names)
    serious = found.notes if split == "train" else found.faults
    for i, triplet in _read_triplets(file, found, lambda entry: _cirr_faults(entry, names, split != "test1"), _cirr_triplet):
        serious += [f"{file} entry {i}: {fault}" for fault in _group_faults(triplet, names)]
        if triplet.pair_id in seen: serious.append(f"{file} entry {i}: pairid {triplet.pair_id} is there twice")
        seen.add(triplet.pair_id)
    return _same_labels(file, found)

def _read_fashioniq_names(file, found):
    "The split file of a FashionIQ category: [name, ...]."
    for i, name in enumerate(_entries(file, list, found)):
        if not _is_name(name): found.faults.append(f"{file} entry {i}: {brief(name)} is not a picture's name")
        elif name in found.paths: found.faults.append(f"{file} entry {i}: {brief(name)} is there twice")
        else: found.names.append(name); found.paths[name] = None

def _fashioniq_faults(entry, names, labelled):
    "Why one entry of FashionIQ cannot become a triplet."
    if not isinstance(entry, dict): yield "is not an object"; return
    yield from _name_faults(entry, ("candidate", "target") if labelled or "target" in entry else ("candidate",), names)
    captions = entry.get("captions")
    if not isinstance(captions, list) or len(captions) != 2 or not all(map(_is_text, captions)): yield "has no two captions"

def read_fashioniq(
    folder: Path,    # the folder that holds `captions` and `image_splits`
    split: str,      # train, val or test
    category: str,   # dress, shirt or toptee
) -> Annotations:    # whatever is wrong is in its faults
    "Read and check the two files of a category and split of FashionIQ."
    found = Annotations()
    _read_fashioniq_names(Path(folder, "image_splits", f"split.{category}.{split}.json"), found)
    file = Path(folder, "captions", f"cap.{category}.{split}.json")
    faults_of = lambda entry: _fashioniq_faults(entry, found.paths, split != "test")
    triplet_of = lambda i, e: Triplet(e["candidate"], tuple(e["captions"]), e.get("target"), f"{category}-{i}", (), category)
    for _ in _read_triplets(file, found, faults_of, triplet_of): pass
    return _same_labels(file, found)

_FOLDERS = dict(CIRR=("cirr_dataset", "cirr_datasets"), FashionIQ=("fashioniq_dataset", "fashioniq_datasets"))

_MARKS = dict(CIRR=("cirr/captions", "cirr/image_splits"), FashionIQ=("captions", "image_splits"))

def data_folder(
    root: str | Path,  # the folder that holds the data sets, or one data set's own folder
    name: str,         # CIRR or FashionIQ
) -> Path:             # the data set's own folder
    "Find a data set under the names that people give its folder."
    if not os.path.isdir(root): raise CalaError(f"no folder {root}; point --data-root at the folder that holds {_FOLDERS[name][0]}")
    inside = sorted(p for p in Path(root).iterdir() if p.name.lower() in _FOLDERS[name])
    for folder in (*inside, Path(root)):
        if any((folder / mark).is_dir() for mark in _MARKS[name]): return folder
    raise CalaError(f"{root} holds no annotations of {name} ({_FOLDERS[name][0]}/{_MARKS[name][0]}); point --data-root at the folder that does")

_HOMES = ("", "images", "image_data", "img_raw")  # where pictures lie in a data set's folder

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

def find_pictures(
    folder: Path,        # the data set's own folder
    found: Annotations,  # of any of its splits
) -> dict:               # {name without suffix: path}
    "Every picture under the folders that the annotations speak of; of two with one name the first counts."
    tops = sorted({PurePosixPath(path).parts[0] for path in found.paths.values() if path})
    homes = [os.path.join(folder, home, top) for home in _HOMES for top in tops] or [os.path.join(folder, home) for home in _HOMES[1:]]
    pictures = {}
    for place, inner, files in (step for home in homes for step in os.walk(home)):
        inner.sort()
        for stem, suffix in map(os.path.splitext, sorted(files)):
            if suffix.lower() in _SUFFIXES: pictures.setdefault(stem, os.path.join(place, stem + suffix))
    return pictures

def locate(
    folder: Path,          # the data set's own folder
    found: Annotations,    # of one split
    pictures: dict = None, # what `find_pictures` found, if it was asked already
) -> list:                 # one path a name
    "Where each picture of a split is, or should be."
    pictures = find_pictures(folder, found) if pictures is None else pictures
    published = [Path(folder, found.paths[name] or f"images/{name}.jpg") for name in found.names]
    return [path if path.stem not in pictures or os.path.isfile(path) else Path(pictures[path.stem]) for path in published]

CATEGORIES = ("dress", "shirt", "toptee")

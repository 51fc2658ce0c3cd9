"""Find a data set on disk, read its annotation files and check every entry.

CIRR and FashionIQ consist of annotation files from one place and pictures from another, and people lay them out in
many ways. A data set is recognised by the names of its annotation files, a picture is found by its name. Every entry is
checked, because such files are edited, merged and cut by hand. The faults of a split are collected with file and entry:
the data sets in `cala.data` raise the first of them, `cala-check` prints all.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from reprlib import repr as shorten
from typing import Any

from .errors import CalaError
from .pictures import PICTURE_FOLDERS
from .recipe import CATEGORIES, split_words

SPLITS = {"CIRR": ("train", "val", "test1"), "FashionIQ": ("train", "val", "test"), "CIRCO": ("val", "test")}
FOLDERS = {"CIRR": "cirr_dataset", "FashionIQ": "fashionIQ_dataset", "CIRCO": "CIRCO"}  # as published
CIRR_PLACES = ("cirr/captions", "cirr/image_splits", "captions", "image_splits")
CIRR_PLACES += ("captions/captions", "captions/image_splits", "cirr", "")
ANNOTATIONS = {  # where the files may be, the published places first, and how their names begin
    "CIRR": (CIRR_PLACES, r"(cap|split)\.rc2\."),
    "FashionIQ": (("captions", "image_splits", ""), r"(cap|split)\.(dress|shirt|toptee)\."),
    "CIRCO": (("annotations",), r"(val|test)\.json$"),  # `cala.library.circo` reads them
}
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Triplet:
    "One query and, where labels are published, its target; pictures by name."

    reference: str  # name of the reference picture
    captions: tuple[str, ...]  # one sentence (CIRR) or two (FashionIQ; a few of its variants have one)
    target: str | None  # name of the target picture; None in test splits
    pair_id: str  # CIRR's pairid; FashionIQ has none: category and entry, as in dress-7
    group: tuple[str, ...] = ()  # CIRR: six similar pictures, reference and target among them
    category: str = ""  # FashionIQ: dress, shirt or toptee


@dataclass
class Annotations:
    "What the annotation files of one split hold, and what is wrong with them."

    names: list[str] = field(default_factory=list)  # of the gallery, in the order of the split file
    paths: list[str] = field(default_factory=list)  # where each picture is published, in the data set's folder
    triplets: list[Triplet] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # file, entry and why it cannot be used
    notes: list[str] = field(default_factory=list)  # file, entry and what is unusual about it

    def raise_faults(self) -> "Annotations":
        "The annotations themselves, or a `CalaError` with the first fault."
        if self.faults:
            more = f" (and {len(self.faults) - 1:,} more; cala-check lists them)" if len(self.faults) > 1 else ""
            raise CalaError(f"{self.faults[0]}{more}")
        return self


def parse_split(
    name: str,  # CIRR or FashionIQ
    split: str,  # test stands for CIRR's test1, too
) -> str:
    "The published name of a split."
    split = split.lower()
    split = SPLITS[name][-1] if split in ("test", "test1") else split
    if split not in SPLITS[name]:
        raise CalaError(f"no split {split!r}; {name} has {', '.join(SPLITS[name])}")
    return split


def parse_categories(
    categories: str | list | tuple,  # a list, or text with commas, blanks or both
) -> tuple[str, ...]:  # in the published order
    "The categories of FashionIQ that a user names."
    words = split_words(categories)
    if not words or set(words) - set(CATEGORIES):
        raise CalaError(f"no categories {', '.join(words) or '(none)'}; FashionIQ has {', '.join(CATEGORIES)}")
    return tuple(category for category in CATEGORIES if category in words)


# Where the files are


def data_folder(
    root: str | Path,  # the folder that holds the data sets, or one data set's own folder
    name: str,  # CIRR or FashionIQ
) -> Path:  # the data set's own folder
    "Find a data set by the names that people give to its folder, and by its annotation files."
    folders = find_data_folders(root, name)
    if not folders:
        raise CalaError(
            f"{root} holds no annotations of {name} ({FOLDERS[name]}/{ANNOTATIONS[name][0][0]}); "
            "point --data-root at the folder that does"
        )
    if len(folders) > 1:
        raise CalaError(f"{root} holds {name} {len(folders)} times, as {folders[0]} and as {folders[1]}; choose one")
    return folders[0]


def find_data_folders(
    root: str | Path,  # the folder that holds the data sets, or one data set's own folder
    name: str,  # CIRR or FashionIQ
) -> list[Path]:  # empty if it is not there; several if it is there more than once, one level further below
    "The folders of a data set: the root, a folder in it with one of the usual names, or one level further below."
    root = Path(root)
    if not root.is_dir():
        raise CalaError(f"no folder {root}; point --data-root at the folder that holds {FOLDERS[name]}")
    folders = [choose_data_folder(root, name)]
    if folders == [None]:  # an archive may unpack into a folder of its own, as in cirr-cir/cirr_dataset
        folders = [choose_data_folder(each, name) for each in list_folders(root) if not each.name.startswith(".")]
    return [folder for folder in folders if folder is not None]


def choose_data_folder(
    root: Path,  # the folder that holds the data sets, or one data set's own folder
    name: str,  # CIRR or FashionIQ
) -> Path | None:  # None if it is not there
    "The folder of a data set: the root, or a folder in it with one of the usual names."
    spelling = f"{name.lower()}(datasets?)?"  # without case, hyphens and underscores
    named = [each for each in list_folders(root) if re.fullmatch(spelling, re.sub("[-_]", "", each.name.lower()))]
    folders = [folder for folder in (root, *named) if find_annotations(folder, name)]
    # A root with a folder cirr/ may be CIRR's own folder or the folder above it: the one with pictures is CIRR's own.
    parts = [Path(home, part) for home in PICTURE_FOLDERS for part in ("train", "dev", "test1", *CATEGORIES)]
    with_pictures = [folder for folder in folders if any((folder / part).is_dir() for part in parts)]
    return next(iter(with_pictures or folders), None)


def list_folders(folder: Path) -> list[Path]:
    "The folders in a folder; none if it may not be read."
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir())
    except OSError:
        return []


def find_annotations(
    folder: Path,  # of the data set
    name: str,  # CIRR or FashionIQ
) -> dict[str, Path]:  # file name -> path
    "The annotation files of a data set that are there."
    places, pattern = ANNOTATIONS[name]
    files = {}
    for place in places:
        for path in (folder / place).glob("*.json"):
            if re.match(pattern, path.name):
                files.setdefault(path.name, path)
    return files


def find_pictures(
    folder: Path,  # of the data set
    parts: list[str],  # CIRR: train, dev or test1; FashionIQ: images
    follow_links: bool = False,  # look into linked folders of a part, too
) -> dict[str, str]:  # name without suffix -> path
    "Every picture in the folders where that part of a data set may be; if a name occurs twice, the first counts."
    homes = [os.path.join(folder, home).rstrip("/") for home in PICTURE_FOLDERS]
    if list(parts) == ["images"]:
        tops = [*homes[1:], *(os.path.join(home, category) for home in homes for category in CATEGORIES)]
    else:
        tops = [os.path.join(home, part) for part in parts for home in homes]
    pictures, visited = {}, set()
    for top in [*tops, *homes]:
        is_deep = top in tops  # of a home itself only its own files: the pictures of all parts may lie together in it
        for place, files in walk_folders(top, is_deep, follow_links, visited):
            for stem, suffix in map(os.path.splitext, sorted(files)):
                if suffix.lower() in PICTURE_SUFFIXES:
                    pictures.setdefault(stem, os.path.join(place, stem + suffix))
    return pictures


def walk_folders(
    top: str,  # may be missing
    is_deep: bool,  # go into the folders below it
    follow_links: bool,  # into linked ones, too
    visited: set[str],  # folders to leave out; changed in place
) -> Iterator[tuple[str, list[str]]]:
    "Each folder with the names of its files, in alphabetical order."
    for place, inner_folders, files in os.walk(top, followlinks=follow_links):
        real = os.path.realpath(place) if follow_links else place
        if real in visited or not is_deep:
            inner_folders.clear()
        inner_folders.sort()
        if real not in visited:
            visited.add(real)
            yield place, files


def locate_pictures(
    folder: Path,  # of the data set
    paths: list[str],  # where the pictures are published, relative to the folder
    pictures: dict[str, str] | None = None,  # of `find_pictures`, if it was called before
    follow_links: bool = False,  # look into linked folders of a part, too
) -> list[Path]:  # one a picture; the published place if there is no such picture
    "Find the pictures of a split. One walk through the folders is faster than a question for each of many places."
    if pictures is None:
        parts = sorted({PurePosixPath(path).parts[0] for path in paths})
        pictures = find_pictures(folder, parts, follow_links)
    published = [Path(folder, path) for path in paths]
    return [
        path if path.stem not in pictures or os.path.isfile(path) else Path(pictures[path.stem]) for path in published
    ]


# What the files hold


def read_json(
    path: Path,
    kind: type,  # list or dict: what must be at the top
) -> Any:  # the content
    "Read a JSON file; whatever is wrong with it is a `CalaError` of one line that names it."
    wanted = "object" if kind is dict else "list"
    try:
        text = Path(path).read_text("utf-8-sig")
        content = json.loads(text, object_pairs_hook=refuse_repeated_keys)
    except FileNotFoundError:
        raise CalaError(f"no annotation file {path}; the data set's own repository has it") from None
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, json.JSONDecodeError) and error.lineno == 2 and text[error.pos :].startswith("{"):
            raise CalaError(f"{path} holds one JSON object a line; it must hold one JSON {wanted}") from None
        advice = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "download it again"
        raise CalaError(f"{path} cannot be read as JSON ({error}); {advice}") from None
    if not isinstance(content, kind) or not content:
        raise CalaError(f"{path} must hold a JSON {wanted} that is not empty, but holds {describe_shape(content)}")
    return content


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    "The pairs as a dict; a ValueError names a key that occurs twice, of which Python would keep the last."
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shorten(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return content


def describe_shape(value: Any) -> str:
    "A few words on a JSON value, for messages."
    if isinstance(value, dict) and value:
        return f"an object with {', '.join(map(shorten, list(value)[:8]))}"
    if isinstance(value, (dict, list)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    return shorten(value)


def is_text(value: Any) -> bool:
    "True for text that UTF-8 can hold."
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value


def is_safe_name(value: Any) -> bool:
    "True for the name of a file that stays in its folder on every system."
    return is_text(value) and value.isprintable() and value not in ("", ".", "..") and not set(value) & set("/\\:")


def is_safe_path(value: Any) -> bool:
    "True for a relative path that stays in its folder on every system."
    parts = PurePosixPath(value).parts if is_text(value) else ()
    return bool(parts) and all(map(is_safe_name, parts))


def is_pair_id(value: Any) -> bool:
    "True for a whole number or text."
    return type(value) in (int, str)


def has_members(value: Any) -> bool:
    "True for an object whose `members` are a list of names."
    members = value.get("members") if isinstance(value, dict) else None
    return isinstance(members, list) and all(isinstance(member, str) for member in members)


def is_caption_list(value: Any) -> bool:
    "True for a list of one or two sentences."
    return isinstance(value, list) and len(value) in (1, 2) and all(map(is_text, value))


FIELDS = {  # of an entry: key -> (check, what is wanted); reference and target come first
    "CIRR": {
        "reference": (is_text, "text"),
        "target_hard": (is_text, "text"),
        "caption": (is_text, "text"),
        "pairid": (is_pair_id, "a number or text"),
        "img_set": (has_members, "an object with a list of names as members"),
    },
    "FashionIQ": {
        "candidate": (is_text, "text"),
        "target": (is_text, "text"),
        "captions": (is_caption_list, "a list of one or two sentences"),
    },
}


def check_entry(
    entry: Any,  # of a caption file
    name: str,  # CIRR or FashionIQ
    names: set[str],  # of the split file
    needs_target: bool,  # False for test splits
):
    "Raise a ValueError that says why an entry cannot become a triplet."
    if not isinstance(entry, dict):
        raise ValueError(f"is not an object, but {describe_shape(entry)}")
    picture_keys = list(FIELDS[name])[:2]
    for key, (is_right, wanted) in FIELDS[name].items():
        if key == picture_keys[1] and not needs_target and key not in entry:
            continue
        if not is_right(entry.get(key)):
            if key in entry:
                raise ValueError(f"{key} must be {wanted}, but is {describe_shape(entry[key])}")
            raise ValueError(f"has no {key} ({wanted}); it is {describe_shape(entry)}")
        if key in picture_keys and entry[key] not in names:
            raise ValueError(f"{key} {shorten(entry[key])} is not in the split file")


def find_group_faults(
    triplet: Triplet,  # of CIRR
    names: set[str],  # of the split file
) -> list[str]:
    "Why recall within the group (Rs@k) cannot be computed for a triplet."
    group = triplet.group
    faults = [f"group member {shorten(member)} is not in the split file" for member in sorted(set(group) - names)]
    if len(group) != 6 or len(set(group)) != 6:
        faults.append(f"has a group of {len(group)} ({len(set(group))} different), not six")
    ends = [end for end in (triplet.reference, triplet.target) if end is not None]
    return faults + [f"{shorten(end)} is not in its own group" for end in ends if end not in group]


def read_annotations(
    folder: Path,  # of the data set
    name: str,  # CIRR or FashionIQ
    split: str,  # train, val, and test1 (CIRR) or test (FashionIQ)
    category: str = "",  # of FashionIQ
    gallery_of: str = "split",  # whose pictures are in the gallery: split, or all (all splits and categories)
) -> Annotations:
    "Read and check the two files of a split; whatever is wrong is in the faults of the result."
    if gallery_of not in ("split", "all"):
        raise CalaError(f"no gallery {gallery_of!r}; there are split and all")
    annotations = read_gallery(folder, name, split, category)
    file, entries = read_file(annotations, folder, name, "cap", split, category)
    add_triplets(annotations, file, entries, name, split, category)
    if gallery_of == "all":
        add_other_galleries(annotations, folder, name, split, category)
    return annotations


def add_other_galleries(
    annotations: Annotations,  # of one split and category; changed in place
    folder: Path,  # of the data set
    name: str,  # CIRR or FashionIQ
    split: str,
    category: str,  # of FashionIQ
):
    "Add the pictures of all other splits and categories."
    paths = dict(zip(annotations.names, annotations.paths))
    for other_split in SPLITS[name]:
        for other_category in CATEGORIES if name == "FashionIQ" else ("",):
            if (other_split, other_category) != (split, category):
                other = read_gallery(folder, name, other_split, other_category)
                annotations.faults += other.faults
                paths = dict(zip(other.names, other.paths)) | paths
    own = annotations.names
    annotations.names = list(dict.fromkeys([*own, *paths]))
    annotations.paths = [paths[picture] for picture in annotations.names]


def read_gallery(
    folder: Path,  # of the data set
    name: str,  # CIRR or FashionIQ
    split: str,  # train, val, and test1 (CIRR) or test (FashionIQ)
    category: str = "",  # of FashionIQ
) -> Annotations:  # without triplets
    "Read and check the split file only, which names the pictures."
    annotations = Annotations()
    add_pictures(annotations, *read_file(annotations, folder, name, "split", split, category))
    return annotations


def read_file(
    annotations: Annotations,  # takes the fault if the file cannot be read
    folder: Path,  # of the data set
    name: str,  # CIRR or FashionIQ
    kind: str,  # cap or split
    split: str,
    category: str,  # of FashionIQ
) -> tuple[Path, Any]:  # the file, and its content; empty if it cannot be read
    "One annotation file of a split, from where it is."
    file_name = f"{kind}.{category or 'rc2'}.{split}.json"
    published = ANNOTATIONS[name][0][:2][kind == "split"]
    file = find_annotations(folder, name).get(file_name, Path(folder, published, file_name))
    content_type = dict if kind == "split" and name == "CIRR" else list
    try:
        return file, read_json(file, content_type)
    except CalaError as error:
        annotations.faults.append(str(error))
        return file, content_type()


def add_pictures(
    annotations: Annotations,  # changed in place
    file: Path,  # for messages
    pictures: dict[str, Any] | list,  # CIRR: name -> path; FashionIQ: names
):
    "Check the pictures of a split file and add those that are fine."
    known = set()
    for i, name in enumerate(pictures):
        path = pictures[name] if isinstance(pictures, dict) else f"images/{name}.jpg"
        if not is_safe_name(name):
            annotations.faults.append(f"{file} entry {i}: {shorten(name)} is not a picture's name")
        elif not is_safe_path(path):
            reason = f"{shorten(name)} has the path {shorten(path)}, which is none within the data set's folder"
            annotations.faults.append(f"{file} entry {i}: {reason}")
        elif name in known:
            annotations.faults.append(f"{file} entry {i}: {shorten(name)} is there twice")
        else:
            known.add(name)
            annotations.names.append(name)
            annotations.paths.append(str(PurePosixPath(path)))


def add_triplets(
    annotations: Annotations,  # with its pictures; changed in place
    file: Path,  # for messages
    entries: list,  # of the caption file
    name: str,  # CIRR or FashionIQ
    split: str,
    category: str,
):
    "Check the entries of a caption file and add a triplet for each that is fine."
    names, pair_ids, single = set(annotations.names), set(), []
    for i, entry in enumerate(entries):
        place = f"{file} entry {i}"
        try:
            check_entry(entry, name, names, needs_target="test" not in split)
        except ValueError as error:
            annotations.faults.append(f"{place}: {error}")
            continue
        if name == "CIRR":
            pair_id, members = str(entry["pairid"]), tuple(entry["img_set"]["members"])
            triplet = Triplet(entry["reference"], (entry["caption"],), entry.get("target_hard"), pair_id, members)
            faults = find_group_faults(triplet, names)
            if pair_id in pair_ids:
                faults.append(f"pairid {pair_id} is there twice")
            pair_ids.add(pair_id)
            faults = [f"{place}: {fault}" for fault in faults]
            if split == "train":  # training uses neither groups nor pair ids
                annotations.notes += faults
            else:
                annotations.faults += faults
        else:
            texts, pair_id = tuple(entry["captions"]), f"{category}-{i}"
            single += [i] if len(texts) == 1 else []
            triplet = Triplet(entry["candidate"], texts, entry.get("target"), pair_id, category=category)
        annotations.triplets.append(triplet)
        if triplet.reference == triplet.target:
            annotations.notes.append(f"{place}: has {shorten(triplet.target)} as reference and as target")
        if not all(text.strip(".?, ") for text in triplet.captions):
            annotations.notes.append(f"{place}: has an empty caption")
    if len({triplet.target is None for triplet in annotations.triplets}) > 1:
        annotations.faults.append(f"{file}: some entries have a target and some have none")
    if 0 < len(single) < len(annotations.triplets):
        annotations.faults += [f"{file} entry {i}: has one sentence, and other entries have two" for i in single]

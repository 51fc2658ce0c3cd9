"""Audit a data root: what is there, what is missing, what is broken, and whether the annotations agree.

`CIRR` and `FashionIQ` raise an error at the first fault; the audit collects all of them. `cala-check` prints it."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePath

import pandas as pd

from ..annotations import (
    CATEGORIES,
    FOLDERS,
    SPLITS,
    data_folder,
    find_annotations,
    find_data_folders,
    find_pictures,
    locate_pictures,
    read_annotations,
)
from ..data import gallery_names
from ..errors import CalaError
from ..pictures import PICTURE_FOLDERS, escapes_root, find_picture_fault, read_picture
from ..progress import show_progress
from .circo import read_circo
from .sources import describe_picture_sources

SHOWN = 10  # lines of each kind


@dataclass
class Audit:
    "What lies under a data root, and what is wrong with it."

    places: list[str] = field(default_factory=list)  # a sentence for each data set: where its files are
    rows: list[dict] = field(default_factory=list)  # one for each split and category
    problems: list[str] = field(default_factory=list)  # about annotations that cannot be used; each names a file
    notes: list[str] = field(default_factory=list)  # about unusual entries that can be used
    missing: list[Path] = field(default_factory=list)  # where a picture should be
    broken: list[str] = field(default_factory=list)  # about files that are not pictures

    @property
    def ok(self) -> bool:
        "True if nothing is wrong; notes do not count."
        return not (self.problems or self.missing or self.broken)

    def table(self) -> pd.DataFrame:
        "The counts, one row for each split and category; `val gallery` is the gallery of FashionIQ's protocol val."
        return pd.DataFrame(self.rows).convert_dtypes()

    def report(self, deep: bool) -> str:  # deep: pictures were decoded
        "The audit as text: places, counts, the first findings of each kind, and whether a run may start."
        table = self.table().astype(object)
        lines = [*self.places, table.where(table.notna() & (table != ""), "-").to_string(index=False)]
        findings = {
            "annotations that cannot be used": self.problems,
            "pictures that are missing": self.missing,
            "files that are no picture": self.broken,
            "notes (nothing to mend)": self.notes,
        }
        for title, items in findings.items():
            if items:
                lines += [f"{title}: {len(items):,}", *(f"  {item}" for item in items[:SHOWN])]
            if len(items) > SHOWN:
                lines.append(f"  ... and {len(items) - SHOWN:,} more; --save FILE writes all")
        lines += describe_picture_sources(dict.fromkeys(row["dataset"] for row in self.rows if row["missing"]))
        if self.problems:
            lines.append("the annotations named above must be corrected before a run can start")
        elif not self.ok:
            lines.append(
                "training and evaluation refuse to start without these pictures; "
                "--allow-missing goes on without them, and every result says how many are missing"
            )
        elif deep:
            lines.append("all is well")
        else:
            lines.append("all is there (pictures were not decoded; --deep does that)")
        return "\n".join(lines)

    def save(self, path: str | Path):
        "Write all findings to a file, one a line; names of files keep their bytes."
        lines = [*self.problems, *map(str, self.missing), *self.broken, ""]
        Path(path).write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))


def audit(
    root: str | Path,  # the folder that holds the data sets, or one data set's own folder
    deep: bool = False,  # decode every picture, too
    follow_links: bool = False,  # pictures outside the folder of the data set are fine, too
) -> Audit:
    "Count what is there, missing and broken, and check that the annotations agree with each other."
    folders = {}
    if Path(root).is_dir():
        folders = {name: data_folder(root, name) for name in FOLDERS if find_data_folders(root, name)}
    if not folders:  # most people have one of the data sets
        raise CalaError(
            f"{root} holds neither {' nor '.join(FOLDERS.values())}; point --data-root at the folder that does"
        )
    result = Audit()
    for name, folder in folders.items():
        audit_dataset(result, name, folder, deep, follow_links)
    for name in ("problems", "missing", "broken"):  # a file may belong to several splits
        setattr(result, name, list(dict.fromkeys(getattr(result, name))))
    return result


def audit_dataset(
    result: Audit,  # changed in place
    name: str,  # CIRR, FashionIQ or CIRCO
    folder: Path,  # of the data set
    deep: bool,
    follow_links: bool,
):
    "Add the rows and findings of one data set."
    there, walked = set(), None
    if name == "FashionIQ":  # all splits share their folders
        walked = find_pictures(folder, ["images"], follow_links)
    for split, category in product(SPLITS[name], CATEGORIES if name == "FashionIQ" else [""]):
        if name == "CIRCO":
            annotations = read_circo(folder, split)
        else:
            annotations = read_annotations(folder, name, split, category)
        paths, triplets = locate_pictures(folder, annotations.paths, walked, follow_links), annotations.triplets
        title = " ".join(filter(None, ["check", name, category, split]))
        missing, broken = audit_pictures(paths, None if follow_links else folder, deep, title)
        there |= set(paths) - set(missing)
        present = len(paths) - len(missing) - len(broken)
        row = dict(dataset=name, split=split, category=category, triplets=len(triplets), pictures=len(paths))
        row |= dict(present=present, missing=len(missing), broken=len(broken))
        if category and triplets and all(triplet.target for triplet in triplets):
            row["val gallery"] = len(gallery_names(annotations, "val"))
        result.rows.append(row)
        result.problems += annotations.faults
        result.notes += annotations.notes
        result.missing += missing
        result.broken += broken
    annotation_folders = {str(path.parent.relative_to(folder)) for path in find_annotations(folder, name).values()}
    picture_folders = set()  # such as train, images, img_raw/train, or . for the data set's own
    for parts in {path.relative_to(folder).parts[:-1] for path in there}:
        depth = 2 if parts and parts[0] in PICTURE_FOLDERS else 1
        picture_folders.add(str(PurePath(*parts[:depth])))
    pictures = f"pictures in {', '.join(sorted(picture_folders))}" if there else "no pictures"
    elsewhere = sum(escapes_root(path, folder) for path in there) if follow_links else 0
    if elsewhere:
        pictures += f", {elsewhere:,} of them outside this folder, where links lead"
    result.places.append(f"{name} in {folder}: annotations in {', '.join(sorted(annotation_folders))}; {pictures}")


def audit_pictures(
    paths: list[Path],
    root: Path | None,  # links must not lead out of this folder; None: links are not checked
    deep: bool,  # decode each picture
    title: str,  # of the work, for its progress
) -> tuple[list[Path], list[str]]:
    "The pictures that are missing, and why others are broken."

    def find_fault(path: Path) -> str | None:  # None: it is missing
        if not os.path.isfile(path):
            return None
        fault = find_picture_fault(path, root)
        if deep and not fault:
            try:
                read_picture(path)
            except CalaError as error:
                return str(error)
        return fault

    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's warnings of decompression bombs; they are among the faults
        results = pool.map(find_fault, paths) if deep else map(find_fault, paths)
        faults = list(show_progress(results, title, len(paths), "pictures", is_part=True))
    missing = {path for path, fault in zip(paths, faults) if fault is None}
    return sorted(missing), [fault for fault in faults if fault]

"""The two files that the CIRR server takes: written, and checked as the server reads them.

The targets of CIRR's test split are known to the server only. It takes two JSON files, each of at most 5 MB: one names
the first 50 pictures for every query (metric `recall`), the other the first 3 of the query's group (`recall_subset`).
The reference of a query is never named.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

from torch import Tensor

from ..annotations import Triplet
from ..data import CIRR, Triplets
from ..errors import CalaError, count_things
from ..rerank import Reranker
from ..retrieval import Embedded, evaluating
from .files import make_output_folder, write_atomically
from .gallery import Top, top_k

SUBMISSION_SIZES = {"recall": 50, "recall_subset": 3}  # names per query
SUBMISSION_BYTES = 5_000_000  # the server takes no more


def check_submittable(
    dataset: Triplets,  # usually the split test1 of CIRR
) -> CIRR:  # the same
    "Raise `CalaError` unless each query has 50 pictures to name and a group of which three are named."
    if not isinstance(dataset, CIRR) or dataset.groups is None:
        name = f"{dataset.name} {dataset.split}"
        raise CalaError(f"only CIRR with whole groups of six has a submission, not {name}; cala-check lists faults")
    if len(dataset.gallery) <= 50:
        raise CalaError(
            f"a submission names 50 pictures for each query, and {dataset.split} has {len(dataset.gallery)} in all; "
            "draw a larger world"
        )
    return dataset


# Writing


def sort_again(
    reranker: Reranker,
    top: Top,
    embedded: Embedded,  # of the data set
    dataset: CIRR,
) -> Tensor:  # (Q, k) gallery positions on the CPU
    "The best pictures, with the first of them ranked again."
    place = embedded.gallery.device
    query = embedded.reference, embedded.text, embedded.gallery[dataset.references]
    with evaluating(reranker.model):
        return reranker.sort(top.positions.to(place), top.scores.to(place), query, embedded.gallery).cpu()


def write_cirr_submission(
    frame: Any,  # has .scores(reference, text, pictures)
    embedded: Embedded,  # of the data set
    dataset: CIRR,  # usually the split test1
    folder: str | Path,  # made if it does not exist
    name: str = "cirr_submission",  # recall_submission_<name>.json and recall_subset_submission_<name>.json
    reranker: Reranker | None = None,  # ranks the best candidates again
) -> tuple[Path, Path]:  # both files, checked
    "Rank, write both files, read them again and check them."
    check_submittable(dataset)
    folder, names = make_output_folder(folder), dataset.gallery.names
    features = embedded.reference, embedded.text, embedded.gallery
    paths = []
    for metric, k, among in (("recall", 50, None), ("recall_subset", 5, dataset.groups)):
        top = top_k(frame, *features, k, exclude=dataset.references, among=among)
        best = top.positions if reranker is None else sort_again(reranker, top, embedded, dataset)
        content: dict[str, Any] = dict(version="rc2", metric=metric)
        for triplet, positions in zip(dataset.triplets, best[:, : SUBMISSION_SIZES[metric]].tolist()):
            content[triplet.pair_id] = [names[position] for position in positions]
        path = folder / f"{metric}_submission_{name}.json"
        write_atomically(path, json.dumps(content, separators=(",", ":")).encode())
        paths.append(check_cirr_submission(path, dataset))
    return paths[0], paths[1]


# Checking


def check_cirr_submission(
    path: str | Path,  # a JSON file
    dataset: CIRR,  # the split that it answers
) -> Path:
    "Raise `CalaError` with all faults of a file; return its path if the server will take it."
    faults = submission_faults(path, dataset)
    if faults:
        raise CalaError(f"{path} would be refused: {'; '.join(faults)}. Write it again with cala-cirr-submission")
    return Path(path)


def submission_faults(
    path: str | Path,  # a JSON file
    dataset: CIRR,  # the split that it answers
) -> list[str]:  # empty if the server will take it
    "All faults of a submission file, one line for each kind."
    content, faults = read_submission(path)
    if not content:
        return faults or ["it is empty"]
    length, version, metric = Path(path).stat().st_size, content.pop("version", None), content.pop("metric", None)
    if length > SUBMISSION_BYTES:
        faults.append(f"it has {length:,} bytes, the server takes {SUBMISSION_BYTES:,}")
    if version != "rc2":
        faults.append(f"version is {version!r}, not 'rc2'")
    if metric not in SUBMISSION_SIZES:
        return [*faults, f"metric is {metric!r}, not 'recall' or 'recall_subset'"]
    size, names = SUBMISSION_SIZES[metric], set(dataset.gallery.names)

    def find_fault(answer: Any, triplet: Triplet) -> str:
        if not isinstance(answer, list) or not all(isinstance(name, str) for name in answer):
            return "the answer is no list of names"
        if len(answer) != size:
            return f"the answer does not name {size} pictures"
        if len(set(answer)) < len(answer):
            return "a picture is named twice"
        if triplet.reference in answer:
            return "the reference is named"
        if not names.issuperset(answer):
            return "a picture is not in the split"
        if metric == "recall_subset" and not set(triplet.group).issuperset(answer):
            return "a picture is outside the group"
        return ""

    return faults + find_faults(content, dataset, "pair id", "pair ids", find_fault)


def read_submission(
    path: str | Path,  # a JSON file
    command: str = "cala-cirr-submission",  # that writes such files
) -> tuple[dict, list[str]]:  # its content, and faults
    "Read a submission file; a key that it has twice is a fault, because JSON keeps the last one silently."
    repeated = []

    def note_repeated(pairs):
        repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        content = json.loads(Path(path).read_bytes().decode(), object_pairs_hook=note_repeated)  # UTF-8 only
    except OSError as error:
        message = f"{path} cannot be read ({error.strerror}); write it with {command}"
        raise CalaError(message) from None
    except (ValueError, RecursionError) as error:
        return {}, [f"it is not JSON ({error})"]
    if not isinstance(content, dict):
        return {}, ["it is not a JSON object"]
    if repeated:
        return content, [f"keys are there more than once: {len(repeated)}, the first is {repeated[0]}"]
    return content, []


def find_faults(
    content: dict,  # of a submission file: query -> answer
    dataset: Triplets,  # the split that it answers
    query: str,  # what a query is called
    queries: str,  # several of them
    find_fault: Callable,  # answer, triplet -> what is wrong with the answer; "" if it is right
) -> list[str]:
    "Faults of the keys, and for each kind of fault of an answer how many queries have it."
    triplets = {triplet.pair_id: triplet for triplet in dataset.triplets}
    faults = []
    missing = [key for key in triplets if key not in content]
    if missing:
        faults.append(f"{queries} are missing: {len(missing)} of {len(triplets)}, the first is {missing[0]}")
    unknown = [key for key in content if key not in triplets]
    if unknown:
        faults.append(f"keys are no {query} of {dataset.split}: {len(unknown)}, the first is {shorten(unknown[0])}")
    keys_of = {}  # fault of an answer -> queries that have it
    for key, answer in content.items():
        if key in triplets:
            keys_of.setdefault(find_fault(answer, triplets[key]), []).append(key)
    for fault, keys in keys_of.items():
        if fault:
            faults.append(f"{fault} ({count_things(len(keys), 'query', 'queries')}, the first is {keys[0]})")
    return faults

"""The two files that the CIRR server takes: written, and checked as the server reads them.

The targets of CIRR's test split are known to the server only. It takes two JSON files, each of at most 5 MB: one names
the first 50 pictures for every query (metric `recall`), the other the first 3 of the query's group (`recall_subset`).
The reference of a query is never named.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..annotations import Triplet
from ..data import CIRR
from ..data import Triplets
from ..errors import CalaError
from ..errors import count_things
from ..rerank import Reranker
from ..retrieval import Embedded
from ..retrieval import evaluating
from .files import write_atomically
from .gallery import Top
from .gallery import top_k

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


def make_submission(
    metric: str,  # recall or recall_subset
    best: Top,
    dataset: CIRR,
) -> dict:
    "The content of one file: the names of the best pictures, by pair id."
    names = dataset.gallery.names
    content: dict[str, Any] = dict(version="rc2", metric=metric)
    for triplet, positions in zip(dataset.triplets, best.positions.tolist()):
        content[triplet.pair_id] = [names[position] for position in positions]
    return content


def sort_again(
    reranker: Reranker,
    top: Top,
    embedded: Embedded,  # of the data set
    dataset: CIRR,
) -> Top:  # the same pictures in another order; the scores are those of QTM
    "The best pictures, with the first of them ranked again."
    own = embedded.gallery[dataset.references]
    place = embedded.gallery.device
    query = embedded.reference, embedded.text, own
    with evaluating(reranker.model):
        positions = reranker.sort(top.positions.to(place), top.scores.to(place), query, embedded.gallery).cpu()
    order = (positions[:, :, None] == top.positions[:, None]).long().argmax(2)
    return Top(positions, top.scores.gather(1, order))


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
    features = embedded.reference, embedded.text, embedded.gallery
    best = {
        "recall": top_k(frame, *features, 50, exclude=dataset.references),
        "recall_subset": top_k(frame, *features, 5, exclude=dataset.references, among=dataset.groups),
    }
    if reranker is not None:
        best = {metric: sort_again(reranker, top, embedded, dataset) for metric, top in best.items()}
    best["recall_subset"] = Top(*(column[:, :3] for column in best["recall_subset"]))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for metric in SUBMISSION_SIZES:
        path = folder / f"{metric}_submission_{name}.json"
        content = make_submission(metric, best[metric], dataset)
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
    size, metric = Path(path).stat().st_size, content.pop("metric", None)
    if size > SUBMISSION_BYTES:
        faults.append(f"it has {size:,} bytes, the server takes {SUBMISSION_BYTES:,}")
    version = content.pop("version", None)
    if version != "rc2":
        faults.append(f"version is {version!r}, not 'rc2'")
    if metric not in SUBMISSION_SIZES:
        return [*faults, f"metric is {metric!r}, not 'recall' or 'recall_subset'"]
    triplets, names = {triplet.pair_id: triplet for triplet in dataset.triplets}, set(dataset.gallery.names)
    missing = [pair for pair in triplets if pair not in content]
    if missing:
        faults.append(f"pair ids are missing: {len(missing)} of {len(triplets)}, the first is {missing[0]}")
    unknown = [key for key in content if key not in triplets]
    if unknown:
        faults.append(f"keys are no pair id of {dataset.split}: {len(unknown)}, the first is {unknown[0]}")
    answers = {pair: answer for pair, answer in content.items() if pair in triplets}
    return faults + count_faults(
        (pair, answer_fault(answer, triplets[pair], metric, names)) for pair, answer in answers.items()
    )


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


def answer_fault(
    answer: list,  # names, if it is right
    triplet: Triplet,
    metric: str,  # recall or recall_subset
    names: set[str],  # of the split
) -> str:  # "" if the answer is right
    "The fault of the answer to one query."
    size = SUBMISSION_SIZES[metric]
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


def count_faults(
    faults: Iterable[tuple[str, str]],  # pair id and fault
) -> list[str]:
    "One line for each kind of fault: how many queries have it, and the first of them."
    pairs_of = {}
    for pair, fault in faults:
        if fault:
            pairs_of.setdefault(fault, []).append(pair)
    lines = []
    for fault, pairs in pairs_of.items():
        count = count_things(len(pairs), "query", "queries")
        lines.append(f"{fault} ({count}, the first is {pairs[0]})")
    return lines

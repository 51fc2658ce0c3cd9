"""What a model reaches, next to three baselines: results, a table, and files that say what was measured on what."""

import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .. import __version__
from ..data import Triplets
from ..errors import CalaError
from ..errors import count_things as count_things
from ..model import CaLa
from ..progress import show_progress
from ..rerank import WEIGHTS, Reranker, best_weight, evaluate_again, sweep_weights
from ..retrieval import Embedded, Result, chance, image_only, measure, text_only
from ..trust import hash_tensors
from .checkpoint import read_recipe
from .circo import CIRCO, circo_baselines, measure_circo
from .files import write_atomically
from .flags import DataFlags, RerankFlags
from .loading import find_device, hash_weights

RESULT_FILES = ("result.json", "result.csv", "ranks.csv")


def measure_rows(
    frame: Any,  # the model's
    embedded: Embedded,  # by the model
    dataset: Triplets,  # CIRR, FashionIQ or CIRCO
    name: str,  # of the model's row
) -> dict[str, Result]:  # by the name of the row
    "Three baselines, which a composition has to beat, and the model."
    if isinstance(dataset, CIRCO):
        return circo_baselines(embedded, dataset) | {name: measure_circo(frame, embedded, dataset)}
    return {
        "chance": chance(dataset),
        "image only": image_only(embedded, dataset),
        "text only": text_only(embedded, dataset),
        name: measure(frame, embedded, dataset),
    }


def measure_again(
    flags: RerankFlags,
    model: CaLa,  # with its compositor
    embedded: Embedded,  # by the model
    dataset: Triplets,  # CIRR or FashionIQ
) -> Result:
    "The model with its best candidates ranked again; a weight that is not given is chosen on the same queries."
    weight = flags.rerank_weight
    if weight is None:
        weights: Any = show_progress(WEIGHTS, "choose the weight of CTR", unit="weights", is_part=True)
        weight = best_weight(sweep_weights(model, dataset, flags.rerank or 0, weights, [embedded]))
    result = evaluate_again(Reranker(model, flags.rerank or 0, weight), dataset, [embedded])
    result["rerank_weight_chosen_here"] = flags.rerank_weight is None
    return result


def find_rerank_weight(
    flags: Any,  # with a checkpoint and the fields of RerankFlags
) -> float:
    """The weight of CTR in the second ranking: --rerank-weight, or what cala-validate chose for the same weights.

    The result is looked for where cala-validate writes it, and in a folder of that name in the run's folder."""
    if flags.rerank_weight is not None:
        return flags.rerank_weight
    digest = read_recipe(flags.checkpoint)["sha256"]
    for folder in (Path("validation"), Path(flags.checkpoint).parent / "validation"):
        try:
            content = json.loads((folder / "result.json").read_bytes())
            result, measured = content["result"], content["weights"]["checkpoint"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError):  # no result, or that of another command
            continue
        if measured == digest and result.get("rerank_weight_chosen_here"):
            weight = float(result["rerank_weight"])
            place, count = folder / "result.json", result["rerank"]
            print(f"--rerank-weight {weight:g}: chosen by cala-validate --rerank {count} ({place})", file=sys.stderr)
            return weight
    command = f"cala-validate --checkpoint {flags.checkpoint} --rerank {flags.rerank}"
    raise CalaError(
        f"--rerank {flags.rerank} needs --rerank-weight; {command} chooses it and writes validation/result.json, "
        "where it is found"
    )


def label_metric(
    key: str,  # of a result
) -> str:
    "Its name in tables: R@5 for recall_at5, Rs@1 for group_recall_at1, dress R@10 for dress_recall_at10, mAP@5."
    if key.startswith("map_at"):
        return f"mAP@{key.removeprefix('map_at')}"
    head, _, k = key.partition("recall_at")
    if head == "group_":
        return f"Rs@{k}"
    return f"{head[:-1]} R@{k}".strip()


def is_shown(
    key: str,  # of a result
) -> bool:
    "True for a metric that tables show: recalls, and mAP over all queries; False for facts, means, bounds and aspects."
    is_metric = "recall_at" in key or key.startswith("map_at")
    return is_metric and not key.startswith(("lowest_", "highest_"))


def baseline_table(
    results: dict[str, Result],  # by the name of the row
) -> pd.DataFrame:  # one row per method, one column per metric, and the mean by which models are selected
    "Metrics in percent."
    rows = {}
    for name, result in results.items():
        rows[name] = {label_metric(key): value for key, value in result.items() if is_shown(key)}
        if "mean" in result:
            rows[name]["mean"] = result["mean"]
    return pd.DataFrame(rows).T


def describe_result(
    result: Result,
) -> str:
    "What was measured on: data set, split, protocol, sizes; and ties, if there are any."
    sizes = [f"{key.removesuffix('_gallery')} {result[key]:,}" for key in result if key.endswith("_gallery")]
    gallery = ", ".join(sizes) or f"{result['gallery']:,}"
    protocol = f"protocol {result['protocol']}" if result["dataset"] == "FashionIQ" else result["protocol"]
    if result.get("gallery_of") == "all":
        gallery += " (of all splits)"
    parts = [
        f"{result['dataset']} {result['split']}, {protocol}",
        f"gallery {gallery}",
        count_things(result["queries"], "query", "queries"),
    ]
    if "text" in result:
        parts.append(f"text: {result['text']}")
    if result.get("text_form", "both") != "both":
        parts.append(f"text form {result['text_form']}")
    if result.get("follow_links"):
        parts.append("links out of the folder are followed")
    if "rerank" in result:
        origin = " (chosen on these queries)" if result["rerank_weight_chosen_here"] else ""
        parts.append(f"the best {result['rerank']} ranked again with weight {result['rerank_weight']:g}{origin}")
    if result["missing"]:
        parts.append(count_things(result["missing"], "picture missing", "pictures missing"))
    if result.get("ties"):
        place = "at a truth" if result["dataset"] == "CIRCO" else "at the target"
        parts.append(f"{count_things(result['ties'], 'query has a tie', 'queries have ties')} {place}")
    return "; ".join(parts)


def describe_aspects(
    result: Result,
) -> str:  # "" if the result has no semantic aspects
    "The mAP@10 of the queries of each semantic aspect of CIRCO."
    parts = [
        f"{key.removesuffix('_map_at10').replace('_', ' ')} {value:.2f}"
        for key, value in result.items()
        if key.endswith("_map_at10")
    ]
    return f"mAP@10 by semantic aspect: {', '.join(parts)}" if parts else ""


def describe_bounds(
    result: Result,
) -> str:  # "" if no recall depends on the order of tied pictures
    "Between which values each recall lies that depends on the order of tied pictures."
    parts = [
        f"{label_metric(key)} {result[f'lowest_{key}']:.2f} to {result[f'highest_{key}']:.2f}"
        for key in result
        if f"lowest_{key}" in result and is_shown(key)
    ]
    return f"in the worst and the best order of tied pictures: {', '.join(parts)}" if parts else ""


def describe_run(
    flags: DataFlags,
    model: CaLa,  # that was measured
) -> dict:
    "Where a number comes from: flags, recipe, weights, versions, device."
    recipe = read_recipe(flags.checkpoint)["recipe"] if flags.checkpoint else {}
    recipe.pop("api_key", None)
    return dict(
        flags=asdict(flags),
        recipe=recipe,
        backbone=model.backbone.name,
        frame=model.config["cir_frame"],
        weights=hash_weights(flags) or dict(tensors=dict(sha256=hash_tensors(model.state_dict()))),
        versions=dict(cala=__version__, torch=torch.__version__, python=platform.python_version()),
        device=str(find_device(flags.device)),
    )


def write_results(
    folder: Path,  # exists
    results: dict[str, Result],  # by the name of the row, the model's last
    about: dict,  # from `describe_run`
):
    "Write result.json with everything, result.csv with one line per row, and ranks.csv with one line per query."
    *baselines, model = results
    content = dict(result=results[model], baselines={name: results[name] for name in baselines}, **about)
    rows = pd.DataFrame([dict(row=name, **result) for name, result in results.items()]).set_index("row")
    rows.loc[model, "weights_sha256"] = " ".join(file["sha256"] for file in about["weights"].values())
    rows.loc[model, "recipe"] = json.dumps(about["recipe"] or about["flags"], default=str)
    write_atomically(folder / "result.json", json.dumps(content, indent=1, default=str).encode())
    write_atomically(folder / "result.csv", rows.to_csv().encode())
    ranks = results[model].ranks
    if ranks is not None:
        write_atomically(folder / "ranks.csv", ranks.to_csv(index=False).encode())

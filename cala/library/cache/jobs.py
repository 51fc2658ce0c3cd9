"""What cala-cache does: plan the caches of some splits, say what they cost, and only then build them."""

from pathlib import Path
from shutil import disk_usage
from time import perf_counter
from typing import NamedTuple

import pandas as pd
from accelerate import PartialState

from ...data import Triplets
from ...encoders import Backbone
from ...model import CaLa
from ...recipe import Recipe
from ...training import make_model
from ...training import open_split
from ..checkpoint import load_checkpoint
from ..checkpoint import read_recipe
from . import TargetSide
from . import TokenCache
from . import cache_folder
from . import cache_targets
from . import cache_tokens
from . import make_target_side
from . import trunk_dtype
from .build import CacheBuild
from .build import check_disk_space
from .build import format_bytes
from .build import format_seconds
from .files import fingerprint


class Job(NamedTuple):
    "One cache that is to be complete in the end."

    kind: str  # tokens or targets
    dataset: Triplets
    side: TargetSide | None  # of targets
    build: CacheBuild


def load_model(
    recipe: Recipe,  # with `checkpoint`; changed in place: the checkpoint knows the transform and what trains
) -> CaLa:
    "The model whose frozen modules are cached."
    if not recipe.checkpoint:
        (data,) = open_split(recipe, "train")
        return make_model(recipe, [text for triplet in data.triplets for text in triplet.captions])
    saved = read_recipe(recipe.checkpoint)["recipe"]
    for key in ("transform", "target_ratio", "encoder"):
        setattr(recipe, key, saved.get(key) or getattr(recipe, key))
    model = load_checkpoint(recipe.checkpoint, weights=recipe.backbone_weights, tokenizer=recipe.tokenizer)
    model.backbone.fine_tune(recipe.encoder)
    return model


def open_splits(
    recipe: Recipe,  # with `splits`
    backbone: Backbone,
) -> list[Triplets]:
    "The data sets of all splits; FashionIQ has one for each category except in train."
    transform = backbone.transform(recipe.transform, recipe.target_ratio)
    datasets = []
    for split in recipe.splits.replace(",", " ").split():
        datasets += open_split(recipe, split, transform)
    for data in datasets:
        data.require_pictures(recipe.allow_missing)
    return datasets


def plan_jobs(
    recipe: Recipe,
    model: CaLa,  # on its device
    datasets: list[Triplets],
) -> list[Job]:
    "The caches that a run with this recipe reads: tokens first, then targets where they are constant."
    backbone, folder = model.backbone, cache_folder(recipe.cache_dir, recipe.data_root)
    dtype = trunk_dtype(backbone) if recipe.cache_dtype == "auto" else recipe.cache_dtype
    weights = fingerprint(backbone.trunk)
    options = dict(num_workers=recipe.num_workers, report=print)
    jobs = []
    for data in datasets:
        build = CacheBuild(backbone.trunk, data.gallery, folder, dtype, weights=weights, **options)
        jobs.append(Job("tokens", data, None, build))
    for data in datasets:
        side = make_target_side(model, data)
        if recipe.cache == "auto" and side.is_constant:
            key = side.fingerprint(weights)
            build = CacheBuild(side, data.gallery, folder, dtype, weights=key, trunk=backbone.trunk, **options)
            jobs.append(Job("targets", data, side, build))
    return jobs


def name_gallery(
    data: Triplets,
) -> str:
    "The split, and the category where a gallery has one."
    if data.name == "FashionIQ" and data.split != "train":
        return f"{data.split} {' '.join(data.categories)}"
    return data.split


def make_table(
    jobs: list[Job],
) -> pd.DataFrame:
    "A row for each job: pictures, pictures to do, size and time."
    rows = []
    for job in jobs:
        build = job.build
        row = dict(gallery=name_gallery(job.dataset), cache=job.kind, pictures=f"{len(job.dataset.gallery):,}")
        row |= dict(to_do=f"{len(build.rows):,}", each="complete", format=build.dtype, size="", time="")
        if build.rows:  # of a complete cache no cost is measured
            cost = build.cost
            row["each"] = " x ".join(f"{n:,}" for n in cost.shape[1:])
            row |= dict(size=format_bytes(cost.total_bytes), time=format_seconds(cost.seconds))
        rows.append(row)
    return pd.DataFrame(rows)


def describe_total(
    jobs: list[Job],
    folder: Path,  # holds all caches
) -> str:
    "Bytes to write, free space and time; `CalaError` if there is not enough space."
    costs = [job.build.cost for job in jobs if job.build.rows]
    if not costs:
        return f"all caches are complete, in {folder}"
    size = sum(cost.bytes_to_write for cost in costs)
    check_disk_space(folder, size)
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free, duration = format_bytes(disk_usage(existing).free), format_seconds(sum(cost.seconds for cost in costs))
    return f"{format_bytes(size)} to write into {folder} ({free} free), about {duration}"


def build_jobs(
    jobs: list[Job],
    model: CaLa,  # on its device
    folder: Path,  # holds all caches
    num_workers: int = 0,  # processes that decode
) -> list[TokenCache]:
    "Build what is missing, and open all of it."
    trunk = model.backbone.trunk
    weights = fingerprint(trunk)
    tokens, caches = {}, []  # tokens: by data set, to make its targets from
    for kind, data, side, build in jobs:
        options = dict(dtype=build.dtype, num_workers=num_workers, report=None, weights=weights)
        if kind == "tokens":
            tokens[id(data)] = cache_tokens(trunk, data.gallery, folder, **options)
            caches.append(tokens[id(data)])
        else:
            caches.append(cache_targets(side, data.gallery, folder, tokens[id(data)], **options))
    return caches


def prepare_caches(
    recipe: Recipe,  # with splits, checkpoint, dry_run and verify, as cala-cache has them
) -> list[TokenCache]:  # empty after --dry-run
    "Plan the caches of a run, print what they cost, and build them; several processes share the work."
    state, start = PartialState(), perf_counter()
    report = print if state.is_main_process else lambda *words: None
    model = load_model(recipe).to(state.device)
    folder = cache_folder(recipe.cache_dir, recipe.data_root)
    jobs = plan_jobs(recipe, model, open_splits(recipe, model.backbone))
    report(make_table(jobs).to_string(index=False))
    report(describe_total(jobs, folder))
    if recipe.dry_run:
        return []
    caches = build_jobs(jobs, model, folder, recipe.num_workers)
    if recipe.verify:
        for cache in caches:
            cache.verify()
    size, duration = format_bytes(sum(cache.disk_bytes for cache in caches)), format_seconds(perf_counter() - start)
    processes = f", {state.num_processes} processes" if state.num_processes > 1 else ""
    verified = ", verified" if recipe.verify else ""
    report(f"{size} in place after {duration}{processes}{verified}")
    return caches

"""What cala-cache does: plan the caches of some splits, say what they cost, and only then build them."""

from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import pandas as pd
from accelerate import PartialState

from ...data import FashionIQ, Triplets
from ...encoders import Backbone
from ...model import CaLa
from ...recipe import Recipe, split_words
from ...training import open_split
from ..checkpoint import load_checkpoint, read_recipe
from ..run import open_model
from . import TargetCache, TargetSide, TokenCache, cache_folder, make_target_side, trunk_dtype
from .build import CacheBuild, check_disk_space, format_bytes, format_seconds
from .files import fingerprint


class Job(NamedTuple):
    "One cache that is to be complete in the end."

    kind: str  # tokens or targets
    dataset: Triplets
    side: TargetSide | None  # None for tokens
    build: CacheBuild


def load_model(
    recipe: Recipe,  # changed in place: a checkpoint knows the transform and what trains
    checkpoint: str | None = None,  # folder that cala-train wrote; None: a new model
) -> CaLa:
    "The model whose frozen modules are cached."
    if not checkpoint:
        return open_model(recipe)
    saved = read_recipe(checkpoint)["recipe"]
    for key in ("transform", "target_ratio", "encoder"):
        setattr(recipe, key, saved.get(key) or getattr(recipe, key))
    files = dict(weights=recipe.backbone_weights, tokenizer=recipe.tokenizer)
    model = load_checkpoint(checkpoint, **{name: value for name, value in files.items() if value})
    model.backbone.fine_tune(recipe.encoder or "both")
    return model


def open_splits(
    recipe: Recipe,
    splits: str | tuple[str, ...],  # train, val, test1 (CIRR), test (FashionIQ)
    backbone: Backbone,
) -> list[Triplets]:
    "The data sets of all splits; FashionIQ has one for each category except in train."
    transform = backbone.transform(recipe.transform, recipe.target_ratio)
    datasets = [data for split in split_words(splits) for data in open_split(recipe, split, transform)]
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
    workers, jobs = recipe.num_workers, []
    for data in datasets:
        build = CacheBuild(backbone.trunk, data.gallery, folder, dtype, num_workers=workers, weights=weights)
        jobs.append(Job("tokens", data, None, build))
    for data in datasets:
        side = make_target_side(model, data)
        if recipe.cache == "auto" and side.is_constant:
            key, trunk = side.fingerprint(weights), backbone.trunk
            build = CacheBuild(side, data.gallery, folder, dtype, num_workers=workers, weights=key, trunk=trunk)
            jobs.append(Job("targets", data, side, build))
    return jobs


def make_table(
    jobs: list[Job],
) -> pd.DataFrame:
    "A row for each job: pictures, pictures to do, size and time."
    rows = []
    for job in jobs:
        data, build = job.dataset, job.build
        gallery = data.split
        if isinstance(data, FashionIQ) and data.split != "train":  # a gallery for each category
            gallery += f" {' '.join(data.categories)}"
        each, size, duration = "complete", "", ""
        if build.rows:  # of a complete cache no cost is measured
            each = " x ".join(f"{n:,}" for n in build.cost.shape[1:])
            size, duration = format_bytes(build.cost.total_bytes), format_seconds(build.cost.seconds)
        row = dict(gallery=gallery, cache=job.kind, pictures=f"{len(build.gallery):,}", to_do=f"{len(build.rows):,}")
        rows.append(row | dict(each=each, format=build.dtype, size=size, time=duration))
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
    free, duration = check_disk_space(folder, size), format_seconds(sum(cost.seconds for cost in costs))
    return f"{format_bytes(size)} to write into {folder} ({format_bytes(free)} free), about {duration}"


def build_jobs(
    jobs: list[Job],
) -> list[TokenCache]:
    "Build what is missing, and open all of it."
    tokens, caches = {}, []  # tokens: by the names of the gallery, to make its targets from
    for _, data, side, build in jobs:
        names = tuple(data.gallery.names)
        if side is None:
            cache = tokens[names] = TokenCache(build.finish(), names)
        else:
            build.tokens = tokens[names]
            cache = TargetCache(build.finish(), names, side.extra_feature)
        caches.append(cache)
    return caches


def prepare_caches(
    recipe: Recipe,  # a run that will read the caches
    splits: str | tuple[str, ...],  # as for `open_splits`
    checkpoint: str | None = None,  # as for `load_model`
    dry_run: bool = False,  # print what it would cost, build nothing
    verify: bool = False,  # read all of it again at the end and compare with checksums
) -> list[TokenCache]:  # empty after a dry run
    "Plan the caches of a run, print what they cost, and build them; several processes share the work."
    state, start = PartialState(), perf_counter()
    model = load_model(recipe, checkpoint).to(state.device)
    folder = cache_folder(recipe.cache_dir, recipe.data_root)
    jobs = plan_jobs(recipe, model, open_splits(recipe, splits, model.backbone))
    state.print(make_table(jobs).to_string(index=False))
    state.print(describe_total(jobs, folder))
    if dry_run:
        return []
    caches = build_jobs(jobs)
    if verify:
        for cache in caches:
            cache.verify()
    size, duration = format_bytes(sum(cache.disk_bytes for cache in caches)), format_seconds(perf_counter() - start)
    processes = f", {state.num_processes} processes" if state.num_processes > 1 else ""
    state.print(f"{size} in place after {duration}{processes}{', verified' if verify else ''}")
    return caches

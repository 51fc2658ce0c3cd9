"""The flags by which commands name a model and say how pictures are read, and those of the benchmark.

This module loads without torch.

`cala.library.loading` makes a model from these flags.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import CalaError, count_things, is_or_are
from ..recipe import (
    CATEGORIES,
    CacheDtype,
    CacheName,
    DataRecipe,
    LogitScale,
    LoopRecipe,
    ModelRecipe,
    Precision,
    check_fields,
    number,
    spell_flag,
    split_words,
)

# The flag for each of BLIP-2's three Q-Formers, by its role.
BLIP2_ROLES = {"textual": "blip2_textual_path", "multimodal": "blip2_multimodal_path", "visual": "blip2_visual_path"}
# The flags that say where a model comes from.
SOURCES = {
    "checkpoint": ("checkpoint",),
    "blip2": tuple(BLIP2_ROLES.values()),
    "clip": ("clip_model_name", "clip_model_path"),
}


@dataclass
class ModelFlags:
    "Which model."

    checkpoint: str | None = None  # folder that cala-train wrote (best or last)
    combining_function: str | None = None  # sum, artemis or combiner; None: the checkpoint's, or sum
    combiner_path: str | None = (
        None  # weights of Combiner or ARTEMIS: the released program's file, or a checkpoint folder
    )
    projection_dim: int | None = None  # Combiner: checked against its file; may be left out
    hidden_dim: int | None = None  # Combiner: checked against its file; may be left out
    clip_model_name: str | None = None  # open_clip model; RN50x4 for --clip-model-path alone
    clip_model_path: str | None = None  # fine-tuned CLIP weights
    blip2_model_name: Literal["pretrain_vitL", "pretrain", "coco"] | None = (
        None  # BLIP-2 of the next three paths: pretrain_vitL (ViT-L, also None), pretrain or coco (ViT-g)
    )
    blip2_textual_path: str | None = None  # BLIP-2: E_c, the released program's file or a checkpoint folder
    blip2_multimodal_path: str | None = None  # BLIP-2: E_m, likewise
    blip2_visual_path: str | None = None  # BLIP-2: E_t, likewise
    backbone_weights: str | None = None  # where this machine keeps the published weights
    tokenizer: str | None = None  # BLIP-2: folder or vocab.txt of bert-base-uncased
    random_weights: Literal["small", "full"] | None = None  # small or full: random backbone, for tests and lessons


@dataclass
class RerankFlags:
    "Whether the best pictures are ranked again."

    rerank: int | None = (
        None  # rank this many of the best again by CTR of --ctr pairs; 20 cost 1 to 3 ms a query, no further memory
    )
    rerank_weight: float | None = None  # of CTR in the second ranking; None: cala-validate chooses it


@dataclass
class PictureFlags(ModelFlags):
    "Which model, and how it reads pictures."

    transform: str | None = None  # targetpad, squarepad, plain, clip; None: the checkpoint's, or targetpad
    target_ratio: float | None = number(
        None, least=1
    )  # target pad: pad only pictures longer than this; None: the checkpoint's, or 1.25
    batch_size: int = number(64, least=1)  # pictures, or queries, at a time
    num_workers: int = number(0, least=0)  # processes that decode pictures
    device: str | None = None  # cpu, cuda, cuda:1, mps ...; None: a GPU if there is one


@dataclass
class DataFlags(PictureFlags):
    "Which model, and which pictures."

    data_root: str = "."  # folder that holds cirr_dataset or fashionIQ_dataset
    precision: Precision = "no"  # no (float32), bf16 or fp16
    cache: CacheName = (
        "off"  # off; tokens: keep the trunk's tokens on disk, as cala-train does; auto: if they are there
    )
    cache_dir: str | None = None  # where caches are; None: .cala_cache in the data root
    cache_dtype: CacheDtype = "auto"  # of cached numbers: float16, float32; auto: what the trunk computes
    follow_links: bool = False  # read pictures outside the data set's folder, too, if links lead there


def find_source(
    flags: ModelFlags,
) -> str:  # checkpoint, blip2 or clip
    "Where the model comes from; contradictory or missing flags raise `CalaError`."
    given = {source: [name for name in names if getattr(flags, name) is not None] for source, names in SOURCES.items()}
    sources = [source for source in given if given[source]]
    if len(sources) > 1:
        names = " and ".join(spell_flag(given[source][0]) for source in sources)
        raise CalaError(f"{names} name two models; give one of them")
    if not sources:
        if flags.random_weights:
            return "clip"
        raise CalaError(
            "no model is named; give --checkpoint, the three --blip2-...-path, or --clip-model-name (RN50x4 ...)"
        )
    source = sources[0]
    missing = [spell_flag(name) for name in SOURCES["blip2"] if name not in given["blip2"]]
    if source == "blip2" and missing:
        raise CalaError(f"BLIP-2 has three Q-Formers: {', '.join(missing)} {is_or_are(len(missing))} missing")
    if source != "blip2" and flags.blip2_model_name:
        raise CalaError("--blip2-model-name belongs to the three --blip2-...-path; leave it out")
    if source == "checkpoint" and flags.random_weights:
        raise CalaError("--checkpoint has weights of its own; leave out --random-weights")
    return source


def check_data_flags(
    flags: PictureFlags,
):
    "Raise `CalaError` for an impossible value."
    check_fields(flags)
    check_workers(flags.num_workers)


def check_workers(
    num_workers: int,  # processes that decode pictures
):
    "Raise `CalaError` for a number of processes that takes minutes to start, or all memory."
    processors = os.cpu_count() or 1
    most = max(64, 4 * processors)
    if num_workers > most:
        machine = f"this machine has {count_things(processors, 'processor', 'processors')}"
        raise CalaError(f"--num-workers {num_workers}: {machine}; give at most {most}")


def check_file_name(
    flag: str,  # that gives it, for the error message
    name: str,  # becomes a part of a file's name
):
    "Raise `CalaError` for a name with a folder in it, or none."
    if not name or set(name) & set("/\\\0"):
        raise CalaError(f"{flag} {name!r}: give a plain file name")


@dataclass
class CombinerRecipe(DataFlags):
    "Train the Combiner on the frozen features of a model."

    dataset: str | None = None  # CIRR or FashionIQ, in any case; None: the checkpoint's
    protocol: Literal["original", "val"] = "original"  # FashionIQ's validation gallery: original or val
    categories: tuple[str, ...] = CATEGORIES  # FashionIQ: which, separated by commas or spaces
    allow_missing: bool = False  # continue although pictures are missing; every result says how many
    num_epochs: int = number(300, least=1)  # passes over the features
    batch_size: int = number(4096, least=1)  # triplets a step; all of them if there are fewer
    feature_batch: int = number(64, least=1)  # pictures, or sentences, at a time while features are computed
    learning_rate: float = number(2e-5, above=0)  # Adam's
    weight_decay: float = number(0.0, least=0)  # AdamW's; 0 is Adam
    seed: int = number(0, least=0)  # of weights, order and dropout
    validation_frequency: int = number(1, least=1)  # epochs from one validation to the next
    output: str | None = None  # an empty folder or a new one; None: runs/<dataset>-combiner


def check_combiner_recipe(
    recipe: CombinerRecipe,  # with the flags that were left out filled in
):
    "Raise `CalaError` for what cannot be trained."
    if not recipe.dataset:
        raise CalaError(
            "no data set is named; give --dataset CIRR or --dataset FashionIQ, "
            "and the model as --checkpoint or --clip-model-path"
        )
    if recipe.combining_function not in (None, "combiner"):
        name = recipe.combining_function
        raise CalaError(f"--combining-function {name}: this command trains a combiner; leave the flag out")


ABLATION_PARTS = ("scale", "ctr", "headline", "conditions", "where", "reasons", "slice")
DATASET_PARTS = ("scale", "headline", "ctr")  # with --dataset
ABLATION_WORLDS = ("cirr", "cirr_hard", "cirr_large", "fashioniq", "fashioniq_hard")
DEFAULT_WORLDS = ("cirr", "fashioniq", "cirr_hard")
DEFAULT_SCALES = ("100", "55", "20", "10", "6", "3", "learned")


@dataclass
class AblationFlags:
    "What is compared."

    parts: tuple[str, ...] = ABLATION_PARTS[:-1]  # questions, separated by commas; slice: a few arms, in minutes
    worlds: tuple[str, ...] = DEFAULT_WORLDS  # drawn data sets; also fashioniq_hard and cirr_large, 10,000 triplets
    seeds: int = number(5, least=1)  # each draws its own data, triplets, order and new weights
    output: str = "ablation"  # folder of data, backbones and rows; a run whose row is there is not run again
    workers: int | None = number(None, least=1)  # processes of one torch thread each; None: one a core
    compare: str | None = None  # a CSV of other runs that the paired differences must agree with
    scales: tuple[str, ...] = DEFAULT_SCALES  # with --dataset: logit scales of QTM that are compared
    cost: bool = False  # with --dataset: print what all runs would cost, and start none


@dataclass
class Ablation(LoopRecipe, ModelRecipe, DataRecipe, AblationFlags):
    """Many short trainings that differ in one thing each; a CSV row a run.

    Without --dataset the data is drawn, and only the flags down to --compare are read. With --dataset the flags of
    cala-train below them say what all runs have in common."""

    dataset: Literal["CIRR", "FashionIQ"] | None = None  # a data set with its pictures; None: drawn worlds
    holdout: float = number(
        0.05, least=0, below=1
    )  # with --dataset: share of the training triplets for choices; 0: val
    cache: CacheName = "auto"  # off, tokens: of the frozen trunk, on disk; auto: if it pays, and targets too
    num_epochs: int = number(
        8, above=0
    )  # passes over the triplets, of every arm; multiples of 4 suit the arm of 25% more
    qtm_scale: LogitScale | None = number(None, above=0)  # of the associations; None: the best scale of the part scale

    def __post_init__(self):
        check_fields(self)
        for name in ("parts", "worlds", "scales"):
            setattr(self, name, split_words(getattr(self, name)))
        defaults = {each.name: each.default for each in fields(Ablation)}
        given = {name for name, value in vars(self).items() if value != defaults[name]}
        if self.dataset is None:
            check_drawn_ablation(self, given)
        else:
            check_dataset_ablation(self, given)


# Flags of cala-train that an ablation on a data set chooses itself.
CHOSEN_BY_ARMS = ("recipe", "objective", "ctr", "tac_weight", "hca_weight", "alpha", "beta", "features", "padding")
CHOSEN_BY_ARMS += ("tbia_scale", "ctr_scale", "cir_frame", "seed", "max_epoch")


def check_drawn_ablation(
    ablation: Any,  # Ablation
    given: set[str],  # names of the flags that differ from their defaults
):
    "`CalaError` for flags that make no ablation on drawn worlds."
    own = {each.name for each in fields(AblationFlags)} - {"scales", "cost"}
    foreign = sorted(given - own)
    if foreign:
        flag = spell_flag(foreign[0])
        raise CalaError(f"{flag} belongs to --dataset, and drawn worlds have their own settings; leave it out")
    check_words("--parts", ablation.parts, ABLATION_PARTS)
    check_words("--worlds", ablation.worlds, ABLATION_WORLDS)
    if ablation.compare:
        check_rows_file(ablation.compare)


def check_dataset_ablation(
    ablation: Any,  # Ablation; changed: parts and scales
    given: set[str],  # names of the flags that differ from their defaults
):
    "`CalaError` for flags that make no ablation on a data set."
    for name in ("worlds", "workers", "compare"):
        if name in given:
            raise CalaError(f"{spell_flag(name)} belongs to drawn worlds; leave it out, or leave out --dataset")
    for name in CHOSEN_BY_ARMS:
        if name in given:
            advice = "give --seeds" if name == "seed" else "leave it out"
            raise CalaError(f"{spell_flag(name)} {getattr(ablation, name)}: an ablation chooses it; {advice}")
    if "parts" not in given:
        ablation.parts = ("scale", "headline")
    check_words("--parts", ablation.parts, DATASET_PARTS)
    if ablation.qtm_scale == "learned":
        raise CalaError("--qtm-scale learned: the associations are compared at a fixed scale; give a number")
    if "scale" not in ablation.parts and ablation.qtm_scale is None:
        raise CalaError(f"--parts {','.join(ablation.parts)}: give --qtm-scale, or --parts scale too, which finds it")
    ablation.scales = read_scales(ablation.scales)


def read_scales(
    words: tuple[str, ...],  # of --scales
) -> tuple[str, ...]:  # numbers in their shortest form, and perhaps the word learned
    "The logit scales of an ablation."
    scales = []
    for word in words:
        try:
            scale = word if word == "learned" else f"{float(word):g}"
        except ValueError:
            scale = "0"
        if scale != "learned" and not 0 < float(scale) < float("inf"):
            raise CalaError(f"--scales {word}: give numbers above 0, or the word learned")
        scales.append(scale)
    if not set(scales) - {"learned"}:
        raise CalaError("--scales: give at least one number")
    return tuple(dict.fromkeys(scales))


def check_rows_file(
    path: str,  # of --compare
):
    "Raise `CalaError` unless the file is a rows.csv of an ablation; only its first line is read."
    if not Path(path).is_file():
        raise CalaError(f"--compare {path}: no such file")
    with open(path, encoding="utf-8", errors="replace") as file:
        columns = file.readline().strip().split(",")
    missing = [name for name in ("setting", "world", "seed", "arm", "kept_mean") if name not in columns]
    if missing:
        raise CalaError(f"--compare {path} has no column {missing[0]}; give a rows.csv that cala-ablation wrote")


def check_words(
    flag: str,  # for the error message
    words: tuple[str, ...],  # its value
    choices: tuple[str, ...],  # the words that exist
):
    "Raise `CalaError` unless every word of a flag is one of the choices."
    if not words or not set(words) <= set(choices):
        raise CalaError(f"{flag} {','.join(words)}: give some of {', '.join(choices)}")


# The benchmark

PARTS = ("steps", "optimizer", "ranking", "artemis", "loading", "circo", "epoch")


@dataclass
class Benchmark:
    "What to measure, and on what."

    size: Literal["small", "full"] = "small"  # small: reduced shapes; full: BLIP-2's. Random weights both
    batch_size: int = number(4, least=1)  # triplets a step
    device: str | None = None  # cpu, cuda ...; None: a GPU if there is one
    precision: Literal["no", "bf16"] = "no"  # no (float32) or bf16 (autocast, and the trunk)
    repeats: int = number(3, least=1)  # of each measurement, after a warm-up; the median counts
    modes: tuple[str, ...] = ("both", "multi")  # of --encoder: both, multi, text
    only: tuple[str, ...] = PARTS[:-2]  # some of the parts, separated by commas; circo and epoch take longest
    triplets: int = number(60, least=1)  # of the epoch's training split; validation has CIRR's share of that
    seed: int = 0  # of weights, world and features
    gpu: bool = False  # instead, all checks and measurements for a GPU, in under eight minutes
    dry: bool = False  # with --gpu: the same on the CPU at reduced shapes
    output: str = "benchmark"  # folder of benchmark.json, benchmark.csv and benchmark.png; with --gpu of gpu.json

    def __post_init__(self):
        check_fields(self)
        self.modes, self.only = split_words(self.modes), split_words(self.only)
        check_words("--modes", self.modes, ("both", "multi", "text"))
        check_words("--only", self.only, PARTS)
        if self.dry and not self.gpu:
            raise CalaError("--dry belongs to --gpu; give both")

    def spell(self) -> str:
        "The command line that measures this."
        words = ["python -m cala.scripts.benchmark"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is True:
                words.append(spell_flag(field.name))
            elif value != field.default:
                words.append(f"{spell_flag(field.name)} {','.join(value) if isinstance(value, tuple) else value}")
        return " ".join(words)

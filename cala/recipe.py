"""All choices of a training run, in one dataclass: each field of `Recipe` is a flag of `cala-train`.

This module imports neither torch nor any other part of cala that does, because `cala-train --help` reads it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from .errors import CalaError

CacheName = Literal["off", "tokens", "auto"]
CacheDtype = Literal["auto", "float16", "float32"]
Precision = Literal["no", "bf16", "fp16"]
CATEGORIES = ("dress", "shirt", "toptee")
LIMITS = dict(  # of a number: how it is compared with the limit, and what the error message asks for
    above=(gt, "a number above {}"),
    least=(ge, "{} or more"),
    below=(lt, "a number below {}"),
    most=(le, "a number up to {}"),
)


def number(
    default: float | None,
    **limits: float,  # names as in `LIMITS`
) -> Any:
    "A field whose value lies in a range."
    return field(default=default, metadata=limits)


class LogitScale:
    "The type of a logit scale: a number, or the word learned."

    expected = "a number, or learned"

    def __new__(cls, value):
        return value if value == "learned" else float(value)


@dataclass
class DataRecipe:
    "What is read."

    dataset: Literal["CIRR", "FashionIQ"] = "CIRR"  # CIRR or FashionIQ, in any case
    data_root: str = "."  # folder that holds cirr_dataset or fashionIQ_dataset
    categories: tuple[str, ...] = CATEGORIES  # FashionIQ: which of them, separated by commas or spaces
    protocol: Literal["original", "val"] = "original"  # FashionIQ validation gallery: original or val
    triplets: int | None = number(None, above=0)  # how many to train on, drawn by the seed; None: all
    holdout: float = number(
        0.0, least=0, below=1
    )  # share of training triplets, by group or reference, kept for choices
    noise_ratio: float = number(0.0, least=0, most=1)  # share of training triplets whose targets are shuffled
    transform: str = "targetpad"  # targetpad, squarepad, plain; clip: the tower's own
    target_ratio: float = number(1.25, least=1)  # target pad: pad only pictures longer than this
    num_workers: int = number(0, least=0)  # processes that decode pictures
    keep_pictures: bool = False  # hold decoded pictures in memory: for small pictures and many epochs
    cache: CacheName = "off"  # tokens: results of the frozen trunk, on disk; auto: if it pays, and targets too
    cache_dir: str | None = None  # where caches are kept; None: .cala_cache beside the data
    cache_dtype: CacheDtype = "auto"  # of cached numbers: float16, float32; auto: what the trunk computes
    allow_missing: bool = False  # go on although pictures are missing; every result says how many
    follow_links: bool = False  # read pictures outside the data set's folder, too, if links lead there


@dataclass
class ModelRecipe:
    "What is built."

    encoder_arch: str = "blip2"  # blip2, clip, tiny, or package.module:Class
    model_name: str | None = None  # blip2: pretrain_vitL, pretrain, coco; clip: RN50x4 ...; None: the first of these
    backbone_weights: str | None = None  # file of weights to read instead of fetching one; blip2: or its folder
    tokenizer: str | None = None  # folder or vocab.txt of bert-base-uncased (BLIP-2), or of a CLIP tower's tokenizer
    trunk_precision: Literal["auto", "fp32", "fp16", "bf16"] | None = None  # of the frozen trunk; auto: half on a GPU
    random_weights: Literal["small", "full"] | None = None  # small or full: random weights, for tests and lessons
    embeds_dim: int | None = None  # width that the backbone must have; None: any
    recipe: Literal["released", "paper", "cala"] | None = None  # a named set of choices; other flags overrule it
    encoder: Literal["both", "multi", "text"] | None = None  # which encoders train; None: the recipe's choice
    model_class: str | None = None  # package.module:Class, your subclass of cala.model.CaLa; None: CaLa itself
    cir_frame: Literal["sum", "artemis", "combiner"] = "sum"  # sum, artemis or combiner
    objective: Literal["released", "paper", "two_way"] | None = (
        None  # how the losses are joined; None: the recipe's choice
    )
    ctr: str | None = None  # compositor of CTR: tac or pairs; None: pairs for two_way, tac for the others
    tac_weight: float | None = number(None, least=0, most=1)  # released: share of CTR in the mixed logits; None: 0.45
    hca_weight: float | None = number(None, least=0, most=1)  # released: share of the TBIA loss; None: 0.1
    alpha: float | None = number(None, least=0)  # paper, two_way: weight of the TBIA loss; None: 0.1, or 0
    beta: float | None = number(None, least=0)  # paper, two_way: weight of the CTR loss; None: 0.1, or 0.3
    hca_dropout: float = number(0.1, least=0, below=1)  # on HCA's attention, in training
    learned_temperature: bool = False  # ARTEMIS: apply the temperature that the released program learns only
    projection_dim: int | None = number(None, above=0)  # Combiner: width of its projections; None: 4 d
    hidden_dim: int | None = number(None, above=0)  # Combiner: width of its hidden layer; None: 8 d
    features: Literal["raw", "normalised"] | None = None  # in the associations' products; None: the objective's choice
    padding: Literal["read", "masked"] | None = None  # in HCA, of captions; None: the objective's choice
    qtm_scale: LogitScale | None = number(None, above=0)  # of the QTM logits of sum and combiner, or learned; None: 100
    tbia_scale: float | None = number(
        None, above=0
    )  # of the TBIA logits; None: 10 for raw features and two_way, 100 for others
    ctr_scale: float | None = number(None, above=0)  # of the CTR logits; None: as for TBIA


@dataclass
class LoopRecipe:
    "How it trains."

    num_epochs: int = number(30, above=0)  # passes over the triplets
    batch_size: int = number(64, above=0)  # triplets a step, over all processes
    neighbours: int = number(1, above=0)  # triplets in a row that stay in one batch; 2 and more make harder negatives
    gallery_negatives: bool = False  # every picture of the training gallery is a negative; with --encoder multi or text
    learning_rate: float = number(5e-6, above=0)  # of Q-Formers and query tokens; associations x2, ARTEMIS x10
    weight_decay: float = number(0.05, least=0)  # of AdamW
    max_epoch: int = number(None, above=0)  # epochs until the rate is --min-lr; None: all, or 15 for released
    min_lr: float = number(0.0, least=0)  # where the learning rate ends
    schedule: Literal["cosine", "released", "constant"] | None = None  # of the learning rate; None: the recipe's choice
    warmup: float = number(0.0, least=0)  # epochs of linear warm-up
    seed: int = number(0, least=0, below=2**32)  # of order, dropout and new weights
    precision: Precision = "no"  # mixed precision; no: float32
    accumulate: int = number(1, above=0)  # pieces in which a batch is encoded; the loss is still over the whole batch
    gradient_checkpointing: bool = False  # keep less for the backward pass and compute it twice; the same numbers
    compile: bool = False  # compile trunk and encoders with torch.compile; needs a C++ compiler
    skip_nonfinite: bool = False  # leave out steps whose loss is not finite, and count them
    process_timeout: int = number(1800, above=0)  # seconds that a process waits for the others before it gives up


@dataclass
class KeepRecipe:
    "What is kept, and where the log goes."

    output: str | None = None  # the run's folder; None: runs/<dataset>-<backbone>-<frame>
    resume: str | None = None  # go on with the run in this folder, with its flags where none is given
    save_training: bool = True  # keep the state after every epoch, to resume from (last/)
    save_best: bool = True  # keep the weights with the best validation score (best/)
    save_steps: int = number(0, least=0)  # save the state also after this many steps; 0: only after epochs
    validation_frequency: int = number(1, above=0)  # epochs from one validation to the next
    api_key: str | None = None  # Comet: log there too
    workspace: str | None = None  # Comet: the workspace; Weights & Biases: the entity
    experiment_name: str | None = None  # name of the run in trackers; also of its folder
    comet_offline: str | None = None  # Comet: write an archive into this folder instead
    tensorboard: bool = False  # log for TensorBoard too, into the run's folder
    wandb: bool = False  # log to Weights & Biases too; with WANDB_MODE=offline into the run's folder


@dataclass
class Recipe(KeepRecipe, LoopRecipe, ModelRecipe, DataRecipe):
    "How to train CaLa; every field is a flag of `cala-train`."

    given: ClassVar[frozenset | None] = None  # names of the fields that a command line gave; None: made in Python

    def __post_init__(self):
        self.categories = split_words(self.categories)
        self.transform = self.transform.lower()
        if ":" not in self.encoder_arch:
            self.encoder_arch = self.encoder_arch.lower()
        check_fields(self)
        vars(self).update(resolve(vars(self)))


# Fields of any dataclass of flags


def spell_flag(
    name: str,  # of a field
) -> str:
    "The flag of a field."
    return "--" + name.replace("_", "-")


def split_words(
    given: str | Iterable[str],  # a text with commas or blanks between the words, or the words
) -> tuple[str, ...]:
    "The words of a flag that is a list, in small letters."
    words = given.replace(",", " ").split() if isinstance(given, str) else given
    return tuple(str(word).lower() for word in words)


def list_choices(
    hint: Any,  # the type of a field
) -> tuple[str, ...]:
    "The choices of a type `Literal[...]` or `Literal[...] | None`; empty for any other type."
    literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    return get_args(literals[0]) if literals else ()


def find_choice(
    flag: str,  # for the error message
    word: Any,  # as typed
    choices: tuple[str, ...],
) -> str:
    "A choice in its own spelling; the case of letters makes no difference."
    for choice in choices:
        if choice.lower() == str(word).lower():
            return choice
    raise CalaError(f"{flag} {word}: choose one of {', '.join(choices)}")


def check_fields(
    flags: Any,  # a dataclass; changed in place
):
    """`CalaError` for the first choice that does not exist, or number that lies outside its range.

    A choice gets its own spelling, and a path becomes a text, because a recipe is saved as JSON. Where the default is
    None, the word None and an empty text mean None."""
    hints = get_type_hints(type(flags))
    for each in fields(flags):
        value, flag = getattr(flags, each.name), spell_flag(each.name)
        choices = list_choices(hints[each.name])
        if isinstance(value, Path):
            value = str(value)
        if each.default is None and value in (None, "None", ""):
            value = None
        elif choices:
            value = find_choice(flag, value, choices)
        elif value != "learned":
            _check_limits(flag, value, each.metadata)
        setattr(flags, each.name, value)


def _check_limits(flag, value, limits):
    "`CalaError` if a number lies outside its range."
    if limits and isinstance(value, str):
        raise CalaError(f"{flag} {value}: give {LogitScale.expected}")
    for name, limit in limits.items():
        is_within, expected = LIMITS[name]
        if not is_within(value, limit):
            raise CalaError(f"{flag} {value}: give {expected.format(limit)}")


# From what was given to a complete recipe

DEFAULTS = dict(
    encoder="both",
    objective="released",
    tac_weight=0.45,
    hca_weight=0.1,
    alpha=0.1,
    beta=0.1,
    schedule="cosine",
)
RECIPES = dict(
    released=dict(schedule="released"),
    paper=dict(objective="paper", encoder="multi"),
    cala=dict(objective="two_way", qtm_scale=6.0),  # the best scale of lesson 12
)
WEIGHTS = dict(released=("tac_weight", "hca_weight"), paper=("alpha", "beta"))
TWO_WAY_WEIGHTS = dict(alpha=0.0, beta=0.3)
RELEASED_MAX_EPOCH = 15  # the published command gives it


def find_objective(
    values: dict,  # of all fields
) -> str | None:
    "The objective that is given, or the one to which a given weight belongs."
    if values["objective"] or values["recipe"]:
        return values["objective"]
    weighted = [name for name, keys in WEIGHTS.items() if any(values[key] is not None for key in keys)]
    if len(weighted) == 2:
        belong = "--tac-weight and --hca-weight belong to --objective released, --alpha and --beta to --objective paper"
        raise CalaError(f"{belong}; choose one")
    return weighted[0] if weighted else None


def resolve(
    values: dict,  # of all fields
) -> dict:
    """The values, with those that are None taken from the named recipe, or else from the plain defaults.

    Without a name the recipe is `cala`; where an objective is given and no name, only the defaults are used."""
    objective = find_objective(values)
    chosen = dict(DEFAULTS)
    if values["recipe"] or not objective:
        chosen |= RECIPES[values["recipe"] or "cala"]
    if objective:
        chosen["objective"] = objective
    if chosen["objective"] == "two_way":
        chosen |= TWO_WAY_WEIGHTS
    if values["cir_frame"] == "artemis":  # its scores have no scale
        chosen.pop("qtm_scale", None)
    missing = {name: value for name, value in chosen.items() if values[name] is None}
    values = {**values, **missing}
    if values["max_epoch"] is None and not values["resume"]:  # a resumed run keeps its own
        values["max_epoch"] = RELEASED_MAX_EPOCH if values["schedule"] == "released" else values["num_epochs"]
    return values


def find_compositor(
    values: dict,  # objective, ctr, tac_weight and beta, of a recipe or of a model's config
) -> str | None:
    "The compositor of CTR, such as tac or pairs; None where CTR has no weight."
    objective = values.get("objective")
    weight = values.get("tac_weight" if objective == "released" else "beta")
    default = "pairs" if objective == "two_way" else "tac"
    return (values.get("ctr") or default) if weight else None


def run_folder(
    recipe: Recipe,  # of the run
) -> Path:
    "The run's folder: --resume, --output, or a name made from the recipe."
    name = recipe.experiment_name or f"{recipe.dataset}-{recipe.encoder_arch.split(':')[-1]}-{recipe.cir_frame}"
    return Path(recipe.resume or recipe.output or f"runs/{name}")

"""All choices of a training run, in one dataclass: each field of `Recipe` is a flag of `cala-train`.

This module imports neither torch nor any other part of cala that does, because `cala-train --help` reads it."""

from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from pathlib import Path
from typing import Any
from typing import Literal
from typing import get_args
from typing import get_origin
from typing import get_type_hints

from .errors import CalaError

CacheName = Literal["off", "tokens", "auto"]
CacheDtype = Literal["auto", "float16", "float32"]
CACHES: tuple[str, ...] = get_args(CacheName)
CACHE_DTYPES: tuple[str, ...] = get_args(CacheDtype)
CATEGORIES = ("dress", "shirt", "toptee")


def number(
    default: float | None,
    above: float | None = None,  # values must be larger
    least: float | None = None,  # or at least this
    below: float | None = None,  # values must be smaller
    most: float | None = None,  # or at most this
) -> Any:
    "A field of a recipe whose value lies in a range."
    return field(default=default, metadata=dict(above=above, least=least, below=below, most=most))


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
    precision: Literal["no", "bf16", "fp16"] = "no"  # mixed precision; no: float32
    accumulate: int = number(1, above=0)  # pieces in which a batch is encoded; the loss is still over the whole batch
    gradient_checkpointing: bool = False  # keep less for the backward pass and compute it twice; the same numbers
    compile: bool = False  # compile trunk and encoders with torch.compile; needs a C++ compiler
    skip_nonfinite: bool = False  # leave out steps whose loss is not finite, and count them
    process_timeout: int = number(1800, above=0)  # seconds that a process waits for the others before it gives up


@dataclass
class KeepRecipe:
    "What is kept, and where the log goes."

    output: str | None = None  # the run's folder; None: runs/<dataset>-<backbone>-<frame>
    resume: str | None = None  # go on with the run in this folder
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

    def __post_init__(self):
        values = resolve(read_choices(vars(self)))
        check_ranges(values)
        vars(self).update(values)


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


def spell_flag(
    name: str,  # of a field
) -> str:
    "The flag of a field."
    return "--" + name.replace("_", "-")


def read_choices(
    values: dict,  # of all fields
) -> dict:
    "Choices in their own spelling, empty texts as None; `CalaError` for a choice that does not exist."
    values = dict(values)
    hints = get_type_hints(Recipe)
    for each in fields(Recipe):
        value = values[each.name]
        if isinstance(value, Path):  # a recipe is saved as JSON
            values[each.name] = value = str(value)
        if each.default is None and value in ("None", ""):
            values[each.name] = value = None
        choices = _list_choices(hints[each.name])
        if choices and not (value is None and each.default is None):
            match = [choice for choice in choices if choice.lower() == str(value).lower()]
            if not match:
                raise CalaError(f"{spell_flag(each.name)} {value}: choose one of {', '.join(choices)}")
            values[each.name] = match[0]
    if isinstance(values["categories"], str):
        values["categories"] = values["categories"].replace(",", " ").split()
    values["categories"] = tuple(values["categories"])
    values["transform"] = values["transform"].lower()
    if ":" not in values["encoder_arch"]:
        values["encoder_arch"] = values["encoder_arch"].lower()
    return values


def _list_choices(hint):
    "The choices of a type `Literal[...]` or `Literal[...] | None`; empty for any other type."
    if get_origin(hint) is Literal:
        return get_args(hint)
    literals = [part for part in get_args(hint) if get_origin(part) is Literal]
    return get_args(literals[0]) if literals else ()


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


def check_ranges(
    values: dict,  # of all fields
):
    "`CalaError` for the first number that lies outside its range."
    for each in fields(Recipe):
        value, limits = values[each.name], each.metadata
        if not limits or (value is None and each.default is None):
            continue
        wrong = f"{spell_flag(each.name)} {value}"
        if value == "learned":
            continue
        if isinstance(value, str):
            raise CalaError(f"{wrong}: give {LogitScale.expected}")
        if limits["above"] is not None and not value > limits["above"]:
            raise CalaError(f"{wrong}: give a number above {limits['above']}")
        if limits["least"] is not None and not value >= limits["least"]:
            raise CalaError(f"{wrong}: give {limits['least']} or more")
        if limits["below"] is not None and not value < limits["below"]:
            raise CalaError(f"{wrong}: give a number below {limits['below']}")
        if limits["most"] is not None and not value <= limits["most"]:
            raise CalaError(f"{wrong}: give a number up to {limits['most']}")


def run_folder(
    recipe: Recipe,  # of the run
) -> Path:
    "The run's folder: --resume, --output, or a name made from the recipe."
    name = recipe.experiment_name or f"{recipe.dataset}-{recipe.encoder_arch.split(':')[-1]}-{recipe.cir_frame}"
    return Path(recipe.resume or recipe.output or f"runs/{name}")

"""What frozen parts say of a picture never changes, so it is computed once, on disk, and read ever after."""
from dataclasses import dataclass
from dataclasses import fields
from pathlib import Path



from .errors import CalaError


CACHES, CACHE_DTYPES = ("off", "tokens", "auto"), ("auto", "float16", "float32")

@dataclass
class DataRecipe:
    "What is read."
    dataset: str = "CIRR"            # CIRR or FashionIQ, in any case
    data_root: str = "."             # folder that holds cirr_dataset or fashionIQ_dataset
    categories: str = "dress,shirt,toptee" # FashionIQ: which, separated by commas
    protocol: str = "original"       # FashionIQ validation gallery: original or val
    triplets: int = None             # train on so many, drawn by the seed; None: all
    transform: str = "targetpad"     # targetpad, squarepad, plain; clip: the tower's own
    target_ratio: float = 1.25       # target pad: pad only pictures longer than this
    num_workers: int = 0             # processes that decode pictures
    keep_pictures: bool = False      # hold decoded pictures in memory: small pictures, many epochs
    cache: str = "off"               # off; tokens: the frozen trunk's tokens once per picture, on disk; auto: if they pay and fit, and constant targets too
    cache_dir: str = None            # where caches live; None: .cala_cache beside the data
    cache_dtype: str = "auto"        # of cached numbers: float16, float32; auto: what the trunk computes
    allow_missing: bool = False      # go on although pictures are missing; every result says how many

@dataclass
class ModelRecipe:
    "What is built."
    encoder_arch: str = "blip2"      # blip2, clip, tiny, or package.module:Class
    model_name: str = None           # which published model: pretrain_vitL, RN50x4 ...; None: the backbone's default
    backbone_weights: str = None     # a file of weights instead of the published ones
    tokenizer: str = None            # folder or vocab.txt of bert-base-uncased (BLIP-2); a CLIP tower with its own tokenizer reads it too
    trunk_precision: str = None      # of the frozen trunk: auto (half on a GPU), fp32, fp16 or bf16
    random_weights: str = None       # small or full: random weights, for tests and lessons
    embeds_dim: int = None           # checked against the backbone; may be left out
    recipe: str = None               # a named set of choices: cala, released or paper; what is given beside it wins
    encoder: str = None              # which encoders train: both, multi or text; None: the recipe's
    cir_frame: str = "sum"           # sum, artemis or combiner
    objective: str = None            # released: mixed logits; paper: added losses; None: the recipe's
    tac_weight: float = None         # released: share of the CTR logits in the mixture, 0.45 if nothing else is said
    hca_weight: float = None         # released: weight of the TBIA loss, 0.1 if nothing else is said
    alpha: float = None              # paper: weight of the TBIA loss, 0.1 if nothing else is said
    beta: float = None               # paper: weight of the CTR loss, 0.1 if nothing else is said
    hca_dropout: float = 0.1         # on HCA's attention, in training
    learned_temperature: bool = False # ARTEMIS: multiply scores by the learned temperature, which the released program never applies
    projection_dim: int = None       # Combiner: width of its projections; None: 4 d
    hidden_dim: int = None           # Combiner: width of its hidden layer; None: 8 d
    features: str = None             # before the associations' dot products: raw or normalised; None: the objective's
    padding: str = None              # of captions, in HCA: read (its result then depends on the batch) or masked; None: the objective's
    tbia_scale: float = None         # scale of the TBIA logits; None: 10 for raw features, 100 for normalised ones
    ctr_scale: float = None          # scale of the CTR logits; None: as TBIA's
    qtm_scale: float = None          # scale of the QTM logits of sum and combiner; None: 100

@dataclass
class LoopRecipe:
    "How it trains."
    num_epochs: int = 30             # passes over the triplets
    batch_size: int = 64             # triplets a step, over all ranks
    neighbours: int = 1              # triplets in a row that stay in one batch; 2 and more make harder negatives
    gallery_negatives: bool = False  # every picture of the training gallery is a negative (a memory bank); with --encoder multi or text
    learning_rate: float = 5e-6      # of Q-Formers and query tokens; associations x2, ARTEMIS x10
    weight_decay: float = 0.05       # AdamW's
    max_epoch: int = 15              # epochs until the cosine reaches --min-lr
    min_lr: float = 0.               # where the learning rate ends
    schedule: str = None             # cosine (every group, held at the end), released (its quirks) or constant; None: the recipe's
    warmup: float = 0.               # epochs of linear warm-up
    seed: int = 0                    # of order, dropout and new weights
    precision: str = "no"            # no (float32), bf16 or fp16
    accumulate: int = 1              # pieces that a rank computes its share of a batch in; the loss is still over the whole batch
    gradient_checkpointing: bool = False # keep less for the backward pass and compute it twice; the same numbers
    compile: bool = False            # let torch.compile make one program of trunk and encoders; wants a C++ compiler
    skip_nonfinite: bool = False     # leave out steps whose loss is not finite, and count them
    rank_timeout: int = 1800         # seconds that a rank waits for the others before it gives up

@dataclass
class KeepRecipe:
    "What is kept and who is told."
    output: str = None               # the run's folder; None: runs/<dataset>-<backbone>-<frame>
    resume: str = None               # go on with this run's folder
    save_training: bool = True       # keep the state after every epoch, to resume from (last/)
    save_best: bool = True           # keep the weights with the best validation score (best/)
    save_steps: int = 0              # keep the state every so many steps of an epoch, too; 0: never
    validation_frequency: int = 1    # validate every so many epochs
    api_key: str = None              # Comet: log there too
    workspace: str = None            # Comet's workspace
    experiment_name: str = None      # name of the run in trackers; also of its folder
    comet_offline: str = None        # Comet: write an archive into this folder instead
    tensorboard: bool = False        # log for TensorBoard too, into the run's folder

PLAIN = dict(encoder="both", objective="released", tac_weight=.45, hca_weight=.1, alpha=.1, beta=.1, schedule="cosine")

RECIPES = dict(released=dict(schedule="released"), paper=dict(objective="paper", encoder="multi"), cala=dict(objective="paper", features="raw", qtm_scale=55.))

WEIGHTS = dict(released=("tac_weight", "hca_weight"), paper=("alpha", "beta"))

def said_objective(
    recipe,  # a recipe that is not filled in yet
) -> str:    # released, paper, or None
    "The objective that is named, or the one whose weights are given."
    given = [name for name, keys in WEIGHTS.items() if any(getattr(recipe, key) is not None for key in keys)]
    if recipe.objective or recipe.recipe or not given: return recipe.objective
    if len(given) == 2: raise CalaError("--tac-weight and --hca-weight belong to --objective released, --alpha and --beta to --objective paper; say which")
    return given[0]

def fill_in(
    recipe,  # changed in place
):
    "Give what nobody said the value of the named recipe; where an objective is said and no name, the plain value."
    objective = said_objective(recipe)
    named = {} if objective and not recipe.recipe else RECIPES[recipe.recipe or "cala"]
    for key, value in (PLAIN | named | dict(objective=objective or (PLAIN | named)["objective"])).items():
        if getattr(recipe, key) is None and (key != "qtm_scale" or recipe.cir_frame != "artemis"): setattr(recipe, key, value)  # ARTEMIS has no scale

CHOICES = dict(dataset=["CIRR", "FashionIQ"], protocol=["original", "val"], encoder=["both", "multi", "text"],
               cir_frame=["sum", "artemis", "combiner"], objective=["released", "paper"], precision=["no", "bf16", "fp16"],
               schedule=["cosine", "released", "constant"], cache=[*CACHES], cache_dtype=[*CACHE_DTYPES],
               recipe=[*RECIPES], features=["raw", "normalised"], padding=["read", "masked"])

POSITIVE = "batch_size", "num_epochs", "max_epoch", "validation_frequency", "target_ratio", "learning_rate", "neighbours", "accumulate", "rank_timeout", "triplets", "projection_dim", "hidden_dim", "qtm_scale", "tbia_scale", "ctr_scale"

NOT_NEGATIVE = "num_workers", "seed", "weight_decay", "min_lr", "warmup", "save_steps", "hca_dropout", "alpha", "beta", "tac_weight", "hca_weight"

BELOW = dict(seed=2**32, hca_dropout=1)  # NumPy takes no larger seed

AT_MOST = dict(tac_weight=1, hca_weight=1)

@dataclass
class Recipe(KeepRecipe, LoopRecipe, ModelRecipe, DataRecipe):
    "How to train CaLa; every field is a flag of `cala-train`."
    def __post_init__(self):
        may_be_left_out = {f.name for f in fields(self) if f.default is None}
        for key in may_be_left_out:
            if getattr(self, key) in ("None", ""): setattr(self, key, None)
        said = lambda keys: [(key, "--" + key.replace("_", "-"), getattr(self, key)) for key in keys if getattr(self, key) is not None or key not in may_be_left_out]
        for key, flag, value in said(CHOICES):
            match = [choice for choice in CHOICES[key] if choice.lower() == str(value).lower()]
            if not match: raise CalaError(f"{flag} {value}: choose one of {', '.join(CHOICES[key])}")
            setattr(self, key, match[0])
        if ":" not in self.encoder_arch: self.encoder_arch = self.encoder_arch.lower()
        fill_in(self)
        for key, flag, value in said(POSITIVE):
            if not value > 0: raise CalaError(f"{flag} {value}: give a number above 0")
        for key, flag, value in said(NOT_NEGATIVE):
            if not value >= 0: raise CalaError(f"{flag} {value}: give 0 or more")
        for key, flag, value in said(BELOW):
            if not value < BELOW[key]: raise CalaError(f"{flag} {value}: give a number below {BELOW[key]}")
        for key, flag, value in said(AT_MOST):
            if not value <= AT_MOST[key]: raise CalaError(f"{flag} {value}: give a number up to {AT_MOST[key]}")

def run_folder(
    recipe: Recipe,  # of the run
) -> Path:
    "The run's folder: --resume, --output, or a name made from the recipe."
    name = recipe.experiment_name or f"{recipe.dataset}-{recipe.encoder_arch.split(':')[-1]}-{recipe.cir_frame}"
    return Path(recipe.resume or recipe.output or f"runs/{name}")

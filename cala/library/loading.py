"""A model from the flags of `cala.library.flags`, and the features of a data set by that model.

A model comes from one of three sources: a checkpoint of cala, three files of BLIP-2's Q-Formers, or a CLIP model. Its
composition frame is the checkpoint's own, or comes from a file of its own. Every file may be one of the released
program or a checkpoint folder of cala.
"""

import re
from pathlib import Path
from typing import Any
from typing import NamedTuple
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from torch import nn

from ..backbones.weights import list_hub_files
from ..composition import frames
from ..composition import make_frame
from ..data import Triplets
from ..data import open_dataset
from ..encoders import Backbone
from ..encoders import make_backbone
from ..errors import CalaError
from ..model import CaLa
from ..pictures import shorten_path
from ..qformer import QFormer
from ..rerank import Reranker
from ..retrieval import Embedded
from ..retrieval import embed
from ..trust import hash_tensors
from .cache import CachedReferences
from .cache import TargetSide
from .cache import cache_folder
from .cache import cache_targets
from .cache import use_caches
from .checkpoint import load_checkpoint
from .checkpoint import read_recipe
from .circo import CIRCO
from .cli import spell_flag
from .files import find_whole_folder
from .files import hash_file
from .flags import BLIP2_ROLES
from .flags import DataFlags
from .flags import ModelFlags
from .flags import check_data_flags
from .flags import find_source
from .released import load_released

Flags = TypeVar("Flags", bound=ModelFlags)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of --precision


# Files of weights


def is_checkpoint(
    path: str | Path,
) -> bool:
    "True for a checkpoint folder of cala, or its file of weights; a file of the released program is neither."
    return Path(path).is_dir() or Path(path).suffix == ".safetensors"


def find_weights(
    path: str | Path,  # a file of weights, or a checkpoint folder
) -> Path:
    "The file of weights; that of a checkpoint is compared with its hash first."
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    if not folder.is_dir() or not is_checkpoint(path):
        return path
    read_recipe(folder)
    return find_whole_folder(folder) / "model.safetensors"


def read_tensors(
    path: str | Path,  # a checkpoint
    prefix: str,  # of the names, such as "frame."
) -> dict[str, Tensor]:  # names without the prefix
    "One part of a checkpoint; the rest, perhaps gigabytes of a backbone, is not read."
    with safe_open(find_weights(path), "pt") as content:
        names = [name for name in content.keys() if name.startswith(prefix)]
        return {name.removeprefix(prefix): content.get_tensor(name) for name in names}


def hash_weights(
    flags: ModelFlags,
) -> dict[str, dict]:  # flag -> path and sha256
    "Every file of weights that the flags name, with its hash."
    names = ["checkpoint", "combiner_path", "clip_model_path", *BLIP2_ROLES.values(), "backbone_weights"]
    files = {}
    for name in names:
        value = getattr(flags, name)
        if not value:
            continue
        if name == "backbone_weights" and Path(value).is_dir():  # the published files of BLIP-2
            published = sorted(Path(value).glob("*.pth")) or list_hub_files(value)
            files |= {f"{name}/{file.name}": file for file in published}
        else:
            files[name] = find_weights(value)
    return {name: dict(path=str(file), sha256=hash_file(file)) for name, file in files.items() if file.is_file()}


def hash_model(
    model: nn.Module,
) -> str:
    "SHA-256 of all tensors of a model, for weights that no flag names."
    return hash_tensors(model.state_dict())


# A Q-Former from a file


def load_role(
    backbone: Backbone,  # with textual, multimodal and visual Q-Formers; changed in place
    role: str,  # one of them
    path: str | Path,  # the released program's file, or a checkpoint folder
):
    "Put the Q-Former of a file into a role of the backbone."
    flag = spell_flag(BLIP2_ROLES[role])
    if is_checkpoint(path):
        weights = read_tensors(path, f"backbone.{role}.")
        if not weights:
            raise CalaError(
                f"{path} is of another backbone and holds no {role} Q-Former; "
                f"{flag} needs one trained with --encoder-arch blip2"
            )
    else:
        qformer = load_released(path)
        if not isinstance(qformer, QFormer):
            raise CalaError(f"{path} holds a {type(qformer).__name__}; {flag} needs a Q-Former (Blip2Qformer)")
        weights = qformer.state_dict()
    try:
        getattr(backbone, role).load_state_dict(weights)
    except RuntimeError as error:
        reason = shorten_path(str(error).splitlines()[1].strip(), 160)
        raise CalaError(
            f"{path} is no Q-Former of this backbone's size ({reason}); check {flag} and --blip2-model-name"
        ) from error


# A composition frame from a file


class FrameSource(NamedTuple):
    "Which composition frame a model gets."

    name: str  # sum, artemis or combiner
    path: str | Path | None  # of its weights; None: it has none, or the model has them already


def find_frame(
    flags: ModelFlags,
    own: str,  # name of the frame that the model has already
) -> FrameSource:
    "The frame that --combining-function and --combiner-path name."
    name = (flags.combining_function or own).lower()
    if name == "sum" and flags.combiner_path and not flags.combining_function:
        raise CalaError(
            f"--combiner-path {flags.combiner_path}: this model adds reference and text; "
            "give --combining-function combiner (or artemis) too"
        )
    if name not in frames:
        raise CalaError(f"--combining-function {name}: choose one of {', '.join(frames)}")
    if name == "sum":
        return FrameSource(name, None)
    path = flags.combiner_path
    if name != own and not path:
        path = find_frame_checkpoint(flags, name)
        if not path:
            raise CalaError(
                f"--combining-function {name} needs trained weights; "
                "give --combiner-path, or a --checkpoint that was trained with it"
            )
    if path and ignores_text(path) and not (flags.checkpoint and ignores_text(flags.checkpoint)):
        raise CalaError(f"{path} was trained on references that were encoded without the text; give it as --checkpoint")
    return FrameSource(name, path)


def find_frame_checkpoint(
    flags: ModelFlags,
    name: str,  # artemis or combiner
) -> str | None:  # a checkpoint folder
    """The one checkpoint among the BLIP-2 paths that was trained with this frame.

    The submission command of the released program has no flag for the weights of ARTEMIS."""
    paths = {getattr(flags, flag) for flag in BLIP2_ROLES.values()} - {None}
    checkpoints = [path for path in paths if is_checkpoint(path)]
    trained = [path for path in checkpoints if read_recipe(find_weights(path).parent)["model"]["cir_frame"] == name]
    return trained[0] if len(trained) == 1 else None


def ignores_text(
    path: str | Path,
) -> bool:
    "True for a checkpoint of cala-combiner whose backbone encodes the reference without the text."
    return is_checkpoint(path) and read_recipe(find_weights(path).parent)["backbone"]["name"].endswith(":PictureAlone")


def read_frame(
    path: str | Path,  # the released program's file, or a checkpoint folder
) -> nn.Module:  # in evaluation mode
    "The frame that a file holds."
    if not is_checkpoint(path):
        return load_released(path).eval()
    weights = read_tensors(path, "frame.")
    config = read_recipe(find_weights(path).parent)["model"]
    frame = make_frame(config["cir_frame"], feature_width(weights) or 0, **config["frame_options"] or {})
    frame.load_state_dict(weights)
    return frame.eval()


def feature_width(
    weights: dict[str, Tensor],  # of a frame
) -> int | None:  # None: a frame without weights
    "The width d of the features that a frame reads."
    for name in ("text_projection_layer.weight", "transform.weight"):  # of Combiner, of ARTEMIS
        if name in weights:
            return weights[name].shape[1]
    return None


def load_frame(
    path: str | Path,  # the released program's file, or a checkpoint folder
    name: str,  # artemis or combiner
    dim: int,  # d of the model
) -> nn.Module:
    "The frame of a file, which must be the one that the flags name, of the model's width."
    frame = read_frame(path)
    kind = type(frame).__name__
    if kind.lower() != name:
        raise CalaError(f"{path} holds a {kind}, and --combining-function is {name}")
    width = feature_width(frame.state_dict())
    if width != dim:
        raise CalaError(
            f"{path} is for features of width {width}, this model's have {dim}; give the one that was trained on it"
        )
    return frame


def check_widths(
    frame: Any,  # the model's
    flags: ModelFlags,
):
    "--projection-dim and --hidden-dim must be those of a Combiner; other frames have none, and the flags are not read."
    if not hasattr(frame, "combiner_layer"):
        return
    widths = dict(
        projection_dim=frame.text_projection_layer.out_features,
        hidden_dim=frame.combiner_layer.out_features,
    )
    for name, width in widths.items():
        if getattr(flags, name) not in (None, width):
            flag = f"{spell_flag(name)} {getattr(flags, name)}"
            raise CalaError(f"{flag}: this Combiner has {width}; correct the flag or leave it out")


# The whole model


def make_source_backbone(
    flags: ModelFlags,
    source: str,  # blip2 or clip
) -> Backbone:
    "The backbone that the flags name, where no checkpoint is given."
    options = dict(
        weights=flags.backbone_weights,
        tokenizer=flags.tokenizer,
        random_weights=flags.random_weights,
    )
    if source == "blip2":
        try:
            return make_backbone(source, model_name=flags.blip2_model_name or "pretrain_vitL", **options)
        except CalaError as error:  # its message names the flag of cala-train
            raise CalaError(str(error).replace("--model-name", "--blip2-model-name")) from error
    path = flags.clip_model_path
    if path and (Path(path) / "recipe.json").is_file():
        raise CalaError(f"--clip-model-path {path} is a checkpoint folder of cala; give it as --checkpoint")
    options |= dict(model_name=flags.clip_model_name, weights=path or flags.backbone_weights)
    try:
        return make_backbone(source, **options)
    except CalaError as error:  # its message names the flags of cala-train
        message = str(error).replace("--model-name", "--clip-model-name")
        raise CalaError(message.replace("--backbone-weights", "--clip-model-path")) from error


def build_model(
    flags: ModelFlags,
) -> CaLa:  # in evaluation mode, without the associations
    "The model that the flags name."
    source = find_source(flags)
    if flags.checkpoint:
        published = dict(weights=flags.backbone_weights, tokenizer=flags.tokenizer)
        given = {name: value for name, value in published.items() if value}  # the others are in its recipe
        model = load_checkpoint(flags.checkpoint, **given)
    else:
        model = CaLa(make_source_backbone(flags, source), tac_weight=0.0, hca_weight=0.0)
    if source == "blip2":
        for role, name in BLIP2_ROLES.items():
            load_role(model.backbone, role, getattr(flags, name))
    frame = find_frame(flags, own=str(model.config["cir_frame"]))
    if frame.path:
        model.frame = load_frame(frame.path, frame.name, model.backbone.dim)
    elif frame.name != model.config["cir_frame"]:
        model.frame = make_frame(frame.name, model.backbone.dim)
    model.config["cir_frame"] = frame.name
    check_widths(model.frame, flags)
    if getattr(flags, "rerank", None) is None:
        return model.for_retrieval()
    check_rerank(flags, model)
    return model.for_retrieval(rerank=True)


def check_rerank(
    flags: Any,  # with the fields of RerankFlags
    model: CaLa,
):
    "`CalaError` unless the model can rank again as the flags ask."
    if getattr(model.compositor, "reads", None) != "feature":
        raise no_compositor(flags)
    Reranker(model, flags.rerank, flags.rerank_weight or 0.0)


def can_rank_again(
    config: dict,  # of a checkpoint's model; empty: no checkpoint
) -> bool:
    "False where a second ranking is impossible; known before any weights are read."
    is_two_way = config.get("objective") == "two_way"
    weight = config.get("tac_weight" if config.get("objective") == "released" else "beta")
    return bool(weight) and (config.get("ctr") or ("pairs" if is_two_way else "tac")) != "tac"


def no_compositor(
    flags: Any,  # with the fields of RerankFlags
) -> CalaError:  # to be raised
    "The error about a model that cannot rank again."
    return CalaError(
        f"--rerank {flags.rerank}: this model has no compositor of pairs; train with --ctr pairs and a weight of "
        "CTR above 0 (the recipe cala), or leave the flag out"
    )


# Data


def fill_flags(
    flags: Flags,  # DataFlags, or others with most of its fields; changed in place
) -> Flags:
    "Give flags that were left out the value of the checkpoint's recipe, or the released program's default; check all."
    content = read_recipe(flags.checkpoint) if flags.checkpoint else {}
    recipe = content.get("recipe", {})
    defaults = dict(transform="targetpad", target_ratio=1.25, dataset=None)
    types = dict(transform=str, target_ratio=(int, float), dataset=str)
    given: Any = flags
    if getattr(given, "transform", None) is not None:
        given.transform = given.transform.lower()
    for name, default in defaults.items():
        if not hasattr(flags, name) or getattr(flags, name) is not None:
            continue
        value = recipe.get(name) or default
        if value is not None and not isinstance(value, types[name]):
            raise CalaError(f"the recipe of {flags.checkpoint} has {value!r} as {name}; give {spell_flag(name)}")
        setattr(flags, name, value)
    if hasattr(given, "protocol"):
        given.protocol = given.protocol.lower()
    check_data_flags(given)
    if getattr(given, "rerank_weight", None) is not None and given.rerank is None:
        raise CalaError("--rerank-weight belongs to --rerank; give both, or leave both out")
    if getattr(given, "rerank", None) is not None and not can_rank_again(content.get("model", {})):
        raise no_compositor(given)
    if getattr(given, "device", None) is not None:
        find_device(given.device)  # before data and weights are read
    return flags


def open_split(
    flags: Any,  # of cala-validate, from `fill_flags`
    split: str,  # train, val or test
) -> Triplets:
    "A split of the data set that the flags name; a flag that belongs to another data set raises `CalaError`."
    name = (flags.dataset or "").lower()
    if name not in ("cirr", "fashioniq", "circo"):
        given = f"no data set {flags.dataset!r}" if name else "no data set is named"
        raise CalaError(f"{given}; give --dataset CIRR, FashionIQ or CIRCO, or a --checkpoint that knows it")
    gallery_of, text_form = getattr(flags, "gallery", "split"), getattr(flags, "text_form", "both")
    if text_form != "both" and name != "fashioniq":
        raise CalaError("--text-form: only FashionIQ has two sentences that can be joined; leave it out")
    if name == "circo":
        if gallery_of != "split":
            raise CalaError("--gallery: both splits of CIRCO have one gallery; leave it out")
        if getattr(flags, "rerank", None) is not None:
            raise CalaError("--rerank: CIRCO is not ranked again yet; leave the flag out")
        return CIRCO(flags.data_root, split, shared_concept=flags.shared_concept, follow_links=flags.follow_links)
    if flags.shared_concept:
        raise CalaError("--shared-concept: only CIRCO has shared concepts; leave it out")
    return open_dataset(
        name,
        flags.data_root,
        split,
        categories=flags.categories,
        protocol=flags.protocol,
        text_form=text_form,
        gallery_of=gallery_of,
        follow_links=flags.follow_links,
    )


def set_transform(
    dataset: Triplets,  # CIRR, FashionIQ or CIRCO; changed in place
    model: CaLa,
    flags: DataFlags,  # from `fill_flags`
):
    "Let a data set read pictures as the flags say and the model's backbone needs them."
    kind, ratio = flags.transform or "targetpad", flags.target_ratio or 1.25
    dataset.gallery.transform = model.backbone.transform(kind, ratio)


def find_device(
    name: str | None = None,  # as torch calls it; None: the GPU of this machine (CUDA, or MPS of a Mac), or the CPU
) -> torch.device:
    "The device to work on; the choice is that of Accelerate, so that all commands agree with cala-train."
    if name is None:
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    name = str(name).lower()
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise CalaError(f"--device {name}: give cpu, cuda, cuda:1, mps or xpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\. |\n", str(error))[0]
        raise CalaError(f"--device {name}: {reason}; try --device cpu") from error


def keep_features(
    model: CaLa,  # on its device
    dataset: Any,  # CIRCO; changed in place
    folder: Path,  # holds all caches
    flags: DataFlags,  # batch_size and num_workers
):
    """Read the features of CIRCO's gallery from disk; compute those that are not there yet.

    The trunk's tokens of 123,403 pictures would fill tens of gigabytes. The features fill a thousandth of that, serve
    both splits, and can be used again by every command that measures the same weights."""
    model.requires_grad_(False)
    side = TargetSide(model.backbone, keep_tokens=False)
    features = cache_targets(side, dataset.gallery, folder, batch_size=flags.batch_size, num_workers=flags.num_workers)
    # Tokens of the references are computed from their pictures, which the gallery reads.
    dataset.pictures, dataset.target_pictures = CachedReferences(dataset.gallery, features), features


def embed_dataset(
    model: CaLa,
    dataset: Triplets,  # CIRR, FashionIQ or CIRCO
    flags: DataFlags,  # batch_size, num_workers, device, precision and the cache
) -> Embedded:  # float32
    "`embed`, on the device, in the precision and with the cache of the flags."
    device = find_device(flags.device)
    folder = cache_folder(flags.cache_dir, flags.data_root)
    model.to(device)
    if isinstance(dataset, CIRCO) and flags.cache != "off":
        keep_features(model, dataset, folder, flags)
    else:
        dtype, workers = flags.cache_dtype, flags.num_workers
        use_caches(model, [dataset], flags.cache, folder, dtype=dtype, num_workers=workers)
    with torch.autocast(device.type, AUTOCAST.get(flags.precision), enabled=flags.precision in AUTOCAST):
        return embed(model, dataset, flags.batch_size, device, flags.num_workers)

"""A model from the flags of `cala.library.flags`, and the features of a data set by that model.

A model comes from one of three sources: a checkpoint of cala, three files of BLIP-2's Q-Formers, or a CLIP model. Its
composition frame is the checkpoint's own, or comes from a file of its own. Every file may be one of the released
program or a checkpoint folder of cala.
"""

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..backbones.blip2 import PRECISIONS
from ..backbones.weights import list_hub_files, load_exactly
from ..composition import Combiner, frames, make_frame
from ..data import Triplets, open_dataset
from ..encoders import Backbone, make_backbone
from ..errors import CalaError
from ..model import CaLa
from ..qformer import QFormer
from ..recipe import find_compositor, spell_flag
from ..rerank import Reranker
from ..retrieval import Embedded, embed
from .cache import CachedReferences, TargetSide, cache_folder, cache_targets, use_caches
from .checkpoint import load_checkpoint, read_recipe
from .circo import CIRCO
from .files import find_whole_folder, hash_file
from .flags import BLIP2_ROLES, ModelFlags, check_data_flags, find_source
from .released import load_released

Flags = TypeVar("Flags", bound=ModelFlags)


# Files of weights


def find_checkpoint(
    path: str | Path,  # a checkpoint folder, its model.safetensors, or a file of the released program
) -> Path | None:  # the folder; None for a file of the released program
    "The checkpoint of cala that a path names."
    path = Path(path)
    folder = find_whole_folder(path.parent if path.suffix == ".safetensors" else path)
    return folder if folder.is_dir() else None


def read_part(
    folder: Path,  # a checkpoint
    prefix: str,  # of the names, such as "frame."
) -> tuple[dict, dict[str, Tensor]]:  # what recipe.json holds; tensors by their names without the prefix
    "One part of an intact checkpoint; the rest, perhaps gigabytes of a backbone, is not loaded."
    content = read_recipe(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]
        return content, {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def hash_weights(
    flags: ModelFlags,
) -> dict[str, dict]:  # flag -> path and sha256
    "Every file of weights that the flags name, with its hash."
    checkpoints = ("checkpoint", "combiner_path", *BLIP2_ROLES.values())  # or files of the released program
    files = {}
    for name in (*checkpoints, "clip_model_path", "backbone_weights"):
        value = getattr(flags, name)
        folder = find_checkpoint(value) if value and name in checkpoints else None
        if folder:
            files[name] = folder / "model.safetensors"
        elif value and Path(value).is_dir():  # the published files of BLIP-2
            published = sorted(Path(value).glob("*.pth")) or list_hub_files(value)
            files |= {f"{name}/{file.name}": file for file in published}
        elif value:
            files[name] = Path(value)
    return {name: dict(path=str(file), sha256=hash_file(file)) for name, file in files.items() if file.is_file()}


# A Q-Former from a file


def load_role(
    backbone: Backbone,  # with textual, multimodal and visual Q-Formers; changed in place
    role: str,  # one of them
    path: str | Path,  # the released program's file, or a checkpoint folder
):
    "Put the Q-Former of a file into a role of the backbone."
    flag, folder = spell_flag(BLIP2_ROLES[role]), find_checkpoint(path)
    if folder:
        _, weights = read_part(folder, f"backbone.{role}.")
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
    load_exactly(getattr(backbone, role), weights, "the Q-Former", f"check {flag} {path} and --blip2-model-name")


# A composition frame from a file


def choose_frame(
    model: CaLa,  # with a frame of its own; changed in place
    flags: ModelFlags,
):
    "Give a model the frame that --combining-function and --combiner-path name."
    own, path = str(model.config["cir_frame"]), flags.combiner_path
    name = (flags.combining_function or own).lower()
    if name == "sum" and path and not flags.combining_function:
        raise CalaError(
            f"--combiner-path {path}: this model adds reference and text; "
            "give --combining-function combiner (or artemis) too"
        )
    if name not in frames:
        raise CalaError(f"--combining-function {name}: choose one of {', '.join(frames)}")
    if name != own and name != "sum" and not path:
        path = find_frame_checkpoint(flags, name)
        if not path:
            raise CalaError(
                f"--combining-function {name} needs trained weights; "
                "give --combiner-path, or a --checkpoint that was trained with it"
            )
    if name != "sum" and path:
        model.frame = load_frame(path, name, model.backbone)
    elif name != own:
        model.frame = make_frame(name, model.backbone.dim)
    model.config["cir_frame"] = name
    check_widths(model.frame, flags)


def find_frame_checkpoint(
    flags: ModelFlags,
    name: str,  # artemis or combiner
) -> Path | None:
    """The one checkpoint among the BLIP-2 paths that was trained with this frame.

    The submission command of the released program has no flag for the weights of ARTEMIS."""
    paths = [getattr(flags, flag) for flag in BLIP2_ROLES.values()]
    folders = {folder for path in paths if path and (folder := find_checkpoint(path))}
    trained = [folder for folder in folders if read_recipe(folder)["model"]["cir_frame"] == name]
    return trained[0] if len(trained) == 1 else None


def load_frame(
    path: str | Path,  # the released program's file, or a checkpoint folder
    name: str,  # artemis or combiner
    backbone: Backbone,  # of the model that gets the frame
) -> nn.Module:
    "The frame of a file, which must be the one that the flags name and belong to the backbone."
    folder = find_checkpoint(path)
    if folder is None:
        frame = load_released(path)
    else:
        content, weights = read_part(folder, "frame.")
        if ignores_text(content["backbone"]) and not ignores_text(backbone.config):
            raise CalaError(
                f"{path} was trained on references that were encoded without the text; give it as --checkpoint"
            )
        config = content["model"]
        frame = make_frame(config["cir_frame"], find_width(weights), **config["frame_options"] or {})
        frame.load_state_dict(weights)
    kind = type(frame).__name__
    if kind.lower() != name:
        raise CalaError(f"{path} holds a {kind}, and --combining-function is {name}")
    width = find_width(frame.state_dict())
    if width != backbone.dim:
        raise CalaError(
            f"{path} is for features of width {width}, this model's have {backbone.dim}; "
            "give the one that was trained on it"
        )
    return frame.eval()


def ignores_text(
    config: dict,  # of a backbone
) -> bool:
    "True for a backbone of cala-combiner, which encodes the reference without the text."
    return str(config.get("name")).endswith(":PictureAlone")


def find_width(
    weights: dict[str, Tensor],  # of a frame
) -> int:  # 0: a frame without matrices
    "The width d of the features that a frame reads."
    names = ("text_projection_layer.weight", "transform.weight")  # of Combiner, of ARTEMIS
    return next((weights[name].shape[1] for name in names if name in weights), 0)


def check_widths(
    frame: Any,  # the model's
    flags: ModelFlags,
):
    "--projection-dim and --hidden-dim must be those of a Combiner; other frames have none, and the flags are not read."
    if not isinstance(frame, Combiner):
        return
    widths = dict(
        projection_dim=frame.text_projection_layer.out_features,
        hidden_dim=frame.combiner_layer.out_features,
    )
    for name, width in widths.items():
        value = getattr(flags, name)
        if value not in (None, width):
            raise CalaError(f"{spell_flag(name)} {value}: this Combiner has {width}; correct the flag or leave it out")


# The whole model


def make_source_backbone(
    flags: ModelFlags,
    source: str,  # blip2 or clip
) -> Backbone:
    "The backbone that the flags name, where no checkpoint is given."
    options = dict(weights=flags.backbone_weights, tokenizer=flags.tokenizer, random_weights=flags.random_weights)
    if source == "blip2":
        options["model_name"] = flags.blip2_model_name
        names = {"--model-name": "--blip2-model-name"}
    else:
        path = flags.clip_model_path
        if path and (Path(path) / "recipe.json").is_file():
            raise CalaError(f"--clip-model-path {path} is a checkpoint folder of cala; give it as --checkpoint")
        options |= dict(model_name=flags.clip_model_name, weights=path or flags.backbone_weights)
        names = {"--model-name": "--clip-model-name", "--backbone-weights": "--clip-model-path"}
    try:
        return make_backbone(source, **options)
    except CalaError as error:  # its message names the flags of cala-train
        message = str(error)
        for name, own_name in names.items():
            message = message.replace(name, own_name)
        raise CalaError(message) from error


def build_model(
    flags: ModelFlags,
) -> CaLa:  # in evaluation mode, without the associations
    "The model that the flags name."
    source = find_source(flags)
    if flags.checkpoint:
        model = load_checkpoint(flags.checkpoint, weights=flags.backbone_weights, tokenizer=flags.tokenizer)
    else:
        model = CaLa(make_source_backbone(flags, source), tac_weight=0.0, hca_weight=0.0)
    if source == "blip2":
        for role, name in BLIP2_ROLES.items():
            load_role(model.backbone, role, getattr(flags, name))
    choose_frame(model, flags)
    rerank = getattr(flags, "rerank", None)
    if rerank is not None:
        Reranker(model, rerank, getattr(flags, "rerank_weight", None) or 0.0)  # `CalaError` for impossible numbers
    return model.for_retrieval(rerank=rerank is not None)


# Flags


def fill_flags(
    flags: Flags,  # DataFlags, or others with most of its fields; changed in place
) -> Flags:
    "Give flags that were left out the value of the checkpoint's recipe, or the released program's default; check all."
    given: Any = flags
    content = read_recipe(flags.checkpoint) if flags.checkpoint else {}
    recipe = content.get("recipe", {})
    defaults = dict(transform=("targetpad", str), target_ratio=(1.25, (int, float)), dataset=(None, str))
    for name, (default, kind) in defaults.items():
        if getattr(given, name, "no such flag") is None:
            value = recipe.get(name) or default
            if not isinstance(value, kind) and value is not None:
                raise CalaError(f"the recipe of {flags.checkpoint} has {value!r} as {name}; give {spell_flag(name)}")
            setattr(given, name, value)
    given.transform = given.transform.lower()
    if hasattr(given, "protocol"):
        given.protocol = given.protocol.lower()
    check_data_flags(given)
    rerank = getattr(given, "rerank", None)
    if rerank is None and getattr(given, "rerank_weight", None) is not None:
        raise CalaError("--rerank-weight belongs to --rerank; give both, or leave both out")
    if rerank is not None and find_compositor(content.get("model", {})) in (None, "tac"):
        raise CalaError(
            f"--rerank {rerank}: this model has no compositor of pairs; train with --ctr pairs and a weight of CTR "
            "above 0 (the recipe cala), or leave the flag out"
        )
    if given.device is not None:
        find_device(given.device)  # before data and weights are read
    return flags


# Data


def open_split(
    flags: Any,  # of cala-validate, from `fill_flags`
    split: str,  # train, val or test
) -> Triplets:
    "A split of the data set that the flags name; a flag that belongs to another data set raises `CalaError`."
    name = (flags.dataset or "").lower()
    if name not in ("cirr", "fashioniq", "circo"):
        given = f"no data set {flags.dataset!r}" if name else "no data set is named"
        raise CalaError(f"{given}; give --dataset CIRR, FashionIQ or CIRCO, or a --checkpoint that knows it")
    if flags.text_form != "both" and name != "fashioniq":
        raise CalaError("--text-form: only FashionIQ has two sentences that can be joined; leave it out")
    if name == "circo":
        if flags.gallery != "split":
            raise CalaError("--gallery: both splits of CIRCO have one gallery; leave it out")
        if flags.rerank is not None:
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
        text_form=flags.text_form,
        gallery_of=flags.gallery,
        follow_links=flags.follow_links,
    )


def find_device(
    name: str | None = None,  # as torch calls it; None: the GPU of this machine (CUDA, or MPS of a Mac), or the CPU
) -> torch.device:
    "The device to work on; the choice is that of Accelerate, so that all commands agree with cala-train."
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = best if name is None else str(name).lower()
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise CalaError(f"--device {name}: give cpu, cuda, cuda:1, mps or xpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\. |\n", str(error))[0]
        raise CalaError(f"--device {name}: {reason}; try --device cpu") from error


def embed_dataset(
    model: CaLa,
    dataset: Any,  # CIRR, FashionIQ or CIRCO; changed in place
    flags: Any,  # of `DataFlags`: batch_size, num_workers, device, precision, the cache and the transform
) -> Embedded:  # float32
    "`embed` as the flags say; a data set with a transform of its own keeps it."
    device = find_device(flags.device)
    folder, size, workers = cache_folder(flags.cache_dir, flags.data_root), flags.batch_size, flags.num_workers
    model.to(device)
    if dataset.gallery.transform is None:
        dataset.gallery.transform = model.backbone.transform(flags.transform, flags.target_ratio)
    if dataset.name == "CIRCO" and flags.cache != "off":
        # The trunk's tokens of 123,403 pictures would fill tens of gigabytes. The features fill a thousandth of that,
        # serve both splits, and can be used again by every command that measures the same weights. The tokens of the
        # references are computed from their pictures, which the gallery reads.
        side = TargetSide(model.requires_grad_(False).backbone, keep_tokens=False)
        features = cache_targets(side, dataset.gallery, folder, batch_size=size, num_workers=workers)
        dataset.pictures, dataset.target_pictures = CachedReferences(dataset.gallery, features), features
    else:
        use_caches(model, [dataset], flags.cache, folder, dtype=flags.cache_dtype, num_workers=workers)
    half = PRECISIONS.get(flags.precision)
    with torch.autocast(device.type, half, enabled=half is not None):
        return embed(model, dataset, size, device, workers)

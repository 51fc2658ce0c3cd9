"""The same numbers for less memory or time: checkpointing of layers, torch.compile, the trunk once for each picture."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..encoders import Embedding
from ..errors import CalaError
from ..model import CaLa
from ..training import Callback
from ..training import Learner


def checkpoint_layers(
    model: CaLa,  # changed in place, with its trainable parameters chosen
) -> int:  # how many layers
    "Keep only the inputs of each layer of a stack that trains; the backward pass computes the rest again."
    layers = []
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and any(parameter.requires_grad for parameter in part.parameters()):
            layers += part
    if not layers:
        raise CalaError("--gradient-checkpointing: no stack of layers trains in this backbone; leave the flag out")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return len(layers)


def compile_parts(
    model: CaLa,  # changed in place
):
    "Let the trunk and the encoders run as compiled programs; `CalaError` where there is no compiler."
    compile_function = partial(torch.compile, options=dict(fallback_random=True))
    check_compiler(compile_function, next(model.parameters()).device)
    model.embed = compile_function(model.embed)
    model.backbone.trunk.forward = compile_function(model.backbone.trunk.forward)


def check_compiler(
    compile_function: Callable,
    device: torch.device,
):
    "`CalaError` where nothing can be compiled for the device."
    try:
        compile_function(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # each backend has errors of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        advice = "install a C++ compiler (g++), or leave the flag out"
        raise CalaError(f"--compile: torch.compile cannot work here ({reason}); {advice}") from error


def find_first(
    values: torch.Tensor,  # (n,) long, with repetitions
) -> tuple:  # first (m,) and back (n,): values[first][back] is values
    "The first place of each different value, and for every place which of these it repeats."
    different, back = values.unique(return_inverse=True)
    first = torch.full_like(different, len(values))
    first.scatter_reduce_(0, back, torch.arange(len(values)), "amin")
    return first, back


class TrunkOnce(Callback):
    "Sends each different picture of a batch through the trunk once; tokens and cached results pass."

    order = 10

    def before_batch(self, learner: Learner):
        data: Any = learner.data
        batch, device = learner.batch, learner.accelerator.device
        if isinstance(batch.target, Embedding) or batch.reference.ndim == 3:
            return
        first, back = find_first(torch.cat([data.references[batch.index], data.targets[batch.index]]))
        pictures = torch.cat([batch.reference, batch.target])[first].to(device, non_blocking=True)
        with learner.accelerator.autocast():
            parts = [learner.core.tokens(part) for part in pictures.chunk(learner.recipe.accumulate)]
        V_r, V_t = torch.cat(parts)[back.to(device)].chunk(2)
        learner.batch = batch._replace(reference=V_r, target=V_t)

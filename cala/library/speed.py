"""The same numbers for less memory or time: checkpointing of layers, torch.compile, the trunk once for each picture."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..encoders import Embedding
from ..errors import CalaError
from ..model import CaLa
from ..training import Callback, Learner


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
    try:
        compile_function(torch.sin)(torch.zeros(2, device=next(model.parameters()).device))
    except Exception as error:  # each backend has errors of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        advice = "install a C++ compiler (g++), or leave the flag out"
        raise CalaError(f"--compile: torch.compile cannot work here ({reason}); {advice}") from error
    model.embed = compile_function(model.embed)
    model.backbone.trunk.forward = compile_function(model.backbone.trunk.forward)


class TrunkOnce(Callback):
    "Sends each different picture of a batch through the trunk once; tokens and cached results pass."

    order = 10

    def before_batch(self, learner: Learner):
        data: Any = learner.data
        batch, device = learner.batch, learner.accelerator.device
        if isinstance(batch.target, Embedding) or batch.reference.ndim == 3:
            return
        positions = torch.cat([data.references[batch.index], data.targets[batch.index]])
        _, first, back = np.unique(positions, return_index=True, return_inverse=True)
        pictures = torch.cat([batch.reference, batch.target])[first].to(device, non_blocking=True)
        with learner.accelerator.autocast():
            parts = [learner.core.tokens(part) for part in pictures.chunk(learner.recipe.accumulate)]
        V_r, V_t = torch.cat(parts)[back].chunk(2)
        learner.batch = batch._replace(reference=V_r, target=V_t)

"""The recipe, the loop, schedules, logs, checkpoints, and going on where a run stopped."""
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import CalaError
from ..model import CaLa


def checkpoint_layers(
    model: CaLa,  # changed in place, with its trainable parameters chosen
) -> int:         # how many layers
    "Keep only what goes into each layer of a stack that trains; the backward pass computes the rest again."
    layers = [layer for part in model.modules() if isinstance(part, nn.ModuleList) and any(p.requires_grad for p in part.parameters()) for layer in part]
    if not layers: raise CalaError("--gradient-checkpointing: no stack of layers trains in this backbone; leave the flag out")
    for layer in layers: layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return len(layers)

def compiles(
    compile,               # torch.compile, or a stand-in
    device: torch.device,  # for which
):
    "`CalaError` where there is no compiler."
    try: compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # each backend has its own
        raise CalaError(f"--compile: torch.compile cannot work here ({type(error).__name__}: {' '.join(str(error).split())[:200]}); install a C++ compiler (g++), or leave the flag out") from error

def compile_parts(
    model: CaLa,   # changed in place
    compile=None,  # torch.compile, or a stand-in
):
    "Let trunk and encoders run as compiled programs; `CalaError` where there is no compiler."
    compile = compile or partial(torch.compile, options=dict(fallback_random=True))
    compiles(compile, next(model.parameters()).device)
    model.encode, model.backbone.trunk.forward = compile(model.encode), compile(model.backbone.trunk.forward)

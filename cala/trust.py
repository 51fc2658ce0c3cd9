"""Before a file is used: is its content intact, and does it name only code that may be imported?"""

import importlib
import os
from hashlib import sha256
from typing import TYPE_CHECKING

from .errors import CalaError
from .progress import show_tensors

if TYPE_CHECKING:
    from torch import Tensor


def read_bytes(
    tensor: "Tensor",  # of any type, on any device
) -> memoryview:
    "The values of a tensor as bytes."
    import torch  # here, because commands import this module before they need torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_tensors(
    tensors: dict,  # name -> tensor of any shape, as a `state_dict` has it
    text: str = "",  # hashed before the tensors, for example a config
) -> str:
    "SHA-256 of a text and of named tensors, in the order of their names."
    digest = sha256(text.encode())
    for name, tensor in show_tensors(dict(sorted(tensors.items())), "hash of the weights"):
        digest.update(name.encode())
        digest.update(read_bytes(tensor))
    return digest.hexdigest()


def import_class(
    name: str,  # package.module:Class
    flag: str,  # that gives it, for the message
) -> type:
    "The class of this name; its module is imported if necessary."
    module, _, attribute = str(name).partition(":")
    if not attribute:
        raise CalaError(f"{flag} {name}: give package.module:Class")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise CalaError(f"{flag} {name}: {error}; is its folder listed in PYTHONPATH?") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise CalaError(f"{flag} {name}: {error}") from error


def refuse_foreign_code(
    config: dict,  # of a backbone or a model, from a file; it may hold the config of another backbone
    source: str | os.PathLike,  # that file, for the message
) -> dict:  # the same config
    """Raise `CalaError` if a config names code that is neither cala's nor in a package that CALA_TRUST lists.

    The name of a backbone or of a model's class may be `package.module:Class`, and Python runs a module when it imports
    it. A user who types such a name wants that; a file that another person wrote must not be able to do it.
    """
    trusted = os.environ.get("CALA_TRUST", "").replace(",", " ").split()
    for key, value in config.items():
        if isinstance(value, dict):
            refuse_foreign_code(value, source)
        module, colon, _ = str(value).partition(":")
        package = module.split(".")[0]
        if key in ("name", "model_class") and colon and package not in ("cala", *trusted):
            raise CalaError(
                f"{source} asks for {value} to be imported, which is not cala's; "
                f"if you know and trust that code, set CALA_TRUST={package}"
            )
    return config

"""Files of weights: where they are, how they are fetched, how they are read, and what a file is that holds none."""

import os
import pickle
import ssl
import warnings
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urljoin, urlparse
from urllib.request import Request, urlopen, urlretrieve

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CalaError
from ..progress import LARGE, MEGABYTE, show_progress

FLAG = "--backbone-weights"


def shorten(
    error: BaseException,
    longest: int = 200,  # characters
) -> str:
    "An exception as one line: its class and its message."
    message = " ".join(str(error).split())
    if len(message) > longest:
        message = message[:longest] + " ..."
    return f"{type(error).__name__}: {message}".removesuffix(": ")


# Places: paths and URLs


def is_url(
    place: str | Path,
) -> bool:
    "True for an address of the web."
    return str(place).startswith(("http://", "https://"))


def make_absolute(
    place: str | None,  # a path, a URL, or nothing
) -> str | None:
    "A path that stays valid in another working folder; a URL and None as they are."
    if place is None or is_url(place):
        return place
    return str(Path(place).resolve())


def find_file_name(
    url: str,
) -> str:
    "The name of the file at an address, without what may follow a question mark."
    return Path(urlparse(url).path).name


def missing_file(
    url: str,  # where the file is published
    advice: str,  # how to give the file by hand
    reason: str,  # why there is none
) -> CalaError:  # to be raised
    "The error for a file that is not there and cannot be fetched."
    return CalaError(
        f"{find_file_name(url)} is missing ({reason}); it is published at {url}: "
        f"fetch it on a machine with network and {advice}"
    )


def find_neighbour(
    place: str | Path,  # path or URL of a file
    name: str,  # of another file in the same folder
) -> str:  # its path or URL
    "The place of a file beside another file."
    return urljoin(str(place), name) if is_url(place) else str(Path(place).with_name(name))


# The network


def is_reachable(
    url: str,
    any_answer: bool = False,  # count a refusal, and a certificate that Python does not know, as an answer
) -> bool:
    "True if the server of an address answers within ten seconds."
    try:
        urlopen(Request(url, method="HEAD"), timeout=10).close()
    except (OSError, HTTPException) as error:
        is_answer = isinstance(error, HTTPError) or isinstance(getattr(error, "reason", None), ssl.SSLError)
        return any_answer and is_answer
    return True


def cache_folder() -> Path:
    "Where torch, LAVIS and this project keep files of weights that were fetched."
    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(
    url: str,  # of a file
    advice: str = f"give it with {FLAG}",  # how to give it by hand
    folder: str | Path | None = None,  # where to keep it; None: `cache_folder()`
) -> Path:  # the file
    """A file of the web, or the copy that an earlier call kept.

    `urlretrieve` compares what arrives with Content-Length. A file that is shorter, or is a web page, is not kept.
    """
    path = Path(folder or cache_folder()) / find_file_name(url)
    if path.is_file():
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with show_progress(title=path.name, unit="MB", is_part=True) as bar:

            def move_bar(blocks: int, block_size: int, total: int):  # of the file; below 1 if the server does not say
                received = blocks * block_size
                if total > 0:
                    bar.total = total // MEGABYTE
                    received = min(received, total)  # the last block may be a part of one
                bar.update(received // MEGABYTE - bar.n)

            urlretrieve(url, partial, move_bar)
        misfit = describe_misfit(partial)
        if misfit:
            raise missing_file(url, advice, f"what the server sent {misfit}")
        os.replace(partial, path)
    except (OSError, HTTPException) as error:
        raise missing_file(url, advice, shorten(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def find_file(
    place: str | Path,  # path or URL
    url: str,  # where the file is published
    advice: str,  # how to give it by hand
) -> Path:
    "The file at a path or URL; `CalaError` says what is missing and where to get it."
    if is_url(place):
        return fetch(str(place), advice)
    if not Path(place).is_file():
        raise missing_file(url, advice, f"no file {place}")
    return Path(place)


# What a file is


def is_torchscript(
    path: str | Path,
) -> bool:
    "True for an archive of `torch.jit.save`, which holds a program."
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def is_safetensors(
    path: str | Path,
) -> bool:
    "True for a file that begins as safetensors do: the length of a header in eight bytes, then the header in JSON."
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= os.path.getsize(path) - 8


def has_hub_layout(
    place: str | Path,  # a file or a folder
) -> bool:
    "True for a folder of the Hugging Face Hub and for a file of weights from one."
    path = Path(place)
    if path.is_dir():
        return any(path.glob("*config.json")) or bool(list_hub_files(path))
    return path.is_file() and (path.name.startswith("pytorch_model") or is_safetensors(path))


def list_hub_files(
    folder: str | Path,  # of a model, or the model's folder in the Hub's cache
) -> list[Path]:
    "The files of weights in a folder of the Hugging Face Hub."
    folder = Path(folder)
    main, snapshots = folder / "refs" / "main", list(folder.glob("snapshots/*"))
    if main.is_file():
        folder = folder / "snapshots" / main.read_text().strip()
    elif len(snapshots) == 1:
        folder = snapshots[0]
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def describe_misfit(
    path: str | Path,
) -> str:  # follows the file's name in a sentence; empty if the file may hold weights
    "What a file is instead of weights, and what to do."
    with open(path, "rb") as file:
        start = file.read(1024)
    if not start:
        return "is empty, so its download was cut short; delete it and fetch it again"
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return (
            "is a Git LFS pointer, a short text in place of the file; "
            "fetch the file itself, for example with git lfs pull in its folder"
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return (
            "is a web page (HTML or XML), as a server sends it for a login or an error; "
            "open the address in a browser and save the file itself"
        )
    if is_torchscript(path):
        return "is a TorchScript archive, which is a program; give a file of weights (a state dict)"
    return ""


# Reading


def read_torch(
    path: str | Path,  # a file written by `torch.save`
) -> Any:  # tensors, numbers and texts in dicts and lists, and nothing else
    "Read a torch file of unknown origin; a file that could execute code is refused with a `CalaError`."
    misfit = describe_misfit(path)
    if misfit:
        raise CalaError(f"{path} {misfit}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on foreign pickles; the messages below replace it
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "GLOBAL numpy" in str(error):
            raise CalaError(
                f"{path} is refused: it holds a NumPy value beside the weights, and reading one could execute code; "
                "ask its author for a state dict, or where you trust the file save it again with float(value)"
            ) from error
        raise CalaError(
            f"{path} is refused: it is not a plain file of weights, and reading it any other way could execute code; "
            "take the published file, or ask its author for a state dict"
        ) from error
    except MemoryError:  # the file may be whole
        raise
    except Exception as error:  # torch raises many classes for a damaged file; nothing of cala runs in the block
        raise CalaError(
            f"{path} cannot be read as a torch file ({type(error).__name__}); "
            "it may be cut short: delete it and fetch it again"
        ) from error


def read_ahead(
    path: str | Path,  # a file of weights
):
    """Read a large file once, with progress, so that the system keeps it in memory.

    torch and safetensors map a file, and read a tensor from the disk when it is copied: 4 GB in silence."""
    size, done = os.path.getsize(path), 0
    if size < LARGE:
        return
    title = f"read {Path(path).name}"
    with open(path, "rb") as file, show_progress(None, title, size // MEGABYTE, "MB", is_part=True) as bar:
        while part := file.read(8 * MEGABYTE):
            done += len(part)
            bar.update(done // MEGABYTE - bar.n)


def read_weights(
    path: str | Path,  # safetensors, or a torch file
) -> dict:  # what it holds
    "The content of a file of weights; `CalaError` if it is something else or could execute code."
    kind = "a URL" if "://" in str(path) else "a folder" if Path(path).is_dir() else ""
    if kind:
        raise CalaError(f"{path} is {kind}; give a file of weights on this machine as {FLAG}")
    if not Path(path).is_file():
        raise CalaError(f"no weights file {path}; give another {FLAG}")
    misfit = describe_misfit(path)
    if misfit:
        raise CalaError(f"{path} {misfit}")
    read_ahead(path)
    if Path(path).suffix == ".safetensors" or is_safetensors(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CalaError(
                f"{path} cannot be read as safetensors ({type(error).__name__}); "
                "it may be cut short: delete it and fetch it again"
            ) from error
    content = read_torch(path)
    if not isinstance(content, dict):
        raise CalaError(f"{path} holds a {type(content).__name__}, not weights; give another {FLAG}")
    return content


def check_tensors(
    state: dict,  # of a file
    place: str | Path,  # the file
) -> dict[str, Tensor]:  # the same
    "`CalaError` if a dict holds anything but tensors by name."
    if all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        return state
    raise CalaError(f"{place} is not of the published form, a dict of tensors; fetch it again")


def load_exactly(
    module: nn.Module,  # receives the weights
    weights: dict[str, Tensor],  # by the module's own names
    title: str,  # of the module
    advice: str,  # which file to give
    assign: bool = False,  # take these tensors instead of copying them into those of the module
):
    "Load weights; `CalaError` if one is missing, unknown or of another shape."
    needed = module.state_dict()
    faults = {
        "missing": needed.keys() - weights.keys(),
        "not of this model": weights.keys() - needed.keys(),
        "of another shape": {
            name for name in needed.keys() & weights.keys() if needed[name].shape != weights[name].shape
        },
    }
    for fault, names in faults.items():
        if names:
            first = ", ".join(sorted(names)[:3])
            raise CalaError(f"these are not the weights of {title}, {len(names)} {fault}: {first}; {advice}")
    module.load_state_dict(weights, assign=assign)

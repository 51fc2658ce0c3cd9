"""Report versions of packages and the devices of this machine: the first lines of a report of a fault."""

import os
import platform
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version

import pandas as pd
import torch
from packaging.requirements import Requirement

from .. import __version__
from ..errors import CalaError


def list_packages() -> pd.DataFrame:  # columns package, needed, installed, state
    "The requirements in cala's own metadata and what is installed of them."
    try:
        requirements = [Requirement(line) for line in requires("cala") or []]
    except PackageNotFoundError:
        raise CalaError("cala itself is not installed; run pip install -e . in its folder") from None
    rows = []
    for requirement in requirements:
        extra = str(requirement.marker or "").partition("extra == ")[2].strip("\"'() ")  # empty if cala always needs it
        installed = ""
        with suppress(PackageNotFoundError):
            installed = version(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            if installed:
                continue  # it is of no use on this Python, and does no harm
            state = "not for this Python"
        elif not installed:
            state = f"missing: pip install cala[{extra}]" if extra else "missing"
        elif not requirement.specifier.contains(installed, prereleases=True):
            state = f"needs {requirement.specifier}"
        else:
            state = "ok"
        rows.append((requirement.name, str(requirement.specifier) or "any", installed or "-", state))
    return pd.DataFrame(rows, columns=["package", "needed", "installed", "state"])


def list_devices() -> list[str]:
    "Processors, accelerators and free disk space of this machine."
    lines = [f"processors: {os.cpu_count()}, threads of PyTorch: {torch.get_num_threads()}"]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        bfloat16 = "yes" if torch.cuda.is_bf16_supported() else "no"
        lines.append(f"cuda:{i}: {card.name}, {card.total_memory / 2**30:.0f} GiB, bfloat16 {bfloat16}")
    if torch.backends.mps.is_available():
        lines.append("mps: Apple GPU")
    if len(lines) == 1:
        lines.append(f"accelerators: none that PyTorch {torch.__version__} can use; the tiny backbone trains without")
    return [*lines, f"disk: {shutil.disk_usage('.').free / 1e9:.0f} GB free here"]


def print_environment() -> bool:  # True if all that cala always needs is installed
    "Print versions, devices and what is missing."
    table = list_packages()
    print(f"cala {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(*list_devices(), sep="\n")
    print(table.to_string(index=False))
    lacking = table.package[table.state.str.fullmatch("missing|needs .*")].tolist()
    print(f"to install: {', '.join(lacking)}" if lacking else "nothing is missing")
    return not lacking

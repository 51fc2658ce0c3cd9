"""Shared by all tests: one thread per process, the same random state before every test, and the small world."""

import os
import random
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

from small_runs import (
    server,  # noqa: F401
    world,  # noqa: F401
)

# These modules fork, kill and limit processes by means of Linux; the package itself uses none of them.
NEED_LINUX = [
    "test_cache.py",
    "test_crashes.py",
    "test_files.py",
    "test_imports.py",
    "test_processes.py",
    "test_saving.py",
    "test_training_flags.py",
]
collect_ignore = [] if sys.platform == "linux" else NEED_LINUX


@pytest.fixture(autouse=True)
def _seeded():
    "Set the random state, so that the order of the tests does not matter."
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

"""Shared by all tests: one thread per process, the same random state before every test, and the small world."""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

from small_runs import server  # noqa: F401
from small_runs import world  # noqa: F401


@pytest.fixture(autouse=True)
def _seeded():
    "Set the random state, so that the order of the tests does not matter."
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

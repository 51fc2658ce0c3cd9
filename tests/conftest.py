"""What every test shares: one thread a process, and dice that fall alike in whatever order the tests run."""
import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0); np.random.seed(0); torch.manual_seed(0)

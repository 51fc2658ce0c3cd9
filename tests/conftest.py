"""What every test shares: one thread a process."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

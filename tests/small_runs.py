"A world and a backbone so small that a whole run of cala-train takes a moment, for tests of whole commands."
import multiprocessing
import re

import pytest
import torch
from safetensors.torch import load_file

from cala.data import open_dataset
from cala.encoders import load_backbone
from cala.encoders import make_backbone
from cala.encoders import read_vocabulary
from cala.encoders import save_backbone
from cala.library.worlds.scenes import draw_cirr
from cala.library.worlds.garments import draw_fashioniq


def draw_small_world(root, val=4):
    "Both data sets, 36 triplets each to train on, and small.safetensors: a stage-1 file, smaller than tiny (32 wide, two layers) and with dropout."
    draw_cirr(root, train=6, val=val, test1=1, size=48)
    draw_fashioniq(root, train=12, val=16, test=1, size=48)
    splits = [open_dataset(name, root, "train") for name in ("CIRR", "FashionIQ")]
    words = read_vocabulary([text for data in splits for triplet in data.triplets for text in triplet.captions])
    save_backbone(make_backbone("tiny", vocabulary=words, width=32, heads=2, layers=2, queries=4, dropout=.1), root / "small.safetensors")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory): return draw_small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def one_thread():
    "In a module that imports it: bit for bit is promised on one thread."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def still_flags(world, output, *more, **how):
    "Words of a run without any dropout: still.safetensors is small.safetensors without it."
    if not (world / "still.safetensors").exists():
        trained = load_backbone(world / "small.safetensors")
        still = make_backbone(**{**trained.config, "dropout": 0.})
        still.load_state_dict(trained.state_dict())
        save_backbone(still, world / "still.safetensors")
    return train_flags(world, output, "--backbone-weights", world / "still.safetensors", "--hca-dropout", 0, *more, **how)


def train_flags(world, output, *more, epochs=2):
    "Words of cala-train for `epochs` times two steps on CIRR; later words overrule earlier ones."
    words = ["--dataset", "CIRR", "--data-root", world, "--encoder-arch", "tiny", "--backbone-weights", world / "small.safetensors", "--batch-size", 16,
             "--learning-rate", "1e-3", "--objective", "released", "--num-epochs", epochs, "--max-epoch", epochs, "--output", output, *more]
    return [str(word) for word in words]


def lines_of(text):
    "Lines on a terminal, less those of progress bars."
    lines = [part.split("\r")[-1] for part in text.splitlines()]
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)]


def kept(folder):
    "What a run leaves, to compare bit for bit: every table, every tensor, every number of the state."
    found = {name: (folder / name).read_bytes() for name in ("log.csv", "metrics.csv")}
    for name in ("best", "last"): found |= {f"{name}/{key}": value.numpy().tobytes() for key, value in load_file(folder / name / "model.safetensors").items()}
    return found | dict(state=flat(torch.load(folder / "last/state.pt", weights_only=True)))


def flat(value):
    "Nested dicts and lists with tensors as bytes; NaN as a word, since it differs from itself."
    if isinstance(value, torch.Tensor): return value.numpy().tobytes()
    if isinstance(value, dict): return {key: flat(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)): return [flat(v) for v in value]
    return "nan" if value != value else value


@pytest.fixture(scope="module")
def server():
    "Children are forked from a process that has imported everything and computed nothing: ready at once, no threads to lose."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cala.library.run", "cala.scripts.train"])
    return context


def exit_code(child):
    "Start a child of the server and wait: its exit status, or minus the signal that ended it."
    child.start(); child.join(120)
    assert child.exitcode is not None, child.kill()
    return child.exitcode

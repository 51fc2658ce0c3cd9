"A small drawn world and a small backbone, with which a whole run of cala-train takes about a second."

import multiprocessing
import re

import pytest
import torch
from safetensors.torch import load_file

from cala.data import open_dataset
from cala.encoders import load_backbone, make_backbone, read_vocabulary, save_backbone
from cala.library.worlds.garments import draw_fashioniq
from cala.library.worlds.scenes import draw_cirr


def draw_small_world(root, val=4):
    """Draw both data sets, with 36 training triplets each, and write the stage-1 file small.safetensors.

    Its backbone is smaller than `tiny` (32 wide, two layers) and has dropout.
    """
    draw_cirr(root, train=6, val=val, test1=1, size=48)
    draw_fashioniq(root, train=12, val=16, test=1, size=48)
    splits = [open_dataset(name, root, "train") for name in ("CIRR", "FashionIQ")]
    words = read_vocabulary([text for data in splits for triplet in data.triplets for text in triplet.captions])
    save_backbone(
        make_backbone("tiny", vocabulary=words, width=32, heads=2, layers=2, queries=4, dropout=0.1),
        root / "small.safetensors",
    )
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "The folder of the small world, drawn once for each test module. conftest.py gives it to all tests."
    return draw_small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def one_thread():
    "Run every test of a module that imports this fixture on one thread, where results are equal bit for bit."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def still_flags(world, output, *more, **options):
    "The flags of a run without dropout: still.safetensors is small.safetensors without it."
    if not (world / "still.safetensors").exists():
        trained = load_backbone(world / "small.safetensors")
        still = make_backbone(**{**trained.config, "dropout": 0.0})
        still.load_state_dict(trained.state_dict())
        save_backbone(still, world / "still.safetensors")
    no_dropout = ["--backbone-weights", world / "still.safetensors", "--hca-dropout", 0]
    return train_flags(world, output, *no_dropout, *more, **options)


def train_flags(world, output, *more, epochs=2):
    "The flags of cala-train for `epochs` epochs of two steps on CIRR; a later flag replaces an earlier one."
    flags = ["--dataset", "CIRR", "--data-root", world, "--encoder-arch", "tiny"]
    flags += ["--backbone-weights", world / "small.safetensors", "--batch-size", 16, "--learning-rate", "1e-3"]
    flags += ["--objective", "released", "--num-epochs", epochs, "--max-epoch", epochs, "--output", output]
    return [str(word) for word in [*flags, *more]]


def lines_of(text):
    "The lines of a terminal without those that tell progress, as bars or in words."
    lines = [part.split("\r")[-1] for part in text.splitlines()]
    told = r"\d+%\||: [\d,]+( of [\d,]+)?( \w+)?, (took \d\d:\d\d|\d\d:\d\d so far)"
    return [line for line in lines if line.strip() and not re.search(told, line)]


def read_results(folder):
    "All results of a run, to compare bit for bit: every table, every tensor, every number of the state."
    results = {name: (folder / name).read_bytes() for name in ("log.csv", "metrics.csv")}
    for name in ("best", "last"):
        for key, tensor in load_file(folder / name / "model.safetensors").items():
            results[f"{name}/{key}"] = tensor.numpy().tobytes()
    results["state"] = flatten_tensors(torch.load(folder / "last/state.pt", weights_only=True))
    return results


def flatten_tensors(value):
    "Turn the tensors of nested dicts and lists into bytes, and NaN into a text, because NaN differs from itself."
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: flatten_tensors(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [flatten_tensors(part) for part in value]
    return "nan" if value != value else value


@pytest.fixture(scope="module")
def server():
    "A server that has imported the package and forks a test's processes, which then start fast."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cala.library.run", "cala.scripts.train"])
    return context


def exit_code(child):
    "Start a process of the server and wait for its end; give its exit status, or minus the signal that ended it."
    child.start()
    child.join(120)
    assert child.exitcode is not None, child.kill()
    return child.exitcode

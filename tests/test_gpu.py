"""Training, caches and checkpoints on a GPU give what the CPU gives. `make gpu` runs this file on a GPU.

CALA_TEST_DEVICE names the device. Without it the CPU is compared with itself, which shows that the tests run.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # bit for bit equal products; read when CUDA starts

import pandas as pd
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from cala.data import CIRR
from cala.encoders import make_backbone
from cala.library.cache import cache_tokens
from cala.library.checkpoint import load_checkpoint, save_checkpoint
from cala.library.cli import parse_flags, run_command
from cala.library.run import train
from cala.model import CaLa
from cala.recipe import Recipe
from cala.retrieval import embed
from cala.scripts.train import main
from cala.training import Learner
from small_runs import (
    lines_of,
    one_thread,  # noqa: F401
    read_results,
    still_flags,
    train_flags,
)

DEVICE = torch.device(os.environ.get("CALA_TEST_DEVICE", "cpu"))
CPU = torch.device("cpu")
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    "Convolutions in float32, as products are; and a run of cala-train on the same device as the tests."
    if DEVICE.type == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def deterministic():
    "Only kernels whose results are equal bit for bit, where PyTorch has them."
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def still(world, tmp_path_factory):
    "The losses of two epochs without dropout."
    return losses_of(train(parse_flags(Recipe, still_flags(world, tmp_path_factory.mktemp("still") / "run"))))


def losses_of(run):
    return pd.DataFrame(run.log)[["loss", "qtm", "tbia", "ctr"]]


def run_without_dropout(world, output, *more):
    return losses_of(train(parse_flags(Recipe, still_flags(world, output, *more)), progress=False))


def make_small_model(name):
    "A model with random weights and without dropout, and a batch for it."
    options = dict(vocabulary=["red", "smaller"], width=32, heads=2, layers=2) if name == "tiny" else {}
    if name != "tiny":
        options = dict(random_weights="small", precision="fp32")
    backbone = make_backbone(name, **options, seed=0)
    backbone.fine_tune("both")
    torch.manual_seed(0)
    return CaLa(backbone).eval(), torch.randn(2, 4, 3, backbone.size, backbone.size)


def compute_step(model, pictures, device, precision):
    "Loss and gradient of one step, on the CPU."
    model.to(device).zero_grad()
    captions = ["red", "smaller", "red smaller", "smaller red"]
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = model(pictures[0].to(device), captions, pictures[1].to(device)).total
    loss.backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients).cpu()


@pytest.mark.parametrize("precision, tolerance", [("no", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("name", ["tiny", "blip2", "clip"])
def test_a_training_step_equals_that_of_the_cpu(name, precision, tolerance):
    model, pictures = make_small_model(name)
    expected, expected_gradient = compute_step(model, pictures, CPU, "no")
    loss, gradient = compute_step(model, pictures, DEVICE, precision)
    assert loss == pytest.approx(expected, rel=tolerance)
    if precision == "no":  # CLIP's gradient is so small that rounding in float32 changes it by 6e-4
        assert (gradient - expected_gradient).norm() < 5e-3 * expected_gradient.norm()


def test_a_resumed_run_is_the_whole_run_bit_for_bit(world, tmp_path, deterministic):
    def run(name, *more, epochs=2):
        flags = train_flags(world, tmp_path / name, *more, epochs=epochs)
        return train(parse_flags(Recipe, flags), progress=False)

    run("whole")
    run("cut", "--max-epoch", 2, epochs=1)
    run("cut", "--resume", tmp_path / "cut")
    assert read_results(tmp_path / "whole") == read_results(tmp_path / "cut")


def test_cached_tokens_are_those_of_the_trunk_within_half_precision(world, tmp_path):
    model, _ = make_small_model("tiny")
    trunk, gallery = model.backbone.trunk.to(DEVICE), CIRR(world, "val", model.backbone.transform()).gallery
    cache = cache_tokens(trunk, gallery, tmp_path, dtype="float16")
    with torch.no_grad():
        tokens = trunk(torch.stack([gallery[i] for i in range(8)]).to(DEVICE)).cpu()
    assert torch.allclose(cache[:8].float(), tokens, atol=1e-3, rtol=2e-3)


def test_a_checkpoint_of_the_gpu_gives_the_same_features_on_the_cpu_and_back(world, tmp_path):
    model, _ = make_small_model("tiny")
    data = CIRR(world, "val", model.backbone.transform())
    expected = embed(model, data, device=CPU, progress=False)
    save_checkpoint(model.to(DEVICE), tmp_path / "gpu")
    on_cpu = load_checkpoint(tmp_path / "gpu")
    save_checkpoint(on_cpu, tmp_path / "cpu")
    back = load_checkpoint(tmp_path / "cpu").to(DEVICE)
    for loaded, device in ((on_cpu, CPU), (back, DEVICE)):
        embedded = embed(loaded, data, device=device, progress=False)
        assert torch.allclose(embedded.gallery.cpu(), expected.gallery, atol=1e-4)
        assert torch.allclose(embedded.reference.cpu(), expected.reference, atol=1e-4)


@pytest.mark.parametrize(
    "more", [["--compile"], ["--gradient-checkpointing"], ["--accumulate", 3], ["--accumulate", 4, "--compile"]]
)
def test_flags_that_save_time_or_memory_keep_the_losses(world, tmp_path, monkeypatch, still, more):
    if DEVICE.type == "cpu":  # the compiler for the CPU takes minutes
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    losses = run_without_dropout(world, tmp_path / "run", *more)
    pd.testing.assert_frame_equal(losses, still, atol=1e-4, rtol=1e-3)


def test_half_precision_gives_the_losses_of_float32_up_to_its_rounding(world, tmp_path, still):
    losses = run_without_dropout(world, tmp_path / "run", "--precision", "bf16")
    assert ((losses - still) / still).abs().max().max() < 0.05


def test_the_fp16_scaler_leaves_out_steps_that_overflow_and_goes_on(world, tmp_path, monkeypatch):
    prepare = Learner.prepare

    def prepare_with_large_scale(learner):
        prepare(learner)
        learner.accelerator.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**127)
        learner.optimizer = AcceleratedOptimizer(learner.optimizer.optimizer, scaler=learner.accelerator.scaler)

    monkeypatch.setattr(Learner, "prepare", prepare_with_large_scale)
    precision = "fp16" if DEVICE.type == "cuda" else "no"
    flags = train_flags(world, tmp_path / "run", "--precision", precision, epochs=4)
    run = train(parse_flags(Recipe, flags), progress=False)
    assert 1 <= run.scaled <= len(run.log)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_memory_that_is_used_up_is_one_line(world, tmp_path, monkeypatch, capsys):
    def ask_for_too_much(model, *batch, **options):
        return torch.empty(2**46, device=DEVICE)

    monkeypatch.setattr(CaLa, "forward", ask_for_too_much)
    with pytest.raises(SystemExit) as ended:
        run_command(main, train_flags(world, tmp_path / "run"), prog="cala-train")
    (line,) = lines_of(capsys.readouterr().err)
    assert ended.value.code == 2
    assert line.startswith("cala-train: memory is used up")
    assert "lower --batch-size" in line

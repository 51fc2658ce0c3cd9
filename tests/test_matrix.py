"Every backbone, data set, frame and mode: two steps, a validation, a checkpoint, and the same numbers from it."

import math

import pytest
import torch

from cala.composition import frames
from cala.encoders import MODES
from cala.errors import CalaError
from cala.library.checkpoint import load_checkpoint
from cala.library.cli import parse_flags, run_command
from cala.library.run import train
from cala.recipe import Recipe
from cala.scripts import validate
from cala.training import Learner
from small_runs import (
    one_thread,  # noqa: F401
    train_flags,
)

BACKBONES = {  # words that choose it (train_flags has those of tiny), and the parts of it that a mode may change
    "tiny": ([], dict(both={"textual", "multimodal", "visual"}, multi={"textual", "multimodal"}, text={"textual"})),
    "blip2": (
        ["--backbone-weights", "None", "--random-weights", "small"],
        dict(both={"textual", "multimodal", "visual"}, multi={"textual", "multimodal"}, text={"textual"}),
    ),
    "clip": (
        ["--backbone-weights", "None", "--random-weights", "small"],
        dict(both={"language", "reduction", "head"}, multi={"language", "reduction"}, text={"language"}),
    ),
}
DATASETS = dict(
    CIRR=[[]], FashionIQ=[["--categories", name] for name in ("dress", "shirt", "toptee")]
)  # what training validates together, so that each batch is the same
CATEGORIES = "dress_", "shirt_", "toptee_"


@pytest.fixture
def start(monkeypatch):
    "Every tensor of the model as its run began."
    kept, prepare = {}, Learner.prepare

    def watched(learner):
        prepare(learner)
        kept.update({name: tensor.clone() for name, tensor in learner.core.state_dict().items()})

    monkeypatch.setattr(Learner, "prepare", watched)
    return kept


def run(world, output, arch, *more, **how):
    recipe = parse_flags(Recipe, train_flags(world, output, "--encoder-arch", arch, *BACKBONES[arch][0], *more, **how))
    return train(recipe, progress=False)


def judged(world, checkpoint, *more):
    words = [
        "--checkpoint",
        checkpoint,
        "--data-root",
        world,
        "--device",
        "cpu",
        "--output",
        checkpoint.parent / "judged",
        *more,
    ]
    return run_command(validate.main, [str(word) for word in words], prog="cala-validate")


def reached(row):
    "What both commands measure."
    return {key: value for key, value in row.items() if key not in ("epoch", "score", "missing_train")}


@pytest.mark.parametrize("encoder", MODES)
@pytest.mark.parametrize("frame", frames)
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("arch", BACKBONES)
def test_two_steps_a_checkpoint_and_the_same_metrics_again(
    world, tmp_path, start, capsys, arch, dataset, frame, encoder
):
    done = run(
        world,
        tmp_path / "run",
        arch,
        "--dataset",
        dataset,
        "--cir-frame",
        frame,
        "--encoder",
        encoder,
        "--no-save-training",
        epochs=1,
    )
    assert len(done.log) == 2 and all(math.isfinite(row["loss"]) for row in done.log)

    changed = {name for name, tensor in done.model.state_dict().items() if not torch.equal(tensor, start[name])}
    moved = {name.split(".")[1] if name.startswith("backbone.") else name.split(".")[0] for name in changed}
    assert moved == BACKBONES[arch][1][encoder] | {"hca", "compositor"} | ({"frame"} if frame != "sum" else set())

    parts, row = (
        [judged(world, tmp_path / "run/best", *words)[frame] for words in DATASETS[dataset]],
        reached(done.metrics[-1]),
    )
    if dataset == "CIRR":
        assert parts == [row]
    else:
        named = {key: value for part in parts for key, value in part.items() if key.startswith(CATEGORIES)}
        assert named == {key: value for key, value in row.items() if key.startswith(CATEGORIES)} and len(named) == 12
        assert sum(part["ties"] for part in parts) == row["ties"] and sum(
            part["recall_at10"] for part in parts
        ) / 3 == pytest.approx(row["recall_at10"])
    assert 0 < row["recall_at10"] < 100


@pytest.mark.parametrize("arch", ["blip2", "clip"])
def test_a_real_backbone_resumed_ends_as_if_undisturbed(world, tmp_path, arch):
    whole = run(world, tmp_path / "whole", arch)
    run(world, tmp_path / "parts", arch, "--num-epochs", 1)
    parts = run(world, tmp_path / "parts", arch, "--resume", tmp_path / "parts")
    assert parts.log == whole.log and parts.metrics == whole.metrics
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["RN50x4", "ViT-B-32"])
def test_clips_own_transform_is_trained_with_and_judged_with(world, tmp_path, capsys, name):
    done = run(world, tmp_path / "run", "clip", "--model-name", name, "--transform", "clip", epochs=1)
    assert reached(judged(world, tmp_path / "run/best")["sum"]) == reached(done.metrics[-1])
    assert type(done.model.backbone.transform("clip")).__name__ == "OpenClipTransform"
    with pytest.raises(CalaError, match="no transform 'clip'"):
        run(world, tmp_path / "other", "blip2", "--transform", "clip", epochs=1)


@pytest.mark.parametrize("arch", ["blip2", "clip"])
def test_bfloat16_of_the_frozen_trunk_or_of_everything_is_a_flag(world, tmp_path, arch):
    exact, trunk, everything = (
        run(world, tmp_path / name, arch, *words, epochs=1)
        for name, words in dict(
            exact=[], trunk=["--trunk-precision", "bf16"], everything=["--precision", "bf16"]
        ).items()
    )
    for rough in (trunk, everything):
        assert rough.log[0]["loss"] != exact.log[0]["loss"] and rough.log[0]["loss"] == pytest.approx(
            exact.log[0]["loss"], rel=0.02
        )
        assert all(parameter.dtype == torch.float32 for parameter in rough.model.parameters())
    assert load_checkpoint(tmp_path / "trunk/best").backbone.trunk.precision == "bf16"

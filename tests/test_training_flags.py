"Flags that change what a step costs change no result; a run that is stopped goes on where it was."

import contextlib
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

import cala.training
from cala.data import CIRR, open_dataset
from cala.encoders import TinyTrunk, make_backbone
from cala.errors import CalaError
from cala.library.cli import parse_flags, run_command
from cala.library.run import train
from cala.library.speed import checkpoint_layers
from cala.model import CaLa
from cala.recipe import Recipe
from cala.scripts.train import main
from cala.training import Learner
from small_runs import (
    lines_of,
    one_thread,  # noqa: F401
    still_flags,
    train_flags,
)


def run(world, output, *more, **how):
    return train(parse_flags(Recipe, train_flags(world, output, *more, **how)), progress=False)


def without_dropout(world, output, *more, **how):
    return train(parse_flags(Recipe, still_flags(world, output, *more, **how)), progress=False)


def refused(capsys, world, output, *more, **how):
    "The one line of a run that ends with status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(main, train_flags(world, output, *more, **how), prog="cala-train")
    (line,) = lines_of(capsys.readouterr().err)
    assert ended.value.code == 2 and line.startswith("cala-train: ")
    return line


def left(folder):
    "What a run leaves, to compare bit for bit."
    tables = {name: (folder / name).read_bytes() for name in ("log.csv", "metrics.csv")}
    weights = {
        f"{name}/{key}": value.numpy().tobytes()
        for name in ("best", "last")
        for key, value in load_file(folder / name / "model.safetensors").items()
    }
    return tables | weights


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    "What a run of three epochs, two steps each, leaves; with dropout."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(world, folder, epochs=3)
    return left(folder)


def losses(done):
    return pd.DataFrame(done.log)[["loss", "qtm", "tbia", "ctr"]]


# ---------------------------------------------------------------- the same numbers for less


@pytest.fixture(scope="module")
def still(world, tmp_path_factory):
    "A run of four steps without any dropout."
    return train(parse_flags(Recipe, still_flags(world, tmp_path_factory.mktemp("still") / "run")), progress=False)


@pytest.mark.parametrize("more", [["--accumulate", 3], ["--accumulate", 16, "--gradient-checkpointing"]])
def test_pieces_give_the_losses_of_the_whole_batch(world, tmp_path, still, more):
    done = without_dropout(world, tmp_path / "run", *more)
    pd.testing.assert_frame_equal(losses(done), losses(still), atol=1e-5, rtol=1e-4)
    assert done.metrics[-1]["score"] == pytest.approx(still.metrics[-1]["score"])


def test_gradient_checkpointing_changes_no_bit_dropout_included(world, tmp_path, undisturbed):
    run(world, tmp_path / "run", "--gradient-checkpointing", epochs=3)
    assert left(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("arch", ["clip", "blip2"])
def test_gradient_checkpointing_finds_the_layers_of_every_backbone(arch):
    backbone = make_backbone(arch, random_weights="small", seed=0)
    backbone.fine_tune("both")
    model = CaLa(backbone)
    model.train()
    pictures = torch.randn(2, 3, 3, backbone.size, backbone.size, generator=torch.Generator().manual_seed(0))

    def step():
        torch.manual_seed(1)
        loss = model(pictures[0], ["red", "a blue one", "smaller"], pictures[1]).total
        return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    (loss, gradients), layers = step(), checkpoint_layers(model)
    again, once_more = step()
    assert layers >= 2 and torch.equal(loss, again)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, once_more))


def test_compiled_parts_give_the_same_run_and_a_missing_compiler_is_one_line(
    world, tmp_path, capsys, monkeypatch, still
):
    "Traced by torch.compile, without the minutes that its C++ takes; the slow cell of 13_training has those."
    original, asked = torch.compile, []

    def quick(f, **how):
        asked.append(how)
        return original(f, backend="eager")

    monkeypatch.setattr(torch, "compile", quick)
    done = without_dropout(world, tmp_path / "run", "--compile")
    assert len(asked) == 3 and all(how == dict(options=dict(fallback_random=True)) for how in asked)
    pd.testing.assert_frame_equal(losses(done), losses(still), atol=1e-5, rtol=1e-4)

    def missing(f, **how):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", missing)
    assert "--compile: torch.compile cannot work here" in refused(capsys, world, tmp_path / "out", "--compile")


def test_bf16_gives_the_losses_of_float32_up_to_its_rounding(world, tmp_path, still):
    for more in [], ["--accumulate", 2]:
        done = without_dropout(world, tmp_path / str(len(more)), "--precision", "bf16", *more)
        error = ((losses(done) - losses(still)) / losses(still)).abs()
        assert 0 < error.iloc[0].max() < 0.01 and error.max().max() < 0.03


def test_each_different_picture_of_a_batch_passes_the_trunk_once(world, tmp_path, monkeypatch):
    passed, different, forward, step = [], [], TinyTrunk.forward, Learner.train_step
    monkeypatch.setattr(
        TinyTrunk, "forward", lambda self, images: (passed.append(len(images)), forward(self, images))[1]
    )

    def counted(self):
        step(self)
        places = torch.cat([self.data.references[self.batch.index], self.data.targets[self.batch.index]])
        different.append((sum(passed), len(places.unique()), len(places)))
        passed.clear()

    monkeypatch.setattr(Learner, "train_step", counted)
    run(world, tmp_path / "run", "--neighbours", 6, "--accumulate", 2, epochs=1)
    assert len(different) == 2 and all(seen == unlike < all_of_them for seen, unlike, all_of_them in different)


# ---------------------------------------------------------------- negatives from the gallery


@pytest.mark.parametrize("objective", ["released", "paper"])
@pytest.mark.parametrize("encoder", ["multi", "text"])
def test_gallery_negatives_are_all_pictures_of_the_gallery(world, tmp_path, encoder, objective, monkeypatch):
    shapes, contrast = [], cala.contrast.contrast
    monkeypatch.setattr(
        cala.objectives, "contrast", lambda logits: (shapes.append(tuple(logits.shape)), contrast(logits))[1]
    )
    words = ["--encoder", encoder, "--objective", objective, "--gallery-negatives"]
    done = run(world, tmp_path / "run", *words, epochs=1)
    gallery = len(open_dataset("CIRR", world, "train").gallery)
    wide = {shape for shape in shapes if shape[1] > 16}
    assert wide and all(
        rows == 16 and gallery <= columns <= gallery + 16 for rows, columns in wide
    )  # B + (G - different targets of the batch)
    assert {shape for shape in shapes if shape[1] <= 16} == {(16, 16)}
    if (encoder, objective) != ("multi", "released"):
        return
    kept = ["--cache-dir", tmp_path / "kept", "--cache-dtype", "float32"]
    for cache in (
        "tokens",
        "auto",
    ):  # auto finds the tokens, and keeps the targets, which are constant; two epochs, or it would not
        cached = run(world, tmp_path / cache, *words, "--cache", cache, *kept, "--max-epoch", 1, epochs=2)
        pd.testing.assert_frame_equal(losses(done), losses(cached)[:2], atol=1e-4, rtol=0)


def test_gallery_negatives_make_the_task_harder_and_are_refused_where_targets_change(world, tmp_path, capsys):
    plain, harder = (
        run(world, tmp_path / str(n), "--encoder", "text", *more, epochs=1)
        for n, more in enumerate(([], ["--gallery-negatives"]))
    )
    assert harder.log[0]["qtm"] > plain.log[0]["qtm"] and harder.log[0]["ctr"] == pytest.approx(
        plain.log[0]["ctr"], abs=1e-5
    )
    assert "give --encoder multi or text" in refused(capsys, world, tmp_path / "out", "--gallery-negatives")


# ---------------------------------------------------------------- no number


def spoiled(monkeypatch, how, at=3):
    "The loss of the third step (the first of the second epoch) is spoiled; in a resumed run that is its first."
    forward, count = CaLa.forward, []

    def broken(self, *batch):
        found = forward(self, *batch)
        count.append(1)
        return found._replace(total=how(self, found.total)) if len(count) == at else found

    monkeypatch.setattr(CaLa, "forward", broken)


SPOILED = dict(
    loss=lambda model, total: total * float("nan"),
    gradient=lambda model, total: (
        total + (0 * model.compositor.reference_as_query_attention.in_proj_weight).sum().sqrt()
    ),
)


@pytest.mark.parametrize("what", SPOILED)
def test_a_run_stopped_by_a_number_that_is_none_and_resumed_with_skip_nonfinite_is_the_run_that_had_the_flag(
    world, tmp_path, capsys, monkeypatch, what
):
    with monkeypatch.context() as patched:
        spoiled(patched, SPOILED[what])
        done = run(world, tmp_path / "flag", "--skip-nonfinite", epochs=3)
        assert done.skipped == 1 and len(done.log) == 6
    with monkeypatch.context() as patched:
        spoiled(patched, SPOILED[what])
        line = refused(capsys, world, tmp_path / "run", epochs=3)
    assert f"the {what} is nan at step 3" in line and "2 steps are kept" in line and "--skip-nonfinite" in line
    named = json.loads((tmp_path / "run/nonfinite.json").read_text())
    assert (named["what"], named["epoch"], named["step"], len(named["pairs"])) == (what, 2, 3, 16)
    with monkeypatch.context() as patched:
        spoiled(patched, SPOILED[what], at=1)
        done = run(world, tmp_path / "run", "--resume", tmp_path / "run", "--skip-nonfinite", epochs=3)
    assert done.skipped == 1 and left(tmp_path / "run") == left(tmp_path / "flag")


def test_the_fp16_scaler_goes_on_where_it_was(world, tmp_path, monkeypatch):
    "With the scaler that torch has for the CPU; its scale doubles every third step."
    prepare = Learner.prepare

    def scaled(self):
        prepare(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        self.optimizer = AcceleratedOptimizer(self.optimizer.optimizer, scaler=self.accelerator.scaler)

    monkeypatch.setattr(Learner, "prepare", scaled)
    run(world, tmp_path / "whole", epochs=3)
    run(world, tmp_path / "cut", "--max-epoch", 3, epochs=1)
    run(world, tmp_path / "cut", "--resume", tmp_path / "cut", epochs=3)
    states = [torch.load(tmp_path / name / "last/state.pt", weights_only=True)["scaler"] for name in ("whole", "cut")]
    assert states[0] == states[1] and states[0]["scale"] == 2.0**12
    assert left(tmp_path / "whole") == left(tmp_path / "cut")


# ---------------------------------------------------------------- stopped, and gone on with


def test_a_run_that_goes_on_for_more_epochs_keeps_its_schedule(world, tmp_path):
    def run_without_max_epoch(*more, epochs):
        words = train_flags(world, tmp_path / "run", *more, epochs=epochs)
        place = words.index("--max-epoch")
        del words[place : place + 2]
        return train(parse_flags(Recipe, words), progress=False)

    first = run_without_max_epoch(epochs=1)
    again = run_without_max_epoch("--resume", tmp_path / "run", epochs=2)
    assert (first.recipe.max_epoch, again.recipe.max_epoch, again.recipe.num_epochs) == (1, 1, 2)
    assert again.epochs_done == 2


def test_ctrl_c_in_a_validation_keeps_the_epochs_steps(world, tmp_path, capsys, monkeypatch, undisturbed):
    with monkeypatch.context() as patched:
        evaluate, count = cala.training.evaluate, []

        def interrupted(*args, **how):
            count.append(1)
            if len(count) == 2:
                signal.raise_signal(signal.SIGINT)
            return evaluate(*args, **how)

        patched.setattr(cala.training, "evaluate", interrupted)
        assert "stopped by Ctrl-C in the validation of epoch 2; 4 steps are kept" in refused(
            capsys, world, tmp_path / "run", epochs=3
        )
    run(world, tmp_path / "run", "--resume", tmp_path / "run", epochs=3)
    assert left(tmp_path / "run") == undisturbed


def test_a_second_ctrl_c_in_one_step_goes_back_to_what_was_kept_before(
    world, tmp_path, capsys, monkeypatch, undisturbed
):
    with monkeypatch.context() as patched:
        step, count = Learner.train_step, []

        def interrupted(self):
            count.append(1)
            if len(count) == 4:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return step(self)

        patched.setattr(Learner, "train_step", interrupted)
        assert "stopped at once by Ctrl-C in epoch 2: go on from what was saved before" in refused(
            capsys, world, tmp_path / "run", epochs=3
        )
    run(world, tmp_path / "run", "--resume", tmp_path / "run", epochs=3)
    assert left(tmp_path / "run") == undisturbed


def test_ctrl_c_without_save_training_says_that_nothing_is_kept(world, tmp_path, capsys):
    def interrupt(row):
        signal.raise_signal(signal.SIGINT)

    recipe = parse_flags(Recipe, train_flags(world, tmp_path / "run", "--no-save-training"))
    with pytest.raises(CalaError, match="stopped by Ctrl-C in epoch 1; nothing was kept"):
        train(recipe, watch=interrupt, progress=False)
    assert not (tmp_path / "run/last").exists()


@pytest.fixture(scope="module")
def server():
    "Children are forked from a process that has imported everything and computed nothing."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cala.library.run", "cala.scripts.train"])
    return context


def _child(words, said, sent):
    "Run the command in its own session; when a step begins, it or its whole group gets a signal, as from a terminal."
    os.setsid()
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of its loader's workers: a server of this child's own would import everything again
    torch.set_num_threads(1)
    step, begun = Learner.train_step, []

    def watched(self):
        begun.append(1)
        if sent and len(begun) == sent[0]:
            sent[1](0 if sent[1] is os.killpg else os.getpid(), sent[2])
        return step(self)

    Learner.train_step = watched
    with open(said, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        run_command(main, words, prog="cala-train")


def in_child(server, words, said, sent=None):
    child = server.Process(target=_child, args=(words, str(said), sent))
    child.start()
    child.join(120)
    assert child.exitcode is not None, child.kill()
    return child.exitcode, lines_of(Path(said).read_text())


def test_ctrl_c_reaches_workers_too_and_the_step_is_finished_all_the_same(world, tmp_path, server, undisturbed):
    def words(*more):
        return train_flags(world, tmp_path / "run", "--num-workers", 2, *more, epochs=3)

    code, said = in_child(server, words(), tmp_path / "said", (3, os.killpg, signal.SIGINT))
    assert code == 2 and len(said) == 1 and "stopped by Ctrl-C in epoch 2; 3 steps are kept" in said[0], said
    assert in_child(server, words("--resume", tmp_path / "run"), tmp_path / "said")[0] == 0
    assert left(tmp_path / "run") == undisturbed


def test_a_run_that_keeps_every_step_and_is_killed_within_an_epoch_loses_one_step(world, tmp_path, server, undisturbed):
    def words(*more):
        return train_flags(world, tmp_path / "run", "--save-steps", 1, *more, epochs=3)

    assert in_child(server, words(), tmp_path / "said", (4, os.kill, signal.SIGKILL))[0] == -signal.SIGKILL
    assert len(torch.load(tmp_path / "run/last/state.pt", weights_only=True)["log"]) == 3
    assert in_child(server, words("--resume", tmp_path / "run"), tmp_path / "said")[0] == 0
    assert left(tmp_path / "run") == undisturbed


def test_a_worker_that_is_killed_ends_the_run_in_a_line(world, tmp_path, capsys, monkeypatch):
    item = CIRR.__getitem__

    def fatal(self, i):
        if torch.utils.data.get_worker_info() and self.split == "train":
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, i)

    monkeypatch.setattr(CIRR, "__getitem__", fatal)
    assert "a process that decodes pictures died" in refused(capsys, world, tmp_path / "run", "--num-workers", 1)


def test_large_seeds_train_and_larger_ones_are_refused(world, tmp_path, capsys):
    assert run(world, tmp_path / "run", "--seed", 2**32 - 1, epochs=1).epochs_done == 1
    assert "--seed 4294967296: give a number below" in refused(capsys, world, tmp_path / "out", "--seed", 2**32)

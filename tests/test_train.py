"cala-train as a whole: its flags, mistakes in one line, and runs that are killed, stopped, resumed and repeated."

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import cala.training
from cala.data import open_dataset
from cala.errors import CalaError
from cala.library.cli import parse_flags, run_command
from cala.library.run import train
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa
from cala.recipe import Recipe
from cala.scripts.train import main
from cala.training import open_split
from small_runs import (
    exit_code,
    lines_of,
    one_thread,  # noqa: F401
    read_results,
    train_flags,
)


def run(world, output, *more, **how):
    return run_command(main, train_flags(world, output, *more, **how), prog="cala-train")


def refused(capsys, world, output, *more):
    "The one line of a run that ends with status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(world, output, *more)
    assert ended.value.code == 2
    lines = lines_of(capsys.readouterr().err)
    assert len(lines) == 1 and lines[0].startswith("cala-train: "), lines
    return lines[0]


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    "The folder of the run that others are compared with."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(world, folder, epochs=3)
    return folder


# ---------------------------------------------------------------- the command line

SEED = """--dataset {dataset} --num-epochs 30 --batch-size 64 --max-epoch 15 --min-lr 0 --learning-rate 5e-6
    --transform targetpad --target-ratio 1.25 --save-training --save-best --validation-frequency 1
    --encoder {encoder} --encoder-arch {arch} --cir-frame {frame} --tac-weight 0.45 --hca-weight 0.1
    --embeds-dim {dim} --model-name {model}
    --api-key Comet-api-key --workspace Comet-workspace --experiment-name Comet-experiment-name"""


@pytest.mark.parametrize("dataset", ["CIRR", "FashionIQ"])
@pytest.mark.parametrize("arch, dim, model", [("clip", 640, "RN50x4"), ("blip2", 768, "None")])
def test_every_value_of_the_seeds_command_line_is_read_as_printed_there(dataset, arch, dim, model):
    for encoder in ("both", "text", "multi"):
        for frame in ("sum", "artemis"):
            recipe = parse_flags(
                Recipe,
                SEED.format(dataset=dataset, encoder=encoder, arch=arch, frame=frame, dim=dim, model=model).split(),
            )
            assert (recipe.dataset, recipe.encoder, recipe.encoder_arch, recipe.cir_frame, recipe.embeds_dim) == (
                dataset,
                encoder,
                arch,
                frame,
                dim,
            )
            assert recipe.model_name == (None if model == "None" else model) and recipe.api_key == "Comet-api-key"
            assert (
                recipe.learning_rate,
                recipe.min_lr,
                recipe.save_training,
                recipe.save_best,
                recipe.target_ratio,
            ) == (5e-6, 0, True, True, 1.25)


def test_the_seeds_command_line_trains_from_a_shell(world, tmp_path):
    words = SEED.format(dataset="cirr", encoder="both", arch="tiny", frame="sum", dim=32, model="None").split()
    words[words.index("--api-key") :] = [
        "--api-key",
        "None",
        "--workspace",
        "None",
        "--experiment-name",
        "first",
    ]  # no Comet: not a word about it
    smaller = [
        "--num-epochs",
        "1",
        "--batch-size",
        "16",
        "--data-root",
        str(world),
        "--backbone-weights",
        str(world / "small.safetensors"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "cala.scripts.train", *words, *smaller],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "recall_at1" in done.stdout and "1 epoch; logs and checkpoints in runs/first" in done.stdout
    assert sorted(p.name for p in (tmp_path / "runs/first").iterdir()) == ["best", "last", "log.csv", "metrics.csv"]
    again = subprocess.run(
        [sys.executable, "-m", "cala.scripts.train", *words, *smaller],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert (
        again.returncode == 2
        and len(lines_of(again.stderr)) == 1
        and "runs/first is not empty" in again.stderr
        and "--resume runs/first" in again.stderr
    )


LAUNCHERS = {  # what starts a process of its own for the command; two and more are a test of their own
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "1"],
    "accelerate": [
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher_it_leaves_what_it_leaves_without(world, tmp_path, undisturbed, launcher):
    words = [
        sys.executable,
        "-m",
        *LAUNCHERS[launcher],
        "-m",
        "cala.scripts.train",
        *train_flags(world, tmp_path / "run", epochs=3),
    ]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={**os.environ, "HF_HOME": str(tmp_path / "settings")},
    )
    assert done.returncode == 0, done.stderr
    assert f"3 epochs; logs and checkpoints in {tmp_path / 'run'}" in done.stdout
    assert read_results(tmp_path / "run") == read_results(undisturbed)


# ---------------------------------------------------------------- mistakes


def test_every_mistake_is_one_line_with_status_2(world, tmp_path, capsys, undisturbed):
    def says(*words, output=tmp_path / "out"):
        return refused(capsys, world, output, *words)

    assert "holds no annotations of CIRR" in says("--data-root", tmp_path)
    assert "no folder" in says("--data-root", tmp_path / "nowhere")
    assert "choose one of CIRR, FashionIQ" in says("--dataset", "COCO")
    assert "choose one of sum, artemis, combiner" in says("--cir-frame", "mean")
    assert "choose one of blip2, clip, tiny" in says("--encoder-arch", "vgg")
    assert "choose one of both, multi, text" in says("--encoder", "none")
    assert "--embeds-dim 640: this tiny backbone has 32" in says("--embeds-dim", 640)
    assert "--batch-size 0: give a number above 0" in says("--batch-size", 0)
    assert "do not fill a batch of 4096" in says("--batch-size", 4096)
    assert "no transform" in says("--transform", "stretch")
    assert "takes no hidden_dim" in says("--hidden-dim", 64)
    assert "--projection-dim -3: give a number above 0" in says("--cir-frame", "combiner", "--projection-dim", -3)
    assert "has no --trunk-precision" in says("--trunk-precision", "bf16")
    assert "https://example.org/a.pt is a URL; give a file" in says(
        "--encoder-arch", "clip", "--backbone-weights", "https://example.org/a.pt"
    )
    assert f"{world} is a folder" in says("--encoder-arch", "clip", "--backbone-weights", world)
    assert "FashionIQ has dress, shirt, toptee" in says("--dataset", "FashionIQ", "--categories", "hats")
    assert "no such folder" in says("--resume", tmp_path / "nowhere")
    assert "is not empty" in says(output=world)
    (tmp_path / "out").mkdir()
    assert "holds no complete epoch" in says("--resume", tmp_path / "out")
    assert "--batch-size is 16 there and 8 here" in says(
        "--batch-size", 8, "--resume", undisturbed, "--num-epochs", 3, "--max-epoch", 3, output=undisturbed
    )
    assert "--cir-frame is sum there and combiner here" in says(
        "--cir-frame", "combiner", "--resume", undisturbed, "--num-epochs", 3, "--max-epoch", 3, output=undisturbed
    )
    assert "unrecognized arguments: --bath-size 3; did you mean --batch-size?" in says("--bath-size", 3)
    assert "--batch-size many: give a whole number" in says("--batch-size", "many")
    assert not any((tmp_path / "out").iterdir())  # a refused run leaves nothing


@pytest.mark.parametrize(
    "arch, says",
    [
        (
            "blip2",
            [
                "blip2_pretrained_vitL.pth is missing",
                "https://storage.googleapis.com/",
                "/blip2_pretrained_vitL.pth",
                "--backbone-weights",
            ],
        ),
        (
            "clip",
            ["open_clip_model.safetensors", "https://huggingface.co/timm/resnet50x4_clip.openai", "--backbone-weights"],
        ),
    ],
)
def test_without_a_network_a_published_backbone_is_one_line_with_file_address_and_flag(world, tmp_path, arch, says):
    "From a shell whose way out is a closed port, and whose caches are empty."
    closed = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "HTTP", "HTTPS")} | dict(
        no_proxy="", NO_PROXY=""
    )
    shell = {
        **os.environ,
        **closed,
        "HOME": str(tmp_path),
        "TORCH_HOME": str(tmp_path / "torch"),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_ENDPOINT": "https://huggingface.co",
    }
    words = ["--encoder-arch", arch, "--dataset", "CIRR", "--data-root", str(world), "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "cala.scripts.train", *words], capture_output=True, text=True, env=shell, timeout=300
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and all(part in line for part in says), line


def test_a_split_that_does_not_exist_is_named(world):
    with pytest.raises(CalaError, match="no split 'valid'; CIRR has train, val, test1"):
        open_dataset("CIRR", world, "valid")
    with pytest.raises(CalaError, match="no split 'valid'; FashionIQ has train, val, test"):
        open_dataset("FashionIQ", world, "valid")


def test_a_missing_picture_and_a_broken_one_are_named(tmp_path, world, capsys):
    draw_cirr(tmp_path, train=4, val=2, test1=1, size=48)
    used = open_dataset("CIRR", tmp_path, "train")
    gone, bad = (used.gallery.paths[i] for i in used.references.unique()[:2].tolist())
    gone.unlink()
    words = ["--data-root", tmp_path, "--batch-size", 8]
    assert f"1 of 24 pictures of CIRR train is missing, the first is {gone}" in refused(
        capsys, world, tmp_path / "out", *words
    )
    with pytest.warns(UserWarning, match="1 of 24"):
        run(world, tmp_path / "out", *words, "--allow-missing", epochs=1)
    bad.write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 of 24"):
        for workers in (0, 1):  # in a process of its own it is the same line
            assert f"{bad} cannot be decoded" in refused(
                capsys, world, tmp_path / f"more{workers}", *words, "--allow-missing", "--num-workers", workers
            )


# ---------------------------------------------------------------- a loss that is no number


@pytest.fixture
def nan_at_step_2(monkeypatch):
    "The second loss of a run is NaN, with a gradient."
    forward, count = CaLa.forward, []

    def broken(self, *batch):
        losses = forward(self, *batch)
        count.append(1)
        return losses._replace(total=losses.total * float("nan")) if len(count) == 2 else losses

    monkeypatch.setattr(CaLa, "forward", broken)


def test_a_loss_that_is_no_number_stops_the_run_with_its_step_and_its_names(world, tmp_path, capsys, nan_at_step_2):
    line = refused(capsys, world, tmp_path / "out")
    assert "the loss is nan at step 2, in the batch of pairs " in line and "--skip-nonfinite" in line
    named = re.search(r"of pairs ([^.;]*)", line)[1].replace(" ", "").rstrip(",").split(",")
    assert (
        set(named) <= {triplet.pair_id for triplet in open_dataset("CIRR", world, "train").triplets} and len(named) >= 3
    )


def test_skip_nonfinite_goes_on_and_counts(world, tmp_path, nan_at_step_2):
    done = train(
        parse_flags(Recipe, train_flags(world, tmp_path / "out", "--skip-nonfinite", epochs=1)), progress=False
    )
    assert done.skipped == 1 and len(done.log) == 2 and done.epochs_done == 1
    assert all(value.isfinite().all() for value in done.model.state_dict().values())


# ---------------------------------------------------------------- killed, stopped, repeated


def _child(words, killed_at, error):
    "Run the command in its own process, which gets a signal at its nth call of something; its output goes to a file."
    torch.set_num_threads(1)
    where, name, number, sent = killed_at or (None, None, None, None)
    if where:
        owner, _, method = where.rpartition(".")
        owner = {"Learner": cala.training.Learner}[owner]
        original, count = getattr(owner, method), []

        def watched(*args, **kwargs):
            if name is None or Path(args[0]).name == name:
                count.append(1)
            if len(count) == number:
                os.kill(os.getpid(), sent)
            return original(*args, **kwargs)

        setattr(owner, method, watched)
    with open(error, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        run_command(main, words, prog="cala-train")


def in_child(server, words, error, killed_at=None):
    "Exit code of a run in a child, or minus the signal that ended it."
    return exit_code(server.Process(target=_child, args=(words, killed_at, str(error))))


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(world, tmp_path, undisturbed, server):
    words = train_flags(world, tmp_path / "run", epochs=3)
    assert (
        in_child(server, words, tmp_path / "said", ("Learner.train_step", None, 3, signal.SIGINT)) == 2
    )  # in the middle of an epoch: the generators matter
    (line,) = lines_of((tmp_path / "said").read_text())
    assert (
        line.startswith("cala-train: stopped by Ctrl-C in epoch 2; 3 steps are kept")
        and f"--resume {tmp_path / 'run'}" in line
    )
    assert in_child(server, [*words, "--resume", str(tmp_path / "run")], tmp_path / "said") == 0
    assert read_results(tmp_path / "run") == read_results(undisturbed)


def test_the_folder_alone_resumes_a_run_with_its_own_flags(world, tmp_path, undisturbed, server):
    words = train_flags(world, tmp_path / "run", epochs=3)
    in_child(server, words, tmp_path / "said", ("Learner.train_step", None, 3, signal.SIGINT))
    assert in_child(server, ["--resume", str(tmp_path / "run")], tmp_path / "said") == 0
    assert read_results(tmp_path / "run") == read_results(undisturbed)


def test_the_same_seed_twice_leaves_the_same_bytes_and_another_does_not(world, tmp_path, undisturbed):
    run(world, tmp_path / "again", epochs=3)
    assert read_results(tmp_path / "again") == read_results(undisturbed)
    for name in ("best", "last"):
        assert (tmp_path / "again" / name / "model.safetensors").read_bytes() == (
            undisturbed / name / "model.safetensors"
        ).read_bytes()
    run(world, tmp_path / "other", "--seed", 1, epochs=1)
    assert pd.read_csv(tmp_path / "other/log.csv").loss[0] != pd.read_csv(undisturbed / "log.csv").loss[0]
    texts = [
        [data.caption(i) for i in range(len(data))]
        for seed in (0, 1)
        for data in open_split(Recipe(dataset="FashionIQ", data_root=world, seed=seed), "train")
    ]
    assert texts[0] != texts[1]  # the texts of FashionIQ are drawn by it, too


@pytest.mark.parametrize("dataset", ["CIRR", "FashionIQ"])
def test_the_number_of_workers_changes_nothing(world, tmp_path, dataset):
    for workers in (0, 1):
        run(world, tmp_path / str(workers), "--dataset", dataset, "--num-workers", workers)
    assert read_results(tmp_path / "0") == read_results(tmp_path / "1")


def test_cached_tokens_give_the_log_that_pictures_give(world, tmp_path):
    for cache in ("off", "tokens"):
        run(world, tmp_path / cache, "--cache", cache, "--cache-dir", tmp_path / "tokens_kept")
    logs = [pd.read_csv(tmp_path / cache / "log.csv") for cache in ("off", "tokens")]
    pd.testing.assert_frame_equal(*logs, atol=1e-5, rtol=0)

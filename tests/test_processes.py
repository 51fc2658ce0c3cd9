"Several processes train as one does, in losses, weights and metrics; when one stops or dies, all end, with one line."

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import cala.library.cache.build
import cala.library.cache.files
import cala.training
from cala.library.checkpoint import load_checkpoint
from cala.library.cli import run_command
from cala.library.worlds.garments import draw_fashioniq
from cala.scripts.train import main
from small_runs import lines_of, still_flags, train_flags


@pytest.fixture(scope="module")
def server():
    "Children are forked from a process that has imported everything and computed nothing."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cala.library.run", "cala.scripts.train"])
    return context


def _rank(rank, ranks, port, words, said, sent):
    "One process, as torchrun starts it; `sent` = (process, step, signal) is sent to one of them when it begins a step."
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    cala.library.cache.files.SHARD = 8  # pictures a file of a cache: enough files for two
    step, begun = cala.training.Learner.train_step, []

    def watched(self):
        begun.append(1)
        if sent and (rank, len(begun)) == sent[:2]:
            os.kill(os.getpid(), sent[2])
        return step(self)

    cala.training.Learner.train_step = watched
    with open(f"{said}.{rank}", "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        run_command(main, words, prog="cala-train")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(server, words, said, ranks=2, sent=None):
    "Exit code of every rank (minus a signal), and what each said; none may hang."
    port = free_port()
    children = [server.Process(target=_rank, args=(rank, ranks, port, words, str(said), sent)) for rank in range(ranks)]
    for child in children:
        child.start()
    ends = time.time() + 120
    for child in children:
        child.join(max(0, ends - time.time()))
    hung = [child for child in children if child.exitcode is None]
    for child in hung:
        child.kill()
    spoken = [Path(f"{said}.{rank}").read_text() for rank in range(ranks)]
    assert not hung, spoken
    return [child.exitcode for child in children], spoken


def compare(one, two):
    "Losses of every step, metrics, and what the models of two runs say."
    a, b = (pd.read_csv(folder / "log.csv") for folder in (one, two))
    pd.testing.assert_frame_equal(a, b, atol=1e-5, rtol=0)
    pd.testing.assert_frame_equal(*(pd.read_csv(folder / "metrics.csv") for folder in (one, two)), atol=1e-9, rtol=0)
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    torch.manual_seed(0)
    seen = torch.randn(2, 6, 36, 32)

    def says(model):
        return torch.stack(model.compare(model.embed(seen[0], ["red"] * 6, seen[1]))).log_softmax(-1)

    for name in (
        "best",
        "last",
    ):  # their results: AdamW moves weights whose gradient is only rounding (biases of keys) at random
        with torch.no_grad():
            torch.testing.assert_close(
                *(says(load_checkpoint(folder / name)) for folder in (one, two)), atol=1e-3, rtol=1e-3
            )
    return len(pd.read_csv(one / "log.csv"))


def bits(folder):
    "What a run leaves, to compare bit for bit."
    tables = {name: (folder / name).read_bytes() for name in ("log.csv", "metrics.csv")}
    return tables | {
        name: value.numpy().tobytes() for name, value in load_file(folder / "last/model.safetensors").items()
    }


def test_two_ranks_with_half_a_batch_each_are_one_process_with_the_whole_one_for_twenty_steps(world, tmp_path, server):
    def words(output):
        return still_flags(
            world,
            output,
            "--cir-frame",
            "artemis",
            "--batch-size",
            8,
            "--validation-frequency",
            5,
            "--learning-rate",
            "3e-4",
            epochs=5,
        )  # gently: AdamW blows rounding up

    assert together(server, words(tmp_path / "two"), tmp_path / "said")[0] == [0, 0], [
        path.read_text() for path in tmp_path.glob("said.*")
    ]
    run_command(main, words(tmp_path / "one"), prog="cala-train")
    assert compare(tmp_path / "one", tmp_path / "two") == 20


def test_caches_pieces_and_gallery_negatives_over_ranks_are_those_of_one_process(world, tmp_path, server):
    "With tokens that both ranks build, and with targets that are constant and kept as well."

    def words(output, *more):
        return still_flags(
            world, output, "--encoder", "multi", "--gallery-negatives", "--cache-dtype", "float32", *more, epochs=2
        )

    run_command(main, words(tmp_path / "one"), prog="cala-train")
    for cache, kept in (("tokens", 2), ("auto", 4)):  # auto finds the tokens
        codes, said = together(
            server,
            words(tmp_path / cache, "--accumulate", 2, "--cache", cache, "--cache-dir", tmp_path / "kept"),
            tmp_path / "said",
        )
        assert codes == [0, 0], said
        assert len(list((tmp_path / "kept").glob("*/about.json"))) == kept  # of train and of val
        assert compare(tmp_path / "one", tmp_path / cache) == 4


def test_fashioniq_is_validated_over_ranks_as_by_one(world, tmp_path, server):
    draw_fashioniq(tmp_path, train=12, val=24, test=1, size=48)

    def words(output):
        return still_flags(
            world, output, "--dataset", "FashionIQ", "--data-root", tmp_path, "--encoder", "text", epochs=1
        )

    codes, said = together(server, words(tmp_path / "two"), tmp_path / "said")
    assert codes == [0, 0], said
    run_command(main, words(tmp_path / "one"), prog="cala-train")
    assert compare(tmp_path / "one", tmp_path / "two") == 2


def test_a_signal_to_one_rank_stops_all_at_one_step_and_resumed_they_end_as_if_undisturbed(world, tmp_path, server):
    "With dropout: the generators of both ranks are kept. One process may go on with it too."

    def words(output, *more):
        return train_flags(world, output, *more, epochs=2)

    assert together(server, words(tmp_path / "whole"), tmp_path / "said")[0] == [0, 0]
    codes, said = together(server, words(tmp_path / "cut"), tmp_path / "said", sent=(1, 3, signal.SIGTERM))
    (line,) = lines_of(said[0])
    assert (
        codes == [2, 2]
        and lines_of(said[1]) == []
        and "stopped by SIGTERM in epoch 2; 3 steps are kept" in line
        and f"--resume {tmp_path / 'cut'}" in line
    )
    codes, said = together(server, words(tmp_path / "cut", "--resume", tmp_path / "cut"), tmp_path / "said")
    assert codes == [0, 0], said
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")


def test_one_process_goes_on_with_what_two_ranks_began(world, tmp_path, server):
    begin, go_on = (
        still_flags(world, tmp_path / "two", "--max-epoch", 2, epochs=1),
        still_flags(world, tmp_path / "two", "--resume", tmp_path / "two", epochs=2),
    )
    assert together(server, begin, tmp_path / "said")[0] == [0, 0]
    run_command(main, go_on, prog="cala-train")
    run_command(main, still_flags(world, tmp_path / "one", epochs=2), prog="cala-train")
    assert compare(tmp_path / "one", tmp_path / "two") == 4


def test_a_rank_that_is_killed_ends_the_others_with_a_line_and_not_a_hang(world, tmp_path, server):
    begun = time.time()
    codes, said = together(
        server, train_flags(world, tmp_path / "run", epochs=3), tmp_path / "said", sent=(1, 4, signal.SIGKILL)
    )
    (line,) = lines_of(said[0])
    assert (
        codes == [2, -signal.SIGKILL] and "another process has ended" in line and f"--resume {tmp_path / 'run'}" in line
    )
    assert time.time() - begun < 60


def test_a_batch_that_ranks_cannot_share_is_refused_by_all(world, tmp_path, server):
    codes, said = together(server, train_flags(world, tmp_path / "run", "--batch-size", 15), tmp_path / "said")
    assert codes == [2, 2] and all("--batch-size 15 cannot be shared by 2 ranks (processes)" in text for text in said)


def test_torchrun_trains_and_a_killed_rank_ends_it(world, tmp_path):
    words = train_flags(world, tmp_path / "run", "--validation-frequency", 10**6, epochs=10**4)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "cala.scripts.train",
        *words,
    ]
    with open(tmp_path / "said", "w") as file:
        agent = subprocess.Popen(launch, stdout=file, stderr=file, env=dict(os.environ))
    try:
        ends = time.time() + 150
        while not (tmp_path / "run/last").is_dir() and agent.poll() is None and time.time() < ends:
            time.sleep(0.2)
        ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        assert len(ranks) == 2, (tmp_path / "said").read_text()
        os.kill(int(ranks[1]), signal.SIGKILL)
        assert agent.wait(60) != 0
    finally:
        if agent.poll() is None:
            agent.terminate()
    said = (tmp_path / "said").read_text()
    assert "cala-train: another process has ended" in said or "train.py: another process has ended" in said, said

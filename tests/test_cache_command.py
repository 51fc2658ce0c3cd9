"cala-cache: what it prints before it starts, what it builds, and that the other commands find it."

import multiprocessing
import os
import socket

import pytest
import torch
from accelerate import PartialState

import cala.library.cache.build
import cala.library.cache.jobs
from cala.data import CIRR
from cala.encoders import make_backbone, read_vocabulary
from cala.errors import CalaError
from cala.library.cache import TokenCache
from cala.library.checkpoint import save_checkpoint
from cala.library.cli import run_command
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa
from cala.scripts.cache import main
from cala.scripts.cirr_submission import main as submission
from cala.scripts.combiner import main as combiner
from cala.scripts.train import main as train
from cala.scripts.validate import main as validate
from small_runs import (
    train_flags,
    world,  # noqa: F401
)


def run_cache(world, folder, *more):
    flags = ["--dataset", "CIRR", "--data-root", world, "--encoder-arch", "tiny", "--cache-dir", folder]
    flags += ["--backbone-weights", world / "small.safetensors", *more]
    return run_command(main, [str(word) for word in flags], prog="cala-cache")


def list_shards(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_a_dry_run_prints_size_and_time_and_writes_nothing(world, tmp_path, capsys):
    run_cache(world, tmp_path / "cache", "--dry-run", "--encoder", "multi")
    printed = capsys.readouterr().out
    assert not (tmp_path / "cache").exists()
    assert [line.split()[:4] for line in printed.splitlines()[1:5]] == [
        ["train", "tokens", "36", "36"],
        ["val", "tokens", "24", "24"],
        ["train", "targets", "36", "36"],
        ["val", "targets", "24", "24"],
    ]
    assert "0.2 MB" in printed  # 36 pictures x 36 tokens x 32 wide x 4 bytes
    assert "to write into" in printed
    assert "about" in printed


def test_size_and_time_are_printed_before_the_work(world, tmp_path, capsys, monkeypatch):
    printed = []

    def begin(*args, **options):
        printed.append(capsys.readouterr().out)
        raise CalaError("it has begun")

    monkeypatch.setattr(cala.library.cache.jobs.CacheBuild, "finish", begin)
    with pytest.raises(SystemExit):
        run_cache(world, tmp_path / "cache")
    assert "to write into" in printed[0]


@pytest.mark.parametrize("encoder, kind, count", [("both", "auto", 2), ("multi", "tokens", 2), ("multi", "auto", 4)])
def test_what_is_built_is_what_train_then_reads(world, tmp_path, encoder, kind, count, capsys):
    folder = tmp_path / "cache"
    caches = run_cache(world, folder, "--encoder", encoder, "--cache", kind, "--verify")
    assert len(caches) == count
    assert all(isinstance(cache, TokenCache) for cache in caches)
    before = list_shards(folder)
    flags = ["--encoder", encoder, "--cache", kind, "--cache-dir", folder]
    run_command(train, train_flags(world, tmp_path / "run", *flags, epochs=2), prog="cala-train")
    assert list_shards(folder) == before
    assert "to do" not in capsys.readouterr().out.split("verified")[1]


def test_a_second_call_has_nothing_to_do(world, tmp_path, capsys):
    run_cache(world, tmp_path)
    before = list_shards(tmp_path)
    run_cache(world, tmp_path)
    assert list_shards(tmp_path) == before
    assert "all caches are complete" in capsys.readouterr().out


def test_a_checkpoint_decides_transform_and_encoder(world, tmp_path):
    flags = ["--encoder", "multi", "--transform", "squarepad"]
    run_command(train, train_flags(world, tmp_path / "run", *flags, epochs=1), prog="cala-train")
    folder, only_val = tmp_path / "cache", ("--splits", "val")
    plain = run_cache(world, folder, *only_val)
    trained = run_cache(world, folder, *only_val, "--checkpoint", tmp_path / "run" / "last")
    assert (len(plain), len(trained)) == (1, 2)
    assert trained[0].place != plain[0].place
    (same,) = run_cache(world, folder, *only_val, "--transform", "squarepad", "--cache", "tokens")
    assert same.place == trained[0].place  # the frozen trunk of a run is that of its backbone


def test_validate_and_combiner_use_what_is_there_with_auto_and_build_nothing(world, tmp_path, capsys):
    run_command(train, train_flags(world, tmp_path / "run", epochs=1), prog="cala-train")
    folder = tmp_path / "cache"
    common = ["--checkpoint", tmp_path / "run" / "last", "--data-root", world, "--cache-dir", folder, "--cache"]

    def run_validate(kind, name):
        flags = [*common, kind, "--dataset", "CIRR", "--output", tmp_path / name]
        return list(run_command(validate, [str(word) for word in flags], prog="cala-validate").values())[-1]

    off, early = run_validate("off", "off"), run_validate("auto", "early")
    assert early == off
    assert not list_shards(folder)
    assert "would not pay" in capsys.readouterr().out
    run_cache(world, folder, "--cache", "tokens")
    before = list_shards(folder)
    assert run_validate("auto", "late")["mean"] == pytest.approx(off["mean"], abs=3)
    assert "are there already" in capsys.readouterr().out
    flags = [*common, "auto", "--num-epochs", 1, "--projection-dim", 32, "--hidden-dim", 32]
    flags += ["--output", tmp_path / "combiner"]
    run_command(combiner, [str(word) for word in flags], prog="cala-combiner")
    assert list_shards(folder) == before
    assert capsys.readouterr().out.count("are there already") == 2


def test_a_submission_from_cached_tokens_is_that_from_pictures(tmp_path, capsys):
    root = draw_cirr(tmp_path, train=2, val=1, test1=9, size=48)  # 54 pictures, because a submission names 50
    texts = [text for triplet in CIRR(root, "test1").triplets for text in triplet.captions]
    backbone = make_backbone("tiny", vocabulary=read_vocabulary(texts), width=32, heads=2, layers=2)
    save_checkpoint(CaLa(backbone), tmp_path / "best")
    common = ["--checkpoint", tmp_path / "best", "--data-root", root, "--device", "cpu"]
    common += ["--cache-dir", tmp_path / "cache", "--cache-dtype", "float32"]

    def write(kind):
        flags = [*common, "--cache", kind, "--output", tmp_path / kind]
        paths = run_command(submission, [str(word) for word in flags], prog="cala-cirr-submission")
        return [path.read_bytes() for path in paths]

    off = write("off")
    assert write("tokens") == off
    assert len(list_shards(tmp_path / "cache")) == 1  # 54 pictures in one shard
    capsys.readouterr()
    assert write("auto") == off
    assert "are there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--cache", "off"), "nothing to do"),
        (("--splits", ","), "--splits is empty"),
        (("--splits", "dev"), "no split 'dev'"),
        (("--encoder", "none"), "--encoder none"),
        (("--checkpoint", "nowhere"), "nowhere is no checkpoint"),
        (("--cache-dtype", "int4"), "choose one of"),
    ],
)
def test_mistakes_are_one_line_and_status_2(world, tmp_path, flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_cache(world, tmp_path / "cache", *flags)
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "cache").exists()


def test_a_disk_without_room_is_noticed_before_the_work(world, tmp_path, monkeypatch, capsys):
    class Usage:
        free = 1000

    monkeypatch.setattr(cala.library.cache.build.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(SystemExit):
        run_cache(world, tmp_path / "cache")
    assert "1.0 KB free; name another folder with --cache-dir, or use float16" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_is_one_line_with_the_flag_that_helps(world, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        run_cache(world, tmp_path / "file" / "cache")
    error = capsys.readouterr().err.strip()
    assert "--cache-dir" in error
    assert "\n" not in error


def run_process(index, port, world, folder, results):
    "One of two processes of cala-cache."
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="1")
    PartialState._reset_state()
    results.put((index, *summarise(run_cache(world, folder, "--encoder", "multi"))))
    torch.distributed.destroy_process_group()


def summarise(caches):
    "Shapes of all caches; sums of the first tokens and the first features."
    sums = [float(caches[0][:].sum()), float(caches[2].features().sum())]
    return [cache.shape for cache in caches], sums


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_processes_build_what_one_process_builds(world, tmp_path):
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = fork.Queue()
    arguments = (port, world, tmp_path / "two", results)
    started = [fork.Process(target=run_process, args=(index, *arguments), daemon=True) for index in range(2)]
    for process in started:
        process.start()
    try:
        first, second = sorted((results.get(timeout=120) for _ in started), key=lambda result: result[0])
    finally:
        for process in started:
            process.join(10)
            process.kill()
    assert first[1:] == second[1:]
    shapes, sums = summarise(run_cache(world, tmp_path / "one", "--encoder", "multi"))
    assert shapes == first[1]
    assert sums == pytest.approx(first[2], rel=1e-5)

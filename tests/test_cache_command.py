"cala-cache: what it says before it starts, what it builds, and that the other commands find it."
import multiprocessing
import os
import socket

import pytest
import torch
from accelerate import PartialState

from cala.errors import CalaError
from cala.library.cli import run_command
from cala.data import CIRR
from cala.encoders import make_backbone
from cala.encoders import read_vocabulary
from cala.library.cache.build import TokenCache
from cala.model import CaLa
from cala.library.checkpoint import save_checkpoint
from cala.scripts.cache import main
from cala.scripts.cirr_submission import main as submission
from cala.scripts.combiner import main as combiner
from cala.scripts.train import main as train
from cala.scripts.validate import main as validate
from cala.library.worlds.scenes import draw_cirr
from small_runs import train_flags
from small_runs import world


def words(world, kept, *more):
    flags = ["--dataset", "CIRR", "--data-root", world, "--encoder-arch", "tiny", "--backbone-weights", world / "small.safetensors", "--cache-dir", kept, *more]
    return [str(word) for word in flags]


def cache(world, kept, *more): return run_command(main, words(world, kept, *more), prog="cala-cache")


def files(kept): return {path: path.stat().st_mtime_ns for path in kept.rglob("*.safetensors")}


def test_a_dry_run_tells_size_and_time_and_writes_nothing(world, tmp_path, capsys):
    cache(world, tmp_path / "kept", "--dry-run", "--encoder", "multi")
    said = capsys.readouterr().out
    assert not (tmp_path / "kept").exists()
    assert [line.split()[:4] for line in said.splitlines()[1:5]] == [["train", "tokens", "36", "36"], ["val", "tokens", "24", "24"], ["train", "targets", "36", "36"], ["val", "targets", "24", "24"]]
    assert "0.2 MB" in said and "to write into" in said and "about" in said             # 36 pictures x 36 tokens x 32 wide x 4 bytes


def test_size_and_time_are_said_before_the_work(world, tmp_path, capsys, monkeypatch):
    said = []
    def begin(*args, **how):
        said.append(capsys.readouterr().out)
        raise CalaError("it has begun")
    monkeypatch.setattr("cala.scripts.cache.cache_tokens", begin)
    with pytest.raises(SystemExit): cache(world, tmp_path / "kept")
    assert "to write into" in said[0]


@pytest.mark.parametrize("encoder, how, expected", [("both", "auto", ["tokens", "tokens"]), ("multi", "tokens", ["tokens", "tokens"]),
                                                    ("multi", "auto", ["tokens", "tokens", "targets", "targets"])])
def test_what_is_built_is_what_train_then_reads(world, tmp_path, encoder, how, expected, capsys):
    kept = tmp_path / "kept"
    found = cache(world, kept, "--encoder", encoder, "--cache", how, "--verify")
    assert len(found) == len(expected) and all(isinstance(part, TokenCache) for part in found)
    before = files(kept)
    run_command(train, train_flags(world, tmp_path / "run", "--encoder", encoder, "--cache", how, "--cache-dir", kept, epochs=2), prog="cala-train")
    assert files(kept) == before and "to do" not in capsys.readouterr().out.split("verified")[1]


def test_a_second_call_has_nothing_to_do(world, tmp_path, capsys):
    cache(world, tmp_path)
    before = files(tmp_path)
    cache(world, tmp_path)
    assert files(tmp_path) == before and "all of it is there" in capsys.readouterr().out


def test_a_checkpoint_says_which_transform_and_encoder(world, tmp_path):
    run_command(train, train_flags(world, tmp_path / "run", "--encoder", "multi", "--transform", "squarepad", epochs=1), prog="cala-train")
    plain, told = (cache(world, tmp_path / "kept", "--splits", "val", *more) for more in ((), ("--checkpoint", tmp_path / "run" / "last")))
    assert len(plain) == 1 and len(told) == 2 and told[0].place != plain[0].place
    same, = cache(world, tmp_path / "kept", "--splits", "val", "--transform", "squarepad", "--cache", "tokens")
    assert same.place == told[0].place                                                     # the frozen trunk of a run is that of its backbone


def test_validate_and_combiner_take_what_is_there_with_auto_and_build_nothing(world, tmp_path, capsys):
    run_command(train, train_flags(world, tmp_path / "run", epochs=1), prog="cala-train")
    same = ["--checkpoint", tmp_path / "run" / "last", "--data-root", world, "--cache-dir", tmp_path / "kept", "--cache"]
    words = lambda how, *more: [str(word) for word in (*same, how, *more)]
    judge = lambda how, name: list(run_command(validate, words(how, "--dataset", "CIRR", "--output", tmp_path / name), prog="cala-validate").values())[-1]
    off, early = judge("off", "off"), judge("auto", "early")
    assert early == off and not files(tmp_path / "kept") and "would not pay" in capsys.readouterr().out
    cache(world, tmp_path / "kept", "--cache", "tokens")
    before = files(tmp_path / "kept")
    assert judge("auto", "late")["mean"] == pytest.approx(off["mean"], abs=3) and "are there already" in capsys.readouterr().out
    run_command(combiner, words("auto", "--num-epochs", 1, "--projection-dim", 32, "--hidden-dim", 32, "--output", tmp_path / "combiner"), prog="cala-combiner")
    assert files(tmp_path / "kept") == before and capsys.readouterr().out.count("are there already") == 2


def test_a_submission_from_cached_tokens_is_that_from_pictures(tmp_path, capsys):
    root = draw_cirr(tmp_path, train=2, val=1, test1=9, size=48)                               # 54 pictures: a submission names 50
    backbone = make_backbone("tiny", vocabulary=read_vocabulary([text for triplet in CIRR(root, "test1").triplets for text in triplet.captions]), width=32, heads=2, layers=2)
    save_checkpoint(CaLa(backbone), tmp_path / "best")
    same = ["--checkpoint", tmp_path / "best", "--data-root", root, "--device", "cpu", "--cache-dir", tmp_path / "kept", "--cache-dtype", "float32"]
    write = lambda how: [path.read_bytes() for path in run_command(submission, [str(word) for word in (*same, "--cache", how, "--output", tmp_path / how)], prog="cala-cirr-submission")]
    off, tokens = write("off"), write("tokens")
    assert tokens == off and len(files(tmp_path / "kept")) == 1                                # 54 pictures in a file
    capsys.readouterr()
    assert write("auto") == off and "are there already" in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [(("--cache", "off"), "nothing to do"), (("--splits", ","), "--splits is empty"), (("--splits", "dev"), "no split 'dev'"),
                                         (("--encoder", "none"), "--encoder none"), (("--checkpoint", "nowhere"), "nowhere is no checkpoint"), (("--cache-dtype", "int4"), "choose one of")])
def test_mistakes_are_one_line_and_status_2(world, tmp_path, flags, said, capsys):
    with pytest.raises(SystemExit) as end: cache(world, tmp_path / "kept", *flags)
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and said in error and "\n" not in error and not (tmp_path / "kept").exists()


def test_a_disk_without_room_is_said_before_the_work(world, tmp_path, monkeypatch):
    monkeypatch.setattr("cala.scripts.cache.shutil.disk_usage", lambda path: type("", (), dict(free=1000)))
    from cala.scripts.cache import Caching
    recipe = dict(data_root=str(world), encoder_arch="tiny", backbone_weights=str(world / "small.safetensors"), cache_dir=str(tmp_path / "kept"))
    with pytest.raises(CalaError, match="1.0 KB free; give another --cache-dir, or --cache-dtype float16"): main(Caching(**recipe))


def as_rank(rank, port, world, kept, said):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="1")
    PartialState._reset_state()
    found = cache(world, kept, "--encoder", "multi")
    said.put((rank, [cache.shape for cache in found], [float(found[0][:].sum()), float(found[2].features().sum())]))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_ranks_build_what_one_process_builds(world, tmp_path):
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    said = fork.Queue()
    started = [fork.Process(target=as_rank, args=(rank, port, world, tmp_path / "two", said), daemon=True) for rank in range(2)]
    for process in started: process.start()
    try: (_, shapes, sums), other = sorted((said.get(timeout=120) for _ in started), key=lambda words: words[0])
    finally:
        for process in started: process.join(10); process.kill()
    alone = cache(world, tmp_path / "one", "--encoder", "multi")
    assert other[1:] == (shapes, sums) and [part.shape for part in alone] == shapes
    assert [float(alone[0][:].sum()), float(alone[2].features().sum())] == pytest.approx(sums, rel=1e-5)

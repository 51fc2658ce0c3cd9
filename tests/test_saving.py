"What is saved is saved whole: a full disk, a file cut short, a bit turned over, a file that is gone."
import builtins
import errno
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch

from cala.errors import CalaError
from cala.library.cli import run_command
from cala.encoders import load_backbone
from cala.encoders import make_backbone
from cala.encoders import save_backbone
from cala.model import CaLa
from cala.library.files import find_whole_folder
from cala.library.checkpoint import load_checkpoint
from cala.library.checkpoint import read_recipe
from cala.library.checkpoint import save_checkpoint
from cala.scripts import validate
from cala.scripts.train import main
from small_runs import kept
from small_runs import lines_of
from small_runs import train_flags
from small_runs import world


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(world, output, *more): return run_command(main, train_flags(world, output, *more), prog="cala-train")


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    "The folder of a run of two epochs."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(world, folder)
    return folder


def refused(capsys, command, *words):
    "The one line of a command that ends with status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended: command(*words)
    lines = lines_of(capsys.readouterr().err)
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------------- a full disk

class FullDisk:
    "The nth call that touches the disk fails as on a full one; a write leaves the half that still had room."
    def __init__(self, monkeypatch, number):
        self.left, self.hit = number, ""
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "rename")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name), name))
        monkeypatch.setattr("cala.library.files.open", self.open, raising=False)

    def fails(self, name):
        self.left -= 1
        if self.left: return False
        self.hit = name
        return True

    def counted(self, original, name):
        def call(*args, **kwargs):
            if self.fails(name): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)
        return call

    def open(self, *args):
        file = builtins.open(*args, buffering=0)
        class Half:
            def __enter__(half): return half
            def __exit__(half, *error): file.close()
            def __getattr__(half, name): return getattr(file, name)
            def write(half, data):
                if not self.fails("write"): return file.write(data)
                file.write(data[:len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return Half()


def a_model(seed):
    return CaLa(make_backbone("tiny", vocabulary=["red"], width=16, heads=2, layers=1, queries=2, seed=seed), tac_weight=0., hca_weight=0.)


def test_a_disk_that_is_full_at_any_moment_of_a_save_leaves_the_checkpoint_before_whole(tmp_path, monkeypatch):
    (one, two, three), hits = map(a_model, (1, 2, 3)), []
    for number in range(1, 100):
        folder = tmp_path / str(number) / "best"
        save_checkpoint(one, folder, metrics=dict(epoch=1), extra={"state.pt": b"first"})
        with monkeypatch.context() as patched:
            disk = FullDisk(patched, number)
            try: save_checkpoint(two, folder, metrics=dict(epoch=2), extra={"state.pt": b"second"})
            except CalaError as error: said = str(error)
            else: break
        hits.append(disk.hit)
        assert said == f"cannot save {folder}: No space left on device; what was saved there before is whole; make room and go on"
        assert read_recipe(folder, "state.pt")["metrics"] == dict(epoch=1)
        assert all(map(torch.equal, load_checkpoint(folder).state_dict().values(), one.state_dict().values()))
        assert [path for path in folder.parent.iterdir()] == [find_whole_folder(folder)]  # no part is left to fill the disk
        save_checkpoint(three, folder, metrics=dict(epoch=3))                        # with room again it goes on
        assert read_recipe(folder)["metrics"] == dict(epoch=3) and os.listdir(folder.parent) == ["best"]
    assert set(hits) == {"mkdir", "write", "fsync", "rename"} and len(hits) == 1 + 3 * 2 + 2


def test_a_file_that_the_system_does_not_let_grow_leaves_the_checkpoint_before_whole(tmp_path):
    save_checkpoint(a_model(1), tmp_path / "best", metrics=dict(epoch=1))
    size, limits = (tmp_path / "best/model.safetensors").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(CalaError, match="cannot save .*best: File too large; what was saved there before is whole"): save_checkpoint(a_model(2), tmp_path / "best")
        with pytest.raises(CalaError, match="cannot save .*last: File too large; nothing was saved there before"): save_checkpoint(a_model(2), tmp_path / "last")
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_recipe(tmp_path / "best")["metrics"] == dict(epoch=1) and os.listdir(tmp_path) == ["best"]


def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(world, finished, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        disk = FullDisk(patched, 40)
        assert "No space left on device" in refused(capsys, train, world, tmp_path / "run")
    assert disk.hit and read_recipe(tmp_path / "run/last", "state.pt")["metrics"]["epoch"] == 1
    train(world, tmp_path / "run", "--resume", tmp_path / "run")
    assert kept(tmp_path / "run") == kept(finished)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_log_on_a_device_that_is_really_full_is_one_line_and_the_log_before_is_there(world, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run/log.csv").read_bytes()
    (tmp_path / "run/log.csv.part").symlink_to("/dev/full")
    words = ["--resume", tmp_path / "run", "--num-epochs", 3, "--max-epoch", 2]
    assert f"cannot write {tmp_path / 'run/log.csv'}: No space left on device; what stood there is untouched" in refused(capsys, train, world, tmp_path / "run", *words)
    assert (tmp_path / "run/log.csv").read_bytes() == before and read_recipe(tmp_path / "run/last", "state.pt")["metrics"]["epoch"] == 2


# ---------------------------------------------------------------- damage

FILES = "model.safetensors", "recipe.json", "state.pt"


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where // 8 % len(data)] ^= 1 << where % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_one_bit_turned_over_anywhere_is_noticed_or_changes_nothing(finished, tmp_path, name):
    whole, draw, noticed = read_recipe(finished / "last", *FILES[2:]), random.Random(0), 0
    for _ in range(60):
        shutil.copytree(finished / "last", tmp_path / "last", dirs_exist_ok=True)
        flip(tmp_path / "last" / name, draw.getrandbits(40))
        try: assert read_recipe(tmp_path / "last", "state.pt") == whole and name == "recipe.json"  # a blank between two words
        except CalaError as error: noticed += str(tmp_path / "last" / name) in str(error) and "\n" not in str(error)
    assert noticed == 60 or name == "recipe.json" and noticed > 30


DAMAGE = {
    "one bit": lambda path: flip(path, 4001),
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "nothing in it": lambda path: os.truncate(path, 0),
    "not there": lambda path: path.unlink(),
    "of another run": lambda path: path.write_bytes(path.read_bytes()[::-1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_one_line_that_names_the_file_and_a_checkpoint_that_is_whole(world, finished, tmp_path, capsys, name, damage):
    shutil.copytree(finished, tmp_path / "run")
    DAMAGE[damage](tmp_path / "run/last" / name)
    line = refused(capsys, train, world, tmp_path / "run", "--resume", tmp_path / "run")
    best = read_recipe(finished / "best")["metrics"]["epoch"]
    assert name in line and line.endswith(f"; intact is {tmp_path / 'run/best'} (epoch {best})")
    flags = ["--data-root", world, "--dataset", "CIRR", "--device", "cpu", "--output", tmp_path / "out"]
    judge = lambda folder: run_command(validate.main.__wrapped__, [str(word) for word in ["--checkpoint", folder, *flags]], prog="cala-validate")
    if name != "state.pt" and damage in ("one bit", "not there"): assert name in refused(capsys, judge, tmp_path / "run/last")
    if damage == "one bit": judge(tmp_path / "run/best")


def test_where_no_checkpoint_is_whole_the_line_says_what_to_give(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for name in ("best", "last"): flip(tmp_path / "run" / name / "model.safetensors", 999)
    with pytest.raises(CalaError, match="does not match its recipe.json .*; give the folder that cala-train wrote"): read_recipe(tmp_path / "run/last")


def test_a_stage_1_file_is_written_whole_and_one_bit_of_it_is_noticed(tmp_path, monkeypatch):
    path, backbone = tmp_path / "stage1.safetensors", a_model(1).backbone
    save_backbone(backbone, path)
    good = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))  # killed before the rename
        with pytest.raises(KeyboardInterrupt): save_backbone(a_model(2).backbone, path)
    assert path.read_bytes() == good
    draw = random.Random(0)
    for _ in range(60):
        path.write_bytes(good)
        flip(path, draw.getrandbits(40))
        with pytest.raises(CalaError, match="stage1.safetensors is not a backbone written by cala, or is damaged"): load_backbone(path)

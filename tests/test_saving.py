"Saved files are whole or reported: a full disk, a file cut short, a flipped bit, a missing file."

import builtins
import errno
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch

from cala.encoders import load_backbone, make_backbone, save_backbone
from cala.errors import CalaError
from cala.library.checkpoint import load_checkpoint, read_recipe, save_checkpoint
from cala.library.cli import run_command
from cala.library.files import find_whole_folder
from cala.model import CaLa
from cala.scripts import validate
from cala.scripts.train import main
from small_runs import lines_of, read_results, train_flags


@pytest.fixture(autouse=True)
def _one_thread():
    "Run every test on one thread, where results are equal bit for bit."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(world, output, *more):
    "Run cala-train."
    return run_command(main, train_flags(world, output, *more), prog="cala-train")


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    "The folder of a run of two epochs."
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(world, folder)
    return folder


def error_line(capsys, command, *words):
    "The only line of a command that ends with status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command(*words)
    lines = lines_of(capsys.readouterr().err)
    assert ended.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


# A full disk


class FullDisk:
    "Makes the nth call that touches the disk fail, as on a full disk; a write that fails writes the first half."

    def __init__(self, monkeypatch, number):
        self.left = number  # calls until one fails
        self.failed_call = ""  # its name
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "rename")):
            monkeypatch.setattr(owner, name, self.count_calls(getattr(owner, name), name))
        monkeypatch.setattr("cala.library.files.open", self.open, raising=False)

    def fails(self, name):
        "Count a call; True if it is the one that fails."
        self.left -= 1
        if self.left:
            return False
        self.failed_call = name
        return True

    def count_calls(self, original, name):
        "The function, which raises an error if its call is the one that fails."

        def call(*args, **kwargs):
            if self.fails(name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        return call

    def open(self, *args):
        "A file whose writes are counted."
        file = builtins.open(*args, buffering=0)

        class CountedFile:
            def __enter__(half):
                return half

            def __exit__(half, *error):
                file.close()

            def __getattr__(half, name):
                return getattr(file, name)

            def write(half, data):
                if not self.fails("write"):
                    return file.write(data)
                file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return CountedFile()


def make_small_model(seed):
    "A model without HCA and TAC, whose weights depend on the seed."
    backbone = make_backbone("tiny", vocabulary=["red"], width=16, heads=2, layers=1, queries=2, seed=seed)
    return CaLa(backbone, tac_weight=0.0, hca_weight=0.0)


def test_a_disk_that_is_full_at_any_moment_of_a_save_leaves_the_earlier_checkpoint_whole(tmp_path, monkeypatch):
    first, second, third = map(make_small_model, (1, 2, 3))
    failed_calls = []
    for number in range(1, 100):
        folder = tmp_path / str(number) / "best"
        save_checkpoint(first, folder, metrics=dict(epoch=1), extra={"state.pt": b"first"})
        with monkeypatch.context() as patched:
            disk = FullDisk(patched, number)
            try:
                save_checkpoint(second, folder, metrics=dict(epoch=2), extra={"state.pt": b"second"})
            except CalaError as error:
                message = str(error)
            else:
                break
        failed_calls.append(disk.failed_call)
        assert message == (
            f"cannot save {folder}: No space left on device; what was saved there before is whole; make room and go on"
        )
        assert read_recipe(folder, "state.pt")["metrics"] == dict(epoch=1)
        assert all(map(torch.equal, load_checkpoint(folder).state_dict().values(), first.state_dict().values()))
        # No unfinished file stays, which would fill the disk.
        assert list(folder.parent.iterdir()) == [find_whole_folder(folder)]
        # When the disk has room again, a save succeeds.
        save_checkpoint(third, folder, metrics=dict(epoch=3))
        assert read_recipe(folder)["metrics"] == dict(epoch=3)
        assert os.listdir(folder.parent) == ["best"]
    assert set(failed_calls) == {"mkdir", "write", "fsync", "rename"}
    assert len(failed_calls) == 1 + 3 * 2 + 2


def test_a_limit_of_the_file_size_leaves_the_earlier_checkpoint_whole(tmp_path):
    save_checkpoint(make_small_model(1), tmp_path / "best", metrics=dict(epoch=1))
    size = (tmp_path / "best/model.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(CalaError, match="cannot save .*best: File too large; what was saved there before is whole"):
            save_checkpoint(make_small_model(2), tmp_path / "best")
        with pytest.raises(CalaError, match="cannot save .*last: File too large; nothing was saved there before"):
            save_checkpoint(make_small_model(2), tmp_path / "last")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_recipe(tmp_path / "best")["metrics"] == dict(epoch=1)
    assert os.listdir(tmp_path) == ["best"]


def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(
    world, finished, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patched:
        disk = FullDisk(patched, 40)
        assert "No space left on device" in error_line(capsys, train, world, tmp_path / "run")
    assert disk.failed_call
    assert read_recipe(tmp_path / "run/last", "state.pt")["metrics"]["epoch"] == 1
    train(world, tmp_path / "run", "--resume", tmp_path / "run")
    assert read_results(tmp_path / "run") == read_results(finished)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_log_on_a_device_that_is_really_full_is_one_line_and_the_earlier_log_stays(world, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run/log.csv").read_bytes()
    (tmp_path / "run/log.csv.part").symlink_to("/dev/full")
    words = ["--resume", tmp_path / "run", "--num-epochs", 3, "--max-epoch", 2]
    message = (
        f"cannot write {tmp_path / 'run/log.csv'}: No space left on device; the file that was there before is unchanged"
    )
    assert message in error_line(capsys, train, world, tmp_path / "run", *words)
    assert (tmp_path / "run/log.csv").read_bytes() == before
    assert read_recipe(tmp_path / "run/last", "state.pt")["metrics"]["epoch"] == 2


# Damaged files

FILES = "model.safetensors", "recipe.json", "state.pt"


def flip_bit(path, place):
    "Change one bit of a file."
    data = bytearray(path.read_bytes())
    data[place // 8 % len(data)] ^= 1 << place % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(finished, tmp_path, name):
    expected = read_recipe(finished / "last", *FILES[2:])
    draw, noticed = random.Random(0), 0
    for _ in range(60):
        shutil.copytree(finished / "last", tmp_path / "last", dirs_exist_ok=True)
        flip_bit(tmp_path / "last" / name, draw.getrandbits(40))
        try:
            recipe = read_recipe(tmp_path / "last", "state.pt")
        except CalaError as error:
            if str(tmp_path / "last" / name) in str(error) and "\n" not in str(error):
                noticed += 1
            continue
        # Only in the recipe can a bit change nothing: a blank between two words can become another blank.
        assert recipe == expected
        assert name == "recipe.json"
    if name == "recipe.json":
        assert noticed > 30
    else:
        assert noticed == 60


DAMAGE = {
    "one bit": lambda path: flip_bit(path, 4001),
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "nothing in it": lambda path: os.truncate(path, 0),
    "not there": lambda path: path.unlink(),
    "of another run": lambda path: path.write_bytes(path.read_bytes()[::-1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_one_line_that_names_the_file_and_a_checkpoint_that_is_whole(
    world, finished, tmp_path, capsys, name, damage
):
    shutil.copytree(finished, tmp_path / "run")
    DAMAGE[damage](tmp_path / "run/last" / name)
    line = error_line(capsys, train, world, tmp_path / "run", "--resume", tmp_path / "run")
    best = read_recipe(finished / "best")["metrics"]["epoch"]
    assert name in line
    assert line.endswith(f"; intact is {tmp_path / 'run/best'} (epoch {best})")
    flags = ["--data-root", world, "--dataset", "CIRR", "--device", "cpu", "--output", tmp_path / "out"]

    def validate_checkpoint(folder):
        words = [str(word) for word in ["--checkpoint", folder, *flags]]
        return run_command(validate.main.__wrapped__, words, prog="cala-validate")

    if name != "state.pt" and damage in ("one bit", "not there"):
        assert name in error_line(capsys, validate_checkpoint, tmp_path / "run/last")
    if damage == "one bit":
        validate_checkpoint(tmp_path / "run/best")


def test_without_a_whole_checkpoint_the_line_names_the_folder_to_give(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for name in ("best", "last"):
        flip_bit(tmp_path / "run" / name / "model.safetensors", 999)
    with pytest.raises(CalaError, match="does not match its recipe.json .*; give the folder that cala-train wrote"):
        read_recipe(tmp_path / "run/last")


def test_a_stage_1_file_is_written_whole_and_a_flipped_bit_is_noticed(tmp_path, monkeypatch):
    path, backbone = tmp_path / "stage1.safetensors", make_small_model(1).backbone
    save_backbone(backbone, path)
    good = path.read_bytes()

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupt)  # the process ends before the file gets its name
        with pytest.raises(KeyboardInterrupt):
            save_backbone(make_small_model(2).backbone, path)
    assert path.read_bytes() == good
    draw = random.Random(0)
    for _ in range(60):
        path.write_bytes(good)
        flip_bit(path, draw.getrandbits(40))
        with pytest.raises(CalaError, match="stage1.safetensors is not a backbone written by cala, or is damaged"):
            load_backbone(path)


def test_a_model_for_retrieval_is_saved_and_loaded_without_its_associations(tmp_path):
    torch.manual_seed(0)
    model = CaLa(make_backbone("tiny", vocabulary=["red"], width=16, heads=2, layers=1, queries=2)).for_retrieval()
    save_checkpoint(model, tmp_path / "best")
    loaded = load_checkpoint(tmp_path / "best")
    assert loaded.hca is None and loaded.compositor is None
    pictures = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded.embed_gallery(pictures), model.embed_gallery(pictures))

"Files from others: no command runs their content, imports what they name, or opens paths outside the data root."

import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cala.encoders import load_backbone, make_backbone, save_backbone
from cala.errors import CalaError
from cala.library.checkpoint import load_checkpoint, save_checkpoint
from cala.library.checkpoint import seal as sealed
from cala.library.cli import run_command
from cala.library.files import hash_bytes as sha256
from cala.model import CaLa
from cala.scripts import check, cirr_submission, combiner, train, validate
from small_runs import draw_small_world, lines_of, train_flags

COMMANDS = {
    "cala-check": check.main,
    "cala-cirr-submission": cirr_submission.main,
    "cala-combiner": combiner.main,
    "cala-train": train.main,
    "cala-validate": validate.main,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Drawn data, its stage-1 file, a run and its checkpoints."
    root = draw_small_world(
        tmp_path_factory.mktemp("world"), val=9
    )  # 54 pictures to validate on: more than a submission names
    run_command(train.main, train_flags(root, root / "run", epochs=1), prog="cala-train")
    return root


@pytest.fixture
def refused(capsys):
    "The one line of a command that ends with status 2."

    def refused(name, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command(COMMANDS[name], [str(word) for word in words], prog=name)
        lines = [line for line in lines_of(capsys.readouterr().err) if "random weights" not in line.lower()]
        assert ended.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return refused


# ---------------------------------------------------------------- pickles


class Bomb:
    "A pickle of this makes a folder when it is read; it stands for anything that code can do."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def torch_file(bomb, **how):
    buffer = io.BytesIO()
    torch.save({"epoch": 1, "Combiner": bomb, "model": bomb, "state_dict": bomb}, buffer, **how)
    return buffer.getvalue()


PICKLES = {
    "a torch file": torch_file,
    "an old torch file": lambda bomb: torch_file(bomb, _use_new_zipfile_serialization=False),
    "a pickle": pickle.dumps,
}
BLIP2 = ["--blip2-textual-path", "--blip2-multimodal-path", "--blip2-visual-path"]
WAYS_IN = {  # command and flags; BOMB is the file
    "a Combiner": ("cala-validate", "--random-weights small --combining-function combiner --combiner-path BOMB"),
    "an ARTEMIS": ("cala-validate", "--random-weights small --combining-function artemis --combiner-path BOMB"),
    "a tuned CLIP": ("cala-validate", "--random-weights small --clip-model-path BOMB"),
    "published weights of CLIP": (
        "cala-validate",
        "--random-weights small --clip-model-name RN50x4 --backbone-weights BOMB",
    ),
    **{
        f"BLIP-2's {flag[8:-5]} part": (
            "cala-validate",
            f"--random-weights small {' '.join(f'{each} BOMB' for each in [flag, *BLIP2])}",
        )
        for flag in BLIP2
    },
    "a Combiner to submit": (
        "cala-cirr-submission",
        "--split val --random-weights small --combining-function combiner --combiner-path BOMB",
    ),
    "a Combiner to train on": ("cala-combiner", "--random-weights small --combiner-path BOMB"),
    "a checkpoint's weights alone": ("cala-validate", "--checkpoint BOMB"),
    "a stage-1 backbone": ("cala-train", "--encoder-arch tiny --backbone-weights BOMB"),
    "BLIP-2 to train": ("cala-train", "--encoder-arch blip2 --backbone-weights BOMB"),
    "CLIP to train": ("cala-train", "--encoder-arch clip --random-weights small --backbone-weights BOMB"),
    "a vocabulary": ("cala-train", "--encoder-arch blip2 --random-weights small --tokenizer BOMB"),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("way", WAYS_IN)
def test_a_pickle_that_would_run_code_is_refused_by_every_flag_that_takes_a_file(world, tmp_path, refused, way, kind):
    command, words = WAYS_IN[way]
    bomb = tmp_path / "bomb.pt"
    bomb.write_bytes(PICKLES[kind](Bomb(tmp_path / "exploded")))
    which = [] if command == "cala-cirr-submission" else ["--dataset", "CIRR"]
    line = refused(
        command, "--data-root", world, "--output", tmp_path / "out", *which, *words.replace("BOMB", str(bomb)).split()
    )
    assert "bomb.pt" in line and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_strangers_run_whose_state_is_a_pickle_is_refused_though_its_hashes_fit(world, tmp_path, refused, kind):
    shutil.copytree(world / "run", tmp_path / "run")
    state, recipe = tmp_path / "run/last/state.pt", tmp_path / "run/last/recipe.json"
    state.write_bytes(PICKLES[kind](Bomb(tmp_path / "exploded")))
    content = {key: value for key, value in json.loads(recipe.read_text()).items() if key != "seal"}
    recipe.write_text(json.dumps(sealed(content | dict(beside={"state.pt": sha256(state.read_bytes())}))))
    assert "state.pt cannot be read" in refused(
        "cala-train", *train_flags(world, tmp_path / "run", "--resume", tmp_path / "run", epochs=1)
    )
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_strangers_cache_that_is_a_pickle_is_built_again_without_being_read(world, tmp_path, kind):
    words = f"--dataset CIRR --checkpoint {world}/run/best --data-root {world} --device cpu".split()
    words += ["--cache", "tokens", "--cache-dir", str(tmp_path / "cache"), "--output"]

    def validate_into(folder):
        return run_command(validate.main, [*words, str(tmp_path / folder)], prog="cala-validate")["sum"]

    right = validate_into("one")
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".json"]
    for path in files:
        path.write_bytes(PICKLES[kind](Bomb(tmp_path / "exploded")))
    assert files and validate_into("two") == right and not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- names of code

CODE = """import pathlib
pathlib.Path({!r}).mkdir()
class Big:
    @classmethod
    def build(cls):
        raise SystemExit("built")
"""


@pytest.fixture
def towers(tmp_path, monkeypatch):
    "A module that a stranger sent along, where Python would find it; importing it leaves a folder."
    (tmp_path / "strange_towers.py").write_text(CODE.format(str(tmp_path / "exploded")))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "exploded"
    sys.modules.pop("strange_towers", None)


@pytest.mark.parametrize(
    "config",
    [
        dict(name="strange_towers:Big"),
        dict(name="cala.scripts.combiner:PictureAlone", of=dict(name="strange_towers:Big")),
    ],
)
def test_a_checkpoint_cannot_have_code_imported_that_is_not_calas(world, tmp_path, towers, refused, config):
    shutil.copytree(world / "run/best", tmp_path / "best")
    recipe = tmp_path / "best/recipe.json"
    content = {key: value for key, value in json.loads(recipe.read_text()).items() if key != "seal"}
    recipe.write_text(json.dumps(sealed(content | dict(backbone=config))))
    line = refused(
        "cala-validate", "--checkpoint", tmp_path / "best", "--data-root", world, "--output", tmp_path / "out"
    )
    assert (
        "asks for strange_towers:Big to be imported" in line
        and "CALA_TRUST=strange_towers" in line
        and not towers.exists()
    )


def test_a_stage_1_file_cannot_either(tmp_path, towers):
    backbone = make_backbone("tiny", vocabulary=["red"], width=16, heads=2, layers=1, queries=2)
    backbone.config = dict(name="strange_towers:Big")
    save_backbone(backbone, tmp_path / "stage1.safetensors")
    with pytest.raises(CalaError, match="asks for strange_towers:Big"):
        load_backbone(tmp_path / "stage1.safetensors")
    assert not towers.exists()


def test_what_the_user_types_or_trusts_is_imported(world, tmp_path, towers, monkeypatch):
    flags = train_flags(world, tmp_path / "run", "--encoder-arch", "strange_towers:Big")
    place = flags.index("--backbone-weights")
    del flags[place : place + 2]
    with pytest.raises(SystemExit, match="built"):
        run_command(train.main, flags)
    monkeypatch.setenv("CALA_TRUST", "others,strange_towers")
    model = CaLa(
        make_backbone("tiny", vocabulary=["red"], width=16, heads=2, layers=1, queries=2),
        tac_weight=0.0,
        hca_weight=0.0,
    )
    model.backbone.config = dict(name="strange_towers:Big")
    save_checkpoint(model, tmp_path / "best")
    with pytest.raises(SystemExit, match="built"):
        load_checkpoint(tmp_path / "best")


def test_an_error_inside_a_class_of_the_user_stays_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "clumsy.py").write_text("class Towers:\n    def build():\n        return 1 + 'two'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CALA_TRUST", "clumsy")
    model = CaLa(make_backbone("tiny", vocabulary=["red"], width=16, heads=2, layers=1, queries=2))
    model.backbone.config = dict(name="clumsy:Towers")
    save_checkpoint(model, tmp_path / "best")
    with pytest.raises(TypeError, match="unsupported operand"):
        load_checkpoint(tmp_path / "best")


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "cala.data:os",
        "builtins:eval",
        "cala.nothing:X",
        "subprocess:Popen",
        ":",
        "cala.encoders:",
        "x" * 9999,
        "",
        None,
        3,
        ["tiny"],
        {},
    ],
)
def test_a_config_that_names_no_backbone_is_one_line(world, tmp_path, name):
    weights = {"a": torch.zeros(1)}
    shutil.copytree(world / "run/best", tmp_path / "best")
    recipe = tmp_path / "best/recipe.json"
    content = {key: value for key, value in json.loads(recipe.read_text()).items() if key != "seal"}
    recipe.write_text(json.dumps(sealed(content | dict(backbone=content["backbone"] | dict(name=name)))))
    with pytest.raises(CalaError) as error:
        load_checkpoint(tmp_path / "best")
    assert "\n" not in str(error.value)
    save_file(weights, tmp_path / "stage1.safetensors", metadata=dict(config=json.dumps(dict(name=name)), sha256="0"))
    with pytest.raises(CalaError):
        load_backbone(tmp_path / "stage1.safetensors")


# ---------------------------------------------------------------- paths

OPENED, WATCHING = [], []
sys.addaudithook(
    lambda event, args: (
        event == "open"
        and WATCHING
        and isinstance(args[0], (str, bytes, os.PathLike))
        and OPENED.append(os.path.realpath(os.fspath(args[0])))
    )
)


@pytest.fixture
def traps(world, tmp_path):
    "A copy of the world and a private picture outside it; afterwards nothing may have opened that picture."
    root, secret = (
        Path(shutil.copytree(world, tmp_path / "data", ignore=lambda folder, names: ["run"])),
        tmp_path / "private" / "secret.png",
    )
    secret.parent.mkdir()
    Image.new("RGB", (48, 48), "red").save(secret)
    OPENED.clear()
    WATCHING.append(True)
    yield root, secret
    WATCHING.clear()
    assert not [path for path in OPENED if path.startswith(str(secret.parent.resolve()))]


READERS = "cala-train", "cala-validate", "cala-combiner"


def run_all(world, root, output, refused, dataset="CIRR", commands=READERS):
    "The lines of the commands that read the data set."
    words = ["--dataset", dataset, "--data-root", root, "--output", output]
    flags = {"cala-train": train_flags(world, output, *words)} | dict.fromkeys(
        READERS[1:], [*words, "--checkpoint", world / "run/best"]
    )
    return [refused(name, *flags[name]) for name in commands]


def audited(root, capsys):
    "What cala-check prints; it does not stop at the first fault."
    with pytest.raises(SystemExit) as ended:
        run_command(check.main, ["--data-root", str(root), "--deep"], prog="cala-check")
    assert ended.value.code == 1
    return capsys.readouterr().out


PATHS = {
    "upwards": lambda secret, root: "../../private/secret.png",
    "upwards from inside": lambda secret, root: "./dev/../../../private/secret.png",
    "absolute": lambda secret, root: str(secret),
    "of another system": lambda secret, root: "..\\..\\private\\secret.png",
    "with a drive": lambda secret, root: "C:/private/secret.png",
    "with a NUL": lambda secret, root: "dev/a.png\0../../private/secret.png",
    "home": lambda secret, root: "~/../private/secret.png\n",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_out_of_the_data_root_is_refused_by_every_command_and_not_opened(
    world, traps, tmp_path, refused, capsys, path
):
    root, secret = traps
    for split in ("train", "val"):
        file = root / f"cirr_dataset/cirr/image_splits/split.rc2.{split}.json"
        names = json.loads(file.read_text())
        file.write_text(json.dumps(names | {next(iter(names)): PATHS[path](secret, root)}))
    for line in run_all(world, root, tmp_path / "out", refused):
        assert "split.rc2." in line and "which is none within the data set's folder" in line
    assert "which is none within the data set's folder" in audited(root, capsys)


@pytest.mark.parametrize("name", ["../../private/secret", "/etc/passwd", "..", "a\0b", "a/../../b"])
def test_a_name_out_of_the_data_root_is_refused_by_every_command(world, traps, tmp_path, refused, capsys, name):
    root, secret = traps
    for split in ("train", "val"):
        file = root / f"fashionIQ_dataset/image_splits/split.dress.{split}.json"
        file.write_text(json.dumps([*json.loads(file.read_text()), name]))
    for line in run_all(world, root, tmp_path / "out", refused, "FashionIQ"):
        assert "split.dress." in line and "is not a picture's name" in line
    assert "is not a picture's name" in audited(root, capsys)


def link_the_picture(root, secret):
    path = sorted((root / "cirr_dataset/dev").iterdir())[0]
    path.unlink()
    path.symlink_to(secret)


def link_a_folder_of_them(root, secret):
    path = sorted((root / "cirr_dataset/train").iterdir())[0]
    for picture in path.iterdir():
        shutil.copy(secret, secret.parent / picture.name)
    shutil.rmtree(path)
    path.symlink_to(secret.parent)


def link_to_a_link(root, secret):
    path = sorted((root / "cirr_dataset/dev").iterdir())[0]
    (root / "step").symlink_to(secret)
    path.unlink()
    path.symlink_to(root / "step")


def link_to_itself(root, secret):
    path = sorted((root / "cirr_dataset/dev").iterdir())[0]
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("link", [link_the_picture, link_a_folder_of_them, link_to_a_link, link_to_itself])
def test_a_link_out_of_the_data_root_is_a_missing_picture_for_every_command_and_not_followed(
    world, traps, tmp_path, refused, capsys, link
):
    root, secret = traps
    WATCHING.clear()
    link(root, secret)
    WATCHING.append(True)
    readers = (
        READERS if link is not link_a_folder_of_them else ["cala-train", "cala-combiner"]
    )  # that folder is of the train split
    for line in run_all(world, root, tmp_path / "out", refused, commands=readers):
        assert "missing, the first is" in line and "--allow-missing" in line
    assert ("is a link out of" in audited(root, capsys)) == (link is not link_to_itself)


def test_with_allow_missing_a_link_out_of_the_data_root_is_left_out_and_counted(world, traps, tmp_path):
    root, secret = traps
    WATCHING.clear()
    link_the_picture(root, secret)
    WATCHING.append(True)
    words = [
        "--dataset",
        "CIRR",
        "--data-root",
        root,
        "--checkpoint",
        world / "run/best",
        "--output",
        tmp_path / "out",
        "--allow-missing",
    ]
    with pytest.warns(UserWarning, match="1 of 54 pictures of CIRR val is missing and left out"):
        assert run_command(validate.main, [str(word) for word in words], prog="cala-validate")["sum"]["missing"] == 1


@pytest.mark.parametrize("name", ["x" * 300, "x" * 70_000])
def test_a_name_longer_than_any_file_system_takes_is_a_missing_picture(world, traps, tmp_path, refused, name):
    root, _ = traps
    for split in ("train", "val"):
        file = root / f"cirr_dataset/cirr/image_splits/split.rc2.{split}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: f"./dev/{name}.png"}))
    for line in run_all(world, root, tmp_path / "out", refused):
        assert "1 of " in line and "is missing, the first is" in line

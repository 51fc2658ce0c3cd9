"cala-check as a shell runs it: what it prints, and what its exit status tells a script."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cala.library import environment
from cala.library.cli import run_command
from cala.library.worlds.garments import draw_fashioniq
from cala.library.worlds.scenes import draw_cirr
from cala.scripts import check

PUBLISHED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def root(tmp_path):
    draw_cirr(tmp_path / "data", train=3, val=2, test1=1, size=32)
    draw_fashioniq(tmp_path / "data", train=6, val=5, test=4, size=32)
    return tmp_path / "data"


@pytest.fixture
def run(capsys):
    def run(*words):
        status = 0
        try:
            run_command(check.main.__wrapped__, [str(word) for word in words], prog="cala-check")
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_as_a_module_it_prints_the_table_and_ends_with_status_0(root):
    done = subprocess.run(
        [sys.executable, "-m", "cala.scripts.check", "--data-root", str(root), "--deep"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout.splitlines()[-1] == "all is well" and len(done.stdout.splitlines()) == 16
    )  # 2 places, heading, 12 rows, verdict


def test_holes_end_with_status_1_and_are_named(root, run):
    lost, torn = sorted((root / "cirr_dataset" / "dev").iterdir())[:2]
    lost.unlink()
    torn.write_bytes(torn.read_bytes()[: len(torn.read_bytes()) // 2])
    status, out, err = run("--data-root", root)
    assert (status, err) == (1, "") and str(lost) in out and str(torn) not in out and "--allow-missing" in out
    status, out, err = run("--data-root", root, "--deep")
    assert status == 1 and f"{torn} cannot be decoded" in out


def test_where_pictures_can_be_had_is_printed_for_the_data_set_that_lacks_some(root, run):
    assert "can be had" not in run("--data-root", root)[1]
    sorted((root / "fashionIQ_dataset" / "images").iterdir())[0].unlink()
    out = run("--data-root", root)[1]
    assert "BUAADreamer/cir_dataset (folder fashionIQ_dataset)" in out and "doubtful" in out and "cirr-cir" not in out


def test_links_are_followed_with_a_flag(root, run, tmp_path):
    path = sorted((root / "cirr_dataset" / "dev").iterdir())[0]
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    status, out, err = run("--data-root", root)
    assert status == 1 and "give --follow-links if you trust it" in out
    status, out, err = run("--data-root", root, "--follow-links")
    assert status == 0 and "1 of them outside this folder, where links lead" in out


def test_bad_annotations_end_with_status_1_and_say_which_entry(root, run):
    file = root / "fashionIQ_dataset/captions/cap.dress.val.json"
    entries = json.loads(file.read_text())
    del entries[2]["target"]
    file.write_text(json.dumps(entries))
    status, out, err = run("--data-root", root)
    assert status == 1 and f"{file} entry 2: has no target" in out and "must be corrected" in out


@pytest.mark.parametrize(
    "words, says",
    [
        (["--data-root", "nowhere"], "nowhere holds neither"),
        (["--depp"], "unrecognized arguments: --depp"),
        (["--data-root"], "expected one argument"),
    ],
)
def test_a_wrong_command_ends_with_status_2_and_one_clear_line(words, says, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*words)
    (line,) = err.splitlines()
    assert status == 2 and line.startswith("cala-check: ") and says in line


def test_save_writes_every_finding(root, run, tmp_path):
    shutil.rmtree(root / "cirr_dataset" / "train")
    status, out, err = run("--data-root", root, "--save", tmp_path / "holes.txt")
    lines = (tmp_path / "holes.txt").read_text().splitlines()
    assert status == 1 and len(lines) == 18 and "... and 8 more; --save FILE writes all" in out
    assert run("--data-root", root, "--save", tmp_path / "no" / "folder.txt")[0] == 2


def test_environment_names_python_packages_and_devices(run):
    status, out, err = run("--environment")
    assert status in (0, 1) and "Python 3." in out and "processors:" in out and "torch" in out and "dataset" not in out
    assert out.splitlines()[-1] == "nothing is missing" or status == 1


def test_environment_says_what_is_missing_or_of_a_wrong_version(run, monkeypatch):
    monkeypatch.setattr(
        environment,
        "requires",
        lambda name: ["torch<1", "surely-not-there", "nor-this; extra == 'track'", "pillow; python_version < '3'"],
    )
    status, out, err = run("--environment")
    assert status == 1 and out.splitlines()[-1] == "to install: torch, surely-not-there"
    assert "pip install cala[track]" in out


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published annotations are not here")
def test_the_published_validation_splits_are_complete_with_a_picture_for_every_name(run, tmp_path):
    for name in ("cirr_dataset", "fashionIQ_dataset"):
        stand_in(tmp_path, name)
    status, out, err = run("--data-root", tmp_path)
    rows = [
        line.split() for line in out.splitlines() if " val " in line and line.lstrip().startswith(("CIRR", "FashionIQ"))
    ]
    assert status == 1 and "no annotation file" in out  # CIRR's captions of train were not published with these
    assert all(line.startswith("check ") for line in err.splitlines())  # progress, on a slow machine
    assert rows == [
        ["CIRR", "val", "-", "4181", "2297", "2297", "0", "0", "-"],
        ["FashionIQ", "val", "dress", "2017", "3817", "3817", "0", "0", "2628"],
        ["FashionIQ", "val", "shirt", "2038", "6346", "6346", "0", "0", "3089"],
        ["FashionIQ", "val", "toptee", "1961", "5373", "5373", "0", "0", "2902"],
    ]


def stand_in(root, name):
    "Published annotations, and one tiny picture under every name of the validation splits, as hard links."
    root.joinpath(name).mkdir()
    Image.new("1", (1, 1)).save(picture := root / name / "one.png")
    for file in (PUBLISHED / name).rglob("*.json"):
        copy = root / name / file.relative_to(PUBLISHED / name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        if not file.match("split.*.val.json"):
            continue
        content = json.loads(file.read_text())
        places = content.values() if isinstance(content, dict) else [f"images/{each}.png" for each in content]
        for folder in {os.path.dirname(place) for place in places}:
            (root / name / folder).mkdir(parents=True, exist_ok=True)
        for place in places:
            if not (root / name / place).exists():
                os.link(picture, root / name / place)

"The subclass of CaLa at the end of lesson 08, in a module of its own: trained, resumed and read by the commands."

import json
import sys
from collections import namedtuple
from pathlib import Path

import pandas as pd
import pytest
import torch

from cala.library.checkpoint import load_checkpoint
from cala.library.cli import run_command
from cala.library.processes import GatherWithGradient, gather_vectors
from cala.library.worlds.scenes import draw_cirr
from cala.model import Vectors
from cala.recipe import Recipe
from cala.scripts import cirr_submission, search, train, validate
from cala.training import make_model
from small_runs import lines_of, still_flags, train_flags

LESSON = Path(__file__).resolve().parents[1] / "nbs/method/08_model.ipynb"
NAME = "backward_lesson:BackwardCaLa"


@pytest.fixture(scope="module")
def folder(world):
    "A folder with the lesson's class in backward_lesson.py, from which Python imports, and a run of two epochs."
    cells = ["".join(cell["source"]) for cell in json.loads(LESSON.read_text())["cells"]]
    (text,) = (cell for cell in cells if "write the three types and the class into a file" in cell)
    imports = text.split("```python\n")[1].split("```")[0]
    (types,) = (cell for cell in cells if cell.startswith("BackwardVectors = "))
    (model,) = (cell for cell in cells if cell.startswith("class BackwardCaLa"))
    (world / "backward_lesson.py").write_text(f"{imports}\n{types}\n\n{model}\n")
    sys.path.insert(0, str(world))
    run_command(train.main, flags(world, "run"))
    yield world
    sys.path.remove(str(world))
    sys.modules.pop("backward_lesson", None)


def flags(world, output, *more, epochs=2):
    "The flags of cala-train for the lesson's class, which needs CTR."
    return train_flags(world, world / output, "--objective", "two_way", "--model-class", NAME, *more, epochs=epochs)


def read_losses(folder):
    "The column of the new association in a run's log."
    return pd.read_csv(folder / "log.csv").backward.tolist()


def test_the_new_loss_is_logged_and_the_checkpoint_names_the_class(folder):
    losses = read_losses(folder / "run")
    assert len(losses) == 4 and all(loss > 0 for loss in losses)
    content = json.loads((folder / "run/best/recipe.json").read_text())
    assert content["model"]["model_class"] == content["recipe"]["model_class"] == NAME
    assert content["model"]["w_backward"] == 0.1


def test_a_resumed_run_ends_with_the_same_losses(folder):
    run_command(train.main, flags(folder, "cut", "--num-epochs", 1))
    run_command(train.main, flags(folder, "cut", "--resume", folder / "cut"))
    assert read_losses(folder / "cut") == read_losses(folder / "run")


def test_a_batch_in_pieces_with_gallery_negatives_has_the_new_loss(folder):
    more = ["--objective", "two_way", "--model-class", NAME, "--encoder", "multi", "--gallery-negatives"]
    run_command(train.main, still_flags(folder, folder / "whole", *more, epochs=1))
    run_command(train.main, still_flags(folder, folder / "pieces", *more, "--accumulate", 4, epochs=1))
    assert read_losses(folder / "pieces")[0] == pytest.approx(read_losses(folder / "whole")[0], abs=1e-4)


def test_commands_read_the_checkpoint_if_the_module_is_trusted(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CALA_TRUST", "backward_lesson")
    checkpoint = ["--checkpoint", str(folder / "run/best")]
    data = [*checkpoint, "--data-root", str(folder)]
    run_command(validate.main, [*data, "--rerank", "5", "--output", str(tmp_path / "validation")])
    draw_cirr(tmp_path, train=1, val=1, test1=9, size=32)  # a submission names 50 pictures
    answers = ["--data-root", str(tmp_path), "--output", str(tmp_path / "submission")]
    run_command(cirr_submission.main, [*checkpoint, *answers])
    pictures = str(folder / "cirr_dataset/dev")
    hits = run_command(search.main, [*checkpoint, "--pictures", pictures, "--sentence", "a red star", "--k", "3"])
    assert len(hits) == 3 and "R@1" in capsys.readouterr().out
    model = load_checkpoint(folder / "run/best")
    assert type(model).__name__ == "BackwardCaLa" and model.w_backward == 0.1


def test_the_module_is_not_imported_without_trust(folder, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "backward_lesson")
    with pytest.raises(SystemExit):
        run_command(validate.main, ["--checkpoint", str(folder / "run/best"), "--data-root", str(folder)])
    assert f"asks for {NAME} to be imported" in capsys.readouterr().err
    assert "backward_lesson" not in sys.modules


def test_shared_modules_start_with_the_same_weights(folder):
    models = []
    for name in (None, NAME):
        torch.manual_seed(0)
        recipe = Recipe(encoder_arch="tiny", backbone_weights=str(folder / "small.safetensors"), model_class=name)
        models.append(make_model(recipe).state_dict())
    plain, backward = models
    assert {key for key in backward if key not in plain} == {"predict.weight", "predict.bias"}
    assert all(torch.equal(plain[key], backward[key]) for key in plain)


def test_without_ctr_the_lessons_class_gives_one_line(folder, capsys):
    with pytest.raises(SystemExit):
        run_command(train.main, flags(folder, "no_ctr", "--beta", 0))
    assert lines_of(capsys.readouterr().err)[-1].endswith("needs the weight of CTR (tac_weight or beta) above 0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BackwardCaLa", "give package.module:Class"),
        ("no_such_module:Mine", "No module named 'no_such_module'; is its folder listed in PYTHONPATH?"),
        ("json:Mine", "module 'json' has no attribute 'Mine'"),
        ("json:JSONDecoder", "is not a subclass of cala.model.CaLa"),
        ("json:dumps", "is not a subclass of cala.model.CaLa"),
    ],
)
def test_a_class_that_is_not_found_is_one_line(world, tmp_path, capsys, name, message):
    with pytest.raises(SystemExit):
        run_command(train.main, train_flags(world, tmp_path / "run", "--model-class", name), prog="cala-train")
    (line,) = lines_of(capsys.readouterr().err)
    assert line.startswith(f"cala-train: --model-class {name}") and line.endswith(message)
    assert not (tmp_path / "run").exists()


def test_vectors_gathered_from_processes_keep_their_type(monkeypatch):
    more_vectors = namedtuple("MoreVectors", [*Vectors._fields, "new"])
    monkeypatch.setattr(GatherWithGradient, "apply", lambda rows: torch.cat([rows, rows], dim=1))
    gathered = gather_vectors(more_vectors(*torch.ones(3, 2, 4), None, None, None, torch.zeros(2, 4)))
    assert type(gathered) is more_vectors and gathered.hca is None
    assert torch.equal(gathered.new, torch.zeros(4, 4))

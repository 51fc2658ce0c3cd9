"cala-combiner as a whole: what it trains, what it keeps, and that cala-validate reads it back to the same numbers."
import subprocess
import sys

import pandas as pd
import pytest
import torch

from cala.library.cli import parse_flags
from cala.library.flags import CombinerRecipe
from cala.library.cli import run_command
from cala.composition import Combiner
from cala.data import open_dataset
from cala.encoders import load_backbone
from cala.model import CaLa
from cala.library.checkpoint import load_checkpoint
from cala.library.combiner import PICTURE_ALONE
from cala.library.combiner import TextFeatures
from cala.library.released import load_released
from cala.library.checkpoint import read_recipe
from cala.library.checkpoint import save_checkpoint
from cala.scripts import combiner
from cala.scripts import validate
from small_runs import draw_small_world
from small_runs import lines_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Both data sets, and a checkpoint of a small backbone that was trained with the sum."
    root = draw_small_world(tmp_path_factory.mktemp("world"))
    torch.manual_seed(0)
    save_checkpoint(CaLa(load_backbone(root / "small.safetensors")), root / "sum", recipe=dict(dataset="CIRR", transform="squarepad", target_ratio=1.25))
    return root


CLIP = ["--clip-model-name", "RN50x4", "--random-weights", "small"]


def words(world, output, *more): return [str(w) for w in ("--data-root", world, "--device", "cpu", "--output", output, *more)]
def run(world, output, *more): return run_command(combiner.main, words(world, output, *more), prog="cala-combiner")
def judged(world, output, *more): return run_command(validate.main, words(world, output, *more), prog="cala-validate")["combiner"]


def refused(capsys, *args):
    "The one line of a command that ends with status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended: run(*args)
    assert ended.value.code == 2
    line, = lines_of(capsys.readouterr().err)
    assert line.startswith("cala-combiner: ")
    return line


def best_row(folder):
    "The row of metrics.csv that was kept, less what is no metric."
    metrics = pd.read_csv(folder / "metrics.csv")
    return metrics.loc[metrics.score.idxmax()].drop(["epoch", "score", "missing_train"])


def same(row, result):
    assert set(row.index) == set(result)
    for key, value in result.items(): assert row[key] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value), key


@pytest.mark.parametrize("more", [["--dataset", "CIRR"], ["--dataset", "FashionIQ"], ["--dataset", "FashionIQ", "--protocol", "val", "--categories", "dress"]])
def test_a_checkpoint_of_it_reaches_in_cala_validate_what_its_log_says(world, tmp_path, capsys, more):
    run(world, tmp_path / "run", "--checkpoint", world / "sum", "--num-epochs", 3, "--learning-rate", "1e-3", *more)
    assert f"evaluate it with cala-validate --checkpoint {tmp_path / 'run/best'}" in capsys.readouterr().out
    same(best_row(tmp_path / "run"), judged(world, tmp_path / "judged", "--checkpoint", tmp_path / "run/best", *more[2:]))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best", "log.csv", "metrics.csv"]  # a Q-Former's own query would not fit
    assert list(pd.read_csv(tmp_path / "run/log.csv").columns) == ["epoch", "loss"] and len(pd.read_csv(tmp_path / "run/metrics.csv")) == 3
    said = read_recipe(tmp_path / "run/best")["recipe"]
    assert (said["transform"], said["weights"]["checkpoint"]["sha256"]) == ("squarepad", read_recipe(world / "sum")["sha256"])


def test_with_clip_the_released_form_is_read_by_the_seeds_command_line(world, tmp_path):
    run(world, tmp_path / "run", "--dataset", "CIRR", *CLIP, "--num-epochs", 2, "--projection-dim", 24, "--hidden-dim", 40, "--transform", "targetpad", "--target-ratio", "1.25")
    seed = ["--dataset", "CIRR", "--combining-function", "combiner", "--projection-dim", 24, "--hidden-dim", 40, "--target-ratio", "1.25", "--transform", "targetpad", *CLIP]
    for number, path in enumerate((tmp_path / "run/combiner.pt", tmp_path / "run/best")):
        same(best_row(tmp_path / "run"), judged(world, tmp_path / str(number), "--combiner-path", path, *seed))
    same(best_row(tmp_path / "run"), judged(world, tmp_path / "whole", "--checkpoint", tmp_path / "run/best"))
    content = torch.load(tmp_path / "run/combiner.pt", weights_only=True)
    assert set(content) == {"epoch", "Combiner"} and isinstance(content["epoch"], int)
    assert load_checkpoint(tmp_path / "run/best").backbone.config["name"] == "clip"  # its query holds no text anyway


def test_only_the_combiner_trains_and_its_first_loss_is_that_of_the_formula(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Combiner.__init__, "__defaults__", (None, None, 0., 100.))  # no dropout
    run(world, tmp_path / "run", "--dataset", "CIRR", "--checkpoint", world / "sum", "--num-epochs", 1, "--seed", 5)
    before, after = load_checkpoint(world / "sum"), load_checkpoint(tmp_path / "run/best")
    for name, tensor in before.backbone.state_dict().items(): assert torch.equal(tensor, after.backbone.state_dict()[name]), name
    data, backbone = open_dataset("CIRR", world, "train", before.backbone.transform("squarepad", 1.25)), before.backbone
    torch.manual_seed(5)
    frame = Combiner(32)
    with torch.no_grad():
        gallery = backbone.image(backbone.trunk(torch.stack([data.gallery[i] for i in range(len(data.gallery))]))).feature
        scores = frame.scores(gallery[data.references], backbone.text([data.caption(i) for i in range(len(data))]).feature, gallery[data.targets])
    assert pd.read_csv(tmp_path / "run/log.csv").loss[0] == pytest.approx(float(torch.nn.functional.cross_entropy(scores, torch.arange(len(data)))), abs=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(frame.parameters(), after.frame.parameters()))


def test_a_sentence_goes_through_the_backbone_once_in_all_epochs_and_texts_are_those_of_the_data_set(world, monkeypatch):
    data = open_dataset("FashionIQ", world, "train", load_backbone(world / "small.safetensors").transform("plain"))
    model, read = CaLa(load_backbone(world / "small.safetensors"), tac_weight=0., hca_weight=0.), []
    sentences = TextFeatures(model, 7)
    monkeypatch.setattr(model.backbone, "text", lambda captions, text=model.backbone.text: (read.extend(captions), text(captions))[1])
    for epoch in range(1, 9):
        data.set_epoch(epoch)
        asked = [data.caption(i) for i in range(len(data))]
        with torch.no_grad(): torch.testing.assert_close(sentences(asked), type(model.backbone).text(model.backbone, asked).feature, atol=1e-5, rtol=1e-5)
    assert len(read) == len(set(read)) == len(sentences.rows) > len(data)


def test_the_same_seed_leaves_the_same_bytes_and_another_does_not(world, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        run(world, tmp_path / name, "--dataset", "FashionIQ", "--checkpoint", world / "sum", "--num-epochs", 2, "--batch-size", 8, "--seed", seed)
    kept = {name: [(tmp_path / name / file).read_bytes() for file in ("log.csv", "metrics.csv", "best/model.safetensors")] for name in ("one", "two", "three")}
    assert kept["one"] == kept["two"] and kept["one"][0] != kept["three"][0]


def test_it_goes_on_from_a_combiner_that_is_given(world, tmp_path):
    run(world, tmp_path / "first", "--dataset", "CIRR", *CLIP, "--num-epochs", 2, "--projection-dim", 24, "--learning-rate", "1e-3")
    path = tmp_path / "first/combiner.pt"
    run(world, tmp_path / "second", "--dataset", "CIRR", *CLIP, "--num-epochs", 1, "--combiner-path", path, "--learning-rate", "1e-12")
    for a, b in zip(load_released(path).parameters(), load_checkpoint(tmp_path / "second/best").frame.parameters()): torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    run(world, tmp_path / "third", "--checkpoint", world / "sum", "--num-epochs", 1)
    run(world, tmp_path / "fourth", "--checkpoint", tmp_path / "third/best", "--combiner-path", tmp_path / "third/best", "--num-epochs", 1)
    config = load_checkpoint(tmp_path / "fourth/best").backbone.config
    assert config["name"] == PICTURE_ALONE and config["of"]["name"] == "tiny" and not (tmp_path / "fourth/combiner.pt").exists()


def test_defaults_are_the_seeds():
    flags = parse_flags(CombinerRecipe, "--dataset FashionIQ --projection-dim 2560 --hidden-dim 5120 --clip-model-name RN50x4 --clip-model-path tuned.pt "
                        "--target-ratio 1.25 --transform targetpad".split())
    assert (flags.batch_size, flags.learning_rate, flags.projection_dim, flags.hidden_dim, flags.transform) == (4096, 2e-5, 2560, 5120, "targetpad")


def test_every_mistake_is_one_line_with_status_2(world, tmp_path, capsys):
    says = lambda *more, output=tmp_path / "out": refused(capsys, world, output, "--dataset", "CIRR", "--checkpoint", world / "sum", *more)
    assert "there are CIRR and FashionIQ" in says("--dataset", "COCO")
    assert "no data set is named" in refused(capsys, world, tmp_path / "out", *CLIP)
    assert "no folder" in says("--data-root", tmp_path / "nowhere")
    assert "is no checkpoint" in says("--checkpoint", tmp_path)
    assert "name two models" in says("--clip-model-name", "RN50x4")
    assert "trains a combiner" in says("--combining-function", "artemis")
    assert "no file" in says("--combiner-path", tmp_path / "none.pt")
    assert "--num-epochs 0: give 1 or more" in says("--num-epochs", 0)
    assert "--batch-size 0" in says("--batch-size", 0)
    assert "--learning-rate 0.0: give a number above 0" in says("--learning-rate", 0)
    assert "--seed -1: give 0 or more" in says("--seed", -1)
    assert "is not empty" in says(output=world)
    assert "no transform" in says("--transform", "stretch")
    assert "did you mean --num-epochs?" in says("--num-epochz", 3)
    assert not (tmp_path / "out/best").exists()
    gone = open_dataset("CIRR", world, "val").gallery.paths[0]
    gone.rename(gone.with_suffix(".away"))
    try: assert f"the first is {gone}" in says()
    finally: gone.with_suffix(".away").rename(gone)
    done = subprocess.run([sys.executable, "-m", "cala.scripts.combiner", "--dataset", "CIRR", "--data-root", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and len(lines_of(done.stderr)) == 1 and "holds no annotations of CIRR" in done.stderr


def test_a_loss_that_is_no_number_stops_it(world, tmp_path, capsys):
    assert "the loss is nan" in refused(capsys, world, tmp_path / "out", "--checkpoint", world / "sum", "--num-epochs", 4, "--validation-frequency", 4, "--learning-rate", "1e30")

"cala-combiner as a whole: what it trains, what it saves, and that cala-validate gives the same numbers."

import subprocess
import sys

import pandas as pd
import pytest
import torch

from cala.composition import Combiner
from cala.data import open_dataset
from cala.encoders import load_backbone
from cala.library.checkpoint import load_checkpoint, read_recipe, save_checkpoint
from cala.library.cli import parse_flags, run_command
from cala.library.combiner import PICTURE_ALONE, TextFeatures
from cala.library.flags import CombinerRecipe
from cala.library.released import load_released
from cala.model import CaLa
from cala.scripts import combiner, validate
from small_runs import draw_small_world, lines_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Both data sets, and a checkpoint of a small backbone with the frame Sum."
    root = draw_small_world(tmp_path_factory.mktemp("world"))
    torch.manual_seed(0)
    save_checkpoint(
        CaLa(load_backbone(root / "small.safetensors")),
        root / "sum",
        recipe=dict(dataset="CIRR", transform="squarepad", target_ratio=1.25),
    )
    return root


CLIP = ["--clip-model-name", "RN50x4", "--random-weights", "small"]


def make_flags(world, output, *more):
    "The flags of both commands, as texts."
    return [str(word) for word in ("--data-root", world, "--device", "cpu", "--output", output, *more)]


def run(world, output, *more):
    "Run cala-combiner."
    return run_command(combiner.main, make_flags(world, output, *more), prog="cala-combiner")


def validate_combiner(world, output, *more):
    "The metrics of the combiner in cala-validate."
    return run_command(validate.main, make_flags(world, output, *more), prog="cala-validate")["combiner"]


def error_line(capsys, *args):
    "The only line of a cala-combiner that ends with status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*args)
    assert ended.value.code == 2
    (line,) = lines_of(capsys.readouterr().err)
    assert line.startswith("cala-combiner: ")
    return line


def best_metrics(folder):
    "The metrics of the best epoch in metrics.csv."
    metrics = pd.read_csv(folder / "metrics.csv")
    return metrics.loc[metrics.score.idxmax()].drop(["epoch", "score", "missing_train"])


def assert_same(row, result):
    "Fail unless both hold the same metrics with the same values."
    assert set(row.index) == set(result)
    for key, value in result.items():
        expected = pytest.approx(value, abs=1e-9) if isinstance(value, float) else value
        assert row[key] == expected, key


@pytest.mark.parametrize(
    "more",
    [
        ["--dataset", "CIRR"],
        ["--dataset", "FashionIQ"],
        ["--dataset", "FashionIQ", "--protocol", "val", "--categories", "dress"],
    ],
)
def test_cala_validate_gives_the_numbers_of_the_log_for_the_best_checkpoint(world, tmp_path, capsys, more):
    folder, best = tmp_path / "run", tmp_path / "run/best"
    run(world, folder, "--checkpoint", world / "sum", "--num-epochs", 3, "--learning-rate", "1e-3", *more)
    assert f"evaluate it with cala-validate --checkpoint {best}" in capsys.readouterr().out
    result = validate_combiner(world, tmp_path / "validated", "--checkpoint", best, *more[2:])
    assert_same(best_metrics(folder), result)
    # There is no combiner.pt: the query of a Q-Former would not fit into it.
    assert sorted(path.name for path in folder.iterdir()) == ["best", "log.csv", "metrics.csv"]
    assert list(pd.read_csv(folder / "log.csv").columns) == ["epoch", "loss"]
    assert len(pd.read_csv(folder / "metrics.csv")) == 3
    recipe = read_recipe(best)["recipe"]
    assert recipe["transform"] == "squarepad"
    assert recipe["weights"]["checkpoint"]["sha256"] == read_recipe(world / "sum")["sha256"]


def test_with_clip_the_released_flags_of_cala_validate_read_the_released_form(world, tmp_path):
    shared = ["--dataset", "CIRR", "--projection-dim", 24, "--hidden-dim", 40]
    shared += ["--transform", "targetpad", "--target-ratio", "1.25", *CLIP]
    run(world, tmp_path / "run", *shared, "--num-epochs", 2)
    metrics = best_metrics(tmp_path / "run")
    released = ["--combining-function", "combiner", *shared]
    for number, path in enumerate((tmp_path / "run/combiner.pt", tmp_path / "run/best")):
        result = validate_combiner(world, tmp_path / str(number), "--combiner-path", path, *released)
        assert_same(metrics, result)
    assert_same(metrics, validate_combiner(world, tmp_path / "whole", "--checkpoint", tmp_path / "run/best"))
    content = torch.load(tmp_path / "run/combiner.pt", weights_only=True)
    assert set(content) == {"epoch", "Combiner"}
    assert isinstance(content["epoch"], int)
    # The query of CLIP holds no text, so the checkpoint needs no other backbone.
    assert load_checkpoint(tmp_path / "run/best").backbone.config["name"] == "clip"


def test_only_the_combiner_trains_and_its_first_loss_follows_the_formula(world, tmp_path, monkeypatch):
    monkeypatch.setattr(Combiner.__init__, "__defaults__", (None, None, 0.0, 100.0))  # no dropout
    run(world, tmp_path / "run", "--dataset", "CIRR", "--checkpoint", world / "sum", "--num-epochs", 1, "--seed", 5)
    before, after = load_checkpoint(world / "sum"), load_checkpoint(tmp_path / "run/best")
    for name, tensor in before.backbone.state_dict().items():
        assert torch.equal(tensor, after.backbone.state_dict()[name]), name

    backbone = before.backbone
    data = open_dataset("CIRR", world, "train", backbone.transform("squarepad", 1.25))
    torch.manual_seed(5)
    frame = Combiner(32)
    with torch.no_grad():
        pictures = torch.stack([data.gallery[i] for i in range(len(data.gallery))])
        gallery = backbone.image(backbone.trunk(pictures)).feature
        texts = backbone.text([data.caption(i) for i in range(len(data))]).feature
        scores = frame.scores(gallery[data.references], texts, gallery[data.targets])
    expected = float(torch.nn.functional.cross_entropy(scores, torch.arange(len(data))))
    assert pd.read_csv(tmp_path / "run/log.csv").loss[0] == pytest.approx(expected, abs=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(frame.parameters(), after.frame.parameters()))


def test_the_backbone_reads_each_sentence_once_in_all_epochs(world, monkeypatch):
    data = open_dataset("FashionIQ", world, "train", load_backbone(world / "small.safetensors").transform("plain"))
    model = CaLa(load_backbone(world / "small.safetensors"), tac_weight=0.0, hca_weight=0.0)
    sentences = TextFeatures(model, 7)
    encode, encoded = model.backbone.text, []

    def record_and_encode(captions):
        encoded.extend(captions)
        return encode(captions)

    monkeypatch.setattr(model.backbone, "text", record_and_encode)
    for epoch in range(1, 9):
        data.set_epoch(epoch)
        captions = [data.caption(i) for i in range(len(data))]
        with torch.no_grad():
            expected = type(model.backbone).text(model.backbone, captions).feature
            torch.testing.assert_close(sentences(captions), expected, atol=1e-5, rtol=1e-5)
    assert len(encoded) == len(set(encoded)) == len(sentences.rows) > len(data)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(world, tmp_path):
    contents = {}
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        flags = ["--dataset", "FashionIQ", "--checkpoint", world / "sum", "--num-epochs", 2, "--batch-size", 8]
        run(world, tmp_path / name, *flags, "--seed", seed)
        files = ("log.csv", "metrics.csv", "best/model.safetensors")
        contents[name] = [(tmp_path / name / file).read_bytes() for file in files]
    assert contents["first"] == contents["second"]
    assert contents["first"][0] != contents["third"][0]


def test_training_goes_on_from_a_given_combiner(world, tmp_path):
    with_clip = ["--dataset", "CIRR", *CLIP]
    first = ["--num-epochs", 2, "--projection-dim", 24, "--learning-rate", "1e-3"]
    run(world, tmp_path / "first", *with_clip, *first)
    path = tmp_path / "first/combiner.pt"
    second = ["--num-epochs", 1, "--combiner-path", path, "--learning-rate", "1e-12"]
    run(world, tmp_path / "second", *with_clip, *second)
    for a, b in zip(load_released(path).parameters(), load_checkpoint(tmp_path / "second/best").frame.parameters()):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)

    run(world, tmp_path / "third", "--checkpoint", world / "sum", "--num-epochs", 1)
    best = tmp_path / "third/best"
    run(world, tmp_path / "fourth", "--checkpoint", best, "--combiner-path", best, "--num-epochs", 1)
    config = load_checkpoint(tmp_path / "fourth/best").backbone.config
    assert config["name"] == PICTURE_ALONE
    assert config["of"]["name"] == "tiny"
    assert not (tmp_path / "fourth/combiner.pt").exists()


def test_defaults_are_those_of_the_released_program():
    line = (
        "--dataset FashionIQ --projection-dim 2560 --hidden-dim 5120 --clip-model-name RN50x4 "
        "--clip-model-path tuned.pt --target-ratio 1.25 --transform targetpad"
    )
    flags = parse_flags(CombinerRecipe, line.split())
    assert (flags.batch_size, flags.learning_rate) == (4096, 2e-5)
    assert (flags.projection_dim, flags.hidden_dim) == (2560, 5120)
    assert flags.transform == "targetpad"


def test_every_mistake_is_one_line_with_status_2(world, tmp_path, capsys):
    def error_with(*more, output=tmp_path / "out"):
        given = ["--dataset", "CIRR", "--checkpoint", world / "sum"]
        return error_line(capsys, world, output, *given, *more)

    assert "there are CIRR and FashionIQ" in error_with("--dataset", "COCO")
    assert "no data set is named" in error_line(capsys, world, tmp_path / "out", *CLIP)
    assert "no folder" in error_with("--data-root", tmp_path / "nowhere")
    assert "is no checkpoint" in error_with("--checkpoint", tmp_path)
    assert "name two models" in error_with("--clip-model-name", "RN50x4")
    assert "trains a combiner" in error_with("--combining-function", "artemis")
    assert "no file" in error_with("--combiner-path", tmp_path / "none.pt")
    assert "--num-epochs 0: give 1 or more" in error_with("--num-epochs", 0)
    assert "--batch-size 0" in error_with("--batch-size", 0)
    assert "--learning-rate 0.0: give a number above 0" in error_with("--learning-rate", 0)
    assert "--seed -1: give 0 or more" in error_with("--seed", -1)
    assert "is not empty" in error_with(output=world)
    assert "no transform" in error_with("--transform", "stretch")
    assert "did you mean --num-epochs?" in error_with("--num-epochz", 3)
    assert not (tmp_path / "out/best").exists()
    missing = open_dataset("CIRR", world, "val").gallery.paths[0]
    missing.rename(missing.with_suffix(".away"))
    try:
        assert f"the first is {missing}" in error_with()
    finally:
        missing.with_suffix(".away").rename(missing)
    command = [sys.executable, "-m", "cala.scripts.combiner", "--dataset", "CIRR", "--data-root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert len(lines_of(done.stderr)) == 1
    assert "holds no annotations of CIRR" in done.stderr


def test_a_loss_that_is_not_a_number_stops_training(world, tmp_path, capsys):
    flags = ["--num-epochs", 4, "--validation-frequency", 4, "--learning-rate", "1e30"]
    line = error_line(capsys, world, tmp_path / "out", "--checkpoint", world / "sum", *flags)
    assert "the loss is nan" in line

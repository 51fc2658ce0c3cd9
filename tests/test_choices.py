"How a data set was opened is in every result: gallery of all splits, text form, split, links that are followed."

import json
from dataclasses import asdict

import pandas as pd
import pytest

from cala.data import open_dataset
from cala.library.checkpoint import save_checkpoint
from cala.library.cli import run_command
from cala.library.worlds.scenes import draw_cirr
from cala.recipe import Recipe
from cala.scripts import cirr_submission, validate
from cala.training import make_model
from small_runs import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def checkpoint(world):
    recipe = Recipe(data_root=world, encoder_arch="tiny", backbone_weights=str(world / "small.safetensors"))
    save_checkpoint(make_model(recipe), world / "checkpoint", asdict(recipe) | dict(api_key=None))
    return world / "checkpoint"


@pytest.fixture
def measure(world, checkpoint, tmp_path, capsys):
    def measure(*flags):
        folder = tmp_path / "-".join(flags).replace("--", "")
        words = ["--data-root", world, "--checkpoint", checkpoint, "--output", folder, *flags]
        run_command(validate.main.__wrapped__, [str(word) for word in words], prog="cala-validate")
        lines = capsys.readouterr().out.splitlines()
        return json.loads((folder / "result.json").read_text()), lines[0], pd.read_csv(folder / "ranks.csv")

    return measure


def test_a_gallery_of_all_splits_is_named_with_its_size(world, measure):
    result, line, _ = measure("--dataset", "CIRR", "--gallery", "all")
    size = sum(len(open_dataset("CIRR", world, split).gallery) for split in ("train", "val", "test"))
    assert (result["result"]["gallery"], result["result"]["gallery_of"]) == (size, "all")
    assert line.startswith(f"CIRR val, reference left out; gallery {size} (of all splits);")
    assert all(row["gallery"] == size for row in result["baselines"].values())


def test_fashioniq_is_ranked_in_one_gallery_of_all_splits_and_categories(world, measure):
    result, line, _ = measure("--dataset", "FashionIQ", "--gallery", "all")
    names = {n for split in ("train", "val", "test") for n in open_dataset("FashionIQ", world, split).gallery.names}
    assert {result["result"][f"{each}_gallery"] for each in ("dress", "shirt", "toptee")} == {len(names)}
    assert "(of all splits); 48 queries" in line


def test_the_text_form_changes_ranks_and_is_named(measure):
    ranks = {}
    for form in ("both", "second"):
        result, line, table = measure("--dataset", "FashionIQ", "--text-form", form)
        ranks[form] = table["rank"].tolist()
        assert result["result"]["text_form"] == form and ("text form" in line) == (form != "both")
    assert ranks["both"] != ranks["second"]


def test_the_recall_on_the_training_split_names_it_and_has_one_text_form(measure):
    for name in ("CIRR", "FashionIQ"):
        result, line, _ = measure("--dataset", name, "--split", "train")
        assert line.startswith(f"{name} train") and "36 queries" in line
        assert result["result"].get("text_form", "both") == "both"


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--dataset", "CIRR", "--text-form", "comma"], "--text-form: only FashionIQ has two sentences"),
        (["--dataset", "CIRR", "--gallery", "every"], "--gallery"),
        (
            ["--dataset", "FashionIQ", "--gallery", "all", "--protocol", "val"],
            "use original for a gallery of all splits",
        ),
        (["--dataset", "FashionIQ", "--text-form", "three"], "--text-form"),
        (["--dataset", "CIRR", "--split", "test"], "--split"),
    ],
)
def test_a_choice_that_does_not_fit_is_one_line(measure, capsys, flags, says):
    with pytest.raises(SystemExit) as end:
        measure(*flags)
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cala-validate: ")]
    assert end.value.code == 2 and says in line


def test_a_link_that_is_followed_is_named(world, measure, tmp_path):
    data = open_dataset("CIRR", world, "val")
    path = data.gallery.paths[0]
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    try:
        with pytest.raises(SystemExit):
            measure("--dataset", "CIRR")
        result, line, _ = measure("--dataset", "CIRR", "--follow-links")
    finally:
        path.unlink()
        (tmp_path / "blob").rename(path)
    assert result["result"]["follow_links"] is True and "links out of the folder are followed" in line


def test_a_submission_ends_with_the_addresses_of_the_servers(world, checkpoint, tmp_path, capsys):
    draw_cirr(tmp_path, train=1, val=1, test1=9, size=32)
    words = ["--data-root", tmp_path, "--checkpoint", checkpoint, "--output", tmp_path / "s"]
    run_command(cirr_submission.main.__wrapped__, [str(word) for word in words], prog="cala-cirr-submission")
    assert "https://cirr.cecs.anu.edu.au, or to its backup https://cirr.junjie.au" in capsys.readouterr().out

"""cala-ablation: a row says what was trained, a finished run is not repeated, and another table agrees or not."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from cala.library import ablation
from cala.library.cli import parse_flags
from cala.library.cli import run_command
from cala.library.flags import Ablation
from cala.library.run import make_learner
from cala.recipe import RECIPES
from cala.recipe import Recipe
from cala.scripts.ablation import main

COMMITTED = Path(__file__).parent.parent / "nbs/tutorials/ablation"


@pytest.fixture
def small(monkeypatch):
    """Worlds of a few pictures, runs of a few steps, one step of stage 1."""
    for key, value in dict(train=12, stage1=24, cirr=5, steps=1).items():
        monkeypatch.setitem(ablation.SIZES, key, value)
    monkeypatch.setattr(ablation, "BASE", ablation.BASE | dict(triplets=32, batch_size=16, num_epochs=1))
    monkeypatch.setattr(ablation, "PROBED_STEPS", (1, 2))


def find_job(setting, arm, damage=None):
    """The job of an arm on the CIRR world with seed 0."""
    jobs = ablation.list_jobs(Ablation())
    job = next(job for job in jobs if (job.setting, job.world, job.seed, job.arm) == (setting, "cirr", 0, arm))
    return job._replace(damage=damage or job.damage)


def test_a_row_says_what_was_trained(small, tmp_path):
    row, probes = ablation.run_job(find_job("both", "both paper normalised 0.3/0.1"), tmp_path)
    recipe = parse_flags(Recipe, shlex.split(row["recipe"])[1:])
    assert (recipe.objective, recipe.alpha, recipe.beta, recipe.features) == ("paper", 0.3, 0.1, "normalised")
    assert (recipe.triplets, recipe.encoder) == (32, "both")
    assert row["steps"] == 2 and row["seconds"] > 0 and probes == []
    assert 0 <= row["val_mean"] <= 100 and 0 <= row["kept_mean"] <= 100


def test_every_arm_of_a_seed_starts_the_same(small, tmp_path):
    learners = []
    for number, arm in enumerate(ablation.MAIN_ARMS[:2]):
        recipe = ablation.make_recipe(find_job("both", arm), tmp_path, str(tmp_path / f"run{number}"))
        learner = make_learner(recipe, progress=False)
        Path(recipe.output).mkdir()
        learner.fit()
        learners.append(learner)
    pair_ids = [[triplet.pair_id for triplet in learner.data.triplets] for learner in learners]
    assert pair_ids[0] == pair_ids[1]
    assert learners[0].log[0]["qtm"] == pytest.approx(learners[1].log[0]["qtm"], abs=1e-5)


def test_the_setting_reasons_has_probes(small, tmp_path):
    _, probes = ablation.run_job(find_job("reasons", "both released raw 0.1/0.45"), tmp_path)
    assert [row["step"] for row in probes] == [1, 2]
    assert {"ctr_share", "honest_accuracy", "mixed_cosine", "padding_drift"} <= set(probes[0])


def test_damaged_sentences_change_training_and_nothing_else(small, tmp_path):
    def read_captions(damage, split):
        root = ablation.make_recipe(find_job("both", "QTM", damage), tmp_path, "x").data_root
        return next(Path(root).rglob(f"cap.rc2.{split}.json")).read_text()

    assert read_captions(None, "val") == read_captions("swapped", "val")
    assert read_captions(None, "train") != read_captions("swapped", "train")


def write_rows(folder, gain):
    """Rows of a slice as if they had been run: QTM at 50 + seed, each arm `gain` above."""
    (folder / "rows").mkdir(parents=True)
    for job in ablation.list_jobs(Ablation(parts="slice", worlds="cirr", seeds=2)):
        kept_mean = 50.0 + job.seed
        if job.arm != "QTM":
            kept_mean += gain + 0.1 * job.seed
        row = dict(setting=job.setting, world=job.world, seed=job.seed, arm=job.arm, kept_mean=kept_mean)
        (folder / "rows" / job.file_name).write_text(json.dumps(dict(row=row, probes=[])))


def run_slice(*words):
    flags = ["--parts", "slice", "--worlds", "cirr", "--seeds", "2", *map(str, words)]
    return run_command(main, flags, prog="cala-ablation")


def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    write_rows(tmp_path, 1.0)
    run_slice("--output", tmp_path)
    assert len(pd.read_csv(tmp_path / "rows.csv")) == 12
    assert "both paper normalised" in capsys.readouterr().out
    assert not (tmp_path / "worlds").exists()


def test_two_tables_agree_or_not(tmp_path, capsys):
    for name, gain in (("a", 1.0), ("b", 1.05), ("c", 7.0)):
        write_rows(tmp_path / name, gain)
        run_slice("--output", tmp_path / name)
    run_slice("--output", tmp_path / "a", "--compare", tmp_path / "b/rows.csv")
    with pytest.raises(SystemExit) as ended:
        run_slice("--output", tmp_path / "a", "--compare", tmp_path / "c/rows.csv")
    assert ended.value.code == 2
    assert "5 of 5 effects differ from those of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "all"], "table, reasons"),
        (["--worlds", "coco"], "cirr, fashioniq"),
        (["--seeds", "0"], "1 or more"),
        (["--compare", "none.csv"], "no such file"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit):
        run_command(main, words, prog="cala-ablation")
    assert message in capsys.readouterr().err


def test_a_wrong_world_makes_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(main, ["--worlds", "coco", "--output", str(tmp_path / "run")], prog="cala-ablation")
    assert list(tmp_path.iterdir()) == []


def test_the_first_error_of_a_parallel_run_is_raised():
    with pytest.raises(ValueError, match="three"):
        ablation.run_parallel(int, [("3",), ("three",)], 1, "numbers")


def test_the_committed_rows_are_of_these_arms():
    rows = pd.read_csv(COMMITTED / "rows.csv")
    settings = ablation.all_settings(("cirr", "fashioniq"))
    assert set(rows.arm) <= set(ablation.all_arms())
    assert set(rows.setting) <= {name for part in settings.values() for name in part}
    seeds = rows[rows.setting == "both"].groupby(["world", "arm"]).seed.nunique()
    assert (seeds >= 5).all() and len(seeds) == 2 * len(ablation.table_arms())
    for _, row in rows.groupby("arm").head(1).iterrows():
        recipe = asdict(parse_flags(Recipe, shlex.split(row.recipe)[1:]))
        assert ablation.all_arms()[row.arm].items() <= recipe.items()


def test_the_default_recipe_is_cala():
    assert Recipe().objective == RECIPES["cala"]["objective"]


def test_the_readme_shows_the_committed_effects():
    rows = pd.read_csv(COMMITTED / "rows.csv")
    readme = (COMMITTED.parents[2] / "README.md").read_text(encoding="utf-8")
    shown = [
        ("both", "QTM", "both released raw 0.1/0.45"),
        ("both", "QTM", "QTM at scale 55"),
        ("both", "QTM", "both paper raw 0.1/0.1 at scale 55"),
        ("scale", "QTM at scale 100", "QTM at scale 6"),
    ]
    for setting, against, arm in shown:
        effects = ablation.compute_effects(rows[rows.setting == setting], against=against).set_index(["arm", "world"])
        cells = []
        for world in ("cirr", "fashioniq"):
            effect = effects.loc[(arm, world)]
            cells.append(f"{effect['mean']:+.2f} ({effect.low:+.2f} to {effect.high:+.2f})")
        assert " | ".join(cells) in readme, arm
    assert f"{len(rows)} short trainings" in readme

"""cala-ablation on a data set: the cost before the runs, a run that is interrupted and continued, tables, mistakes."""

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest

from cala.data import CIRR, FashionIQ
from cala.errors import CalaError
from cala.library import ablation_dataset
from cala.library.ablation_dataset import list_association_arms, list_jobs, name_kind
from cala.library.cli import parse_flags, run_command
from cala.library.flags import Ablation
from cala.library.holdout import keep_held_out_part, keep_training_part, list_pictures, split_triplets
from cala.library.resume import StopOnSignal
from cala.recipe import Recipe
from cala.scripts.ablation import main
from small_runs import one_thread  # noqa: F401


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """The command on the small world; of the associations only two arms are trained."""
    every_arm = list_association_arms

    def few_arms(part, scale, encoder_arch="blip2"):
        arms = every_arm(part, scale, encoder_arch)
        return {name: flags for name, flags in arms.items() if name.startswith(("QTM", "+CTR pairs, at"))}

    monkeypatch.setattr(ablation_dataset, "list_association_arms", few_arms)

    def run(*words, dataset="CIRR"):
        flags = ["--dataset", dataset, "--data-root", world, "--encoder-arch", "tiny", "--batch-size", 8]
        flags += ["--backbone-weights", world / "small.safetensors", "--learning-rate", "1e-3", "--num-epochs", 2]
        flags += ["--holdout", 0.1, "--seeds", 1, "--scales", 10, "--output", tmp_path / "out"]
        flags += ["--cache", "tokens", "--cache-dir", tmp_path / "caches", *words]
        return run_command(main.__wrapped__, [str(word) for word in flags], prog="cala-ablation")

    return run


def test_the_cost_is_printed_and_nothing_is_written(run, tmp_path, capsys):
    run("--cost")
    out = capsys.readouterr().out
    assert "6 are held out for choices" in out and "30 of 36 triplets train" in out
    assert "to write into" in out and "in all 3 runs, about" in out  # disk and hours
    for arm in ("QTM at scale 10 ", "QTM at scale 10, 25% more steps", "+CTR pairs, at scale 10"):
        assert arm in out
    assert "steps were measured with tokens in memory" in out
    assert not (tmp_path / "out").exists() and not (tmp_path / "caches").exists()


def test_an_interrupted_run_goes_on_from_its_state_and_ends_in_the_same_tables(run, tmp_path, capsys, monkeypatch):
    run("--output", tmp_path / "whole")
    whole = capsys.readouterr().out
    real = StopOnSignal.stop_if_asked

    def stop(self, learner):
        if len(learner.log) == 5 and learner.recipe.ctr:  # in the second epoch of the run with CTR
            self.signal = 2
        real(self, learner)

    monkeypatch.setattr(StopOnSignal, "stop_if_asked", stop)
    with pytest.raises(SystemExit) as ended:
        run()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and "5 steps are kept" in error
    assert error.endswith("or give the same cala-ablation command again, which does it")
    monkeypatch.setattr(StopOnSignal, "stop_if_asked", real)
    trained = []
    real_train = ablation_dataset.train
    monkeypatch.setattr(ablation_dataset, "train", lambda recipe: trained.append(recipe) or real_train(recipe))
    run()
    again = capsys.readouterr().out
    assert [bool(recipe.resume) for recipe in trained] == [True]
    tables = [text[text.index("CIRR val, mean over seeds") :] for text in (whole, again)]
    assert tables[0] == tables[1] and "in all 1 runs" in again
    assert "difference to QTM at scale 10 (equal steps)" in again
    assert "difference to QTM at scale 10, 25% more steps (equal compute)" in again
    assert "+CTR pairs, at scale 10, ranked again" in again
    rows = [pd.read_csv(tmp_path / name / "rows.csv").drop(columns="seconds") for name in ("whole", "out")]
    pd.testing.assert_frame_equal(*rows)
    assert not list((tmp_path / "out/runs").iterdir())
    recipe = parse_flags(Recipe, shlex.split(rows[0].recipe[0])[1:])
    assert (recipe.holdout, recipe.resume, recipe.num_epochs, recipe.max_epoch) == (0.1, None, 2, 2)

    trained.clear()
    run("--parts", "scale")
    assert not trained and "all runs are done" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--batch-size", 4)
    assert "was made with --batch-size 8, and 4 is given; choose another --output" in capsys.readouterr().err


def test_without_a_held_out_part_the_tables_say_where_choices_are_made(run, tmp_path, capsys):
    run("--holdout", 0, "--parts", "scale", "--num-epochs", 1, dataset="FashionIQ")
    out = capsys.readouterr().out
    assert "36 triplets train; choices are made on the validation split (--holdout 0)" in out
    assert "chosen on the validation split, which is reported too (--holdout 0)" in out
    rows = pd.read_csv(tmp_path / "out/rows.csv")
    assert rows.choice_mean.equals(rows.kept_mean) and "kept_recall_at1" in rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", 8], "--batch-size belongs to --dataset, and drawn worlds have their own settings"),
        (["--cost"], "--cost belongs to --dataset"),
        (["--dataset", "CIRR", "--workers", 2], "--workers belongs to drawn worlds"),
        (["--dataset", "CIRR", "--beta", 0.3], "--beta 0.3: an ablation chooses it; leave it out"),
        (["--dataset", "CIRR", "--seed", 3], "--seed 3: an ablation chooses it; give --seeds"),
        (["--dataset", "CIRR", "--parts", "reasons"], "--parts reasons: give some of scale, headline, ctr"),
        (["--dataset", "CIRR", "--parts", "headline"], "give --qtm-scale, or --parts scale too, which finds it"),
        (["--dataset", "CIRR", "--scales", "10,0"], "--scales 0: give numbers above 0, or the word learned"),
        (["--dataset", "CIRR", "--scales", "learned"], "--scales: give at least one number"),
        (["--dataset", "CIRR", "--qtm-scale", "learned"], "--qtm-scale learned: the associations are compared"),
        (["--dataset", "CIRR", "--data-root", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_folder(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(main.__wrapped__, [*map(str, words), "--output", str(tmp_path / "out")], prog="cala-ablation")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_other_files_are_not_written_over(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    with pytest.raises(SystemExit):
        run()
    assert "no ablation made it; choose another --output" in capsys.readouterr().err


def test_every_claim_has_equal_steps_equal_compute_and_a_control():
    ablation = Ablation(dataset="CIRR", num_epochs=8)
    jobs = {job.arm: job for job in list_jobs(ablation, "headline", 10.0)}
    longer = ablation_dataset.make_recipe(ablation, jobs["QTM at scale 10, 25% more steps"])
    baseline = ablation_dataset.make_recipe(ablation, jobs["QTM at scale 10"])
    assert (baseline.num_epochs, longer.num_epochs, longer.max_epoch) == (8, 10, 10)
    recipes = {arm: ablation_dataset.make_recipe(ablation, job) for arm, job in jobs.items()}
    control, ours = recipes["+matching head, weight 1, at scale 10"], recipes["+CTR pairs, weight 1, at scale 10"]
    assert (control.beta, control.ctr, ours.beta, ours.ctr) == (1.0, "matching", 1.0, "pairs")
    assert all(recipe.qtm_scale == 10.0 for arm, recipe in recipes.items() if not arm.endswith("at scale 100"))
    kinds = {name_kind(recipe) for recipe in recipes.values()}
    assert len(kinds) == 5  # QTM, pairs, control, paper, released
    assert "+CTR all tokens, at scale 3" not in list_association_arms("ctr", 3.0, "clip")


def test_the_tables_of_fashioniq_have_a_second_ranking_and_no_groups():
    arms = ("QTM at scale 10", "QTM at scale 10, 25% more steps", "+CTR pairs, at scale 10")
    rows = pd.DataFrame([dict(setting="standard", world="FashionIQ", seed=s, arm=a) for s in (0, 1) for a in arms])
    rows["kept_mean"], rows["kept_recall_at1"], rows["choice_mean"] = 50.0 + rows.index, 9.0, 40.0
    is_ours = rows.arm == arms[2]
    rows["again_mean"], rows["again_recall_at1"] = (
        rows.kept_mean.where(is_ours) + 3,
        rows.kept_recall_at1.where(is_ours),
    )
    text = ablation_dataset.describe_rows(rows, 10.0)
    assert "+CTR pairs, at scale 10, ranked again" in text and "+5.00 [+5.00, +5.00] 2/2" in text
    assert "Rs@1" not in text and "(equal compute)" in text


def test_the_scale_is_chosen_on_the_data_for_choices():
    rows = [
        dict(arm="QTM at scale 100", seed=0, choice_mean=50.0, kept_mean=90.0),
        dict(arm="QTM at scale 6", seed=0, choice_mean=60.0, kept_mean=10.0),
        dict(arm="QTM, learned scale", seed=0, choice_mean=99.0, kept_mean=99.0),
        dict(arm="QTM at scale 100", seed=1, choice_mean=99.0, kept_mean=90.0),  # the other scale lacks this seed
    ]
    assert ablation_dataset.choose_scale(pd.DataFrame(rows), ("100", "6", "learned")) == 6.0


@pytest.mark.parametrize(("kind", "share"), [(CIRR, 0.1), (CIRR, 0.4), (FashionIQ, 0.2)])
def test_no_picture_of_the_held_out_part_is_trained_on(world, kind, share):
    training, held_out = (
        keep_training_part(kind(world, "train"), share),
        keep_held_out_part(kind(world, "train"), share),
    )
    shown = set(held_out.gallery.names)
    assert shown == set().union(*map(list_pictures, held_out.triplets))
    assert not any({t.reference, t.target} & shown for t in training.triplets)
    total = len(kind(world, "train"))
    assert share * total <= len(held_out) < share * total + 18 and len(training) + len(held_out) <= total
    if kind is FashionIQ:
        assert {t.category for t in held_out.triplets} == {t.category for t in training.triplets}
        assert held_out.text_form == "both"


def test_triplets_that_touch_the_held_out_part_are_in_neither(world):
    data = CIRR(world, "train")
    first = data.triplets[0]
    for number in range(6, 12):  # the second group shows a picture of the first
        data.triplets[number] = type(first)(**{**vars(data.triplets[number]), "target": first.target})
    parts = split_triplets(data, 0.99 / 6)
    groups = {data.triplets[number].group for number in parts.held_out}
    touching = first.group in groups
    neither = set(range(len(data))) - set(parts.training) - set(parts.held_out)
    assert len(groups) == 1 and (not touching or set(range(6, 12)) <= neither)
    with pytest.raises(CalaError, match="--holdout 0.99: no training triplet is left"):
        split_triplets(data, 0.99)


def test_a_row_is_json_and_names_its_place(run, tmp_path):
    run("--parts", "scale", "--num-epochs", 1)
    (path,) = Path(tmp_path, "out/rows").glob("*.json")
    row = json.loads(path.read_text())["row"]
    assert (row["world"], row["arm"], row["seed"]) == ("CIRR", "QTM at scale 10", 0)
    assert {"choice_mean", "kept_mean", "kept_group_recall_at1", "seconds", "recipe"} <= set(row)

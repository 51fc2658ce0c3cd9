"""cala-ablation: a row says what was trained, a finished run is not repeated, and another table agrees or not."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch

from cala.encoders import make_backbone
from cala.errors import CalaError
from cala.library import ablation
from cala.library.cli import parse_flags, run_command
from cala.library.flags import ABLATION_WORLDS, Ablation
from cala.library.run import make_learner
from cala.model import CaLa, compositors
from cala.recipe import RECIPES, Recipe
from cala.scripts.ablation import main

COMMITTED = Path(__file__).parent.parent / "nbs/tutorials/ablation"


@pytest.fixture
def small(monkeypatch):
    """Worlds of a few pictures, runs of a few steps, one step of stage 1."""
    for key, value in dict(train=12, train_large=20, stage1=24, cirr=5, steps=1).items():
        monkeypatch.setitem(ablation.SIZES, key, value)
    monkeypatch.setattr(ablation, "BASE", ablation.BASE | dict(triplets=32, batch_size=16, num_epochs=1))
    monkeypatch.setattr(ablation, "PROBED_STEPS", (1, 2))


def test_every_world_of_the_flag_can_be_drawn():
    assert set(ABLATION_WORLDS) == set(ablation.WORLD_FLAGS) == set(ABLATION_WORLDS) & set(ablation.SIZES)


def test_settings_scale_the_epochs_of_their_world():
    jobs = ablation.list_jobs(Ablation(parts="conditions,where", worlds="cirr", seeds=1))
    epochs = {(job.setting, job.world, job.arm): job.flags["num_epochs"] for job in jobs}
    expected = {"a third of the steps": (3, 9), "three times the steps": (24, 78), "batch of 32": (4, 13)}
    for setting, (cirr, fashioniq) in expected.items():
        assert epochs[setting, "cirr", ablation.BASELINE] == cirr
        assert epochs[setting, "fashioniq", ablation.BASELINE] == fashioniq
    assert epochs["three times the steps", "fashioniq", "QTM at scale 6, 25% more steps"] == 98
    assert epochs["10000 triplets", "cirr_large", "QTM at scale 6, 25% more steps"] == 5


def find_job(part, arm, **flags):
    """The job of an arm on the CIRR world with seed 0."""
    jobs = ablation.list_jobs(Ablation(parts=part, worlds="cirr", seeds=1))
    job = next(job for job in jobs if job.arm == arm)
    return job._replace(flags=job.flags | flags)


def test_a_row_says_what_was_trained(small, tmp_path):
    row, probes = ablation.run_job(find_job("ctr", "+CTR pairs"), tmp_path)
    recipe = parse_flags(Recipe, shlex.split(row["recipe"])[1:])
    assert (recipe.objective, recipe.ctr, recipe.alpha, recipe.beta) == ("two_way", "pairs", 0.0, 0.3)
    assert (recipe.triplets, recipe.encoder, recipe.qtm_scale) == (32, "both", 6.0)
    assert row["steps"] == 2 and row["seconds"] > 0 and probes == []
    for split in ("val", "kept", "again"):
        assert 0 <= row[f"{split}_mean"] <= 100
    assert row["again_weight"] >= 0


def test_every_arm_of_a_seed_starts_the_same(small, tmp_path):
    learners = []
    for number, arm in enumerate(ablation.HEADLINE_ARMS[:3:2]):
        recipe = ablation.make_recipe(find_job("headline", arm), tmp_path, str(tmp_path / f"run{number}"))
        learner = make_learner(recipe, progress=False)
        Path(recipe.output).mkdir()
        learner.fit()
        learners.append(learner)
    pair_ids = [[triplet.pair_id for triplet in learner.data.triplets] for learner in learners]
    assert pair_ids[0] == pair_ids[1]
    weights = [ablation.make_model(learner.recipe).backbone.state_dict() for learner in learners]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_setting_reasons_has_probes(small, tmp_path):
    _, probes = ablation.run_job(find_job("reasons", "QTM at scale 100"), tmp_path)
    assert [(row["step"], row["split"]) for row in probes] == [(1, "train"), (1, "val"), (2, "train"), (2, "val")]
    assert all(1 / 63 < row["hardest_share"] <= 1 and row["alignment"] > 0 for row in probes)


def test_equal_compute_is_a_quarter_more_epochs():
    for world, epochs in (("cirr", 8), ("fashioniq", 26)):
        jobs = ablation.list_jobs(Ablation(parts="headline", worlds=world, seeds=1))
        by_arm = {job.arm: job.flags["num_epochs"] for job in jobs}
        assert by_arm[ablation.BASELINE] == epochs
        assert by_arm["QTM at scale 6, 25% more steps"] == round(1.25 * epochs)


@pytest.mark.parametrize("name", ["matching", "pairs"])
def test_ranking_again_uses_the_logits_of_training(name):
    """The pair of a query with its own target has the same logit in training and when it is ranked again."""
    torch.manual_seed(0)
    backbone = make_backbone("tiny", vocabulary=["red", "blue"], width=32, heads=2, layers=2)
    model = CaLa(backbone, objective="two_way", ctr=name).eval()
    pictures = torch.randn(6, 3, 48, 48)
    with torch.no_grad():
        vectors = model.embed(pictures[:3], ["red", "blue", "red blue"], pictures[3:])
        expected = model.compare(vectors).z_ctr.diagonal()
        own, candidates = model.embed_gallery(pictures[:3]), model.embed_gallery(pictures[3:])
        again = model.score_pairs(vectors.f_r, vectors.f_c, own, candidates[:, None])
    torch.testing.assert_close(again[:, 0], expected)


@pytest.mark.parametrize("name", ["tac", "tac_text", "tac_sides", "all_tokens"])
def test_every_compositor_trains_but_only_those_of_features_rank_again(name):
    backbone = make_backbone("tiny", vocabulary=["red", "blue"], width=32, heads=2, layers=2)
    model = CaLa(backbone, objective="two_way", ctr=name)
    pictures = torch.randn(2, 3, 48, 48)
    model(pictures, ["red", "blue"], pictures.flip(0)).total.backward()
    assert all(p.grad is not None for p in model.compositor.parameters())
    with pytest.raises(CalaError, match="--rerank needs a model that was trained with --ctr pairs"):
        model.score_pairs(*torch.randn(3, 2, 32), torch.randn(2, 5, 32))


def test_the_control_has_the_size_of_the_compositor_and_reads_no_reference():
    backbone = make_backbone("tiny", vocabulary=["red"], width=32, heads=2, layers=2)
    control, pairs = (compositors[name](backbone) for name in ("matching", "pairs"))
    sizes = [sum(p.numel() for p in module.parameters()) for module in (control, pairs)]
    assert sizes[0] == sizes[1]
    reference, other, target = torch.randn(3, 2, 32)
    assert torch.equal(control(reference, target), control(other, target))
    assert not torch.equal(pairs(reference, target), pairs(other, target))


def write_rows(folder, gain):
    """Rows of a slice as if they had been run: the baseline at 50 + seed, each other arm `gain` above."""
    (folder / "rows").mkdir(parents=True)
    for job in ablation.list_jobs(Ablation(parts="slice", worlds="cirr", seeds=2)):
        kept_mean = 50.0 + job.seed
        if job.arm != ablation.BASELINE:
            kept_mean += gain + 0.1 * job.seed
        row = dict(setting=job.setting, world=job.world, seed=job.seed, arm=job.arm, kept_mean=kept_mean)
        (folder / "rows" / job.file_name).write_text(json.dumps(dict(row=row, probes=[])))


def run_slice(*words):
    flags = ["--parts", "slice", "--worlds", "cirr", "--seeds", "2", *map(str, words)]
    return run_command(main, flags, prog="cala-ablation")


def test_a_finished_run_is_not_repeated(tmp_path, capsys):
    write_rows(tmp_path, 1.0)
    run_slice("--output", tmp_path)
    assert len(pd.read_csv(tmp_path / "rows.csv")) == 6
    assert "+CTR pairs" in capsys.readouterr().out
    assert not (tmp_path / "worlds").exists()


def test_two_tables_agree_or_not(tmp_path, capsys):
    for name, gain in (("a", 1.0), ("b", 1.05), ("c", 7.0)):
        write_rows(tmp_path / name, gain)
        run_slice("--output", tmp_path / name)
    run_slice("--output", tmp_path / "a", "--compare", tmp_path / "b/rows.csv")
    with pytest.raises(SystemExit) as ended:
        run_slice("--output", tmp_path / "a", "--compare", tmp_path / "c/rows.csv")
    assert ended.value.code == 2
    assert "2 of 2 effects differ from those of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "all"], "scale, ctr"),
        (["--worlds", "coco"], "cirr, cirr_hard"),
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
    settings = ablation.all_settings(tuple(ablation.WORLD_FLAGS))
    assert set(rows.arm) <= set(ablation.all_arms())
    assert set(rows.setting) <= {name for part in settings.values() for name in part}
    for _, row in rows.groupby("arm").head(1).iterrows():
        recipe = asdict(parse_flags(Recipe, shlex.split(row.recipe)[1:]))
        assert ablation.all_arms()[row.arm].items() <= recipe.items()


def test_the_default_recipe_is_cala():
    assert Recipe().objective == RECIPES["cala"]["objective"]


def test_the_readme_shows_the_committed_effects():
    rows = pd.read_csv(COMMITTED / "rows.csv")
    trained = len(rows)
    rows = ablation.add_second_stage(rows[rows.setting == "standard"])
    readme = (COMMITTED.parents[2] / "README.md").read_text(encoding="utf-8")
    shown = ("QTM at scale 100", "QTM at scale 6, 25% more steps", "+CTR pairs", "+CTR pairs, weight 1, ranked again")
    for metric, worlds in (
        ("kept_mean", ("cirr", "cirr_hard", "fashioniq", "fashioniq_hard")),
        ("kept_group_recall_at1", ("cirr", "cirr_hard")),
        ("kept_recall_at1", ("cirr", "cirr_hard", "fashioniq", "fashioniq_hard")),
    ):
        effects = ablation.compute_effects(rows, metric).set_index(["arm", "world"])
        for arm in shown:
            cells = []
            for world in worlds:
                if (arm, world) not in effects.index:
                    cells.append("-")
                    continue
                effect = effects.loc[(arm, world)]
                cells.append(f"{effect['mean']:+.2f} ({effect.low:+.2f} to {effect.high:+.2f})")
            assert " | ".join(cells) in readme, (metric, arm)
    assert f"{trained} short trainings" in readme


def test_the_committed_rows_hold_what_the_readme_concludes():
    rows = pd.read_csv(COMMITTED / "rows.csv")
    rows = ablation.add_second_stage(rows[rows.setting == "standard"])

    def read_effects(metric, against=ablation.BASELINE):
        return ablation.compute_effects(rows, metric, against).set_index(["arm", "world"])

    mean, similar = read_effects("kept_mean"), read_effects("kept_group_recall_at1")
    for world in ("cirr", "cirr_hard", "fashioniq", "fashioniq_hard"):
        best = mean.xs(world, level="world")["mean"].max()
        assert -mean.loc[("QTM at scale 100", world), "mean"] > best
    for arm in ("released mixture at scale 6", "+TBIA +CTR raw, weights 0.1, at scale 6"):
        assert mean.loc[(arm, "cirr"), "high"] < 0 and mean.loc[(arm, "fashioniq"), "high"] < 0
    cosines = mean.loc["+TBIA +CTR cosine x100, weights 0.1, at scale 6"]
    assert cosines.high["cirr"] < 0 and cosines.low["fashioniq"] < 0 < cosines.high["fashioniq"]
    for world in ("cirr", "cirr_hard"):
        for arm in ("+CTR pairs", "+CTR pairs, weight 1"):
            again = f"{arm}, ranked again"
            assert 0 < similar.loc[(arm, world), "low"]
            assert similar.loc[(arm, world), "mean"] < similar.loc[(again, world), "mean"]
            control = similar.loc[("+matching head, weight 1, ranked again", world), "mean"]
            assert control < similar.loc[(again, world), "mean"]
    equal_compute = read_effects("kept_mean", "QTM at scale 6, 25% more steps")
    assert equal_compute.loc[("+CTR pairs", "cirr_hard"), "high"] < 0
    assert mean.loc[("+CTR pairs, weight 1", "fashioniq"), "mean"] < 0.1
    at_100 = read_effects("kept_mean", "QTM at scale 100").xs("cirr", level="world")
    mixture = at_100.loc["released mixture at scale 100"]
    assert mixture.low > 0 and abs(mixture["mean"] - at_100.loc["QTM at scale 55", "mean"]) < 0.5
    for arm in ("released mixture at scale 100", "+TBIA +CTR raw, weights 0.1, at scale 100"):
        assert at_100.loc[arm, "mean"] > 0 > mean.loc[(arm, "cirr"), "high"]
    cosines = at_100.loc["+TBIA +CTR cosine x100, weights 0.1, at scale 100"]
    assert cosines.low < 0 < cosines.high


def test_the_committed_rows_hold_what_the_readme_concludes_of_recall_at_1():
    rows = pd.read_csv(COMMITTED / "rows.csv")
    rows = ablation.add_second_stage(rows[rows.setting == "standard"])
    equal_steps, equal_compute = (
        ablation.compute_effects(rows, "kept_recall_at1", against).set_index(["arm", "world"])
        for against in (ablation.BASELINE, "QTM at scale 6, 25% more steps")
    )
    hard = ("+CTR pairs, weight 1, ranked again", "cirr_hard")
    for effects, expected in ((equal_steps, -4.1), (equal_compute, -8.1)):
        assert effects.loc[hard, "high"] < 0 and round(effects.loc[hard, "mean"], 1) == expected
    again = ("+CTR pairs, ranked again", "fashioniq")
    assert equal_compute.loc[again, "low"] > 0
    control = equal_steps.loc[("+matching head, weight 1, ranked again", "fashioniq"), "mean"]
    assert control < equal_steps.loc[again, "mean"]


OVERFITTED = ("three times the steps", "20% wrong triplets", "50% wrong triplets")  # by QTM, on the FashionIQ world


def test_the_committed_rows_hold_what_the_readme_concludes_of_other_settings():
    rows = ablation.add_second_stage(pd.read_csv(COMMITTED / "rows.csv"))

    def read_means(arm, metric, against):
        effects = ablation.compute_effects(rows, metric, against)
        return effects[effects.arm == arm].set_index(["world", "setting"])["mean"]

    settings = list(ablation.where_settings())

    def read_pair(metric, against="QTM at scale 6, 25% more steps"):
        names = ("+CTR pairs, weight 1, ranked again", "+matching head, weight 1, ranked again")
        return [read_means(name, metric, against) for name in names]

    similar, similar_control = read_pair("kept_group_recall_at1")
    on_cirr = [("cirr", setting) for setting in settings if setting != "10000 triplets"]
    on_cirr.append(("cirr_large", "10000 triplets"))
    assert (similar[on_cirr] > 0).all() and (similar[on_cirr] > similar_control[on_cirr]).all()

    ctr, control = read_pair("kept_mean")
    gains = {
        "3000 triplets": 1.7,
        "3000 triplets, three times the steps": 0.4,
        "three times the steps": 0.5,
        "20% wrong triplets": 0.4,
        "50% wrong triplets": 0.6,
        "frozen target encoder": -0.5,
    }
    assert {setting: round(ctr["cirr", setting], 1) for setting in gains} == gains
    assert round(ctr["cirr_large", "10000 triplets"], 1) == 0.3 and ctr["cirr_hard", "three times the steps"] < -3
    first, _ = read_pair("kept_recall_at1")
    assert [round(first["cirr", setting], 1) for setting in ("frozen target encoder", "20% wrong triplets")] == [
        -3.9,
        -1.6,
    ]

    overfitting = [("fashioniq", setting) for setting in settings if setting in OVERFITTED]
    assert ctr[overfitting].round(1).tolist() == [0.7, 1.8, 7.2]
    assert control[overfitting].round(1).tolist() == [1.4, 2.0, 6.8]
    ctr, control = read_pair("kept_mean", ablation.BASELINE)
    assert ctr[overfitting].round(1).tolist() == [0.1, 1.0, 4.9]
    assert control[overfitting].round(1).tolist() == [0.8, 1.1, 4.4]
    assert round(ctr["cirr", "50% wrong triplets"], 1) == -1.1

"cala-ablation: what a row says is what was trained, what is there is not run again, and another table is disagreed with in one line."
import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from cala.library.cli import parse_flags
from cala.library.cli import run_command
from cala.scripts import ablation
from cala.recipe import RECIPES
from cala.recipe import Recipe

COMMITTED = Path(__file__).parent.parent / "nbs/tutorials/ablation"


@pytest.fixture
def small(monkeypatch):
    "Worlds of a few pictures, runs of a few steps, one step of stage 1."
    for key, value in dict(train=12, stage1=24, cirr=5, steps=1).items(): monkeypatch.setitem(ablation.SIZES, key, value)
    monkeypatch.setattr(ablation, "BASE", ablation.BASE | dict(triplets=32, batch_size=16, num_epochs=1))
    monkeypatch.setattr(ablation, "WATCHED", (1, 2))


def job(setting, arm, spoil=None):
    found = next(j for j in ablation.jobs(ablation.Ablation()) if (j.setting, j.world, j.seed, j.arm) == (setting, "cirr", 0, arm))
    return found._replace(spoil=spoil or found.spoil)


def test_a_row_says_what_was_trained(small, tmp_path):
    row, looked = ablation.run_job(job("both", "both paper normalised 0.3/0.1"), tmp_path)
    said = parse_flags(Recipe, shlex.split(row["recipe"])[1:])
    assert (said.objective, said.alpha, said.beta, said.features, said.triplets, said.encoder) == ("paper", .3, .1, "normalised", 32, "both")
    assert row["steps"] == 2 and 0 <= row["val_mean"] <= 100 and 0 <= row["kept_mean"] <= 100 and row["seconds"] > 0 and looked == []


def test_every_arm_of_a_seed_starts_the_same(small, tmp_path):
    first = [ablation.trained(job("both", arm), tmp_path, str(tmp_path / f"run{i}"))[0] for i, arm in enumerate(ablation.MAIN[:2])]
    assert [t.pair_id for t in first[0].data.triplets] == [t.pair_id for t in first[1].data.triplets]
    assert first[0].run.log[0]["qtm"] == pytest.approx(first[1].run.log[0]["qtm"], abs=1e-5)


def test_reasons_come_with_probes(small, tmp_path):
    row, looked = ablation.run_job(job("reasons", "both released raw 0.45/0.1"), tmp_path)
    assert [p["step"] for p in looked] == [1, 2] and {"ctr_share", "honest_accuracy", "mixed_cosine", "padding_drift"} <= set(looked[0])


def test_spoilt_sentences_change_training_and_nothing_else(small, tmp_path):
    plain, spoilt = (ablation.recipe_of(job("both", "QTM", spoil), tmp_path, "x").data_root for spoil in (None, "swapped"))
    read = lambda root, split: next(Path(root).rglob(f"cap.rc2.{split}.json")).read_text()
    assert read(plain, "val") == read(spoilt, "val") and read(plain, "train") != read(spoilt, "train")


def rows_of(folder, gain):
    "Rows of a slice, as if they had been run: QTM at 50 + seed, each arm `gain` above."
    (folder / "rows").mkdir(parents=True)
    for j in ablation.jobs(ablation.Ablation(parts="slice", worlds="cirr", seeds=2)):
        row = dict(setting=j.setting, world=j.world, seed=j.seed, arm=j.arm, kept_mean=50. + j.seed + (j.arm != "QTM") * (gain + .1 * j.seed))
        (folder / "rows" / f"{j.name}.json").write_text(json.dumps(dict(row=row, probes=[])))


def command(*words): return run_command(ablation.main, ["--parts", "slice", "--worlds", "cirr", "--seeds", "2", *map(str, words)], prog="cala-ablation")


def test_what_is_there_is_not_run_again(tmp_path, capsys):
    rows_of(tmp_path, 1.)
    command("--output", tmp_path)
    assert len(pd.read_csv(tmp_path / "rows.csv")) == 12 and "both paper normalised" in capsys.readouterr().out
    assert not (tmp_path / "worlds").exists()


def test_another_table_is_agreed_with_or_not(tmp_path, capsys):
    for name, gain in (("a", 1.), ("b", 1.05), ("c", 7.)): rows_of(tmp_path / name, gain); command("--output", tmp_path / name)
    command("--output", tmp_path / "a", "--compare", tmp_path / "b/rows.csv")
    with pytest.raises(SystemExit) as ended: command("--output", tmp_path / "a", "--compare", tmp_path / "c/rows.csv")
    assert ended.value.code == 2 and "5 of 5 effects are not those of" in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [(["--parts", "all"], "table, reasons"), (["--worlds", "coco"], "cirr, fashioniq"), (["--seeds", "0"], "1 or more"), (["--compare", "none.csv"], "no such file")])
def test_mistakes(words, says, capsys):
    with pytest.raises(SystemExit): run_command(ablation.main, words, prog="cala-ablation")
    assert says in capsys.readouterr().err


def test_the_committed_table_is_of_these_arms():
    rows = pd.read_csv(COMMITTED / "rows.csv")
    assert set(rows.arm) <= set(ablation.arms()) and set(rows.setting) <= {name for part in ablation.settings(ablation.Ablation()).values() for name in part}
    whole = rows[rows.setting == "both"].groupby(["world", "arm"]).seed.nunique()
    assert (whole >= 5).all() and len(whole) == 2 * len(ablation.arms())
    for _, row in rows.groupby("arm").head(1).iterrows():
        said = asdict(parse_flags(Recipe, shlex.split(row.recipe)[1:]))
        assert ablation.arms()[row.arm].items() <= said.items()


def test_the_default_recipe_is_one_of_the_three(): assert asdict(Recipe())["objective"] == RECIPES["cala"]["objective"]


def test_readme_says_what_the_committed_table_says():
    found = ablation.effects(pd.read_csv(COMMITTED / "rows.csv")).set_index(["setting", "arm", "world"]).loc["both"]
    readme = (COMMITTED.parents[2] / "README.md").read_text()
    for arm in ("both released raw 0.45/0.1", "QTM at scale 55", "both paper raw 0.1/0.1 at scale 55"):
        cells = [f"{r['mean']:+.2f} ({r.low:+.2f} to {r.high:+.2f})" for r in (found.loc[(arm, world)] for world in ("cirr", "fashioniq"))]
        assert " | ".join(cells) in readme, arm

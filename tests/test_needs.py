"What a query needs: labels by hand, counts and recalls, and what cala-validate writes about them."

import json

import numpy as np
import pandas as pd
import pytest

from cala.library.checkpoint import save_checkpoint
from cala.library.cli import run_command
from cala.library.needs import NEEDS, count_needs, describe_needs, label_queries, label_ranks, tabulate_needs
from cala.library.worlds.circo import draw_circo
from cala.library.worlds.garments import draw_fashioniq
from cala.library.worlds.scenes import draw_cirr
from cala.retrieval import Result
from cala.scripts.validate import main
from saved_models import tiny

NONE = float("nan")
TWELVE = [  # ranks by the picture alone, by the text alone and by the model; the label with the cut-off 10
    (1, 11, 1, "image"),
    (10, 500, 60, "image"),  # the model loses what the picture alone finds
    (10, 10.5, 2, "image"),  # a tie whose expected rank is beyond the cut-off
    (2, NONE, 7, "image"),
    (11, 1, 1, "text"),
    (NONE, 10, 30, "text"),
    (1, 1, 1, "either"),
    (10, 10, 10, "either"),
    (11, 11, 1, "both"),
    (10.5, 900, 10, "both"),
    (40, 60, 51, "both"),  # no method solves it
    (NONE, NONE, NONE, "both"),  # no method has a rank for it
]


def make_results():
    "Results of the twelve queries, as `measure` makes them."
    names = dict(pair_id=range(12), reference=[f"r{i}" for i in range(12)], target=[f"t{i}" for i in range(12)])
    results = {"chance": Result()}
    for name, column in zip(("image only", "text only", "sum"), zip(*TWELVE)):
        results[name] = Result(recall_at1=0.0, recall_at10=0.0, recall_at50=0.0, group_recall_at1=0.0, mean=0.0)
        results[name].ranks = pd.DataFrame(names).assign(rank=column, higher=0)
    return results


def test_labels_of_twelve_queries():
    image, text, _, labels = zip(*TWELVE)
    assert list(label_ranks(pd.Series(image), pd.Series(text))) == list(labels)


@pytest.mark.parametrize(
    "k, counts",
    [(1, (1, 1, 1, 9)), (10, (4, 2, 2, 4)), (11, (3, 1, 6, 2)), (1000, (1, 1, 9, 1))],
)
def test_a_larger_cut_off_solves_more_queries(k, counts):
    results = make_results()
    result = results["sum"]
    result.ranks = label_queries(results, k)
    assert count_needs(result, k) == dict(k=k) | dict(zip(NEEDS, counts))


def test_the_model_keeps_its_table_and_gets_the_ranks_of_each_part():
    results = make_results()
    before = results["sum"].ranks.copy()
    table = label_queries(results)
    assert list(table) == [*before, "image_rank", "text_rank", "needs"]
    pd.testing.assert_frame_equal(table[list(before)], before)
    np.testing.assert_equal(table[["image_rank", "text_rank", "rank"]].to_numpy(), np.array([q[:3] for q in TWELVE]))


def test_the_last_result_is_the_models():
    results = make_results()
    results["sum, ranked again"] = Result()
    results["sum, ranked again"].ranks = results["sum"].ranks.assign(rank=1.0)
    assert set(label_queries(results)["rank"]) == {1}


def test_recalls_of_each_label():
    results = make_results()
    result = results["sum"]
    result.ranks = label_queries(results)
    table = tabulate_needs(result)
    assert list(table) == ["queries", "share", "R@1", "R@10", "R@50"]
    assert table.loc["image"].tolist() == pytest.approx([4, 100 / 3, 25, 75, 75])
    assert table.loc["text"].tolist() == pytest.approx([2, 100 / 6, 50, 50, 100])
    assert table.loc["either"].tolist() == pytest.approx([2, 100 / 6, 50, 100, 100])
    assert table.loc["both"].tolist() == pytest.approx([4, 100 / 3, 25, 50, 50])
    heading, columns, *rows = describe_needs(result).splitlines()
    assert heading.startswith("4 queries need both parts") and heading.endswith("in the first 10")
    assert columns.split()[:3] == ["needs", "queries", "share"] and len(rows) == 4


def test_a_label_without_queries_has_no_recall():
    results = {name: result for name, result in make_results().items() if name != "chance"}
    for result in results.values():
        result.ranks = result.ranks.loc[6:7].reset_index(drop=True)
    result = results["sum"]
    result.ranks = label_queries(results)
    assert tabulate_needs(result)["queries"].tolist() == [0, 0, 2, 0]
    assert tabulate_needs(result).loc["both", "R@1":].isna().all()
    assert describe_needs(result).splitlines()[-1].split() == ["both", "0", "0.0", "-", "-", "-"]


def test_results_of_other_queries_are_refused():
    results = make_results()
    results["text only"].ranks = results["text only"].ranks[::-1].reset_index(drop=True)
    with pytest.raises(ValueError, match="same queries"):
        label_queries(results)


def test_the_command_writes_labels_for_each_data_set(tmp_path, capsys):
    draw_cirr(tmp_path, train=1, val=3, test1=1, size=24)
    draw_fashioniq(tmp_path, train=1, val=10, test=1, size=24)
    draw_circo(tmp_path, val=4, test=1, size=24)
    save_checkpoint(tiny(), tmp_path / "best")
    for name in ("CIRR", "FashionIQ", "CIRCO"):
        out = tmp_path / f"out {name}"
        words = ["--dataset", name, "--data-root", tmp_path, "--checkpoint", tmp_path / "best", "--output", out]
        rows = run_command(main, [*map(str, words), "--device", "cpu", "--batch-size", "64"], prog="cala-validate")
        ranks = pd.read_csv(out / "ranks.csv")
        needs = json.loads((out / "result.json").read_text())["needs"]
        counts = ranks["needs"].value_counts()
        assert needs == dict(k=10) | {label: counts.get(label, 0) for label in NEEDS}
        assert list(label_ranks(ranks["image_rank"], ranks["text_rank"])) == list(ranks["needs"])
        for column, row in (("image_rank", "image only"), ("text_rank", "text only")):
            assert ranks[column].to_list() == pytest.approx(rows[row].ranks["rank"].to_list(), nan_ok=True)
        if name == "CIRCO":
            assert ranks["image_rank"].min() > 1  # the reference itself is the first
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[-5:-1]] == list(NEEDS)
        assert lines[-7].endswith("in the first 10")

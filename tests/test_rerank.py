"""Ranking again, by the commands: what they print and write, and what they refuse."""

import json

import pytest
import torch

from cala import CIRR, Reranker, draw_cirr, evaluate_again, load_checkpoint
from cala.encoders import make_backbone, read_vocabulary
from cala.errors import CalaError
from cala.library.checkpoint import save_checkpoint
from cala.library.cli import run_command
from cala.model import CaLa
from cala.scripts.cirr_submission import main as submit
from cala.scripts.validate import main as validate


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A world, and two checkpoints of random weights: `pairs`, which can rank again, and `tac`, which cannot."""
    root = tmp_path_factory.mktemp("rerank")
    draw_cirr(root, train=1, val=12, test1=12)
    captions = [caption for triplet in CIRR(root, "val").triplets for caption in triplet.captions]
    for name, objective in (("pairs", "two_way"), ("tac", "paper")):
        torch.manual_seed(0)
        backbone = make_backbone("tiny", vocabulary=read_vocabulary(captions), width=32, heads=2, layers=2)
        model = CaLa(backbone, objective=objective, frame_options=dict(scale=10.0))
        save_checkpoint(model, root / name, recipe=dict(dataset="CIRR", data_root=str(root), encoder_arch="tiny"))
    return root


def run(main, place, checkpoint, *words):
    words = ["--checkpoint", place / checkpoint, "--data-root", place, *words]
    return run_command(main, list(map(str, words)), prog="cala")


def test_validation_writes_both_rankings(place, tmp_path, capsys):
    run(validate, place, "pairs", "--rerank", 10, "--rerank-weight", 0.5, "--output", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "the best 10 ranked again with weight 0.5" in printed and "sum, ranked again" in printed
    content = json.loads((tmp_path / "out/result.json").read_text())
    assert (content["result"]["rerank"], content["result"]["rerank_weight"]) == (10, 0.5)
    assert "sum" in content["baselines"] and "rerank" not in content["baselines"]["sum"]
    model = load_checkpoint(place / "pairs")
    data = CIRR(place, "val", model.backbone.transform())
    expected = evaluate_again(Reranker(model, 10, 0.5), data, progress=False)
    assert content["result"]["mean"] == pytest.approx(expected["mean"])


def test_a_weight_that_is_chosen_here_is_named(place, tmp_path, capsys):
    run(validate, place, "pairs", "--rerank", 10, "--output", tmp_path / "out")
    assert "(chosen on these queries)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/result.json").read_text())["result"]["rerank_weight_chosen_here"] is True


def test_a_submission_holds_the_order_of_the_second_ranking(place, tmp_path):
    def read_answers(folder, *words):
        run(submit, place, "pairs", "--output", tmp_path / folder, *words)
        names = ("recall_submission_cirr_submission.json", "recall_subset_submission_cirr_submission.json")
        return [json.loads((tmp_path / folder / name).read_text()) for name in names]

    first, subset = read_answers("first")
    again, subset_again = read_answers("again", "--rerank", 10, "--rerank-weight", 5)
    pairs = [key for key in first if key not in ("version", "metric")]
    assert all(sorted(first[pair][:10]) == sorted(again[pair][:10]) for pair in pairs)
    assert all(first[pair][10:] == again[pair][10:] for pair in pairs)
    assert any(first[pair] != again[pair] for pair in pairs)
    assert any(subset[pair] != subset_again[pair] for pair in pairs)
    zero, subset_zero = read_answers("zero", "--rerank", 10, "--rerank-weight", 0)
    assert (zero, subset_zero) == (first, subset)


@pytest.mark.parametrize(
    ("main", "checkpoint", "words", "message"),
    [
        (validate, "tac", ["--rerank", 10], "this model has no compositor of pairs; train with --ctr pairs"),
        (validate, "pairs", ["--rerank", 0], "--rerank 0: give 1 candidate or more"),
        (validate, "pairs", ["--rerank", 5, "--rerank-weight", -1], "--rerank-weight -1.0: give 0 or more"),
        (submit, "pairs", ["--rerank", 10], "--rerank 10 needs --rerank-weight"),
        (validate, "pairs", ["--rerank-weight", 0.5], "--rerank-weight belongs to --rerank"),
        (submit, "pairs", ["--rerank-weight", 0.5], "--rerank-weight belongs to --rerank"),
        (validate, "pairs", ["--dataset", "CIRCO", "--rerank", 10], "--rerank: CIRCO is not ranked again yet"),
    ],
)
def test_a_mistake_is_one_line(place, main, checkpoint, words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(main, place, checkpoint, "--output", tmp_path / "out", *words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_checkpoint_for_search_can_keep_its_compositor(place):
    model = load_checkpoint(place / "pairs").for_retrieval(rerank=True)
    assert model.hca is None and model.compositor is not None and model.w_ctr > 0
    assert load_checkpoint(place / "pairs").for_retrieval().compositor is None


def test_nan_of_the_compositor_is_refused(place):
    model = load_checkpoint(place / "pairs").eval()
    torch.nn.init.constant_(model.compositor.output.bias, torch.nan)
    data = CIRR(place, "val", model.backbone.transform())
    with pytest.raises(CalaError, match="scores are NaN"):
        evaluate_again(Reranker(model), data, progress=False)

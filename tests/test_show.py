"Figures: nothing cut off or overlapping, whatever the captions and pictures; bytes that do not change; widgets."

import json
import math

import matplotlib
import matplotlib.pyplot
import pandas as pd
import pytest
import torch
from PIL import Image

matplotlib.use("Agg")

from cala.data import CIRR
from cala.encoders import make_backbone, read_vocabulary, save_backbone
from cala.errors import CalaError
from cala.library.run import train
from cala.library.show.cards import (
    Ranking,
    draw_rankings,
    failures,
    show_failures,
    show_pictures,
    show_triplets,
    to_ranks,
)
from cala.library.show.curves import (
    edit_kinds,
    list_losses,
    loss_curves,
    per_kind_recall,
    read_log,
    recall_curve,
    wilson,
)
from cala.library.show.panel import TrainingPanel
from cala.library.show.widgets import (
    QueryExplorer,
    TripletBrowser,
    association_votes,
    embed_gallery,
    html_image,
    joint_scores,
)
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa
from cala.recipe import Recipe
from cala.rerank import Reranker, evaluate_again
from cala.retrieval import evaluate, evaluating, target_ranks

CAPTIONS = ["is red", "costs $5 and not $10", "größer, 大きい", "word " * 150, "w" * 400, "", "two\nlines"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return draw_cirr(tmp_path_factory.mktemp("world"), train=2, val=8, test1=2)


@pytest.fixture(scope="module")
def small_log():
    "The log of a made-up run of 120 steps."
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(120, generator=generator).abs()
    fall = torch.linspace(0, 4, 120).neg().exp()
    log = pd.DataFrame(dict(step=range(120), loss=3 * fall + 0.3 * noise, qtm=2.6 * fall, tbia=80 * fall, ctr=3 * fall))
    log["learning_rate"] = [1e-3 * (1 + math.cos(math.pi * n / 120)) / 2 for n in range(120)]
    return log


def small_backbone(seed=0):
    return make_backbone("tiny", vocabulary=["a", "is", "red", "the"], width=32, heads=2, layers=2, seed=seed)


def open_val(world):
    return CIRR(world, "val", small_backbone().transform())


def texts(figure):
    "Every text that a figure draws, with its box in pixels."
    drawn = []
    original = matplotlib.text.Text.draw

    def draw(text, renderer):
        drawn.append(text)
        return original(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.text.Text, "draw", draw)
        figure.draw_without_rendering()
    seen = [text for text in dict.fromkeys(drawn) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in seen]


def assert_readable(figure):
    boxes, page = texts(figure), figure.bbox
    for text, box in boxes:
        inside = box.x0 > page.x0 - 1 and box.x1 < page.x1 + 1 and box.y0 > page.y0 - 1 and box.y1 < page.y1 + 1
        assert inside, f"{text[:40]!r} is cut off"
    for i, (text, box) in enumerate(boxes):
        for other, other_box in boxes[:i]:
            wide = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
            high = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
            assert min(wide, high) < 1.5, f"{text[:40]!r} overlaps {other[:40]!r}"
    for ax in figure.axes:
        legend = ax.get_legend()
        if legend:
            overlaps = ax.bbox.padded(-1).overlaps(legend.get_window_extent())
            assert not overlaps, "a line may run through the names"


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_caption_fits_its_card_and_its_ranking(world, caption):
    data = CIRR(world, "val")
    data.triplets = [t.__class__(t.reference, (caption,), t.target, t.pair_id, t.group) for t in data.triplets]
    assert_readable(show_triplets(data, [0, 1], members=True))
    rows = []
    for target, rank in ((3, None), (20, 1234), (20, None)):
        rows.append(Ranking(0, caption, range(10), [12345.678] * 10, target, rank, "a note"))
    assert_readable(draw_rankings(data.gallery, rows, k=4))


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (2500, 1800), (3, 3)])
def test_a_picture_of_any_shape_stays_in_its_box(world, tmp_path, size):
    data = CIRR(world, "val")
    data.gallery.root = None
    Image.new("RGB", size, "teal").save(tmp_path / "odd.png")
    data.gallery.paths[0] = tmp_path / "odd.png"
    names = data.gallery.names
    data.triplets[0] = data.triplets[0].__class__(names[0], ("is teal",), names[1], "0")
    figure = show_triplets(data, [0])
    assert_readable(figure)
    images = figure.axes[0].images
    assert len(images) == 1 and max(images[0].get_array().shape[:2]) <= 256


def test_a_missing_picture_is_named(world):
    data = CIRR(world, "val")
    data.gallery.paths[data.references[0]] = world / "dev" / "gone.png"
    with pytest.raises(CalaError, match="gone.png"):
        show_triplets(data, [0])


def test_unlabelled_triplets_leave_the_target_empty(world):
    figure = show_triplets(CIRR(world, "test1"), [0])
    assert [len(ax.images) for ax in figure.axes] == [1, 0, 0]


def test_pictures_in_rows(world):
    gallery = CIRR(world, "val").gallery
    labels = ["first", "second", "a label that is far too long for its picture"]
    figure = show_pictures([gallery.picture(n) for n in range(3)], labels, columns=2)
    assert [len(ax.images) for ax in figure.axes] == [1, 1, 1, 0]
    assert_readable(figure)
    with pytest.raises(CalaError, match="no pictures"):
        show_pictures([])


def test_a_ranking_finds_its_rank_or_takes_the_given_one(world):
    assert Ranking(0, "is red", [4, 2, 7], target=2).rank == 2
    assert Ranking(0, "is red", [4, 2, 7], target=5).rank is None
    assert Ranking(0, "is red", [4, 2, 7], target=2, rank=1).rank == 1  # scores may tie
    ranking = Ranking(0, "is red", [4, 2, 7], [0.91, 0.62, 0.5], target=2)
    assert [ranking.missed_target(k) for k in (1, 2)] == [2, None]
    figure = draw_rankings(CIRR(world, "val").gallery, [ranking], k=2)
    assert [ax.get_xlabel() for ax in figure.axes[2:]] == ["1 · 0.91", "2 · 0.62\ntarget"]
    figure = draw_rankings(CIRR(world, "val").gallery, [ranking], k=1)
    assert figure.axes[-1].get_xlabel() == "2\ntarget"


def test_failures_begin_with_the_kind_that_fails_most(world):
    kinds = ["add", "add", "move", "size", "move"]
    assert failures([1, 9, 3, 1, 2], kinds) == [2, 1]
    assert failures([1, 9, 3, 1, 2], kinds, per_kind=2) == [2, 4, 1]
    data = CIRR(world, "val")
    kinds, order = edit_kinds(data), list(range(9))
    ranks = [1] * len(data)
    with pytest.raises(CalaError, match="no failure to show"):
        show_failures(data, ranks, [order] * len(data), kinds)
    ranks[5] = 40
    figure = show_failures(data, ranks, [order] * len(data), kinds, k=2)
    assert figure.axes[0].get_title(loc="left") == f"{kinds[5]}: the target has rank 40"


def test_ranks_of_any_form_are_the_same():
    ranks = torch.tensor([3, 1, 2])
    for given in (ranks, ranks.tolist(), pd.Series(ranks.numpy())):
        assert torch.equal(to_ranks(given), ranks)


def test_wilson_is_right_for_few_trials():
    assert wilson(5, 5) == pytest.approx((56.6, 100), abs=0.1)
    assert wilson(9, 12) == pytest.approx((46.8, 91.1), abs=0.1)


def test_curves_and_bars_are_readable_for_odd_tables():
    assert_readable(recall_curve({"a name that is rather long for a legend": [1], "b": [50, 60]}, gallery=3))
    models = {f"model {n}": [1, 2, 90] for n in range(5)}
    assert_readable(per_kind_recall(models, ["add", "remove", "a kind with a long name"]))
    assert_readable(loss_curves([dict(epoch=1, recall_at1=0.0)]))
    assert_readable(loss_curves([dict(step=n, loss=float("nan"), learning_rate=1e-6) for n in range(3)]))
    columns = ("step", "loss", "qtm", "tbia", "ctr")
    runs = {str(n): pd.DataFrame({column: range(40) for column in columns}) for n in range(7)}
    assert_readable(loss_curves(runs))


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


def test_every_loss_has_its_panel(small_log):
    terms = ["loss", "QTM loss", "TBIA loss", "CTR loss", "learning rate"]
    figure = loss_curves(small_log)
    assert titles(figure) == terms
    assert [len(ax.lines) for ax in figure.axes] == [2, 2, 2, 2, 1]  # losses with their running mean
    assert figure.axes[1].get_ylim()[1] < 5 < figure.axes[2].get_ylim()[1]
    without_tbia = small_log.assign(tbia=math.nan)
    assert titles(loss_curves(without_tbia)) == ["loss", "QTM loss", "CTR loss", "learning rate"]
    both = loss_curves({"a": small_log, "b": without_tbia})
    assert titles(both) == terms
    assert [len(ax.get_legend().get_texts()) for ax in both.axes] == [2, 2, 1, 2, 2]


def test_a_term_of_a_model_of_your_own_has_its_panel(small_log):
    log = small_log.assign(backward=small_log.ctr)  # the last column after a run was resumed with another model class
    assert titles(loss_curves(log))[-2:] == ["backward loss", "learning rate"]
    assert list_losses(log) == ["loss", "qtm", "tbia", "ctr", "backward"]
    assert list_losses(["epoch", "score", "recall_at1"]) == []


def test_recalls_of_one_run_share_a_panel():
    validations = [dict(epoch=n, recall_at1=20 * n, recall_at5=30 * n, group_recall_at1=40) for n in (1, 2)]
    figure = loss_curves(validations)
    assert titles(figure) == ["recall in the gallery, %", "recall in the group of six, %"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["R@1", "R@5"]
    assert [ax.get_xlabel() for ax in figure.axes] == ["epoch", "epoch"]
    assert figure.axes[0].get_ylim() == (0, 103)
    both = loss_curves({"a": validations, "b": validations})
    assert titles(both) == ["R@1, %", "R@5, %", "Rs@1, %"]


def test_a_log_is_a_table_or_rows_or_a_file(small_log, tmp_path):
    small_log.to_csv(tmp_path / "log.csv", index=False)
    for given in (small_log, small_log.to_dict("records"), tmp_path / "log.csv", str(tmp_path / "log.csv")):
        assert read_log(given).loss.tolist() == pytest.approx(small_log.loss.tolist())
    with pytest.raises(CalaError, match="no log nowhere"):
        read_log("nowhere/log.csv")
    with pytest.raises(CalaError, match="nothing to draw"):
        loss_curves([dict(epoch=1)])


def test_the_same_figure_is_the_same_bytes(world, tmp_path):
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        show_triplets(CIRR(world, "val"), [0]).save(tmp_path / "new" / name)
    for kind in ("svg", "png"):
        assert (tmp_path / f"new/a.{kind}").read_bytes() == (tmp_path / f"new/b.{kind}").read_bytes()
    with pytest.raises(CalaError, match=".png or .svg"):
        show_triplets(CIRR(world, "val"), [0]).save(tmp_path / "a.pdf")


def test_drawing_leaves_no_open_figure_and_no_changed_settings(world):
    before = dict(matplotlib.rcParams)
    show_triplets(CIRR(world, "val"), [0])
    with pytest.raises(CalaError):
        loss_curves([])
    assert matplotlib.pyplot.get_fignums() == [] and dict(matplotlib.rcParams) == before


def test_real_annotations_have_no_kinds_and_say_so(world):
    data = CIRR(world, "val")
    edits = json.loads((world / "drawn/edits.val.json").read_text())
    assert set(edit_kinds(data)) == set(edits.values())
    data.root = world / "nowhere"
    with pytest.raises(CalaError, match="drawn"):
        edit_kinds(data)


def test_several_edits_at_once_are_counted(world, tmp_path):
    data = CIRR(world, "val")
    data.root = tmp_path
    (tmp_path / "drawn").mkdir()
    edits = {triplet.pair_id: "colour+neck+sleeve" for triplet in data.triplets}
    (tmp_path / "drawn/edits.val.json").write_text(json.dumps(edits))
    assert set(edit_kinds(data)) == {"3 changes"}


def test_a_description_keeps_its_quotation_marks(world):
    assert 'alt="&quot;red&quot;"' in html_image(show_triplets(CIRR(world, "val"), [0]), '"red"')


def test_a_browser_finds_by_kind_and_by_words(world):
    data = CIRR(world, "val")
    kinds = edit_kinds(data)
    browser = TripletBrowser(data, kinds)
    word = data.caption(kinds.index("add")).split()[-1]
    matches = browser.find("add", word)
    assert matches and all(kinds[i] == "add" and word in data.caption(i) for i in matches)
    assert len(browser.figure().axes) == 3
    assert browser.find(text="no such word") == [] and browser.go() is None
    assert "no triplet has these words" in browser.figure().axes[0].texts[0].get_text()
    assert repr(browser) == f"TripletBrowser: 0 of {len(data)} triplets"
    matches = browser.find(text="the")
    assert [browser.go() for _ in matches] == matches[1:] + matches[:1]
    assert TripletBrowser(data).find(text="the") == matches


def test_hand_and_program_move_the_same_browser(world):
    data = CIRR(world, "val")
    browser = TripletBrowser(data, edit_kinds(data))
    keys = ["application/vnd.jupyter.widget-view+json", "image/png", "text/plain"]
    assert sorted(browser._repr_mimebundle_()) == keys
    browser.kind_menu.value = "remove"
    browser.text_box.value = "the"
    assert browser.count.value == f"1 of {len(browser.matches)}" and "<img" in browser.card.value
    browser.next.click()
    assert browser.at == 1
    browser.previous.click()
    assert browser.at == 0
    browser.find("move")
    assert (browser.kind_menu.value, browser.text_box.value) == ("move", "")
    browser.find(text="no such word")
    assert (browser.kind_menu.value, browser.count.value) == ("all", "none")


def test_a_panel_in_a_terminal_prints_lines(small_log):
    lines = []
    panel = TrainingPanel(steps=120, every=1e9, say=lines.append)
    panel.refresh()
    assert lines == ["nothing logged yet"] and "nothing" in panel.figure().axes[0].texts[0].get_text()
    panel.see(None)  # there are no queries
    panel.drawn = -math.inf
    for row in small_log.to_dict("records"):
        panel(row)
    assert len(lines) == 2  # the first row; after it a silence of `every` seconds
    panel(dict(epoch=1, recall_at1=41.7, group_recall_at1=58.3, recall_at5=70.0))
    assert len(lines) == 3 and lines[-1].startswith("step 119 of 120") and lines[-1].endswith("R@1 41.7  Rs@1 58.3")


def test_a_panel_in_a_notebook_draws(world, small_log):
    lines = []
    panel = TrainingPanel(steps=120, say=lines.append)
    assert len(panel.widget.children) == 4
    panel.rows = small_log.to_dict("records")
    panel.examples = show_triplets(CIRR(world, "val"), [0])
    panel.refresh()
    assert lines == [] and panel.progress.value == 119 and panel.line() in panel.text.value
    assert "<img" in panel.curves.value and "<img" in panel.answers.value
    assert "<img" not in TrainingPanel().widget.children[2].value


def test_a_panel_reads_the_folder_of_a_run(small_log, tmp_path):
    panel = TrainingPanel(say=lambda line: None)
    with pytest.raises(CalaError, match="no log"):
        panel.read(tmp_path)
    small_log.to_csv(tmp_path / "log.csv", index=False)
    assert len(panel.read(tmp_path).rows) == 120 and panel.validations == []
    pd.DataFrame([dict(epoch=1, recall_at1=50)]).to_csv(tmp_path / "metrics.csv", index=False)
    assert panel.read(tmp_path).validations == [dict(epoch=1, recall_at1=50)]


def test_a_panel_with_examples_does_not_change_the_run(world, tmp_path):
    vocabulary = read_vocabulary([triplet.captions[0] for triplet in CIRR(world, "train").triplets])
    sizes = dict(vocabulary=vocabulary, width=32, heads=2, layers=2)
    weights = tmp_path / "small.safetensors"
    save_backbone(make_backbone("tiny", dropout=0.1, **sizes), weights)
    recipe = dict(encoder_arch="tiny", backbone_weights=str(weights), data_root=str(world), batch_size=6)
    recipe.update(num_epochs=2, max_epoch=2)
    data, lines = CIRR(world, "val", make_backbone("tiny", **sizes).transform()), []
    panel = TrainingPanel(every=1e9, say=lines.append, dataset=data, queries=[0, 9])
    runs = []
    for name, watch in (("alone", None), ("watched", panel)):
        runs.append(train(Recipe(**recipe, output=str(tmp_path / name)), watch=watch, progress=False))
    for name in ("log.csv", "metrics.csv", "last/model.safetensors"):
        assert runs[0].output.joinpath(name).read_bytes() == runs[1].output.joinpath(name).read_bytes()
    ranks = evaluate(runs[1].model, data, progress=False).ranks["rank"]
    expected = [f"  {data.caption(i)}: the target has rank {ranks[i]:g}" for i in (0, 9)]
    assert [line for line in lines if line.startswith("  ")][-2:] == expected


def test_an_explorer_ranks_as_an_evaluation_does(world):
    data, model = open_val(world), CaLa(small_backbone())
    with pytest.raises(CalaError, match="open it with transform="):
        embed_gallery(model, CIRR(world, "val"), model.embed_gallery)
    explorer = QueryExplorer({"untrained": model}, data, k=4)
    assert explorer.features["untrained"].shape == (len(data.gallery), 32)
    assert len(explorer.candidates(3)) == len(data.gallery) - 1 and 3 not in explorer.candidates(3)
    reference = data[7]["reference"][None]
    with evaluating(model):
        features = model.embed_queries(reference, [data.caption(7)])
        scores = model.frame.scores(*features, explorer.features["untrained"])
    expected = target_ranks(scores, data.targets[[7]], exclude=data.references[[7]]).item()
    assert explorer.pick(7)["untrained"].rank == expected
    assert explorer.ask(3, "is red")["untrained"].scores != explorer.ask(3, "the a")["untrained"].scores
    assert repr(explorer) == f"QueryExplorer: {len(data.gallery)} pictures, untrained"


def test_votes_of_the_associations_are_the_training_logits(world):
    data, model = open_val(world), CaLa(small_backbone())
    targets = embed_gallery(model, data, lambda tokens: model.backbone.image(tokens).tokens)
    reference, caption = data[7]["reference"][None], data.caption(7)
    with evaluating(model):
        votes = association_votes(model, reference, caption, targets, {"TBIA", "CTR"})
        F_r, F_c, F_t, F_r_alone = model.encode(reference, [caption], data[7]["target"][None])
        z_tbia = model.tbia_scale * model.hca(F_r.tokens, F_c.tokens, F_t.tokens) @ F_r.feature.T
        z_ctr = model.ctr_scale * model.compositor(F_r_alone.tokens, F_t.tokens) @ F_c.feature.T
    assert votes["z_tbia"][data.targets[7]].item() == pytest.approx(z_tbia.item(), abs=1e-2)
    assert votes["z_ctr"][data.targets[7]].item() == pytest.approx(z_ctr.item(), abs=1e-2)


@pytest.mark.parametrize("objective", ["released", "paper"])
def test_joint_scores_are_minus_the_loss(objective):
    model = CaLa(small_backbone(), objective=objective, alpha=0.2, beta=0.3)
    z_qtm, z_tbia, z_ctr = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    scores = joint_scores(model, z_qtm, z_tbia, z_ctr)
    log_p_qtm, log_p_tbia, log_p_ctr = (z.log_softmax(-1) for z in (z_qtm, z_tbia, z_ctr))
    if objective == "paper":
        expected = log_p_qtm + 0.2 * log_p_tbia + 0.3 * log_p_ctr
    else:
        expected = 0.9 * (0.55 * z_qtm + 0.45 * z_ctr).log_softmax(-1) + 0.1 * log_p_tbia
    assert torch.allclose(scores, expected, atol=1e-6)
    assert torch.equal(joint_scores(model, z_qtm).argsort(), z_qtm.argsort())


def test_associations_vote_and_stop_voting(world):
    explorer = QueryExplorer(CaLa(small_backbone()), open_val(world))
    assert explorer.held() == {"TBIA", "CTR"}
    with pytest.raises(CalaError, match="holds QTM"):
        explorer.add("QTM")
    before, voted, after = explorer.pick(0)[""], explorer.add("TBIA", "CTR")[""], explorer.add()[""]
    assert voted.order != before.order and after.order == before.order
    assert QueryExplorer(CaLa(small_backbone(), tac_weight=0), open_val(world)).held() == {"TBIA"}


def test_hand_and_program_move_the_same_widget(world):
    models = {name: CaLa(small_backbone(seed)) for seed, name in enumerate(("one", "two"))}
    explorer = QueryExplorer(models, open_val(world), k=3)
    queries = []
    ask = explorer.ask

    def record(*query):
        queries.append(query)
        return ask(*query)

    explorer.ask = record
    assert len(explorer.widget.children) == 4
    moves = [
        lambda: setattr(explorer.triplet_slider, "value", 5),
        lambda: setattr(explorer.caption_box, "value", "is red"),
        lambda: explorer.pick(7),
        lambda: explorer.add("CTR"),
        lambda: setattr(explorer.voters["CTR"], "value", False),
        lambda: explorer.answers["two"][1].button.click(),
    ]
    for move in moves:
        queries.clear()
        move()
        assert len(queries) == 1, "one question a move"
        reference, caption = queries[0][:2]
        assert explorer.question.position == reference and explorer.caption_box.value == caption
        assert explorer.triplet_slider.value == explorer.picked
        for name, ranking in explorer.rankings.items():
            assert [button.position for button in explorer.answers[name]] == ranking.order[:3]
        assert {name for name, box in explorer.voters.items() if box.value} == explorer.added
    assert bytes(explorer.question.image.value).startswith(b"\x89PNG")


def test_the_pair_compositor_votes_with_the_features_of_the_gallery():
    backbone = make_backbone("tiny", vocabulary=["red", "blue"], width=32, heads=2, layers=2)
    model = CaLa(backbone, objective="two_way", alpha=0.0, beta=0.3).eval()
    pictures = torch.randn(5, 3, 48, 48)
    with torch.no_grad():
        gallery = backbone.image(model.tokens(pictures))
        votes = association_votes(model, pictures[:1], "red", gallery.tokens, {"CTR"}, gallery.feature)
        f_r, f_c = model.embed_queries(pictures[:1], ["red"])
        expected = model.score_pairs(f_r, f_c, gallery.feature[:1], gallery.feature[None])[0]
    torch.testing.assert_close(votes["z_ctr"], expected)
    assert votes["z_ctr"].shape == (5,) and votes["z_ctr"].std() > 0


def make_pairs_model():
    torch.manual_seed(0)
    return CaLa(small_backbone(), objective="two_way", frame_options=dict(scale=10.0)).eval()


def test_the_second_ranking_of_an_explorer_is_that_of_evaluate_again(world):
    data, model = open_val(world), make_pairs_model()
    explorer = QueryExplorer({"ours": model}, data, rerank=10, rerank_weight=20.0)
    expected = evaluate_again(Reranker(model, 10, 20.0), data, progress=False).ranks
    explorer.switch_again()
    moved = 0
    for i in range(0, len(data), 5):
        first, again = explorer.pick(i).values()
        assert again.rank == expected["rank"][i] + expected["ties"][i] / 2
        assert sorted(first.order[:10]) == sorted(again.order[:10]) and first.order[10:] == again.order[10:]
        assert [first.order[rank - 1] for rank in again.first_ranks] == again.order
        moved += first.order != again.order
    assert moved and "was" in again.label(0)
    assert list(explorer.switch_again(False)) == ["ours"]


def test_an_explorer_shows_both_orders_and_hides_the_second(world):
    models = {"ours": make_pairs_model(), "paper": CaLa(small_backbone())}
    explorer = QueryExplorer(models, open_val(world), k=3, rerank_weight=0.5)
    assert len(explorer.widget.children) == 4 and len(explorer.answer_rows.children) == 2
    explorer.again_box.value = True
    assert explorer.is_again and len(explorer.answer_rows.children) == 3
    assert list(explorer.rankings) == ["ours", "ours, ranked again", "paper"]
    for name, ranking in explorer.rankings.items():
        assert [button.position for button in explorer.answers[name]] == ranking.order[:3]
    assert "ours, ranked again" in explorer.titles["ours, ranked again"].value
    assert "was" in explorer.answers["ours, ranked again"][0].text.value
    assert "ours, ranked again" in [text for text, _ in texts(explorer.figure())]
    explorer.again_box.value = False
    assert len(explorer.answer_rows.children) == 2 and not explorer.is_again


def test_an_explorer_refuses_a_second_ranking_that_is_impossible(world):
    with pytest.raises(CalaError, match="load a checkpoint trained with --ctr pairs"):
        QueryExplorer(CaLa(small_backbone()), open_val(world), rerank_weight=0.5)
    explorer = QueryExplorer(make_pairs_model(), open_val(world))
    with pytest.raises(CalaError, match="cala-validate --rerank 20 chooses a weight"):
        explorer.switch_again()
    assert explorer.widget is not None and explorer.again_box.disabled

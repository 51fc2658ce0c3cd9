"Figures: nothing cut off, nothing overlapping, whatever the captions and the pictures; bytes that do not change; errors in one line."
import json

import matplotlib
import matplotlib.pyplot
import pandas as pd
import pytest
from PIL import Image

matplotlib.use("Agg")

from cala.errors import CalaError
from cala.data import CIRR
from cala.encoders import make_backbone
from cala.encoders import read_vocabulary
from cala.encoders import save_backbone
from cala.model import CaLa
from cala.retrieval import evaluate
from cala.library.show.widgets import QueryExplorer
from cala.library.show.cards import Ranking
from cala.library.show.panel import TrainingPanel
from cala.library.show.cards import draw_rankings
from cala.library.show.curves import edit_kinds
from cala.library.show.curves import loss_curves
from cala.library.show.curves import per_kind_recall
from cala.library.show.curves import recall_curve
from cala.library.show.cards import show_triplet
from cala.library.show.cards import show_triplets
from cala.recipe import Recipe
from cala.library.run import train
from cala.library.worlds.scenes import draw_cirr

CAPTIONS = ["is red", "costs $5 and not $10", "größer, 大きい", "word " * 150, "w" * 400, "", "two\nlines"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return draw_cirr(tmp_path_factory.mktemp("world"), train=2, val=8, test1=2)


def texts(fig):
    "Every text that a figure draws, with its box in pixels."
    drawn, original = [], matplotlib.text.Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.text.Text, "draw", lambda self, renderer: (drawn.append(self), original(self, renderer))[1])
        fig.draw_without_rendering()
    return [(t.get_text(), t.get_window_extent()) for t in dict.fromkeys(drawn) if t.get_visible() and t.get_text().strip()]


def assert_readable(fig):
    boxes, page = texts(fig), fig.bbox
    for text, box in boxes:
        assert box.x0 > page.x0 - 1 and box.x1 < page.x1 + 1 and box.y0 > page.y0 - 1 and box.y1 < page.y1 + 1, f"{text[:40]!r} is cut off"
    for i, (text, box) in enumerate(boxes):
        for other, further in boxes[:i]:
            wide, high = min(box.x1, further.x1) - max(box.x0, further.x0), min(box.y1, further.y1) - max(box.y0, further.y0)
            assert min(wide, high) < 1.5, f"{text[:40]!r} overlaps {other[:40]!r}"
    for ax in fig.axes:
        if legend := ax.get_legend(): assert not ax.bbox.padded(-1).overlaps(legend.get_window_extent()), "a line may run through the names"


@pytest.mark.parametrize("caption", CAPTIONS)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_caption_fits_its_card_and_its_ranking(world, caption):
    data = CIRR(world, "val")
    data.triplets = [t.__class__(t.reference, (caption,), t.target, t.pair_id, t.group) for t in data.triplets]
    assert_readable(show_triplets(data, [0, 1], members=True))
    rows = [Ranking(0, caption, range(10), [12345.678] * 10, target, rank, "a note") for target, rank in ((3, None), (20, 1234), (20, None))]
    assert_readable(draw_rankings(data.gallery, rows, k=4))


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (2500, 1800), (3, 3)])
def test_a_picture_of_any_shape_stays_in_its_box(world, tmp_path, size):
    data = CIRR(world, "val")
    data.gallery.root = None
    Image.new("RGB", size, "teal").save(tmp_path / "odd.png")
    data.gallery.paths[0] = tmp_path / "odd.png"
    data.triplets[0] = data.triplets[0].__class__(data.gallery.names[0], ("is teal",), data.gallery.names[1], "0")
    fig = show_triplet(data, 0)
    assert_readable(fig)
    assert len(fig.axes[0].images) == 1 and max(fig.axes[0].images[0].get_array().shape[:2]) <= 256


def test_a_missing_picture_is_named(world):
    data = CIRR(world, "val")
    data.gallery.paths[data.references[0]] = world / "dev" / "gone.png"
    with pytest.raises(CalaError, match="gone.png"): show_triplet(data, 0)


def test_unlabelled_triplets_leave_the_target_empty(world):
    fig = show_triplet(CIRR(world, "test1"), 0)
    assert [len(ax.images) for ax in fig.axes] == [1, 0, 0]


def test_curves_and_bars_are_readable_for_odd_tables():
    assert_readable(recall_curve({"a name that is rather long for a legend": [1], "b": [50, 60]}, gallery=3))
    assert_readable(per_kind_recall({f"model {n}": [1, 2, 90] for n in range(5)}, ["add", "remove", "a kind with a long name"]))
    assert_readable(loss_curves([dict(epoch=1, recall_at1=0.0)]))
    assert_readable(loss_curves([dict(step=n, loss=float("nan"), learning_rate=1e-6) for n in range(3)]))
    runs = {str(n): pd.DataFrame(dict(step=range(40), loss=range(40), qtm=range(40), tbia=range(40), ctr=range(40))) for n in range(7)}
    assert_readable(loss_curves(runs))


def test_the_same_figure_is_the_same_bytes(world, tmp_path):
    for name in ("a.svg", "b.svg", "a.png", "b.png"): show_triplet(CIRR(world, "val"), 0, save=tmp_path / "new" / name)
    for kind in ("svg", "png"): assert (tmp_path / f"new/a.{kind}").read_bytes() == (tmp_path / f"new/b.{kind}").read_bytes()
    with pytest.raises(CalaError, match=".png or .svg"): show_triplet(CIRR(world, "val"), 0, save=tmp_path / "a.pdf")


def test_drawing_leaves_no_open_figure_and_no_changed_settings(world):
    before = dict(matplotlib.rcParams)
    show_triplet(CIRR(world, "val"), 0)
    with pytest.raises(CalaError): loss_curves([])
    assert matplotlib.pyplot.get_fignums() == [] and dict(matplotlib.rcParams) == before


def test_real_annotations_have_no_kinds_and_say_so(world):
    data = CIRR(world, "val")
    assert set(edit_kinds(data)) == set(json.loads((world / "drawn/edits.val.json").read_text()).values())
    data.root = world / "nowhere"
    with pytest.raises(CalaError, match="drawn"): edit_kinds(data)


def test_a_panel_with_examples_does_not_change_the_run(world, tmp_path):
    vocabulary = read_vocabulary([triplet.captions[0] for triplet in CIRR(world, "train").triplets])
    save_backbone(make_backbone("tiny", vocabulary=vocabulary, width=32, heads=2, layers=2, dropout=0.1), tmp_path / "small.safetensors")
    recipe = dict(encoder_arch="tiny", backbone_weights=str(tmp_path / "small.safetensors"), data_root=str(world), batch_size=6, num_epochs=2, max_epoch=2)
    seen, said = CIRR(world, "val", make_backbone("tiny", vocabulary=vocabulary, width=32, heads=2, layers=2).transform()), []
    panel = TrainingPanel(every=1e9, say=said.append, dataset=seen, queries=[0, 9])
    runs = [train(Recipe(**recipe, output=str(tmp_path / name)), watch=watch, progress=False) for name, watch in (("alone", None), ("watched", panel))]
    for name in ("log.csv", "metrics.csv", "last/model.safetensors"): assert runs[0].output.joinpath(name).read_bytes() == runs[1].output.joinpath(name).read_bytes()
    ranks = evaluate(runs[1].model, seen, progress=False).ranks["rank"]
    assert [line for line in said if line.startswith("  ")][-2:] == [f"  {seen.caption(i)}: the target has rank {ranks[i]}" for i in (0, 9)]


def test_hand_and_program_move_the_same_widget(world):
    seen = CIRR(world, "val", make_backbone("tiny", vocabulary=["a"], width=32, heads=2, layers=2).transform())
    explorer = QueryExplorer({name: CaLa(make_backbone("tiny", vocabulary=["a"], width=32, heads=2, layers=2, seed=seed)) for seed, name in enumerate(("one", "two"))}, seen, k=3)
    asked, plain = [], QueryExplorer.ask
    explorer.ask = lambda *query: (asked.append(query), plain(explorer, *query))[1]
    explorer.widget
    del asked[:]
    for act in (lambda: setattr(explorer.number, "value", 5), lambda: setattr(explorer.words, "value", "is red"), lambda: explorer.pick(7), lambda: explorer.add("CTR"),
                lambda: setattr(explorer.voters["CTR"], "value", False), lambda: explorer.answers["two"][1].button.click()):
        act()
        assert len(asked) == 1, "one question a move"
        (reference, sentence, *_), = asked
        shown = {name: [cell.position for cell in cells] for name, cells in explorer.answers.items()}
        assert explorer.question.position == reference and explorer.words.value == sentence and explorer.number.value == explorer.picked
        assert shown == {name: ranking.order[:3] for name, ranking in explorer.rankings.items()}
        assert {name for name, box in explorer.voters.items() if box.value} == explorer.added
        del asked[:]

"""Ranks, metrics and submission files, against slow and plain versions of themselves."""

import json
import os
import subprocess
import sys
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cala.composition import Artemis, Combiner, Sum
from cala.data import CIRR, FashionIQ
from cala.encoders import make_backbone
from cala.errors import CalaError
from cala.library.gallery import top_k
from cala.library.submission import check_cirr_submission, submission_faults, write_cirr_submission
from cala.library.worlds.garments import draw_fashioniq
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa
from cala.retrieval import (
    chance,
    cirr_metrics,
    embed,
    evaluate,
    fashioniq_metrics,
    measure,
    rank_queries,
    rank_table,
    target_ranks,
)


def problem(seed, Q=37, N=53, ties=False):
    "Scores, references, targets and groups, all drawn; a group holds its reference and its target."
    random = np.random.default_rng(seed)
    scores = (
        random.integers(0, 6, (Q, N)).astype("float32") if ties else random.standard_normal((Q, N)).astype("float32")
    )
    groups = np.stack([random.permutation(N)[:6] for _ in range(Q)])
    places = np.stack([random.permutation(6)[:2] for _ in range(Q)])
    references, targets = groups[np.arange(Q), places[:, 0]], groups[np.arange(Q), places[:, 1]]
    return [torch.from_numpy(x) for x in (scores, references, targets, groups)]


def slow_rank(row, target, candidates):
    "Sort the candidates, best first, the target before its equals; look where it is."
    ordered = sorted(candidates, key=lambda n: (-float(row[n]), n != target))
    return ordered.index(target) + 1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_those_of_plain_python_sorting(seed, ties):
    scores, references, targets, groups = problem(seed, ties=ties)
    rows = list(zip(scores, references.tolist(), targets.tolist(), groups.tolist()))
    everything = range(scores.shape[1])
    assert target_ranks(scores, targets).tolist() == [slow_rank(s, t, everything) for s, r, t, g in rows]
    left_out = [slow_rank(s, t, [n for n in everything if n != r]) for s, r, t, g in rows]
    assert target_ranks(scores, targets, references).tolist() == left_out
    ranks = rank_table(scores, targets, references, groups)
    assert ranks.rank.tolist() == left_out
    assert ranks.group.tolist() == [slow_rank(s, t, [n for n in g if n != r]) for s, r, t, g in rows]
    equals = [sum(bool(s[n] == s[t]) for n in everything if n not in (t, r)) for s, r, t, g in rows]
    assert ranks.ties.tolist() == equals


def test_metrics_equal_the_released_programs_way_of_sorting_names():
    scores, references, targets, groups = problem(1, Q=200, N=90)
    names = np.array([f"dev-{i}" for i in range(90)])
    ranked = names[np.argsort(-scores.numpy(), axis=1)]
    others = ranked[ranked != names[references.numpy()][:, None]].reshape(200, 89)  # the reference removed
    hits = others == names[targets.numpy()][:, None]
    members = np.stack([[n for n in row if n in set(names[g])] for row, g in zip(others, groups.numpy())])
    near = members == names[targets.numpy()][:, None]
    expected = {f"recall_at{k}": 100 * hits[:, :k].sum() / 200 for k in (1, 5, 10, 50)}
    expected |= {f"group_recall_at{k}": 100 * near[:, :k].sum() / 200 for k in (1, 2, 3)}
    assert cirr_metrics(scores, references, targets, groups) == pytest.approx(expected)
    whole = ranked == names[targets.numpy()][:, None]
    assert fashioniq_metrics(scores, targets) == pytest.approx(
        {f"recall_at{k}": 100 * whole[:, :k].sum() / 200 for k in (10, 50)}
    )


def test_an_excluded_column_never_counts_whatever_it_scores():
    scores, references, targets, _ = problem(2)
    expected = target_ranks(scores, targets, references)
    for value in (1e9, -1e9, float("inf"), float("-inf")):
        changed = scores.scatter(1, references[:, None], value)
        assert torch.equal(target_ranks(changed, targets, references), expected)


def test_nan_is_refused_and_infinities_are_not():
    scores, references, targets, groups = problem(3)
    scores[0, 0], scores[1, 1] = float("inf"), float("-inf")
    target_ranks(scores, targets)
    scores[5, 7] = float("nan")
    for call in (lambda: target_ranks(scores, targets), lambda: cirr_metrics(scores, references, targets, groups)):
        with pytest.raises(CalaError, match="1 of 1,961 scores are NaN"):
            call()


def test_half_precision_scores_rank_like_their_float_values():
    scores, references, targets, _ = problem(4)
    half = scores.half()
    assert torch.equal(target_ranks(half, targets, references), target_ranks(half.float(), targets, references))


FRAMES = {
    "sum": Sum,
    "artemis": lambda: Artemis(16),
    "combiner": lambda: Combiner(16, projection_dim=32, hidden_dim=64),
}


@pytest.mark.parametrize("name", FRAMES)
def test_chunked_ranks_and_top_k_equal_the_whole_table(name):
    torch.manual_seed(0)
    frame, (_, references, targets, groups) = FRAMES[name](), problem(5, Q=40, N=300)
    reference, text, gallery = torch.randn(40, 16), torch.randn(40, 16), torch.randn(300, 16)
    with torch.no_grad():
        scores = frame.eval().scores(reference, text, gallery)
    frame.train()  # dropout must not matter
    for held in (90, 3000, 2**26):
        ranks = rank_queries(frame, reference, text, gallery, targets, references, groups, held=held)
        assert torch.equal(ranks.rank, target_ranks(scores, targets, references))
        assert torch.equal(ranks.group, rank_table(scores, targets, references, groups).group)
        best = top_k(frame, reference, text, gallery, 7, exclude=references, held=held)
        assert torch.equal(best.positions, scores.scatter(1, references[:, None], -torch.inf).topk(7).indices)
    assert frame.training


class Peak(TorchDispatchMode):
    "The most bytes that tensors made inside the block held at one moment."

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.holders = 0, 0, Counter()

    def drop(self, key, size):
        self.holders[key] -= 1
        self.live -= 0 if self.holders[key] else size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor):
                continue
            key, size = t.untyped_storage()._cdata, t.untyped_storage().nbytes()
            if key in given and not self.holders[key]:
                continue  # was there before
            self.live += 0 if self.holders[key] else size
            self.holders[key] += 1
            self.peak = max(self.peak, self.live)
            weakref.finalize(t, self.drop, key, size)
        return out


def peak_of(work):
    with Peak() as peak:
        work()
    return peak.peak


@pytest.mark.parametrize("name", FRAMES)
def test_memory_grows_neither_with_queries_times_pictures_nor_with_the_gallery(name):
    held, made, peaks = 2**13, torch.Generator().manual_seed(0), {}
    frame = FRAMES[name]()
    for Q, N in ((50, 4_000), (200, 16_000)):  # 16 times the table
        reference, text, gallery = (torch.randn(n, 16, generator=made) for n in (Q, Q, N))
        positions = torch.randint(N, (Q, 2), generator=made)
        features = reference, text, gallery
        peaks[Q] = [
            peak_of(lambda: rank_queries(frame, *features, positions[:, 0], positions[:, 1], held=held)),
            peak_of(lambda: top_k(frame, *features, 20, exclude=positions[:, 1], held=held)),
        ]
    for small, large in zip(*peaks.values()):
        assert large < 10 * 4 * held < 4 * 50 * 4_000  # some tiles; even the smaller table is larger
        assert large < 2 * small  # with 4 times the queries and 16 times the table


IN_LITTLE_MEMORY = """
import sys, torch
from resource import RLIMIT_DATA, setrlimit
from cala.composition import make_frame
from cala.library.gallery import top_k
from cala.retrieval import rank_queries, target_ranks
name, how = sys.argv[1:]
torch.manual_seed(0)
frame, targets = make_frame(name, 16).eval(), torch.arange(2500)
gallery, ask = torch.randn(100_000, 16).half(), torch.randn(2500, 16)
frame.scores(ask[:9], ask[:9], gallery[:9])  # makes threads and buffers of the library
now = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
setrlimit(RLIMIT_DATA, (now + 400 * 10**6,) * 2)
with torch.no_grad():
    if how == "table":
        target_ranks(frame.scores(ask, ask, gallery), targets)
    else:
        assert len(rank_queries(frame, ask, ask, gallery, targets).rank) == 2500
        assert len(top_k(frame, ask, ask, gallery, 50).positions) == 2500
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on private memory is Linux's")
@pytest.mark.parametrize("name", ["sum", "artemis"])
@pytest.mark.parametrize("how", ["table", "tiles"])
def test_a_process_that_may_not_hold_the_table_ranks_without_it(name, how):
    "A table of 1 GB, and 0.4 GB of memory: the table is refused, so the limit holds; ranks and the first 50 are ranks."
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, name, how],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if how == "table":
        assert done.returncode == 1 and "allocate memory" in done.stderr, done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_a_long_gallery_ranks_like_the_whole_table():
    N, Q, d, held = 30_000, 200, 8, 2**16  # tiles of 200 queries and 327 pictures
    reference, text, gallery = torch.randn(Q, d), torch.randn(Q, d), torch.randn(N, d)
    targets, references = torch.randperm(N)[: 2 * Q].view(2, Q)
    ranks, best = (
        call(Sum(), reference, text, gallery, held=held, **more)
        for call, more in (
            (rank_queries, dict(targets=targets, exclude=references)),
            (top_k, dict(k=50, exclude=references)),
        )
    )
    scores = Sum().scores(reference, text, gallery)
    bar = scores.gather(1, targets[:, None])
    near = [
        1 + (scores.scatter(1, references[:, None], -torch.inf) > bar + margin).sum(1) for margin in (1e-3, -1e-3)
    ]  # rounding may swap neighbours
    assert (ranks.rank >= near[0]).all() and (ranks.rank <= near[1]).all() and (ranks.ties <= near[1] - near[0]).all()
    assert torch.allclose(best.scores, scores.scatter(1, references[:, None], -torch.inf).topk(50).values, atol=1e-3)


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("held", [500, 2**14, 2**26])
def test_twins_tie_however_the_table_is_cut(name, held):
    made = torch.Generator().manual_seed(0)
    half, ask = torch.randn(150, 16, generator=made), torch.randn(60, 16, generator=made)
    ranks = rank_queries(FRAMES[name](), ask, ask, torch.cat([half, half]), torch.arange(60), held=held)
    assert (ranks.ties == 1).all()


def test_a_collapsed_model_ties_everywhere_however_the_table_is_cut():
    for held in (500, 2**26):
        ranks = rank_queries(
            Sum(),
            torch.ones(20, 16),
            torch.ones(20, 16),
            torch.ones(300, 16),
            torch.arange(20),
            torch.arange(20) + 20,
            held=held,
        )
        assert (ranks.rank == 1).all() and (ranks.ties == 298).all()


def test_nan_in_any_tile_is_refused():
    gallery = torch.randn(300, 16)
    gallery[299, 0] = torch.nan
    for held in (500, 2**26):
        with pytest.raises(CalaError, match="are NaN"):
            rank_queries(Sum(), *torch.randn(2, 20, 16), gallery, torch.arange(20), held=held)


def test_artemis_ranks_half_precision_features_whose_squares_overflow_it():
    torch.manual_seed(0)
    frame, reference, text, gallery = (
        Artemis(64).eval(),
        400 * torch.randn(30, 64),
        10 * torch.randn(30, 64),
        400 * torch.randn(500, 64),
    )
    targets, (reference, text, gallery) = torch.arange(30), (x.half() for x in (reference, text, gallery))
    assert (
        gallery.square().isinf().any() and (frame.explicit(text.float()).softmax(-1).half().square() == 0).any()
    )  # what half alone would do
    with torch.no_grad():
        double = Artemis(64).double().eval()
        double.load_state_dict(frame.state_dict())
        exact = double.scores(reference.double(), text.double(), gallery.double())
    for held in (2000, 2**26):
        with torch.autocast("cpu", torch.bfloat16):
            ranks = rank_queries(frame, reference, text, gallery, targets, held=held)
        assert (ranks.rank - target_ranks(exact, targets)).abs().max() <= 1  # float32 may swap neighbours


def test_a_gallery_on_disk_ranks_like_one_in_memory(tmp_path):
    gallery = np.memmap(tmp_path / "gallery", "float16", "w+", shape=(20_000, 8))
    gallery[:] = np.random.default_rng(0).standard_normal((20_000, 8))
    ask, targets = torch.randn(5, 8), torch.arange(5)
    a = rank_queries(Sum(), ask, ask, gallery, targets, held=40_000)
    b = rank_queries(Sum(), ask, ask, torch.tensor(np.array(gallery)), targets, held=2**26)
    assert torch.equal(a.rank, b.rank)


@pytest.fixture(scope="module")
def crowd():
    made = torch.Generator().manual_seed(0)
    return torch.randn(40, 16, generator=made)[torch.randint(40, (3000,), generator=made)] + 0.5 * torch.randn(
        3000, 16, generator=made
    )


def test_an_exact_index_of_faiss_equals_ours(crowd):
    pytest.importorskip("faiss")
    from cala.library.gallery import FaissGallery

    ask, left_out = crowd[:50] + 0.1, torch.arange(50)
    for frame in (Sum(), FRAMES["combiner"]().eval()):
        ours, of_index = (
            top_k(frame, ask, ask, gallery, 10, exclude=left_out) for gallery in (crowd, FaissGallery(crowd))
        )
        assert (
            torch.allclose(ours.scores, of_index.scores, atol=1e-3)
            and (ours.positions == of_index.positions).float().mean() > 0.99
        )
        assert not (of_index.positions == left_out[:, None]).any()
    assert top_k(
        Sum(), ask, ask, FaissGallery(crowd[:5].half().numpy()), 10, exclude=torch.zeros(50).long()
    ).positions.shape == (50, 4)


def test_an_approximate_index_finds_most_and_all_if_it_looks_everywhere(crowd, tmp_path):
    pytest.importorskip("faiss")
    from cala.library.gallery import FaissGallery

    ask, truth = crowd[:200] + 0.1, top_k(Sum(), crowd[:200] + 0.1, crowd[:200] + 0.1, crowd, 10).positions
    FaissGallery(crowd, "IVF16,Flat").save(tmp_path / "index")

    def share(nprobe):
        index = FaissGallery.load(tmp_path / "index", nprobe)
        positions = top_k(Sum(), ask, ask, index, 10).positions
        return (positions[:, :, None] == truth[:, None]).any(2).float().mean()

    assert 0.5 < share(1) < share(4) and share(16) > 0.999


def test_what_an_index_cannot_do_is_one_line(crowd, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    from cala.library.gallery import FaissGallery

    ask, index = crowd[:3], FaissGallery(crowd)
    with pytest.raises(CalaError, match="no inner product"):
        top_k(Artemis(16), ask, ask, index)
    with pytest.raises(CalaError, match="cannot choose among"):
        top_k(Sum(), ask, ask, index, among=torch.zeros(3, 2).long())
    with pytest.raises(CalaError, match="a rank counts every picture"):
        rank_queries(Sum(), ask, ask, index, torch.arange(3))
    (tmp_path / "bad").write_bytes(b"nonsense")
    with pytest.raises(CalaError, match="is no FAISS index"):
        FaissGallery.load(tmp_path / "bad")
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(CalaError, match="pip install faiss-cpu"):
        FaissGallery(crowd)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    draw_cirr(root, train=1, val=10, test1=10, size=32)
    draw_fashioniq(root, train=1, val=12, test=2, size=32)
    return root


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    words = "make the a red blue star circle smaller larger move it left sleeves longer".split()
    return CaLa(make_backbone("tiny", vocabulary=words, width=32, heads=2, layers=2)).train()


def open_cirr(world, model, split):
    return CIRR(world, split, model.backbone.transform("targetpad", 1.25))


def test_embedding_sends_each_picture_through_the_trunk_once(world, model):
    val, seen = open_cirr(world, model, "val"), []
    hook = model.backbone.trunk.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        embed(model, val, batch_size=16, progress=False)
        assert sum(seen) == len(val.gallery)
        seen.clear()
        embed(model, val, batch_size=16, keep=0, progress=False)
        assert sum(seen) == len(val.gallery) + len(val.references.unique())
    finally:
        hook.remove()


def test_embeddings_do_not_depend_on_batches_memory_workers_or_cached_tokens(world, model):
    val, modes = open_cirr(world, model, "val"), [part.training for part in model.modules()]
    first = embed(model, val, batch_size=64, progress=False)
    others = [
        embed(model, val, batch_size=7, progress=False),
        embed(model, val, batch_size=7, keep=0, workers=1, progress=False),
    ]
    with torch.no_grad():
        val.pictures = [model.eval().tokens(val.gallery[i][None])[0] for i in range(len(val.gallery))]
    others.append(embed(model.train(), val, progress=False))
    for other in others:
        for a, b in zip(first, other):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert model.training and [part.training for part in model.modules()] == modes


def test_evaluation_is_the_plain_loop_over_queries(world, model):
    val = open_cirr(world, model, "val")
    result = evaluate(model, val, progress=False)
    model.eval()
    with torch.no_grad():
        gallery = model.embed_gallery(torch.stack([val.gallery[i] for i in range(len(val.gallery))]))
        for row, triplet in zip(result.ranks.to_dict("records"), val.triplets):
            ask = model.embed_queries(val.gallery[val.gallery.position(triplet.reference)][None], [triplet.captions[0]])
            scores = dict(zip(val.gallery.names, model.frame.scores(*ask, gallery)[0].tolist()))
            rank = 1 + sum(s > scores[triplet.target] + 1e-3 for n, s in scores.items() if n != triplet.reference)
            assert (row["pair_id"], row["reference"], row["target"]) == (
                triplet.pair_id,
                triplet.reference,
                triplet.target,
            )
            assert (
                rank
                <= row["rank"]
                <= 1
                + sum(
                    s > scores[triplet.target] - 1e-3
                    for n, s in scores.items()
                    if n not in (triplet.reference, triplet.target)
                )
            )
    model.train()
    assert result["gallery"] == len(val.gallery) and result["queries"] == len(val) and result["missing"] == 0
    seven = [result[k] for k in result if k.startswith(("recall", "group_recall"))]
    assert len(seven) == 7 and result["mean"] == pytest.approx(sum(seven) / 7)
    assert result["recall_at10"] == pytest.approx(100 * (result.ranks["rank"] <= 10).mean())
    json.dumps(result)


def test_fashioniq_is_ranked_a_category_at_a_time_under_a_named_protocol(world, model):
    transform = model.backbone.transform("targetpad", 1.25)
    for protocol in ("original", "val"):
        together = evaluate(model, FashionIQ(world, "val", ("dress", "toptee"), transform, protocol), progress=False)
        apart = [FashionIQ(world, "val", (c,), transform, protocol) for c in ("dress", "toptee")]
        assert evaluate(model, apart, progress=False) == pytest.approx(together)
        assert together["protocol"] == protocol and together["dress_gallery"] == len(apart[0].gallery)
        assert together["recall_at10"] == pytest.approx(
            (together["dress_recall_at10"] + together["toptee_recall_at10"]) / 2
        )
        assert together["mean"] == pytest.approx((together["recall_at10"] + together["recall_at50"]) / 2)
    with pytest.raises(CalaError, match="no published targets"):
        evaluate(model, FashionIQ(world, "test", ("dress",), transform))


def test_missing_pictures_stop_an_evaluation_or_are_counted_in_its_result(tmp_path, model):
    root = draw_cirr(tmp_path, train=1, val=4, test1=1, size=32)
    gone = sorted(root.rglob("dev-*.png"))[0]
    gone.unlink()
    with pytest.raises(CalaError, match=r"1 of 24 pictures .* cala-check"):
        evaluate(model, open_cirr(root, model, "val"), progress=False)
    with pytest.warns(UserWarning, match="1 of 24"):
        val = CIRR(root, "val", model.backbone.transform("targetpad", 1.25), allow_missing=True)
    result = evaluate(model, val, progress=False)
    assert (result["missing"], result["gallery"], result["queries"]) == (1, 23, len(val))


def test_chance_is_what_random_scores_reach(world, model):
    val = open_cirr(world, model, "val")
    random = [
        cirr_metrics(torch.rand(len(val), len(val.gallery)), val.references, val.targets, val.groups)
        for _ in range(200)
    ]
    for key in random[0]:
        assert chance(val)[key] == pytest.approx(sum(r[key] for r in random) / 200, abs=1.5)


def test_a_collapsed_model_reaches_chance_and_its_ties_are_reported(world, model):
    "Constant features: every recall is that of guessing, although no picture scores higher than a target."
    val = open_cirr(world, model, "val")
    embedded = embed(model, val, progress=False)
    embedded = embedded._replace(gallery=embedded.gallery[:1].expand_as(embedded.gallery))
    with pytest.warns(UserWarning, match="in 60 of 60 queries other pictures have exactly the target's score"):
        result = measure(Sum(), embedded, val)
    guessed = chance(val)
    for key in guessed:
        assert result[key] == pytest.approx(guessed[key]), key
    assert result["ties"] == len(val)
    assert (result["lowest_recall_at1"], result["highest_recall_at1"]) == (0, 100)
    assert (result["lowest_group_recall_at1"], result["highest_mean"]) == (0, 100)
    others = len(val.gallery) - 2
    assert (result.ranks["ties"] == others).all()
    assert (result.ranks["higher"] == 0).all()
    assert (result.ranks["rank"] == 1 + others / 2).all()
    assert (result.ranks["group_rank"] == 3).all()


def test_a_model_that_collapses_in_training_is_not_the_best(world, model):
    val = open_cirr(world, model, "val")
    embedded = embed(model, val, progress=False)
    learned = embedded._replace(reference=embedded.gallery[val.targets], text=torch.zeros_like(embedded.text))
    collapsed = learned._replace(gallery=torch.ones_like(embedded.gallery))
    with pytest.warns(UserWarning, match="collapsed"):
        assert measure(Sum(), collapsed, val)["mean"] < measure(Sum(), learned, val)["mean"]


def mean_over_orders(scores, targets, k, exclude=None, times=400):
    "The recall at k where a sort with random numbers decides between tied pictures, as a mean over many sorts."
    random = torch.Generator().manual_seed(0)
    if exclude is not None:
        scores = scores.scatter(1, exclude[:, None], -torch.inf)
    _, level = scores.unique(return_inverse=True)
    total = 0
    for _ in range(times):
        order = level + torch.rand(scores.shape, generator=random)
        rank = 1 + (order > order.gather(1, targets[:, None])).sum(1)
        total += (rank <= k).double().mean()
    return 100 * float(total) / times


@pytest.mark.parametrize("seed", range(3))
def test_tied_pictures_count_as_the_mean_over_their_orders(seed):
    scores, references, targets, groups = problem(seed, Q=120, ties=True)
    metrics = cirr_metrics(scores, references, targets, groups)
    assert len(metrics) == 7
    for k in (1, 5, 10, 50):
        assert metrics[f"recall_at{k}"] == pytest.approx(mean_over_orders(scores, targets, k, references), abs=1)
    fashion = fashioniq_metrics(scores, targets)
    for k in (10, 50):
        assert fashion[f"recall_at{k}"] == pytest.approx(mean_over_orders(scores, targets, k), abs=1)
    members = scores.gather(1, groups)
    column = (groups == targets[:, None]).nonzero()[:, 1]
    left_out = (groups == references[:, None]).nonzero()[:, 1]
    for k in (1, 2, 3):
        expected = mean_over_orders(members, column, k, left_out)
        assert metrics[f"group_recall_at{k}"] == pytest.approx(expected, abs=1.5)


def test_every_seventh_picture_has_a_twin(world, model):
    "A target with a twin counts half where only the order of the two decides."
    val = open_cirr(world, model, "val")
    embedded = embed(model, val, progress=False)
    twinned = embedded.gallery.clone()
    twinned[1::7] = twinned[::7][: len(twinned[1::7])]
    embedded = embedded._replace(gallery=twinned)
    result = measure(Sum(), embedded, val)
    table = result.ranks
    assert set(table["ties"]) == {0, 1} and result["ties"] == (table["ties"] == 1).sum() > 0
    assert (table["rank"] == 1 + table["higher"] + table["ties"] / 2).all()
    for prefix, at in (("", (1, 5, 10, 50)), ("group_", (1, 2, 3))):
        for k in at:
            best = 100 * (table[f"{prefix}higher"] < k).mean()
            worst = 100 * (table[f"{prefix}higher"] + table[f"{prefix}ties"] < k).mean()
            key = f"{prefix}recall_at{k}"
            assert result[key] == pytest.approx((best + worst) / 2)
            bounds = (worst, best) if best - worst > 0.05 else (None, None)
            assert (result.get(f"lowest_{key}"), result.get(f"highest_{key}")) == bounds


def test_without_ties_a_result_has_no_bounds_and_recalls_count_ranks(world, model):
    val = open_cirr(world, model, "val")
    result = evaluate(model, val, progress=False)
    assert result["ties"] == 0 and not [key for key in result if key.startswith(("lowest", "highest"))]
    for k in (1, 5, 10, 50):
        assert result[f"recall_at{k}"] == pytest.approx(100 * (result.ranks["rank"] <= k).mean())


@pytest.fixture
def submission(world, model, tmp_path):
    test1 = open_cirr(world, model, "test1")
    return test1, write_cirr_submission(model.frame, embed(model, test1, progress=False), test1, tmp_path, "x")


def test_submission_files_are_accepted_and_agree_with_the_ranking(submission):
    test1, (recall, subset) = submission
    assert (recall.name, subset.name) == ("recall_submission_x.json", "recall_subset_submission_x.json")
    for path, metric, k in ((recall, "recall", 50), (subset, "recall_subset", 3)):
        content = json.loads(path.read_text())
        assert content.pop("version") == "rc2" and content.pop("metric") == metric
        assert set(content) == {t.pair_id for t in test1.triplets} and {len(v) for v in content.values()} == {k}
        check_cirr_submission(path, test1)


DEFECTS = {
    "pair ids are missing": lambda c, t: c.pop(t.pair_id),
    "keys are no pair id": lambda c, t: c.update({"999999": c[t.pair_id]}),
    "does not name": lambda c, t: c[t.pair_id].pop(),
    "a picture is named twice": lambda c, t: c[t.pair_id].__setitem__(0, c[t.pair_id][1]),
    "the reference is named": lambda c, t: c[t.pair_id].__setitem__(0, t.reference),
    "a picture is not in the split": lambda c, t: c[t.pair_id].__setitem__(0, "dev-0-0-img0"),
    "the answer is no list of names": lambda c, t: c.update({t.pair_id: "test1-0-0-img0"}),
    "version is 'rc1'": lambda c, t: c.update(version="rc1"),
    "metric is None": lambda c, t: c.pop("metric"),
}


@pytest.mark.parametrize("metric", [0, 1])
@pytest.mark.parametrize("fault", DEFECTS)
def test_the_checker_names_each_defect_of_a_submission(submission, fault, metric):
    test1, paths = submission
    content = json.loads(paths[metric].read_text())
    DEFECTS[fault](content, test1.triplets[3])
    paths[metric].write_text(json.dumps(content))
    with pytest.raises(CalaError, match=fault):
        check_cirr_submission(paths[metric], test1)


def test_the_checker_names_a_stranger_in_a_subset_a_key_twice_a_large_file_and_a_file_that_is_none(
    submission, tmp_path
):
    test1, (recall, subset) = submission
    content, triplet = json.loads(subset.read_text()), test1.triplets[0]
    content[triplet.pair_id][0] = next(n for n in test1.gallery.names if n not in triplet.group)
    subset.write_text(json.dumps(content))
    assert submission_faults(subset, test1) == [
        f"a picture is outside the group (1 query, the first is {triplet.pair_id})"
    ]
    text = recall.read_text()
    recall.write_text(text[:-1] + ',"version":"rc2"}')
    assert submission_faults(recall, test1) == ["keys are there more than once: 1, the first is version"]
    recall.write_text(text + " " * 5_000_000)
    assert "the server takes 5,000,000" in submission_faults(recall, test1)[0]
    for bad in ("", "[]", "{", '{"version": "rc2"}'):
        recall.write_text(bad)
        assert submission_faults(recall, test1)
    with pytest.raises(CalaError, match="cannot be read"):
        check_cirr_submission(tmp_path / "none.json", test1)


def test_a_submission_of_the_published_size_is_under_the_servers_limit():
    names = [f"test1-{i}-{i % 4}-img{i % 2}" for i in range(2315)]
    content = {"version": "rc2", "metric": "recall"} | {
        str(12000 + q): [names[(q + i) % 2315] for i in range(50)] for q in range(4148)
    }
    assert len(json.dumps(content, separators=(",", ":"))) < 4_500_000


def test_a_data_set_that_is_too_small_for_a_submission_says_so(world, model, tmp_path):
    root = draw_cirr(tmp_path, train=1, val=1, test1=5, size=32)
    test1 = open_cirr(root, model, "test1")
    with pytest.raises(CalaError, match="50 pictures for each query, and test1 has 30"):
        write_cirr_submission(model.frame, embed(model, test1, progress=False), test1, tmp_path)

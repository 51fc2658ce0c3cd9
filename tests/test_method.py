"""The method against its formulas, computed the slow way: explicit Python loops over every index, in float64."""

import copy
import math

import pytest
import torch

from cala.associations import HingeCrossAttention, TwinAttentionCompositor
from cala.composition import Artemis, Combiner, Sum, frames, make_frame
from cala.contrast import association_logits, contrast
from cala.errors import CalaError
from cala.library.released import artemis_from_released, combiner_from_released, hca_from_released, tac_from_released
from cala.objectives import paper, released

EXACT = dict(atol=1e-5, rtol=0)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def randomised(module):
    "In float64 and evaluation mode, with every parameter random: biases that start at zero would hide a mistake."
    module = module.double().eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def dot(x, y):
    return sum(a * b for a, b in zip(x.tolist(), y.tolist()))


def unit(x):
    return x / math.sqrt(dot(x, x))


def affine(layer, x):
    return torch.stack([torch.tensor(dot(w, x), dtype=x.dtype) + b for w, b in zip(layer.weight, layer.bias)]).detach()


def softmax(xs):
    exps = [math.exp(x - max(xs)) for x in xs]
    return [e / sum(exps) for e in exps]


def cross_entropy(z):
    return sum(math.log(sum(math.exp(x) for x in row)) - row[i] for i, row in enumerate(z.tolist())) / len(z)


# ---------------------------------------------------------------- composition


def test_sum_is_a_hundred_cosines_of_reference_plus_text():
    r, c, t = rand(4, 6), rand(4, 6), rand(5, 6)
    slow = [[100 * dot(unit(r[i] + c[i]), unit(t[j])) for j in range(5)] for i in range(4)]
    torch.testing.assert_close(Sum().scores(r, c, t), torch.tensor(slow, dtype=r.dtype), **EXACT)


def artemis_slow(frame, r, m, t):
    "The two scores as ARTEMIS writes them, pair by pair."

    def mlp(layers, x):
        return affine(layers[2], affine(layers[0], x).clamp_min(0))

    def score(i, j):
        a_em, a_is = (
            torch.tensor(softmax(mlp(x, m[i]).tolist()), dtype=m.dtype) for x in (frame.explicit, frame.implicit)
        )
        em = dot(unit(affine(frame.transform, m[i])), unit(a_em * t[j]))
        return em + dot(unit(a_is * r[i]), unit(a_is * t[j]))

    return torch.tensor([[score(i, j) for j in range(len(t))] for i in range(len(m))], dtype=m.dtype)


@pytest.mark.parametrize("learned", [False, True])
def test_artemis_equals_the_loop_with_and_without_temperature(learned):
    frame = randomised(Artemis(8, learned_temperature=learned))
    r, m, t = rand(4, 8), rand(4, 8), rand(6, 8)
    slow = artemis_slow(frame, r, m, t) * (math.exp(frame.temperature.item()) if learned else 1)
    torch.testing.assert_close(frame.scores(r, m, t).detach(), slow, **EXACT)


def test_artemis_temperature_starts_at_2_65926_and_learns_only_if_applied():
    for learned in (False, True):
        frame = Artemis(8, learned_temperature=learned)
        assert frame.temperature.shape == (1,) and abs(frame.temperature.item() - 2.65926) < 1e-6
        frame.scores(*torch.randn(3, 4, 8)).sum().backward()
        assert (frame.temperature.grad is not None) == learned


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_artemis_in_half_precision_is_finite_and_near_the_float32_score(dtype):
    frame = Artemis(768)
    for name in ("explicit", "implicit"):
        getattr(frame, name)[2].weight.data.mul_(30)  # sharp attention, squares far below half's smallest
    r, m, t = 50 * torch.randn(3, 8, 768)  # raw features whose squares overflow half
    r, m, t = (x.to(dtype) for x in (r, m, t))
    true = copy.deepcopy(frame).double().scores(*(x.double() for x in (r, m, t)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = frame.scores(r, m, t)
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got.double(), true, atol=1e-3, rtol=0)


def test_artemis_gradients_are_finite_for_a_zero_target():
    frame = Artemis(8)
    r, m, t = torch.randn(3, 4, 8)
    t[0] = 0
    t.requires_grad_()
    scores = frame.scores(r, m, t)
    assert scores.isfinite().all() and (scores[:, 0] == 0).all()
    scores.sum().backward()
    assert all(p.grad.isfinite().all() for p in frame.parameters() if p.grad is not None) and t.grad.isfinite().all()


def test_combiner_equals_its_formula():
    frame = randomised(Combiner(4, 6, 10))
    r, c, t = rand(3, 4), rand(3, 4), rand(5, 4)

    def query(i):
        both = torch.cat(
            [
                affine(frame.text_projection_layer, c[i]).clamp_min(0),
                affine(frame.image_projection_layer, r[i]).clamp_min(0),
            ]
        )
        head = affine(frame.dynamic_scalar[3], affine(frame.dynamic_scalar[0], both).clamp_min(0))
        share = 1 / (1 + math.exp(-head.item()))
        return unit(
            affine(frame.output_layer, affine(frame.combiner_layer, both).clamp_min(0))
            + share * c[i]
            + (1 - share) * r[i]
        )

    slow = [[100 * dot(query(i), unit(t[j])) for j in range(5)] for i in range(3)]
    torch.testing.assert_close(frame.scores(r, c, t).detach(), torch.tensor(slow, dtype=r.dtype), **EXACT)


def test_combiner_default_widths_are_the_seeds_for_d_640_and_scale_with_d():
    with torch.device("meta"):
        frame = Combiner(640)
    assert (frame.text_projection_layer.out_features, frame.combiner_layer.out_features) == (2560, 5120)
    assert Combiner(16).output_layer.in_features == 128


def test_combiner_drops_half_only_in_training():
    frame, x = Combiner(16), torch.randn(3, 5, 16)
    assert not torch.equal(frame.train().scores(*x), frame.scores(*x))
    assert torch.equal(frame.eval().scores(*x), frame.scores(*x))


@pytest.mark.parametrize("name", list(frames))
def test_a_gallery_scored_in_pieces_gives_the_same_logits(name):
    frame, r, c, t = randomised(make_frame(name, 8)), rand(4, 8), rand(4, 8), rand(23, 8)
    pieces = torch.cat([frame.scores(r, c, piece) for piece in t.split(5)], dim=1)
    torch.testing.assert_close(pieces, frame.scores(r, c, t), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make_frame("tirg", 8), "sum, artemis, combiner"),
        (lambda: make_frame("artemis", 8, hidden_dim=3), "takes no hidden_dim"),
        (lambda: make_frame("combiner", 8, projection_dim=-3), "--projection-dim -3"),
    ],
)
def test_a_wrong_frame_or_option_gets_one_line(call, message):
    with pytest.raises(CalaError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# --------------------------------------------------------------- associations


def hca_slow(m, r, c, t, mask):
    "Row 0 of softmax(A A') V, one triplet; only real words are summed over."
    d = r.shape[-1]
    q = [affine(m.query, x) for x in r]
    k = [affine(m.key_text, x) for x, real in zip(c, mask) if real]
    k2, v = [affine(m.key_target, x) for x in t], [affine(m.value, x) for x in t]
    A = [[dot(x, y) / math.sqrt(d) for y in k] for x in q]
    A2 = [[dot(x, y) / math.sqrt(d) for y in k2] for x in k]
    product = [[sum(A[i][w] * A2[w][j] for w in range(len(k))) for j in range(len(t))] for i in range(len(r))]
    P = [softmax(row) for row in product]
    return sum(P[0][j] * v[j] for j in range(len(t)))


@pytest.mark.parametrize("masked", [False, True])
def test_hca_equals_the_formula_with_and_without_mask(masked):
    hca = randomised(HingeCrossAttention(6))
    r, c, t = rand(3, 4, 6), rand(3, 5, 6), rand(3, 7, 6)  # token counts differ
    mask = (
        torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool() if masked else torch.ones(3, 5).bool()
    )
    slow = torch.stack([hca_slow(hca, *x) for x in zip(r, c, t, mask)])
    torch.testing.assert_close(hca(r, c, t, mask if masked else None).detach(), slow, **EXACT)
    torch.testing.assert_close((hca.maps(r, c, t, mask)["P"] @ hca.value(t))[:, 0].detach(), slow, **EXACT)


def test_hca_with_mask_does_not_depend_on_the_batch_and_its_gradient_neither():
    hca = randomised(HingeCrossAttention(6))
    r, c, t, longer = rand(1, 4, 6), rand(1, 3, 6), rand(1, 7, 6), rand(1, 5, 6)

    def of(text, mask):
        hca.zero_grad()
        out = hca(r, text, t, mask)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in hca.parameters())]

    padded = of(torch.cat([c, longer], 1), torch.tensor([[True] * 3 + [False] * 5]))
    for a, b in zip(of(c, None), padded):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert not torch.allclose(of(torch.cat([c, longer], 1), None)[0], padded[0], atol=1e-3)  # as released


def test_hca_drops_attention_by_its_rate_only_in_training():
    hca = randomised(HingeCrossAttention(6, dropout=0.5))
    r, c, t = rand(1, 4, 6), rand(1, 5, 6), rand(1, 7, 6)
    without_dropout = hca(r, c, t).detach()
    assert torch.equal(hca(r, c, t), without_dropout)
    many = hca.train()(*(x.expand(4000, -1, -1) for x in (r, c, t))).detach()
    assert not torch.allclose(many[0], without_dropout[0])
    torch.testing.assert_close(
        many.mean(0), without_dropout[0], atol=5 * many.std(0).max().item() / math.sqrt(4000), rtol=0
    )


def attention_slow(M, asks, tokens):
    d = asks.shape[-1]
    (wq, wk, wv), (bq, bk, bv) = (x.detach().chunk(3) for x in (M.in_proj_weight, M.in_proj_bias))

    def linear(w, b, x):
        return torch.tensor([dot(row, x) for row in w], dtype=x.dtype) + b

    k, v = [linear(wk, bk, x) for x in tokens], [linear(wv, bv, x) for x in tokens]
    rows = []
    for x in asks:
        p = softmax([dot(linear(wq, bq, x), y) / math.sqrt(d) for y in k])
        rows.append(affine(M.out_proj, sum(a * y for a, y in zip(p, v))))
    return torch.stack(rows)


def tac_slow(tac, r, t):
    if tac.class_token is not None:
        r, t = (torch.cat([tac.class_token[0].detach(), x]) for x in (r, t))
    o1, o2 = t, r
    for _ in range(4):
        o1 = attention_slow(tac.reference_as_query_attention, r, o1)
        o2 = attention_slow(tac.target_as_query_attention, t, o2)
    return (o1[0] + o2[0]) / 2


@pytest.mark.parametrize("class_token", [False, True])
def test_tac_equals_four_passes_of_each_twin(class_token):
    tac = randomised(TwinAttentionCompositor(6, class_token=class_token))
    r, t = rand(3, 4, 6), rand(3, 5, 6)  # token counts differ
    slow = torch.stack([tac_slow(tac, *x) for x in zip(r, t)])
    torch.testing.assert_close(tac(r, t).detach(), slow, **EXACT)
    torch.testing.assert_close(tac.train()(r, t), tac.eval()(r, t), atol=1e-12, rtol=0)  # no dropout


def test_tac_class_token_is_learned_and_not_drawn_again():
    tac, r, t = TwinAttentionCompositor(6, class_token=True), torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    assert torch.equal(tac(r, t), tac(r, t))
    tac(r, t).sum().backward()
    assert tac.class_token.grad.abs().sum() > 0 and "class_token" in tac.state_dict()


def test_tac_maps_are_those_of_its_forward():
    tac, r, t = randomised(TwinAttentionCompositor(6)), rand(2, 4, 6), rand(2, 5, 6)
    maps = tac.maps(r, t)
    assert [m.shape for m in maps["reference"]] == [(2, 4, 5)] + 3 * [(2, 4, 4)]
    assert [m.shape for m in maps["target"]] == [(2, 5, 4)] + 3 * [(2, 5, 5)]
    first = tac.reference_as_query_attention(r, t, t)[1]
    torch.testing.assert_close(maps["reference"][0], first, atol=1e-12, rtol=0)


def test_parameter_counts_at_768():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert count(TwinAttentionCompositor(768)) == 4_724_736
        assert count(HingeCrossAttention(768)) == 2_362_368


# ------------------------------------------------------------ released weights


def released_state(shapes):
    return {k: torch.randn(*s) for k, s in shapes.items()}


def linear_shapes(**layers):
    return {f"{n}.{p}": s for n, (o, i) in layers.items() for p, s in (("weight", (o, i)), ("bias", (o,)))}


HCA = linear_shapes(**{f"{n}{bank}": (8, 8) for bank in (1, 2) for n in ("query_ref", "key_text", "key_tar", "value")})
TAC = {
    f"{n}_as_query_attention.{k}": s
    for n in ("reference", "target")
    for k, s in (
        ("in_proj_weight", (24, 8)),
        ("in_proj_bias", (24,)),
        ("out_proj.weight", (8, 8)),
        ("out_proj.bias", (8,)),
    )
}
ARTEMIS = {"temperature": (1,)} | linear_shapes(
    **{
        n: (8, 8)
        for n in (
            "Transform_m.0",
            "Attention_EM.attention.0",
            "Attention_EM.attention.2",
            "Attention_IS.attention.0",
            "Attention_IS.attention.2",
        )
    }
)
COMBINER = linear_shapes(
    **{
        "text_projection_layer": (12, 8),
        "image_projection_layer": (12, 8),
        "combiner_layer": (20, 24),
        "output_layer": (8, 20),
        "dynamic_scalar.0": (20, 24),
        "dynamic_scalar.3": (1, 20),
    }
)
FROM_RELEASED = dict(
    hca=hca_from_released, tac=tac_from_released, artemis=artemis_from_released, combiner=combiner_from_released
)
RELEASED = dict(
    hca=(HingeCrossAttention, HCA),
    tac=(TwinAttentionCompositor, TAC),
    artemis=(Artemis, ARTEMIS),
    combiner=(Combiner, COMBINER),
)


@pytest.mark.parametrize("name", RELEASED)
def test_released_weights_load_without_one_left_at_its_start(name):
    cls, shapes = RELEASED[name]
    state = released_state(shapes)
    module = FROM_RELEASED[name](state)
    used = [v for k, v in state.items() if k not in module.left_out]
    ours = list(module.state_dict().values())
    assert len(used) == len(ours) and all(any(a.shape == b.shape and torch.equal(a, b) for b in used) for a in ours)
    assert bool(module.left_out) == (name == "hca") and all("2." in k for k in module.left_out)


def test_released_hca_uses_its_first_bank_by_the_right_names():
    state = released_state(HCA)
    hca = hca_from_released(state)
    for ours, released_name in dict(
        query="query_ref1", key_text="key_text1", key_target="key_tar1", value="value1"
    ).items():
        assert torch.equal(getattr(hca, ours).weight, state[released_name + ".weight"]) and torch.equal(
            getattr(hca, ours).bias, state[released_name + ".bias"]
        )


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("harm", ["missing", "extra", "shape", "foreign", "empty"])
def test_released_weights_that_do_not_fit_are_refused_in_one_line(name, harm):
    cls, shapes = RELEASED[name]
    state = released_state(shapes)
    if harm == "missing":
        state.pop(list(state)[3])
    if harm == "extra":
        state["fc1.weight"] = torch.ones(8, 8)  # the released CLIP variants have it
    if harm == "shape":
        state[list(state)[3]] = torch.ones(3, 2)
    if harm == "foreign":
        state = released_state(RELEASED["tac" if name != "tac" else "hca"][1])
    if harm == "empty":
        state = {}
    with pytest.raises(CalaError, match=cls.__name__ if harm in ("missing", "extra") else "give the file") as error:
        FROM_RELEASED[name](state)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ objectives


@pytest.mark.parametrize("w_tbia, w_ctr", [(0.1, 0.45), (0.1, 0), (0, 0.45), (0, 0), (0.3, 1), (1, 0.3), (1, 1)])
def test_released_objective_mixes_logits_then_takes_the_cross_entropy(w_tbia, w_ctr):
    z_qtm, z_tbia, z_ctr = rand(3, 5, 5)
    z = torch.tensor([[w_ctr * z_ctr[i, j] + (1 - w_ctr) * z_qtm[i, j] for j in range(5)] for i in range(5)])
    slow = w_tbia * cross_entropy(z_tbia) + (1 - w_tbia) * cross_entropy(z)
    assert abs(released(z_qtm, z_tbia, z_ctr, w_tbia, w_ctr).item() - slow) < 1e-5


@pytest.mark.parametrize("w_tbia, w_ctr", [(0.1, 0.1), (0, 0), (1, 0), (0, 2.0)])
def test_paper_objective_adds_the_cross_entropies(w_tbia, w_ctr):
    z_qtm, z_tbia, z_ctr = rand(3, 5, 5)
    slow = cross_entropy(z_qtm) + w_tbia * cross_entropy(z_tbia) + w_ctr * cross_entropy(z_ctr)
    assert abs(paper(z_qtm, z_tbia, z_ctr, w_tbia, w_ctr).item() - slow) < 1e-5


@pytest.mark.parametrize("objective", [released, paper])
def test_an_association_left_out_is_an_association_of_weight_zero(objective):
    z_qtm, z_tbia, z_ctr = rand(3, 5, 5)
    assert torch.equal(objective(z_qtm, None, None), contrast(z_qtm))
    for given in [(None, z_ctr), (z_tbia, None), (None, None)]:
        zero = {name: 0.0 for name, z in zip(("w_tbia", "w_ctr"), given) if z is None}
        with_zero = objective(z_qtm, z_tbia, z_ctr, **zero)
        torch.testing.assert_close(objective(z_qtm, *given), with_zero, atol=1e-12, rtol=0)


@pytest.mark.parametrize("normalise", [False, True])
def test_association_logits_are_scaled_dot_products(normalise):
    left, right = rand(4, 6), rand(5, 6)
    slow = [[7 * (dot(unit(x), unit(y)) if normalise else dot(x, y)) for y in right] for x in left]
    torch.testing.assert_close(
        association_logits(left, right, scale=7.0, normalise=normalise), torch.tensor(slow, dtype=left.dtype), **EXACT
    )


def test_association_logits_stay_finite_under_half_precision():
    raw = (60 * torch.randn(2, 4, 768)).half()  # their dot products exceed 65504
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = association_logits(*raw)
    assert z.dtype == torch.float32 and z.isfinite().all()


@pytest.mark.parametrize(
    "objective, wrong, flag",
    [
        (released, dict(w_ctr=45), "--tac-weight"),
        (released, dict(w_tbia=-0.1), "--hca-weight"),
        (paper, dict(w_tbia=-1), "--alpha"),
        (paper, dict(w_ctr=math.nan), "--beta"),
    ],
)
def test_a_weight_out_of_range_gets_one_line(objective, wrong, flag):
    with pytest.raises(CalaError, match=flag) as error:
        objective(*rand(3, 5, 5), **wrong)
    assert "\n" not in str(error.value)

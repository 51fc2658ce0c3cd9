"Files of the released program and of CLIP4Cir, {'epoch': int, <class name>: weights}, read without executing them."

import io

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cala.backbones.clip import find_architecture, open_model, shrink
from cala.encoders import make_backbone
from cala.errors import CalaError
from cala.library.released import load_released, read_released
from cala.model import CaLa
from cala.qformer import QFormer
from hostile import BOMBS, Bomb

DIM = 64


# The released modules under the names of their weights, written anew from their formulas.


class HingebasedCrossAttentionBLIP2(nn.Module):
    def __init__(self, dim=DIM):
        super().__init__()
        for bank in "12":
            for name in ("query_ref", "key_text", "key_tar", "value"):
                setattr(self, name + bank, nn.Linear(dim, dim))

    def forward(self, reference, text, target):
        links = self.query_ref1(reference) @ self.key_text1(text).transpose(1, 2) / DIM**0.5
        bridge = self.key_text1(text) @ self.key_tar1(target).transpose(1, 2) / DIM**0.5
        return ((links @ bridge).softmax(-1) @ self.value1(target))[:, 0]


class TwinAttentionCompositorBLIP2(nn.Module):
    def __init__(self, dim=DIM):
        super().__init__()
        self.reference_as_query_attention = nn.MultiheadAttention(dim, 1, batch_first=True)
        self.target_as_query_attention = nn.MultiheadAttention(dim, 1, batch_first=True)

    def forward(self, reference, target):
        there, back = target, reference
        for _ in range(4):
            there = self.reference_as_query_attention(reference, there, there)[0]
            back = self.target_as_query_attention(target, back, back)[0]
        return (there[:, 0] + back[:, 0]) / 2


class Attention(nn.Module):
    def __init__(self, dim=DIM):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.Softmax(dim=1))


class Artemis(nn.Module):
    def __init__(self, dim=DIM):
        super().__init__()
        self.Transform_m, self.Attention_EM, self.Attention_IS = (
            nn.Sequential(nn.Linear(dim, dim)),
            Attention(),
            Attention(),
        )
        self.temperature = nn.Parameter(torch.tensor([2.65926]))

    def forward(self, reference, text, targets):
        explicit, implicit = self.Attention_EM.attention(text), self.Attention_IS.attention(text)
        wanted = F.normalize(self.Transform_m(text), dim=-1)
        rows = [
            (
                wanted * F.normalize(explicit * target, dim=-1)
                + F.normalize(implicit * reference, dim=-1) * F.normalize(implicit * target, dim=-1)
            ).sum(-1)
            for target in targets
        ]
        return torch.stack(rows, 1)


class Combiner(nn.Module):
    def __init__(self, dim=DIM, projection=48, hidden=80):
        super().__init__()
        self.text_projection_layer, self.image_projection_layer = nn.Linear(dim, projection), nn.Linear(dim, projection)
        self.combiner_layer, self.output_layer = nn.Linear(2 * projection, hidden), nn.Linear(hidden, dim)
        self.dynamic_scalar = nn.Sequential(
            nn.Linear(2 * projection, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, 1), nn.Sigmoid()
        )

    def forward(self, reference, text, targets):
        both = torch.cat([self.text_projection_layer(text).relu(), self.image_projection_layer(reference).relu()], -1)
        share = self.dynamic_scalar(both)
        query = self.output_layer(self.combiner_layer(both).relu()) + share * text + (1 - share) * reference
        return 100 * F.normalize(query, dim=-1) @ F.normalize(targets, dim=-1).T


def save(path, module, name=None, **beside):
    "As the released program does: the class's name is the key."
    torch.save({"epoch": 7, name or type(module).__name__: module.state_dict(), **beside}, path)
    return path


def tokens(*lengths):
    return [torch.randn(4, length, DIM) for length in lengths]


def features():
    return torch.randn(4, DIM), torch.randn(4, DIM), torch.randn(9, DIM)


@pytest.mark.parametrize(
    "released, inputs",
    [
        (HingebasedCrossAttentionBLIP2, lambda: tokens(32, 9, 32)),
        (TwinAttentionCompositorBLIP2, lambda: tokens(32, 32)),
        (Artemis, features),
        (Combiner, features),
    ],
)
def test_a_released_module_computes_the_same_from_its_file(tmp_path, released, inputs):
    torch.manual_seed(0)
    expected, given = released().eval(), inputs()
    ours = load_released(save(tmp_path / "saved.pt", expected)).eval()
    torch.testing.assert_close(getattr(ours, "scores", ours)(*given), expected(*given), atol=1e-5, rtol=1e-5)


def test_a_released_blip2_is_read_with_its_trunk_and_heads_left_out(tmp_path):
    torch.manual_seed(0)
    expected = QFormer(
        width=128, layers=3, heads=2, queries=5, vision_width=40, vocabulary=60, positions=20, dropout=0.0
    ).eval()
    rest = {
        "visual_encoder.conv1.weight": torch.ones(4, 3, 2, 2),
        "Qformer.cls.predictions.bias": torch.ones(60),
        "vision_proj.weight": torch.ones(8, 128),
        "text_proj.weight": torch.ones(8, 128),
        "itm_head.weight": torch.ones(2, 128),
        "temp": torch.ones([]),
    }
    torch.save({"epoch": 2, "Blip2Qformer": {**expected.state_dict(), **rest}}, tmp_path / "blip2_visual.pt")
    ours, picture = load_released(tmp_path / "blip2_visual.pt").eval(), torch.randn(2, 6, 40)
    ids, mask = torch.randint(1, 60, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    for given, want in (
        (ours.image(picture), expected.image(picture)),
        (ours.text(ids, mask), expected.text(ids, mask)),
        (ours.query(picture, ids, mask), expected.query(picture, ids, mask)),
    ):
        torch.testing.assert_close(given, want)


def test_a_tuned_clip_and_its_combiner_rank_as_clip4cir_ranks(tmp_path):
    torch.manual_seed(0)
    architecture = dict(shrink(find_architecture("RN50x4")), quick_gelu=True)
    clip, combiner = open_model("RN50x4", architecture, {}), Combiner().eval()
    save(tmp_path / "tuned_clip_best.pt", clip, "CLIP")
    save(tmp_path / "combiner.pt", combiner)

    model = CaLa(
        make_backbone("clip", weights=tmp_path / "tuned_clip_best.pt", architecture=architecture),
        tac_weight=0.0,
        hca_weight=0.0,
    )
    model.frame = load_released(tmp_path / "combiner.pt")
    model.eval()
    references, targets, captions = (
        torch.randn(3, 3, 96, 96),
        torch.randn(5, 3, 96, 96),
        ["make it red", "two stars", "longer sleeves"],
    )
    with torch.no_grad():
        ours = model.frame.scores(*model.embed_queries(references, captions), model.embed_gallery(targets))
        expected = combiner(
            clip.encode_image(references), clip.encode_text(open_clip.tokenize(captions)), clip.encode_image(targets)
        )
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def test_name_and_weights_come_out_of_the_file(tmp_path):
    module = Artemis()
    name, state = read_released(save(tmp_path / "artemis.pt", module))[:2]
    assert name == "Artemis" and all(torch.equal(state[key], tensor) for key, tensor in module.state_dict().items())


def as_clip(module, extra):
    "State of a module as the released program's CLIP class saves it, with one layer more."
    layer = {f"{extra}.weight": torch.randn(DIM, 4 * DIM), f"{extra}.bias": torch.randn(DIM)}
    return {"epoch": 7, type(module).__name__.replace("BLIP2", "CLIP"): module.state_dict() | layer}


@pytest.mark.parametrize(
    "released, extra", [(HingebasedCrossAttentionBLIP2, "fc1"), (TwinAttentionCompositorBLIP2, "fc")]
)
def test_a_module_trained_on_scrambled_tokens_needs_the_switch(tmp_path, released, extra):
    torch.manual_seed(0)
    blip2 = released().eval()
    torch.save(as_clip(blip2, extra), tmp_path / "clip.pt")
    with pytest.raises(CalaError, match="scrambled_tokens=True") as error:
        load_released(tmp_path / "clip.pt")
    assert "\n" not in str(error.value)
    ours = load_released(tmp_path / "clip.pt", scrambled_tokens=True)
    as_blip2 = load_released(save(tmp_path / "blip2.pt", blip2))
    weights = ours.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in as_blip2.state_dict().items())
    assert {name for name in ours.left_out if name.startswith("fc")} == {f"{extra}.weight", f"{extra}.bias"}
    assert set(weights) - set(as_blip2.state_dict()) == ({"class_token"} if extra == "fc" else set())


# What is not such a file

BESIDE = {
    "beside whole weights": lambda bomb, path, key: torch.save({"epoch": bomb, key: Combiner().state_dict()}, path)
}


@pytest.mark.parametrize("form", BOMBS | BESIDE)
def test_a_file_that_would_execute_code_is_refused_and_nothing_runs(tmp_path, form):
    (BOMBS | BESIDE)[form](Bomb(tmp_path / "exploded"), tmp_path / "combiner.pt", "Combiner")
    with pytest.raises(CalaError) as error:
        load_released(tmp_path / "combiner.pt")
    assert "combiner.pt" in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "exploded").exists()


def test_a_whole_module_instead_of_its_weights_is_refused(tmp_path):
    torch.save({"epoch": 1, "Linear": nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(CalaError, match="module.pt"):
        load_released(tmp_path / "module.pt")


def file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


STATE = Combiner().state_dict()
OTHERS = {
    "empty": b"",
    "words": b"hello world",
    "page": b"<html>404</html>",
    "zip": b"PK\x03\x04nothing",
    "half": file({"epoch": 1, "Combiner": STATE})[:3000],
    "list": file([STATE]),
    "nothing": file({}),
    "epoch alone": file({"epoch": 3}),
    "bare weights": file(STATE),
    "tensor": file(torch.ones(3)),
    "two classes": file({"epoch": 1, "Combiner": STATE, "Artemis": STATE}),
    "another class": file({"epoch": 1, "Bert": STATE}),
    "a number as class": file({"epoch": 1, 5: STATE}),
    "the clip side": file({"epoch": 1, "TwinAttentionCompositorCLIP": STATE}),
    "empty weights": file({"epoch": 1, "Combiner": {}}),
    "weights of another": file({"epoch": 1, "Artemis": STATE}),
    "one missing": file({"epoch": 1, "Combiner": {key: STATE[key] for key in list(STATE)[1:]}}),
    "one too many": file({"epoch": 1, "Combiner": {**STATE, "fc1.weight": torch.ones(3)}}),
    "another shape": file({"epoch": 1, "Combiner": {**STATE, "output_layer.bias": torch.ones(3)}}),
    "a scalar for a matrix": file({"epoch": 1, "Combiner": {**STATE, "combiner_layer.weight": torch.ones([])}}),
    "no tensors": file({"epoch": 1, "Artemis": {"Transform_m.0.weight": 3}}),
    "a name that is no text": file({"epoch": 1, "Artemis": {3: torch.ones(3)}}),
    "a layer without a number": file(
        {"epoch": 1, "Blip2Qformer": {"Qformer.bert.encoder.layer.x.weight": torch.ones(3)}}
    ),
    "half a qformer": file(
        {
            "epoch": 1,
            "Blip2Qformer": {
                "query_tokens": torch.ones(1, 4, 64),
                "Qformer.bert.embeddings.word_embeddings.weight": torch.ones(9, 64),
            },
        }
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_file_is_one_line_with_its_name(tmp_path, kind):
    (tmp_path / "given.pt").write_bytes(OTHERS[kind])
    with pytest.raises(CalaError) as error:
        load_released(tmp_path / "given.pt")
    assert "given.pt" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    for place in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(CalaError, match="no file"):
            load_released(place)


def test_a_tuned_clip_is_no_module_of_ours(tmp_path):
    torch.save({"epoch": 1, "CLIP": {"logit_scale": torch.ones([])}}, tmp_path / "tuned_clip_best.pt")
    with pytest.raises(CalaError, match="holds a CLIP"):
        load_released(tmp_path / "tuned_clip_best.pt")

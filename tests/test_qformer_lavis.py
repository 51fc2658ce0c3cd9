"The Q-Former of cala.qformer against LAVIS's, at full size, with random weights and without network."

import pytest
import torch

from cala.backbones.blip2 import load_lavis_state
from cala.errors import CalaError
from cala.qformer import QFormer
from lavis_helpers import VOCABULARY, Stub, allow_float64, features, lavis_model, needs_lavis

pytestmark = needs_lavis
CAPTIONS = ["make the star red and remove the circle", "two stars"]
MODES = "image", "text", "multimodal"


@pytest.fixture(scope="module")
def lavis(tmp_path_factory):
    "LAVIS's Blip2Qformer at full size: 12 layers, 768, 32 queries; every tensor random, so that none can hide."
    return lavis_model(tmp_path_factory.mktemp("lavis"), Stub(1024))


@pytest.fixture(scope="module")
def ours(lavis):
    "Our Q-Former with LAVIS's weights, and what was dropped of them."
    qformer = QFormer(vocabulary=len(VOCABULARY) + 1).eval()
    qformer.dropped = load_lavis_state(qformer, lavis.state_dict())
    return qformer


def same_memory(ours, lavis):
    "Ours, on the very tensors of LAVIS: two copies in float64 and their gradients would fill 6 GB."
    ours.load_state_dict(
        {name: tensor for name, tensor in lavis.state_dict().items() if name not in ours.dropped}, assign=True
    )
    return ours


@pytest.fixture
def double(lavis, ours, monkeypatch):
    "Both in float64."
    allow_float64(monkeypatch)
    yield lavis.double(), same_memory(ours, lavis)
    monkeypatch.undo()
    same_memory(ours, lavis.float())


def both(lavis, ours, mode):
    "(B, L, 768) of LAVIS and of ours."
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(lavis.query_tokens.dtype)
    tokens, words = lavis.visual_encoder(images), lavis.tokenizer(CAPTIONS, return_tensors="pt", padding=True)
    expected = features(lavis, mode, images, CAPTIONS)
    if mode == "image":
        return expected, ours.image(tokens)
    if mode == "text":
        return expected, ours.text(words.input_ids, words.attention_mask)
    return expected, ours.query(tokens, words.input_ids, words.attention_mask)


@pytest.mark.parametrize("mode", MODES)
def test_embeddings_equal_those_of_lavis_in_float32(lavis, ours, mode):
    with torch.no_grad():
        expected, result = both(lavis, ours, mode)
    assert expected.shape == result.shape and expected.std() > 0.1
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_embeddings_and_gradients_equal_those_of_lavis_in_float64(double, mode):
    lavis, ours = double
    expected, result = both(lavis, ours, mode)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=0)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=result.dtype)
    for model, out in ((lavis, expected), (ours, result)):
        model.zero_grad(set_to_none=True)
        (out * direction).sum().backward()
    wanted, compared = dict(lavis.named_parameters()), 0
    for name, parameter in ours.named_parameters():
        grad = wanted[name].grad
        if parameter.grad is None:
            assert grad is None or not grad.any(), name
            continue  # LAVIS's zeros are our None
        assert (parameter.grad - grad).abs().max() <= 1e-10, name
        compared += bool(grad.any())
    assert compared > 150
    if mode == "text":
        assert wanted["Qformer.bert.embeddings.word_embeddings.weight"].grad[0].any()  # padding learns: no padding_idx
    for model in double:
        model.zero_grad(set_to_none=True)


def test_every_tensor_of_lavis_is_used_or_named_as_dropped(lavis, ours):
    assert {*ours.state_dict(), *ours.dropped} == {*lavis.state_dict()}
    assert all(
        name.startswith(("visual_encoder.", "Qformer.cls.", "vision_proj.", "text_proj.", "itm_head.", "temp"))
        or name.endswith("position_ids")
        for name in ours.dropped
    )


def test_parameter_count_is_that_of_lavis_less_what_was_dropped(lavis, ours):
    "But for the language-model head's matrix, which LAVIS ties to the word embeddings."

    def count(named):
        return sum(parameter.numel() for name, parameter in named if name not in ours.dropped)

    assert count(ours.named_parameters()) == count(lavis.named_parameters())


def test_weights_of_another_size_are_refused_by_name(lavis):
    with torch.device("meta"):
        small = QFormer(layers=2, vocabulary=len(VOCABULARY) + 1)
    with pytest.raises(CalaError, match="not of this model: .*layer"):
        load_lavis_state(small, lavis.state_dict())
    with torch.device("meta"):
        wide = QFormer(vision_width=1408, vocabulary=len(VOCABULARY) + 1)
    with pytest.raises(CalaError, match="of another shape: .*crossattention"):
        load_lavis_state(wide, lavis.state_dict())


def test_dropout_acts_in_training_and_not_in_evaluation(ours):
    tokens = torch.randn(1, 17, 1024)
    with torch.no_grad():
        assert torch.equal(ours.image(tokens), ours.image(tokens))
        assert not torch.equal(ours.train().image(tokens), ours.image(tokens))
    ours.eval()

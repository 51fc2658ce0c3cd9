"""Every backbone of this project keeps the contract; each check finds a backbone that breaks its promise."""

import pytest
import torch

from cala.backbones.contract import (
    BrokenPromise,
    check_backbone,
    check_batches,
    check_config,
    check_gradients,
    check_inputs,
    check_modes,
    check_repeats,
    check_shapes,
    contract,
)
from cala.data import image_transform
from cala.encoders import Tiny, make_backbone
from cala.errors import CalaError

WORDS = "make it red the small star green and large".split()
SHIPPED = {
    "tiny": dict(vocabulary=WORDS, width=32, layers=2, heads=2),
    "blip2": dict(random_weights="small"),
    "clip": dict(model_name="ViT-B-32", random_weights="small"),
    "clip RN50": dict(model_name="RN50", random_weights="small"),
}


def make_tiny(cls=Tiny):
    return cls(WORDS, width=16, heads=2, layers=2, queries=4, size=16).eval()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_backbone_keeps_the_contract_and_is_left_as_it_was(name):
    backbone = make_backbone(name.split()[0], **SHIPPED[name]).train()
    backbone.fine_tune("text")
    weights = {key: value.clone() for key, value in backbone.state_dict().items()}
    trained = [parameter.requires_grad for parameter in backbone.parameters()]
    state = torch.get_rng_state()
    check_backbone(backbone)
    assert backbone.training
    assert trained == [parameter.requires_grad for parameter in backbone.parameters()]
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


class WrongWidth(Tiny):
    dim = property(lambda self: 8, lambda self, value: None)


class BareTensor(Tiny):
    def text(self, captions):
        return super().text(captions).tokens


class WrongSize(Tiny):
    def transform(self, kind="targetpad", ratio=1.25):
        return image_transform(kind, 15, ratio)


class IgnoresText(Tiny):
    def read(self, captions):
        words = super().read(captions)
        return words._replace(ids=torch.ones_like(words.ids), mask=torch.ones_like(words.mask))


class ReadsPadding(Tiny):
    def read(self, captions):
        words = super().read(captions)
        return words._replace(mask=torch.ones_like(words.mask))


class NoisyTrunk(Tiny):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        trunk = self.trunk
        self.trunk = torch.nn.Sequential(trunk, AlwaysDropout())


class AlwaysDropout(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x)


class TrainsTrunk(Tiny):
    def parts(self, mode):
        return [*super().parts(mode), *self.trunk.parameters()]


class TrainsNothing(Tiny):
    def parts(self, mode):
        return []


class TrainsIdleLayer(Tiny):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.idle = torch.nn.Linear(2, 2)

    def parts(self, mode):
        return [*super().parts(mode), *self.idle.parameters()]


class ForgetsWidth(Tiny):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.config.pop("width")


class ForgetsOrderOfWords(Tiny):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.config["vocabulary"] = self.config["vocabulary"][::-1]


class UnwritableConfig(Tiny):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.config["width"] = torch.tensor(16)


BROKEN = [
    (WrongWidth, check_shapes, r"tokens are \(2, 10, 16\), not \(B, L, d\) = \(2, 10, 8\)"),
    (BareTensor, check_shapes, "text gives Tensor, not an Embedding"),
    (WrongSize, check_shapes, r"the transform gives \(3, 15, 15\), but size is 16"),
    (IgnoresText, check_inputs, "text gives the same feature for two different inputs"),
    (ReadsPadding, check_batches, "text: a feature depends on its batch"),
    (NoisyTrunk, check_repeats, "the trunk gives other tokens the second time"),
    (TrainsTrunk, check_modes, "--encoder both trains the trunk"),
    (TrainsNothing, check_modes, "--encoder both trains nothing"),
    (TrainsIdleLayer, check_gradients, "never get a gradient: idle.weight"),
    (ForgetsWidth, check_config, "builds another architecture"),
    (ForgetsOrderOfWords, check_config, "text differs after saving and loading"),
    (UnwritableConfig, check_config, "cannot be written as JSON"),
]


@pytest.mark.parametrize("cls, check, message", BROKEN, ids=[cls.__name__ for cls, _, _ in BROKEN])
def test_a_broken_promise_is_found_by_its_check(cls, check, message):
    with pytest.raises(BrokenPromise, match=message):
        check(make_tiny(cls))
    check(make_tiny())


def test_an_error_inside_a_backbone_is_a_broken_promise():
    backbone = make_tiny()
    backbone.transform = None
    assert contract(backbone).result.str.startswith("TypeError").any()
    with pytest.raises(CalaError, match="the tiny backbone breaks its contract; shapes: TypeError") as error:
        check_backbone(backbone)
    assert "\n" not in str(error.value)

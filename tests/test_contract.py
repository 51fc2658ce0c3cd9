"Every backbone that ships keeps the contract that check_backbone asks for, and the check leaves a model as it found it."
import pytest
import torch

from cala.backbones.contract import check_backbone
from cala.encoders import make_backbone

SHIPPED = dict(tiny=dict(vocabulary="make it red the small star green and large".split(), width=32, layers=2, heads=2),
               blip2=dict(random_weights="small"),
               clip=dict(model_name="ViT-B-32", random_weights="small"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_backbone_keeps_the_contract_and_is_left_as_it_was(name):
    backbone = make_backbone(name, **SHIPPED[name]).train()
    backbone.fine_tune("text")
    weights, flags, state = {k: v.clone() for k, v in backbone.state_dict().items()}, [p.requires_grad for p in backbone.parameters()], torch.get_rng_state()
    check_backbone(backbone)
    assert backbone.training and flags == [p.requires_grad for p in backbone.parameters()] and all(p.grad is None for p in backbone.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in backbone.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())

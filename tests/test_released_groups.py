"The parameter groups and the rates of `--recipe released`, and 24 steps of it against a plain loop in float64."

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from cala.data import open_dataset
from cala.encoders import make_backbone, read_vocabulary
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa
from cala.recipe import Recipe
from cala.training import Learner, Schedule, make_loader, make_optimizer, parameter_groups

MULTI = ["multimodal", "multimodal.query_tokens", "textual"]
VISUAL = ["visual", "visual.query_tokens"]
ASSOCIATIONS = ["compositor", "hca"]
GROUPS = {  # (backbone, encoder, frame): names of the groups in the released program's order
    ("tiny", "multi", "sum"): [*MULTI, *ASSOCIATIONS],
    ("tiny", "both", "sum"): [*MULTI, *VISUAL, *ASSOCIATIONS],
    ("tiny", "both", "artemis"): [*MULTI, *VISUAL, *ASSOCIATIONS, "frame"],
    ("blip2", "multi", "artemis"): [*MULTI, *ASSOCIATIONS, "frame"],
    ("blip2", "both", "sum"): [*MULTI, *VISUAL, *ASSOCIATIONS],
    ("clip", "multi", "sum"): ["backbone", "fresh", *ASSOCIATIONS],
}
FACTORS = dict(fresh=2, compositor=2, hca=2, frame=10)  # 1 for the others


def make_model(arch, encoder, frame):
    "A small model of that backbone with random weights."
    if arch == "tiny":
        backbone = make_backbone("tiny", vocabulary=["red"], width=16, heads=2, layers=2)
    else:
        backbone = make_backbone(arch, random_weights="small")
    model = CaLa(backbone, cir_frame=frame)
    backbone.fine_tune(encoder)
    return model


def released(**more):
    return Recipe(recipe="released", learning_rate=1e-5, **more)


@pytest.mark.parametrize("arch, encoder, frame", GROUPS)
def test_groups_of_the_released_program_have_its_order_sizes_and_rates(arch, encoder, frame):
    model = make_model(arch, encoder, frame)
    groups = make_optimizer(model, released()).param_groups
    names = GROUPS[arch, encoder, frame]
    assert [group["name"] for group in groups] == names
    assert [group["lr"] for group in groups] == [1e-5 * FACTORS.get(name, 1) for name in names]
    sizes = {name: sum(p.numel() for p in group["params"]) for name, group in zip(names, groups)}
    assert sizes["compositor"] == sum(p.numel() for p in model.compositor.parameters())
    assert sizes["hca"] == sum(p.numel() for p in model.hca.parameters())
    for role in ("multimodal", "visual"):
        if role in sizes:
            query_tokens = getattr(model.backbone, role).query_tokens
            assert sizes[f"{role}.query_tokens"] == query_tokens.numel()
            used = {id(p) for p in getattr(model.backbone, role).parameters() if p.requires_grad}
            assert used == {id(p) for g in groups if g["name"].startswith(role) for p in g["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(sizes.values()) == sum(p.numel() for p in trained)
    ours = parameter_groups(model, 1e-5)
    assert {id(p) for g in ours for p in g["params"]} == {id(p) for g in groups for p in g["params"]}


def test_rates_of_the_released_program_epoch_by_epoch():
    recipe = released(num_epochs=30, max_epoch=15)
    optimizer = make_optimizer(make_model("tiny", "both", "artemis"), recipe)
    schedule = Schedule()
    schedule.before_fit(type("Run", (), dict(optimizer=optimizer, recipe=recipe, loader=range(4))))
    for epoch in range(30):
        first = 1e-5 * (1 + math.cos(math.pi * epoch / 15)) / 2
        for _ in range(4):
            first_rate, *rates = [group["lr"] for group in optimizer.param_groups]
            assert first_rate == pytest.approx(first, abs=1e-15)
            assert rates == [1e-5] * 4 + [2e-5] * 2 + [1e-4]
            optimizer.step()
            schedule.after_batch(None)


def test_24_steps_of_the_released_recipe_are_those_of_a_plain_loop_in_float64(tmp_path):
    "The loop is written from the description of the method: its own logits, loss, AdamW and cosine."
    AcceleratorState._reset_state()  # an earlier test may have chosen another precision, which Accelerate keeps
    root = draw_cirr(tmp_path, train=8, val=2, test1=1, size=48)
    data = open_dataset("CIRR", root, "train")
    words = read_vocabulary([text for triplet in data.triplets for text in triplet.captions])
    recipe = released(num_epochs=4, max_epoch=3, batch_size=8, hca_dropout=0.0)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        backbone = make_backbone("tiny", vocabulary=words, width=16, heads=2, layers=2)
        models.append(CaLa(backbone, hca_dropout=0.0).double())
        backbone.fine_tune("both")
    data.gallery.transform = DoubleTransform(models[0].backbone.transform())
    learner = Learner(recipe, models[0], data, [Schedule()])
    learner.fit()
    losses = plain_loop(models[1], data, recipe)
    assert len(losses) == len(learner.log) == 24
    assert max(abs(row["loss"] - loss) for row, loss in zip(learner.log, losses)) < 1e-12
    for name, weight in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], weight, atol=1e-9, rtol=0, msg=name)


class DoubleTransform:
    "A transform whose pictures are in float64."

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, image):
        return self.transform(image).double()


def plain_loop(model, data, recipe):
    "Losses of every step."
    backbone = model.backbone
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = dict(model.named_parameters())
    moments = {name: [torch.zeros_like(parameters[name]), torch.zeros_like(parameters[name])] for name in names}
    loader = make_loader(data, recipe)
    losses, step = [], 0
    for epoch in range(recipe.num_epochs):
        loader.batch_sampler.set_epoch(epoch + 1)
        cosine = (1 + math.cos(math.pi * epoch / recipe.max_epoch)) / 2
        for batch in loader:
            loss = plain_loss(backbone, model, batch)
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
            step += 1
            for name, gradient in zip(names, gradients):
                if gradient is not None:
                    rate = recipe.learning_rate * (2 if name.split(".")[0] in ("hca", "compositor") else 1)
                    is_first = name.startswith("backbone.multimodal.") and not name.endswith("query_tokens")
                    update(parameters[name], gradient, moments[name], rate * (cosine if is_first else 1), step)
    return losses


def plain_loss(backbone, model, batch):
    "0.1 CE(z_tbia) + 0.9 CE(0.45 z_ctr + 0.55 z_qtm), with every formula written out."
    V_r, V_t = backbone.trunk(batch.reference).detach(), backbone.trunk(batch.target).detach()
    F_r, F_c = backbone.query(V_r, batch.captions).tokens, backbone.text(batch.captions).tokens
    F_t, alone = backbone.image(V_t).tokens, backbone.image(V_r).tokens
    z_qtm = 100 * F.normalize(F_r[:, 0] + F_c[:, 0], dim=-1) @ F.normalize(F_t[:, 0], dim=-1).T
    hca, d = model.hca, F_r.shape[-1]
    keys = hca.key_text(F_c)
    A = hca.query(F_r) @ keys.transpose(1, 2) / d**0.5
    B = keys @ hca.key_target(F_t).transpose(1, 2) / d**0.5
    bridge = ((A @ B).softmax(-1) @ hca.value(F_t))[:, 0]
    first = last = None
    for _ in range(4):
        first = model.compositor.reference_as_query_attention(alone, *[F_t if first is None else first] * 2)[0]
        last = model.compositor.target_as_query_attention(F_t, *[alone if last is None else last] * 2)[0]
    difference = (first[:, 0] + last[:, 0]) / 2
    rows = torch.arange(len(F_r))
    z_tbia, z_ctr = 10 * bridge @ F_r[:, 0].T, 10 * F_c[:, 0] @ difference.T
    return 0.1 * F.cross_entropy(z_tbia, rows) + 0.9 * F.cross_entropy(0.45 * z_ctr + 0.55 * z_qtm, rows)


@torch.no_grad()
def update(weight, gradient, moments, rate, step):
    "One AdamW update, weight decay 0.05."
    first, second = moments
    weight.mul_(1 - rate * 0.05)
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    denominator = (second / (1 - 0.999**step)).sqrt() + 1e-8
    weight.sub_(rate * (first / (1 - 0.9**step)) / denominator)

"CLIP: against open_clip itself with random weights, and whatever a person may give as weights."

import importlib.metadata
import io
import json
import pickle
import urllib.error
from copy import deepcopy

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import cala.backbones.clip as room
import cala.backbones.weights as weights
from cala.backbones.clip import Clip, cut_tower, find_architecture, open_model, shrink
from cala.data import image_transform
from cala.encoders import make_backbone
from cala.errors import CalaError
from cala.library.checkpoint import load_checkpoint, save_checkpoint
from cala.model import CaLa
from cala.training import parameter_groups
from hostile import BOMBS, Bomb

CAPTIONS = [
    "make the star red",
    "is shiny and silver with shorter sleeves ! and fit and flare !!",
    "",
    "tree " * 100,
    "Café ROUGE 日本",
]
try:
    NEW_TIMM = tuple(int(part) for part in importlib.metadata.version("timm").split(".")[:2]) >= (1, 0)
except importlib.metadata.PackageNotFoundError:
    NEW_TIMM = False


def shaken(model):
    "The model with every norm and bias random: fresh ResNets have dead residual branches and norms that do nothing."
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2 if name.endswith("weight") else -0.5, 0.8)
    return model.eval()


def library(name, size="small", **changes):
    "open_clip's own model, random and shaken, and its configuration."
    torch.manual_seed(0)
    architecture = {**(shrink(find_architecture(name)) if size == "small" else find_architecture(name)), **changes}
    return shaken(open_model(name, architecture, {})), architecture


def ours(model, name, architecture):
    "A backbone with the same weights; the library's model stays whole."
    config = dict(name="clip", model_name=name, architecture=architecture)
    return Clip(deepcopy(model), open_clip.get_tokenizer(name), config).eval()


def hooked(module, call):
    "What comes out of a module while `call` runs."
    seen = []
    hook = module.register_forward_hook(lambda m, args, out: seen.append(out))
    call()
    hook.remove()
    return seen[0]


def small(**options):
    return make_backbone("clip", random_weights="small", **options)


# The same numbers as open_clip


@pytest.mark.parametrize("name, size, places, width", [("RN50x4", 288, 81, 2560), ("ViT-B-32", 224, 49, 768)])
def test_full_size_towers_give_what_open_clip_gives_and_what_a_hook_sees(name, size, places, width):
    model, architecture = library(name, "full")
    backbone, images, ids = (
        ours(model, name, architecture),
        torch.randn(2, 3, size, size),
        open_clip.get_tokenizer(name)(CAPTIONS[:2]),
    )
    with torch.no_grad():
        tokens = backbone.trunk(images)
        if name.startswith("RN"):
            map = hooked(model.visual.layer4, lambda: model.encode_image(images))
            seen = raw = torch.stack(
                [map[:, :, row, column] for row in range(9) for column in range(9)], 1
            )  # by hand: no view
        else:
            raw = hooked(model.visual.transformer, lambda: model.encode_image(images))
            seen = hooked(model.visual.ln_post, lambda: model.encode_image(images))[:, 1:]
        says, reads = backbone.image(tokens), backbone.text(CAPTIONS[:2])
        torch.testing.assert_close(tokens, raw)
        torch.testing.assert_close(
            says.tokens,
            (seen @ backbone.reduction.weight.T + backbone.reduction.bias).clamp_min(0),
            atol=1e-4,
            rtol=1e-4,
        )
        torch.testing.assert_close(says.feature, model.encode_image(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reads.feature, model.encode_text(ids), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            reads.tokens, hooked(model.ln_final, lambda: model.encode_text(ids)), atol=1e-5, rtol=1e-5
        )
    assert seen.shape == (2, places, width) and says.tokens.shape == (2, places, backbone.dim) and backbone.size == size


@pytest.mark.parametrize(
    "name, changes",
    [
        ("RN50x4", {}),
        ("RN50", {}),
        ("ViT-B-32", {}),
        ("ViT-B-32", {"quick_gelu": True}),
        ("RN101", {"custom_text": True}),
    ],
)
def test_small_towers_equal_open_clip_in_float64(name, changes):
    architecture = {**shrink(find_architecture(name)), **changes}
    torch.manual_seed(0)
    model = shaken(
        open_clip.create_model(
            name, pretrained=None, force_custom_text=bool(architecture.pop("custom_text", False)), **architecture
        )
    )
    backbone, model = ours(model, name, architecture).double(), model.double()
    images, ids = torch.randn(3, 3, 96, 96).double(), open_clip.get_tokenizer(name)(CAPTIONS)
    with torch.no_grad():
        feature = backbone.image(backbone.trunk(images)).feature
        reads = backbone.text(CAPTIONS)
        torch.testing.assert_close(feature, model.encode_image(images), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(reads.feature, model.encode_text(ids), atol=1e-10, rtol=1e-10)
    ends = reads.tokens[range(len(ids)), ids.argmax(1)]
    if architecture["text_cfg"]["width"] != backbone.dim:
        torch.testing.assert_close(ends, reads.feature, atol=1e-10, rtol=1e-10)


@pytest.mark.skipif(not NEW_TIMM, reason="needs timm 1.0; LAVIS holds it at 0.4.12")
@pytest.mark.parametrize(
    "name", ["convnext_tiny", "ViT-B-32-SigLIP2-256", "EVA02-B-16", "swin_base_patch4_window7_224"]
)
def test_timm_towers_are_cut_without_a_change(name):
    torch.manual_seed(0)
    visual = open_model(name, find_architecture(name), {}).visual
    images = torch.randn(2, 3, *visual.image_size)
    with torch.no_grad():
        wanted, (tower, head) = visual(images), cut_tower(deepcopy(visual))
        tokens = tower(images)
        feature, places = head(tokens)
    torch.testing.assert_close(feature, wanted, atol=1e-6, rtol=1e-5)
    assert round(places.shape[1] ** 0.5) ** 2 == places.shape[1] and places.shape[2] == tokens.shape[2]


def test_a_timm_tower_beside_an_old_timm_is_one_line(monkeypatch):
    monkeypatch.setattr("open_clip.timm_model.timm", None)  # which it is where LAVIS holds timm back
    with pytest.raises(CalaError, match="timm.*an environment without it .*--model-name"):
        make_backbone("clip", model_name="convnext_tiny", random_weights="full")


def test_tokens_of_half_precision_and_of_one_picture_alone_give_the_same_feature():
    backbone, images = small(), torch.randn(3, 3, 96, 96)
    tokens = backbone.trunk(images)
    exact = backbone.image(tokens).feature
    torch.testing.assert_close(backbone.image(tokens.half()).feature, exact, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(backbone.image(backbone.trunk(images[:1])).feature, exact[:1], atol=1e-5, rtol=1e-5)


# Words


def test_mask_ends_at_the_end_of_text_whatever_the_sentence_holds():
    backbone = small()
    reads = backbone.text(CAPTIONS)
    ids = backbone.tokenizer(CAPTIONS)
    assert reads.mask.sum(1).tolist() == [row.tolist().index(49407) + 1 for row in ids]
    assert reads.mask[2].sum() == 2 and reads.mask[3].all() and reads.mask.dtype == torch.bool


def test_a_text_tower_that_pools_elsewhere_uses_its_padding_number():
    architecture = shrink(find_architecture("ViT-L-14-CLIPA"))
    model, ids = (
        open_model("ViT-L-14-CLIPA", architecture, {}),
        torch.tensor([[101, 7, 8, 102] + [0] * 28, [101, 7, 102, 0] + [0] * 28]),
    )
    backbone = Clip(deepcopy(model), lambda captions: ids, dict(architecture=architecture))
    with torch.no_grad():
        reads, wanted = backbone.text(["two", "one"]), model.encode_text(ids)
    assert reads.mask.sum(1).tolist() == [4, 3] and torch.equal(reads.feature, wanted)


def test_a_sentence_does_not_depend_on_its_batch():
    backbone = small()
    together, alone = backbone.text(CAPTIONS), backbone.text(CAPTIONS[:1])
    torch.testing.assert_close(together.feature[:1], alone.feature, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.tokens[:1], alone.tokens, atol=1e-5, rtol=1e-5)


def test_the_reference_holds_no_text_and_its_feature_stands_before_its_places():
    backbone = small()
    tokens = backbone.trunk(torch.randn(2, 3, 96, 96))
    asks, alone = backbone.query(tokens, CAPTIONS[:2]), backbone.image(tokens)
    for first, second in zip(asks, backbone.query(tokens, CAPTIONS[3:])):
        assert torch.equal(first, second)
    assert torch.equal(asks.feature, alone.feature) and asks.mask.shape == asks.tokens.shape[:2] and asks.mask.all()
    assert torch.equal(asks.tokens[:, 0], alone.feature) and torch.equal(asks.tokens[:, 1:], alone.tokens)


def test_the_reduction_learns_at_the_rate_of_the_associations_and_the_towers_at_the_backbones():
    model = CaLa(small(), cir_frame="artemis")
    model.backbone.fine_tune("both")
    groups = parameter_groups(model, 1e-5)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(
        dict(backbone=1e-5, fresh=2e-5, hca=2e-5, compositor=2e-5, frame=1e-4)
    )
    assert [id(p) for p in groups[1]["params"]] == [id(p) for p in model.backbone.reduction.parameters()]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


# Frozen means constant


def test_batch_norm_stays_as_it_was_through_training_steps():
    backbone = small()
    model = CaLa(backbone)
    backbone.fine_tune("both")
    before = {name: tensor.clone() for name, tensor in backbone.trunk.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model.train()
        backbone.train()
        backbone.trunk.train()
        images = torch.randn(2, 4, 3, 96, 96) + 3
        model(images[0], CAPTIONS[:4], images[1]).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(module.training for module in backbone.trunk.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.trunk.state_dict().items())


@pytest.mark.parametrize("name", ["RN50x4", "RN50", "ViT-B-32"])
@pytest.mark.parametrize(
    "mode, trains",
    [("both", {"language", "reduction", "head"}), ("multi", {"language", "reduction"}), ("text", {"language"})],
)
def test_a_mode_trains_exactly_the_tensors_of_its_parts_and_a_step_of_cala_reaches_them_all(name, mode, trains):
    backbone = small(model_name=name)
    named = backbone.fine_tune(mode)
    assert set(named) == {n for n, _ in backbone.named_parameters() if n.split(".")[0] in trains}
    images = torch.randn(2, 3, 3, 96, 96)
    CaLa(backbone, objective="paper").train()(images[0], CAPTIONS[:3], images[1]).total.backward()
    assert {n for n, p in backbone.named_parameters() if p.grad is not None} == set(named)


def test_full_size_trains_what_the_table_says():
    with torch.device("meta"):
        model = open_clip.model.CLIP(**find_architecture("RN50x4"))

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    head, total = count(model.visual.attnpool), count(model.visual)
    text = count(model) - total - 1  # the temperature goes
    assert (total - head, head, text) == (65_619_640, 21_517_440, 91_163_520)


# Pictures


@pytest.mark.parametrize("name, size", [("RN50x4", 288), ("ViT-L-14-336", 336), ("ViT-B-16-SigLIP", 224)])
@pytest.mark.parametrize("shape", [(300, 100), (57, 400), (224, 224)])
def test_clip_transform_is_open_clips_at_its_resolution_and_the_pads_use_its_statistics(name, size, shape):
    tag = open_clip.get_pretrained_cfg(name, "openai") or open_clip.get_pretrained_cfg(name, "webli")
    record = dict(mean=tag["mean"], std=tag["std"], resize_mode=tag["resize_mode"], interpolation=tag["interpolation"])
    backbone = small()
    backbone.size, backbone.preprocess = size, dict(backbone.preprocess, **record)
    picture = Image.effect_noise(shape, 90).convert("RGB")
    expected = open_clip.image_transform(size, is_train=False, **record)
    torch.testing.assert_close(backbone.transform("clip")(picture), expected(picture), atol=1e-6, rtol=1e-6)
    assert torch.equal(
        backbone.transform("targetpad", 1.25)(picture),
        image_transform("targetpad", size, 1.25, tag["mean"], tag["std"])(picture),
    )
    assert pickle.loads(pickle.dumps(backbone.transform("clip"))) == backbone.transform("clip")


def test_a_model_takes_its_resolution_and_statistics_from_open_clip():
    model = open_model(
        "ViT-B-32", shrink(find_architecture("ViT-B-32")), dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    )
    backbone = Clip(model, None, dict(architecture=shrink(find_architecture("ViT-B-32"))))
    assert (
        backbone.transform("clip").mean == (0.5, 0.5, 0.5)
        and backbone.transform().std == (0.5, 0.5, 0.5)
        and backbone.transform("clip").size == 96
    )


# Weights


@pytest.fixture
def tuned(tmp_path):
    "A small model in each form of file: CLIP4Cir's, plain, data-parallel with an optimizer's step, safetensors."
    model, architecture = library("RN50x4", quick_gelu=True)
    state = model.state_dict()
    torch.save({"epoch": 12, "CLIP": state}, tmp_path / "tuned_clip_best.pt")
    torch.save(state, tmp_path / "plain.pt")
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": {f"module.{key}": value for key, value in state.items()}},
        tmp_path / "epoch_3.pt",
    )
    save_file(state, tmp_path / "open_clip_model.safetensors")
    return tmp_path, model, architecture


@pytest.mark.parametrize("file", ["tuned_clip_best.pt", "plain.pt", "epoch_3.pt", "open_clip_model.safetensors"])
def test_weights_are_read_in_every_form(tuned, file):
    folder, model, architecture = tuned
    backbone, images = (
        make_backbone("clip", weights=str(folder / file), architecture=architecture),
        torch.randn(2, 3, 96, 96),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.image(backbone.trunk(images)).feature, model.encode_image(images), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            backbone.text(CAPTIONS).feature, model.encode_text(open_clip.tokenize(CAPTIONS)), atol=1e-5, rtol=1e-5
        )


def test_weights_of_another_model_are_one_line_with_the_flag(tuned):
    folder, _, architecture = tuned
    for other in (shrink(find_architecture("ViT-B-32")), dict(architecture, embed_dim=32)):
        name = "ViT-B-32" if other["vision_cfg"].get("patch_size") else "RN50x4"
        for file in ("tuned_clip_best.pt", "plain.pt", "open_clip_model.safetensors"):
            with pytest.raises(CalaError, match="--model-name") as raised:
                make_backbone("clip", model_name=name, weights=folder / file, architecture=other)
            assert "\n" not in str(raised.value) and file in str(raised.value)


@pytest.mark.parametrize("form", BOMBS)
def test_a_file_that_would_execute_code_is_refused(tmp_path, form):
    BOMBS[form](Bomb(tmp_path / "exploded"), tmp_path / "weights.pt", "CLIP")
    with pytest.raises(CalaError) as raised:
        make_backbone("clip", weights=tmp_path / "weights.pt", architecture=shrink(find_architecture("RN50x4")))
    assert "weights.pt" in str(raised.value) and "\n" not in str(raised.value) and not (tmp_path / "exploded").exists()


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, content",
    [
        ("empty.pt", b""),
        ("words.pt", b"hello world"),
        ("page.pt", b"<html>404</html>"),
        ("half.pt", saved({"CLIP": {"a": torch.ones(999)}})[:700]),
        ("zip.pt", b"PK\x03\x04nothing"),
        ("list.pt", saved([1, 2])),
        ("none.pt", saved({})),
        ("number.pt", saved({"CLIP": 3})),
        ("tensor.pt", saved(torch.ones(3))),
        ("names.pt", saved({"CLIP": {"visual.conv1.weight": torch.ones(1)}})),
        ("words.safetensors", b"hello world"),
        ("empty.safetensors", b""),
        ("numbers.pt", saved({1: 2})),
    ],
)
def test_a_file_that_is_something_else_is_one_line_with_its_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalaError) as raised:
        make_backbone("clip", weights=tmp_path / name, architecture=shrink(find_architecture("RN50x4")))
    assert name in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_a_missing_file_and_openais_own_archive_are_one_line(tmp_path):
    architecture = shrink(find_architecture("RN50x4"))
    with pytest.raises(CalaError, match="no weights file"):
        make_backbone("clip", weights=tmp_path / "absent.pt", architecture=architecture)
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "RN50x4.pt"))
    with pytest.raises(CalaError, match="open_clip_model.safetensors"):
        make_backbone("clip", weights=tmp_path / "RN50x4.pt", architecture=architecture)


# The network


def test_no_network_names_page_file_and_flag_at_once(monkeypatch):
    def no_network(*args, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(room, "find_cached", lambda tag: None)
    monkeypatch.setattr(weights, "urlopen", no_network)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *args: pytest.fail("the Hub's client was called"))
    with pytest.raises(CalaError) as raised:
        make_backbone("clip")
    for part in (
        "RN50x4",
        "openai",
        "https://huggingface.co/timm/resnet50x4_clip.openai",
        "open_clip_model.safetensors",
        "--backbone-weights",
        "--model-name",
    ):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_download_that_breaks_off_is_the_same_line(monkeypatch):
    def broken(*args):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(room, "find_cached", lambda tag: None)
    monkeypatch.setattr(room, "is_reachable", lambda *args, **options: True)
    monkeypatch.setattr(open_clip, "download_pretrained", broken)
    with pytest.raises(CalaError, match="ConnectionResetError.*--backbone-weights"):
        make_backbone("clip", model_name="ViT-B/32")


def test_a_file_fetched_before_needs_no_network(monkeypatch, tuned):
    folder, model, architecture = tuned
    monkeypatch.setattr(
        room,
        "try_to_load_from_cache",
        lambda repo, name: str(folder / name) if name == "open_clip_model.safetensors" else None,
    )
    monkeypatch.setattr(weights, "urlopen", lambda *args, **options: pytest.fail("the network was used"))
    monkeypatch.setattr(room, "find_architecture", lambda name: dict(architecture, quick_gelu=False))
    backbone, images = make_backbone("clip"), torch.randn(1, 3, 96, 96)
    assert backbone.config["architecture"]["quick_gelu"] is True  # the openai tag's, though the name has plain GELU
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.image(backbone.trunk(images)).feature, model.encode_image(images), atol=1e-5, rtol=1e-5
        )


def test_a_tag_stands_behind_a_colon_and_an_unknown_one_is_answered_with_the_known():
    with pytest.raises(CalaError, match="ViT-B-32:laion2b_e16"):
        make_backbone("clip", model_name="ViT-B/32:nobody")
    assert small(model_name="ViT-B-32:laion2b_e16").config["architecture"]["quick_gelu"] is False
    assert small(model_name="ViT-B-32").config["architecture"]["quick_gelu"] is True


# Names, notices, checkpoints


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(model_name="RN50x5"), "RN50x4"),
        (dict(model_name="coca_ViT-B-32"), "text tower"),
        (dict(model_name="roberta-ViT-B-32"), "text tower"),
        (dict(random_weights="huge"), "small or full"),
        (dict(random_weights="small", precision="int8"), "fp16"),
        (dict(layers=2), "--layers"),
        (dict(model_name="ViT-B-16-SigLIP", random_weights="small"), "ResNets and ViTs"),
        (
            dict(random_weights="small", tokenizer="nowhere"),
            "no folder nowhere; give the folder of a Hugging Face tokenizer as --tokenizer",
        ),
    ],
)
def test_a_wrong_option_is_one_line(options, says):
    with pytest.raises(CalaError) as raised:
        make_backbone("clip", **options)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_random_weights_come_only_by_flag_say_so_and_repeat_by_seed(capfd):
    first, again, other = small(seed=1), small(seed=1), small(seed=2)
    lines = [line for line in capfd.readouterr().err.splitlines() if "random" in line]
    assert len(lines) == 3 and "reduced size" in lines[0]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.reduction.weight, other.reduction.weight)


@pytest.mark.parametrize("name", ["RN50x4", "RN50", "ViT-B-32"])
def test_a_checkpoint_brings_everything_back_without_weights_network_or_notice(tmp_path, name, capfd):
    backbone, images = small(model_name=name), torch.randn(2, 2, 3, 96, 96)
    model = CaLa(backbone).eval()
    assert json.loads(json.dumps(backbone.config)) == backbone.config
    save_checkpoint(model, tmp_path / "best")
    capfd.readouterr()
    again = load_checkpoint(tmp_path / "best")
    assert "random" not in capfd.readouterr().err
    with torch.no_grad():
        torch.testing.assert_close(
            again(images[0], CAPTIONS[:2], images[1]).total, model(images[0], CAPTIONS[:2], images[1]).total
        )
    assert again.compositor.class_token is not None


def test_making_a_backbone_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    small()
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["RN50x4", "ViT-B-32"])
def test_trunk_runs_in_float16_on_a_gpu(name):
    backbone = small(model_name=name).cuda()
    images = torch.randn(2, 3, 96, 96, device="cuda")
    tokens = backbone.trunk(images)
    assert tokens.dtype == torch.float16 and backbone.text(CAPTIONS).feature.is_cuda
    exact = backbone.float().cpu().trunk(images.cpu())
    assert (tokens.float().cpu() - exact).norm() / exact.norm() < 1e-2

"BLIP-2: against LAVIS where it is installed, and against its published file format everywhere."

import shutil
import urllib.error
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from PIL import Image
from safetensors.torch import load_file, save_file

import cala.backbones.blip2 as blip2
import cala.backbones.weights as weights
from cala.backbones.blip2 import (
    SIZES,
    FrozenTrunk,
    WordPieces,
    clip_tower,
    eva_tower,
    load_lavis_state,
    load_tower,
    translate_trunk,
)
from cala.encoders import make_backbone
from cala.errors import CalaError
from cala.library.checkpoint import save_checkpoint
from cala.library.flags import BLIP2_ROLES, DataFlags, ModelFlags
from cala.library.loading import build_model
from cala.library.results import describe_run
from cala.model import CaLa
from cala.qformer import QFormer
from hostile import BOMBS, Bomb
from lavis_helpers import (
    VOCABULARY,
    Stub,
    allow_float64,
    convert_to_hub,
    draw_eva,
    features,
    lavis_model,
    needs_lavis,
    offline_lavis,
    write_vocabulary,
)

CAPTIONS = ["make the star red and remove the circle", "two stars", "Sleeveless, longer and more blue.", "café"]
SMALL = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, initializer_range=0.2
)  # large enough for features that differ


def say(backbone, images, captions):
    "All three embeddings of a backbone."
    with torch.no_grad():
        tokens = backbone.trunk(images)
        return (
            tokens,
            backbone.image(tokens).tokens,
            backbone.text(captions).tokens,
            backbone.query(tokens, captions).tokens,
        )


# Words


@needs_lavis
def test_tokenizer_gives_the_numbers_of_lavis(tmp_path):
    with offline_lavis(tmp_path):
        from lavis.models.blip2_models.blip2 import Blip2Base

        expected = Blip2Base.init_tokenizer()
    ours = WordPieces(tmp_path / "vocab.txt")
    captions = [
        *CAPTIONS,
        "",
        "  RED\tand\nblue ",
        "un-able?!",
        '"three" (3) d\'s',
        "naïve CAFÉ",
        "在 star在",
        "🙂 star\u200b \x00\u00ad",
        "[SEP] [DEC] star [dec]",
        "x" * 200,
    ]
    for batch in [captions, *[[caption] for caption in captions]]:
        wanted = expected(batch, return_tensors="pt", padding=True)
        ids, mask = ours(batch)
        assert ids.tolist() == wanted.input_ids.tolist() and mask.tolist() == wanted.attention_mask.tolist()
    assert len(ours) == len(expected) == len(VOCABULARY) + 1 and ours.tool.token_to_id("[DEC]") == expected.bos_token_id


def test_a_caption_longer_than_bert_reads_is_cut(tmp_path):
    ids, mask = WordPieces(write_vocabulary(tmp_path))(["star " * 600])
    assert ids.shape == mask.shape == (1, 512) and ids[0, -1] == VOCABULARY.index("[SEP]")


# The trunk


@needs_lavis
def test_open_clip_tower_equals_the_clip_L_module_of_lavis():
    from lavis.models.clip_vit import VisionTransformer

    torch.manual_seed(0)
    expected = VisionTransformer(
        input_resolution=56, patch_size=14, width=64, layers=4, heads=2, use_grad_checkpointing=False
    ).eval()
    for parameter in expected.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = clip_tower(56, 64, layers=3, heads=2)  # LAVIS builds one block less than its argument says
    assert load_tower(ours, expected.state_dict()) == []
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(FrozenTrunk(ours)(images), expected(images), atol=1e-4, rtol=0)


@needs_lavis
def test_the_published_tower_has_21_blocks():
    from lavis.models import clip_vit

    with torch.device("meta"):
        expected = clip_vit.VisionTransformer(224, 14, 1024, 22, 16, False)
    with torch.device("meta"):
        ours = clip_tower()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in expected.state_dict().items()}
    assert len(ours.transformer.resblocks) == 21


# The whole model


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    "Published files of a random LAVIS model at full size with its ViT-L trunk, and its outputs for one picture."
    from lavis.models.eva_vit import convert_weights_to_fp16

    folder = tmp_path_factory.mktemp("full")
    model, images = lavis_model(folder), torch.randn(1, 3, 224, 224)
    state = model.state_dict()
    torch.save(model.visual_encoder.state_dict(), folder / "clip_vit_L.pth")
    torch.save(
        {
            "model": {
                name: tensor
                for name, tensor in state.items()
                if not name.startswith(("visual_encoder.", "Qformer.cls."))
            }
        },
        folder / "blip2_pretrained_vitL.pth",
    )
    convert_weights_to_fp16(model.visual_encoder)  # as LAVIS does when it loads, and load_model takes it back on a CPU
    model.float()
    with torch.no_grad():
        outputs = [
            model.visual_encoder(images),
            *(features(model, mode, images, CAPTIONS[:1]) for mode in ("image", "text", "multimodal")),
        ]
    del model, state
    yield folder, images, outputs
    for path in folder.iterdir():
        path.unlink()


def same(own, expected):
    "Tokens of a 21-block trunk at random weights are large, so their bound is relative; embeddings are normalised."
    assert (own[0] - expected[0]).abs().max() <= 1e-4 * expected[0].abs().max()
    for ours, wanted in zip(own[1:], expected[1:]):
        torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=0)


@needs_lavis
def test_whole_model_through_lavis_equals_lavis(full, monkeypatch):
    folder, images, outputs = full
    monkeypatch.setattr(blip2, "SIZES", {**SIZES, "full": dict(qformer=dict(vocabulary=len(VOCABULARY) + 1), trunk={})})
    monkeypatch.setattr(blip2, "is_reachable", lambda url: True)
    monkeypatch.setattr(blip2, "find_file", lambda place, *rest: folder / place.rsplit("/", 1)[-1])
    with offline_lavis(folder):
        backbone = make_backbone("blip2")
    assert (
        type(backbone.trunk.module).__module__ == "lavis.models.clip_vit"
        and backbone.trunk.module.conv1.weight.dtype == torch.float32
    )
    assert (
        len({id(backbone.trunk), *map(id, (backbone.textual, backbone.multimodal, backbone.visual))}) == 4
        and backbone.dim == 768
    )
    same(say(backbone, images, CAPTIONS[:1]), outputs)


@needs_lavis
def test_whole_model_without_lavis_equals_lavis(full, monkeypatch):
    folder, images, outputs = full
    monkeypatch.setattr(blip2, "SIZES", {**SIZES, "full": dict(qformer=dict(vocabulary=len(VOCABULARY) + 1), trunk={})})
    monkeypatch.setattr(blip2, "import_lavis", lambda: None)
    backbone = make_backbone("blip2", weights=str(folder), tokenizer=str(folder))
    assert not backbone.save_trunk and backbone.config["weights"] == str(folder)
    same(say(backbone, images, CAPTIONS[:1]), outputs)


@contextmanager
def small_eva_of_lavis():
    "LAVIS's EVA trunk has two blocks of width 176 and reads 56 pixels."
    from lavis.models import eva_vit

    whole, smaller = eva_vit.VisionTransformer, dict(depth=2, embed_dim=176, num_heads=2, img_size=56)
    with patch.object(eva_vit, "VisionTransformer", lambda **options: whole(**{**options, **smaller})):
        yield


@pytest.fixture(scope="module")
def vit_g(tmp_path_factory):
    "Published files of a random LAVIS model with a small EVA trunk, and its outputs for two pictures."
    from lavis.models import eva_vit

    folder = tmp_path_factory.mktemp("vit_g")
    with small_eva_of_lavis():
        model, images = lavis_model(folder, vit_model="eva_clip_g", **SMALL), torch.randn(2, 3, 56, 56)
        state = model.state_dict()
        trunk = {n.removeprefix("visual_encoder."): t for n, t in state.items() if n.startswith("visual_encoder.")}
        torch.save({**trunk, "head.weight": torch.zeros(1)}, folder / "eva_vit_g.pth")
        others = {n: t for n, t in state.items() if not n.startswith(("visual_encoder.", "Qformer.cls."))}
        torch.save({"model": others}, folder / "blip2_pretrained.pth")
        hub_names = {n: t for n, t in others.items() if n.startswith(("query_tokens", "ln_vision", "Qformer.bert"))}
        hub_names.pop("Qformer.bert.embeddings.position_ids", None)
        save_file(convert_to_hub(hub_names, trunk), folder / "model.safetensors")
        eva_vit.convert_weights_to_fp16(model.visual_encoder)
        model.float()
        with torch.no_grad():
            outputs = [
                model.visual_encoder(images),
                *(features(model, mode, images, CAPTIONS[:2]) for mode in ("image", "text", "multimodal")),
            ]
    return folder, images, outputs


@pytest.fixture
def small_vit_g(monkeypatch):
    "Let the sizes of `vit_g` be the published ones."
    qformer = dict(width=64, layers=3, heads=4, vocabulary=len(VOCABULARY) + 1)
    trunk = dict(image_size=56, width=176, layers=2, heads=2)
    monkeypatch.setattr(blip2, "SIZES", {**SIZES, "full": dict(qformer=qformer, trunk=trunk)})


@needs_lavis
def test_vit_g_comes_through_lavis_and_equals_lavis(vit_g, small_vit_g, monkeypatch):
    folder, images, outputs = vit_g
    monkeypatch.setattr(blip2, "is_reachable", lambda url: True)
    monkeypatch.setattr(blip2, "find_file", lambda place, *rest: folder / place.rsplit("/", 1)[-1])
    with offline_lavis(folder, **SMALL), small_eva_of_lavis():
        backbone = make_backbone("blip2", model_name="pretrain")
    assert type(backbone.trunk.module).__module__ == "lavis.models.eva_vit" and outputs[0].shape == (2, 17, 176)
    same(say(backbone, images, CAPTIONS[:2]), outputs)


@needs_lavis
@pytest.mark.parametrize("file", ["blip2_pretrained.pth", "model.safetensors"])
def test_vit_g_without_lavis_equals_lavis(vit_g, small_vit_g, monkeypatch, file):
    folder, images, outputs = vit_g
    monkeypatch.setattr(blip2, "import_lavis", lambda: pytest.fail("LAVIS is not to be used"))
    backbone = make_backbone("blip2", model_name="pretrain", weights=str(folder / file))
    assert isinstance(backbone.trunk.module, VisionTransformer) and backbone.size == 224
    for ours, expected in zip(say(backbone, images, CAPTIONS[:2]), outputs):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@needs_lavis
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_eva_tower_equals_the_class_of_lavis(dtype, tolerance):
    from lavis.models.eva_vit import VisionTransformer as Eva

    torch.manual_seed(0)
    options = dict(patch_size=14, mlp_ratio=4.3637, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
    expected = Eva(img_size=84, embed_dim=64, depth=3, num_heads=2, use_mean_pooling=False, **options).eval()
    expected.load_state_dict(draw_eva(pixels=84))
    ours = eva_tower(84, width=64, layers=3, heads=2)
    assert load_tower(ours, translate_trunk(expected.state_dict())) == []
    images = torch.randn(2, 3, 84, 84)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        tokens, wanted = ours.eval()(images), expected(images)
    assert tokens.dtype == wanted.dtype == torch.float32 and tokens.shape == (2, 37, 64)
    torch.testing.assert_close(tokens, wanted, atol=tolerance * wanted.std().item(), rtol=0)


@needs_lavis
def test_the_published_vit_g_has_39_blocks(monkeypatch):
    from lavis.models import eva_vit

    monkeypatch.setattr(eva_vit, "download_cached_file", lambda *args, **options: None)
    monkeypatch.setattr(torch, "load", lambda *args, **options: {})
    with torch.device("meta"), patch.object(torch.Tensor, "item", lambda self: 0.0):
        expected = eva_vit.create_eva_vit_g(drop_path_rate=0, precision="fp32")
        ours = eva_tower()
    assert {n: t.shape for n, t in translate_trunk(expected.state_dict()).items()} == {
        n: t.shape for n, t in ours.state_dict().items()
    }
    assert len(ours.transformer.resblocks) == 39


# One step of the released procedure


def released_step(textual, multimodal, visual, hca, tac, reference, captions, target):
    "Four calls of three LAVIS models, then TAC, HCA and the mixed loss, as the released program computes them."
    F_c, F_r = features(textual, "text", captions=captions), features(multimodal, "multimodal", reference, captions)
    F_t, F_r_alone = features(visual, "image", target), features(visual, "image", reference)
    z_qtm = 100 * F.normalize(F_r[:, 0] + F_c[:, 0], dim=-1) @ F.normalize(F_t[:, 0], dim=-1).T
    z_tbia = 10 * hca(F_r, F_c, F_t) @ F_r[:, 0].T
    z_ctr = 10 * F_c[:, 0] @ tac(F_r_alone, F_t).T
    rows = torch.arange(len(captions))
    return 0.1 * F.cross_entropy(z_tbia, rows) + 0.9 * F.cross_entropy(0.45 * z_ctr + 0.55 * z_qtm, rows)


@pytest.fixture
def step(tmp_path):
    "Three LAVIS models of three weights and three trunks, CaLa with the same weights and one, and a batch of triplets."
    trunk = Stub(64).eval()
    three = [lavis_model(tmp_path, deepcopy(trunk), seed, **SMALL) for seed in (1, 2, 3)]
    qformer = QFormer(width=64, layers=3, heads=4, vision_width=64, vocabulary=len(VOCABULARY) + 1)
    backbone = blip2.Blip2(FrozenTrunk(trunk), qformer, WordPieces(tmp_path / "vocab.txt"), 4, {})
    for role, expected in zip(ROLES, three):
        load_lavis_state(getattr(backbone, role), expected.state_dict())
    backbone.fine_tune("both")
    return three, CaLa(backbone).eval(), *torch.randn(2, 4, 3, 4, 4)


ROLES = "textual", "multimodal", "visual"


@needs_lavis
def test_released_step_with_three_lavis_models_has_the_loss_of_ours_with_one_trunk(step):
    three, model, reference, target = step
    with torch.no_grad():
        expected = released_step(*three, model.hca, model.compositor, reference, CAPTIONS, target)
        torch.testing.assert_close(model(reference, CAPTIONS, target).total, expected, atol=1e-4, rtol=0)
        assert abs(expected - torch.tensor(4.0).log()) > 0.5  # log 4 is what features that say nothing would give


@needs_lavis
def test_released_step_with_three_lavis_models_has_the_gradients_of_ours_in_float64(step, monkeypatch):
    allow_float64(monkeypatch)
    three, model, reference, target = step
    three, model, reference, target = (
        [lavis.double() for lavis in three],
        model.double(),
        reference.double(),
        target.double(),
    )
    ours, expected = (
        model(reference, CAPTIONS, target).total,
        released_step(*three, model.hca, model.compositor, reference, CAPTIONS, target),
    )
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
    ours.backward()
    expected.backward()
    for role, lavis in zip(ROLES, three):
        wanted = dict(lavis.named_parameters())
        for name, parameter in getattr(model.backbone, role).named_parameters():
            if parameter.grad is None:
                assert name.startswith("ln_vision") or wanted[name].grad is None or not wanted[name].grad.any(), name
            else:
                torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-10, rtol=0)


# Which tensors train


@pytest.mark.parametrize(
    "mode, roles",
    [("both", {"textual", "multimodal", "visual"}), ("multi", {"textual", "multimodal"}), ("text", {"textual"})],
)
def test_a_mode_trains_exactly_the_tensors_that_get_a_gradient(mode, roles):
    backbone = make_backbone("blip2", random_weights="small")
    names, images = backbone.fine_tune(mode), torch.randn(2, 3, 56, 56)
    tokens = backbone.train().trunk(images)
    sum(
        e.tokens.sum()
        for e in (backbone.image(tokens), backbone.text(CAPTIONS[:2]), backbone.query(tokens, CAPTIONS[:2]))
    ).backward()
    assert sorted(names) == sorted(name for name, p in backbone.named_parameters() if p.grad is not None)
    assert {name.split(".")[0] for name in names} == roles
    assert not any("ln_vision" in name or name.startswith("trunk.") for name in names) and not backbone.trunk.training


def test_full_size_trains_what_the_table_says():
    with torch.device("meta"):
        backbone = blip2.Blip2(FrozenTrunk(clip_tower()), QFormer(), None, 224, {})
    sizes = {
        mode: sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        for mode in ("both", "multi", "text")
        if backbone.fine_tune(mode)
    }
    d, w = 768, 1024

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    def look(source):
        return 2 * linear(d, d) + 2 * linear(source, d) + 2 * d

    words, feed_forward = (30523 + 512) * d, linear(d, 4 * d) + linear(4 * d, d) + 2 * d
    text = words + 2 * d + 12 * (look(d) + feed_forward)
    image = 32 * d + 2 * d + 12 * (look(d) + feed_forward) + 6 * look(w)
    multimodal = 32 * d + text + 12 * feed_forward + 6 * look(w) - feed_forward  # the last layer's words are not read
    assert sizes == dict(both=text + multimodal + image, multi=text + multimodal, text=text)


# Files, as published, where LAVIS is not needed


@pytest.fixture
def published(tmp_path, monkeypatch):
    "The published files at a reduced size, and a house for which this is the full size and LAVIS is absent."
    small = {
        **SIZES["small"],
        "qformer": {**SIZES["small"]["qformer"], "vocabulary": len(write_vocabulary(tmp_path).read_text().split()) + 1},
    }
    monkeypatch.setattr(blip2, "SIZES", {**SIZES, "full": small})
    monkeypatch.setattr(blip2, "import_lavis", lambda: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "urlretrieve", no_network)
    qformer, tower = QFormer(**small["qformer"]), clip_tower(**small["trunk"])
    state = {
        **qformer.state_dict(),
        "Qformer.cls.predictions.bias": torch.zeros(3),
        "temp": torch.tensor(0.07),
        "vision_proj.weight": torch.zeros(2, 2),
        "Qformer.bert.embeddings.position_ids": torch.arange(512)[None],
    }
    torch.save({"model": state}, tmp_path / "blip2_pretrained_vitL.pth")
    torch.save({**tower.half().state_dict(), "ln_post.weight": torch.ones(64)}, tmp_path / "clip_vit_L.pth")
    return tmp_path, qformer.eval(), tower.float()


def no_network(url, *args, **options):
    raise urllib.error.URLError("Name or service not known")


def test_published_files_are_read_back_without_lavis(published):
    folder, qformer, tower = published
    for place in (folder, folder / "blip2_pretrained_vitL.pth"):
        backbone, images = (
            make_backbone("blip2", weights=str(place)),
            torch.randn(2, 3, 56, 56),
        )  # vocab.txt lies beside
        tokens, image, text, query = say(backbone, images, CAPTIONS[:2])
        with torch.no_grad():
            torch.testing.assert_close(image, qformer.image(FrozenTrunk(tower)(images)))
        for role in (backbone.textual, backbone.multimodal, backbone.visual):
            assert all(torch.equal(tensor, role.state_dict()[name]) for name, tensor in qformer.state_dict().items())


def test_a_checkpoint_finds_the_published_files_where_they_were_or_where_the_flag_says(published, tmp_path_factory):
    folder, qformer, tower = published
    here = tmp_path_factory.mktemp("here") / "weights"
    here.mkdir()
    for name in ("blip2_pretrained_vitL.pth", "clip_vit_L.pth", "vocab.txt"):
        shutil.copyfile(folder / name, here / name)
    save_checkpoint(CaLa(make_backbone("blip2", weights=str(here), tokenizer=str(here))), folder / "best")
    assert not any("trunk" in name for name in load_file(folder / "best/model.safetensors"))
    for moved, flags in ((False, {}), (True, dict(backbone_weights=str(folder), tokenizer=str(folder)))):
        if moved:
            shutil.rmtree(here)
        model = build_model(ModelFlags(checkpoint=folder / "best", **flags))
        assert torch.equal(model.backbone.trunk.module.conv1.weight, tower.conv1.weight)
        named = describe_run(DataFlags(checkpoint=folder / "best", device="cpu", **flags), model)["weights"]
        assert list(named) == [
            "checkpoint",
            *["backbone_weights/blip2_pretrained_vitL.pth", "backbone_weights/clip_vit_L.pth"] * moved,
        ] and all(len(file["sha256"]) == 64 for file in named.values())
    with pytest.raises(CalaError, match="--backbone-weights"):
        build_model(ModelFlags(checkpoint=folder / "best"))


def test_trunk_inside_the_file_serves_as_well(published):
    folder, qformer, tower = published
    state = torch.load(folder / "blip2_pretrained_vitL.pth", weights_only=True)["model"]
    (folder / "clip_vit_L.pth").unlink()
    torch.save(
        {"model": {**state, **{f"visual_encoder.{n}": t for n, t in tower.state_dict().items()}}},
        folder / "blip2_pretrained_vitL.pth",
    )
    backbone = make_backbone("blip2", weights=str(folder), tokenizer=str(folder / "vocab.txt"))
    assert torch.equal(backbone.trunk.module.conv1.weight, tower.conv1.weight)


def test_a_url_is_fetched_once_into_the_cache_that_lavis_uses(published, monkeypatch):
    folder, qformer, tower = published
    fetched = []

    def network(url, to, *args, **options):
        fetched.append(url)
        Path(to).write_bytes((folder / url.rsplit("/", 1)[-1]).read_bytes())

    monkeypatch.setattr(weights, "urlretrieve", network)
    for place in (None, blip2.LAVIS_FILES + "blip2_pretrained_vitL.pth"):
        make_backbone("blip2", weights=place, tokenizer=str(folder))
    assert fetched == [blip2.LAVIS_FILES + name for name in ("blip2_pretrained_vitL.pth", "clip_vit_L.pth")]


def test_no_network_names_file_url_and_flag(published):
    folder, *_ = published
    for name, flag, options in [
        ("blip2_pretrained_vitL.pth", "--backbone-weights", {}),
        ("vocab.txt", "--tokenizer", dict(weights=str(folder), tokenizer="nowhere")),
    ]:
        with pytest.raises(CalaError) as raised:
            make_backbone("blip2", **options)
        line = str(raised.value)
        assert name in line and f"/{name}" in line and "https://" in line and flag in line and "\n" not in line
    for options in ({}, dict(weights="nowhere.pth")):  # all three files in the first line
        with pytest.raises(
            CalaError,
            match="blip2_pretrained_vitL.pth is missing .*clip_vit_L.pth from there and BERT's vocab.txt next to it",
        ):
            make_backbone("blip2", **options)


def test_no_network_spares_the_retries_of_lavis(published, monkeypatch):
    folder, *_ = published
    monkeypatch.setattr(weights, "urlopen", no_network)
    monkeypatch.setattr(blip2, "import_lavis", lambda: pytest.fail)
    with pytest.raises(CalaError, match="blip2_pretrained_vitL.pth is missing"):
        make_backbone("blip2")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
    folder.rename(folder.with_name("moved"))
    (folder / "checkpoints").mkdir(parents=True)
    for path in folder.with_name("moved").iterdir():
        path.rename(folder / "checkpoints" / path.name)
    assert make_backbone("blip2", tokenizer=str(folder / "checkpoints")).dim == 64  # cached files serve


def test_no_network_and_no_cached_vocabulary_is_one_line(published, monkeypatch):
    folder, *_ = published
    (folder / "vocab.txt").unlink()
    monkeypatch.setattr(blip2, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(CalaError, match=r"vocab.txt is missing .*huggingface.co/bert-base-uncased.*--tokenizer"):
        make_backbone("blip2", weights=str(folder))


def test_a_model_that_is_not_published_is_refused_with_random_weights_too():
    with pytest.raises(CalaError, match="--model-name RN50x4: choose pretrain_vitL, pretrain, coco"):
        make_backbone("blip2", model_name="RN50x4", random_weights="small")


@pytest.mark.parametrize("form", BOMBS)
def test_a_file_that_would_execute_code_is_refused(published, form):
    folder, *_ = published
    BOMBS[form](Bomb(folder / "exploded"), folder / "blip2_pretrained_vitL.pth", "model")
    with pytest.raises(CalaError, match="could execute code"):
        make_backbone("blip2", weights=str(folder))
    assert not (folder / "exploded").exists()


def test_files_that_are_something_else_are_one_line(published):
    folder, *_ = published
    path, whole = folder / "blip2_pretrained_vitL.pth", (folder / "blip2_pretrained_vitL.pth").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>404</html>", b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(CalaError, match="blip2_pretrained_vitL.pth"):
            make_backbone("blip2", weights=str(folder))
    for content in (
        [1],
        {},
        {"model": 3},
        {"model": {}},
        {"model": {"ln_vision.weight": torch.ones(64)}},
        {"model": {"ln_vision.weight": "x"}},
        {"model": {1: 2}},
    ):
        torch.save(content, path)
        with pytest.raises(CalaError):
            make_backbone("blip2", weights=str(folder))
    path.write_bytes(whole)
    torch.save({"conv1.weight": torch.zeros(1)}, folder / "clip_vit_L.pth")
    with pytest.raises(CalaError, match="not the weights of this trunk"):
        make_backbone("blip2", weights=str(folder))


def test_a_vocabulary_of_another_size_is_refused(published):
    folder, *_ = published
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY[:-3]))
    with pytest.raises(CalaError, match="--tokenizer"):
        make_backbone("blip2", weights=str(folder))


# ViT-g, in each layout that exists


LAYOUTS = ["lavis", "whole", "published", "first", "proposed", "shards", "snapshot", "bin", "half"]


def write_vit_g(folder, layout, pixels=56, model_name="pretrain"):
    "A small random ViT-g model in a layout; the path to give, and the weights by LAVIS's names."
    torch.manual_seed(0)
    trunk = {name: tensor.half().float() for name, tensor in draw_eva(pixels=pixels).items()}
    vocabulary = len(write_vocabulary(folder).read_text().split()) + 1
    qformer = QFormer(**{**SIZES["small"]["qformer"], "vocabulary": vocabulary}).state_dict()
    name = blip2.PUBLISHED[model_name].qformer
    if layout in ("lavis", "half"):
        published = {n: t.half() if layout == "half" else t for n, t in trunk.items()}
        torch.save({**published, "blocks.3.norm1.weight": torch.ones(64)}, folder / "eva_vit_g.pth")
        torch.save({"model": {**qformer, "temp": torch.tensor(0.07)}}, folder / name)
        return folder, qformer, trunk
    if layout == "whole":
        torch.save({"model": {**qformer, **{f"visual_encoder.{n}": t for n, t in trunk.items()}}}, folder / name)
        return folder / name, qformer, trunk
    state = convert_to_hub(qformer, trunk, layout if layout in ("first", "proposed") else "published")
    if layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif layout == "shards":
        for number in (0, 1):
            part = {n: t for place, (n, t) in enumerate(state.items()) if place % 2 == number}
            save_file(part, folder / f"model-0000{number + 1}-of-00002.safetensors")
    elif layout == "snapshot":
        snapshot = folder / "snapshots" / "e39"
        for path in (folder / "refs", snapshot, folder / "snapshots" / "older"):
            path.mkdir(parents=True)
        (folder / "refs" / "main").write_text("e39")
        save_file(state, folder / "blob")
        (snapshot / "model.safetensors").symlink_to(folder / "blob")
    else:
        save_file(state, folder / "model.safetensors")
    return folder, qformer, trunk


@pytest.fixture
def without_lavis(monkeypatch):
    "Let the sizes of `write_vit_g` be the published ones, and LAVIS be absent."
    small = {**SIZES["small"], "qformer": {**SIZES["small"]["qformer"], "vocabulary": len(VOCABULARY) + 1}}
    monkeypatch.setattr(blip2, "SIZES", {**SIZES, "full": small})
    monkeypatch.setattr(blip2, "import_lavis", lambda: None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vit_g_is_read_without_lavis_in_each_layout(tmp_path, without_lavis, layout):
    place, qformer, trunk = write_vit_g(tmp_path, layout)
    backbone = make_backbone("blip2", model_name="pretrain", weights=str(place), tokenizer=str(tmp_path))
    for name, tensor in translate_trunk(trunk).items():
        torch.testing.assert_close(backbone.trunk.module.state_dict()[name], tensor, atol=0, rtol=0)
    for name, tensor in qformer.items():
        assert torch.equal(backbone.visual.state_dict()[name], tensor)
    assert backbone.trunk(torch.randn(1, 3, 56, 56)).shape == (1, 17, 64)


@pytest.mark.parametrize("layout", ["whole", "published"])
def test_coco_reads_larger_pictures_and_is_not_rounded(tmp_path, without_lavis, monkeypatch, layout):
    published = blip2.PUBLISHED["coco"]._replace(size=84)
    monkeypatch.setitem(blip2.PUBLISHED, "coco", published)
    trunk_sizes = dict(width=64, layers=3, heads=2)
    monkeypatch.setitem(blip2.SIZES["full"], "trunk", trunk_sizes)
    place, _, trunk = write_vit_g(tmp_path, layout, pixels=84, model_name="coco")
    backbone = make_backbone("blip2", model_name="coco", weights=str(place), tokenizer=str(tmp_path))
    assert backbone.size == 84 and backbone.transform()(Image.new("RGB", (60, 90))).shape == (3, 84, 84)
    assert backbone.trunk(torch.randn(1, 3, 84, 84)).shape == (1, 37, 64)
    assert torch.equal(backbone.trunk.module.positional_embedding, trunk["pos_embed"][0])


@pytest.mark.parametrize("model_name, layout", [("pretrain", "lavis"), ("pretrain", "published"), ("coco", "whole")])
def test_three_files_of_the_released_program_go_with_vit_g(tmp_path, without_lavis, monkeypatch, model_name, layout):
    pixels = 84 if model_name == "coco" else 56
    monkeypatch.setitem(blip2.PUBLISHED, "coco", blip2.PUBLISHED["coco"]._replace(size=84))
    monkeypatch.setitem(blip2.SIZES["full"], "trunk", dict(width=64, layers=3, heads=2, image_size=pixels))
    place, qformer, _ = write_vit_g(tmp_path, layout, pixels, model_name)
    paths = {}
    for number, role in enumerate(BLIP2_ROLES.values()):
        paths[role] = str(tmp_path / f"{role}.pt")
        state = {name: tensor + number for name, tensor in qformer.items()}
        torch.save({"epoch": 1, "Blip2Qformer": state}, paths[role])
    options = dict(paths, backbone_weights=str(place), tokenizer=str(tmp_path))
    backbone = build_model(ModelFlags(**options, blip2_model_name=model_name)).backbone
    for number, role in enumerate(BLIP2_ROLES):
        torch.testing.assert_close(
            getattr(backbone, role).query_tokens, qformer["query_tokens"] + number, atol=0, rtol=0
        )
    assert backbone.query(backbone.trunk(torch.randn(1, 3, pixels, pixels)), ["red"]).feature.isfinite().all()
    if layout == "lavis":
        with pytest.raises(CalaError, match="holds the file of pretrain; give --blip2-model-name pretrain$"):
            build_model(ModelFlags(**options))
    with pytest.raises(CalaError, match="--blip2-model-name belongs to the three --blip2-...-path"):
        build_model(ModelFlags(checkpoint="x", blip2_model_name=model_name))


def test_the_file_of_another_model_names_that_model(tmp_path, without_lavis, monkeypatch):
    place, qformer, _ = write_vit_g(tmp_path, "whole", pixels=364)
    monkeypatch.setitem(blip2.PUBLISHED, "coco", blip2.PUBLISHED["coco"]._replace(width=64))
    with pytest.raises(CalaError, match="pictures of 364 pixels, not 56; give --model-name coco"):
        make_backbone("blip2", model_name="pretrain", weights=str(place))
    wide = {name: torch.zeros(1024) if name.startswith("ln_vision") else tensor for name, tensor in qformer.items()}
    torch.save({"model": wide}, tmp_path / "blip2_pretrained.pth")
    with pytest.raises(CalaError, match="tokens of width 1024, not 64; give --model-name pretrain_vitL"):
        make_backbone("blip2", model_name="pretrain", weights=str(tmp_path))


WRONG_FILES = {  # content -> what the message says of it
    "the ViT-g trunk, eva_vit_g.pth": lambda: draw_eva(),
    "the CLIP trunk, clip_vit_L.pth": lambda: clip_tower(56, 64, 1, 2).state_dict(),
    "BLIP-2 with a language model": lambda: {"query_tokens": torch.zeros(1), "language_model.a": torch.zeros(1)},
    "a Q-Former of the released program": lambda: {"epoch": 1, "Blip2Qformer": QFormer(64, 1, 2).state_dict()},
    "a checkpoint of this project": lambda: {"backbone.visual.query_tokens": torch.zeros(1)},
    "a CLIP model": lambda: {"visual.proj": torch.zeros(1), "logit_scale": torch.zeros(1)},
    "other weights": lambda: {"query_tokens": torch.zeros(1)},
}


@pytest.mark.parametrize("content", WRONG_FILES)
@pytest.mark.parametrize("model_name", blip2.PUBLISHED)
def test_a_wrong_file_is_named_with_the_file_to_give(tmp_path, content, model_name):
    torch.save(WRONG_FILES[content](), tmp_path / "weights.pth")
    with pytest.raises(CalaError) as raised:
        make_backbone("blip2", model_name=model_name, weights=str(tmp_path / "weights.pth"))
    line, published = str(raised.value), blip2.PUBLISHED[model_name]
    assert f"weights.pth holds {content}" in line and f"needs {published.qformer}" in line and "\n" not in line


def test_a_wrong_trunk_is_named(tmp_path, without_lavis):
    place, qformer, trunk = write_vit_g(tmp_path, "lavis")
    for content, message in (
        ({"model": qformer}, "eva_vit_g.pth is not of the published form"),
        (qformer, "eva_vit_g.pth holds a Q-Former; give eva_vit_g.pth as published"),
        (clip_tower(56, 64, 1, 2).state_dict(), "holds the CLIP trunk, clip_vit_L.pth; give eva_vit_g.pth"),
        ({n: t for n, t in trunk.items() if "blocks.2" not in n}, "resblocks.2.*give eva_vit_g.pth as published"),
        ({n: t for n, t in trunk.items() if "v_bias" not in n}, "attn.in_proj_bias.*give eva_vit_g.pth as published"),
    ):
        torch.save(content, tmp_path / "eva_vit_g.pth")
        with pytest.raises(CalaError, match=message):
            make_backbone("blip2", model_name="pretrain", weights=str(place))
    (tmp_path / "eva_vit_g.pth").unlink()
    with pytest.raises(CalaError, match="eva_vit_g.pth is missing"):
        make_backbone("blip2", model_name="pretrain", weights=str(place))
    with pytest.raises(CalaError, match="holds no trunk; --model-name coco needs blip2_finetune_coco.pth"):
        make_backbone("blip2", model_name="coco", weights=str(tmp_path / "blip2_pretrained.pth"))


def test_two_different_tensors_for_one_place_are_refused(tmp_path, without_lavis):
    place, *_ = write_vit_g(tmp_path, "proposed")
    state = load_file(place / "model.safetensors")
    state["embeddings.LayerNorm.bias"] += 1
    save_file(state, place / "model.safetensors")
    with pytest.raises(CalaError, match="two different tensors .*LayerNorm.bias: .*qformer.layernorm.bias"):
        make_backbone("blip2", model_name="pretrain", weights=str(place))


def test_a_checkpoint_of_vit_g_finds_its_weights_again(tmp_path, without_lavis):
    place, *_ = write_vit_g(tmp_path, "snapshot")
    backbone = make_backbone("blip2", model_name="pretrain", weights=str(place), tokenizer=str(tmp_path))
    save_checkpoint(CaLa(backbone), tmp_path / "best")
    flags = dict(backbone_weights=str(place), tokenizer=str(tmp_path))
    model = build_model(ModelFlags(checkpoint=tmp_path / "best", **flags))
    assert torch.equal(model.backbone.trunk.module.conv1.bias, backbone.trunk.module.conv1.bias)
    named = describe_run(DataFlags(checkpoint=tmp_path / "best", device="cpu", **flags), model)["weights"]
    assert list(named) == ["checkpoint", "backbone_weights/model.safetensors"]


def test_random_weights_of_vit_g_have_its_trunk():
    backbone = make_backbone("blip2", model_name="pretrain", random_weights="small")
    assert backbone.trunk.module.conv1.bias is not None
    assert clip_tower(56, 64, 1, 2).conv1.bias is None


# Random weights


def test_random_weights_come_only_by_flag_and_say_so(published, capsys):
    backbone = make_backbone("blip2", random_weights="small")
    assert "RANDOM WEIGHTS (small)" in capsys.readouterr().err and backbone.save_trunk
    again, images = make_backbone(**backbone.config), torch.randn(2, 3, 56, 56)
    for first, second in zip(say(backbone, images, CAPTIONS[:2]), say(again, images, CAPTIONS[:2])):
        assert torch.equal(first, second)
    with pytest.raises(CalaError, match="is missing"):
        make_backbone("blip2")


def test_precision_of_the_trunk_is_a_choice():
    images = torch.randn(1, 3, 56, 56)
    tokens = {
        kind: make_backbone("blip2", random_weights="small", precision=kind).trunk(images)
        for kind in ("auto", "fp32", "bf16", "fp16")
    }
    assert [t.dtype for t in tokens.values()][:2] == [torch.float32] * 2 and torch.equal(tokens["auto"], tokens["fp32"])
    for kind in ("bf16", "fp16"):
        torch.testing.assert_close(tokens[kind].float(), tokens["fp32"], atol=0.1, rtol=0.05)
    with pytest.raises(CalaError, match="choose auto"):
        make_backbone("blip2", random_weights="small", precision="int8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_trunk_runs_in_float16_on_a_gpu():
    backbone = make_backbone("blip2", random_weights="small").cuda()
    assert backbone.trunk(torch.randn(1, 3, 56, 56).cuda()).dtype == torch.float16

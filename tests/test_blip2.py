"BLIP-2: against LAVIS where it is installed, and against its published file format everywhere."

import shutil
import urllib.error
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import cala.backbones.blip2 as blip2
import cala.backbones.weights as weights
from cala.backbones.blip2 import SIZES
from cala.backbones.blip2 import FrozenTrunk
from cala.backbones.blip2 import WordPieces
from cala.backbones.blip2 import clip_tower
from cala.backbones.blip2 import load_lavis_state
from cala.backbones.blip2 import load_tower
from cala.encoders import make_backbone
from cala.errors import CalaError
from cala.library.checkpoint import save_checkpoint
from cala.library.flags import DataFlags
from cala.library.flags import ModelFlags
from cala.library.loading import build_model
from cala.library.results import describe_run
from cala.model import CaLa
from cala.qformer import QFormer
from hostile import BOMBS
from hostile import Bomb
from lavis_helpers import VOCABULARY
from lavis_helpers import Stub
from lavis_helpers import allow_float64
from lavis_helpers import features
from lavis_helpers import lavis_model
from lavis_helpers import needs_lavis
from lavis_helpers import offline_lavis
from lavis_helpers import write_vocabulary

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


@needs_lavis
def test_vit_g_comes_through_lavis_and_equals_lavis(tmp_path, monkeypatch):
    "`pretrain`: EVA-CLIP ViT-g at its width, of its 39 blocks two."
    from lavis.models import eva_vit

    whole = eva_vit.VisionTransformer
    monkeypatch.setattr(eva_vit, "VisionTransformer", lambda **options: whole(**{**options, "depth": 2}))
    model, images = lavis_model(tmp_path, vit_model="eva_clip_g", **SMALL), torch.randn(2, 3, 224, 224)
    state = model.state_dict()
    torch.save(model.visual_encoder.state_dict(), tmp_path / "eva_vit_g.pth")
    torch.save(
        {
            "model": {
                name: tensor
                for name, tensor in state.items()
                if not name.startswith(("visual_encoder.", "Qformer.cls."))
            }
        },
        tmp_path / "blip2_pretrained.pth",
    )
    eva_vit.convert_weights_to_fp16(model.visual_encoder)
    model.float()
    with torch.no_grad():
        outputs = [
            model.visual_encoder(images),
            *(features(model, mode, images, CAPTIONS[:2]) for mode in ("image", "text", "multimodal")),
        ]

    monkeypatch.setattr(
        blip2,
        "SIZES",
        {**SIZES, "full": dict(qformer=dict(width=64, layers=3, heads=4, vocabulary=len(VOCABULARY) + 1), trunk={})},
    )
    monkeypatch.setattr(blip2, "find_file", lambda place, *rest: tmp_path / place.rsplit("/", 1)[-1])
    with offline_lavis(tmp_path, **SMALL):
        backbone = make_backbone("blip2", model_name="pretrain")
    assert type(backbone.trunk.module).__module__ == "lavis.models.eva_vit" and outputs[0].shape == (2, 257, 1408)
    same(say(backbone, images, CAPTIONS[:2]), outputs)


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
        expected = released_step(*three, model.hca, model.tac, reference, CAPTIONS, target)
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
        released_step(*three, model.hca, model.tac, reference, CAPTIONS, target),
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


def test_vit_g_without_lavis_says_what_it_needs(published):
    with pytest.raises(CalaError, match="pretrain needs salesforce-lavis"):
        make_backbone("blip2", model_name="pretrain")


def test_a_model_that_is_not_published_is_refused_with_random_weights_too():
    with pytest.raises(CalaError, match="--model-name RN50x4: choose pretrain_vitL or pretrain"):
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

"LAVIS without network, for the tests that compare with it."

import importlib.util
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

needs_lavis = pytest.mark.skipif(
    not importlib.util.find_spec("lavis"),
    reason="compares with salesforce-lavis, which is not installed (it needs Python below 3.12)",
)

VOCABULARY = """
    [PAD] [unused0] [UNK] [CLS] [SEP] [MASK] the a and make remove move red blue green star circle square two three
    larger smaller dress shirt sleeve ##s ##less ##er long short is more less with . , ! ? ' - added in of to it un
    ##able cafe 在 " ( ) [ ] 3 d ##ec ##c
""".split()


class Stub(nn.Module):
    "Stands for the vision trunk and costs nothing: a picture (B, 3, 4, 4) becomes 17 tokens of `width` numbers."

    def __init__(self, width):
        super().__init__()
        self.num_features, self.project = width, nn.Linear(48, 17 * width)

    def forward(self, images):
        return self.project(images.flatten(1)).unflatten(1, (17, self.num_features))


def write_vocabulary(folder):
    "A bert-base-uncased vocabulary in small, as vocab.txt in `folder`."
    path = Path(folder) / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


@contextmanager
def offline_lavis(folder, **sizes):
    """LAVIS reads its files from `folder`, where it would use the network.

    These are bert-base-uncased's tokenizer, configuration and weights (random), the files of both trunks, and the
    checkpoint. `sizes` are those of BERT's configuration, full if left out.
    """
    from lavis.models import clip_vit, eva_vit
    from lavis.models.blip2_models import blip2

    tokenizer = blip2.BertTokenizer(str(write_vocabulary(folder)))
    config = blip2.BertConfig(vocab_size=len(VOCABULARY), **sizes)

    def find_in_folder(url, **options):
        return str(Path(folder) / url.rsplit("/", 1)[-1])

    with ExitStack() as stack:
        for place, name, stand_in in [
            (blip2.BertTokenizer, "from_pretrained", lambda name: tokenizer),
            (blip2.BertConfig, "from_pretrained", lambda name: config),
            (blip2.BertLMHeadModel, "from_pretrained", lambda name, config: blip2.BertLMHeadModel(config)),
            (clip_vit, "download_cached_file", find_in_folder),
            (eva_vit, "download_cached_file", find_in_folder),
            (blip2, "download_cached_file", find_in_folder),
        ]:
            stack.enter_context(patch.object(place, name, stand_in))
        yield


def lavis_model(folder, trunk=None, seed=0, vit_model="clip_L", **sizes):
    """LAVIS's Blip2Qformer as `pretrain_vitL` builds it (with eva_clip_g: as `pretrain` does), every tensor random.

    `trunk` replaces the vision module.
    """
    from lavis.models.blip2_models import blip2
    from lavis.models.blip2_models.blip2_qformer import Blip2Qformer

    torch.manual_seed(seed)
    for name in ("clip_vit_L.pth", "eva_vit_g.pth"):
        torch.save({}, Path(folder) / name)  # LAVIS takes what is in it, and here nothing is
    with offline_lavis(folder, **sizes), ExitStack() as stack:
        if trunk is not None:
            stand_in = classmethod(lambda cls, *args: (trunk, blip2.LayerNorm(trunk.num_features)))
            stack.enter_context(patch.object(blip2.Blip2Base, "init_vision_encoder", stand_in))
        model = Blip2Qformer(vit_model=vit_model, vit_precision="fp32")
    for name, parameter in model.named_parameters():  # biases and normalisations too, so that none can hide
        if name.startswith("visual_encoder.") and trunk is not None:
            continue
        if parameter.ndim < 2:
            torch.nn.init.normal_(
                parameter, mean=1.0 if ("orm" in name or "ln_" in name) and "weight" in name else 0.0, std=0.1
            )
    return model.eval()


def features(model, mode, images=None, captions=None):
    "LAVIS's embeddings (B, L, d), with their gradients."
    output = type(model).extract_features.__wrapped__(model, {"image": images, "text_input": captions}, mode=mode)
    return getattr(output, f"{mode}_embeds")


def allow_float64(monkeypatch):
    "LAVIS casts to float32 in two places, which would end all digits after the seventh; within the test it does not."
    from lavis.models.blip2_models import blip2

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(blip2.LayerNorm, "forward", torch.nn.LayerNorm.forward)


def draw_eva(width=64, layers=3, pixels=56):
    "Random weights of the ViT-g trunk at a reduced size, named and shaped as in LAVIS's eva_vit_g.pth."
    inner = int(width * 4.3637)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (pixels // 14) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
    }
    for number in range(layers):
        block = {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.fc1.weight": (inner, width),
            "mlp.fc1.bias": (inner,),
            "mlp.fc2.weight": (width, inner),
            "mlp.fc2.bias": (width,),
        }
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


HUB_TRUNK = {  # LAVIS's trunk -> transformers, as its script of conversion lists them
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
HUB_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def convert_to_hub(qformer, trunk, layout="published"):
    """Weights by LAVIS's names as transformers stores them.

    `layout` is that of the published file, or of an older version: first, or proposed."""
    state = {}
    for name, tensor in trunk.items():
        if name in HUB_TRUNK:
            state[f"vision_model.{HUB_TRUNK[name]}"] = tensor
            continue
        _, number, rest = name.split(".", 2)
        block = f"vision_model.encoder.layers.{number}"
        if rest in ("attn.q_bias", "attn.v_bias"):
            if layout == "first":
                state[f"{block}.self_attn.{rest.removeprefix('attn.')}"] = tensor
            elif rest == "attn.q_bias":
                v_bias = trunk[name.replace("q_bias", "v_bias")]
                state[f"{block}.self_attn.qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), v_bias])
            continue
        layer, part = rest.rsplit(".", 1)
        state[f"{block}.{HUB_BLOCK[layer]}.{part}"] = tensor
    for name, tensor in qformer.items():
        new = name.replace("ln_vision.", "vision_model.post_layernorm.")
        new = new.replace("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm.")
        new = new.replace("Qformer.bert.embeddings.", "qformer.embeddings." if layout == "first" else "embeddings.")
        new = new.replace("Qformer.bert.", "qformer.").replace("attention.self.", "attention.attention.")
        state[new] = tensor
        if layout == "proposed" and "embeddings.LayerNorm" in name:
            state[name.replace("Qformer.bert.", "")] = tensor.clone()
    projections = ("vision_proj", "text_proj") if layout == "proposed" else ("vision_projection", "text_projection")
    for name in (*projections, "itm_head"):
        state |= {f"{name}.weight": torch.zeros(2, 2), f"{name}.bias": torch.zeros(2)}
    return state

"What more than one test file needs."
from pathlib import Path

VOCABULARY = """[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] the a and make remove move red blue green star circle square two three larger smaller
    dress shirt sleeve ##s ##less ##er long short is more less with . , ! ? ' - add in of to it un ##able cafe 在""".split()


def write_vocabulary(folder):
    "A bert-base-uncased vocabulary in small, as vocab.txt in `folder`."
    path = Path(folder) / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


def lavis_model(folder, trunk=None, seed=0, trunk_layers=None):
    """LAVIS's Blip2Qformer as `pretrain_vitL` builds it, random: its five ways to the network are closed.

    They are tokenizer, configuration and weights of bert-base-uncased, the CLIP-L file, and the checkpoint, which is never asked for here.
    `trunk` replaces the vision module."""
    from unittest.mock import patch

    import torch
    from lavis.models import clip_vit
    from lavis.models.blip2_models import blip2
    from lavis.models.blip2_models.blip2_qformer import Blip2Qformer

    write_vocabulary(folder)
    tokenizer = blip2.BertTokenizer(str(Path(folder) / "vocab.txt"))
    config = blip2.BertConfig(vocab_size=len(VOCABULARY), position_embedding_type="absolute")
    torch.manual_seed(seed)
    vision = (lambda cls, *args: (trunk, blip2.LayerNorm(trunk.num_features))) if trunk is not None else None
    torch.save({}, Path(folder) / "clip_vit_L.pth")
    with patch.object(blip2.BertTokenizer, "from_pretrained", lambda name: tokenizer), \
         patch.object(blip2.BertConfig, "from_pretrained", lambda name: config), \
         patch.object(blip2.BertLMHeadModel, "from_pretrained", lambda name, config: blip2.BertLMHeadModel(config)), \
         patch.object(clip_vit, "download_cached_file", lambda url, **options: str(Path(folder) / "clip_vit_L.pth")):
        if vision is None: return Blip2Qformer(vit_model="clip_L", vit_precision="fp32").eval()
        with patch.object(blip2.Blip2Base, "init_vision_encoder", classmethod(vision)): return Blip2Qformer(vit_model="clip_L").eval()

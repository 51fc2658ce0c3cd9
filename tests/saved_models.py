"Models for commands that read one: a tiny untrained model, and BLIP-2 in the files of the released program."

import torch

from cala.encoders import make_backbone
from cala.model import CaLa

WORDS = "make the a red blue star circle smaller larger move it left is shorter and has sleeves".split()
ROLES = "textual", "multimodal", "visual"


def tiny(frame="sum", seed=0, **options):
    torch.manual_seed(seed)
    return CaLa(make_backbone("tiny", vocabulary=WORDS, width=32, heads=2, layers=2), cir_frame=frame, **options)


def blip2_in_three_files(folder, **options):
    "A reduced BLIP-2 whose three Q-Formers differ, and the words of the released command line that name their files."
    backbone, words = make_backbone("blip2", random_weights="small", **options), []
    for number, role in enumerate(ROLES):
        torch.manual_seed(number)
        for parameter in getattr(backbone, role).parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        torch.save(
            {"epoch": 1, "Blip2Qformer": getattr(backbone, role).state_dict()}, folder / f"saved_blip2_{role}.pt"
        )
        words += [f"--blip2-{role}-path", folder / f"saved_blip2_{role}.pt"]
    return backbone, words

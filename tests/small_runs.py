"A world and a backbone so small that a whole run of cala-train takes a moment, for tests of whole commands."
import re

from cala.data import open_dataset
from cala.encoders import load_backbone
from cala.encoders import make_backbone
from cala.encoders import read_vocabulary
from cala.encoders import save_backbone
from cala.worlds import draw_cirr
from cala.worlds import draw_fashioniq


def draw_small_world(root):
    "Both data sets, 36 triplets each to train on, and small.safetensors: a stage-1 file, smaller than tiny (32 wide, two layers) and with dropout."
    draw_cirr(root, train=6, val=4, test1=1, size=48)
    draw_fashioniq(root, train=12, val=8, test=1, size=48)
    splits = [open_dataset(name, root, "train") for name in ("CIRR", "FashionIQ")]
    words = read_vocabulary([text for data in splits for triplet in data.triplets for text in triplet.captions])
    save_backbone(make_backbone("tiny", vocabulary=words, width=32, heads=2, layers=2, queries=4, dropout=.1), root / "small.safetensors")
    return root


def still_flags(world, output, *more, **how):
    "Words of a run without any dropout: still.safetensors is small.safetensors without it."
    if not (world / "still.safetensors").exists():
        trained = load_backbone(world / "small.safetensors")
        still = make_backbone(**{**trained.config, "dropout": 0.})
        still.load_state_dict(trained.state_dict())
        save_backbone(still, world / "still.safetensors")
    return train_flags(world, output, "--backbone-weights", world / "still.safetensors", "--hca-dropout", 0, *more, **how)


def train_flags(world, output, *more, epochs=2):
    "Words of cala-train for `epochs` times two steps on CIRR; later words overrule earlier ones."
    words = ["--dataset", "CIRR", "--data-root", world, "--encoder-arch", "tiny", "--backbone-weights", world / "small.safetensors", "--batch-size", 16,
             "--learning-rate", "1e-3", "--num-epochs", epochs, "--max-epoch", epochs, "--output", output, *more]
    return [str(word) for word in words]


def lines_of(text):
    "Lines on a terminal, less those of progress bars."
    lines = [part.split("\r")[-1] for part in text.splitlines()]
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)]

"""cala-train with the real backbones' code, random weights at a reduced size, on a drawn world."""
import pandas as pd
import pytest
from small_runs import draw_small_world, train_flags

from cala.commands import run_command
from cala.model import load_checkpoint
from cala.scripts.train import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return draw_small_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("arch", ["blip2", "clip"])
def test_a_reduced_backbone_trains_validates_and_is_read_back(world, tmp_path, arch):
    words = [*train_flags(world, tmp_path / "run", epochs=1), "--encoder-arch", arch, "--random-weights", "small"]
    at = words.index("--backbone-weights")
    del words[at:at + 2]
    run_command(main.__wrapped__, words, prog="cala-train")
    assert len(pd.read_csv(tmp_path / "run" / "metrics.csv")) == 1
    assert load_checkpoint(tmp_path / "run" / "last").backbone.name == arch

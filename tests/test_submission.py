"cala-cirr-submission as a whole: files that the server would take, from every source of a model, and mistakes."

import json
from pathlib import Path

import pytest
import torch

from cala.data import CIRR
from cala.encoders import make_backbone
from cala.library.checkpoint import save_checkpoint
from cala.library.cli import run_command
from cala.library.submission import check_cirr_submission
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa
from cala.retrieval import evaluate
from cala.scripts.cirr_submission import main
from saved_models import blip2_in_three_files, tiny
from stand_ins import REAL, needs_real, stand_in_root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_cirr(tmp_path_factory.mktemp("world"), train=1, val=9, test1=9, size=48)


def submit(*words):
    return run_command(main, [str(w) for w in words], prog="cala-cirr-submission")


@pytest.mark.parametrize("frame", ["sum", "artemis", "combiner"])
def test_files_are_complete_and_checked_for_every_frame(root, tmp_path, frame):
    save_checkpoint(tiny(frame), tmp_path / "best")
    paths = submit(
        "--submission-name",
        "mine",
        "--data-root",
        root,
        "--checkpoint",
        tmp_path / "best",
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    )
    assert [p.name for p in paths] == ["recall_submission_mine.json", "recall_subset_submission_mine.json"]
    for path in paths:
        check_cirr_submission(path, CIRR(root, "test1"))
    facts = json.loads((tmp_path / "out/mine_facts.json").read_text())
    assert facts["frame"] == frame and len(facts["weights"]["checkpoint"]["sha256"]) == 64


def test_on_val_the_files_score_what_validation_measures(root, tmp_path):
    model = tiny()
    save_checkpoint(model, tmp_path / "best", recipe=dict(transform="squarepad"))
    paths = submit(
        "--split",
        "val",
        "--data-root",
        root,
        "--checkpoint",
        tmp_path / "best",
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    )
    val = CIRR(root, "val", model.backbone.transform("squarepad"))
    recall, subset = (json.loads(p.read_text()) for p in paths)

    def share(content, k):
        return 100 * sum(t.target in content[t.pair_id][:k] for t in val.triplets) / len(val)

    result = evaluate(model, val, progress=False)
    for k in (1, 5, 10, 50):
        assert share(recall, k) == pytest.approx(result[f"recall_at{k}"])
    for k in (1, 2, 3):
        assert share(subset, k) == pytest.approx(result[f"group_recall_at{k}"])


@pytest.mark.parametrize("frame", ["sum", "artemis"])
def test_the_released_command_line_with_files_of_the_released_program_and_of_ours(root, tmp_path, frame):
    backbone, files = blip2_in_three_files(tmp_path)
    model = CaLa(backbone, frame)
    save_checkpoint(model, tmp_path / "best")
    where = ["--data-root", root, "--device", "cpu", "--random-weights", "small"]
    seed = ["--submission-name", "cirr_submission", "--combining-function", frame]
    if frame == "artemis":
        torch.save({"epoch": 1, "Artemis": released_names(model.frame)}, tmp_path / "artemis.pt")
    its_frame = dict(sum=[], artemis=["--combiner-path", tmp_path / "artemis.pt"])[
        frame
    ]  # where the released program keeps it, the seed does not say
    released = submit(*seed, *files, *its_frame, *where, "--output", tmp_path / "released")
    ours = submit(
        *seed,
        *[tmp_path / "best" if isinstance(word, Path) else word for word in files],
        *where,
        "--output",
        tmp_path / "ours",
    )
    whole = submit(*seed, "--checkpoint", tmp_path / "best", *where[:4], "--output", tmp_path / "whole")
    for a, b, c in zip(released, ours, whole):
        assert a.read_bytes() == b.read_bytes() == c.read_bytes()


def released_names(artemis):
    "Weights of ARTEMIS under the names that the released program gives them."
    names = {"transform": "Transform_m.0", "explicit": "Attention_EM.attention", "implicit": "Attention_IS.attention"}
    return {
        next(
            (released_name + name[len(ours) :] for ours, released_name in names.items() if name.startswith(ours + ".")),
            name,
        ): tensor
        for name, tensor in artemis.state_dict().items()
    }


def test_a_clip_checkpoint_is_submitted_with_every_frame(root, tmp_path):
    backbone = make_backbone("clip", random_weights="small")
    for frame in ("sum", "artemis", "combiner"):
        save_checkpoint(CaLa(backbone, frame), tmp_path / frame)
        for path in submit(
            "--data-root",
            root,
            "--checkpoint",
            tmp_path / frame,
            "--device",
            "cpu",
            "--output",
            tmp_path / f"of_{frame}",
        ):
            check_cirr_submission(path, CIRR(root, "test1"))


def test_every_mistake_is_one_line_with_status_2(root, tmp_path, capsys):
    save_checkpoint(tiny(), tmp_path / "best")
    good = ["--data-root", root, "--checkpoint", tmp_path / "best", "--device", "cpu", "--output", tmp_path / "out"]

    def says(*words):
        with pytest.raises(SystemExit) as ended:
            submit(*good, *words)
        lines = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    assert "no split 'test2'" in says("--split", "test2")
    assert "a plain file name" in says("--submission-name", "../mine")
    assert "are missing" in says("--checkpoint", "None", "--blip2-visual-path", tmp_path / "visual.pt")
    assert "needs trained weights" in says("--combining-function", "artemis")
    assert "name two models" in says("--clip-model-path", "clip.pt")
    (tmp_path / "bomb.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "bomb.pt" in says("--combining-function", "combiner", "--combiner-path", tmp_path / "bomb.pt")
    assert "is not empty" in says("--output", tmp_path)
    assert "did you mean --split?" in says("--spilt", "val")
    small = draw_cirr(tmp_path / "small", train=1, val=1, test1=3, size=48)
    assert "names 50 pictures for each query, and test1 has 18" in says("--data-root", small)
    next(small.rglob("test1-*.png")).unlink()
    assert "1 of 18 pictures of CIRR test1 is missing" in says("--data-root", small)


@needs_real
def test_a_submission_for_the_real_test1_split_is_accepted_by_the_checker(tmp_path):
    root = stand_in_root(REAL, tmp_path / "data", "CIRR", "test1")
    save_checkpoint(tiny(), tmp_path / "best")
    paths = submit(
        "--data-root",
        root,
        "--checkpoint",
        tmp_path / "best",
        "--transform",
        "plain",
        "--device",
        "cpu",
        "--batch-size",
        512,
        "--output",
        tmp_path / "out",
    )
    data = CIRR(root, "test1")
    assert (len(data), len(data.gallery)) == (4148, 2315)
    for path in paths:
        check_cirr_submission(path, data)
    assert paths[0].stat().st_size < 5_000_000

"cala-validate as a whole: every source of a model, both data sets, mistakes, and the real annotations at full size."

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import cala.backbones.clip
from cala.backbones.clip import find_architecture, shrink
from cala.data import CIRR, open_dataset
from cala.encoders import make_backbone
from cala.library.checkpoint import read_recipe, save_checkpoint
from cala.library.cli import run_command
from cala.library.flags import DataFlags
from cala.library.loading import hash_weights
from cala.library.worlds.garments import draw_fashioniq
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa
from cala.retrieval import evaluate
from cala.scripts.validate import main
from saved_models import blip2_in_three_files, tiny
from stand_ins import REAL, needs_real, stand_in_root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("worlds")
    draw_cirr(root, train=1, val=6, test1=10, size=48)
    draw_fashioniq(root, train=1, val=10, test=1, size=48)
    return root


def validate(*words):
    return run_command(main, [str(w) for w in words], prog="cala-validate")


def refused(capsys, *words):
    "The one line of a command that ends with status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        validate(*words)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("frame", ["sum", "artemis", "combiner"])
def test_a_checkpoint_is_judged_as_evaluate_does_and_the_files_say_on_what(root, tmp_path, capsys, frame):
    model = tiny(frame)
    save_checkpoint(
        model,
        tmp_path / "best",
        recipe=dict(dataset="CIRR", transform="squarepad", target_ratio=1.25, api_key="secret"),
    )
    validate(
        "--data-root", root, "--checkpoint", tmp_path / "best", "--device", "cpu", "--output", tmp_path / "out"
    )  # the data set is the checkpoint's
    content = json.loads((tmp_path / "out/result.json").read_text())
    expected = evaluate(model, CIRR(root, "val", model.backbone.transform("squarepad")), progress=False)
    assert content["result"] == pytest.approx(dict(expected)) and content["frame"] == frame
    assert (content["result"]["protocol"], content["result"]["gallery"], content["result"]["queries"]) == (
        "reference left out",
        36,
        36,
    )
    assert content["recipe"]["transform"] == "squarepad" and "secret" not in json.dumps(content)
    assert content["weights"]["checkpoint"]["sha256"] == read_recipe(tmp_path / "best")["sha256"]
    ranks = pd.read_csv(tmp_path / "out/ranks.csv")
    assert 100 * (ranks["rank"] <= 5).mean() == pytest.approx(content["result"]["recall_at5"])
    assert 100 * (ranks["group_rank"] <= 1).mean() == pytest.approx(content["result"]["group_recall_at1"])
    rows = pd.read_csv(tmp_path / "out/result.csv").set_index("row")
    assert list(rows.index) == ["chance", "image only", "text only", frame]
    assert rows.loc[frame, "weights_sha256"] == content["weights"]["checkpoint"]["sha256"] and set(rows["gallery"]) == {
        36
    }
    assert json.loads(rows.loc[frame, "recipe"]) == content["recipe"] and set(rows["protocol"]) == {
        "reference left out"
    }
    printed = capsys.readouterr().out
    assert "CIRR val, reference left out; gallery 36; 36 queries" in printed and "Rs@1" in printed
    validate(
        "--data-root", root, "--checkpoint", tmp_path / "best", "--device", "cpu", "--output", tmp_path / "out"
    )  # its own files may be written again


def test_cached_tokens_give_the_same_result_and_are_used_again(root, tmp_path):
    save_checkpoint(tiny(), tmp_path / "best", recipe=dict(dataset="CIRR"))
    words = [
        "--data-root",
        root,
        "--checkpoint",
        tmp_path / "best",
        "--device",
        "cpu",
        "--cache-dir",
        tmp_path / "tokens",
    ]
    for name, more in dict(off=[], made=["--cache", "tokens"], read=["--cache", "tokens"]).items():
        validate(*words, *more, "--output", tmp_path / name)
    off, made, read = (
        json.loads((tmp_path / name / "result.json").read_text())["result"] for name in ("off", "made", "read")
    )
    assert made == read and made == pytest.approx(off, abs=3)  # a tie in the last bit may change places


@pytest.mark.parametrize("protocol", ["original", "val"])
def test_fashioniq_is_judged_under_the_protocol_asked_for(root, tmp_path, capsys, protocol):
    save_checkpoint(tiny(), tmp_path / "best")
    validate(
        "--dataset",
        "fashioniq",
        "--protocol",
        protocol.title(),
        "--data-root",
        root,
        "--checkpoint",
        tmp_path / "best",
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    )
    result = json.loads((tmp_path / "out/result.json").read_text())["result"]
    assert (
        result["protocol"] == protocol
        and f"protocol {protocol}; gallery dress {result['dress_gallery']}" in capsys.readouterr().out
    )
    assert result["mean"] == pytest.approx(
        sum(result[f"{c}_recall_at{k}"] for c in ("dress", "shirt", "toptee") for k in (10, 50)) / 6
    )
    assert set(pd.read_csv(tmp_path / "out/ranks.csv")["category"]) == {"dress", "shirt", "toptee"}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The model and the three files of the released command line.

    The fine-tuned RN50x4 is as small as --random-weights makes it."""
    folder = tmp_path_factory.mktemp("released")
    clip = make_backbone("clip", random_weights="small", seed=3)
    model = CaLa(
        clip,
        cir_frame="combiner",
        tac_weight=0.0,
        hca_weight=0.0,
        frame_options=dict(projection_dim=2560, hidden_dim=5120),
    )
    torch.save({"epoch": 4, "Combiner": model.frame.state_dict()}, folder / "combiner.pt")
    whole = {
        name.removeprefix("language."): tensor for name, tensor in clip.language.state_dict(prefix="language.").items()
    }
    whole |= {f"visual.{name}": tensor for name, tensor in clip.trunk.module.visual.state_dict().items()}
    whole |= {f"visual.{name}": tensor for name, tensor in clip.head.state_dict().items()}
    torch.save({"epoch": 9, "CLIP": whole | {"logit_scale": torch.ones([])}}, folder / "tuned_clip_best.pt")
    return folder, model


COMMAND = """--dataset {dataset} --combining-function {function} --combiner-path {folder}/combiner.pt
    --projection-dim 2560 --hidden-dim 5120 --clip-model-name RN50x4
    --clip-model-path {folder}/tuned_clip_best.pt --target-ratio 1.25 --transform targetpad"""


@pytest.mark.parametrize("function", ["combiner", "sum"])
@pytest.mark.parametrize("dataset", ["CIRR", "FashionIQ"])
def test_the_released_command_line_clip_and_a_combiner_from_released_files(
    root, released, tmp_path, capsys, monkeypatch, dataset, function
):
    folder, model = released
    monkeypatch.setattr(cala.backbones.clip, "find_architecture", lambda name: shrink(find_architecture(name)))
    words, where = (
        COMMAND.format(dataset=dataset, function=function, folder=folder).split(),
        ["--data-root", root, "--device", "cpu", "--output", tmp_path / "out"],
    )
    validate(*words, *where)
    content = json.loads((tmp_path / "out/result.json").read_text())
    assert (content["backbone"], content["frame"]) == ("clip", function) and all(
        len(file["sha256"]) == 64 for file in content["weights"].values()
    )
    judged = CaLa(model.backbone, function, tac_weight=0.0, hca_weight=0.0) if function == "sum" else model
    data = open_dataset(dataset, root, "val", model.backbone.transform("targetpad", 1.25))
    assert content["result"] == pytest.approx(dict(evaluate(judged, data, progress=False)))
    if function == "combiner":
        assert "--projection-dim 2561: this Combiner has 2560" in refused(
            capsys, *words, *where, "--projection-dim", 2561
        )


def test_three_blip2_files_of_the_released_program_make_the_model_that_saved_them(root, tmp_path):
    backbone, files = blip2_in_three_files(tmp_path, seed=5)
    model = CaLa(backbone, tac_weight=0.0, hca_weight=0.0)
    validate(
        "--dataset",
        "CIRR",
        *files,
        "--random-weights",
        "small",
        "--data-root",
        root,
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    )
    fresh = make_backbone("blip2", random_weights="small")  # the trunk of the command: the same flag, no seed
    backbone.trunk.load_state_dict(fresh.trunk.state_dict())
    expected = evaluate(model, CIRR(root, "val", backbone.transform("targetpad")), progress=False)
    assert json.loads((tmp_path / "out/result.json").read_text())["result"] == pytest.approx(dict(expected))


def test_a_checkpoint_of_another_backbone_holds_no_q_former(root, tmp_path, capsys):
    save_checkpoint(CaLa(make_backbone("clip", random_weights="small")), tmp_path / "clip")
    roles = [
        word for role in ("textual", "multimodal", "visual") for word in (f"--blip2-{role}-path", tmp_path / "clip")
    ]
    with pytest.raises(SystemExit):
        validate(
            "--dataset",
            "CIRR",
            *roles,
            "--random-weights",
            "small",
            "--data-root",
            root,
            "--device",
            "cpu",
            "--output",
            tmp_path / "out",
        )
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"{tmp_path / 'clip'} is of another backbone and holds no textual Q-Former; --blip2-textual-path" in line
        and len(line) < 300
    )


def test_weights_that_no_flag_names_are_hashed_as_they_are_in_memory(root, tmp_path):
    words = ["--dataset", "CIRR", "--random-weights", "small", "--data-root", root, "--device", "cpu"]
    hashes = []
    for name, model in dict(one="RN50x4", two="RN50x4", other="ViT-B-32").items():
        validate(*words, "--clip-model-name", model, "--output", tmp_path / name)
        hashes.append(json.loads((tmp_path / name / "result.json").read_text())["weights"]["tensors"]["sha256"])
        assert pd.read_csv(tmp_path / name / "result.csv").set_index("row").loc["sum", "weights_sha256"] == hashes[-1]
    assert len(hashes[0]) == 64 and hashes[0] == hashes[1] != hashes[2]


def test_a_safetensors_file_that_is_no_checkpoint_is_hashed(tmp_path):
    path = tmp_path / "open_clip_model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    for name in ("clip_model_path", "backbone_weights"):
        hashes = hash_weights(DataFlags(**{name: str(path)}))
        assert list(hashes) == [name] and len(hashes[name]["sha256"]) == 64


def test_every_mistake_is_one_line_with_status_2(root, tmp_path, capsys):
    save_checkpoint(tiny(), tmp_path / "best")
    good = ["--data-root", root, "--device", "cpu", "--output", tmp_path / "out", "--checkpoint", tmp_path / "best"]

    def says(*words):
        return refused(capsys, *good, *words)

    assert "--dataset CIRR, FashionIQ or CIRCO" in says()
    good += ["--dataset", "CIRR"]
    assert "give --dataset CIRR, FashionIQ or CIRCO" in says("--dataset", "COCO")
    assert "no folder" in says("--data-root", tmp_path / "nowhere")
    assert "annotations of CIRR" in says("--data-root", tmp_path)
    assert "is no checkpoint" in says("--checkpoint", tmp_path)
    assert "give another --clip-model-name" in refused(
        capsys, *good[:6], "--dataset", "CIRR", "--clip-model-name", "RN50x5"
    )
    assert "--checkpoint and --clip-model-name name two models" in says("--clip-model-name", "RN50x4")
    assert "--blip2-multimodal-path, --blip2-visual-path are missing" in refused(
        capsys, *good[:6], "--dataset", "CIRR", "--blip2-textual-path", "x"
    )
    assert "needs trained weights" in says("--combining-function", "combiner")
    assert "choose one of sum, artemis, combiner" in says("--combining-function", "mean")
    assert "no file" in says("--combining-function", "artemis", "--combiner-path", tmp_path / "none.pt")
    assert "no transform" in says("--transform", "stretch")
    assert "--batch-size 0" in says("--batch-size", "0")
    assert "--num-workers -1: give 0 or more" in says("--num-workers", "-1")
    assert "leave out --random-weights" in says("--random-weights", "small")
    assert "no model is named; give --checkpoint" in refused(capsys, *good[:6], "--dataset", "CIRR")
    assert f"{tmp_path / 'best'} is a checkpoint folder of cala; give it as --checkpoint" in refused(
        capsys, *good[:6], "--dataset", "CIRR", "--clip-model-path", tmp_path / "best"
    )
    assert f"{tmp_path} is a folder" in refused(capsys, *good[:6], "--dataset", "CIRR", "--clip-model-path", tmp_path)
    assert "--target-ratio -1.0" in says("--target-ratio", "-1")
    assert "--precision int8" in says("--precision", "int8")
    assert "--cache ram: choose one of off, tokens" in says("--cache", "ram")
    assert "give cpu, cuda" in says("--device", "abacus")
    assert "no protocol" in says("--dataset", "FashionIQ", "--protocol", "both")
    assert "is not empty" in says("--output", tmp_path)
    (tmp_path / "note").write_text("")
    assert "is a file" in says("--output", tmp_path / "note")
    assert not (tmp_path / "out/result.json").exists()
    assert "did you mean --batch-size?" in says("--bath-size", "3")


def test_ctrl_c_leaves_no_empty_folder(root, tmp_path, monkeypatch):
    save_checkpoint(tiny("sum"), tmp_path / "best", recipe=dict(dataset="CIRR"))

    def interrupt(*arguments):
        assert (tmp_path / "out").is_dir()  # this run's alone
        raise KeyboardInterrupt

    monkeypatch.setattr("cala.library.loading.embed_dataset", interrupt)
    with pytest.raises(SystemExit) as ended:
        validate("--data-root", root, "--checkpoint", tmp_path / "best", "--output", tmp_path / "out")
    assert ended.value.code == 130 and not (tmp_path / "out").exists()


def test_a_missing_picture_and_a_broken_one_are_named(tmp_path, capsys):
    root = draw_cirr(tmp_path / "data", train=1, val=4, test1=1, size=48)
    save_checkpoint(tiny(), tmp_path / "best")
    words = [
        "--dataset",
        "CIRR",
        "--data-root",
        root,
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
        "--checkpoint",
        tmp_path / "best",
    ]
    gone, bad = sorted(root.rglob("dev-*.png"))[:2]
    gone.unlink()
    assert gone.name in refused(capsys, *words)
    with pytest.warns(UserWarning, match="1 of 24"):
        validate(*words, "--allow-missing")
    assert json.loads((tmp_path / "out/result.json").read_text())["result"]["missing"] == 1
    bad.write_bytes(b"no picture")
    capsys.readouterr()
    with pytest.warns(UserWarning), pytest.raises(SystemExit) as ended:
        validate(*words, "--allow-missing", "--num-workers", "1")
    assert ended.value.code == 2 and f"cala-validate: {bad} cannot be decoded" in capsys.readouterr().err


def test_from_a_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cala.scripts.validate", "--dataset", "CIRR", "--data-root", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "annotations of CIRR" in done.stderr


SIZES = dict(dress=(3817, 2628, 2017), shirt=(6346, 3089, 2038), toptee=(5373, 2902, 1961))


@needs_real
def test_real_cirr_annotations_at_full_size(tmp_path):
    root = stand_in_root(REAL, tmp_path / "data", "CIRR", "val")
    save_checkpoint(tiny(), tmp_path / "best")
    validate(
        "--dataset",
        "CIRR",
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
    result = json.loads((tmp_path / "out/result.json").read_text())["result"]
    assert (result["gallery"], result["queries"]) == (2297, 4181)
    assert len(pd.read_csv(tmp_path / "out/ranks.csv")) == 4181


@pytest.fixture(scope="module")
def garments(tmp_path_factory):
    if not REAL.is_dir():
        pytest.skip("the real annotations are not here")
    return stand_in_root(REAL, tmp_path_factory.mktemp("garments"), "FashionIQ", "val")


@pytest.mark.parametrize("protocol", ["original", "val"])
def test_real_fashioniq_annotations_have_the_published_gallery_sizes(garments, tmp_path, protocol):
    save_checkpoint(tiny(), tmp_path / "best")
    validate(
        "--dataset",
        "FashionIQ",
        "--data-root",
        garments,
        "--checkpoint",
        tmp_path / "best",
        "--protocol",
        protocol,
        "--transform",
        "plain",
        "--device",
        "cpu",
        "--batch-size",
        512,
        "--output",
        tmp_path / "out",
    )
    result = json.loads((tmp_path / "out/result.json").read_text())["result"]
    for category, (original, val, queries) in SIZES.items():
        assert result[f"{category}_gallery"] == (original if protocol == "original" else val)
        assert result[f"{category}_queries"] == queries

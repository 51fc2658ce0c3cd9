"""Each quirk of the released program is kept by a switch, or corrected.

The table stands in nbs/tutorials/paper_in_one_notebook."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from inspect import signature
from pathlib import Path

import pandas as pd
import pytest
import torch

from cala.data import open_dataset
from cala.encoders import make_backbone
from cala.library.cli import parse_flags, run_command
from cala.library.run import train
from cala.library.worlds.garments import draw_fashioniq
from cala.library.worlds.scenes import draw_cirr
from cala.model import CaLa, Encoded
from cala.recipe import Recipe
from cala.scripts.train import main
from cala.training import Learner, make_schedule, parameter_groups
from small_runs import lines_of, train_flags

PROJECT = Path(__file__).parents[1]


def recipe(world, output, *more, **how):
    return parse_flags(Recipe, train_flags(world, output, *more, **how))


@pytest.fixture(scope="module")
def clip():
    return make_backbone("clip", random_weights="small", seed=1)


def pictures(n, size, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def table():
    "Rows of the quirk table: number -> cells."
    cells = json.loads((PROJECT / "nbs/tutorials/paper_in_one_notebook.ipynb").read_text())["cells"]
    text = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "markdown")
    rows = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| \d+ \|", line)
    ]
    return {int(row[0]): row[1:] for row in rows}


def test_every_switch_of_the_table_is_a_flag_of_cala_train_or_an_argument(table):
    flags, arguments = {f"--{f.name.replace('_', '-')}" for f in fields(Recipe)}, signature(CaLa).parameters
    switches = " ".join(row[2] for row in table.values())
    named = set(re.findall(r"--[a-z-]+", switches))
    assert (
        named <= flags
        and {
            "--schedule",
            "--objective",
            "--recipe",
            "--features",
            "--padding",
            "--learned-temperature",
            "--allow-missing",
            "--comet-offline",
        }
        <= named
    )
    assert set(re.findall(r"CaLa\((\w+)", switches)) == {"normalise", "mask_padding"} and {
        "normalise",
        "mask_padding",
    } <= set(arguments)
    for flag, value in re.findall(r"(--[a-z-]+) (released|paper|cosine|text|raw|read)", switches):
        parse_flags(Recipe, [flag, value])  # the values are choices too


def test_the_table_has_every_quirk_and_every_room_it_names(table):
    assert list(table) == list(range(1, len(table) + 1)) and len(table) >= 10
    for row in table.values():
        for room in re.findall(r"`(\w+)`", row[3]):
            assert (PROJECT / f"nbs/{room}.ipynb").is_file(), room


# ---------------------------------------------------------------- switches


def rates(model, schedule, epochs=30, steps=4, min_lr=0.0):
    "Learning rates of every group before each of the steps."
    how = Recipe(schedule=schedule, learning_rate=1e-5, min_lr=min_lr, max_epoch=15, num_epochs=epochs)
    optimizer = torch.optim.AdamW(parameter_groups(model, how.learning_rate))
    schedule, found = make_schedule(optimizer, how, steps), []
    for _ in range(epochs * steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return list(zip(*found))


def test_schedule_released_moves_group_0_once_an_epoch_and_climbs_back_and_ours_does_neither(world):
    model = CaLa(make_backbone("tiny", vocabulary=["a"], width=16, heads=2, layers=2), cir_frame="artemis")
    first, *others = rates(model, "released")
    assert first == pytest.approx([1e-5 * (1 + math.cos(math.pi * (step // 4) / 15)) / 2 for step in range(120)])
    assert first[-4] > 9e-6 and len(others) == 3 and all(set(group) == {group[0]} for group in others)
    for factor, group in zip((1, 2, 2, 10), rates(model, "cosine", min_lr=1e-6)):
        assert group[0] == pytest.approx(factor * 1e-5) and group[-1] == pytest.approx(factor * 1e-6)
        assert all(now >= after for now, after in zip(group, group[1:])) and group[60:] == pytest.approx(
            [factor * 1e-6] * 60
        )


def test_the_log_of_a_run_shows_which_schedule_it_had(world, tmp_path):
    for schedule in ("cosine", "released"):
        train(recipe(world, tmp_path / schedule, "--max-epoch", 1, "--schedule", schedule), progress=False)
    ours, theirs = (
        list(pd.read_csv(tmp_path / schedule / "log.csv").learning_rate) for schedule in ("cosine", "released")
    )
    assert ours == pytest.approx([1e-3, 5e-4, 0, 0]) and theirs == pytest.approx([1e-3, 1e-3, 0, 0])


def test_validation_in_training_runs_without_dropout_and_training_goes_on_with_it(world, tmp_path, monkeypatch):
    def spy(trainer):
        modes = dict(step=[], validation=[])

        def dropouts():
            return {
                part.training for part in trainer.model.modules() if isinstance(part, torch.nn.Dropout) and part.p > 0
            }

        forward, gallery = trainer.model.forward, trainer.model.embed_gallery
        trainer.model.forward = lambda *batch: (modes["step"].append(dropouts()), forward(*batch))[1]
        trainer.model.embed_gallery = lambda x: (modes["validation"].append(dropouts()), gallery(x))[1]
        return modes

    opened = []
    monkeypatch.setattr(
        Learner, "prepare", lambda self, prepare=Learner.prepare: (prepare(self), opened.append(spy(self)))[0]
    )
    train(recipe(world, tmp_path / "run"), progress=False)
    assert (
        opened[0] == dict(step=[{True}] * 4, validation=[{False}] * len(opened[0]["validation"]))
        and len(opened[0]["validation"]) >= 2
    )


def beside_a_longer_caption(model):
    "By how much the TBIA logit of a triplet changes when a longer caption joins its batch."
    torch.manual_seed(0)
    tokens = model.tokens(pictures(4, model.backbone.size))
    captions = ["red", "make it a large red circle on the left"]
    with torch.no_grad():
        both = model.compare(model.embed(tokens[:2], captions, tokens[2:])).z_tbia[0, 0]
        alone = model.compare(model.embed(tokens[:1], captions[:1], tokens[2:3])).z_tbia[0, 0]
    return abs(float(both - alone))


@pytest.mark.parametrize(
    "options, depends",
    [
        (dict(), True),
        (dict(mask_padding=True), False),
        (dict(objective="paper"), False),
        (dict(objective="paper", mask_padding=False), True),
    ],
)
def test_a_caption_depends_on_its_batch_only_where_hca_reads_padding(options, depends):
    torch.manual_seed(3)
    model = CaLa(
        make_backbone("tiny", vocabulary="make it a large red circle on the left".split(), width=32, heads=2, layers=2),
        **options,
    ).eval()
    assert (beside_a_longer_caption(model) > 1e-3) if depends else (beside_a_longer_caption(model) < 1e-5)


def test_objective_released_mixes_logits_and_paper_adds_losses():
    torch.manual_seed(0)
    backbone = make_backbone("tiny", vocabulary=["red", "blue"], width=32, heads=2, layers=2)
    a, b = pictures(3, 48), pictures(3, 48, seed=1)

    def entropy(z):
        return torch.nn.functional.cross_entropy(z, torch.arange(3))

    for objective, total in [
        ("released", lambda q, t, c: 0.1 * entropy(t) + 0.9 * entropy(0.45 * c + 0.55 * q)),
        ("paper", lambda q, t, c: entropy(q) + 0.1 * entropy(t) + 0.1 * entropy(c)),
    ]:
        model = CaLa(backbone, objective=objective).eval()
        with torch.no_grad():
            z = model.compare(model.embed(a, ["red", "blue", "red blue"], b))
            assert float(model(a, ["red", "blue", "red blue"], b).total) == pytest.approx(float(total(*z)), abs=1e-4)


def test_learned_temperature_is_applied_by_its_flag_and_ranks_alike(world, tmp_path):
    words = ["--cir-frame", "artemis", "--max-epoch", 1]
    cold, warm = (
        train(recipe(world, tmp_path / name, *words, *more, epochs=1), progress=False).model
        for name, more in (("cold", []), ("warm", ["--learned-temperature"]))
    )
    assert (
        float(cold.frame.temperature.detach()) == pytest.approx(2.65926) != float(warm.frame.temperature.detach())
    )  # not trained; trained
    warm.frame.load_state_dict(cold.frame.state_dict())
    r, c, t = torch.randn(3, 5, 32)
    torch.testing.assert_close(
        warm.frame.scores(r, c, t), cold.frame.scores(r, c, t) * math.exp(2.65926), atol=1e-3, rtol=1e-4
    )


def test_encoder_text_trains_where_the_released_program_refuses(world, tmp_path):
    done = train(
        recipe(
            world,
            tmp_path / "run",
            "--encoder-arch",
            "blip2",
            "--backbone-weights",
            "None",
            "--random-weights",
            "small",
            "--encoder",
            "text",
            epochs=1,
        ),
        progress=False,
    )
    assert {
        name.split(".")[1]
        for name, p in done.model.named_parameters()
        if p.requires_grad and name.startswith("backbone.")
    } == {"textual"}


# ---------------------------------------------------------------- CLIP, mended


def test_clip_tokens_are_places_of_the_feature_map_and_not_a_scrambled_view(clip):
    images, heard = pictures(2, clip.size), []
    layer = [part for part in clip.trunk.modules() if hasattr(part, "layer4")][0].layer4
    hook = layer.register_forward_hook(lambda module, args, out: heard.append(out))
    tokens = clip.trunk(images)
    hook.remove()
    B, w, H, W = heard[0].shape
    places = torch.stack([heard[0][:, :, y, x] for y in range(H) for x in range(W)], dim=1)
    torch.testing.assert_close(tokens, places)
    assert not torch.allclose(tokens, heard[0].reshape(B, H * W, w))  # the plain view


def test_clip_tac_has_a_learned_class_token(clip):
    model = CaLa(clip, hca_weight=0.0)
    assert model.compositor.class_token.requires_grad and "compositor.class_token" in model.state_dict()
    a, b = (clip.image(clip.trunk(pictures(2, clip.size, seed))).tokens.detach() for seed in (0, 1))
    torch.testing.assert_close(
        model.compositor(a, b), model.compositor(a, b), atol=0, rtol=0
    )  # not drawn at every pass
    model.compositor(a, b).sum().backward()
    assert model.compositor.class_token.grad.abs().sum() > 0


def test_hca_asks_with_clips_feature_and_not_with_the_corner_of_its_map(clip):
    torch.manual_seed(0)
    model = CaLa(clip, tac_weight=0.0).eval()
    with torch.no_grad():
        F_r, F_c, F_t, _ = model.encode(pictures(2, clip.size), ["red", "blue"], pictures(2, clip.size, 1))
    F_t = F_t._replace(tokens=torch.randn_like(F_t.tokens))  # fresh weights give all places nearly the same
    assert torch.equal(F_r.tokens[:, 0], F_r.feature)

    def bridge(row=None):
        tokens = F_r.tokens.clone()
        if row is not None:
            tokens[:, row] = 100 * torch.randn(64)
        return model.compare(model.associate(Encoded(F_r._replace(tokens=tokens), F_c, F_t, None))).z_tbia

    assert torch.equal(bridge(1), bridge()) and not torch.allclose(bridge(0), bridge(), rtol=1e-2)


def test_batch_norm_of_the_frozen_clip_stays_in_evaluation_mode(clip):
    model = CaLa(clip).train()
    norms = [part for part in clip.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    before = [norm.running_mean.clone() for norm in norms]
    model(pictures(2, clip.size), ["red", "blue"], pictures(2, clip.size, 1)).total.backward()
    assert norms and not any(norm.training for norm in norms)
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before))


# ---------------------------------------------------------------- data


def test_missing_pictures_stop_the_run_or_are_counted_in_every_result(tmp_path, world, capsys):
    root = tmp_path / "data"
    draw_cirr(root, train=4, val=3, test1=1, size=48)
    validation = open_dataset("CIRR", root, "val")
    gone = validation.gallery.paths[validation.gallery.position(validation.triplets[0].reference)]
    gone.unlink()
    words = ["--data-root", root, "--batch-size", 8]
    with pytest.raises(SystemExit) as ended:
        run_command(main, train_flags(world, tmp_path / "run", *words, epochs=1), prog="cala-train")
    (line,) = lines_of(capsys.readouterr().err)
    assert (
        ended.value.code == 2
        and "1 of 18 pictures of CIRR val is missing" in line
        and str(gone) in line
        and "--allow-missing" in line
    )
    with pytest.warns(UserWarning, match="1 of 18 pictures .* left out, with"):
        run_command(main, train_flags(world, tmp_path / "run", *words, "--allow-missing", epochs=1), prog="cala-train")
    row = pd.read_csv(tmp_path / "run/metrics.csv").iloc[-1]
    assert (row.missing, row.gallery) == (1, 17) and row.queries < 18


@pytest.mark.parametrize(
    "name, renamed",
    [
        ("CIRR", {"cirr_dataset": "cirr_datasets"}),
        ("FashionIQ", {"images": "image_data"}),
        ("FashionIQ", {"fashionIQ_dataset": "fashioniq_dataset"}),
    ],
)
def test_the_folders_of_the_readme_and_of_the_code_are_both_read(tmp_path, name, renamed):
    draw = dict(
        CIRR=lambda: draw_cirr(tmp_path, train=2, val=1, test1=1, size=48),
        FashionIQ=lambda: draw_fashioniq(tmp_path, train=4, val=2, test=1, size=48),
    )
    draw[name]()
    before = open_dataset(name, tmp_path, "train")
    for old, new in renamed.items():
        for path in list(tmp_path.rglob(old)):
            path.rename(path.with_name(new))
    after = open_dataset(name, tmp_path, "train")
    assert (
        after.triplets == before.triplets and after.gallery.names == before.gallery.names and not after.gallery.missing
    )


# ---------------------------------------------------------------- nothing behind the back

CHILD = """
import ssl, sys
from cala.library.run import train
from cala.recipe import Recipe
from cala.library.cli import parse_flags
FOREIGN = {"comet_ml", "tensorboard", "tensorboardX", "lavis", "open_clip", "wandb", "codecarbon"}
def strangers(): return sorted({name.split(".")[0] for name in sys.modules} & FOREIGN)
print(strangers())
train(parse_flags(Recipe, sys.argv[1:]), progress=False)
print(strangers(), ssl._create_default_https_context is ssl.create_default_context)
"""


def test_training_imports_no_tracker_and_no_foreign_backbone_and_leaves_tls_alone(world, tmp_path):
    "In a process of its own, since other tests import them."
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *train_flags(world, tmp_path / "run", epochs=1)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "[]" and done.stdout.split("\n")[-2] == "[] True"


def test_tls_is_never_turned_off_in_the_source():
    for path in (PROJECT / "cala").rglob("*.py"):
        for word in (
            "_create_unverified_context",
            "verify=False",
            "CERT_NONE",
            "CURL_CA_BUNDLE",
            "check_hostname = False",
        ):
            assert word not in path.read_text(), f"{path}: {word}"


@pytest.mark.parametrize("package", ["salesforce-lavis", "open_clip_torch"])
def test_installed_packages_are_as_their_publishers_made_them(package):
    try:
        files = metadata.files(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"compares the files of {package}, which is not installed")
    listed = [file for file in files if file.suffix == ".py" and file.hash]
    assert len(listed) > 20
    for file in listed:
        digest = base64.urlsafe_b64encode(hashlib.sha256(file.locate().read_bytes()).digest()).rstrip(b"=").decode()
        assert digest == file.hash.value, f"{file} was edited"

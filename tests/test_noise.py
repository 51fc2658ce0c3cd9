"--noise-ratio: which targets are shuffled, that nothing else changes, and how many wrong triplets a model fits."

import json

import pandas as pd
import pytest
import torch

from cala.composition import Sum
from cala.data import open_dataset
from cala.errors import CalaError
from cala.library import noise
from cala.library.cli import run_command
from cala.library.noise import measure_fit, shuffle_targets
from cala.library.run import open_data, open_model
from cala.recipe import Recipe
from cala.retrieval import Embedded
from cala.scripts import train
from small_runs import (
    one_thread,  # noqa: F401
    train_flags,
)


def open_recipe(world, **options):
    options = dict(backbone_weights=str(world / "small.safetensors"), batch_size=8) | options
    return Recipe(data_root=world, encoder_arch="tiny", **options)


@pytest.mark.parametrize("name", ["CIRR", "FashionIQ"])
@pytest.mark.parametrize("ratio, count", [(0, 0), (0.02, 1), (0.25, 9), (0.5, 18), (1, 36)])
def test_a_share_of_the_targets_changes_places_and_nothing_else_does(world, name, ratio, count):
    intact, noisy = open_dataset(name, world, "train"), open_dataset(name, world, "train")
    wrong = shuffle_targets(noisy, ratio, seed=3)
    pairs = list(zip(intact.triplets, noisy.triplets))
    assert {i for i, (before, after) in enumerate(pairs) if before.target != after.target} == set(wrong)
    assert all(before.target == wrong.get(i, after.target) for i, (before, after) in enumerate(pairs))
    assert all((a.reference, a.captions, a.pair_id) == (b.reference, b.captions, b.pair_id) for a, b in pairs)
    assert sorted(t.target for t in noisy.triplets) == sorted(t.target for t in intact.triplets)
    assert count - 6 <= len(wrong) <= count and (len(wrong) > 0) == (count > 1)
    names = noisy.gallery.names
    assert [names[position] for position in noisy.targets] == [t.target for t in noisy.triplets]


def test_the_seed_decides_which_targets_are_shuffled(world):
    first, again, other = (shuffle_targets(open_dataset("CIRR", world, "train"), 0.5, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_noise_comes_after_the_choice_of_triplets_and_leaves_validation_as_it_is(world):
    recipes = [open_recipe(world, triplets=20, noise_ratio=ratio) for ratio in (0, 0.5)]
    (clean, val), (noisy, same_val) = [open_data(recipe, open_model(recipe)) for recipe in recipes]
    assert [t.captions for t in clean.triplets] == [t.captions for t in noisy.triplets]
    assert 0 < sum(a.target != b.target for a, b in zip(clean.triplets, noisy.triplets)) <= 10
    assert val[0].triplets == same_val[0].triplets


def test_the_log_and_the_recipe_name_the_noise_and_batches_stay_the_same(world, tmp_path, capsys):
    rows = {}
    for ratio in (0, 0.5):
        flags = train_flags(world, tmp_path / str(ratio), "--noise-ratio", ratio, "--keep-pictures", epochs=1)
        run_command(train.main.__wrapped__, flags, prog="cala-train")
        out = capsys.readouterr().out
        assert ("--noise-ratio 0.5: the targets of 50 percent of the training triplets are shuffled" in out) == (
            ratio > 0
        )
        recipe = json.loads((tmp_path / str(ratio) / "best" / "recipe.json").read_text())["recipe"]
        assert recipe["noise_ratio"] == ratio
        rows[ratio] = pd.read_csv(tmp_path / str(ratio) / "log.csv")
    plain = train_flags(world, tmp_path / "plain", epochs=1)
    run_command(train.main.__wrapped__, plain, prog="cala-train")
    assert (tmp_path / "plain/log.csv").read_bytes() == (tmp_path / "0/log.csv").read_bytes()
    assert rows[0].loss[0] != rows[0.5].loss[0]
    for ratio in (-0.1, 1.5):
        with pytest.raises(CalaError, match="--noise-ratio"):
            Recipe(noise_ratio=ratio)


def test_the_share_of_fitted_triplets_is_exact_for_models_that_answer_as_trained_or_as_is_true(world, monkeypatch):
    recipe = open_recipe(world, noise_ratio=0.5, batch_size=12)
    data = open_dataset("CIRR", world, "train")
    true = data.targets.clone()
    wrong = shuffle_targets(data, recipe.noise_ratio, recipe.seed)
    gallery = torch.eye(len(data.gallery))
    model = torch.nn.Module()
    model.frame = Sum()
    for answers, expected in ((data.targets, (100, 100, 0)), (true, (100, 0, 100))):
        embedded = Embedded(gallery, gallery[answers], torch.zeros_like(gallery[answers]))
        monkeypatch.setattr(noise, "embed", lambda *_, embedded=embedded, **__: embedded)
        table = measure_fit(model, data, wrong, recipe)
        assert table.triplets.tolist() == [len(data) - len(wrong), len(wrong), len(wrong)]
        assert tuple(table.gallery) == expected
        assert table.batch.iloc[0] == 100
        assert tuple(table.batch) == pytest.approx(expected, abs=15)  # a batch may hold a target twice

"Checkpoints for the Hugging Face Hub, in folders of this machine: nothing here uses the network."

import json

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError

import cala.library.hub
from cala.errors import CalaError
from cala.library.checkpoint import read_recipe, save_checkpoint
from cala.library.hub import FILES, HubCheckpoint
from cala.library.resume import recipe_to_save
from cala.recipe import Recipe
from saved_models import tiny

METRICS = dict(
    dataset="CIRR", split="val", queries=4181, gallery=2297, missing=0, recall_at1=42.5, group_recall_at1=70.0
)


@pytest.fixture
def checkpoint(tmp_path):
    "A checkpoint with a recipe that names folders of this machine, and a further file."
    recipe = Recipe(encoder_arch="tiny", data_root=str(tmp_path / "secret"), output=str(tmp_path / "secret"), seed=3)
    save_checkpoint(tiny(), tmp_path / "last", recipe_to_save(recipe), METRICS, {"state.pt": b"state"})
    return tmp_path / "last"


def test_what_is_saved_loads_and_gives_the_same_features(checkpoint, tmp_path):
    HubCheckpoint(checkpoint).save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted(FILES)
    first = HubCheckpoint(checkpoint).load()
    second = HubCheckpoint.from_pretrained(tmp_path / "saved").load()
    pictures = torch.rand(2, 3, 48, 48)
    assert torch.equal(first.embed_gallery(pictures), second.embed_gallery(pictures))


def test_a_saved_folder_can_be_saved_again_and_another_folder_is_left_alone(checkpoint, tmp_path):
    model = HubCheckpoint(checkpoint)
    for _ in range(2):
        model.save_pretrained(tmp_path / "saved")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("mine")
    with pytest.raises(CalaError, match="thesis.tex is there"):
        model.save_pretrained(tmp_path / "other")


def test_nothing_that_is_saved_names_a_folder_of_this_machine(checkpoint, tmp_path):
    HubCheckpoint(checkpoint).save_pretrained(tmp_path / "saved")
    recipe = read_recipe(tmp_path / "saved")["recipe"]
    assert recipe["seed"] == 3 and "data_root" not in recipe and "output" not in recipe
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in (tmp_path / "saved").iterdir())


def test_a_checkpoint_of_cala_combiner_names_no_folder_either(tmp_path):
    secret = str(tmp_path / "secret")
    model = tiny()
    model.backbone.config = dict(
        name="cala.library.combiner:PictureAlone", of=dict(model.backbone.config, weights=secret)
    )
    weights = dict(checkpoint=dict(path=secret, sha256="0"))
    save_checkpoint(model, tmp_path / "best", dict(checkpoint=secret, combiner_path=secret, weights=weights, seed=3))
    HubCheckpoint(tmp_path / "best").save_pretrained(tmp_path / "saved")
    assert read_recipe(tmp_path / "saved")["recipe"] == dict(weights=dict(checkpoint=dict(sha256="0")), seed=3)
    assert not any(secret.encode() in path.read_bytes() for path in (tmp_path / "saved").iterdir())


def test_the_card_tells_recipe_and_results(checkpoint):
    card = HubCheckpoint(checkpoint).generate_model_card(name="me/cala-cirr", license="mit")
    assert card.data.license == "mit" and card.data.library_name == "cala"
    assert [(each.metric_type, each.metric_value) for each in card.data.eval_results] == [("R@1", 42.5), ("Rs@1", 70.0)]
    assert 'HubCheckpoint.from_pretrained("me/cala-cirr")' in card.text
    assert "cala-train --encoder-arch tiny" in card.text and "--seed 3" in card.text
    assert "| R@1 | Rs@1 |" in card.text and "| 42.50 | 70.00 |" in card.text and "4,181 queries" in card.text


def test_a_checkpoint_without_recipe_and_validation_has_a_card_too(tmp_path):
    save_checkpoint(tiny(), tmp_path / "best")
    text = HubCheckpoint(tmp_path / "best").generate_model_card().text
    assert "holds no validation" in text and "does not tell" in text


def test_an_upload_gets_a_card_with_its_own_name(checkpoint, monkeypatch):
    uploaded = {}

    def upload_folder(self, folder_path, **options):
        uploaded.update(options, files=sorted(path.name for path in folder_path.iterdir()))
        uploaded["card"] = ModelCard.load(folder_path / "README.md").text
        return "https://hub/commit"

    class Repository:
        repo_id = "me/cala-cirr"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, **options: Repository())
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert HubCheckpoint(checkpoint).push_to_hub("me/cala-cirr") == "https://hub/commit"
    assert uploaded["files"] == sorted(FILES) and uploaded["repo_id"] == "me/cala-cirr"
    assert 'from_pretrained("me/cala-cirr")' in uploaded["card"]


@pytest.mark.parametrize("name", ["me/cala-cirr", "not a/name of/the hub"])
def test_a_model_that_cannot_be_fetched_is_one_line(name, monkeypatch):
    def refuse(*words, **options):
        raise LocalEntryNotFoundError("no network\nand no copy")

    monkeypatch.setattr(cala.library.hub, "snapshot_download", refuse)
    with pytest.raises(CalaError, match="cannot be fetched") as error:
        HubCheckpoint.from_pretrained(name, local_files_only=True)
    assert "\n" not in str(error.value)


def test_a_fetched_checkpoint_is_checked_as_any_other(checkpoint, tmp_path):
    HubCheckpoint(checkpoint).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved/recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(backbone=dict(name="strange:Code"))))
    with pytest.raises(CalaError, match="damaged, or was edited by hand"):
        HubCheckpoint.from_pretrained(tmp_path / "saved")

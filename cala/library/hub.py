"""Checkpoints on the Hugging Face Hub: a folder that `cala-train` wrote, with a model card, up and down.

`HubCheckpoint("runs/mine/best").push_to_hub("me/cala-cirr")` uploads one, and
`HubCheckpoint.from_pretrained("me/cala-cirr").load()` fetches it and gives the model. Both methods are those of
huggingface_hub's mixin; a token is needed for the first (`hf auth login`). A fetched checkpoint is read as any other:
its hashes are checked, and no code of it is executed.
"""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .. import __version__
from ..backbones.weights import shorten
from ..errors import CalaError, count_things
from ..model import CaLa
from ..recipe import Recipe
from .ablation import PLACES, spell_command
from .checkpoint import load_checkpoint, read_recipe, seal
from .files import check_output_folder, find_whole_folder, write_atomically
from .flags import BLIP2_ROLES
from .results import is_shown, label_metric

FILES = "model.safetensors", "recipe.json", "config.json", "README.md"
# Fields that tell about a machine: of a recipe, of a backbone's config, and of the list of weights in a recipe.
PRIVATE = {*PLACES, "resume", "tokenizer", "workspace", "comet_offline", "checkpoint", "combiner_path"}
PRIVATE |= {"clip_model_path", *BLIP2_ROLES.values(), "weights", "path"}
SNAPSHOT_OPTIONS = "revision", "cache_dir", "force_download", "local_files_only", "token"  # of snapshot_download
TAGS = ["composed-image-retrieval", "cala"]
NAME = "your-name/your-model"  # in a model card that was not made for an upload
PUBLISHED_TRUNK = (
    "The frozen trunk is that of the published BLIP-2 and not part of this repository; cala fetches it once."
)
CARD = """---
{metadata}
---

# {name}

This model answers composed queries: a picture and a sentence that says what should be different. It was trained with
[cala](https://github.com/cala/cala), which implements CaLa (SIGIR 2024).

- data set: {dataset}
- backbone: {backbone}
- how picture and sentence become one query: {frame}

## Use

```python
from cala import HubCheckpoint

model = HubCheckpoint.from_pretrained("{name}").load()
```

{weights}

## Training

```
{command}
```

## Results

{results}
"""


class HubCheckpoint(ModelHubMixin, library_name="cala", tags=TAGS):
    "A checkpoint folder that can be saved for, pushed to and fetched from the Hugging Face Hub."

    def __init__(
        self,
        folder: str | Path,  # that cala-train wrote (best or last); `CalaError` if it is not intact
    ):
        self.folder = find_whole_folder(folder)
        self.content = read_recipe(folder)
        self._hub_mixin_config = None  # the mixin would save the path of the folder

    def load(
        self,
        **backbone_options: str,  # where this machine keeps published weights: weights, tokenizer
    ) -> CaLa:
        "The model, in evaluation mode."
        return load_checkpoint(self.folder, **backbone_options)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,  # a folder, or user/name on the Hub
        **options: Any,  # of the mixin: revision, token, cache_dir, local_files_only ...
    ) -> "HubCheckpoint":
        "The checkpoint of a folder, or of a repository of the Hub, which is fetched once."
        try:
            return super().from_pretrained(name, **options)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            advice = "give a folder, or user/name of a model on the Hub that this machine can reach"
            raise CalaError(f"{name} cannot be fetched ({shorten(error)}); {advice}") from error

    def push_to_hub(
        self,
        repo_id: str,  # user/name; made if it does not exist
        **options: Any,  # of the mixin: private, token, branch, commit_message ...
    ) -> str:  # address of the commit
        "Upload the checkpoint with a model card."
        options["model_card_kwargs"] = dict(name=repo_id) | (options.get("model_card_kwargs") or {})
        return super().push_to_hub(repo_id, **options)

    def generate_model_card(
        self,
        name: str = NAME,  # user/name on the Hub
        **metadata: Any,  # further lines at the head of the card, such as license="mit"
    ) -> ModelCard:
        "What the model is, how it was trained and what it reached."
        recipe, metrics = self.content["recipe"], self.content["metrics"]
        backbone = self.content["backbone"].get("name")
        dataset = str(recipe.get("dataset") or metrics.get("dataset") or "unknown")
        recalls = {label_metric(key): value for key, value in metrics.items() if is_shown(key)}
        scores = [
            EvalResult(
                task_type="composed-image-retrieval",
                dataset_type=dataset.lower(),
                dataset_name=f"{dataset} {metrics.get('split', 'val')}",
                metric_type=label,
                metric_value=round(value, 2),
            )
            for label, value in recalls.items()
        ]
        if scores:
            metadata |= dict(model_name=name.rpartition("/")[2], eval_results=scores)
        data = ModelCardData(language="en", library_name="cala", tags=TAGS, **metadata)
        card = CARD.format(
            metadata=data.to_yaml(),
            name=name,
            dataset=dataset,
            backbone=backbone,
            frame=self.content["model"].get("cir_frame"),
            weights=PUBLISHED_TRUNK if backbone == "blip2" else "The repository holds all weights.",
            command=describe_training(recipe),
            results=describe_metrics(metrics, recalls),
        )
        return ModelCard(card)

    def _save_pretrained(self, save_directory):
        "Write weights and recipe without what tells about the machine."
        check_output_folder(save_directory, FILES, advice="choose another folder")
        shutil.copyfile(self.folder / "model.safetensors", save_directory / "model.safetensors")
        content = drop_private(self.content) | dict(beside={})
        del content["seal"]
        about = dict(library="cala", version=__version__, backbone=content["backbone"].get("name"))
        for file, value in (("recipe.json", seal(content)), ("config.json", about)):
            write_atomically(save_directory / file, json.dumps(value, indent=1).encode())

    @classmethod
    def _from_pretrained(cls, *, model_id, **options):
        "The checkpoint of a folder, or of a repository of the Hub."
        if Path(model_id).is_dir():
            return cls(model_id)
        known = {name: options[name] for name in SNAPSHOT_OPTIONS if name in options}
        return cls(snapshot_download(model_id, allow_patterns=list(FILES), **known))


def drop_private(
    values: dict,  # of a recipe.json, or a part of it
) -> dict:
    "The values without those that tell about a machine, at every depth."
    shared = {name: value for name, value in values.items() if isinstance(value, dict) or name not in PRIVATE}
    return {name: drop_private(value) if isinstance(value, dict) else value for name, value in shared.items()}


def describe_training(
    recipe: dict,  # of a recipe.json
) -> str:
    "The command line of a recipe, or its values where another command than cala-train wrote it."
    values = {name: value for name, value in drop_private(recipe).items() if value is not None}
    if not values:
        return "The checkpoint does not tell."
    if set(values) <= {each.name for each in fields(Recipe)}:
        return spell_command(Recipe(**values))
    return json.dumps(values)


def describe_metrics(
    metrics: dict,  # of a recipe.json
    recalls: dict[str, float],  # the recalls among them, by their label
) -> str:
    "The validation as a table of Markdown."
    if not recalls:
        return "The checkpoint holds no validation."
    queries = count_things(metrics.get("queries", 0), "query", "queries")
    pictures = count_things(metrics.get("gallery", 0), "picture", "pictures")
    where = f"Validation split, {queries}, {pictures}, percent:"
    if metrics.get("missing"):
        missing = count_things(metrics["missing"], "picture was", "pictures were")
        where = f"{missing} missing. {where}"
    rows = ["| " + " | ".join(recalls) + " |", "|" + " --- |" * len(recalls)]
    rows.append("| " + " | ".join(f"{value:.2f}" for value in recalls.values()) + " |")
    return "\n".join([where, "", *rows])

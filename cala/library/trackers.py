"""Comet, TensorBoard, Weights & Biases: Accelerate's trackers get the recipe and the log of a run, and nothing else."""

import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from accelerate import tracking

from ..backbones.weights import shorten
from ..errors import CalaError
from ..recipe import Recipe
from ..training import Callback, Learner

COMET_OPTIONS = (  # what Comet collects by itself unless each is switched off
    "parse_args",
    "log_code",
    "log_graph",
    "log_git_metadata",
    "log_git_patch",
    "log_env_details",
    "auto_output_logging",
    "auto_param_logging",
    "auto_metric_logging",
    "auto_log_co2",
)
WANDB_SETTINGS = dict(  # likewise
    console="off",
    disable_code=True,
    disable_git=True,
    disable_job_creation=True,
    x_disable_machine_info=True,
    x_disable_meta=True,
    x_disable_stats=True,
    x_save_requirements=False,
)
ADVICE = dict(
    comet="correct --api-key or --workspace, or take --comet-offline FOLDER",
    wandb="run `wandb login`, correct --workspace, or set WANDB_MODE=offline",
)


def require_package(
    package: str,  # as it is imported
):
    "`CalaError` if a package is not installed; nothing is imported."
    if find_spec(package) is None:
        raise CalaError(f"{package} is not installed: pip install {package}, or leave its flag out")


def make_comet(
    recipe: Recipe,  # api_key, workspace, experiment_name, comet_offline
    output: Path,  # the run's folder, whose name is the experiment's if it has none
) -> tracking.GeneralTracker:
    "Accelerate's Comet tracker, online or into an archive; it collects nothing by itself."
    require_package("comet_ml")
    os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
    from comet_ml import ExperimentConfig

    config = ExperimentConfig(
        name=recipe.experiment_name or output.name,
        offline_directory=recipe.comet_offline,
        display_summary_level=0,
        **dict.fromkeys(COMET_OPTIONS, False),
    )
    return tracking.CometMLTracker(
        "cala",
        api_key=recipe.api_key,
        workspace=recipe.workspace,
        online=not recipe.comet_offline,
        experiment_config=config,
    )


def make_wandb(
    recipe: Recipe,  # workspace, experiment_name
    output: Path,  # the run's folder, whose name is the run's if it has none
) -> tracking.GeneralTracker:
    "Accelerate's tracker for Weights & Biases; WANDB_API_KEY and WANDB_MODE work as wandb describes them."
    require_package("wandb")
    return tracking.WandBTracker(
        "cala",
        name=recipe.experiment_name or output.name,
        entity=recipe.workspace,
        dir=str(output),
        settings=WANDB_SETTINGS,
    )


def make_trackers(
    recipe: Recipe,  # tensorboard, api_key, comet_offline, wandb
    output: Path,  # the run's folder
) -> list | None:  # for Accelerate; None where the CSV files are all
    "The trackers that the recipe asks for."
    trackers = []
    if recipe.tensorboard:
        require_package("tensorboard")
        trackers.append(tracking.TensorBoardTracker("tensorboard", logging_dir=str(output)))
    if recipe.comet_offline or recipe.api_key:
        trackers.append(make_comet(recipe, output))
    if recipe.wandb:
        trackers.append(make_wandb(recipe, output))
    return trackers or None


class Track(Callback):
    "Sends the recipe and the rows of the log to the accelerator's trackers."

    order = 60

    def __init__(self):
        self.is_started = False

    def before_fit(self, learner: Learner):
        values = {name: value for name, value in asdict(learner.recipe).items() if value is not None}
        values.pop("api_key", None)
        values["categories"] = ",".join(values["categories"])  # trackers take no lists
        is_comet = learner.recipe.api_key or learner.recipe.comet_offline
        names = [name for name, is_used in (("comet", is_comet), ("wandb", learner.recipe.wandb)) if is_used]
        advice = "; ".join(ADVICE[name] for name in names) or "leave out --tensorboard"
        try:
            learner.accelerator.init_trackers("cala", values)
        except (AttributeError, NameError, TypeError):  # a bug, of cala or of the library: it keeps its traceback
            raise
        except Exception as error:  # of a tracker's library, which has errors of its own
            raise CalaError(f"the tracker does not start ({shorten(error)}); {advice}") from error
        trackers = [each.tracker for each in learner.accelerator.trackers]
        if any(getattr(tracker, "alive", True) is False for tracker in trackers):  # Comet prints why, and would go on
            raise CalaError(f"the tracker does not reach its server; {advice}")
        self.is_started = True

    def after_batch(self, learner: Learner):
        row = learner.log[-1]
        learner.accelerator.log(row, step=row["step"])

    def after_validation(self, learner: Learner):
        row = learner.metrics[-1]
        values = {f"val/{name}": value for name, value in row.items() if isinstance(value, (int, float))}
        learner.accelerator.log(values, step=len(learner.log))

    def cleanup(self, learner: Learner):
        if self.is_started:  # the archive of a failed run is complete too
            for tracker in learner.accelerator.trackers:
                tracker.finish()

"""The recipe, the loop, schedules, logs, checkpoints, and going on where a run stopped."""
import os
from importlib.util import find_spec
from pathlib import Path

from accelerate import tracking

from ..errors import CalaError
from ..recipe import Recipe


def installed(
    package: str,  # as imported
):
    "CalaError if a tracker's package is not there; nothing is imported."
    if find_spec(package) is None: raise CalaError(f"{package} is not installed: pip install {package}, or leave its flag out")

COMET_TAKES = ("parse_args", "log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "auto_output_logging",
               "auto_param_logging", "auto_metric_logging", "auto_log_co2")  # by itself, unless told not to

def comet(
    recipe: Recipe,  # api_key, workspace, experiment_name, comet_offline
    output: Path,    # the run's folder, whose name serves if there is no experiment_name
):
    "Accelerate's Comet tracker, online or into an archive; it is given the recipe and the log, and collects nothing by itself."
    installed("comet_ml")
    os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")
    from comet_ml import ExperimentConfig
    config = ExperimentConfig(name=recipe.experiment_name or output.name, offline_directory=recipe.comet_offline, display_summary_level=0,
                              **dict.fromkeys(COMET_TAKES, False))
    return tracking.CometMLTracker("cala", api_key=recipe.api_key, workspace=recipe.workspace, online=not recipe.comet_offline, experiment_config=config)

def tensorboard(
    output: Path,  # the run's folder, in which `tensorboard` will be
):
    "Accelerate's TensorBoard tracker."
    installed("tensorboard")
    return tracking.TensorBoardTracker("tensorboard", logging_dir=str(output))

def trackers(
    recipe: Recipe,  # tensorboard, api_key, workspace, comet_offline
    output: Path,    # the run's folder
) -> list:           # for Accelerate; None where the CSV files are all
    "Accelerate trackers that the recipe asks for."
    asked = [tensorboard(output)] if recipe.tensorboard else []
    if recipe.comet_offline or recipe.api_key: asked.append(comet(recipe, output))
    return asked or None

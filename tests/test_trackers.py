"The log in TensorBoard, Comet and Weights & Biases: the CSV files and the recipe, nothing else, and only when asked."

import csv
import sys
import zipfile
from types import ModuleType

import pandas as pd
import pytest

import cala.library.trackers
from cala.library.checkpoint import read_recipe
from cala.library.cli import run_command
from cala.model import CaLa
from cala.scripts.train import main
from small_runs import lines_of, train_flags


def run(world, output, *more, **how):
    return run_command(main, train_flags(world, output, *more, **how), prog="cala-train")


def refused(capsys, *args):
    "The one line of a run that ends with status 2."
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*args)
    assert ended.value.code == 2
    (line,) = lines_of(capsys.readouterr().err)
    return line


def test_tensorboard_holds_the_csv_files_in_the_runs_folder(world, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(world, tmp_path / "run", "--tensorboard")
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    log, metrics = (pd.read_csv(tmp_path / "run" / name) for name in ("log.csv", "metrics.csv"))
    for column in ("loss", "qtm", "tbia", "ctr", "learning_rate"):
        assert [(e.step, e.value) for e in events.Scalars(column)] == [
            (s, pytest.approx(v)) for s, v in zip(log.step, log[column])
        ]
    assert [e.value for e in events.Scalars("val/group_recall_at1")] == pytest.approx(list(metrics.group_recall_at1))
    assert [e.step for e in events.Scalars("val/score")] == [2, 4]


@pytest.fixture
def comet():
    return pytest.importorskip("comet_ml")


def archive_rows(archive, table):
    "What Comet's own reader finds in an archive: {(section, name): values}."
    from comet_ml.scripts import comet_offline

    comet_offline.main(["--csv", "--output", str(table), str(archive)])
    rows = {}
    for row in csv.DictReader(table.read_text().splitlines()):
        if row["level"] == "detail":
            rows.setdefault((row["section"], row["name"]), []).append(row["value"])
        assert row["project"] == "cala"
    return rows


def test_comet_offline_writes_an_archive_that_comet_opens(world, tmp_path, comet):
    run(
        world,
        tmp_path / "run",
        "--comet-offline",
        tmp_path / "comet",
        "--experiment-name",
        "mine",
        "--workspace",
        "ours",
    )
    (archive,) = (tmp_path / "comet").glob("*.zip")
    rows, log = archive_rows(archive, tmp_path / "rows.csv"), pd.read_csv(tmp_path / "run/log.csv")
    assert [float(v) for v in rows["metric", "loss"]] == pytest.approx(list(log.loss))
    assert [float(v) for v in rows["metric", "val/score"]] == pytest.approx(
        list(pd.read_csv(tmp_path / "run/metrics.csv").score)
    )
    assert rows["param", "cir_frame"] == ["sum"] and rows["param", "learning_rate"] == ["0.001"]
    assert "mine" in rows["data", "value"]  # the experiment's name


def test_comet_collects_nothing_by_itself(world, tmp_path, comet, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cala-train", "--api-key", "a-secret"])
    run(world, tmp_path / "run", "--comet-offline", tmp_path / "comet", "--api-key", "a-secret", epochs=1)
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as content:
        assert sorted(content.namelist()) == ["experiment.json", "messages.json"]
        said = b"".join(content.read(name) for name in content.namelist()).decode()
    assert "a-secret" not in said
    for foreign in ("installed_packages", "system_details", "os_packages", "git_metadata", "stdout", "file_name"):
        assert f'"type":"{foreign}"' not in said


def test_the_key_is_in_no_file_of_the_run(world, tmp_path, comet):
    run(
        world,
        tmp_path / "run",
        "--comet-offline",
        tmp_path / "comet",
        "--tensorboard",
        "--api-key",
        "a-secret",
        epochs=1,
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8 and not any(b"a-secret" in path.read_bytes() for path in files)
    assert "api_key" not in read_recipe(tmp_path / "run/best")["recipe"]


class Experiment:
    "Stands for one of Comet's, and remembers."

    def __init__(self):
        self.heard = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.heard.append((name, args))


def test_comet_online_is_given_key_workspace_and_name(world, tmp_path, comet, monkeypatch):
    asked, experiment = {}, Experiment()
    monkeypatch.setattr(comet, "start", lambda **options: asked.update(options) or experiment)
    run(world, tmp_path / "run", "--api-key", "a-secret", "--workspace", "ours", "--experiment-name", "mine", epochs=1)
    config = asked.pop("experiment_config")
    assert asked == dict(project_name="cala", api_key="a-secret", workspace="ours", online=True)
    assert config.name == "mine" and config.parse_args is False and config.log_code is False
    names = [name for name, _ in experiment.heard]
    assert names[0] == "log_parameters" and names[-1] == "end" and "a-secret" not in str(experiment.heard)


def test_what_comet_refuses_is_one_line(world, tmp_path, comet, monkeypatch, capsys):
    def start(**options):
        raise ValueError("no such workspace\nmore about it")

    monkeypatch.setattr(comet, "start", start)
    line = refused(capsys, world, tmp_path / "run", "--api-key", "a-secret")
    assert "(ValueError: no such workspace more about it); correct --api-key" in line and "a-secret" not in line


def test_an_archive_is_whole_although_the_run_failed(world, tmp_path, comet, monkeypatch, capsys):
    forward, count = CaLa.forward, []

    def broken(self, *batch):
        losses = forward(self, *batch)
        count.append(1)
        return losses._replace(total=losses.total * float("nan")) if len(count) == 2 else losses

    monkeypatch.setattr(CaLa, "forward", broken)
    with pytest.raises(SystemExit):
        run(world, tmp_path / "run", "--comet-offline", tmp_path / "comet")
    (archive,) = (tmp_path / "comet").glob("*.zip")
    assert len(archive_rows(archive, tmp_path / "rows.csv")["metric", "loss"]) == 1


@pytest.mark.parametrize(
    "package, words",
    [
        ("tensorboard", ["--tensorboard"]),
        ("comet_ml", ["--comet-offline", "x"]),
        ("comet_ml", ["--api-key", "x"]),
        ("wandb", ["--wandb"]),
    ],
)
def test_a_tracker_that_is_not_installed_is_one_line(world, tmp_path, monkeypatch, capsys, package, words):
    found = cala.library.trackers.find_spec
    monkeypatch.setattr(cala.library.trackers, "find_spec", lambda name: None if name == package else found(name))
    assert f"{package} is not installed: pip install {package}" in refused(capsys, world, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


class StandInRun:
    "Stands for a run of wandb, and remembers what it is told."

    def __init__(self, options):
        self.options, self.rows, self.is_finished = options, [], False

    def log(self, values, step=None):
        self.rows.append((step, values))

    def finish(self):
        self.is_finished = True


class StandInWandb(ModuleType):
    "Stands for wandb, whose package is large and wants an account; only what Accelerate's tracker calls is here."

    def __init__(self, error=None):
        super().__init__("wandb")
        self.runs, self.values, self.error, self.config = [], {}, error, self

    def init(self, **options):
        if self.error:
            raise self.error
        self.runs.append(StandInRun(options))
        return self.runs[-1]

    def update(self, values, allow_val_change):
        self.values |= values


@pytest.fixture
def install_wandb(monkeypatch):
    "A function that puts a stand-in in the place of wandb."
    find_real = cala.library.trackers.find_spec

    def install(error=None):
        wandb = StandInWandb(error)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monkeypatch.setattr(cala.library.trackers, "find_spec", lambda name: name == "wandb" or find_real(name))
        return wandb

    return install


def test_weights_and_biases_gets_recipe_log_and_validations(world, tmp_path, install_wandb):
    wandb = install_wandb()
    run(world, tmp_path / "run", "--wandb", "--experiment-name", "mine", "--workspace", "ours")
    (experiment,) = wandb.runs
    options = experiment.options
    assert (options["project"], options["name"], options["entity"]) == ("cala", "mine", "ours")
    assert options["dir"] == str(tmp_path / "run") and options["settings"]["console"] == "off"
    assert wandb.values["encoder_arch"] == "tiny" and "api_key" not in wandb.values
    log, metrics = (pd.read_csv(tmp_path / "run" / name) for name in ("log.csv", "metrics.csv"))
    losses = {step: values["loss"] for step, values in experiment.rows if "loss" in values}
    assert losses == pytest.approx(dict(zip(log.step, log.loss)))
    scores = [values["val/score"] for _, values in experiment.rows if "val/score" in values]
    assert scores == pytest.approx(list(metrics.score)) and experiment.is_finished


def test_what_weights_and_biases_refuses_is_one_line(world, tmp_path, install_wandb, capsys):
    install_wandb(ValueError("api_key not configured (no-tty)\nmore about it"))
    line = refused(capsys, world, tmp_path / "run", "--wandb")
    assert "api_key not configured (no-tty)" in line and "set WANDB_MODE=offline" in line and "--api-key" not in line


def test_a_bug_in_a_tracker_is_not_the_users_mistake(world, tmp_path, install_wandb):
    install_wandb(TypeError("init() got an unexpected keyword argument"))
    with pytest.raises(TypeError):
        run(world, tmp_path / "run", "--wandb")


def test_weights_and_biases_offline_writes_into_the_runs_folder(world, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(world, tmp_path / "run", "--wandb", epochs=1)
    names = {path.name for path in (tmp_path / "run/wandb").rglob("*")}
    assert any(name.endswith(".wandb") for name in names)
    assert not names & {"requirements.txt", "wandb-metadata.json", "output.log", "diff.patch"}

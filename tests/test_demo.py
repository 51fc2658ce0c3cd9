"""cala-demo as a person types it, at a size where nothing is learned."""

import json
import re
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell
from nbformat.v4 import new_notebook

from cala.errors import CalaError
from cala.library import demo as demo_steps
from cala.library.report import write_report

ROWS = ["chance", "image only", "text only", "QTM alone", "CaLa"]


def demo(*words):
    "Run the command in a process of its own."
    return subprocess.run(
        [sys.executable, "-m", "cala.scripts.demo", *map(str, words)], capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def cirr(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    words = ["--output", output, "--size", 30, "--stage1-steps", 2, "--epochs", 1, "--batch-size", 32]
    return output / "cirr", words, demo(*words)


def test_the_cirr_demo_prints_five_rows_and_writes_table_ranks_and_report(cirr):
    folder, _, done = cirr
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(folder / "table.csv", index_col="method")
    assert list(table.index) == ROWS
    assert list(table.columns) == ["R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"]
    assert table.loc["chance", ["R@1", "Rs@1"]].tolist() == [0.1, 20.0]
    assert all(row in done.stdout for row in ROWS)
    assert len(pd.read_csv(folder / "cala" / "ranks.csv")) == 1002
    page = (folder / "report.html").read_text()
    assert "data:image/png" in page and "Traceback" not in page


def test_its_two_trainings_are_printed_as_commands_and_differ_in_the_associations_only(cirr):
    lines = [line.split() for line in cirr[2].stdout.splitlines() if line.startswith("cala-train")]
    assert len(lines) == 2
    assert set(lines[0]) - set(lines[1]) <= {"--tac-weight", "--hca-weight", "--alpha", "--beta", "0", "qtm"} | {
        w for w in lines[0] if w.endswith("qtm")
    }


def test_a_second_call_trains_nothing_and_says_the_same(cirr):
    folder, words, first = cirr
    weights = folder / "cala" / "last" / "model.safetensors"
    before, table = weights.stat().st_mtime_ns, (folder / "table.csv").read_bytes()
    again = demo(*words, "--no-report")
    assert again.returncode == 0 and "cala-train" not in again.stdout
    assert (weights.stat().st_mtime_ns, (folder / "table.csv").read_bytes()) == (before, table)


def test_the_fashioniq_demo_has_the_columns_of_fashioniq(tmp_path):
    done = demo(
        "--world",
        "fashioniq",
        "--output",
        tmp_path,
        "--size",
        40,
        "--stage1-steps",
        2,
        "--epochs",
        1,
        "--batch-size",
        32,
        "--no-report",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(tmp_path / "fashioniq" / "table.csv", index_col="method")
    assert list(table.index) == ROWS and list(table.columns) == ["R@10", "R@50"]


@pytest.mark.parametrize(
    "words, says",
    [(["--world", "coco"], "choose one of cirr, fashioniq"), (["--batch-size", "100000"], "do not fill a batch")],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, says):
    done = demo("--output", tmp_path, "--size", 10, "--no-report", *words)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path):
    (tmp_path / "cirr").mkdir()
    (tmp_path / "cirr" / "thesis.tex").write_text("mine")
    done = demo("--output", tmp_path)
    assert done.returncode == 2 and "not empty" in done.stderr
    assert [path.name for path in (tmp_path / "cirr").iterdir()] == ["thesis.tex"]


def test_another_stage_1_is_followed_by_another_stage_2(cirr):
    folder, words, _ = cirr
    changed = [3 if before == "--stage1-steps" else word for before, word in zip(["", *words], words)]
    done = demo(*changed, "--no-report")
    assert (
        done.returncode == 0 and len([line for line in done.stdout.splitlines() if line.startswith("cala-train")]) == 2
    )


def test_a_log_has_lines_of_progress_and_no_carriage_returns(cirr, monkeypatch, capfd):
    _, _, done = cirr
    assert "\r" not in done.stdout + done.stderr and "it/s" not in done.stderr
    for step in ("1 of 4", "2 of 4", "3 of 4", "4 of 4"):
        assert f"] {step}: " in done.stdout


def test_a_long_step_prints_how_much_is_done_and_how_long_it_will_take(monkeypatch, capfd):
    monkeypatch.setattr(demo_steps, "QUIET_SECONDS", 0.05)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    clock, counts = demo_steps.Clock(), iter(range(100))
    with clock.report("stage 1", lambda: next(counts), 400):
        time.sleep(0.3)
    lines = capfd.readouterr().out.splitlines()
    assert "stage 1: 0 of 400 steps" in lines[0] and "left" not in lines[0]
    assert re.search(r"stage 1: 1 of 400 steps, about \d+ s left", lines[1])
    time.sleep(0.2)
    assert not capfd.readouterr().out  # the thread has ended


def test_a_run_that_fails_stops_the_other(tmp_path):
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    failing = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    with pytest.raises(CalaError, match="the qtm run failed with status 2"):
        demo_steps.wait_for_runs({"qtm": failing, "cala": running})
    assert running.wait(10) != 0


def test_the_report_runs_in_the_python_of_the_command(tmp_path, monkeypatch):
    kernel = dict(argv=["/nowhere/bin/python", "-m", "ipykernel_launcher"], display_name="other", language="python")
    folder = tmp_path / "share/kernels/python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "share"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    notebook = new_notebook(cells=[new_code_cell("import sys, os\nprint(sys.executable, os.environ['CALA_DEMO'])")])
    nbformat.write(notebook, tmp_path / "report.ipynb")
    page = write_report(tmp_path, tmp_path / "report.ipynb").read_text()
    assert sys.executable in page and str(tmp_path) in page


def test_a_package_without_the_report_says_what_to_do(tmp_path):
    with pytest.raises(CalaError, match="--no-report"):
        write_report(tmp_path, tmp_path / "nowhere.ipynb")

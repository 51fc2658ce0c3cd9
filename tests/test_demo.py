"""cala-demo as a person types it, at a size where nothing is learned."""

import json
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from cala import Recipe, train
from cala.encoders import load_backbone
from cala.errors import CalaError
from cala.library import demo as demo_steps
from cala.library.cli import parse_flags
from cala.library.report import render_page, write_report
from cala.scripts.demo import Demo

ROWS = ["chance", "image only", "text only", "QTM", "CaLa (ours)", "CaLa (ours), ranked again"]
ALL_ROWS = [*ROWS[:3], "QTM at scale 100", "QTM", "CaLa (paper)", *ROWS[4:]]
SMALL = dict(size=30, stage1_steps=2, epochs=1, batch_size=32, width=32)


def demo(*words):
    "Run the command in a process of its own."
    return subprocess.run(
        [sys.executable, "-m", "cala.scripts.demo", *map(str, words)], capture_output=True, text=True, timeout=600
    )


def train_here(small, words, position=0):
    "`start_run` without a new process."
    train(parse_flags(Recipe, words), progress=False)
    return subprocess.Popen([sys.executable, "-S", "-c", ""])


@pytest.fixture(scope="module")
def cirr(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    words = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    return output / "cirr", Demo(output=str(output), **SMALL), demo("--output", output, "--no-report", *words)


def test_the_cirr_demo_prints_six_rows_and_writes_table_and_ranks(cirr):
    folder, _, done = cirr
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(folder / "table.csv", index_col="method")
    assert list(table.index) == ROWS
    assert list(table.columns) == ["R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"]
    assert table.loc["chance", ["R@1", "Rs@1"]].tolist() == [0.1, 20.0]
    assert all(row in done.stdout for row in ROWS)
    assert len(pd.read_csv(folder / "cala" / "ranks.csv")) == 1002


def test_a_token_stands_for_a_cell_of_a_scene(cirr):
    backbone = load_backbone(cirr[0] / "backbone.safetensors")
    assert backbone.trunk(torch.zeros(1, 3, backbone.size, backbone.size)).shape[1] == 9


def test_the_report_is_written_over_the_folder(cirr):
    page = write_report(cirr[0]).read_text()
    assert "data:image/png" in page and "Traceback" not in page


def test_its_trainings_are_printed_as_commands_and_differ_in_the_weight_of_ctr_only(cirr):
    lines = [line.split() for line in cirr[2].stdout.splitlines() if line.startswith("cala-train")]
    assert len(lines) == 2
    own_words = {"--beta", "0", "cala", "qtm"}
    assert {word for word in set(lines[0]) ^ set(lines[1]) if "/" not in word} <= own_words


def test_a_log_has_lines_of_progress_and_no_carriage_returns(cirr):
    _, _, done = cirr
    assert "\r" not in done.stdout + done.stderr and "it/s" not in done.stderr
    for step in ("1 of 4", "2 of 4", "3 of 4", "4 of 4"):
        assert f"] {step}: " in done.stdout


def test_the_weight_of_ranking_again_is_chosen_on_other_pictures(cirr):
    folder, _, done = cirr
    sweep = pd.read_csv(folder / "cala" / "weights.csv")
    assert (sweep["queries"] == 600).all() and (sweep["gallery"] == 600).all()
    best = sweep["rerank_weight"][sweep["mean"].idxmax()]
    assert f"with weight {best} of CTR" in done.stdout


def test_a_second_call_trains_nothing_and_prints_the_same(cirr, capsys):
    folder, small, _ = cirr
    weights = folder / "cala" / "last" / "model.safetensors"
    before, table = weights.stat().st_mtime_ns, (folder / "table.csv").read_bytes()
    demo_steps.run_demo(small)
    assert "cala-train" not in capsys.readouterr().out
    assert (weights.stat().st_mtime_ns, (folder / "table.csv").read_bytes()) == (before, table)


def test_all_rows_train_two_further_runs(cirr, monkeypatch, capsys):
    _, small, _ = cirr
    started = []
    monkeypatch.setattr(demo_steps, "start_run", lambda *call: started.append(call) or finished_process())
    monkeypatch.setattr(demo_steps, "note_made", lambda *call: None)
    all_rows = Demo(**{**vars(small), "rows": "all"})
    root = demo_steps.draw_world(all_rows)
    commands = demo_steps.write_commands(all_rows, root, demo_steps.train_backbone(all_rows, root))
    demo_steps.train_runs(all_rows, commands)
    recipes = {words[-1]: parse_flags(Recipe, words) for _, words, _ in started}
    assert list(recipes) == ["qtm100", "paper"]
    assert (recipes["qtm100"].qtm_scale, recipes["qtm100"].beta) == (100, 0)
    assert (recipes["paper"].objective, recipes["paper"].alpha, recipes["paper"].beta) == ("paper", 0.1, 0.1)


def finished_process():
    return subprocess.Popen([sys.executable, "-S", "-c", ""])


def test_another_stage_1_is_followed_by_another_stage_2(cirr, monkeypatch):
    folder, small, _ = cirr
    started = []
    monkeypatch.setattr(demo_steps, "start_run", lambda *call: started.append(call) or finished_process())
    monkeypatch.setattr(demo_steps, "note_made", lambda *call: None)
    monkeypatch.setattr(demo_steps.shutil, "rmtree", lambda *call, **options: None)
    note = folder / "backbone.safetensors.made.json"
    content = note.read_text()
    note.write_text(content.replace('"stage1_steps": 2', '"stage1_steps": 3'))
    commands = demo_steps.write_commands(small, folder / "data" / "cirr_dataset", folder / "backbone.safetensors")
    demo_steps.train_runs(small, commands)
    note.write_text(content)
    assert [words[-1] for _, words, _ in started] == ["cala", "qtm"]


def test_the_fashioniq_demo_has_all_rows_and_the_columns_of_fashioniq(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_steps, "start_run", train_here)
    demo_steps.run_demo(Demo(world="fashioniq", rows="all", output=str(tmp_path), **{**SMALL, "size": 40}))
    table = pd.read_csv(tmp_path / "fashioniq" / "table.csv", index_col="method")
    assert list(table.index) == ALL_ROWS and list(table.columns) == ["R@10", "R@50"]


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(world="coco"), "choose one of cirr, fashioniq"),
        (dict(rows="four"), "choose one of main, all"),
        (dict(width=30), "give a multiple of 4"),
    ],
)
def test_a_flag_that_does_not_exist_is_refused(flags, says):
    with pytest.raises(CalaError, match=says):
        Demo(**flags)


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    done = demo("--output", tmp_path, "--size", 10, "--no-report", "--batch-size", "100000")
    assert done.returncode == 2 and "do not fill a batch" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path):
    (tmp_path / "cirr").mkdir()
    (tmp_path / "cirr" / "thesis.tex").write_text("mine")
    with pytest.raises(CalaError, match="not empty"):
        demo_steps.run_demo(Demo(output=str(tmp_path)))
    assert [path.name for path in (tmp_path / "cirr").iterdir()] == ["thesis.tex"]


def test_a_run_that_fails_stops_the_others(cirr, monkeypatch):
    folder, small, _ = cirr
    running = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    failing = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(2)"])
    processes = {"qtm": failing, "cala": running}
    monkeypatch.setattr(demo_steps, "start_run", lambda demo, words, position: processes[words[-1]])
    monkeypatch.setattr(demo_steps, "made_with", lambda *call: False)
    monkeypatch.setattr(demo_steps.shutil, "rmtree", lambda *call, **options: None)
    monkeypatch.setattr(demo_steps.os, "cpu_count", lambda: 2)
    commands = {name: ["--experiment-name", name] for name in ("cala", "qtm")}
    with pytest.raises(CalaError, match="the qtm run failed with status 2"):
        demo_steps.train_runs(small, commands)
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


def test_the_report_shows_equations_without_a_network():
    page = render_page(new_notebook(cells=[new_markdown_cell("Let $n > 0$:\n\n$$\\frac{1}{n}$$")]))
    assert page.count("<math") == 2 and "<mfrac" in page
    assert "<script" not in page and "$" not in page


def test_a_package_without_the_report_says_what_to_do(tmp_path):
    with pytest.raises(CalaError, match="--no-report"):
        write_report(tmp_path, tmp_path / "nowhere.ipynb")

"""cala-demo as a person types it, at a size where nothing is learned."""
import subprocess
import sys

import pandas as pd
import pytest

ROWS = ["chance", "image only", "text only", "QTM alone", "CaLa"]


def demo(*words):
    "Run the command in a process of its own."
    return subprocess.run([sys.executable, "-m", "cala.scripts.demo", *map(str, words)], capture_output=True, text=True, timeout=600)


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
    assert set(lines[0]) - set(lines[1]) <= {"--tac-weight", "--hca-weight", "--alpha", "--beta", "0", "qtm"} | {w for w in lines[0] if w.endswith("qtm")}


def test_a_second_call_trains_nothing_and_says_the_same(cirr):
    folder, words, first = cirr
    weights = folder / "cala" / "last" / "model.safetensors"
    before, table = weights.stat().st_mtime_ns, (folder / "table.csv").read_bytes()
    again = demo(*words, "--no-report")
    assert again.returncode == 0 and "cala-train" not in again.stdout
    assert (weights.stat().st_mtime_ns, (folder / "table.csv").read_bytes()) == (before, table)


def test_the_fashioniq_demo_has_the_columns_of_fashioniq(tmp_path):
    done = demo("--world", "fashioniq", "--output", tmp_path, "--size", 40, "--stage1-steps", 2, "--epochs", 1, "--batch-size", 32, "--no-report")
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(tmp_path / "fashioniq" / "table.csv", index_col="method")
    assert list(table.index) == ROWS and list(table.columns) == ["R@10", "R@50"]


@pytest.mark.parametrize("words, says", [(["--world", "coco"], "cirr or fashioniq"), (["--batch-size", "100000"], "do not fill a batch")])
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
    assert done.returncode == 0 and len([line for line in done.stdout.splitlines() if line.startswith("cala-train")]) == 2

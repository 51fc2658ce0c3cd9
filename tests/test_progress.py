"Progress in a log file: whole lines now and then, no carriage returns; in a terminal: a bar in place."

import os
import re
import subprocess
import sys
import time

import pytest
import torch

from cala import progress
from cala.library.cli import run_command
from cala.progress import show_progress, show_tensors
from cala.scripts import train
from small_runs import lines_of, train_flags


@pytest.fixture
def busy(monkeypatch):
    "A loop that writes lines at once and every 0.1 s."
    monkeypatch.setattr(progress, "LINE_DELAY", 0.05)
    monkeypatch.setattr(progress, "LINE_INTERVALS", (0.1, 0.1))
    return lambda *words, **options: show_progress(*words, **options)


def test_a_log_gets_lines_with_how_much_is_done_and_how_long_it_will_take(busy, capsys):
    assert [time.sleep(0.05) or number for number in busy(range(10), "stage 1", unit="steps")] == list(range(10))
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 8 and not lines_of("\n".join(lines))
    assert re.fullmatch(r"stage 1: \d+ of 10 steps, 00:00 so far, about 00:00 left", lines[0])
    assert re.fullmatch(r"stage 1: 10 of 10 steps, took 00:0\d", lines[-1])


def test_work_that_the_caller_counts_shows_what_it_adds(busy, capsys):
    with busy(None, "training", 4, "steps") as bar:
        for step in range(4):
            time.sleep(0.06)
            bar.set_postfix(epoch=1, loss=f"{step:.3f}", refresh=False)
            bar.update()
    text = capsys.readouterr().err
    assert text.splitlines()[-1] == "training: 4 of 4 steps, took 00:00, epoch=1, loss=3.000" and "\r" not in text


def test_work_of_unknown_length_is_counted(busy, capsys):
    for _ in busy(iter(range(3)), "files"):
        time.sleep(0.06)
    assert capsys.readouterr().err.splitlines()[-1] == "files: 3, 00:00 so far"


def test_short_work_and_hidden_work_write_nothing(busy, capsys):
    for _ in show_progress(range(3), "short"):
        pass
    for _ in busy(range(3), "hidden", is_hidden=True):
        time.sleep(0.06)
    assert capsys.readouterr().err == ""


def test_an_error_inside_the_loop_is_that_error(busy):
    with pytest.raises(ZeroDivisionError):
        for number in busy(range(3), "broken"):
            1 / number  # noqa: B018


def test_lines_become_rare_in_long_work(capsys):
    bar = show_progress(None, "long", 10)
    bar.start_t -= 1000  # as if it had begun earlier
    bar.display()
    assert bar.mininterval == pytest.approx(100, abs=1)
    bar.start_t -= 90_000
    bar.display()
    assert bar.mininterval == progress.LINE_INTERVALS[1]


def test_tensors_are_counted_in_megabytes_and_small_ones_show_nothing(busy, monkeypatch, capsys):
    tensors = {f"layer {number}": torch.zeros(500_000) for number in range(4)}  # 2 MB each
    assert list(show_tensors(tensors, "load the trunk")) == list(tensors.items())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LARGE", 1)
    for _ in show_tensors(tensors, "load the trunk"):
        time.sleep(0.06)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"load the trunk: [246] of 8 MB, 00:00 so far, about 00:00 left", lines[0])
    assert re.fullmatch(r"load the trunk: 8 of 8 MB, took 00:0\d", lines[-1])


def test_without_standard_error_the_loop_runs(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(show_progress(range(3), "silent")) == [0, 1, 2]


def test_each_phase_of_a_training_writes_a_line_into_a_log(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TQDM_DELAY", "0")
    run_command(train.main, train_flags(world, tmp_path / "run", "--cache", "tokens", epochs=1), prog="cala-train")
    text = capfd.readouterr().err
    phases = {line.partition(":")[0] for line in text.splitlines() if re.search(r": \d+ of \d+ ", line)}
    assert phases >= {"cache", "training"} and "\r" not in text


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_a_terminal_gets_one_bar_that_is_redrawn_in_place():
    import fcntl
    import struct
    import termios

    code = "import time; from cala import progress as p; p.BAR_DELAY = 0.1\n"
    code += "for _ in p.show_progress(range(8), 'stage 1', unit='steps'): time.sleep(0.1)"
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=terminal, check=True)
    os.close(terminal)
    text = os.read(screen, 100_000).decode()
    os.close(screen)
    states = [state for state in text.split("\r") if "stage 1" in state]
    assert len(states) > 3 and "8/8" in states[-1] and text.count("\n") <= 1

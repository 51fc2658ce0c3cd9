"""The steps of cala-demo: draw a world, train a backbone, train twice on triplets, evaluate."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from threading import Thread
from typing import TYPE_CHECKING

import pandas as pd
import torch

from ..data import open_dataset
from ..encoders import CaptionedPictures
from ..encoders import make_backbone
from ..encoders import pretrain
from ..encoders import read_vocabulary
from ..encoders import save_backbone
from ..errors import CalaError
from ..retrieval import Result
from ..retrieval import embed
from ..retrieval import measure
from .checkpoint import load_checkpoint
from .files import check_output_folder
from .files import make_output_folder
from .results import baseline_table
from .results import measure_rows
from .stage1 import NAMES
from .stage1 import captioned_split
from .stage1 import made_with
from .stage1 import note_made
from .worlds.garments import draw_fashioniq
from .worlds.scenes import draw_cirr

if TYPE_CHECKING:
    from ..scripts.demo import Demo

MARK = "made by cala-demo"
RUNS = {"qtm": "QTM alone", "cala": "CaLa"}  # folder -> row of the table
QUIET_SECONDS = 20  # between two lines of progress in a log


# Progress


class Clock:
    "Print lines that begin with the seconds since the demo began."

    def __init__(self):
        self.start = time.time()

    def say(
        self,
        text: str,
    ):
        "Print one line."
        print(f"[{time.time() - self.start:4.0f} s] {text}", flush=True)

    @contextmanager
    def report(
        self,
        title: str,  # of the work
        count_steps: Callable[[], int],  # how many steps are done
        steps: int,  # of the whole work
    ) -> Iterator[None]:
        "Print a line of progress now and then, unless standard error is a terminal, where bars are drawn instead."
        if sys.stderr.isatty():
            yield
            return
        start, finished = time.time(), Event()

        def print_lines():
            while not finished.wait(QUIET_SECONDS):
                done = count_steps()
                left = (time.time() - start) * (steps / done - 1) if done else 0
                estimate = f", about {left:.0f} s left" if done else ""
                self.say(f"{title}: {done} of {steps} steps{estimate}")

        thread = Thread(target=print_lines, daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()


class CountedPictures(CaptionedPictures):
    "Captioned pictures that count how often one of them was read."

    count = 0

    def __getitem__(self, position):
        self.count += 1
        return super().__getitem__(position)


# The steps


def prepare_folder(
    demo: "Demo",
) -> Path:  # of the world, below --output
    "Make the folder; `CalaError` if it holds anything that no demo made."
    folder = Path(demo.output) / demo.world
    if not (folder / MARK).exists():
        check_output_folder(folder, advice="no demo made it; choose another --output")
        make_output_folder(folder)
        (folder / MARK).touch()
    return folder


def draw_world(
    demo: "Demo",
) -> Path:  # for --data-root of cala-train
    "Draw the world, unless it is there."
    root = prepare_folder(demo) / "data"
    if demo.world == "cirr":
        return draw_cirr(root, train=demo.size, val=167, test1=20, seed=demo.seed)
    return draw_fashioniq(root, train=demo.size, val=350, test=50, seed=demo.seed)


def train_backbone(
    demo: "Demo",
    root: Path,  # of the drawn world
    clock: Clock = None,
) -> Path:  # backbone.safetensors
    "Stage 1: image-text contrast on the captioned training pictures; nothing is done if the file is there."
    path = prepare_folder(demo) / "backbone.safetensors"
    names = ("world", "size", "width", "stage1_steps", "batch_size", "stage1_rate", "seed")
    settings = {name: getattr(demo, name) for name in names}
    if made_with(path, settings):
        return path
    data, captions = captioned_split(demo.world, root)
    texts = [text for triplet in data.triplets for text in triplet.captions]
    vocabulary = read_vocabulary(sum(captions.values(), texts))
    backbone = make_backbone("tiny", vocabulary=vocabulary, width=demo.width, seed=demo.seed)
    data, captions = captioned_split(demo.world, root, backbone.transform())
    pictures = CountedPictures(data.gallery, captions)
    with (clock or Clock()).report("stage 1", lambda: pictures.count // demo.batch_size, demo.stage1_steps):
        losses = pretrain(
            backbone,
            pictures,
            demo.stage1_steps,
            demo.batch_size,
            demo.stage1_rate,
            neighbours=3 if demo.world == "cirr" else 1,
            seed=demo.seed,
            progress=sys.stderr.isatty(),
        )
    log = pd.DataFrame(dict(step=range(1, len(losses) + 1), loss=losses))
    log.to_csv(path.with_name("stage1.csv"), index=False)
    save_backbone(backbone, path)
    note_made(path, settings)
    return path


def write_commands(
    demo: "Demo",
    root: Path,  # of the drawn world
    weights: Path,  # of the backbone after stage 1
) -> dict[str, list[str]]:  # name of the run -> words after cala-train
    "The two trainings of stage 2, which differ in the weights of the associations and in nothing else."
    folder = prepare_folder(demo)
    flags = {
        "--dataset": NAMES[demo.world],
        "--data-root": root,
        "--encoder-arch": "tiny",
        "--backbone-weights": weights,
        "--num-epochs": demo.epochs,
        "--max-epoch": demo.epochs,
        "--batch-size": demo.batch_size,
        "--learning-rate": demo.learning_rate,
        "--warmup": 0.2,
        "--validation-frequency": demo.epochs,
        "--seed": demo.seed,
        "--cache": demo.cache,
        "--cache-dir": folder / "tokens",
        "--recipe": demo.recipe,
    }
    no_associations = {"--hca-weight": 0, "--tac-weight": 0, "--alpha": 0, "--beta": 0}
    commands = {}
    for name in RUNS:
        own_flags = {"--output": folder / name, "--experiment-name": name}
        run_flags = flags | (no_associations if name == "qtm" else {}) | own_flags
        commands[name] = [str(word) for item in run_flags.items() for word in item]
    return commands


def start_run(
    demo: "Demo",
    words: list[str],  # after cala-train
    position: int = 0,  # on which line of a terminal its bar is drawn
) -> subprocess.Popen:
    "Start one training as a process of its own; its errors appear on standard error."
    environment = {**os.environ, "OMP_NUM_THREADS": str(demo.threads), "TQDM_POSITION": str(position)}
    command = [sys.executable, "-m", "cala.scripts.train", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def wait_for_runs(
    processes: dict[str, subprocess.Popen],  # name of the run -> its process
):
    "Wait until all have ended; if one fails, the others are stopped and a `CalaError` is raised."
    try:
        for name, process in processes.items():
            if process.wait() != 0:
                message = "its message is above"
                raise CalaError(f"the {name} run failed with status {process.returncode}; {message}")
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()


def count_logged_steps(
    folders: list[Path],  # of runs
) -> int:
    "How many steps the runs have written into their logs so far; they write them after every epoch."
    count = 0
    for folder in folders:
        with suppress(OSError):  # no epoch is finished
            count += len((folder / "log.csv").read_text().splitlines()) - 1
    return count


def train_runs(
    demo: "Demo",
    commands: dict[str, list[str]],  # from `write_commands`
    steps: int,  # of each run
    clock: Clock = None,
):
    "Stage 2: train the runs that are not there, or that began from another backbone."
    folder, clock = prepare_folder(demo), clock or Clock()
    stage1 = json.loads((folder / "backbone.safetensors.made.json").read_text())
    settings = {name: dict(words=words, stage1=stage1) for name, words in commands.items()}
    todo = [name for name in commands if not made_with(folder / name, settings[name])]
    for name in todo:
        print(f"cala-train {shlex.join(commands[name])}", flush=True)
        shutil.rmtree(folder / name, ignore_errors=True)
    together = (os.cpu_count() or 1) >= len(todo) * demo.threads
    for names in [todo] if together else [[name] for name in todo]:
        count = partial(count_logged_steps, [folder / name for name in names])
        with clock.report(" and ".join(names), count, steps * len(names)):
            wait_for_runs({name: start_run(demo, commands[name], position) for position, name in enumerate(names)})
    for name in todo:
        note_made(folder / name, settings[name])


def evaluate_runs(
    demo: "Demo",
    root: Path,  # of the drawn world
) -> dict[str, Result]:  # row of the table -> its recalls
    "Three baselines, with the encoders of the QTM run, and both runs after their last epoch, on the validation split."
    results = {}
    for name, row in RUNS.items():
        model = load_checkpoint(prepare_folder(demo) / name / "last")
        data = open_dataset(NAMES[demo.world], root, "val", model.backbone.transform())
        embedded = embed(model, data, batch_size=256, progress=sys.stderr.isatty())
        if name == "qtm":
            results = measure_rows(model.frame, embedded, data, row)
        else:
            results[row] = measure(model.frame, embedded, data)
    return results


def make_table(
    results: dict[str, Result],  # from `evaluate_runs`
) -> pd.DataFrame:  # a row a method, a column a recall, in percent
    "The results as a table; of FashionIQ the means over the categories."
    table = baseline_table(results)
    return table[[column for column in table if column.startswith("R")]].astype(float).round(1)


def save_results(
    folder: Path,  # of the demo
    results: dict[str, Result],  # from `evaluate_runs`
) -> pd.DataFrame:  # the table
    "Write table.csv, and for each run the rank of every query's target."
    table = make_table(results)
    table.to_csv(folder / "table.csv", index_label="method")
    for name, row in RUNS.items():
        results[row].ranks.to_csv(folder / name / "ranks.csv", index=False)
    return table


def run_demo(
    demo: "Demo",
) -> Path:  # the folder: data, runs, table.csv
    "All steps, with a line about each; what is there from an earlier call with the same settings is used again."
    clock, folder = Clock(), prepare_folder(demo)
    clock.say("1 of 4: draw a world")
    torch.set_num_threads(demo.threads)
    root = draw_world(demo)
    triplets = len(open_dataset(NAMES[demo.world], root, "train"))
    steps = demo.epochs * (triplets // demo.batch_size)

    clock.say(f"2 of 4: stage 1, {demo.stage1_steps} steps: which caption belongs to which picture")
    torch.set_num_threads(min(2 * demo.threads, os.cpu_count() or 1))  # stage 1 runs alone, stage 2 as two processes
    weights = train_backbone(demo, root, clock)

    clock.say(f"3 of 4: stage 2, {steps} steps each: QTM alone, and CaLa")
    train_runs(demo, write_commands(demo, root, weights), steps, clock)

    clock.say("4 of 4: evaluate both on unseen pictures")
    results = evaluate_runs(demo, root)
    table = save_results(folder, results)
    size = results["CaLa"]
    print(f"\n{table.to_string()}\n")
    clock.say(f"seed {demo.seed}, {size['queries']} queries, {size['gallery']} pictures; {folder / 'table.csv'}")
    return folder

"""The steps of cala-demo: draw a world, train a backbone, train on triplets with several objectives, evaluate."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from ..data import open_dataset
from ..encoders import CaptionedPictures, make_backbone, pretrain, read_vocabulary, save_backbone
from ..errors import CalaError, count_things
from ..model import CaLa
from ..rerank import Reranker, best_weight, evaluate_again, sweep_weights
from ..retrieval import Result, embed, measure
from .cache import cache_tokens
from .checkpoint import load_checkpoint
from .files import check_output_folder, make_output_folder
from .results import baseline_table, measure_rows
from .stage1 import NAMES, captioned_split, made_with, note_made
from .worlds.garments import draw_fashioniq
from .worlds.scenes import draw_cirr

if TYPE_CHECKING:
    from ..scripts.demo import Demo

MARK = "made by cala-demo"
RUNS = {  # folder of a run -> its row of the table
    "qtm100": "QTM at scale 100",
    "qtm": "QTM",
    "paper": "CaLa (paper)",
    "cala": "CaLa (ours)",
}
RANKED_AGAIN = "CaLa (ours), ranked again"
ROWS = ("chance", "image only", "text only", *RUNS.values(), RANKED_AGAIN)
MAIN_RUNS = ("cala", "qtm")  # what is trained by default; the longest first
RUN_FLAGS = {
    "qtm100": {"--recipe": "cala", "--beta": 0, "--qtm-scale": 100},
    "qtm": {"--recipe": "cala", "--beta": 0},
    "paper": {"--recipe": "paper"},
    "cala": {"--recipe": "cala"},
}
PATCHES = {"cirr": 16, "fashioniq": 8}  # side of a token in pixels; a cell of a drawn scene has 16
OTHER_WORLD = 1000  # added to the seed: a world on which the weight of ranking again is chosen


class Clock:
    "Print lines that begin with the seconds since the demo began."

    def __init__(self):
        self.start = time.time()

    def print(
        self,
        text: str,
    ):
        "Print one line."
        print(f"[{time.time() - self.start:4.0f} s] {text}", flush=True)


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
    "Draw the world to train and to evaluate on, unless it is there."
    root = prepare_folder(demo) / "data"
    if demo.world == "cirr":
        return draw_cirr(root, train=demo.size, val=167, test1=20, seed=demo.seed)
    return draw_fashioniq(root, train=demo.size, val=350, test=50, seed=demo.seed)


def draw_other_world(
    demo: "Demo",
) -> Path:
    "Draw a small world with another seed, unless it is there: validation only, to choose a number on."
    root = prepare_folder(demo) / "other_data"
    seed = demo.seed + OTHER_WORLD
    if demo.world == "cirr":
        return draw_cirr(root, train=0, val=100, test1=0, seed=seed)
    return draw_fashioniq(root, train=0, val=200, test=0, seed=seed)


def train_backbone(
    demo: "Demo",
    root: Path,  # of the drawn world
) -> Path:  # backbone.safetensors
    "Stage 1: image-text contrast on the captioned training pictures; nothing is done if the file is there."
    path = prepare_folder(demo) / "backbone.safetensors"
    names = ("world", "size", "width", "stage1_steps", "batch_size", "stage1_rate", "seed")
    patch = PATCHES[demo.world]
    settings = {name: getattr(demo, name) for name in names} | {"patch": patch}
    if made_with(path, settings):
        return path
    data, captions = captioned_split(demo.world, root)
    texts = [text for triplet in data.triplets for text in triplet.captions]
    vocabulary = read_vocabulary(sum(captions.values(), texts))
    backbone = make_backbone("tiny", vocabulary=vocabulary, width=demo.width, patch=patch, seed=demo.seed)
    data, captions = captioned_split(demo.world, root, backbone.transform())
    losses = pretrain(
        backbone,
        CaptionedPictures(data.gallery, captions),
        demo.stage1_steps,
        demo.batch_size,
        demo.stage1_rate,
        neighbours=3 if demo.world == "cirr" else 1,
        seed=demo.seed,
        muon=True,
    )
    log = pd.DataFrame(dict(step=range(1, len(losses) + 1), loss=losses))
    log.to_csv(path.with_name("stage1.csv"), index=False)
    save_backbone(backbone, path)
    if demo.cache != "off":  # the pictures are still in memory, so the runs need not decode them again
        cache_tokens(backbone.trunk, data.gallery, path.with_name("tokens"))
    note_made(path, settings)
    return path


def list_runs(
    demo: "Demo",
) -> tuple[str, ...]:  # names of `RUNS`
    "The runs that the table shows, in the order in which they are trained."
    return MAIN_RUNS if demo.rows == "main" else tuple(dict.fromkeys([*MAIN_RUNS, *RUNS]))


def write_commands(
    demo: "Demo",
    root: Path,  # of the drawn world
    weights: Path,  # of the backbone after stage 1
) -> dict[str, list[str]]:  # name of the run -> words after cala-train
    "The trainings of stage 2, which differ in the flags of `RUN_FLAGS` and in nothing else."
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
    }
    commands = {}
    for name in list_runs(demo):
        run_flags = flags | RUN_FLAGS[name] | {"--output": folder / name, "--experiment-name": name}
        commands[name] = [str(word) for item in run_flags.items() for word in item]
    return commands


def start_run(
    demo: "Demo",
    words: list[str],  # after cala-train
    position: int = 0,  # on which line of a terminal its bar is drawn
) -> subprocess.Popen:
    "Start one training as a process of its own; its progress and its errors appear on standard error."
    environment = {**os.environ, "OMP_NUM_THREADS": str(demo.threads), "TQDM_POSITION": str(position)}
    command = [sys.executable, "-m", "cala.scripts.train", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def wait_for_run(
    processes: dict[str, subprocess.Popen],  # name of the run -> its process
) -> str:  # name
    "Wait until one of the runs has ended; `CalaError` if it failed."
    while True:
        for name, process in processes.items():
            status = process.poll()
            if status:
                raise CalaError(f"the {name} run failed with status {status}; its message is above")
            if status == 0:
                return name
        time.sleep(0.1)


def train_runs(
    demo: "Demo",
    commands: dict[str, list[str]],  # from `write_commands`
):
    "Stage 2: train the runs that are not there, or that began from another backbone; as many at once as cores allow."
    folder = prepare_folder(demo)
    stage1 = json.loads((folder / "backbone.safetensors.made.json").read_text())
    settings = {name: dict(words=words, stage1=stage1) for name, words in commands.items()}
    waiting = [name for name in commands if not made_with(folder / name, settings[name])]
    at_once = max(1, (os.cpu_count() or 1) // demo.threads)
    for name in waiting:
        print(f"cala-train {shlex.join(commands[name])}", flush=True)
        shutil.rmtree(folder / name, ignore_errors=True)
    running = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                running[name] = start_run(demo, commands[name], list(commands).index(name))
            name = wait_for_run(running)
            del running[name]
            note_made(folder / name, settings[name])
    finally:
        for process in running.values():
            process.terminate()


def choose_weight(
    demo: "Demo",
    model: CaLa,  # of the run cala
) -> float:
    "The weight of CTR with which candidates are ranked again, chosen on another world; writes weights.csv."
    data = open_dataset(NAMES[demo.world], draw_other_world(demo), "val", model.backbone.transform())
    sweep = sweep_weights(model, data, batch_size=256)
    sweep.to_csv(prepare_folder(demo) / "cala" / "weights.csv", index=False)
    return best_weight(sweep)


def evaluate_runs(
    demo: "Demo",
    root: Path,  # of the drawn world
) -> dict[str, Result]:  # row of the table -> its recalls
    "Three baselines, with the encoders of the QTM run, and all runs after their last epoch, on the validation split."
    results = {}
    models = {name: load_checkpoint(prepare_folder(demo) / name / "last") for name in list_runs(demo)}
    transform = models["qtm"].backbone.transform()  # the same for all runs
    data = open_dataset(NAMES[demo.world], root, "val", transform, keep=True)
    for name, model in models.items():
        embedded = embed(model, data, batch_size=256)
        if name == "qtm":
            results |= measure_rows(model.frame, embedded, data, RUNS[name])
        else:
            results[RUNS[name]] = measure(model.frame, embedded, data)
        if name == "cala":
            reranker = Reranker(model, weight=choose_weight(demo, model))
            results[RANKED_AGAIN] = evaluate_again(reranker, data, [embedded])
    return {row: results[row] for row in ROWS if row in results}


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
    files = {row: folder / name / "ranks.csv" for name, row in RUNS.items()}
    files[RANKED_AGAIN] = folder / "cala" / "ranks_again.csv"
    for row, file in files.items():
        if row in results:
            results[row].ranks.to_csv(file, index=False)
    return table


def run_demo(
    demo: "Demo",
) -> Path:  # the folder: data, runs, table.csv
    "All steps, with a line about each; what is there from an earlier call with the same settings is used again."
    clock, folder = Clock(), prepare_folder(demo)
    clock.print("1 of 4: draw a world")
    root = draw_world(demo)
    triplets = len(open_dataset(NAMES[demo.world], root, "train"))
    steps = demo.epochs * (triplets // demo.batch_size)

    stage1_steps = count_things(demo.stage1_steps, "step", "steps")
    clock.print(f"2 of 4: stage 1, {stage1_steps}: which caption belongs to which picture")
    torch.set_num_threads(demo.threads)
    weights = train_backbone(demo, root)

    names = ", ".join(RUNS[name] for name in list_runs(demo))
    clock.print(f"3 of 4: stage 2, {steps} steps each: {names}")
    train_runs(demo, write_commands(demo, root, weights))

    clock.print("4 of 4: evaluate on unseen pictures")
    results = evaluate_runs(demo, root)
    table = save_results(folder, results)
    again = results[RANKED_AGAIN]
    print(f"\n{table.to_string()}\n")
    clock.print(f"seed {demo.seed}, {again['queries']} queries, {again['gallery']} pictures; {folder / 'table.csv'}")
    candidates, weight = again["rerank"], again["rerank_weight"]
    print(f"ranked again: the first {candidates} pictures, with weight {weight} of CTR, chosen on another drawn world")
    return folder

"""A run of cala-train that is killed and resumed at twenty random moments ends as if nothing had happened.

A save is killed at every call to the disk that it makes."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
from itertools import count

import pytest
import torch
from tqdm import tqdm

from cala.library.checkpoint import read_recipe, save_checkpoint
from cala.library.cli import run_command
from cala.library.resume import Resume
from cala.scripts.train import main
from cala.training import CSVLog, KeepBest, Learner, Validate
from saved_models import tiny
from small_runs import exit_code, read_results, train_flags

EPOCHS = 4


# A moment of a run is a call of a function, Python's or C's, by its number: the same in every run of the same seed.


def of_any_kind(event, function):
    return event in ("call", "c_call")


def of_the_disk(event, function):
    "Open, write, flush, sync, rename, remove ..."
    return event == "c_call" and (
        function.__module__ in ("posix", "_io") or isinstance(getattr(function, "__self__", None), io.IOBase)
    )


STEP, VALIDATION = ((Learner, "train_step"),), ((Validate, "after_epoch"),)
SAVE = tuple((callback, "save") for callback in (KeepBest, CSVLog, Resume))
PLACES = {  # where a kill may fall: the methods that are at work, and which of their calls count
    "in a step": (STEP, of_any_kind),
    "in a validation": (VALIDATION, of_any_kind),
    "while saving": (SAVE, of_any_kind),
    "while saving, at the disk": (SAVE, of_the_disk),
}


def number_calls(owner, method, kinds, calls, fatal=None):
    "While a `method` is at work, count the calls of each kind; at the one that is `fatal` this process is no more."
    original = getattr(owner, method)

    def tick(frame, event, function):
        for place, counts in kinds.items():
            if counts(event, function):
                calls[place] += 1
            if calls[place] == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(self, *args):
        sys.setprofile(tick)
        try:
            return original(self, *args)
        finally:
            sys.setprofile(None)

    setattr(owner, method, watched)


def run(words, said, places=(), fatal=None):
    "In a process of its own: the command, until it ends or is killed; what it says goes to a file."
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared between processes, and would outlive one that is killed
    calls = dict.fromkeys(places, 0)
    for methods in {PLACES[place][0] for place in places}:
        kinds = {place: PLACES[place][1] for place in places if PLACES[place][0] == methods}
        for owner, method in methods:
            number_calls(owner, method, kinds, calls, fatal)
    with open(said, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        run_command(main, words, prog="cala-train")
        print(json.dumps(calls))


def ended(server, *args):
    return exit_code(server.Process(target=run, args=args))


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory, server):
    "What a run leaves that nothing happens to, and how many calls each place has."
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ended(server, train_flags(world, folder / "run", epochs=EPOCHS), folder / "said", list(PLACES)) == 0, (
        folder / "said"
    ).read_text()
    return read_results(folder / "run"), json.loads((folder / "said").read_text().splitlines()[-1])


def resumed(words, folder):
    "The same words, with --resume if an epoch was complete; if not, a person is told so, and starts again."
    if not folder.exists():
        return words
    if any((folder / name).is_dir() for name in ("last", "last.old")):
        return [*words, "--resume", str(folder)]
    shutil.rmtree(folder)
    return words


def one_run(server, words, folder, said, moments):
    "Start, be killed, resume, and so on to the end; each death is a moment and whether that run was resumed."
    deaths = []
    while True:
        now, (place, fatal) = resumed(words, folder), moments[len(deaths)] if len(deaths) < len(moments) else ((), None)
        status = ended(server, now, said, place and [place], fatal)
        if status != -signal.SIGKILL:
            break
        deaths.append((place, fatal, "--resume" in now))
    assert status == 0, (deaths, said.read_text())
    return deaths


def test_a_run_killed_at_twenty_random_moments_and_resumed_after_each_ends_as_if_undisturbed(
    world, tmp_path, undisturbed, server
):
    expected, calls = undisturbed
    draw, deaths = random.Random(0), []
    moments = [
        (place, draw.randint(1, calls[place] // 2)) for place in [*PLACES] * 5
    ]  # within the two epochs after its start, of four
    draw.shuffle(moments)
    while len(deaths) < len(moments):  # a run that reaches its end before the next moment leaves it to another run
        folder = tmp_path / f"run-{len(deaths)}"
        deaths += one_run(
            server, train_flags(world, folder, epochs=EPOCHS), folder, tmp_path / "said", moments[len(deaths) :]
        )
        assert read_results(folder) == expected, deaths
    assert {(place, again) for place, _, again in deaths} >= {(place, True) for place in PLACES}


def test_a_killed_run_is_resumed_at_once_though_the_processes_that_decoded_its_pictures_live_on_for_seconds(
    world, tmp_path, undisturbed, server
):
    words = train_flags(world, tmp_path / "run", "--num-workers", 2, epochs=EPOCHS)
    deaths = one_run(
        server,
        words,
        tmp_path / "run",
        tmp_path / "said",
        [("in a step", undisturbed[1]["in a step"] // 2 + 1), ("in a step", 1)],
    )
    assert [again for *_, again in deaths] == [False, True] and read_results(tmp_path / "run") == undisturbed[0]


def test_of_two_runs_started_at_once_into_one_folder_one_trains_and_the_other_says_why_not(
    world, tmp_path, undisturbed, server
):
    both = [
        server.Process(target=run, args=(train_flags(world, tmp_path / "run", epochs=EPOCHS), tmp_path / str(number)))
        for number in range(2)
    ]
    for child in both:
        child.start()
    for child in both:
        child.join(120)
    assert sorted(child.exitcode for child in both) == [0, 2] and read_results(tmp_path / "run") == undisturbed[0]
    said = [(tmp_path / str(number)).read_text() for number, child in enumerate(both) if child.exitcode]
    assert re.fullmatch(
        f"cala-train: (another process is at work in {tmp_path}/run; .*|{tmp_path}/run is not empty .*)\n",
        said[0],
    )


def killed_in(work, fatal):
    "In a fork: `work`, until it ends or comes to its call to the disk number `fatal`; the signal that ended it, or 0."
    child = os.fork()
    if child:
        return os.WTERMSIG(os.waitpid(child, 0)[1])
    calls = iter(range(1, fatal + 1))

    def tick(frame, event, function):
        if of_the_disk(event, function) and next(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(tick)
    try:
        work()
    finally:
        os._exit(0)


def test_a_save_killed_at_any_call_to_the_disk_leaves_the_checkpoint_before_or_the_new_one_whole(tmp_path):
    models, found = {epoch: tiny(seed=epoch, tac_weight=0.0, hca_weight=0.0) for epoch in (1, 2, 3)}, []

    def save(epoch, folder):
        save_checkpoint(models[epoch], folder, metrics=dict(epoch=epoch), extra={"state.pt": b"%d" % epoch})

    def whole(folder):  # read_recipe compares every file with its hash
        said = read_recipe(folder, "state.pt")
        return said["metrics"]["epoch"], said["sha256"]

    right = [(save(epoch, tmp_path / "right"), whole(tmp_path / "right"))[1] for epoch in (1, 2, 3)]
    for fatal in count(1):
        folder = tmp_path / str(fatal) / "last"
        save(1, folder)
        killed = killed_in(lambda: save(2, folder), fatal)
        found.append(whole(folder))
        save(3, folder)  # and it goes on
        assert whole(folder) == right[2] and os.listdir(folder.parent) == ["last"]
        if not killed:
            break
    assert found == sorted(found) and set(found) == set(right[:2]) and len(found) > 20 and found[-2] == right[1]

"A command line becomes a dataclass or a call; what a user or a machine does wrong becomes one line, never a traceback."

import errno
import inspect
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

import cala
from cala.errors import CalaError
from cala.library.cli import command, describe_error, parse_flags, prepare_output, run_command


@dataclass
class DataFlags:
    "Where the data are."

    data_root: str = "."  # folder of the data sets
    categories: tuple[str, ...] = ("dress", "shirt")  # of FashionIQ
    dataset: Literal["CIRR", "FashionIQ"] = "CIRR"  # which


@dataclass
class Flags(DataFlags):
    "How to train."

    num_epochs: int = 30  # passes over 100% of the triplets
    learning_rate: float = 5e-6  # of the backbone
    save_best: bool = True  # keep the checkpoint with the best recall
    save_training: bool = False  # keep the state
    dataset: Literal["CIRR", "FashionIQ"] = "FashionIQ"  # the second comment counts
    model_name: str = None  # name of a published model
    embeds_dim: int | None = None  # checked against the backbone
    encoder: Literal["both", "text"] | None = None  # which encoders train
    seeds: list[int] = field(default_factory=lambda: [0])  # one run each


def read(line, config=Flags):
    return parse_flags(config, line.split())


def refusal(words, config=Flags):
    "The message of a wrong command line."
    with pytest.raises(CalaError) as error:
        parse_flags(config, words.split() if isinstance(words, str) else words)
    assert "\n" not in str(error.value)
    return str(error.value)


# Flags


def test_without_flags_the_defaults_stand():
    assert read("") == Flags()


@pytest.mark.parametrize(
    "line, field_values",
    [
        ("--num-epochs 2 --learning-rate 1e-5", dict(num_epochs=2, learning_rate=1e-5)),
        ("--num_epochs 2 --learning_rate=1e-5", dict(num_epochs=2, learning_rate=1e-5)),
        ("--data_root=my_data", dict(data_root="my_data")),
        ("--data-root a --data-root b=c", dict(data_root="b=c")),  # the last one counts
        ("--save-best --save-training", dict(save_best=True, save_training=True)),
        ("--no-save-best --no-save_training", dict(save_best=False, save_training=False)),
        ("--save_best --no_save_best", dict(save_best=False)),
        ("--dataset cirr --encoder TEXT", dict(dataset="CIRR", encoder="text")),
        ("--model-name None --embeds-dim None --encoder None", {}),
        ("--model-name RN50x4 --model-name None", {}),
        ("--data-root None", dict(data_root="None")),  # a folder of that name: this flag has a default
        ("--num-epochs -3", dict(num_epochs=-3)),
        ("--categories dress", dict(categories=("dress",))),
        ("--categories toptee shirt", dict(categories=("toptee", "shirt"))),
        ("--categories toptee,shirt", dict(categories=("toptee", "shirt"))),
        ("--categories toptee, shirt --save-best", dict(categories=("toptee", "shirt"))),
        ("--seeds 1 2,3", dict(seeds=[1, 2, 3])),
    ],
)
def test_every_spelling_of_a_flag_is_read(line, field_values):
    assert read(line) == Flags(**field_values)


def test_a_flag_of_one_letter_is_read_with_one_hyphen_too():
    def search(k: int = 10):
        pass

    assert read("-k 3", search) == read("--k 3", search) == read("-k3", search) == dict(k=3)
    assert refusal("-k", search).startswith("argument --k/-k: expected one argument")


def test_the_old_name_of_a_flag_is_read():
    from cala.recipe import Recipe

    for name in "--process-timeout", "--rank-timeout", "--rank_timeout":
        assert read(f"{name} 20", Recipe).process_timeout == 20
    assert refusal("--rank-timeout 0", Recipe).startswith("--process-timeout 0: give a number above 0")


def test_the_version_is_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        read("--version")
    assert not ended.value.code and capsys.readouterr().out == f"cala {cala.__version__}\n"


def test_a_quoted_list_is_read():
    assert parse_flags(Flags, ["--categories", " dress  toptee "]).categories == ("dress", "toptee")


def test_a_function_gives_a_dict_of_its_arguments():
    def check(data_root: str = ".", deep: bool = False, save: str = None):
        pass

    assert read("--deep", check) == dict(data_root=".", deep=True, save=None)
    assert "required: --path" in refusal("", lambda path: None)


UNKNOWN = "unrecognized arguments:"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--num-epoch5 2", f"{UNKNOWN} --num-epoch5 2; did you mean --num-epochs? --help lists every flag"),
        ("--num_epoch 2", f"{UNKNOWN} --num-epoch 2; did you mean --num-epochs?"),  # there are no abbreviations
        ("-num-epochs 2", f"{UNKNOWN} -num-epochs 2; did you mean --num-epochs?"),
        ("--no-save-bets", f"{UNKNOWN} --no-save-bets; did you mean --no-save-best?"),
        ("--photos x", f"{UNKNOWN} --photos x; --help lists every flag"),
        ("--seed 3", f"{UNKNOWN} --seed 3; did you mean --seeds?"),
        ("--model x", f"{UNKNOWN} --model x; did you mean --model-name?"),
        ("--rate 1", f"{UNKNOWN} --rate 1; --help lists every flag"),  # a wrong guess would not help
        ("--device cuda", f"{UNKNOWN} --device cuda; CUDA_VISIBLE_DEVICES=0 chooses the first GPU"),
        ("--lr 1", f"{UNKNOWN} --lr 1; did you mean --learning-rate?"),
        ("a b --num-epochs 2", f"{UNKNOWN} a b; --help lists every flag"),
        ("--save-best True", "--save-best True: this flag takes no value; give --save-best or --no-save-best"),
        ("--no_save-best=1", "--no-save-best 1: this flag takes no value"),
        ("--data-root my data --save-best", "--data-root my data: this flag takes one value; put quotes around"),
        ("--data-root=my data", "--data-root my data: this flag takes one value"),
        ("--num-epochs 2 -3", "--num-epochs 2 -3: this flag takes one value"),
        ("--num-epochs", "argument --num-epochs: expected one argument; --help lists every flag"),
        ("--num-epochs two", "--num-epochs two: give a whole number"),
        ("--num-epochs 1.5", "--num-epochs 1.5: give a whole number"),
        ("--num-epochs 99999999999999999999", "--num-epochs 99999999999999999999: give a number up to 9223372036"),
        ("--learning_rate 1e", "--learning-rate 1e: give a number"),
        ("--learning_rate nan", "--learning-rate nan: give a number that is finite"),
        ("--learning_rate=-inf", "--learning-rate -inf: give a number that is finite"),
        ("--seeds 1 b", "--seeds b: give a whole number"),
        ("--dataset COCO", "--dataset COCO: choose one of CIRR, FashionIQ"),
        ("--save-best=yes", "--save-best yes: this flag takes no value"),
    ],
)
def test_a_wrong_flag_or_value_is_one_line(words, message):
    assert refusal(words).startswith(message)


@pytest.mark.parametrize("flag", ["--data-root", "--data_root", "--categories", "--num-epochs", "--model-name"])
@pytest.mark.parametrize("empty", ["", " ", "\t"])
def test_an_empty_value_is_one_line_that_names_the_flag(flag, empty):
    spelled = flag.replace("_", "-")
    for words in [flag, empty], [f"{flag}={empty}"], ["--save-best", flag, empty, "--seeds", "1"]:
        assert refusal(words).startswith(f"{spelled} is empty (an unset shell variable?); give a value")
    assert refusal(["--categories", "dress", empty]).startswith("--categories is empty")
    assert refusal(["--categories", ","]).startswith("--categories is empty")
    assert refusal([empty]).startswith("an argument is empty")


def test_the_help_shows_comments_defaults_and_choices(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_flags(Flags, ["--help"], "cala-train")
    text = " ".join(capsys.readouterr().out.split())
    assert not ended.value.code and text.startswith("usage: cala-train [flags] How to train.")
    for part in [
        "--data-root STR folder of the data sets (default: .)",
        "--categories STR [STR ...] of FashionIQ (default: dress,shirt)",
        "--dataset {CIRR,FashionIQ} the second comment counts (default: FashionIQ)",
        "--num-epochs INT passes over 100% of the triplets (default: 30)",
        "--save-training, --no-save-training keep the state (default: False)",
        "--model-name STR name of a published model --embeds-dim INT checked against the backbone",
        "--encoder {both,text} which encoders train",
    ]:
        assert part in text


def test_the_help_of_a_function_shows_the_comments_of_its_parameters(capsys):
    def check(
        data_root: str = ".",  # folder of the data sets
        deep: bool = False,  # decode every picture
    ):
        "Count the pictures."
        deep: int = 3  # not a parameter
        return deep

    with pytest.raises(SystemExit):
        parse_flags(check, ["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Count the pictures." in text and "folder of the data sets" in text and "decode every picture" in text


RELEASED = """--dataset {dataset} --num-epochs 30 --batch-size 64 --max-epoch 15 --min-lr 0 --learning-rate 5e-6
    --transform targetpad --target-ratio 1.25 --save-training --save-best --validation-frequency 1 --encoder {encoder}
    --encoder-arch {arch} --cir-frame {frame} --tac-weight 0.45 --hca-weight 0.1 --embeds-dim {dim} --model-name {model}
    --api-key Comet-api-key --workspace Comet-workspace --experiment-name Comet-experiment-name"""


def test_the_command_line_of_the_released_program_is_read_as_printed():
    from cala.recipe import Recipe

    for arch, dim, model in ("clip", 640, "RN50x4"), ("blip2", 768, "None"):
        line = RELEASED.format(dataset="CIRR", encoder="both", arch=arch, frame="artemis", dim=dim, model=model)
        for spelling in line, line.replace("--num-epochs", "--num_epochs").replace("--save-best", "--save_best"):
            recipe = read(spelling, Recipe)
            assert (recipe.encoder_arch, recipe.embeds_dim, recipe.cir_frame) == (arch, dim, "artemis")
            assert recipe.model_name == (None if model == "None" else model) and recipe.learning_rate == 5e-6
            assert recipe.save_training and recipe.save_best and recipe.target_ratio == 1.25


def test_the_help_of_sixty_flags_takes_a_fraction_of_a_second_of_processor_time(tmp_path):
    (tmp_path / "flags.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass Flags:\n"
        + "".join(f"    flag_{number}: int = {number}  # number {number}\n" for number in range(60))
    )
    (tmp_path / "main.py").write_text(
        "from flags import Flags\nfrom cala.library.cli import command\n@command\ndef main(flags: Flags):\n    pass\n"
    )
    code = "import os, subprocess, sys; subprocess.run(sys.argv[1:]); times = os.times(); print(times[2] + times[3])"
    line = [sys.executable, "-c", code, sys.executable, str(tmp_path / "main.py"), "--help"]
    *text, seconds = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "number 59" in " ".join(text) and float(seconds) < 0.3  # 0.1 on an idle machine


def test_importing_the_module_imports_no_torch():
    code = "import sys, cala.library.cli; print(*{'torch', 'numpy', 'pandas', 'fastcore'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


# Errors


def system_error(number, name):
    "The error of the operating system with this number, about a file."
    return OSError(number, os.strerror(number), name)


REFUSALS = {
    "nowhere.json: No such file or directory; name another place": system_error(errno.ENOENT, "nowhere.json"),
    "a.json: Permission denied; let this user": system_error(errno.EACCES, "a.json"),
    "b.png: Too many open files; let a process open more": system_error(errno.EMFILE, "b.png"),
    "a\\nb.png: Input/output error; the disk": system_error(errno.EIO, "a\nb.png"),
    "memory is used up (MemoryError); lower --batch-size": MemoryError(),
    "memory is used up (CUDA out of memory": RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
    "a process that decodes pictures died (DataLoader worker (pid 7)": RuntimeError("DataLoader worker (pid 7) died"),
    "no folder a\\nb; name another": CalaError("no folder a\nb; name another"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_the_machine_refuses_is_one_line_with_status_2(message, capsys):
    def main():
        raise REFUSALS[message]

    with pytest.raises(SystemExit) as ended:
        run_command(main, [], prog="cala-x")
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"cala-x: {message}")


BUGS = [KeyError("x"), RuntimeError("shapes (3, 4) and (5, 6)"), OSError("a library's own words"), ZeroDivisionError()]


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_keeps_its_traceback(bug):
    def main():
        raise bug

    assert describe_error(bug) == ""
    with pytest.raises(type(bug)):
        run_command(main, [], prog="cala-x")


def test_an_error_in_a_loader_worker_is_its_own_one_line():
    traceback = "Caught CalaError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n ..."
    error = CalaError(f"{traceback}\ncala.errors.CalaError: a\nb.png cannot be decoded\n")  # as torch raises it again
    assert describe_error(error) == "a\\nb.png cannot be decoded"


def test_ctrl_c_is_one_line_with_status_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_command(main, [], prog="cala-x")
    assert ended.value.code == 130 and capsys.readouterr().err == "cala-x: stopped by Ctrl-C\n"


# Warnings


def test_only_the_warnings_of_cala_itself_are_notes(tmp_path):
    package = Path(cala.__file__).parent
    own_files = [f"{package}/data.py", f"{package}/library/files.py", os.path.relpath(f"{package}/data.py")]
    torch_file = ".venv/lib/python3.12/site-packages/torch/x.py"  # in a clone, whose folder is called cala too
    foreign_files = [f"/home/me/cala/{torch_file}", f"{package.parent}/{torch_file}", f"{tmp_path}/cala/x.py", "sys"]
    with prepare_output():
        for file in own_files:
            assert warnings.formatwarning("1 is\nmissing", UserWarning, file, 3) == "note: 1 is\\nmissing\n"
        for file in foreign_files:
            assert warnings.formatwarning("odd", UserWarning, file, 3, "x()") == f"{file}:3: UserWarning: odd\n  x()\n"


def test_warnings_for_programmers_are_hidden():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with prepare_output():
            for kind in DeprecationWarning, FutureWarning, UserWarning:
                warnings.warn(kind.__name__, kind, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["UserWarning"]


def test_the_format_of_warnings_is_restored():
    before = warnings.formatwarning
    with pytest.raises(ZeroDivisionError):
        with prepare_output():
            raise ZeroDivisionError
    assert warnings.formatwarning is before


# Commands


def count_pictures(
    root: str = "data",  # folder of the data sets
):
    "Count the pictures."
    if not Path(root).is_dir():
        raise CalaError(f"no folder {root}; name another --root")
    return len(list(Path(root).iterdir()))


def test_a_command_called_from_python_is_the_plain_function(tmp_path):
    counted = command(count_pictures)
    assert counted(root=tmp_path) == 0 and counted(tmp_path) == 0
    with pytest.raises(CalaError, match="no folder nowhere"):
        counted(root="nowhere")
    assert inspect.signature(counted) == inspect.signature(count_pictures) and counted.__doc__ == "Count the pictures."


def test_run_command_returns_the_result_or_ends_with_one_line(tmp_path, capsys):
    def train(flags: Flags):
        return flags.num_epochs

    assert run_command(count_pictures, ["--root", str(tmp_path)]) == 0
    assert run_command(train, ["--num-epochs", "3"]) == 3
    assert run_command(command(train), ["--num-epochs", "3"]) == 3
    refusals = {"no folder": ["--root", "nowhere"], "--root is empty": ["--root", ""], "unrecognized": ["--rot"]}
    for line, words in refusals.items():
        with pytest.raises(SystemExit) as ended:
            run_command(count_pictures, words, prog="cala-check")
        (shown,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and shown.startswith(f"cala-check: {line}")


# In a shell

SCRIPT = """
import warnings
import cala
from cala.library.cli import command
@command
def main(
    lines: int = 1,  # how many
):
    "Print names that a terminal may not know."
    warnings.warn_explicit("one is missing", UserWarning, cala.__file__, 1)
    for i in range(lines): print(f"{i} café 猫 caf\\udce9")
    raise SystemExit(1)
"""
NOTE = "note: one is missing\n"


@pytest.fixture
def shell(tmp_path):
    "Status, standard output and standard error of a line of bash, in which PRINT is the command."
    (tmp_path / "cala-print").write_text(SCRIPT)

    def shell(line, **environment):
        line = line.replace("PRINT", f"{sys.executable} {tmp_path}/cala-print")
        done = subprocess.run(["bash", "-c", line], capture_output=True, env={**os.environ, **environment}, timeout=60)
        return done.returncode, done.stdout, done.stderr.decode()

    return shell


ENVIRONMENTS = [
    {},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_name_that_the_terminal_does_not_know_is_still_printed(shell, environment):
    status, out, err = shell("PRINT", **environment)
    assert (status, err) == (1, NOTE)
    assert out.startswith(b"0 caf") and out.rstrip().endswith((rb"caf\udce9", b"caf\xe9"))


def test_a_closed_pipe_ends_a_command_silently(shell):
    for lines in 1, 99_999:  # before and after the first flush
        status, out, err = shell(f"PRINT --lines {lines} | true; exit ${{PIPESTATUS[0]}}")
        assert err == NOTE and status in ((141,) if lines > 1 else (141, 1))
    status, out, err = shell("PRINT --help | true; exit ${PIPESTATUS[0]}")
    assert err == "" and status in (0, 141)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_standard_output_on_a_full_disk_is_one_line(shell):
    line = "cala-print: reading or writing: No space left on device; make room and start again\n"
    status, out, err = shell("PRINT > /dev/full")
    assert (status, err) == (2, NOTE + line)
    assert shell("PRINT --help > /dev/full", PYTHONUNBUFFERED="") == (2, b"", line)


def test_a_command_without_standard_output_works(shell):
    assert shell("PRINT >&-") == (1, b"", NOTE)


def test_an_unset_variable_and_a_mistyped_flag_are_one_line_with_status_2(shell):
    assert shell('unset N; PRINT --lines "$N"')[::2] == (
        2,
        "cala-print: --lines is empty (an unset shell variable?); give a value, or leave the flag out\n",
    )
    assert shell("PRINT --line 3")[::2] == (
        2,
        "cala-print: unrecognized arguments: --line 3; did you mean --lines? --help lists every flag\n",
    )

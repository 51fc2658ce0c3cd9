"The mistakes of a first day: each command answers with one line that says what is wrong and what to do, and status 2."

import importlib
import inspect
import shutil
from dataclasses import is_dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from cala.errors import CalaError
from cala.library.cli import find_name, is_list_type, parse_flags, run_command, spell_flag, strip_none
from small_runs import draw_small_world, lines_of, train_flags

SCRIPTS = "train validate cirr_submission combiner check cache search ablation demo benchmark".split()
COMMANDS = {find_name(importlib.import_module(f"cala.scripts.{name}").__file__): name for name in SCRIPTS}
TINY = "--encoder-arch tiny --backbone-weights H/small.safetensors --data-root H --batch-size 16"
RUN = f"{TINY} --learning-rate 1e-3 --objective released --num-epochs 1 --max-epoch 1"
BEST = "--checkpoint H/run/best"


def find_main(command):
    "The function behind a command."
    return importlib.import_module(f"cala.scripts.{COMMANDS[command]}").main


def find_config(command):
    "The dataclass whose fields are a command's flags, or the function whose parameters they are."
    main = inspect.unwrap(find_main(command))
    hints = [hint for name, hint in get_type_hints(main).items() if name != "return"]
    return next(filter(is_dataclass, hints), main)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Small data sets, a run, and things that are none of what a flag wants. No test may change any of it."
    home = draw_small_world(tmp_path_factory.mktemp("home"), val=9)  # 54 pictures: more than a submission names
    run_command(find_main("cala-train"), train_flags(home, home / "run", epochs=1), prog="cala-train")
    (home / "photos").mkdir()
    for picture in sorted((home / "cirr_dataset/dev").iterdir())[:3]:
        shutil.copy(picture, home / "photos")
    for name in "cut", "other", "unreadable":
        shutil.copytree(home / "run/best", home / name)
    weights = home / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    (home / "unreadable/recipe.json").write_text("{\n")
    shutil.copy(home / "small.safetensors", home / "other/model.safetensors")
    (home / "empty").mkdir()
    (home / "notes.txt").write_text("milk\n")
    (home / "table.csv").write_text("a,b\n1,2\n")
    return home


@pytest.fixture
def refused(home, tmp_path, monkeypatch, capsys):
    "The one line of a command that ends with status 2, and leaves and changes nothing."

    def refused(command, words):
        monkeypatch.chdir(tmp_path)
        before = list_files(home)
        capsys.readouterr()
        words = [word.replace("H", str(home), 1) if word == "H" or word.startswith("H/") else word for word in words]
        with pytest.raises(SystemExit) as ended:
            run_command(find_main(command), words, prog=command)
        printed, errors = capsys.readouterr()
        lines = [line for line in lines_of(errors) if "random weights" not in line.lower()]
        assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{command}: "), errors
        assert list_files(home) == before and not any(tmp_path.iterdir())
        return lines[0].removeprefix(f"{command}: ").replace(str(home), "H")

    return refused


def list_files(folder):
    "Every file below a folder, with its size and the time of its last change."
    stats = {path: path.stat() for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items() if not path.is_dir()}


MISTAKES = {
    "cala-train": [
        ("", ". holds no annotations of CIRR", "point --data-root"),
        ("--data-root nowhere", "no folder nowhere", "point --data-root at the folder that holds cirr_dataset"),
        ("--data-root H/notes.txt", "no folder H/notes.txt", "--data-root"),
        ("--data-root H/fashionIQ_dataset", "H/fashionIQ_dataset holds no annotations of CIRR"),
        ("--dataset FashionIQ --data-root H/cirr_dataset", "holds no annotations of FashionIQ"),
        ("--dataset COCO", "--dataset COCO: choose one of CIRR, FashionIQ"),
        ("--dataset {'CIRR' or 'FashionIQ'}", "--dataset {'CIRR' or 'FashionIQ'}: this flag takes one value"),
        ("--bach-size 3", "did you mean --batch-size?"),
        ("--batch_sise=3", "did you mean --batch-size?"),
        ("--device cuda", "CUDA_VISIBLE_DEVICES=0 chooses the first GPU"),
        ("--lr 1", "did you mean --learning-rate?"),
        ("--tensorboard yes", "--tensorboard yes: this flag takes no value; give --tensorboard or --no-tensorboard"),
        ("--no-save-best=1", "--no-save-best 1: this flag takes no value"),
        ("H", "unrecognized arguments: H"),
        ("--batch-size -1", "--batch-size -1: give a number above 0"),
        ("--num-epochs 0", "--num-epochs 0: give a number above 0"),
        ("--seed 99999999999999", "--seed 99999999999999: give a number below 4294967296"),
        ("--tac-weight 2", "--tac-weight 2.0: give a number up to 1"),
        ("--rank-timeout 0", "--process-timeout 0: give a number above 0"),
        ("--target-ratio 0.5", "--target-ratio 0.5: give 1 or more"),
        ("--num-workers 1000", "--num-workers 1000: this machine has", "give at most"),
        (f"{TINY} --transform stretch", "no transform 'stretch'", "targetpad"),
        (f"{TINY} --dataset FashionIQ --categories hat", "no categories hat; FashionIQ has dress, shirt, toptee"),
        (f"{TINY} --encoder-arch vgg", "--encoder-arch vgg: choose one of blip2, clip, tiny"),
        (f"{TINY} --encoder-arch json:Net", "--encoder-arch json:Net: module 'json' has no attribute 'Net'"),
        (f"{TINY} --embeds-dim 768", "--embeds-dim 768: this tiny backbone has 32; leave the flag out"),
        (f"{TINY} --random-weights medium", "--random-weights medium: choose one of small, full"),
        (f"{TINY} --trunk-precision half", "--trunk-precision half: choose one of auto, fp32, fp16, bf16"),
        (f"{TINY} --backbone-weights nowhere.pt", "no file nowhere.pt", "--backbone-weights"),
        (f"{TINY} --backbone-weights H/run/best", "no file H/run/best", "--backbone-weights"),
        (f"{TINY} --backbone-weights H/notes.txt", "H/notes.txt is not a backbone written by cala"),
        (f"{TINY} --backbone-weights H/cut/model.safetensors", "is not a backbone written by cala, or is damaged"),
        (f"{TINY} --batch-size 4096", "36 triplets do not fill a batch of 4096; lower --batch-size"),
        (f"{TINY} --triplets 5000", "--triplets 5000: CIRR train has 36; give at most as many"),
        (f"{TINY} --output H/run", "H/run is not empty", "--resume H/run"),
        (f"{TINY} --output H/notes.txt", "H/notes.txt is a file; choose another --output"),
        (f"{TINY} --output H/notes.txt/x", "cannot make H/notes.txt/x: Not a directory"),
        (f"{TINY} --output /proc/x", "cannot make /proc/x"),
        (f"{RUN} --resume nowhere", "--resume nowhere: no such folder"),
        (f"{RUN} --resume H/empty", "--resume H/empty holds no complete epoch of a run"),
        (f"{RUN} --resume H/run/last", "--resume H/run/last is a checkpoint; give the folder of its run, H/run"),
        (f"{RUN} --resume H/run --output out", "--resume H/run goes on in that folder; leave out --output out"),
        (f"{RUN} --resume H/run --no-save-training", "leave out --no-save-training"),
        (f"{RUN} --resume H/run --batch-size 8", "--batch-size is 16 there and 8 here"),
        ("--resume H/run --encoder-arch blip2", "is of another recipe", "--encoder-arch is tiny there and blip2 here"),
    ],
    "cala-validate": [
        ("", "no data set is named; give --dataset CIRR"),
        ("--dataset CIRR", ". holds no annotations of CIRR"),
        ("--dataset CIRR --data-root H", "no model is named; give --checkpoint"),
        ("--dataset CIR --data-root H", "no data set 'CIR'"),
        ("--checkpoint H/run --data-root H", "H/run is no checkpoint", "intact is H/run/best (epoch 1) and H/run/last"),
        ("--checkpoint nowhere", "nowhere is no checkpoint: no such folder"),
        ("--checkpoint H", "H is no checkpoint: recipe.json is missing; give the folder that cala-train wrote"),
        ("--checkpoint H/notes.txt", "H/notes.txt is a file, and a checkpoint is a folder"),
        (
            "--checkpoint H/run/best/model.safetensors",
            "is a file, and a checkpoint is a folder",
            "intact is H/run/best",
        ),
        ("--checkpoint H/cut", "does not match its recipe.json (truncated, damaged, or of another run)"),
        ("--checkpoint H/other", "does not match its recipe.json (truncated, damaged, or of another run)"),
        ("--checkpoint H/unreadable", "H/unreadable/recipe.json is not JSON (", "line 2"),
        ("--checkpont H", "did you mean --checkpoint?"),
        ("H/run/best", "unrecognized arguments: H/run/best"),
        (f"{BEST} --data-root H --clip-model-name RN50x4", "--checkpoint and --clip-model-name name two models"),
        (f"{BEST} --data-root H --device gpu", "--device gpu: give cpu, cuda, cuda:1, mps or xpu"),
        (f"{BEST} --data-root H --device cuda:99", "--device cuda:99: ", "try --device cpu"),
        (f"{BEST} --data-root H --batch-size 0", "--batch-size 0: give 1 or more"),
        (f"{BEST} --data-root H --target-ratio 0.2", "--target-ratio 0.2: give 1 or more"),
        (f"{BEST} --data-root H --num-workers -1", "--num-workers -1: give 0 or more"),
        (f"{BEST} --data-root H --num-workers 1000", "--num-workers 1000: this machine has"),
        (f"{BEST} --data-root H --dataset FashionIQ --categories hat", "no categories hat"),
        (f"{BEST} --data-root H --output H/run", "H/run is not empty (best is there); choose another --output"),
        (f"{BEST} --data-root H --output H/notes.txt", "H/notes.txt is a file; choose another --output"),
        (f"{BEST} --data-root H --output /proc/x", "cannot make /proc/x"),
        (f"{BEST} --data-root H --combining-function mean", "--combining-function mean: choose one of sum, artemis"),
        (f"{BEST} --data-root H --combining-function combiner", "needs trained weights; give --combiner-path"),
        (f"{BEST} --data-root H --combiner-path x.pt", "--combiner-path x.pt", "give --combining-function combiner"),
        (f"{BEST} --data-root H --combining-function combiner --combiner-path x.pt", "no file x.pt"),
        (f"{BEST} --data-root H --combining-function combiner --combiner-path H/run/best", "holds a Sum"),
        (f"{BEST} --data-root H --backbone-weights nowhere", "no file nowhere"),
        ("--blip2-textual-path a.pt --dataset CIRR --data-root H", "--blip2-visual-path are missing"),
        ("--clip-model-name RN50x5 --random-weights small --dataset CIRR --data-root H", "near it are RN50x4"),
        ("--random-weights huge --dataset CIRR --data-root H", "--random-weights huge: choose one of small, full"),
    ],
    "cala-cirr-submission": [
        ("", ". holds no annotations of CIRR"),
        ("--dataset CIRR", "unrecognized arguments: --dataset CIRR; --help lists every flag"),
        ("--data-root H/fashionIQ_dataset", "holds no annotations of CIRR"),
        (f"{BEST} --data-root H", "a submission names 50 pictures for each query, and test1 has 6 in all"),
        (f"{BEST} --data-root H --split dev", "no split 'dev'; CIRR has train, val, test1"),
        (f"{BEST} --data-root H --split val --submission-name a/b", "--submission-name 'a/b': give a plain file name"),
        (f"{BEST} --data-root H --split val --output H/run", "H/run is not empty"),
        ("--data-root H --split val", "no model is named"),
        ("--data-root H --split val --checkpoint H/run", "intact is H/run/best"),
    ],
    "cala-combiner": [
        ("", "no data set is named; give --dataset CIRR or --dataset FashionIQ, and the model as --checkpoint"),
        ("--dataset CIRR --data-root nowhere", "no folder nowhere"),
        (f"{BEST} --data-root H --num-epochs 0", "--num-epochs 0: give 1 or more"),
        (f"{BEST} --data-root H --learning-rate 0", "--learning-rate 0.0: give a number above 0"),
        (f"{BEST} --data-root H --weight-decay -1", "--weight-decay -1.0: give 0 or more"),
        (f"{BEST} --data-root H --projection-dim 0", "--projection-dim 0", "give widths of 1 or more"),
        (f"{BEST} --data-root H --combining-function sum", "this command trains a combiner; leave the flag out"),
        (f"{BEST} --data-root H --combiner-path x.pt", "no file x.pt"),
        (f"{BEST} --data-root H --dataset FashionIQ --categories hat", "no categories hat"),
        (f"{BEST} --data-root H --output H/run", "H/run is not empty"),
        ("--data-root H --dataset CIRR", "no model is named"),
    ],
    "cala-check": [
        ("", ". holds neither cirr_dataset nor fashionIQ_dataset"),
        ("--data-root nowhere", "nowhere"),
        ("--data-root H/photos", "H/photos holds neither", "point --data-root"),
        ("--data-root H --save H/run", "H/run is a folder; give --save another file"),
        ("--data-root H --save nowhere/holes.txt", "no folder nowhere; give --save another file"),
        ("--data-root H --save H/table.csv", "H/table.csv is there already, and only a .txt file is replaced"),
        ("--data-root H --deep yes", "--deep yes: this flag takes no value"),
        ("--enviroment", "did you mean --environment?"),
        ("H", "unrecognized arguments: H"),
    ],
    "cala-cache": [
        ("", ". holds no annotations of CIRR"),
        (f"{TINY} --cache off", "--cache off: there would be nothing to do"),
        (f"{TINY} --cache on", "--cache on: choose one of off, tokens, auto"),
        (f"{TINY} --splits dev", "no split 'dev'; CIRR has train, val, test1"),
        (f"{TINY} --checkpoint H/run", "intact is H/run/best"),
        (f"{TINY} --num-workers 1000", "--num-workers 1000: this machine has"),
        (f"{TINY} --cache-dir H/notes.txt", "cannot make H/notes.txt/", "--cache-dir"),
        (f"{TINY} --dry-run=true", "--dry-run true: this flag takes no value"),
        (f"{TINY} --device cuda", "CUDA_VISIBLE_DEVICES=0 chooses the first GPU"),
    ],
    "cala-search": [
        ("", "no pictures below .; point --pictures at a folder that holds some"),
        ("--pictures nowhere", "no folder nowhere; point --pictures"),
        ("--pictures H/notes.txt", "no folder H/notes.txt"),
        ("--pictures H/empty", "no pictures below H/empty"),
        ("--pictures H/photos", "no model is named; give --checkpoint"),
        (f"--pictures H/photos {BEST} --sentence make it red", "--sentence make it red: this flag takes one value"),
        (f"--pictures H/photos {BEST} --reference no.png", "no picture no.png, neither here nor in H/photos"),
        (f"--pictures H/photos {BEST} --reference H/photos", "no picture H/photos"),
        (f"--pictures H/photos {BEST} --reference H/notes.txt", "H/notes.txt cannot be decoded"),
        (f"--pictures H/photos {BEST} --sentence red -k 0", "--k 0: give a number above 0"),
        (f"--pictures H/photos {BEST} --sentence red --k all", "--k all: give a whole number"),
        (f"--pictures H/photos {BEST} --grid x.png", "--grid and --json show answers"),
        (f"--pictures H/photos {BEST} --sentence red --grid x.jpg", "end the name in .png, .svg or .html"),
        (
            f"--pictures H/photos {BEST} --sentence red --grid H/notes.txt/x.png",
            "H/notes.txt is a file; name another --grid",
        ),
        (f"--pictures H/photos {BEST} --sentence red --grid GRID", "is one of the pictures that are searched"),
        (f"--pictures H/empty/.. {BEST} --reference GRID --grid GRID", "is the reference and would be overwritten"),
        (f"--pictures H/photos {BEST} --sentence red --index H/run/best", "H/run/best is not empty", "--index"),
        (f"--pictures H/photos {BEST} --sentence red --index H/photos", "H/photos is not empty", "--index"),
        (f"--pictures H/photos {BEST} --sentence red --index H/notes.txt", "H/notes.txt is a file", "--index"),
        (f"--pictures H/photos {BEST} --sentence red --device gpu", "--device gpu: give cpu"),
        (f"--pictures H/photos {BEST} --sentence red --target-ratio 0", "--target-ratio 0.0: give 1 or more"),
        ("--pictures H/photos --checkpoint H/run --sentence red", "intact is H/run/best"),
        ("--picture H/photos", "did you mean --pictures?"),
    ],
    "cala-ablation": [
        ("--parts all", "--parts all: give some of"),
        ("--worlds coco", "--worlds coco: give some of cirr, cirr_hard"),
        ("--seeds 0", "--seeds 0: give 1 or more"),
        ("--seeds 1 2 3", "--seeds 1 2 3: this flag takes one value"),
        ("--workers 0", "--workers 0: give 1 or more"),
        ("--compare nowhere.csv", "--compare nowhere.csv: no such file"),
        ("--compare H/table.csv", "--compare H/table.csv has no column setting"),
        ("--output H/notes.txt", "H/notes.txt is a file"),
        ("--output H/run", "H/run is not empty (best is there); no ablation made it; choose another --output"),
        ("--part slice", "did you mean --parts?"),
    ],
    "cala-demo": [
        ("--world coco", "--world coco: choose one of cirr, fashioniq"),
        ("--size 0", "--size 0: give 1 or more"),
        ("--epochs 0", "--epochs 0: give 1 or more"),
        ("--stage1-steps -1", "--stage1-steps -1: give 1 or more"),
        ("--batch-size 0", "--batch-size 0: give 1 or more"),
        ("--width 7", "--width 7: the tiny backbone has four heads; give a multiple of 4"),
        ("--threads 0", "--threads 0: give 1 or more"),
        ("--seed -1", "--seed -1: give 0 or more"),
        ("--learning-rate 0", "--learning-rate 0.0: give a number above 0"),
        ("--stage1-rate -1", "--stage1-rate -1.0: give a number above 0"),
        ("--cache yes", "--cache yes: choose one of off, tokens, auto"),
        ("--output H/notes.txt", "cannot make H/notes.txt/cirr"),
        ("--report yes", "--report yes: this flag takes no value"),
        ("--sise 6", "did you mean --size?"),
    ],
}
ROWS = [(command, *row) for command, rows in MISTAKES.items() for row in rows]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:2]).strip())
def test_a_mistake_is_one_line_and_changes_nothing(home, refused, row):
    command, words, *expected = row
    photo = sorted((home / "photos").iterdir())[0]
    line = refused(command, words.replace("GRID", f"H/photos/{photo.name}").split())
    for part in expected:
        assert part in line, line
    assert len(line) < 400


# Every flag of every command


def list_flags():
    "Every flag of every command: the command, the flag, and the type of its value."
    for command in COMMANDS:
        config = find_config(command)
        hints = get_type_hints(config, include_extras=True)
        for name in inspect.signature(config).parameters:
            yield command, spell_flag(name), strip_none(hints[name])


FLAGS = list(list_flags())


def error_of(command, *words):
    "The message about a wrong command line; the command is not run."
    with pytest.raises(CalaError) as error:
        parse_flags(find_config(command), list(words))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_value_is_refused_for_every_flag(command):
    for flag in (flag for owner, flag, _ in FLAGS if owner == command):
        for words in (flag, ""), (flag, " "), (f"{flag}=",), (flag.replace("-", "_").replace("__", "--"), ""):
            assert error_of(command, *words).startswith(f"{flag} is empty (an unset shell variable?); give a value")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_without_its_value_is_refused_for_every_flag(command):
    for flag in (flag for owner, flag, kind in FLAGS if owner == command and kind is not bool):
        assert "expected" in error_of(command, flag) and flag in error_of(command, flag)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_number_is_refused_for_every_number(command):
    wrong = {int: ("two", "1e-3", "0.5", "1,000", "nan", "inf", "9" * 30), float: ("much", "1,5", "nan", "inf", "-inf")}
    for flag, kind in ((flag, kind) for owner, flag, kind in FLAGS if owner == command):
        for value in wrong.get(kind, ()):
            assert error_of(command, f"{flag}={value}").startswith(f"{flag} {value}: give a")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_choice_that_does_not_exist_is_refused_and_the_case_of_letters_makes_no_difference(command):
    for flag, kind in ((flag, kind) for owner, flag, kind in FLAGS if owner == command):
        if get_origin(kind) is Literal:
            assert error_of(command, flag, "none-such").startswith(f"{flag} none-such: choose one of ")
            for choice in get_args(kind):
                field = flag.strip("-").replace("-", "_")
                assert read_field(command, field, flag, choice.upper()) == choice


def read_field(command, name, *words):
    "The value of one field; checks of the whole are left out."
    config = find_config(command)
    kind = strip_none(get_type_hints(config, include_extras=True)[name])

    def read(**values):
        return values

    read.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)])
    read.__annotations__ = {name: kind}
    return parse_flags(read, list(words))[name]


LISTS = [(command, flag) for command, flag, kind in FLAGS if is_list_type(kind)]
SPELLINGS = (["dress", "shirt"], ["dress,shirt"], ["dress,", "shirt"], ["dress, shirt"], [" dress  shirt "])


def test_every_flag_that_is_a_list_takes_commas_and_blanks():
    assert {command for command, _ in LISTS} >= {
        *("cala-train", "cala-validate", "cala-combiner", "cala-cache", "cala-ablation", "cala-benchmark")
    }
    for command, flag in LISTS:
        name = flag.strip("-")
        values = [read_field(command, name, flag, *words) for words in SPELLINGS]
        assert values[0] in ("dress,shirt", ("dress", "shirt")) and values == values[:1] * 5


RELEASED = """--dataset=CIRR --num_epochs=1 --batch_size 16 --max-epoch 15 --min_lr 0 --learning_rate=5e-6
    --transform targetpad --target_ratio 1.25 --save_training --save-best --validation_frequency=1 --encoder both
    --encoder_arch blip2 --cir_frame=sum --tac_weight 0.45 --hca-weight=0.1 --embeds_dim 768 --model-name None
    --experiment_name=first"""


def test_the_flags_of_the_released_program_are_read_with_every_spelling():
    recipe = parse_flags(find_config("cala-train"), RELEASED.split())
    assert (recipe.num_epochs, recipe.cir_frame, recipe.model_name, recipe.embeds_dim) == (1, "sum", None, 768)
    words = "--submission_name=a --combining-function sum --blip2_textual_path=t --blip2-multimodal-path m"
    flags = parse_flags(find_config("cala-cirr-submission"), f"{words} --blip2_visual_path v".split())
    assert (flags.submission_name, flags.blip2_textual_path, flags.blip2_visual_path) == ("a", "t", "v")
    words = "--combining_function=combiner --combiner-path c --projection_dim 2560 --hidden-dim=5120"
    flags = parse_flags(find_config("cala-validate"), f"{words} --clip_model_name RN50x4 --clip-model-path=p".split())
    assert (flags.combiner_path, flags.projection_dim, flags.hidden_dim, flags.clip_model_path) == (
        "c",
        2560,
        5120,
        "p",
    )

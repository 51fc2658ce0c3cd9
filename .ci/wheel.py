"""Build sdist and wheel, install the wheel, and run the commands as a stranger would.

python .ci/wheel.py                 the wheel is installed anew, with the dependencies of this environment (a minute)
python .ci/wheel.py --clean         everything is installed anew from the package index (6 GB)
python .ci/wheel.py --output DIST   keep sdist and wheel there

The wheel is built from the sdist, so that a file which the sdist lacks is noticed. The commands run in a folder whose
name has a blank and letters outside ASCII, without HOME, with LC_ALL=C, and must leave the installed package as it was.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "Größe 尺寸"  # of the commands
MINUTES = 10  # that a command may take
WORLD = "demo/cirr/data"  # drawn by cala-demo
MODEL = "demo/cirr/cala/best"  # trained by cala-demo
# One run of each command, in an order in which each finds what it needs.
RUNS = {
    "cala-demo": "--size 30 --stage1-steps 2 --epochs 1 --batch-size 32",
    "cala-check": f"--environment --data-root {WORLD}",
    "cala-train": f"--data-root {WORLD} --encoder-arch tiny --backbone-weights demo/cirr/backbone.safetensors"
    " --num-epochs 1 --batch-size 32 --num-workers 1 --output run",
    "cala-validate": f"--data-root {WORLD} --checkpoint {MODEL} --output validation",
    "cala-cirr-submission": f"--data-root {WORLD} --checkpoint {MODEL} --output submission",
    "cala-combiner": f"--data-root {WORLD} --checkpoint {MODEL} --num-epochs 1 --output combiner",
    "cala-cache": f"--data-root {WORLD} --checkpoint {MODEL} --cache tokens --cache-dir tokens --verify",
    "cala-search": f"--pictures {WORLD}/cirr_dataset/dev --checkpoint {MODEL} --index index --sentence red",
}
LEFT = ["demo/cirr/report.html", "demo/cirr/table.csv", "run/best/recipe.json", "validation/result.json"]


def run(
    command: list[str | Path],
    folder: Path,  # to run in
    environment: dict[str, str] | None = None,  # None: this process's
) -> str:  # what it printed
    "Run a command; end the check with its output if it fails, or if it shows a traceback."
    shown = " ".join(Path(str(word)).name if word is command[0] else str(word) for word in command)
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=60 * MINUTES,
    )
    if done.returncode or "Traceback" in done.stdout or "\r" in done.stdout:
        sys.exit(f"{done.stdout[-4000:]}\n{shown}\nfailed with status {done.returncode}")
    print(f"ok: {shown[:110]}", flush=True)
    return done.stdout


def copy_sources(
    folder: Path,  # a new one
) -> None:
    "Copy what git knows, as it is now, and nothing else: no build outputs of this checkout."
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def build(
    folder: Path,
) -> tuple[Path, Path]:  # sdist, wheel
    "Build the sdist from a copy of the sources, and the wheel from the sdist."
    copy_sources(folder / "sources")
    run([sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "sources"], folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def check_sdist(
    sdist: Path,
    sources: Path,
) -> None:
    "The sdist holds every file of the package, its tests, notebooks and tools."
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    folders = "cala", "tests", "nbs", ".ci"
    wanted = {str(path.relative_to(sources).as_posix()) for part in folders for path in (sources / part).rglob("*")}
    missing = sorted(name for name in wanted - packed if (sources / name).is_file())
    if missing:
        sys.exit(f"the sdist lacks {len(missing)} files, such as {missing[0]}; see MANIFEST.in")
    print(f"ok: {sdist.name}, {sdist.stat().st_size / 1e6:.1f} MB, {len(packed)} entries")


def make_environment(
    folder: Path,  # a new one
    wheel: Path,
    is_clean: bool,  # install the dependencies too
) -> Path:  # its folder of commands
    "A virtual environment with the wheel."
    venv.create(folder, with_pip=True)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    python = commands / Path(sys.executable).name
    if not python.exists():
        python = commands / "python"
    run([python, "-m", "pip", "install", "--quiet", *([] if is_clean else ["--no-deps"]), wheel], folder)
    if not is_clean:  # a .pth file adds the folder and not what the .pth files in it add: no editable cala
        (packages,) = folder.rglob("site-packages")
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return commands


def list_package(
    folder: Path,  # of the installed package
) -> dict[str, int]:  # path -> time of its last change
    "All files of the installed package, without compiled Python."
    return {
        str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }


def read_commands() -> list[str]:
    "The names of all commands, from settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return [line.partition("=")[0] for line in config["DEFAULT"]["console_scripts"].split()]


def check_commands(
    commands: Path,  # folder of commands
    folder: Path,  # to work in
) -> None:
    "Run every command with --help, and those of `RUNS` with their flags."
    environment = dict(os.environ) if os.name == "nt" else {"PATH": os.defpath, "LC_ALL": "C"}
    environment |= {"OMP_NUM_THREADS": "1"}
    (package,) = commands.parent.rglob("site-packages/cala")
    before = list_package(package)
    for name in read_commands():
        run([commands / name, "--help"], folder, environment)
    for name, words in RUNS.items():
        run([commands / name, *words.split()], folder, environment)
    missing = [name for name in LEFT if not (folder / name).is_file()]
    if missing:
        sys.exit(f"the commands did not write {', '.join(missing)}")
    report = json.loads((folder / "validation/result.json").read_text(encoding="utf-8"))
    if not report:
        sys.exit("validation/result.json is empty")
    if list_package(package) != before:
        changed = {name for name, _ in set(list_package(package).items()) ^ set(before.items())}
        sys.exit(f"the commands changed the installed package: {', '.join(sorted(changed))}")
    print(f"ok: {package} is unchanged")


def main() -> None:
    "Build, install, run; status 1 at the first fault."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", help="install the dependencies too")
    parser.add_argument("--output", type=Path, help="keep sdist and wheel in this folder")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cala-wheel-"))
    try:
        sdist, wheel = build(folder)
        check_sdist(sdist, folder / "sources")
        commands = make_environment(folder / "environment", wheel, args.clean)
        (folder / FOLDER).mkdir()
        check_commands(commands, folder / FOLDER)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            for file in (sdist, wheel):
                shutil.copy2(file, args.output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{wheel.name} works alone")


if __name__ == "__main__":
    main()

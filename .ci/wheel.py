"""Build sdist and wheel, install the wheel in clean environments, and run the commands as a stranger would.

python .ci/wheel.py                       with this Python; everything is installed anew from the package index (6 GB)
python .ci/wheel.py --python 3.10 3.13    with these; each is looked for in PATH and among the Pythons of pyenv
python .ci/wheel.py --borrow              with this Python and the dependencies of this environment (two minutes)
python .ci/wheel.py --output DIST         keep sdist and wheel there

The wheel is built from the sdist, so that a file which the sdist lacks is noticed. The commands run in a folder whose
name has a blank and letters outside ASCII, without HOME and with LC_ALL=C. They may not write into the installed
package: if root starts this program, they run as the system's user without rights, and root's files are closed to it;
else they run as this user, and the package is write-protected. At the end the tests of the unpacked sdist are
collected, and those that read the project's files are run.
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
from configparser import ConfigParser
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "Größe 尺寸"  # of the commands
MINUTES = 60  # that a command may take, on a machine that others use too
WORLD = "demo/cirr/data"  # drawn by cala-demo
MODEL = "demo/cirr/cala/best"  # trained by cala-demo
DRAW_CIRCO = "from cala import draw_circo; draw_circo('circo', val=20, test=12, size=24)"
# One run of each command, in an order in which each finds what it needs.
RUNS = {
    "cala-demo": "--size 30 --stage1-steps 2 --epochs 1 --batch-size 32",
    "cala-check": f"--environment --data-root {WORLD}",
    "cala-train": f"--data-root {WORLD} --encoder-arch tiny --backbone-weights demo/cirr/backbone.safetensors"
    " --num-epochs 1 --batch-size 32 --num-workers 1 --output run",
    "cala-validate": f"--data-root {WORLD} --checkpoint {MODEL} --output validation",
    "cala-cirr-submission": f"--data-root {WORLD} --checkpoint {MODEL} --output submission",
    "cala-circo-submission": f"--data-root circo --checkpoint {MODEL} --output circo_submission",
    "cala-combiner": f"--data-root {WORLD} --checkpoint {MODEL} --num-epochs 1 --output combiner",
    "cala-cache": f"--data-root {WORLD} --checkpoint {MODEL} --cache tokens --cache-dir tokens --verify",
    "cala-search": f"--pictures {WORLD}/cirr_dataset/dev --checkpoint {MODEL} --index index --sentence red",
    "cala-ablation": None,  # its shortest run takes many minutes; tests/test_ablation.py has shorter ones
}
REPORT = "demo/cirr/report.html"
LEFT = [
    REPORT,
    "demo/cirr/table.csv",
    "run/best/recipe.json",
    "validation/result.json",
    "circo_submission/circo_submission.json",
]
# Tests of the sdist that read notebooks, tools and other files of the project.
FILE_TESTS = ["test_front_door.py", "test_imports.py", "test_site.py", "test_style_tools.py"]


class Row(NamedTuple):
    "A line of the table of results."

    python: str  # version
    environment: str  # how it was made
    user: str  # who ran the command
    typed: str  # the command
    seconds: float
    result: str  # ok, or what went wrong


class Account(NamedTuple):
    "The user that runs the commands."

    name: str
    options: dict  # of `subprocess.run`


THIS_USER = Account("this user", {})


class Fault(Exception):
    "A check failed, and what follows needs it."


def choose_account(
    is_borrowed: bool,  # the dependencies may lie where only this user reads them
) -> Account:
    "The user without rights where this user may act as others, else this user."
    if os.name == "nt" or os.geteuid() != 0 or is_borrowed:
        return THIS_USER
    import pwd

    name = "nobody"  # of the user without rights, on every Unix
    user = pwd.getpwnam(name)
    return Account(name, dict(user=user.pw_uid, group=user.pw_gid, extra_groups=[]))


class Checks:
    "Runs commands in one environment and keeps what they gave."

    def __init__(
        self,
        python: str,  # version
        environment: str,  # how it is made
    ):
        self.python = python
        self.environment = environment
        self.rows: list[Row] = []

    def add(
        self,
        typed: str,  # the command, or what was checked
        start: float,  # of `perf_counter`
        result: str = "ok",
        user: str = THIS_USER.name,
    ):
        "Add a row and print it."
        row = Row(self.python, self.environment, user, typed, perf_counter() - start, result)
        self.rows.append(row)
        print(f"Python {row.python}, {row.user}, {row.seconds:.1f} s, {row.result}: {typed}", flush=True)

    def run(
        self,
        command: list,  # words and paths
        folder: Path,  # to run in
        environment: dict[str, str] | None = None,  # None: this process's
        account: Account = THIS_USER,  # who runs it
        shown: str | None = None,  # for the table; None: the words
        is_needed: bool = False,  # by what follows: raise a `Fault` if it fails
    ) -> str:  # what it printed
        "Run a command, which may not fail, nor show a traceback or a carriage return."
        words = [str(word) for word in command]
        start = perf_counter()
        try:
            done = subprocess.run(
                words,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                timeout=60 * MINUTES,
                **account.options,
            )
            output, result = done.stdout, "ok" if done.returncode == 0 else f"status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            output, result = str(error.output or ""), f"not done after {MINUTES} minutes"
        if "Traceback" in output:
            result = "a traceback"
        if "\r" in output:
            result = "a carriage return in its output"
        if result != "ok":
            print(output[-6000:], flush=True)
        self.add(shown or " ".join([Path(words[0]).name, *words[1:]]), start, result, account.name)
        if is_needed and result != "ok":
            raise Fault(result)
        return output


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
    checks: Checks,
    folder: Path,
) -> tuple[Path, Path]:  # sdist, wheel
    "Build the sdist from a copy of the sources, and the wheel from the sdist."
    copy_sources(folder / "sources")
    command = [sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "sources"]
    checks.run(command, folder, shown="python -m build", is_needed=True)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def check_sdist(
    checks: Checks,
    sdist: Path,
    sources: Path,
) -> None:
    "The sdist holds every file of the package, its tests, notebooks and tools."
    start = perf_counter()
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    folders = "cala", "tests", "nbs", ".ci"
    wanted = {str(path.relative_to(sources).as_posix()) for part in folders for path in (sources / part).rglob("*")}
    missing = sorted(name for name in wanted - packed if (sources / name).is_file())
    result = f"it lacks {len(missing)} files, such as {missing[0]}; see MANIFEST.in" if missing else "ok"
    checks.add(f"{sdist.name}, {sdist.stat().st_size / 1e6:.1f} MB, {len(packed)} entries", start, result)


def find_python(
    version: str,  # such as 3.13
) -> Path | None:
    "A Python of that version in PATH or among those of pyenv; None if there is none."
    name = f"python{version}"
    candidates = [shutil.which(name), *Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}")]
    for candidate in filter(None, candidates):
        code = "import sys; print(*sys.version_info[:2], sep='.')"
        done = subprocess.run([candidate, "-c", code], capture_output=True, encoding="utf-8")
        if done.stdout.strip() == version:  # a stub of pyenv stands for a Python that is not chosen
            return Path(candidate)
    return None


def make_readable(
    python: Path,
    account: Account,  # who shall run it
    folder: Path,  # of a copy
) -> Path:  # the same Python, or a copy
    "A Python that the account can run: one that lies in the home folder of root is copied."
    try:
        subprocess.run([python, "-c", ""], check=True, **account.options)
        return python
    except PermissionError:
        pass
    prefix = subprocess.run(
        [python, "-c", "import sys; print(sys.base_prefix)"], check=True, stdout=subprocess.PIPE, encoding="utf-8"
    ).stdout.strip()
    shutil.copytree(prefix, folder, symlinks=True)
    return folder / "bin" / python.name


def make_environment(
    checks: Checks,
    python: Path,
    folder: Path,  # a new one
    wheel: Path,
    is_borrowed: bool,  # take the dependencies of this process's environment
) -> Path:  # its folder of commands
    "A virtual environment with the wheel."
    command = [python, "-m", "venv", folder]
    checks.run(command, folder.parent, shown=f"{python.name} -m venv ENVIRONMENT", is_needed=True)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    install = [commands / "python", "-m", "pip", "install", "--quiet", *(["--no-deps"] if is_borrowed else []), wheel]
    checks.run(install, folder.parent, shown=f"pip install {wheel.name}", is_needed=True)
    if is_borrowed:  # a .pth file adds the folder and not what the .pth files in it add: no editable cala
        (packages,) = folder.rglob("site-packages")
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return commands


def find_libraries(
    commands: Path,  # folder of commands
) -> str | None:
    "The folder of a shared library of Python that was copied, or moved as GitHub's are; None if the system finds it."
    library = commands.parent.parent / "python/lib"
    return str(library) if library.is_dir() else os.environ.get("LD_LIBRARY_PATH")


def list_package(
    folder: Path,  # of the installed package
) -> dict[str, int]:  # path -> time of its last change
    "All files of the installed package, without compiled Python."
    return {
        str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }


def protect(
    folder: Path,
) -> None:
    "Take from everybody but root the right to write in a folder."
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)


def read_commands() -> list[str]:
    "The names of all commands, from settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return [line.partition("=")[0] for line in config["DEFAULT"]["console_scripts"].split()]


def check_commands(
    checks: Checks,
    commands: Path,  # folder of commands
    folder: Path,  # to work in, a new one
    account: Account,
) -> None:
    "Run every command with --help, and then with the flags of `RUNS`."
    environment = dict(os.environ) if os.name == "nt" else {"PATH": os.defpath, "LC_ALL": "C"}
    environment |= {"OMP_NUM_THREADS": "1"}
    libraries = find_libraries(commands)
    if libraries:
        environment["LD_LIBRARY_PATH"] = libraries
    if checks.environment.startswith("borrowed"):
        environment["JUPYTER_PATH"] = str(Path(sys.prefix, "share/jupyter"))  # templates of the report
    folder.mkdir()
    if account.options:
        os.chown(folder, account.options["user"], account.options["group"])
    (package,) = commands.parent.rglob("site-packages/cala")
    protect(package)
    before = list_package(package)
    absent = sorted(set(read_commands()) - set(RUNS))
    if absent:
        raise Fault(f"RUNS of .ci/wheel.py has no flags for {', '.join(absent)}")
    for name in read_commands():
        checks.run([commands / name, "--help"], folder, environment, account)
    checks.run([commands / "python", "-c", DRAW_CIRCO], folder, environment, account, f'python -c "{DRAW_CIRCO}"')
    for name, words in RUNS.items():
        if words:
            checks.run([commands / name, *words.split()], folder, environment, account)
    start = perf_counter()
    missing = [name for name in LEFT if not (folder / name).is_file()]
    checks.add(f"written: {', '.join(LEFT)}", start, f"missing: {', '.join(missing)}" if missing else "ok")
    if not missing:
        has_result = bool(json.loads((folder / "validation/result.json").read_text(encoding="utf-8")))
        has_figures = "data:image/png" in (folder / REPORT).read_text(encoding="utf-8")
        result = "ok" if has_result and has_figures else "one of them does not"
        checks.add("the report holds figures, result.json holds results", start, result)
    changed = {Path(name).name for name, _ in set(list_package(package).items()) ^ set(before.items())}
    checks.add("the installed package is as before", start, f"changed: {', '.join(changed)}" if changed else "ok")


def check_tests(
    checks: Checks,
    commands: Path,  # folder of commands
    sdist: Path,
    wheel: Path,
    folder: Path,  # for the sdist
    is_borrowed: bool,  # the tools for tests are there already
) -> None:
    "The tests of the sdist find what they import and read."
    if not is_borrowed:
        install = [commands / "python", "-m", "pip", "install", "--quiet", f"{wheel}[dev]"]
        checks.run(install, folder.parent, shown=f"pip install {wheel.name}[dev]")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    (sources,) = folder.iterdir()
    checks.run([commands / "python", "-m", "pytest", "-q", "--collect-only"], sources, shown="pytest --collect-only")
    tests = [f"tests/{name}" for name in FILE_TESTS]
    checks.run([commands / "python", "-m", "pytest", "-q", *tests], sources, shown=f"pytest {' '.join(FILE_TESTS)}")


def check_python(
    checks: Checks,
    python: Path,
    distributions: tuple[Path, Path],  # sdist, wheel
    folder: Path,  # a new one
    is_borrowed: bool,
) -> None:
    "All checks in one environment; the first fault ends them."
    sdist, wheel = distributions
    folder.mkdir()
    account = choose_account(is_borrowed)
    try:
        python = make_readable(python, account, folder / "python")
        commands = make_environment(checks, python, folder / "environment", wheel, is_borrowed)
        code = "import importlib.util as u; print('with' if u.find_spec('lavis') else 'without', 'LAVIS')"
        checks.environment += ", " + checks.run([commands / "python", "-c", code], folder, shown=code).strip()
        check_commands(checks, commands, folder / FOLDER, account)
        check_tests(checks, commands, sdist, wheel, folder / "sdist", is_borrowed)
    except Fault as fault:
        print(f"Python {checks.python}: {fault}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # 6 GB


def write_table(
    rows: list[Row],
) -> str:
    "The rows as a table of Markdown."
    lines = ["| Python | environment | user | typed | seconds | result |", "|---|---|---|---|---|---|"]
    for row in rows:
        typed = row.typed.replace("|", r"\|")
        lines.append(
            f"| {row.python} | {row.environment} | {row.user} | `{typed}` | {row.seconds:.1f} | {row.result} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    "Build, install, run, and print the table; status 1 after a fault."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", nargs="+", default=[own], metavar="VERSION", help="versions, such as 3.10 3.13")
    parser.add_argument("--borrow", action="store_true", help="use the dependencies of this environment")
    parser.add_argument("--output", type=Path, help="keep sdist and wheel in this folder")
    args = parser.parse_args()
    if args.borrow and args.python != [own]:
        parser.error("--borrow takes what is installed for this Python; leave out --python")
    folder = Path(tempfile.mkdtemp(prefix="cala-wheel-"))
    folder.chmod(0o755)  # another user passes through
    building = Checks(own, "this environment")
    rows = building.rows
    try:
        distributions = build(building, folder)
        check_sdist(building, distributions[0], folder / "sources")
        for version in args.python:
            python = Path(sys.executable) if version == own else find_python(version)
            if python is None:
                print(f"Python {version} is not on this machine: NOT TESTED", flush=True)
                rows.append(Row(version, "none", "-", "-", 0.0, "not tested: no such Python on this machine"))
                continue
            checks = Checks(version, "borrowed" if args.borrow else "clean")
            check_python(checks, python, distributions, folder / version, args.borrow)
            rows += [row._replace(environment=checks.environment) for row in checks.rows]
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            for file in distributions:
                shutil.copy2(file, args.output)
    except Fault as fault:
        print(f"the build failed: {fault}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = write_table(rows)
    print(f"\n{table}")
    if "GITHUB_STEP_SUMMARY" in os.environ:  # the page of the job
        with open(os.environ["GITHUB_STEP_SUMMARY"], "a", encoding="utf-8") as summary:
            summary.write(table)
    faults = [row for row in rows if not row.result.startswith(("ok", "not tested"))]
    if faults:
        raise SystemExit(f"FAILED: Python {faults[0].python}, {faults[0].typed}: {faults[0].result}")
    if not any(row.environment.startswith(("clean", "borrowed")) for row in rows):
        raise SystemExit("FAILED: no Python was tested")
    print(f"{distributions[1].name} works alone")


if __name__ == "__main__":
    main()

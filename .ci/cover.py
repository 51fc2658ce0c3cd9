"""Which lines of the package do notebooks and tests run?

python .ci/cover.py notebooks [PATH]   run nbdev_test and measure it; the result goes into .coverage
pytest -p cover                        (with .ci on PYTHONPATH) print what notebooks and tests together did not run
python .ci/cover.py report             print that again

nbdev_test runs the cells of a notebook, not the module that is exported from them. So an exported cell is compiled
here under the file name and the line numbers of its module, and coverage counts the cell as lines of the module.
"""

import ast
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import coverage
import nbdev.test

ROOT = Path(__file__).resolve().parent.parent
LEAST = 80  # percent; a file below it is named in the report
CELL_MARK = re.compile(r"# %% (\S+\.ipynb) #(\S+)")  # nbdev writes one above every cell that it exports

if sys.version_info >= (3, 12):
    os.environ.setdefault("COVERAGE_CORE", "sysmon")  # slows the notebooks down far less than tracing

RUNNING: list[Path] = []  # the notebooks that this process has begun; the last one runs
run_plain_notebook = nbdev.test.test_nb


@cache
def notebook_sources(
    notebook: Path,
) -> dict[str, str]:
    "The source of every cell by its id. Read as plain JSON, because nbformat checks each notebook, which is slow."
    return {cell["id"]: "".join(cell["source"]) for cell in json.loads(notebook.read_bytes())["cells"]}


def drop_directives(
    source: str,  # of a cell
) -> str:
    "A cell as nbdev_test runs it: without the directives on its first lines."
    return re.sub(r"\A(#\|.*\n)*", "", source).rstrip("\n")


@cache  # filled once, before the processes fork
def exported_lines() -> dict[tuple[Path, str], tuple[str, int]]:
    "For every notebook and source of an exported cell: the module's file, and the line of the module before the cell."
    places = {}
    for module in sorted((ROOT / "cala").rglob("*.py")):
        for number, line in enumerate(module.read_text(encoding="utf-8").splitlines(), 1):
            mark = CELL_MARK.fullmatch(line)
            if not mark:
                continue
            notebook = (module.parent / mark[1]).resolve()
            source = notebook_sources(notebook).get(mark[2]) if notebook.exists() else None
            if source:
                places[notebook, drop_directives(source)] = str(module), number
    return places


@cache  # once a process, which runs several notebooks
def compile_cells_as_modules() -> None:
    "Change IPython's compiler: it gives an exported cell of the running notebook the file and the lines of its module."
    from IPython.core.compilerop import CachingCompiler

    plain_call = CachingCompiler.__call__
    plain_cache = CachingCompiler.cache
    places: dict[str, tuple[str, int]] = {}  # module and line, by the file name that IPython gives a cell

    def name_cell(compiler, transformed_code, number=0, raw_code=None):
        "IPython's name of a cell; which lines of a module the cell is goes into `places`."
        name = plain_cache(compiler, transformed_code, number, raw_code)
        places.pop(name, None)
        place = exported_lines().get((RUNNING[-1], (raw_code or "").rstrip("\n")))
        if place:
            places[name] = place
        return name

    def compile_cell(compiler, source, filename, symbol):
        "Code of a cell, or of a statement of it."
        if filename in places and isinstance(source, ast.AST):
            module, line = places[filename]
            return plain_call(compiler, ast.increment_lineno(source, line), module, symbol)
        return plain_call(compiler, source, filename, symbol)

    CachingCompiler.cache = name_cell
    CachingCompiler.__call__ = compile_cell


def new_measurement(**options) -> coverage.Coverage:
    "A measurement of the package, configured by pyproject.toml."
    config, data = str(ROOT / "pyproject.toml"), str(ROOT / ".coverage")
    return coverage.Coverage(config_file=config, data_file=data, source=[str(ROOT / "cala")], **options)


def measure_notebook(path, *args, **options) -> tuple[bool, float]:
    "nbdev's test_nb, measured."
    RUNNING.append(Path(path).resolve())
    compile_cells_as_modules()
    measurement = new_measurement(data_suffix=True)
    measurement.start()
    try:
        return run_plain_notebook(path, *args, **options)
    finally:
        measurement.stop()
        measurement.save()


def measure_notebooks(
    path: str | None = None,  # a notebook or a folder; all notebooks if not given
) -> None:
    "Run nbdev_test, JOBS notebooks side by side, and write a new .coverage."
    new_measurement().erase()
    exported_lines()
    nbdev.test.test_nb = measure_notebook
    try:
        nbdev.test.nbdev_test(path=path, n_workers=int(os.environ.get("JOBS", "2")), timing=True)
    finally:
        new_measurement().combine()


def report() -> Iterator[str]:
    "Lines to print: each file of which little was run, and the total."
    measurement = new_measurement()
    measurement.load()
    all_run = 0
    all_statements = 0
    for path in sorted((ROOT / "cala").rglob("*.py")):
        if path.name == "_modidx.py":
            continue
        _, statements, _, missing, _ = measurement.analysis2(str(path))
        run = len(statements) - len(missing)
        all_run += run
        all_statements += len(statements)
        share = run / max(1, len(statements))
        if statements and share < LEAST / 100:
            lines = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            yield f"{path.relative_to(ROOT)}: {share:.0%} run; not run are lines {lines}"
    yield f"notebooks and tests run {all_run / all_statements:.1%} of {all_statements:,} statements of cala"


def pytest_terminal_summary(terminalreporter) -> None:
    "A hook of pytest: print the report above its closing line."
    if (ROOT / ".coverage").exists():
        for line in report():
            terminalreporter.write_line(line)


if __name__ == "__main__":
    # A notebook replaces __main__ in its process. A function that is sent there must be found under another name.
    import cover

    if sys.argv[1] == "notebooks":
        cover.measure_notebooks(*sys.argv[2:3])
    else:
        print(*report(), sep="\n")

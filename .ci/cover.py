"""Which lines of cala do notebooks and tests run?

python .ci/cover.py notebooks [PATH]   nbdev_test, measured; into .coverage
pytest -p cover (with .ci on PYTHONPATH)   prints, above pytest's closing line, what notebooks and tests together leave out

nbdev_test runs a notebook's cells, not the module that is exported from them. So here an exported cell is compiled under the name and line numbers of its module, and coverage
counts it there."""
import ast
import json
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

import coverage
import nbdev.test

ROOT = Path(__file__).resolve().parent.parent
if sys.version_info >= (3, 12): os.environ.setdefault("COVERAGE_CORE", "sysmon")  # costs far less than tracing
plain_test_nb = nbdev.test.test_nb
LEAST = 80  # percent; files below are named


@lru_cache(maxsize=None)  # once, before the processes fork
def exported_lines():
    "{exported cell, less its directives: (module's file, how far its lines are from those of the cell)}, for every notebook."
    found, cells = {}, {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):  # as plain JSON: nbformat, which checks as it reads, takes longer than many a notebook runs
        for cell in json.loads(path.read_bytes())["cells"]: cells[path.name, cell["id"]] = "".join(cell["source"])
    for module in sorted((ROOT / "cala").rglob("*.py")):
        for number, line in enumerate(module.read_text(encoding="utf-8").splitlines(), 1):
            mark = re.fullmatch(r"# %% \S*?([^/\s]+\.ipynb) #(\S+)", line)
            source = mark and cells.get(mark.groups())
            if source: found[re.sub(r"\A(#\|.*\n)*", "", source).rstrip("\n")] = str(module), number  # nbdev_test takes the directives off before it runs a cell
    return found


@lru_cache(maxsize=None)  # once a process, which runs several notebooks
def compile_as_modules():
    "From now on a notebook's exported cells carry the names and lines of their modules."
    from IPython.core.compilerop import CachingCompiler
    lines, plain, keep = exported_lines(), CachingCompiler.__call__, CachingCompiler.cache
    def cache(self, transformed_code, number=0, raw_code=None):
        name = keep(self, transformed_code, number, raw_code)
        self.modules = getattr(self, "modules", {}) | {name: lines.get((raw_code or "").rstrip("\n"))}
        return name
    def call(self, source, filename, symbol):
        module = getattr(self, "modules", {}).get(filename)
        if module and isinstance(source, ast.AST): return plain(self, ast.increment_lineno(source, module[1]), module[0], symbol)
        return plain(self, source, filename, symbol)
    CachingCompiler.cache, CachingCompiler.__call__ = cache, call


def measure(**options):
    return coverage.Coverage(config_file=str(ROOT / "pyproject.toml"), data_file=str(ROOT / ".coverage"), source=[str(ROOT / "cala")], **options)


def measured_notebook(*args, **options):
    "nbdev's test_nb in its process, measured."
    compile_as_modules()
    measured = measure(data_suffix=True)
    measured.start()
    try: return plain_test_nb(*args, **options)
    finally: measured.stop(); measured.save()


def notebooks(path=None):
    "nbdev_test, measured, into a new .coverage."
    measure().erase()
    exported_lines()
    nbdev.test.test_nb = measured_notebook
    try: nbdev.test.nbdev_test(path=path, n_workers=int(os.environ.get("JOBS", 2)), timing=True)
    finally: measure().combine()


def report():
    "Lines to print: the files of which little was run, and the total."
    measured, run, all_of = measure(), 0, 0
    measured.load()
    for path in sorted(path for path in (ROOT / "cala").rglob("*.py") if path.name != "_modidx.py"):
        _, statements, _, lost, _ = measured.analysis2(str(path))
        run, all_of, share = run + len(statements) - len(lost), all_of + len(statements), 1 - len(lost) / max(1, len(statements))
        if share < LEAST / 100: yield f"{path.relative_to(ROOT)}: {share:.0%} run, not run are lines {', '.join(map(str, lost[:8]))}{' ...' * (len(lost) > 8)}"
    yield f"notebooks and tests run {run / all_of:.1%} of {all_of:,} statements of cala"


def pytest_terminal_summary(terminalreporter):
    if (ROOT / ".coverage").exists():
        for line in report(): terminalreporter.write_line(line)


if __name__ == "__main__":
    import cover  # by name: a notebook takes the place of __main__ in its process, and what is sent there is looked up by name
    if sys.argv[1] == "notebooks": cover.notebooks(*sys.argv[2:3])
    else: print(*report(), sep="\n")

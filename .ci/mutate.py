"""Do the tests notice? Ten lines that decide what is learned and what is reported, each made wrong in a copy of the project.

python .ci/mutate.py         the table; status 1 if a mutant lives, or if a line is no longer there

A mutant is first given to the tests named beside it; one that they let live, to the notebook that the line comes from, up to the examples under it."""
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    what: str      # what goes wrong
    notebook: str  # the room, without .ipynb
    module: str    # exported from it
    right: str     # as it is in a line, once in the module
    wrong: str     # as it will be
    tests: str     # pytest's words, "" if the notebook alone watches over it


MUTANTS = [
    Mutant("loss: targets of the batch shifted by one", "09_objectives", "objectives", "torch.arange(len(logits), device=logits.device)",
           "torch.arange(len(logits), device=logits.device).roll(1)", "tests/test_method.py -k objective"),
    Mutant("loss: CTR and QTM change places in the mixture", "09_objectives", "objectives", "tac * z_ctr + (1 - tac) * z_qtm", "(1 - tac) * z_ctr + tac * z_qtm",
           "tests/test_method.py -k released_objective"),
    Mutant("loss: TBIA added, not mixed", "09_objectives", "objectives", "hca * contrast(z_tbia) + (1 - hca) * contrast(z)", "hca * contrast(z_tbia) + contrast(z)",
           "tests/test_method.py -k released_objective"),
    Mutant("loss: alpha weighs CTR", "09_objectives", "objectives", '_between("beta", beta, 0, float("inf")) * contrast(z_ctr)', '_between("beta", alpha, 0, float("inf")) * contrast(z_ctr)',
           "tests/test_method.py -k paper_objective"),
    Mutant("ranking: a tie counts against the target", "11_retrieval", "retrieval", "above, _ = _tally(scores, bar)", "above = sum(_tally(scores, bar)) - 1",
           "tests/test_retrieval.py -k plain_python"),
    Mutant("ranking: the reference is left in", "11_retrieval", "retrieval", "if exclude is not None: above -= (", "if exclude is not None: above -= 0 * (", "tests/test_retrieval.py -k plain_python"),
    Mutant("ranking: the reference is among its group's candidates", "11_retrieval", "retrieval", "((members > bar) & (groups != references[:, None])).sum(1)", "(members > bar).sum(1)",
           "tests/test_retrieval.py -k sorting_names"),
    Mutant("ranking: R@k is R@(k-1)", "11_retrieval", "retrieval", "(ranks <= k).double().mean()", "(ranks < k).double().mean()", "tests/test_retrieval.py -k sorting_names"),
    Mutant("schedule: the cosine climbs back after its end", "13_training", "training", "share = min(1., (epochs - recipe.warmup)", "share = max(0., (epochs - recipe.warmup)",
           "tests/test_quirks.py -k schedule_released"),
    Mutant("schedule: warm-up starts at the full rate", "13_training", "training", "if epochs < recipe.warmup: return epochs / recipe.warmup", "if epochs < recipe.warmup: return 1.", ""),
]


def edited(folder, mutant):
    "Make the line wrong in the module and in its notebook; both must have it, the module once."
    module, notebook = folder / f"cala/{mutant.module}.py", folder / f"nbs/{mutant.notebook}.ipynb"
    as_json = lambda text: text.replace("\\", "\\\\").replace('"', '\\"')
    for path, right, wrong in ((module, mutant.right, mutant.wrong), (notebook, as_json(mutant.right), as_json(mutant.wrong))):
        text = path.read_text(encoding="utf-8")
        if right not in text or path is module and text.count(right) != 1:
            raise SystemExit(f"{path.relative_to(folder)} no longer has, once, the line\n  {mutant.right}\nname another in .ci/mutate.py")
        path.write_text(text.replace(right, wrong), encoding="utf-8")


def in_child(work):
    "What `work` returns, a short string, from a forked process that says nothing."
    read, write = os.pipe()
    child = os.fork()
    if child: os.close(write); os.waitpid(child, 0); return os.fdopen(read).read()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1); os.dup2(quiet, 2)
    try: os.write(write, work().encode())
    finally: os._exit(0)


def asked_of_tests(folder, mutant):
    "Which of the tests failed; \"\" if none did."
    import pytest
    failed = []
    class Listen:
        def pytest_runtest_logreport(self, report):
            if report.failed: failed.append(report.nodeid.split("::")[-1].partition("[")[0])
    os.chdir(folder); sys.path.insert(0, str(folder))
    words = mutant.tests.split(" -k ")
    status = pytest.main(["-x", "-p", "no:cacheprovider", words[0], *(["-k", words[1]] if words[1:] else [])], plugins=[Listen()])
    if status not in (0, 1): return f"pytest ended with status {int(status)}"
    return failed[0] if failed else ""


def asked_of_notebook(folder, mutant):
    "\"its example\" if a cell of the notebook fails, no further down than six cells under the line; \"\" if none does."
    import nbformat
    from nbdev.test import test_nb
    path = folder / f"nbs/{mutant.notebook}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    last = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and mutant.wrong in cell.source)
    notebook.cells = notebook.cells[:last + 6]
    nbformat.write(notebook, path)
    os.chdir(folder); sys.path.insert(0, str(folder))
    return "" if test_nb(path, skip_flags=["notest", "slow", "cuda"])[0] else f"an example in {mutant.notebook}"


def noticed(folder, mutant):
    "Who notices, and \"\" if nobody does."
    return (mutant.tests and in_child(lambda: asked_of_tests(folder, mutant))) or in_child(lambda: asked_of_notebook(folder, mutant))


def copied(folder):
    for name in ("cala", "nbs", "tests", "settings.ini", "pyproject.toml"):
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else: shutil.copy(ROOT / name, folder)


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # of a library about another
    import accelerate, matplotlib.pyplot, nbdev.test, open_clip, pandas, torch, torchvision  # noqa: once, for all children; cala is imported by each
    sys.path = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / ".ci")]
    lived, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"; whole.mkdir(); copied(whole)
        for words in sorted({mutant.tests for mutant in MUTANTS if mutant.tests}):  # else a test that fails anyway would pass for an attentive one
            failed = in_child(lambda: asked_of_tests(whole, MUTANTS[0]._replace(tests=words)))
            if failed: raise SystemExit(f"pytest {words}: {failed} fails without any mutant; mend that first")
        for number, mutant in enumerate(MUTANTS):
            shutil.copytree(whole, copy := Path(folder) / str(number))
            edited(copy, mutant)
            by = noticed(copy, mutant)
            print(f"{mutant.what:55} {'noticed by ' + by if by else 'LIVES'}", flush=True)
            if not by: lived.append(mutant.what)
    print(f"{len(MUTANTS) - len(lived)} of {len(MUTANTS)} mutants noticed, {time.perf_counter() - start:.0f} s")
    raise SystemExit(bool(lived))

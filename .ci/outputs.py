"""Outputs are part of the source. The outputs of a notebook must come from one run of the whole notebook.

python .ci/outputs.py                        check all notebooks of nbs
python .ci/outputs.py NOTEBOOK ...           check some
python .ci/outputs.py --run                  run every notebook that the check refuses, and keep the outputs
python .ci/outputs.py --run NOTEBOOK ...     run these notebooks
python .ci/outputs.py --run --all            run all notebooks
  --also slow cuda                           execute cells of these directives too

A run executes a notebook from its first to its last cell in a new kernel and in the notebook's folder. Then it writes
two fingerprints to the notebook's metadata: one of all code cells, one of all outputs. The check computes both again.
So it finds a code cell that was edited afterwards, and an output that another run replaced. Comments, layout and
markdown cells do not count. Cells with `#| cuda`, `#| slow`, `#| notest` or `#| eval: false` are not executed; their
outputs are kept only if no code cell has changed since the last run.
"""

import argparse
import ast
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from notebooks import (
    PROGRESS,
    ROOT,
    WIDGET,
    clean_outputs,
    directives,
    hash_outputs,
    hash_sources,
    notebook_paths,
    parse_cell,
    read_notebook,
    relative,
)

NOT_RUN = {"cuda", "slow", "notest", "eval: false"}
LARGEST = 300  # KB a notebook
SECONDS = 900  # a cell may take
MACHINE = [f"{ROOT}/", f"{Path.home()}/", "/site-packages/"]  # folders that an output must not name
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
# Calls that return None, by the last part of their name: a cell may end in one and show nothing.
QUIET = set(
    """
    add append assert_allclose assert_close backward cleanup clear close close_all copy copyfile discard extend fill
    filterwarnings insert load_state_dict makedirs manual_seed mkdir nbdev_export remove rmdir rmtree save savefig
    seed set_grad_enabled set_num_threads setattr shuffle simplefilter sort step symlink_to update write zero_grad
    """.split()
)
# Expressions whose value is shown. A call may return None, so it is judged by its name or by the run.
VALUES = (
    ast.Attribute,
    ast.BinOp,
    ast.BoolOp,
    ast.Compare,
    ast.Constant,
    ast.Dict,
    ast.DictComp,
    ast.JoinedStr,
    ast.List,
    ast.ListComp,
    ast.Name,
    ast.Set,
    ast.SetComp,
    ast.Subscript,
    ast.Tuple,
    ast.UnaryOp,
)


def call_name(
    node: ast.AST,
) -> str:
    "The last part of the name that a call has, such as `plot` for `axes[0].plot(x)`; empty if it is no call by name."
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def prints(
    call: ast.expr,  # a statement of its own
) -> bool:
    "True for a call that surely prints or draws."
    name = call_name(call)
    if name == "print":
        return not any(keyword.arg == "file" for keyword in call.keywords)
    return name == "display" or (name == "show" and ast.unparse(call.func) in ("plt.show", "pyplot.show"))


def hides_output(
    statement: ast.With,
) -> bool:
    "True for a `with` block that catches what is printed inside it, or that expects an error there."
    names = {call_name(item.context_expr) for item in statement.items}
    return any(re.search("redirect|capture|expect|raises|suppress|quiet", name) for name in names)


def certain_statements(
    body: list[ast.stmt],  # of a cell, or of a block that always runs
) -> Iterator[ast.stmt]:
    "The statements that run whenever the cell runs: also those in `for`, `with` and `try`, not in `if` and functions."
    for statement in body:
        yield statement
        if isinstance(statement, ast.With) and hides_output(statement):
            continue
        if isinstance(statement, (ast.For, ast.With, ast.Try)):
            yield from certain_statements(statement.body)


def shows(
    source: str,  # of a code cell
) -> str:
    '"surely" if a run of the cell shows something, "perhaps" if it ends in a call that may return None, else "".'
    names = directives(source)
    if names & (NOT_RUN | {"hide", "export", "exporti", "default_exp"}) or source.rstrip().endswith(";"):
        return ""
    try:
        body = parse_cell(source).body
    except SyntaxError:
        return ""
    if any(isinstance(statement, ast.Expr) and prints(statement.value) for statement in certain_statements(body)):
        return "surely"
    if not body or not isinstance(body[-1], ast.Expr):
        return ""
    value = body[-1].value
    if isinstance(value, VALUES):
        return "" if isinstance(value, ast.Constant) and value.value is None else "surely"
    name = call_name(value)
    if name == "print" or name in QUIET or name.startswith("test") or "nbdev_export" in source:
        return ""
    return "perhaps"


def output_text(
    output: NotebookNode,
) -> str:
    "The plain text of an output."
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def output_faults(
    cell: NotebookNode,  # a code cell
) -> Iterator[str]:
    "What should not be among the outputs of a cell."
    for output in cell.outputs:
        if any(folder in output_text(output) for folder in MACHINE):
            yield "names a folder of the machine it ran on"
        if output.output_type == "error":
            yield f"has an error as its output: {output.ename}"
        if output.output_type == "stream" and PROGRESS.search(output.text):
            yield "shows a progress bar"
        if WIDGET in output.get("data", {}):
            yield "keeps a live widget"


def faults(
    path: Path,  # of a notebook
) -> Iterator[str]:
    "Why the outputs of a notebook cannot be committed: one line a fault."
    notebook = read_notebook(path)
    mark = notebook.metadata.get("cala", {})
    sources_match = mark.get("sources") == hash_sources(notebook)
    outputs_match = mark.get("outputs") == hash_outputs(notebook)
    place = relative(path)
    if not mark:
        yield f"{place}: no run of the whole notebook is recorded"
    elif not sources_match:
        yield f"{place}: a code cell was changed after the run of the whole notebook"
    elif not outputs_match:
        yield f"{place}: an output was changed after the run of the whole notebook"
    size = path.stat().st_size // 1024
    if size > LARGEST:
        yield f"{place}: {size} KB, the limit is {LARGEST} KB"
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        certainty = shows(cell.source)
        # After a whole run the absence of an output tells that a call returned None.
        missing = certainty == "surely" or (certainty == "perhaps" and not (sources_match and outputs_match))
        if missing and not cell.outputs:
            last = cell.source.strip().splitlines()[-1]
            yield f"{place} cell {number}: shows something and has no output: {last[:70]}"
        for fault in output_faults(cell):
            yield f"{place} cell {number}: {fault}"


def is_skipped(
    cell: NotebookNode,
    also: set[str],  # directives whose cells are executed too
) -> bool:
    "True for a code cell that a run does not execute."
    return bool(directives(cell.source) & (NOT_RUN - also)) or "nbdev_export()" in cell.source


def run_notebook(
    path: Path,
    also: set[str],  # directives whose cells are executed too
) -> str:
    "Execute a notebook, and write it with outputs and fingerprints. Returns a line to print; raises if a cell fails."
    from nbclient import NotebookClient
    from nbdev.clean import clean_nb

    notebook = read_notebook(path)
    unchanged = notebook.metadata.get("cala", {}).get("sources") == hash_sources(notebook)
    skipped = {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        if is_skipped(cell, also):
            skipped[number] = (cell.source, cell.outputs if unchanged else [])
            cell.source = ""
        cell.outputs = []
        cell.execution_count = None
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    client.execute()
    for number, (source, outputs) in skipped.items():
        notebook.cells[number].source = source
        notebook.cells[number].outputs = outputs
    for cell in notebook.cells:
        if cell.cell_type == "code":
            clean_outputs(cell)
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(KERNEL))
    clean_nb(notebook)  # object addresses, execution counts, metadata of cells: as nbdev_clean will want it
    notebook.metadata["cala"] = NotebookNode(sources=hash_sources(notebook), outputs=hash_outputs(notebook))
    nbformat.write(notebook, path)
    return f"ran {relative(path)}: {len(notebook.cells)} cells, {path.stat().st_size // 1024} KB"


def try_notebook(
    path: Path,
    also: set[str],  # directives whose cells are executed too
) -> tuple[bool, str]:
    "Whether a notebook ran, and what to print about it."
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    try:
        return True, run_notebook(path, also)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        message = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # without the colours of a terminal
        return False, f"{relative(path)} is unchanged, because it did not run to its end:\n{message}"


def run_notebooks(
    paths: list[Path],
    also: set[str],  # directives whose cells are executed too
) -> bool:
    "Run notebooks, JOBS of them side by side. Returns whether all ran to their end."
    os.environ["IN_TEST"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")  # of libraries
    jobs = min(int(os.environ.get("JOBS", "1")), max(1, len(paths)))
    all_ran = True
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for ran, message in pool.map(try_notebook, paths, [also] * len(paths)):
            print(message, flush=True)
            all_ran = all_ran and ran
    return all_ran


def main() -> None:
    "Check or run notebooks; status 1 if a check or a run fails."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--run", action="store_true", help="run notebooks and keep their outputs")
    parser.add_argument(
        "--all", action="store_true", help="with --run: all notebooks, also those that the check accepts"
    )
    parser.add_argument(
        "--also", nargs="+", default=[], choices=["slow", "cuda", "notest"], help="execute these cells too"
    )
    args = parser.parse_args()
    paths = [path.resolve() for path in args.notebooks] or notebook_paths()
    if args.run:
        if not args.notebooks and not args.all:
            paths = [path for path in paths if any(faults(path))]
        if not run_notebooks(paths, set(args.also)):
            sys.exit(1)
    lines = [fault for path in paths for fault in faults(path)]
    if lines:
        advice = "make outputs runs these notebooks and keeps their outputs"
        sys.exit("\n".join(lines) + f"\n{len(lines)} faults of outputs; {advice}")
    print(f"{len(paths)} notebooks: outputs are of one run each")


if __name__ == "__main__":
    main()

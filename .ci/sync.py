"""Notebooks, package and README say the same: this tool checks it, and makes it so.

python .ci/sync.py           check; status 1 if a file would change
python .ci/sync.py --write   clean the notebooks, export the package, render README.md

nbdev's own command for README.md needs Quarto. Here nbconvert renders it from nbs/index.ipynb.
"""

import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export

from notebooks import NBS
from notebooks import ROOT
from notebooks import clean_outputs
from notebooks import directives
from notebooks import notebook_paths
from notebooks import read_notebook
from style import is_generated

REPORT = NBS / "tutorials/demo_report.ipynb"  # cala-demo executes a copy of it, which is part of the package


def render_readme() -> str:
    "README.md: the markdown cells, the code cells that are not hidden, and their text outputs."
    notebook = read_notebook(NBS / "index.ipynb")
    notebook.cells = [cell for cell in notebook.cells if "hide" not in directives(cell.source)]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    if resources.get("outputs"):
        sys.exit("index.ipynb has a picture among its outputs; show a file of nbs/images instead")
    local_link = r"\]\((?!https?:)([^)]+\.(?:ipynb|png|svg)[^)]*)\)"
    text = re.sub(local_link, r"](nbs/\1)", text)  # links are relative to nbs there, to the root here
    return "<!-- Rendered from nbs/index.ipynb by `make prepare`; edit the notebook. -->\n\n" + text.strip() + "\n"


def clean_notebook(
    path: Path,
) -> None:
    "Remove live widgets and progress bars from the outputs; write the notebook only if that changes it."
    notebook = read_notebook(path)
    before = nbformat.writes(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            clean_outputs(cell)
    notebook.metadata.pop("widgets", None)
    if nbformat.writes(notebook) != before:
        nbformat.write(notebook, path)


def write() -> None:
    "Clean every notebook, export the package from nothing, render README.md."
    for module in (ROOT / "cala").rglob("*.py"):
        if is_generated(module):
            module.unlink()
    for path in notebook_paths():
        clean_notebook(path)
    nbdev_clean()
    nbdev_export()
    (ROOT / "README.md").write_text(render_readme(), encoding="utf-8")
    shutil.copyfile(REPORT, ROOT / "cala" / REPORT.name)


def snapshot() -> dict[Path, bytes]:
    "The content of every file that `write` may change."
    modules = [path for path in (ROOT / "cala").rglob("*.py") if "__pycache__" not in path.parts]
    files = [ROOT / "README.md", *notebook_paths(), *modules, *notebook_paths(ROOT / "cala")]
    return {path.relative_to(ROOT): path.read_bytes() for path in files if path.exists()}


def main() -> None:
    "Write; then report (--write) or refuse what has changed."
    before = snapshot()
    write()
    after = snapshot()
    changed = sorted(str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if "--write" in sys.argv:
        print(f"{len(changed)} files written", *changed, sep="\n  ")
    elif changed:
        names = "\n  ".join(changed)
        sys.exit(f"These files did not agree with the notebooks. They do now; look at them and commit them:\n  {names}")
    else:
        print(f"{len(after)} files of nbs, cala and README.md agree")


if __name__ == "__main__":
    main()

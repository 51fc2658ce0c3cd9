"""Notebooks, package and README say the same: this tool checks it, and makes it so.

python .ci/sync.py           check; status 1 if a file would change
python .ci/sync.py --write   add badges to notebooks, clean them, export the package, render README.md
python .ci/sync.py --badges NOTEBOOK ...   only add the badge and the cell that installs cala on Google Colab

nbdev's own command for README.md needs Quarto. Here nbconvert renders it from nbs/index.ipynb.
"""

import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export
from nbformat.v4 import new_code_cell, new_markdown_cell

from notebooks import INSTALL_MARK, NBS, ROOT, clean_outputs, directives, notebook_paths, read_notebook
from style import is_generated

# Readers who have no clone open these notebooks, and those of nbs/method, on Google Colab.
OPENED_ELSEWHERE = [NBS / "tutorials/first_run.ipynb", NBS / "tutorials/paper_in_one_notebook.ipynb"]
BADGE, INSTALL = "badge", "install"  # ids of the two cells that `add_badge` writes
INSTALL_CELL = f"""#| hide
# On Google Colab, this cell fetches the project and installs it. It does nothing where cala is installed.
from importlib.util import find_spec

{INSTALL_MARK}
    !git clone --quiet --depth 1 {{url}}
    %pip install --quiet ./{{project}}
    %cd {{project}}/{{folder}}"""
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


def add_badge(
    path: Path,  # of a notebook
) -> None:
    "Write a link that opens the notebook on Google Colab, and a cell that installs cala there, below the title."
    if path.parent != NBS / "method" and path not in OPENED_ELSEWHERE:
        return
    settings = get_config()
    place = path.relative_to(ROOT).as_posix()
    address = f"https://colab.research.google.com/github/{settings.user}/{settings.repo}/blob/{settings.branch}/{place}"
    badge = f"[![Open in Colab](../images/open_in_colab.svg)]({address})"
    install = INSTALL_CELL.format(url=settings.git_url, project=settings.repo, folder=path.parent.relative_to(ROOT))
    notebook = read_notebook(path)
    before = nbformat.writes(notebook)
    notebook.cells = [cell for cell in notebook.cells if cell.id not in (BADGE, INSTALL)]
    kinds = [cell.cell_type for cell in notebook.cells]
    below_title = kinds.index("markdown") + 1
    cells = [new_markdown_cell(badge, id=BADGE), new_code_cell(install, id=INSTALL)]
    notebook.cells[below_title:below_title] = cells
    if nbformat.writes(notebook) != before:
        nbformat.write(notebook, path)


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
    "Add badges, clean every notebook, export the package from nothing, render README.md."
    for module in (ROOT / "cala").rglob("*.py"):
        if is_generated(module):
            module.unlink()
    for path in notebook_paths():
        add_badge(path)
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
    if "--badges" in sys.argv:
        for name in sys.argv[sys.argv.index("--badges") + 1 :]:
            add_badge(Path(name).resolve())
        return
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

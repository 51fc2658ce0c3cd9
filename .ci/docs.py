"""Make the site: every notebook with its outputs, the names of the front door, and a search. Nothing is run.

python .ci/docs.py          into _docs
python .ci/docs.py FOLDER   into another folder

Sphinx writes the pages, because it follows every link between them, reads docstrings and types, and its search needs no
server; MyST-NB gives it the notebooks, and Furo the look. `.ci/site/conf.py` configures them. Each warning is an error:
a dead link, a notebook that the navigation lacks, an equation that is not understood. The pages are read without a
network, so a script, a style or a font from elsewhere is an error too.
"""

import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from inspect import getdoc, isclass
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from notebooks import NBS, ROOT, directives, notebook_paths, read_notebook

SITE = ROOT / ".ci/site"
WINGS = {  # folder of nbs -> heading of the navigation, in reading order
    "method": "The method",
    "backbones": "Backbones",
    "library": "Library",
    "commands": "Commands",
    "tutorials": "Tutorials",
}
FIRST_TUTORIALS = ["first_run", "paper_in_one_notebook"]  # the others follow in the order of their names
API = Path("api.md")


def pages_in_order() -> dict[str, list[Path]]:  # heading -> pages below nbs
    "All notebooks except the index, by the heading of the navigation under which they stand."
    paths = [path.relative_to(NBS) for path in notebook_paths()]
    groups = {heading: [path for path in paths if path.parts[0] == wing] for wing, heading in WINGS.items()}
    groups["Tutorials"].sort(key=lambda path: path.stem not in FIRST_TUTORIALS)
    groups["Reference"] = [API, *(path for path in paths if len(path.parts) == 1 and path.stem != "index")]
    return groups


def pages_by_name(
    paths: list[Path],  # below nbs
) -> dict[str, Path]:
    "Pages by their names in prose: `library/cache`, and also `00_task` and `first_run`, which are no names of code."
    pages = {path.with_suffix("").as_posix(): path for path in paths if len(path.parts) > 1}
    stems = [path.stem for path in paths]
    for path in paths:
        is_lesson = re.match(r"\d\d_", path.stem) is not None
        is_tutorial = path.parts[0] == "tutorials" and "_" in path.stem
        if (is_lesson or is_tutorial) and stems.count(path.stem) == 1:
            pages[path.stem] = path
    return pages


def link_names(
    prose: str,  # of a markdown cell
    here: Path,  # below nbs
    pages: dict[str, Path],  # by the names that prose uses for them
) -> str:
    "The prose, in which names of notebooks that stand as code lead to their pages."
    up = "../" * (len(here.parts) - 1)

    def link_name(match: re.Match) -> str:
        there = pages.get(match[1])
        return match[0] if there in (None, here) else f"[{match[0]}]({up}{there.as_posix()})"

    parts = re.split(r"(^```.*?^```)", prose, flags=re.M | re.S)  # blocks of code stand at odd places
    parts[::2] = [re.sub(r"(?<![\[`])`([\w/]+)`(?!`)", link_name, part) for part in parts[::2]]
    return "".join(parts)


def join_intervals(
    prose: str,  # of a markdown cell
) -> str:
    "The prose, in which no line ends within a number and its interval, such as `-5.56 (-5.91 to -5.22)`."
    number = r"[+-]?\d[\d.]*"
    return re.sub(
        rf"{number} \({number} to {number}\)",
        lambda match: match[0].replace(" ", "\N{NO-BREAK SPACE}"),
        prose,
    )


def read_page(
    path: Path,  # below nbs
    pages: dict[str, Path],  # by the names that prose uses for them
) -> NotebookNode:
    "A notebook as readers of the site see it: without hidden cells, and without nbdev's directives."
    notebook = read_notebook(NBS / path)
    cells = []
    for cell in notebook.cells:
        if "hide" in directives(cell.source):
            continue
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
        else:
            cell.source = join_intervals(link_names(cell.source, path, pages))
        if cell.source.strip():
            cells.append(cell)
    notebook.cells = cells
    notebook.metadata["language_info"] = NotebookNode(name="python", pygments_lexer="ipython3")  # knows !commands
    return notebook


def title(
    path: Path,  # below nbs
) -> str:
    "The first heading of a page; lessons have their number before it."
    if path == API:
        return "Names of the package"
    headings = [cell.source for cell in read_notebook(NBS / path).cells if cell.source.startswith("# ")]
    number = re.match(r"\d\d(?=_)", path.stem)
    return (f"{number[0]} " if number else "") + headings[0].splitlines()[0].removeprefix("# ")


def write_navigation(
    groups: dict[str, list[Path]],
) -> str:
    "MyST's markdown of the navigation. Sphinx warns if a page does not stand in it."
    lines = []
    for heading, paths in groups.items():
        lines += ["```{toctree}", ":hidden:", f":caption: {heading}", ""]
        lines += [f"{title(path)} </{path.with_suffix('').as_posix()}>" for path in paths]
        lines += ["```", ""]
    return "\n".join(lines)


def notebooks_by_module() -> dict[str, Path]:
    "The notebook, below nbs, from which each module of cala is exported; modules without a notebook are left out."
    notebooks = {}
    for path in notebook_paths():
        for cell in read_notebook(path).cells:
            names = [name for name in directives(cell.source) if name.startswith("default_exp ")]
            if names:
                notebooks[names[0].split()[1]] = path.relative_to(NBS)
    return notebooks


def write_api() -> str:
    "MyST's markdown of the names that `from cala import` gives: a table, then each name with its parameters."
    from cala import PUBLIC

    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, when it is imported
    notebooks = notebooks_by_module()
    table = ["| name | what it is | explained in |", "|---|---|---|"]
    entries = []
    for name, module in PUBLIC.items():
        value = getattr(import_module(f"cala.{module}"), name)
        summary = (getdoc(value) or "").partition("\n")[0].replace("|", r"\|")
        path = notebooks.get(module)
        place = f"[{path.with_suffix('').as_posix()}]({path.as_posix()})" if path else f"`cala.{module}`"
        table.append(f"| [`{name}`](#cala.{name}) | {summary} | {place} |")
        directive = "autoclass" if isclass(value) else "autofunction"
        members = "\n   :members:" if isclass(value) and not issubclass(value, Exception) else ""
        entries.append(f"```{{eval-rst}}\n.. {directive}:: cala.{name}{members}\n```")
    start = "These names come with `from cala import ...`. Each is imported when it is first used."
    return "\n\n".join([f"# {title(API)}", start, "\n".join(table), *entries]) + "\n"


def write_sources(
    folder: Path,
) -> None:
    "Write what Sphinx reads: a copy of nbs in which the notebooks are as readers see them, and the page of names."
    shutil.copytree(NBS, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    groups = pages_in_order()
    paths = [path for group in groups.values() for path in group if path != API]
    pages = pages_by_name(paths)
    for path in [Path("index.ipynb"), *paths]:
        notebook = read_page(path, pages)
        if path.stem == "index":
            notebook.cells.append(new_markdown_cell(write_navigation(groups)))
        nbformat.write(notebook, folder / path)
    (folder / API).write_text(write_api(), encoding="utf-8")


def write_font(
    path: Path,  # ends in .woff
) -> None:
    "Write the letters and signs of STIX Two Math that equations use: without such a font, browsers draw them badly."
    import ziamath
    from fontTools import subset

    ranges = [(0x20, 0x400), (0x2000, 0x2400), (0x27E0, 0x2800), (0x1D400, 0x1D800)]  # letters, arrows, operators
    options = subset.Options(flavor="woff", layout_features=["*"])
    font = subset.load_font(str(Path(ziamath.__file__).parent / "fonts/STIXTwoMath-Regular.ttf"), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[number for first, end in ranges for number in range(first, end)])
    subsetter.subset(font)
    subset.save_font(font, str(path), options)


def network_references(
    folder: Path,  # of the site
) -> Iterator[str]:
    "What a page would fetch from elsewhere: one line each. Links that a reader follows do not count."
    tags = r"<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"' >]+)"
    styles = r"<link\b[^>]*\brel=[\"'](?:stylesheet|preload|icon)[^>]*\bhref=[\"']?((?:https?:)?//[^\"' >]+)"
    parts = r"@import\s+[\"']?((?:https?:)?//[^\"';]+)|url\([\"']?((?:https?:)?//[^\"')]+)"
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".html", ".css", ".svg"):
            text = path.read_text(encoding="utf-8")
            for match in re.finditer(f"{tags}|{styles}|{parts}", text):
                yield f"{path.relative_to(folder)}: {next(filter(None, match.groups()))}"


def main(
    folder: Path,  # is deleted first
) -> None:
    "Make the site; status 1 after a warning, or if a page fetches something from elsewhere."
    try:
        from sphinx.cmd.build import build_main
    except ImportError as error:
        raise SystemExit('docs: Sphinx is missing; pip install -e ".[docs]" (make docs does it)') from error
    shutil.rmtree(folder, ignore_errors=True)
    with TemporaryDirectory() as scratch:
        sources = Path(scratch, "nbs")
        write_sources(sources)
        options = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(SITE), "-d", f"{scratch}/doctrees"]
        status = build_main([*options, str(sources), str(folder)])
    write_font(folder / "_static/math.woff")
    if status:
        raise SystemExit(status)
    references = list(network_references(folder))
    if references:
        raise SystemExit("The pages must be read without a network:\n" + "\n".join(references))
    print(f"{len(list(folder.rglob('*.html')))} pages in {folder}; begin at {folder / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "_docs")

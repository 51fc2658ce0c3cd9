"""Write every notebook as an HTML page with its outputs; nothing is run.

python .ci/docs.py          into _docs
python .ci/docs.py FOLDER   into another folder

nbconvert writes the pages. nbdev's own choice, Quarto, is not used: the package of that name in the registry downloads
a program when it is installed. There is no search; contents.html lists all headings and all exported names on one page,
in which a browser can search. MathJax typesets the equations from its usual address; without a network they stay TeX.
"""

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path
from urllib.parse import unquote

from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from nbformat.v4 import new_notebook

from notebooks import NBS
from notebooks import ROOT
from notebooks import directives
from notebooks import notebook_paths
from notebooks import parse_cell
from notebooks import read_notebook

INDEX, CONTENTS = Path("index.ipynb"), Path("contents.ipynb")
WINGS = ["method", "backbones", "library", "commands", "tutorials"]  # in reading order
STYLE = """
nav.pages {
  display: flex; gap: 1.5em; flex-wrap: wrap; padding: 0.6em 1em;
  font: 14px system-ui, sans-serif; border-bottom: 1px solid #8888;
}
nav.pages a { color: #0072B2; text-decoration: none }
main { max-width: 72rem; margin: auto }
img { max-width: 100%; height: auto }
.jp-RenderedHTMLCommon table { display: block; overflow-x: auto }
.jp-OutputArea-output pre { white-space: pre-wrap; overflow-wrap: anywhere }
td code { white-space: nowrap }
@media (prefers-color-scheme: dark) { nav.pages a { color: #56B4E9 } body { background: #111 } }
"""


def pages_in_order() -> list[Path]:  # below nbs
    "All notebooks in reading order: the index, the wings, the glossary."
    paths = [path.relative_to(NBS) for path in notebook_paths()]

    def place(path):
        if len(path.parts) == 1:
            return (-1 if path == INDEX else len(WINGS), 1, path.name)
        return (WINGS.index(path.parts[0]), len(path.parts), path.name)

    return sorted(paths, key=place)


@cache
def read_page(
    path: Path,  # below nbs
) -> NotebookNode:
    "A notebook as readers see it: without hidden cells, and without nbdev's directives."
    notebook = read_notebook(NBS / path)
    cells = []
    for cell in notebook.cells:
        if "hide" in directives(cell.source):
            continue
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
        if cell.source.strip():
            cells.append(cell)
    notebook.cells = cells
    return notebook


@cache
def title(
    path: Path,  # below nbs
) -> str:
    "The first heading of a notebook, or the name of its file."
    for cell in read_page(path).cells:
        match = re.match(r"# (.+)", cell.source)
        if cell.cell_type == "markdown" and match:
            return match[1]
    return path.stem


def link(
    text: str,
    here: Path,  # the page that holds the link
    there: Path,  # the page that it leads to
    anchor: str = "",  # begins with #
) -> str:
    "An HTML link from one page to another."
    up = "../" * (len(here.parts) - 1)
    return f'<a href="{up}{there.with_suffix(".html").as_posix()}{anchor}">{escape(text)}</a>'


def pages_by_name(
    order: list[Path],
) -> dict[str, Path]:
    "Pages by the names that prose uses for them: `library/cache`, and `00_task` where no other page has the same name."
    stems = [path.stem for path in order]
    pages = {}
    for path in order:
        pages[path.with_suffix("").as_posix()] = path
        if stems.count(path.stem) == 1:
            pages[path.stem] = path
    return pages


def navigation(
    path: Path,
    order: list[Path],
) -> str:
    "A line of links to the index, the contents, and the pages before and after this one."
    links = [link("cala", path, INDEX), link("contents and names", path, CONTENTS)]
    if path in order:
        place = order.index(path)
        if place > 0:
            links.append("previous: " + link(title(order[place - 1]), path, order[place - 1]))
        if place + 1 < len(order):
            links.append("next: " + link(title(order[place + 1]), path, order[place + 1]))
    spans = " ".join(f"<span>{text}</span>" for text in links)
    return f'<nav class="pages">{spans}</nav>'


def render_page(
    notebook: NotebookNode,
    path: Path,
    order: list[Path],
    exporter: HTMLExporter,
    dark_style: str,  # for readers whose system is dark
) -> str:
    "The page of nbconvert with our style and navigation, in which links and names of notebooks lead to pages."
    name = title(path) if path in order else "contents"
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": name}})
    page = re.sub(r'href="(?!https?:)([^"#]+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', page)
    # GitHub writes the anchors of headings in small letters, nbconvert does not.
    ids = {name.lower(): name for name in re.findall(r'\bid="([^"]+)"', page)}
    page = re.sub(r'href="#([^"]+)"', lambda match: f'href="#{ids.get(match[1].lower(), match[1])}"', page)
    known = pages_by_name(order)

    def link_name(match):
        there = known.get(match[1])
        if there is None or there == path:
            return match[0]
        return f"<code>{link(match[1], path, there)}</code>"

    page = re.sub(r"<code>([\w/]+)</code>", link_name, page)
    style = f"<style>{STYLE}@media (prefers-color-scheme: dark) {{ {dark_style} }}</style>"
    page = page.replace("</head>", f"{style}</head>", 1)
    return page.replace("<main>", f"{navigation(path, order)}<main>", 1)


def exported_names(
    path: Path,  # below nbs
) -> Iterator[tuple[str, str]]:  # name, id of the cell
    "Public functions and classes that a notebook exports."
    for cell in read_notebook(NBS / path).cells:
        words = directives(cell.source)
        if cell.cell_type != "code" or "hide" in words or not any(word.startswith("export") for word in words):
            continue
        for node in parse_cell(cell.source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                yield node.name, cell.get("id", "")


def write_contents(
    order: list[Path],
) -> NotebookNode:
    "A notebook that lists every heading and every exported name."
    lines = ["# Contents", "\nThe search of your browser (Ctrl-F) finds all headings and all exported names here."]
    names = []
    for path in order:
        lines.append(f"\n## {link(title(path), CONTENTS, path)} <small>{escape(path.as_posix())}</small>\n")
        prose = "\n".join(cell.source for cell in read_page(path).cells if cell.cell_type == "markdown")
        for level, heading in re.findall(r"^(##+) (.+)$", prose, re.M):
            text = re.sub("[`*]", "", heading).strip()
            anchor = "#" + text.replace(" ", "-")
            lines.append("  " * (len(level) - 2) + f"- {link(text, CONTENTS, path, anchor)}")
        names += [(name, path, cell_id) for name, cell_id in exported_names(path)]
    lines.append("\n## Names\n")
    for name, path, cell_id in sorted(names, key=lambda row: row[0].lower()):
        place = path.with_suffix("").as_posix()
        lines.append(f"- {link(name, CONTENTS, path, f'#cell-id={cell_id}')} <small>{escape(place)}</small>")
    return new_notebook(cells=[new_markdown_cell("\n".join(lines))])


def find_dead_links(
    folder: Path,  # resolved
) -> list[tuple[Path, str]]:  # page, link
    "Links of the pages that lead to no file, or to no place in a page."
    texts = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}
    ids = {}
    for path, text in texts.items():
        ids[path] = {unquote(name) for name in re.findall(r'\bid="([^"]+)"', text)}
    dead = set()
    for path, text in texts.items():
        for target in re.findall(r'(?:href|src)="(?!https?:|data:|mailto:)([^"<]+)"', text):  # < stands only in code
            file, _, anchor = unquote(target).partition("#")
            there = (path.parent / file).resolve() if file else path
            if not there.exists() or (anchor and there in ids and anchor not in ids[there]):
                dead.add((path.relative_to(folder), target))
    return sorted(dead)


def read_dark_style(
    exporter: HTMLExporter,
) -> str:
    "nbconvert's style for dark pages."
    for place in exporter.template_paths:
        path = Path(place, "static/theme-dark.css")
        if path.is_file():
            return path.read_text()
    raise SystemExit("docs: nbconvert holds no dark style; install it anew")


def main(
    folder: Path,  # is deleted first
):
    "Write all pages, then follow every link; a link that leads nowhere is an error."
    folder = folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(NBS / "images", folder / "images")
    exporter = HTMLExporter(
        template_name="lab",
        theme="light",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    dark_style = read_dark_style(exporter)
    order = pages_in_order()
    for path in [*order, CONTENTS]:
        notebook = read_page(path) if path in order else write_contents(order)
        page = folder / path.with_suffix(".html")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render_page(notebook, path, order, exporter, dark_style), encoding="utf-8")
    dead = find_dead_links(folder)
    if dead:
        lines = "\n".join(f"  {page}: {target}" for page, target in dead[:20])
        raise SystemExit(f"{len(dead)} dead links:\n{lines}")
    print(f"{len(order) + 1} pages in {folder}; begin at {folder / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs")

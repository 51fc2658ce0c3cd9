"""Every notebook as a page of HTML with its outputs: `python .ci/docs.py [folder]`, by default _docs; nothing is executed.

By nbconvert, which is a dependency anyway. Quarto, nbdev's own choice, is no Python package: what is on the registry under its name fetches a program
from elsewhere when it is installed. For the search that a site of it would have stands contents.html: every heading and every exported name on one
page, which any browser can search. Equations are typeset by MathJax from its usual address; without a network they are read as TeX."""
import ast
import re
import shutil
import sys
from html import escape
from pathlib import Path
from urllib.parse import unquote

import nbformat
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
STYLE = """
nav.house { display: flex; gap: 1.5em; flex-wrap: wrap; padding: 0.6em 1em; font: 14px system-ui, sans-serif; border-bottom: 1px solid #8888 }
nav.house a { color: #0072B2; text-decoration: none } main { max-width: 72rem; margin: auto } img { max-width: 100%; height: auto }
.jp-RenderedHTMLCommon table { display: block; overflow-x: auto } .jp-OutputArea-output pre { white-space: pre-wrap; overflow-wrap: anywhere } td code { white-space: nowrap }
@media (prefers-color-scheme: dark) { nav.house a { color: #56B4E9 } body { background: #111 } }
"""


def notebooks():
    "Paths below nbs in reading order: index, the rooms and commands, glossary, tutorials."
    found = [path.relative_to(NBS) for path in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    first = [Path("index.ipynb")]
    return first + sorted((p for p in found if p not in first), key=lambda p: (len(p.parts), not p.name[0].isdigit(), p.name))


def readable(path):
    "The notebook as a reader wants it: without hidden cells, and cells without the lines that are for nbdev."
    notebook = nbformat.read(NBS / path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not re.search(r"^#\| *hide\b", cell.source, re.M)]
    for cell in notebook.cells:
        if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
    return notebook


def link(text, here, there, anchor=""):
    "An HTML link from one page to another."
    up = "../" * (len(here.parts) - 1)
    return f'<a href="{up}{there.with_suffix(".html").as_posix()}{anchor}">{escape(text)}</a>'


def title(path):
    "The first heading of a notebook."
    cells = nbformat.read(NBS / path, as_version=4).cells
    return next((found[1] for cell in cells if cell.cell_type == "markdown" and (found := re.match(r"# (.+)", cell.source))), path.stem)


def render(notebook, path, order, exporter, dark):
    "One page: nbconvert's, with our links, a line of navigation, and the dark theme where the reader's system is dark."
    page, _ = exporter.from_notebook_node(notebook, resources={"metadata": {"name": title(path) if path in order else "contents"}})
    page = re.sub(r'href="(?!https?:)([^"#]+)\.ipynb(#[^"]*)?"', lambda m: f'href="{m[1]}.html{m[2] or ""}"', page)
    known = {str(p.with_suffix("")): p for p in order} | {p.stem: p for p in order}
    page = re.sub(r"<code>([\w/]+)</code>", lambda m: f"<code>{link(m[1], path, known[m[1]])}</code>" if m[1] in known and known[m[1]] != path else m[0], page)
    around = [(word, order[order.index(path) + step]) for word, step in (("previous", -1), ("next", 1)) if path in order and 0 <= order.index(path) + step < len(order)]
    places = [link("cala", path, Path("index")), link("contents and names", path, Path("contents")), *(f"{word}: {link(title(other), path, other)}" for word, other in around)]
    page = page.replace("</head>", f"<style>{STYLE}@media (prefers-color-scheme: dark) {{ {dark} }}</style></head>", 1)
    return page.replace("<main>", f'<nav class="house">{" ".join(f"<span>{place}</span>" for place in places)}</nav><main>', 1)


def names(cell):
    "Public functions and classes that a cell exports."
    if cell.cell_type != "code" or not re.search(r"^#\| *export", cell.source, re.M): return []
    try: tree = ast.parse(cell.source)
    except SyntaxError: return []
    return [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]


def contents(order):
    "A notebook that lists every heading and every exported name."
    here, lines, exported = Path("contents.ipynb"), ["# Contents", "\nFind in page (Ctrl-F) searches all headings, and all names that the package exports."], []
    for path in order:
        cells = nbformat.read(NBS / path, as_version=4).cells
        lines.append(f"\n## {link(title(path), here, path)} <small>{escape(path.as_posix())}</small>\n")
        for heading in re.findall(r"^(##+) (.+)$", "\n".join(c.source for c in cells if c.cell_type == "markdown"), re.M):
            anchor = "#" + re.sub("[`*]", "", heading[1]).strip().replace(" ", "-")
            lines.append("  " * (len(heading[0]) - 2) + f"- {link(re.sub('[`*]', '', heading[1]), here, path, anchor)}")
        exported += [(name, path, cell.get("id", "")) for cell in cells for name in names(cell)]
    lines.append("\n## Names\n")
    lines += [f"- {link(name, here, path, f'#cell-id={cell}')} <small>{escape(path.stem)}</small>" for name, path, cell in sorted(exported, key=lambda e: e[0].lower())]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n".join(lines))])


def dead_links(folder):
    "Links of the pages that lead nowhere: (page, link)."
    pages = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.html")}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    for path, text in pages.items():
        for target in re.findall(r'(?:href|src)="(?!https?:|data:|mailto:)([^"]+)"', text):
            file, _, anchor = unquote(target).partition("#")
            there = (path.parent / file).resolve() if file else path
            if not there.exists() or (anchor and there in ids and anchor not in {unquote(i) for i in ids[there]}): yield path.relative_to(folder), target


def main(folder):
    "Render all pages, then follow every link."
    folder = folder.resolve()   # dead_links compares resolved paths
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(NBS / "images", folder / "images")
    exporter, order = HTMLExporter(template_name="lab", theme="light", exclude_input_prompt=True, exclude_output_prompt=True), notebooks()
    dark = next(Path(place, "static/theme-dark.css").read_text() for place in exporter.template_paths if Path(place, "static/theme-dark.css").is_file())
    for path in [*order, Path("contents.ipynb")]:
        page = folder / path.with_suffix(".html")
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render(readable(path) if path in order else contents(order), path, order, exporter, dark), encoding="utf-8")
    if dead := sorted(set(dead_links(folder))): raise SystemExit(f"{len(dead)} dead links:\n" + "\n".join(f"  {page}: {target}" for page, target in dead[:20]))
    print(f"{len(order) + 1} pages in {folder}; begin at {folder / 'index.html'}")


if __name__ == "__main__": main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs")

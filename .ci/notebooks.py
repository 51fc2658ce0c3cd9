"""What the other tools of this folder need of notebooks: their places, directives and fingerprints."""

import ast
import hashlib
import json
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
INSTALL_MARK = 'if find_spec("cala") is None:'  # a line of the cell that `.ci/sync.py --badges` writes
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"\d+%\|.*\|\s*[\d.]+\w*/|\d+it \[\d\d:\d\d")  # a line that tqdm writes
KERNEL_FILE = re.compile(
    r"\S*/ipykernel_\d+/\d+\.py:\d+"
)  # where a warning of a cell comes from; another file in every run


def notebook_paths(
    folder: Path = NBS,  # searched with its subfolders
) -> list[Path]:
    "All notebooks of a folder, sorted, without Jupyter's checkpoints."
    return sorted(path for path in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def read_notebook(
    path: Path,
) -> NotebookNode:
    "The notebook in nbformat 4."
    return nbformat.read(path, as_version=4)


def relative(
    path: Path,
) -> str:
    "The path from the project's root, or the path itself if it is elsewhere."
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def directives(
    source: str,  # of a code cell
) -> set[str]:
    "The nbdev directives on the first lines of a cell, such as {'export', 'eval: false'}."
    names = set()
    for line in source.splitlines():
        match = re.match(r"#\|\s*(.*?)\s*$", line)
        if match:
            names.add(re.sub(r"\s+", " ", match[1]))
        elif line.strip():
            break
    return names


def python_source(
    source: str,  # of a code cell
) -> str:
    "The cell as Python: lines and cells of IPython, such as `%%writefile`, become function calls."
    try:
        ast.parse(source)
        return source
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager

        return TransformerManager().transform_cell(source)


def parse_cell(
    source: str,  # of a code cell
) -> ast.Module:
    "The syntax tree of a cell. Raises SyntaxError if it is neither Python nor IPython."
    return ast.parse(python_source(source))


def _join_constants(
    parts: list[ast.expr],  # of an f-string
) -> list[ast.expr]:
    "Neighbouring texts of an f-string as one text, no empty ones: Python 3.12.1 splits them in another way than 3.11."
    joined: list[ast.expr] = []
    for part in parts:
        if isinstance(part, ast.Constant) and part.value == "":
            continue
        if isinstance(part, ast.Constant) and joined and isinstance(joined[-1], ast.Constant):
            joined[-1] = ast.Constant(str(joined[-1].value) + str(part.value))
        else:
            joined.append(part)
    return joined


def describe_tree(
    node: object,  # a syntax tree, a list of them, or a value inside one
) -> str:
    "A text of a syntax tree that is the same on every Python version, unlike that of `ast.dump`."
    if isinstance(node, list):
        return "[" + ",".join(describe_tree(part) for part in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name in node._fields:
        value = getattr(node, name, None)
        if name in ("ctx", "kind", "type_comment") or value is None or value == []:
            continue
        if isinstance(node, ast.JoinedStr):
            value = _join_constants(value)
        fields.append(f"{name}={describe_tree(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def describe_cell(
    source: str,  # of a code cell
) -> str:
    "The meaning of a cell as text: without comments and layout, so that only a changed program changes it."
    try:
        return describe_tree(parse_cell(source))
    except SyntaxError:
        return source.strip()


def shorten_hash(
    text: str,
) -> str:
    "The first 16 digits of the SHA-256 of a text."
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def executed_cells(
    notebook: NotebookNode,
) -> list[NotebookNode]:
    "The code cells without the cell that installs cala elsewhere, which does nothing where cala is installed."
    return [cell for cell in notebook.cells if cell.cell_type == "code" and INSTALL_MARK not in cell.source]


def hash_sources(
    notebook: NotebookNode,
) -> str:
    "The fingerprint of all code cells in their order. Comments, layout and markdown do not count."
    cells = [describe_cell(cell.source) for cell in executed_cells(notebook)]
    return shorten_hash("\n".join(cell for cell in cells if cell != "Module()"))


def hash_outputs(
    notebook: NotebookNode,
) -> str:
    "The fingerprint of all outputs in their order."
    outputs = [cell.outputs for cell in executed_cells(notebook)]
    return shorten_hash(json.dumps(outputs, sort_keys=True))


def clean_stream(
    text: str,
) -> str:
    "A stream without progress bars and kernel files. Of a line with carriage returns, only the last text stays."
    lines = []
    for line in text.splitlines(keepends=True):
        end = "\n" if line.endswith("\n") else ""
        shown = line.rstrip("\r\n").rpartition("\r")[2]
        if not PROGRESS.search(line):
            lines.append(KERNEL_FILE.sub("<cell>", shown) + end)
    return "".join(lines)


def clean_outputs(
    cell: NotebookNode,  # a code cell; changed in place
) -> None:
    "Keep what a page can show: no progress bars, no live widgets (only the picture that a widget leaves), no metadata."
    shown = []
    for output in cell.outputs:
        if output.output_type == "stream":
            output.text = clean_stream(output.text)
            if not output.text.strip():
                continue
        else:
            if WIDGET in output.get("data", {}):
                if "image/png" not in output.data:
                    continue
                output.data.pop(WIDGET)
            if "metadata" in output:
                output.metadata = NotebookNode()
        shown.append(output)
    cell.outputs = shown

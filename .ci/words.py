"""One vocabulary: which words and names of this project have a better one, in prose and in code.

python .ci/words.py                count by file and by word
python .ci/words.py --list         every place with its better word
python .ci/words.py --strict       every place; status 1 if there is one
python .ci/words.py FILE ...       only these notebooks or Python files

Prose is: markdown cells, docstrings, comments (those behind the parameters of a command become its help), and texts in
code that hold a space (messages, labels). Of markdown, code between backticks and formulas are left out.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from notebooks import NBS, ROOT, notebook_paths, python_source, read_notebook, relative
from style import is_generated

# What to look for (a regular expression; upper and lower case count alike), and what to write instead.
PROSE = {
    # The names of other papers and programs; the glossary lists them beside ours.
    r"query images?|source images?|reference images?": "reference",
    r"target images?|ground[- ]truth": "target",
    r"modifiers?|relative captions?|text feedback": "modification text",
    r"candidate images?": "gallery",
    r"(the authors'|original|official|upstream) (program|code|implementation|repository)": "released program",
    r"the seed's|seed of this project|the seed (asks|gives|has|uses|says)": "released program; a seed is random",
    # A rank is a place in a ranking. What torchrun starts is a process.
    r"rank (0|zero)|(several|other|many|lost|both) ranks|lost rank|(across|between|among) ranks|multi-rank": "process",
    r"ranks (wait|meet|agree|share|differ)|(each|every|one) of the ranks|number of ranks": "process",
    r"company of \w+": "one process, two processes",
    # One spelling.
    r"subset (recall|R@\d+)|R_s@": "Rs@1",
    r"times sooner|speedups?": "speed-up",
    # People and things: a sentence needs a subject that the reader can name.
    r"whoever|whomever|whatsoever": "name the subject",
    r"nobody|somebody|no one": "name the subject",
    r"whom to read": "references",
    r"who wants|who asks|who needs|who has": "name the subject: a user who ..., a reader who ...",
    r"(is|are|was|were) (told|asked)": "say who passes what to whom",
    r"said aloud|is said|was said|are said": "print, state, report",
    r"dice": "random numbers, random state",
    r"(earlier|later|this|that|each|every|other|the) rooms?": "module or notebook",
    r"(heed|heeds|lest|ere|aloud|alike)": "a plain word",
    r"(let|lets) go of": "release",
    r"(part|parts) (company|ways)": "differ",
    r"come by|came by|to be had|had to be had": "obtain, find",
    r"a bargain|the watch|to be alive|way on": "a plain word",
    r"so many|as many again": "give the number",
    r"beside (it|them|this|that|each)": "next to, with, also",
}
# In code and prose alike: QTM, TBIA, CTR is the order of the three associations.
ORDER = ("qtm", "tbia", "ctr")
# Variables that do not say what they hold.
NAMES = {
    "found": "what it is: matches, faults, audit, table",
    "said": "message",
    "told": "message, settings",
    "what": "title, kind",
    "kept": "what it holds: rows, outputs",
    "one": "what it is: row, batch, picture",
    "asked": "what was requested: flags, names",
    "mine": "what it is: own rows, own process",
    "theirs": "what it is: reference result, other process",
}
# Parts of names that are about processes.
PROCESS_NAMES = re.compile(
    r"(^|_)(lost|other|among|all|both|dead|main|zero)_ranks?$|^rank_(zero|0)$|^world_rank$|^n_ranks$"
)
SHORT = 7  # words; a markdown cell below it that ends with a colon is a caption, not a sentence
QUOTING = {NBS / "glossary.ipynb"}  # it names what other papers say


class Use(NamedTuple):
    path: str  # from the project's root
    place: str  # cell or line
    word: str  # as it is written there
    better: str  # what to write instead


def drop_code(
    text: str,  # markdown
) -> str:
    "Markdown without code, formulas and addresses, which are not prose."
    text = re.sub(r"```.*?```", " ", text, flags=re.S)
    text = re.sub(r"`[^`]*`", "CODE", text)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$", "FORMULA", text, flags=re.S)
    return re.sub(r"\]\([^)]*\)|https?://\S+", "]", text)


def prose_uses(
    text: str,
    place: str,
) -> Iterator[tuple[str, str, str]]:
    "Place, word and better word for each word of the table."
    flat = re.sub(r"\s+", " ", text)
    for pattern, better in PROSE.items():
        for match in re.finditer(rf"(?<![\w@-])(?:{pattern})(?![\w@])", flat, re.I):
            yield place, match[0], better


def order_uses(
    text: str,
    place: str,
) -> Iterator[tuple[str, str, str]]:
    "Place, words and better words where two associations stand side by side in the wrong order."
    separator = r"[\s,/&+|`'\"()]*(?:and|or|,)?[\s,/&+|`'\"()]+|, "
    pattern = rf"\b((?:[a-z]_)?(?:{'|'.join(ORDER)}))(?:{separator})(?=((?:[a-z]_)?(?:{'|'.join(ORDER)}))\b)"
    for match in re.finditer(pattern, text, re.I):
        first, second = (ORDER.index(match[i].lower().rpartition("_")[2]) for i in (1, 2))
        if first > second and re.fullmatch(r"\W*(and|or)?\W*", text[match.end(1) : match.start(2)]):
            yield place, f"{match[1]}, {match[2]}", "the order QTM, TBIA, CTR"


def name_sequences(
    tree: ast.Module,
) -> Iterator[tuple[int, list[str]]]:
    "Line and names of what stands in a row: parameters, arguments, keywords, elements, keys, fields of a class."
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
        elif isinstance(node, ast.Call):
            yield node.lineno, [plain_name(each) for each in node.args]
            yield node.lineno, [each.arg or "" for each in node.keywords]
        elif isinstance(node, (ast.Tuple, ast.List)):
            yield node.lineno, [plain_name(each) for each in node.elts]
        elif isinstance(node, ast.Dict):
            yield node.lineno, [plain_name(each) for each in node.keys if each is not None]
        elif isinstance(node, ast.ClassDef):
            yield node.lineno, [plain_name(each.target) for each in node.body if isinstance(each, ast.AnnAssign)]


def plain_name(
    node: ast.expr,
) -> str:
    "The name or text that an expression is, or an empty text."
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def sequence_uses(
    tree: ast.Module,
    place: str,  # of the cell
) -> Iterator[tuple[str, str, str]]:
    "Place, names and the right order where names of a row, such as z_ctr and z_tbia, stand in another order."
    for line, names in name_sequences(tree):
        rows: dict[str, list[int]] = {}  # for z_qtm, z_tbia, z_ctr: {"z_*": [0, 1, 2]}
        for name in names:
            parts = name.lower().split("_")
            for word in set(parts) & set(ORDER):
                pattern = "_".join("*" if part == word else part for part in parts)
                rows.setdefault(pattern, []).append(ORDER.index(word))
        for pattern, positions in rows.items():
            if positions != sorted(positions):
                written = ", ".join(pattern.replace("*", ORDER[position]) for position in positions)
                yield f"{place}line {line}", written, "the order QTM, TBIA, CTR"


def bound_names(
    tree: ast.Module,
) -> Iterator[tuple[int, str]]:
    "Line and name of everything that gets a name: variables, parameters, functions."
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.name


def code_texts(
    source: str,  # Python
    tree: ast.Module,
) -> Iterator[tuple[int, str]]:
    "Line and text of comments and of strings that hold a space; docstrings are among them."
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("#|", "# %%", "# noqa")):
            yield token.start[0], token.string
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def code_uses(
    source: str,  # Python
    place: str = "",  # of the cell
) -> Iterator[tuple[str, str, str]]:
    "Place, word and better word in code."
    tree = ast.parse(source)
    for line, name in bound_names(tree):
        if name in NAMES:
            yield f"{place}line {line}", f"{name} (name)", NAMES[name]
        if PROCESS_NAMES.search(name):
            yield f"{place}line {line}", f"{name} (name)", "process instead of rank"
    for line, text in code_texts(source, tree):
        yield from prose_uses(text, f"{place}line {line}")
        yield from order_uses(text, f"{place}line {line}")
    yield from sequence_uses(tree, place)


def caption_uses(
    text: str,  # of a markdown cell
    place: str,
) -> Iterator[tuple[str, str, str]]:
    "Place, text and advice for a markdown cell that only names what comes next."
    words = re.findall(r"[A-Za-z']+", text)
    if 0 < len(words) < SHORT and text.rstrip().endswith(":") and not text.lstrip().startswith("#"):
        yield place, "short caption", f"a full sentence instead of {text.strip()!r}"


def file_uses(
    path: Path,  # a notebook, a Python file or a markdown file
) -> Iterator[Use]:
    "What a file says that has a better word."
    name = relative(path)
    if path.suffix == ".ipynb":
        uses = notebook_uses(path)
    elif path.suffix == ".py":
        uses = code_uses(path.read_text(encoding="utf-8"))
    else:
        uses = prose_uses(drop_code(path.read_text(encoding="utf-8")), "")
    for place, word, better in uses:
        yield Use(name, place, word, better)


def notebook_uses(
    path: Path,
) -> Iterator[tuple[str, str, str]]:
    "Place, word and better word in a notebook."
    for number, cell in enumerate(read_notebook(path).cells):
        if cell.cell_type == "markdown":
            text = drop_code(cell.source)
            yield from caption_uses(cell.source, f"cell {number}")
            yield from order_uses(text, f"cell {number}")
            if path not in QUOTING:
                yield from prose_uses(text, f"cell {number}")
        elif cell.cell_type == "code":
            try:
                source = python_source(cell.source)
                yield from code_uses(source, f"cell {number} ")
            except (SyntaxError, tokenize.TokenError):
                continue


def read_files() -> list[Path]:
    "Notebooks, plain modules of the package, tools and pages that a person writes."
    modules = [path for path in sorted((ROOT / "cala").rglob("*.py")) if path.name != "_modidx.py"]
    modules = [path for path in modules if not is_generated(path)]
    tools = [path for path in sorted((ROOT / ".ci").glob("*.py")) if path != Path(__file__).resolve()]
    answers = sorted(NBS.rglob("*.py"))
    return [*notebook_paths(), *modules, *tools, *answers, ROOT / "CONTRIBUTING.md"]


def main() -> None:
    "Count or list the places; status 1 with --strict if there is one."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--list", action="store_true", help="print every place")
    parser.add_argument("--strict", action="store_true", help="print every place; status 1 if there is one")
    args = parser.parse_args()
    files = [path.resolve() for path in args.files] or read_files()
    uses = [use for path in files for use in file_uses(path)]
    if args.list or args.strict:
        for use in uses:
            print(f"{use.path} {use.place}: {use.word} -> {use.better}")
    else:
        for title, counter in (
            ("file", Counter(use.path for use in uses)),
            ("word", Counter(use.word.lower() for use in uses)),
        ):
            for key, count in counter.most_common(60):
                print(f"{title} {key:60} {count:4}")
    print(f"{len(uses)} words with a better one in {len({use.path for use in uses})} of {len(files)} files")
    sys.exit(1 if uses and args.strict else 0)


if __name__ == "__main__":
    main()

"""Imports of the package run one way: method <- backbones <- library <- scripts. `import cala` and --help are fast."""

import ast
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cala"
# For each wing the wings that it may import from. The modules directly below cala are the wing "method".
ALLOWED = {
    "method": {"method"},
    "backbones": {"method", "backbones"},
    "library": {"method", "backbones", "library"},
    "scripts": {"method", "backbones", "library", "scripts"},
}
SECONDS = 0.5  # of processor time


class Import(NamedTuple):
    line: int
    module: str  # the full name, such as cala.library.files
    name: str  # what is imported from it; "" for `import module`
    inside: bool  # True inside a function, which runs later than the module


def module_name(path: Path) -> str:
    "The name under which Python imports a file: cala/library/files.py is cala.library.files."
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_files() -> list[Path]:
    "All modules of the package, without nbdev's index."
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_modidx.py")


def is_type_checking(test: ast.expr) -> bool:
    "True for the condition of `if TYPE_CHECKING:`, whose block never runs."
    return ast.unparse(test).endswith("TYPE_CHECKING")


def statements(body: list, inside: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    "All statements below a body that can run, and whether they stand inside a function."
    for node in body:
        if isinstance(node, ast.If) and is_type_checking(node.test):
            continue
        yield node, inside
        deeper = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, None) or [], deeper)
        for part in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
            yield from statements(part.body, deeper)


def imports_of(tree: ast.Module, package: str) -> list[Import]:
    "The imports of a syntax tree; `package` is what one leading dot stands for."
    imports = []
    for node, inside in statements(tree.body):
        if isinstance(node, ast.Import):
            imports += [Import(node.lineno, name.name, "", inside) for name in node.names]
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1])
                module = f"{base}.{module}" if module else base
            imports += [Import(node.lineno, module, name.name, inside) for name in node.names]
    return imports


def module_imports(path: Path) -> list[Import]:
    "The imports of a module's file."
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imports_of(ast.parse(path.read_text(encoding="utf-8")), package)


MODULES = {module_name(path): module_imports(path) for path in package_files()}


def target_module(item: Import) -> str:
    "The module of the package that an import loads: `from cala.library import files` loads cala.library.files."
    submodule = f"{item.module}.{item.name}"
    return submodule if submodule in MODULES else item.module


def wing_of(module: str) -> str:
    "The wing of a module of the package."
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "method"


@pytest.mark.parametrize("wing", ALLOWED)
def test_a_wing_imports_only_from_the_wings_before_it(wing):
    wrong = []
    for module, items in MODULES.items():
        if wing_of(module) != wing:
            continue
        for item in items:
            target = target_module(item)
            if target.split(".")[0] == "cala" and wing_of(target) not in ALLOWED[wing]:
                wrong.append(f"{module} line {item.line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others():
    edges = {}
    for module, items in MODULES.items():
        targets = {target_module(item) for item in items if not item.inside}
        edges[module] = sorted(target for target in targets if target in MODULES and target != module)
    circle = find_circle(edges)
    assert not circle, " -> ".join(circle)


def find_circle(edges: dict[str, list[str]]) -> list[str]:
    "The names along one circle of a graph, the first name again at the end; empty if there is none."
    finished = set()

    def search(path: list[str]) -> list[str]:
        for target in edges[path[-1]]:
            if target in path:
                return [*path[path.index(target) :], target]
            if target not in finished:
                circle = search([*path, target])
                if circle:
                    return circle
        finished.add(path[-1])
        return []

    for name in edges:
        if name not in finished:
            circle = search([name])
            if circle:
                return circle
    return []


def test_a_circle_is_found():
    assert find_circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert find_circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


@pytest.mark.parametrize("path", sorted((ROOT / "nbs/method").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_lesson_of_the_method_imports_only_the_method(path):
    """Drawn worlds, figures and the like come through the front door: `from cala import draw_cirr`."""
    wrong = []
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type != "code" or cell.source.lstrip().startswith("%%"):
            continue
        source = re.sub(r"^( *)[%!].*$", r"\1pass", cell.source, flags=re.MULTILINE)  # a magic is no Python
        for item in imports_of(ast.parse(source), "cala"):
            target = target_module(item)
            if target.split(".")[0] == "cala" and wing_of(target) != "method":
                wrong.append(f"{path.name} cell {number} imports {target}")
    assert not wrong, "\n".join(wrong)


def console_scripts() -> list[str]:
    "The names of the commands in settings.ini."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    lines = [line.strip() for line in config["DEFAULT"]["console_scripts"].splitlines() if line.strip()]
    return [line.partition("=")[0] for line in lines]


def processor_seconds(*command: str | Path) -> float:
    "Processor time of a command: the best of three, because other programs disturb the measurement."
    seconds = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert result.returncode == 0, result.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def test_import_cala_is_fast():
    assert processor_seconds(sys.executable, "-c", "import cala") < SECONDS


@pytest.mark.parametrize("command", console_scripts())
def test_help_of_a_command_is_fast(command):
    assert processor_seconds(Path(sys.executable).parent / command, "--help") < SECONDS

"""The tools of .ci that keep style, words, outputs and lock files, and the types of the package's public functions."""

import ast
import importlib
import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
# Modules with public functions that lack a type or a docstring. The list only gets shorter.
UNTYPED: set[str] = set()


@pytest.fixture(autouse=True)
def tools_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))


def load_tool(name: str):
    "A module of .ci, which is no package."
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def new_notebook(*cells: tuple[str, str] | str) -> nbformat.NotebookNode:
    "A notebook of code cells; a pair is a cell with the text of its output."
    notebook = nbformat.v4.new_notebook()
    for cell in cells:
        source, text = cell if isinstance(cell, tuple) else (cell, "")
        new = nbformat.v4.new_code_cell(source)
        if text:
            new.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        notebook.cells.append(new)
    return notebook


# ---------------------------------------------------------------- the package's interface


def interface_faults(path: Path) -> list[str]:
    "Public functions of a module that lack a type or a docstring."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = {each.value for each in node.value.elts if isinstance(each, ast.Constant)}
    faults = load_tool("style").interface_faults(tree, public)
    return [f"{path.relative_to(ROOT)} line {line}: {message}" for line, _, message in faults]


def package_files() -> list[str]:
    "The modules of the package, from the project's root."
    paths = [path for path in sorted((ROOT / "cala").rglob("*.py")) if path.name != "_modidx.py"]
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("name", package_files())
def test_public_functions_have_types_and_docstrings(name):
    faults = interface_faults(ROOT / name)
    if name in UNTYPED:
        assert faults, f"{name} is in order; take it off the list UNTYPED"
    else:
        assert not faults, "\n".join(faults)


def test_the_list_of_untyped_modules_names_modules():
    assert set(package_files()) >= UNTYPED


def test_interface_faults_name_the_parameter_and_the_missing_docstring():
    source = """
def typed(x: int, *rest: int, key: str = "") -> int:
    "Fine."

def untyped(x, y: int, **options): pass

def _private(x): pass

class Model:
    "Fine."
    def __init__(self, size): pass
    def forward(self, x: int): pass
    @staticmethod
    def build(width): pass
    def _step(self, x): pass
"""
    faults = list(load_tool("style").interface_faults(ast.parse(source)))
    assert [(rule, message) for _, rule, message in faults] == [
        ("docstring", "untyped is public and has no docstring"),
        ("untyped", "untyped is public; give a type to x, options"),
        ("untyped", "Model.__init__ is public; give a type to size"),
        ("untyped", "Model.build is public; give a type to width"),
    ]


# ---------------------------------------------------------------- style


@pytest.mark.parametrize(
    "source, rule",
    [
        ("[print(x) for x in range(3)]\ny = 1", "comprehension"),
        ("def f(x):\n    x and print(x)", "condition"),
        ("print(1), print(2)\ny = 1", "statements"),
        ("def f(found):\n    return 'target' * (found > 0)", "times-bool"),
        ("def f(found):\n    return [1, 2] * any(found)", "times-bool"),
    ],
)
def test_what_reads_like_a_riddle_is_found(source, rule):
    assert [fault[1] for fault in load_tool("style").code_faults(ast.parse(source), ends_in_value=True)] == [rule]


@pytest.mark.parametrize("source", ["[x for x in range(3)]", "x = 1\nx > 0 and x < 2", "'-' * 3", "(1, 2)"])
def test_the_value_that_a_cell_ends_in_is_fine(source):
    assert not list(load_tool("style").code_faults(ast.parse(source), ends_in_value=True))


def test_the_shape_of_a_notebook_is_checked(tmp_path):
    style = load_tool("style")
    good = new_notebook(
        "#| default_exp thing",
        "#| export\nimport torch",
        '#| export\nclass Thing:\n    "A thing."',
        "#| hide\nimport nbdev\n\nnbdev.nbdev_export()",
    )
    nbformat.write(good, tmp_path / "good.ipynb")
    assert not list(style.notebook_faults(tmp_path / "good.ipynb"))
    bad = new_notebook(
        "x = 1",
        "#| default_exp thing",
        '#| export\nimport torch\n\nclass Thing:\n    "A thing."',
        '#| export\n@patch\ndef grow(self: Thing):\n    "More."',
        "from types import SimpleNamespace\n#| hide",
    )
    nbformat.write(bad, tmp_path / "bad.ipynb")
    rules = sorted(fault.rule for fault in style.notebook_faults(tmp_path / "bad.ipynb"))
    assert rules == ["directive", "imports", "patch", "shape", "shape", "stand-in"]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "source, better",
    [
        ("found = 1", "matches"),
        ("def f(mine): pass", "own rows"),
        ("def f(z_qtm, z_ctr, z_tbia): pass", "QTM, TBIA, CTR"),
        ("released(z_ctr, z_tbia)", "QTM, TBIA, CTR"),
        ("class Losses:\n    ctr: float\n    qtm: float", "QTM, TBIA, CTR"),
        ("x = 1  # nobody reads it", "subject"),
        ("raise ValueError('whoever calls this must wait')", "subject"),
        ("'three times sooner than before'", "speed-up"),
        ("'rank 0 writes the file'", "process"),
        ("# CTR and TBIA", "QTM, TBIA, CTR"),
    ],
)
def test_a_word_with_a_better_one_is_found_in_code(source, better):
    uses = list(load_tool("words").code_uses(source))
    assert len(uses) == 1
    assert better in uses[0][2]


@pytest.mark.parametrize(
    "source",
    [
        "rank = 1",
        "def f(z_qtm, z_tbia, z_ctr, w_tbia, w_ctr): pass",
        "'the target has rank 3'",
        "# QTM, TBIA and CTR",
        "torch.manual_seed(0)  # the seed of the random numbers",
    ],
)
def test_words_of_the_field_pass(source):
    assert not list(load_tool("words").code_uses(source))


def test_a_caption_is_found_and_code_in_markdown_is_not_read():
    words = load_tool("words")
    assert list(words.caption_uses("In that order:", "cell 1"))
    assert not list(words.caption_uses("## Heading:", "cell 1"))
    assert not list(words.caption_uses("The next cell prints the recall of each of the three frames:", "cell 1"))
    assert not list(words.prose_uses(words.drop_code("`nobody` and $dice$ and [x](nobody.ipynb)"), "cell 1"))


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    "source, answer",
    [
        ("x", "surely"),
        ("x.shape, 3", "surely"),
        ("for x in range(3):\n    print(x)", "surely"),
        ("x = 1\nplt.show()", "surely"),
        ("f(x)", "perhaps"),
        ("x;", ""),
        ("x = 1", ""),
        ("test_eq(x, 1)", ""),
        ("rows.append(1)", ""),
        ("None", ""),
        ("if x:\n    print(x)", ""),
        ("def f():\n    print(1)", ""),
        ("with redirect_stdout(io.StringIO()):\n    print(1)", ""),
        ("print(x, file=log)", ""),
        ("#| hide\nx", ""),
        ("#| cuda\nx", ""),
        ("#| eval: false\nx", ""),
        ("#| export\nx", ""),
    ],
)
def test_which_cells_show_something(source, answer):
    assert load_tool("outputs").shows(source) == answer


def recorded(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "The notebook with the record of a run of all its cells."
    tools = load_tool("notebooks")
    notebook.metadata["cala"] = {"sources": tools.hash_sources(notebook), "outputs": tools.hash_outputs(notebook)}
    return notebook


def faults_of(notebook: nbformat.NotebookNode, path: Path) -> str:
    "What the check says about a notebook."
    nbformat.write(notebook, path)
    return "\n".join(load_tool("outputs").faults(path))


def test_outputs_of_one_run_pass_and_others_do_not(tmp_path):
    path = tmp_path / "one.ipynb"
    assert "no run of the whole notebook" in faults_of(new_notebook(("x = 1\nprint(x)", "1\n")), path)

    notebook = recorded(new_notebook(("x = 1\nprint(x)", "1\n"), "f(x)"))
    assert faults_of(notebook, path) == ""
    notebook.cells[0].source = "# A comment and layout change nothing.\nx = (1)\nprint( x )"
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("Prose changes nothing."))
    assert faults_of(notebook, path) == ""

    notebook.cells[1].source = "x = 2\nprint(x)"
    assert "a code cell was changed" in faults_of(notebook, path)
    # Without a run it is not known whether f(x) shows something.
    assert "cell 2: shows something and has no output" in faults_of(notebook, path)

    notebook = recorded(new_notebook(("x = 1\nprint(x)", "1\n")))
    notebook.cells[0].outputs[0].text = "2\n"
    assert "an output was changed" in faults_of(notebook, path)
    notebook.cells[0].outputs = []
    assert "has no output: print(x)" in faults_of(recorded(notebook), path)


def test_order_and_hidden_cells_count_in_the_record():
    tools = load_tool("notebooks")
    notebook = new_notebook("x = 1", "#| hide\ny = 2", "#| export\nz = 3")
    before = tools.hash_sources(notebook)
    notebook.cells.reverse()
    assert tools.hash_sources(notebook) != before
    notebook.cells.reverse()
    notebook.cells[1].source = "#| hide\ny = 3"
    assert tools.hash_sources(notebook) != before


def test_the_record_is_the_same_on_every_python():
    source = 'f"{a!r:>{w}} {b} " "and" f"{c}"\nmatch x:\n    case {"k": v, **rest}:\n        pass'
    assert load_tool("notebooks").shorten_hash(load_tool("notebooks").describe_cell(source)) == "d640928ce8f9daaf"


def test_progress_bars_widgets_and_places_of_the_machine_are_no_outputs(tmp_path):
    notebook = new_notebook(
        ("x = 1", "begin\n 50%|█████     | 1/2 [00:01<00:01]\r100%|██████████| 2/2 [00:02<00:00]\nend\n")
    )
    path = tmp_path / "one.ipynb"
    assert "shows a progress bar" in faults_of(recorded(notebook), path)
    view = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Slider()"}
    notebook.cells[0].outputs.append(nbformat.v4.new_output("display_data", data=view))
    load_tool("notebooks").clean_outputs(notebook.cells[0])
    assert [output.text for output in notebook.cells[0].outputs] == ["begin\nend\n"]
    assert faults_of(recorded(notebook), path) == ""
    notebook.cells[0].outputs[0].text = f"{ROOT}/nbs\n"
    assert "names a folder of the machine" in faults_of(recorded(notebook), path)


def test_a_run_executes_the_notebook_in_its_folder_and_is_recorded(tmp_path):
    outputs = load_tool("outputs")
    path = tmp_path / "one.ipynb"
    cells = [
        "from pathlib import Path\nx = 3",
        "x * 14, Path('one.ipynb').exists()",
        ("#| slow\nprint('slow')", "kept\n"),
    ]
    nbformat.write(new_notebook(*cells), path)
    outputs.run_notebook(path, set())
    notebook = nbformat.read(path, 4)
    assert notebook.cells[1].outputs[0].data["text/plain"] == "(42, True)"
    assert notebook.cells[2].outputs == []  # no record says that its output was of these sources
    assert not list(outputs.faults(path))
    outputs.run_notebook(path, {"slow"})
    outputs.run_notebook(path, set())
    assert nbformat.read(path, 4).cells[2].outputs[0].text == "slow\n"
    assert not list(outputs.faults(path))

    before = path.read_text()
    failing = nbformat.read(path, 4)
    failing.cells[0].source = "1 / 0"
    nbformat.write(failing, path)
    before = path.read_text()
    ran, message = outputs.try_notebook(path, set())
    assert not ran
    assert "ZeroDivisionError" in message
    assert path.read_text() == before


# ---------------------------------------------------------------- lock files


def test_every_lock_file_is_exact_complete_and_within_the_ranges():
    lock = load_tool("lock")
    paths = sorted(lock.LOCKS.glob("*.txt"))
    assert "3.11.txt" in [path.name for path in paths]
    for path in paths:
        assert list(lock.lock_faults(path)) == []
        assert len(lock.read_lock(path)) > 100


def test_a_lock_file_that_lacks_a_package_or_leaves_a_range_is_noticed(tmp_path):
    lock = load_tool("lock")
    lines = (lock.LOCKS / "3.11.txt").read_text().splitlines()

    def write_changed(name: str, **changes: str) -> Path:
        path = tmp_path / name
        path.write_text("\n".join(changes.get(line.partition("==")[0], line) for line in lines))
        return path

    path = write_changed("3.11.txt", nbdev="nbdev==3.0", torch="")
    faults = ["3.11.txt has nbdev 3.0, settings.ini wants <3,>=2.4.14", "3.11.txt lacks torch"]
    assert sorted(lock.lock_faults(path)) == faults
    # On Python 3.13 there is no LAVIS, and numpy may be newer.
    assert list(lock.lock_faults(write_changed("3.13.txt"))) == []
    with pytest.raises(SystemExit, match="numpy>=1.26 is not an exact version"):
        lock.read_lock(write_changed("3.11.txt", numpy="numpy>=1.26"))


def test_a_lock_file_names_nothing_of_the_machine_that_wrote_it():
    for path in load_tool("lock").LOCKS.glob("*.txt"):
        for line in path.read_text().splitlines():
            assert re.fullmatch(r"#.*|[a-z0-9-]+==[\w.!]+", line)


def test_requirements_of_requirements_are_in_the_lock():
    lock = load_tool("lock")
    packages = lock.find_packages([lock.Requirement("pandas"), lock.Requirement("surely-not-there")])
    assert packages["python-dateutil"].version
    assert packages["surely-not-there"] is None
    assert lock.applies(lock.Requirement("x; python_version < '3'")) is False
    assert lock.applies(lock.Requirement("x; extra == 'track'"), ("track",))


# ---------------------------------------------------------------- mutants


def test_the_code_that_a_mutant_changes_is_there_once():
    mutate = load_tool("mutate")
    for mutant in mutate.MUTANTS:
        module = ROOT / f"cala/{mutant.module}.py"
        changed, count = mutate.replace_code(module.read_text(encoding="utf-8"), mutant.right, mutant.wrong)
        assert count == 1, mutant.title
        ast.parse(changed)
        assert mutate.notebook_of(module) is not None


def test_code_is_replaced_in_any_layout():
    replace_code = load_tool("mutate").replace_code
    source = "é = f(a,\n      1.)  # f(a, 1.0)\nx = f(a, 2)"
    assert replace_code(source, "f(a, 1.0)", "g()") == ("é = g()  # f(a, 1.0)\nx = f(a, 2)", 1)
    assert replace_code("if x: return 1.\nreturn 2", "return 1.0", "return 3") == ("if x: return 3\nreturn 2", 1)

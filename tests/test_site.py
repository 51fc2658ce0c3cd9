"The site of `make docs` and the links that open notebooks on Google Colab: what a whole build would find late."

import importlib.util
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))

import docs
import notebooks
import sync


@pytest.fixture
def conf():
    "The configuration of Sphinx, as a module."
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    spec = importlib.util.spec_from_file_location("conf", ROOT / ".ci/site/conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_names_every_notebook():
    groups = docs.pages_in_order()
    text = docs.write_navigation(groups)
    paths = {path.relative_to(docs.NBS) for path in notebooks.notebook_paths()} - {Path("index.ipynb")}
    absent = [path for path in paths if f"</{path.with_suffix('').as_posix()}>" not in text]
    assert not absent
    lessons = groups["The method"]
    assert [int(path.stem[:2]) for path in lessons] == list(range(len(lessons)))


def test_names_of_notebooks_in_prose_become_links():
    here, there = Path("tutorials/exercises.ipynb"), Path("method/00_task.ipynb")
    pages = docs.pages_by_name([here, there])
    prose = "See `00_task`, `method/00_task`, [`00_task`](x), `tutorials/exercises`.\n```\n`00_task`\n```"
    linked = docs.link_names(prose, here, pages)
    assert linked.count("](../method/00_task.ipynb)") == 2
    assert linked.endswith("[`00_task`](x), `tutorials/exercises`.\n```\n`00_task`\n```")


def test_names_of_tutorials_become_links_and_names_of_code_do_not():
    pages = docs.pages_by_name([Path("tutorials/first_run.ipynb"), Path("tutorials/ablation.ipynb")])
    linked = docs.link_names("`first_run` and `ablation`", Path("backbones/contract.ipynb"), pages)
    assert linked == "[`first_run`](../tutorials/first_run.ipynb) and `ablation`"


def test_a_number_stays_with_its_interval():
    joined = docs.join_intervals("| mean | -5.56 (-5.91 to -5.22) |")
    assert joined == "| mean | -5.56\xa0(-5.91\xa0to\xa0-5.22) |"


def test_pages_that_fetch_something_from_elsewhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="https://a.org">read</a><img src="a.png"><script src="https://a.org/b.js">'
    )
    (tmp_path / "b.css").write_text("@font-face { src: url(//a.org/c.woff) } a { background: url(d.png) }")
    assert list(docs.network_references(tmp_path)) == ["a.html: https://a.org/b.js", "b.css: //a.org/c.woff"]


def test_comments_behind_parameters_become_descriptions(conf):
    def scale(
        values: list,  # of `f(x)` * 2
        factor: float = 1.0,
    ) -> list:  # scaled_values
        "Multiply `values`."

    lines = [scale.__doc__]
    conf.describe_parameters(None, "function", "scale", scale, None, lines)
    expected = ["Multiply ``values``.", "", r":param values: of ``f(x)`` \* 2", r":returns: scaled\_values", ""]
    assert lines == expected


def test_the_cell_that_installs_cala_elsewhere_does_not_count_as_a_change():
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("1 + 1")])
    before = notebooks.hash_sources(notebook), notebooks.hash_outputs(notebook)
    notebook.cells.insert(1, new_code_cell(sync.INSTALL_CELL))
    assert (notebooks.hash_sources(notebook), notebooks.hash_outputs(notebook)) == before

"""The report of cala-demo: a notebook, executed over the folder of a demo and written as one page of HTML."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CalaError
from .files import write_atomically

if TYPE_CHECKING:
    from nbformat import NotebookNode

REPORT = Path(__file__).parents[1] / "demo_report.ipynb"  # a copy of nbs/tutorials/demo_report.ipynb
# nbconvert's page without the scripts that it would fetch from the network.
TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_js_mathjax %}
<style>math { font-family: "STIX Two Math", "Cambria Math", "DejaVu Math TeX Gyre", math; font-size: 1.1em }</style>
{% endblock %}"""


def render_page(
    notebook: "NotebookNode",  # executed
) -> str:
    "The notebook as one page of HTML, which needs no network: equations are MathML, which browsers show by themselves."
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class EquationRenderer(IPythonRenderer):
        "Writes equations as MathML instead of TeX."

        def inline_math(self, body):
            return convert(body)

        def block_math(self, body):
            return convert(body, display="block")

    def render_markdown(source):
        return MarkdownWithMath(renderer=EquationRenderer(escape=False)).render(source)

    exporter = HTMLExporter(raw_template=TEMPLATE, filters={"markdown2html": render_markdown})
    return exporter.from_notebook_node(notebook)[0]


def write_report(
    folder: Path,  # of a demo: data, runs, table.csv
    notebook: Path = REPORT,
) -> Path:  # report.html
    "Execute the report notebook, in the Python that runs now, over the folder of a demo, and write it as one page."
    if not notebook.is_file():
        raise CalaError(f"no {notebook}: the package is incomplete; --no-report leaves the report out")
    import nbformat  # here: only the report needs Jupyter
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbconvert.preprocessors import CellExecutionError, ExecutePreprocessor

    page = nbformat.read(notebook, as_version=4)
    # Without folders of kernels, only that of this Python is left; a kernel named python3 may belong to another Python.
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    os.environ["CALA_DEMO"] = str(Path(folder).resolve())
    executor = ExecutePreprocessor(timeout=600, extra_arguments=["--log-level=ERROR"])
    try:
        executor.preprocess(page, {"metadata": {"path": str(notebook.parent)}}, km=kernel)
    except CellExecutionError as error:
        reason = re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines()[-1]  # without the colours of a terminal
        raise CalaError(
            f"{notebook} failed over {folder} ({reason}), which is a fault of cala: please report it; "
            f"the table is in {folder / 'table.csv'}, and --no-report leaves the report out"
        ) from error
    path = Path(folder) / "report.html"
    write_atomically(path, render_page(page).encode())
    return path

"""How Sphinx makes the site from the notebooks. `.ci/docs.py` calls it, with the folder of prepared notebooks."""

import re
from dataclasses import is_dataclass

from docutils.nodes import SkipNode
from fastcore.docments import docments
from latex2mathml.converter import convert
from nbdev.config import get_config
from sphinx.util import logging

from cala.library.cli import read_comments

settings = get_config()

project = settings.title
author = settings.author
copyright = settings.copyright
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc"]
include_patterns = ["**.ipynb", "api.md"]

# Notebooks: the outputs that are committed are shown, and nothing is run.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # the outputs hold no widgets, so the pages need no script for them
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4  # links such as #results, as GitHub writes them
myst_update_mathjax = False
smartquotes = False  # the two hyphens of a flag stay two hyphens
highlight_language = "none"  # blocks of prose say their language; cells are Python anyway

# The front door: signatures from the code, descriptions from the comments behind the parameters.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
add_module_names = False

# Pages
html_theme = "furo"
html_title = settings.title
html_static_path = ["static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "github-dark"
html_theme_options = {
    "source_repository": settings.git_url,
    "source_branch": settings.branch,
    "source_directory": f"{settings.nbs_path.name}/",
    "top_of_page_buttons": ["view"],
}


def render_math(
    node,  # of docutils: an equation
    display: str,  # block or inline
) -> str:
    "An equation as MathML, which browsers show without a script and without a network."
    tex = node.astext().strip()
    html = convert(tex, display=display)
    if "\\" in html:
        logging.getLogger(__name__).warning("this part of an equation was not understood: %s", tex, location=node)
    return html


def visit_inline_math(translator, node):
    "Write an equation that stands in a sentence."
    translator.body.append(render_math(node, "inline"))
    raise SkipNode


def visit_block_math(translator, node):
    "Write an equation that stands alone."
    translator.body.append(f'<div class="math">{render_math(node, "block")}</div>')
    raise SkipNode


def as_rst(
    text: str,  # of a docstring or a comment
) -> str:
    "The text as Sphinx's directives want it: code in two backticks, no other marks."
    parts = re.split("`([^`]+)`", text)
    for place, part in enumerate(parts):
        parts[place] = f"``{part}``" if place % 2 else re.sub(r"([*|_\\])", r"\\\1", part)
    return "".join(parts)


def describe_parameters(app, what, name, value, options, lines):
    "Put the comments behind the parameters of a function, a class or a method below its docstring."
    lines[:] = [as_rst(line) for line in lines]
    if what not in ("class", "function", "method"):
        return
    comments = read_comments(value) if is_dataclass(value) else docments(value)
    fields = []
    for parameter, comment in comments.items():
        if comment:
            field = "returns" if parameter == "return" else f"param {parameter}"
            fields.append(f":{field}: {as_rst(comment)}")
    lines += ["", *fields, ""]


def set_dashes(app, page, template, context, doctree):
    "Set a dash between a parameter and its description, where Sphinx writes two hyphens."
    if page == "api":
        context["body"] = context["body"].replace("</em>) -- ", "</em>): ").replace("</strong> -- ", "</strong>: ")


def setup(app):
    "Give Sphinx the two changes above: equations and parameters."
    inline, block = (visit_inline_math, None), (visit_block_math, None)
    app.add_html_math_renderer("mathml", inline, block)
    app.connect("autodoc-process-docstring", describe_parameters)
    app.connect("html-page-context", set_dashes)
